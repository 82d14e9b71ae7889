"""A whole controller without Ray: real log, clock and process proofs, agents of production on pages in memory."""

from __future__ import annotations

import asyncio
import gc
import itertools
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from actors.clock import BootClock, Clock
from actors.control_log import ControlLog
from actors.control_plane import ControlPlane
from actors.end_proofs import LocalEnd, process_name
from actors.host_store import HostStore
from actors.log_stores import LogStore, MemoryStore
from actors.log_thread import LogThread
from actors.metrics import ControlMetrics
from actors.surroundings import Surroundings
from configs.schema import ControlSettings
from engine.flush import Blockers, FlushCommand, FlushVerdict, Verdict
from tests.unit.actors.fakes import NODE, FakeRank, rank_record
from tests.unit.actors.nodes import FakeNode

#: an answer may leave 50 ms after its deadline: the flush machine's tests and the simulation say so in virtual time.
#: Here, on a machine that may do other things meanwhile, it is told from one that waits for what never comes
LATEST_S = 3.0


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 20))


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until a fact holds that sends no event; the scenario's own deadline ends it."""
    for _ in itertools.count():
        if condition():
            return
        await asyncio.sleep(0.001)


def child_process() -> subprocess.Popen[bytes]:
    """A process that lives until it is killed or its input is closed."""
    return subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)


@dataclass
class World:
    """What outlives a controller: nodes with their pages, the log, and which controller has the name."""

    clock: Clock = field(default_factory=BootClock)
    store: LogStore = field(default_factory=MemoryStore)
    audit: LogStore = field(default_factory=MemoryStore)
    nodes: dict[str, FakeNode] = field(default_factory=dict)
    #: the controller that agents find by its name; None: there is none now
    controller: ControlPlane | None = None
    #: ranks whose actors Ray would find by name
    ranks: list[FakeRank] = field(default_factory=list)
    #: an earlier controller's agents are there, whatever the log says
    has_elders: bool = False
    #: how often a controller ended its process
    num_ended: int = 0
    is_one_machine: bool = True
    #: host tiers by node; with one the deployment has that tier
    hosts: dict[str, HostStore] = field(default_factory=dict)
    #: nodes whose clock is not the controller's
    clocks: dict[str, Clock] = field(default_factory=dict)

    def node(self, node_id: str = NODE) -> FakeNode:
        """A node, with its agent started when it is first asked for."""
        if node_id not in self.nodes:
            clock = self.clocks.get(node_id, self.clock)
            self.nodes[node_id] = FakeNode(node_id, lambda: self.controller, clock, self.hosts.get(node_id))
            self.nodes[node_id].start()
        return self.nodes[node_id]

    def end_process(self) -> None:
        self.num_ended += 1

    async def ensure_agent(self, node_id: str) -> None:
        self.node(node_id)

    async def find_elders(self) -> bool:
        return self.has_elders

    async def find_handle(self, record: Any) -> FakeRank | None:
        return next((rank for rank in self.ranks if rank.record.incarnation == record.incarnation), None)

    @asynccontextmanager
    async def start(self, **settings: Any) -> AsyncIterator[ControlPlane]:
        """A controller that takes over now; agents find it until another one starts, or the block ends."""
        around = Surroundings(
            clock=self.clock, actor_id="controller-actor", cluster="cluster", node_id=NODE,
            find_handle=self.find_handle, find_process=lambda record: LocalEnd.of(process_name(record)),
            ensure_agent=self.ensure_agent, in_thread=asyncio.to_thread, end_process=self.end_process,
            has_elders=self.find_elders,
            is_one_machine=self.is_one_machine, tiers=("device", "host") if self.hosts else ("device",),
        )  # fmt: skip
        writer = LogThread(ControlLog(self.store, self.clock))
        plane = ControlPlane(writer, self.audit, ControlSettings(**settings), around, ControlMetrics())
        await plane.start()
        self.controller = plane
        try:
            yield plane
        finally:
            if self.controller is plane:
                self.controller = None
            await plane.close()

    def close(self) -> None:
        for node in self.nodes.values():
            node.close()


@asynccontextmanager
async def world(**facts: Any) -> AsyncIterator[World]:
    """A world for one test."""
    around = World(**facts)
    try:
        yield around
    finally:
        around.close()


@asynccontextmanager
async def control_plane(
    store: LogStore | None = None, known: list[FakeRank] | None = None, clock: Clock | None = None, **settings: Any
) -> AsyncIterator[ControlPlane]:
    """A controller over `store` in a world of its own; `known` are the actors that Ray would find by name."""
    facts = {"store": store or MemoryStore(), "clock": clock or BootClock(), "ranks": known or []}
    async with world(**facts) as around, around.start(**settings) as plane:
        # as the actor does: a pass over all that pytest has loaded takes longer than an answer may be late
        gc.freeze()
        try:
            yield plane
        finally:
            gc.unfreeze()


async def add(plane: ControlPlane, *ranks: FakeRank) -> None:
    """Register these ranks; each reads the page it is told."""
    for rank in ranks:
        rank.registered = await plane.register(rank.record, rank)
        rank.page_nonce = rank.registered.page.nonce


def ranks(number: int) -> list[FakeRank]:
    return [FakeRank(rank_record(rank)) for rank in range(number)]


def statuses(answer: dict[str, Any]) -> list[str]:
    return [row["status"] for row in answer["ranks"]]


async def never(command: FlushCommand) -> FlushVerdict:
    await asyncio.Event().wait()
    raise AssertionError


async def silent(*args: Any) -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


def elsewhere(rank: int, **facts: Any) -> FakeRank:
    """A rank of another node."""
    return FakeRank(rank_record(rank, node_id="elsewhere", **facts))


def says(status: str, message: str = "") -> Callable[[FlushCommand], Awaitable[FlushVerdict]]:
    async def behave(command: FlushCommand) -> FlushVerdict:
        return FlushVerdict(command.flush_id, status, message, blockers=Blockers(running=2))  # type: ignore[arg-type]

    return behave


def gated(gate: asyncio.Event, status: Verdict = "flushed") -> Callable[[FlushCommand], Awaitable[FlushVerdict]]:
    async def behave(command: FlushCommand) -> FlushVerdict:
        await gate.wait()
        return FlushVerdict(command.flush_id, status, epoch=command.epoch)

    return behave


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
