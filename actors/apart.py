"""Calls that go on when their caller is gone.

Ray cancels with a task all that it has called, in other actors too, and Serve cancels the task of a client that hangs
up: a flush would be taken away from the ranks that are carrying it out.
"""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")

#: asyncio itself forgets a task that nobody waits for
_under_way: set[asyncio.Task[Any]] = set()


async def apart(call: Coroutine[Any, Any, T]) -> T:
    """Carry `call` out to its end, also when whoever waits here is cancelled; what it calls is not the caller's."""
    # Ray knows by the context whose call a call is
    task = asyncio.create_task(call, context=contextvars.Context())
    _under_way.add(task)
    task.add_done_callback(_under_way.discard)
    return await asyncio.shield(task)
