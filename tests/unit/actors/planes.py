"""Controllers without their actor: real log, real clock, real process proofs; ranks of plain Python."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from actors.clock import BootClock, Clock
from actors.control_plane import ControlPlane, Surroundings
from actors.log_stores import LogStore, MemoryStore
from actors.metrics import ControlMetrics
from configs.schema import ControlSettings
from engine.flush import Blockers, FlushCommand, FlushVerdict
from tests.unit.actors.fakes import NODE, FakeRank, rank_record

#: an answer may leave this much after its deadline
LATEST_S = 0.05


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 20))


@asynccontextmanager
async def control_plane(
    store: LogStore | None = None, known: list[FakeRank] | None = None, clock: Clock | None = None, **settings: Any
) -> AsyncIterator[ControlPlane]:
    """A controller over `store`; `known` are the actors that Ray would find by name."""
    handles = {rank.record.incarnation: rank for rank in known or []}
    around = Surroundings(
        clock=clock or BootClock(), actor_id="controller-actor", cluster="cluster", node_id=NODE,
        find_handle=lambda record: handles.get(record.incarnation),
    )  # fmt: skip
    plane = ControlPlane(store or MemoryStore(), ControlSettings(**settings), around, ControlMetrics())
    await plane.start()
    # as the actor does: a pass over all that pytest has loaded takes longer than an answer may be late
    gc.freeze()
    try:
        yield plane
    finally:
        gc.unfreeze()
        await plane.close()


async def add(plane: ControlPlane, *ranks: FakeRank) -> None:
    for rank in ranks:
        await plane.register(rank.record, rank)


def ranks(number: int) -> list[FakeRank]:
    return [FakeRank(rank_record(rank)) for rank in range(number)]


def statuses(answer: dict[str, Any]) -> list[str]:
    return [row["status"] for row in answer["ranks"]]


async def never(command: FlushCommand) -> FlushVerdict:
    await asyncio.Event().wait()
    raise AssertionError


def says(status: str, message: str = "") -> Callable[[FlushCommand], Awaitable[FlushVerdict]]:
    async def behave(command: FlushCommand) -> FlushVerdict:
        return FlushVerdict(command.flush_id, status, message, blockers=Blockers(running=2))  # type: ignore[arg-type]

    return behave


def gated(gate: asyncio.Event) -> Callable[[FlushCommand], Awaitable[FlushVerdict]]:
    async def behave(command: FlushCommand) -> FlushVerdict:
        await gate.wait()
        return FlushVerdict(command.flush_id, "flushed", epoch=command.epoch)

    return behave


def child_process() -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


class Failing(MemoryStore):
    """Fails at records of one kind: at all of them, or at the first `times`."""

    def __init__(self, kind: type, failure: type[Exception] = OSError, times: int | None = None) -> None:
        super().__init__()
        self._mark = f'"{kind.__struct_config__.tag}"'.encode()
        self._failure = failure
        self._times_left = times

    def create(self, index: int, data: bytes) -> bool:
        if self._mark in data and self._times_left != 0:
            self._times_left = None if self._times_left is None else self._times_left - 1
            raise self._failure("disk full")
        return super().create(index, data)
