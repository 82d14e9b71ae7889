"""Several asynchronous streams as one, in the order in which their items come."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Item(Generic[T]):
    value: T
    #: released by the reader: the stream may bring its next item
    taken: asyncio.Semaphore


@dataclass(frozen=True, slots=True)
class _Ended:
    error: Exception | None


async def merged(streams: Sequence[AsyncGenerator[T, None]]) -> AsyncGenerator[T, None]:
    """Items of all `streams` as they come; ends when all have ended.

    The first error of any stream is raised and ends the others. Closing this generator closes every stream before it
    returns. At most one item of each stream waits here: a slow reader slows them, and none starves another.
    """
    if len(streams) == 1:
        async with aclosing(streams[0]) as only:
            async for item in only:
                yield item
        return
    queue: asyncio.Queue[_Item[T] | _Ended] = asyncio.Queue()
    pumps = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    num_open = len(pumps)
    try:
        while num_open:
            match await queue.get():
                case _Item(value, taken):
                    taken.release()
                    yield value
                case _Ended(None):
                    num_open -= 1
                case _Ended(error):
                    assert error is not None
                    raise error
    finally:
        for pump in pumps:
            pump.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


async def _pump(stream: AsyncGenerator[T, None], queue: asyncio.Queue[_Item[T] | _Ended]) -> None:
    free = asyncio.Semaphore(1)
    ended = _Ended(None)
    try:
        async with aclosing(stream) as items:
            async for item in items:
                await free.acquire()
                queue.put_nowait(_Item(item, free))
    except Exception as error:  # not handled but handed on: the reader raises it
        ended = _Ended(error)
    queue.put_nowait(ended)
