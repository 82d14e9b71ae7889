"""Server-sent events, and noticing that a client has left.

What all clients we know can read (reference: strict line-by-line benchmark clients): one `data: {json}` line and an
empty line per event, no comments, no event names, `data: [DONE]` last.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable
from contextlib import aclosing
from typing import Any, TypeVar

import orjson
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from configs.errors import TidegateError
from deployments.errors import as_tidegate_error, openai_error

log = logging.getLogger(__name__)

T = TypeVar("T")

DONE = b"data: [DONE]\n\n"


class ClientGone(Exception):
    """The client closed its connection; there is nobody to answer."""


def event(content: dict[str, Any]) -> bytes:
    return b"data: " + orjson.dumps(content) + b"\n\n"


async def unless_gone(receive: Receive, work: Awaitable[T]) -> T:
    """Run `work` to its end, or cancel it and raise ClientGone when the client disconnects first.

    Returns only after `work` has ended, so that what it held is free again. The body must have been read.
    """
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGone
        return task.result()
    finally:
        task.cancel()
        watcher.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """Sends events until they end, the client leaves or an error comes; then the source is closed, always.

    source: the generator that `events` reads from. It is closed by itself because closing a generator that was never
    started runs none of its code. An error after the first byte cannot change the status any more: it is one last
    event with an error object.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        source: AsyncGenerator[Any, None],
        headers: dict[str, str] | None = None,
    ) -> None:
        self.status_code = 200
        self.background = None
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no"} | (headers or {}))
        self._events = events
        self._source = source

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self._send(send))
        except (ClientGone, OSError):
            log.debug("client left in mid-stream")

    async def _send(self, send: Send) -> None:
        async with aclosing(self._source), aclosing(ending_well(self._events)) as events:
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            async for chunk in events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
            await send({"type": "http.response.body", "body": DONE, "more_body": False})


async def ending_well(events: AsyncGenerator[bytes, None]) -> AsyncGenerator[bytes, None]:
    """`events`, with an error turned into a last event that tells it."""
    try:
        async for chunk in events:
            yield chunk
    except TidegateError as error:
        yield event(openai_error(error))
    except Exception as error:  # the edge of the process: the client gets a sentence, the log the rest
        log.exception("a stream failed")
        yield event(openai_error(as_tidegate_error(error)))


async def first_of(pieces: AsyncGenerator[T, None], receive: Receive) -> T:
    """The first item of `pieces`, waited for before the response begins.

    What goes wrong until then is still an HTTP status and not an event of a stream. Closes `pieces` when it raises.
    """
    try:
        return await unless_gone(receive, anext(pieces))
    except BaseException:
        await pieces.aclose()
        raise
