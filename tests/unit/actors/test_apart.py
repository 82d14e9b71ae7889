"""What is carried out apart ends, whoever waits for it; the way Ray finds out whose call a call is leads nowhere."""

from __future__ import annotations

import asyncio
import contextvars

import pytest

from actors.apart import apart
from tests.unit.actors.planes import run

caller: contextvars.ContextVar[str] = contextvars.ContextVar("caller", default="nobody")


def test_it_ends_although_its_caller_is_cancelled() -> None:
    async def scenario() -> None:
        begun, go_on, ended = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def work() -> str:
            begun.set()
            await go_on.wait()
            ended.set()
            return caller.get()

        caller.set("a task of Serve")
        waiting = asyncio.create_task(apart(work()))
        await begun.wait()
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        go_on.set()
        await ended.wait()
        assert await apart(work()) == "nobody"

    run(scenario())


def test_its_error_is_the_callers() -> None:
    async def fails() -> None:
        raise OSError("no disk")

    async def scenario() -> None:
        with pytest.raises(OSError, match="no disk"):
            await apart(fails())

    run(scenario())
