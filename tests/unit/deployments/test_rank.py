"""What a rank's health check does beside looking at its scheduler."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from actors.control_plane import ControlPlane
from actors.log_stores import MemoryStore
from actors.messages import RankRecord
from deployments.rank import Rank
from tests.unit.actors.fakes import FakeRank, Remote, rank_record
from tests.unit.actors.planes import control_plane, run


class Scheduler(FakeRank):
    """A scheduler that has joined and flushed since: it may hold KV."""

    async def do_hello(self) -> dict[str, Any]:
        return await super().do_hello() | {"stalled_s": 0.0}

    async def do_renumber(self, rank: int) -> RankRecord:
        self.record = replace(self.record, rank=rank, lineage="lineage", epoch=3)
        return self.record


@dataclass(frozen=True)
class Handle:
    """The controller's handle."""

    plane: ControlPlane

    def __getattr__(self, name: str) -> Remote:
        return Remote(getattr(self.plane, name))


class Replica(Rank):
    """A replica outside of Serve: nothing is placed, and nothing stopped at its end."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._rank = scheduler.record.rank
        self._scheduler = scheduler

    def __del__(self) -> None:  # type: ignore[override]
        return

    async def join(self, plane: ControlPlane) -> None:
        self._controller = Handle(plane)
        self._registered = await plane.register(self._scheduler.record, self._scheduler)

    async def check_at(self, plane: ControlPlane) -> None:
        self._controller = Handle(plane)
        await self.check_health()


def test_a_rank_registers_again_with_a_controller_that_was_restarted() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        scheduler = Scheduler(rank_record(0))
        replica = Replica(scheduler)
        async with control_plane(store) as plane:
            await replica.join(plane)
            num_records = len(store.indices())
            await replica.check_at(plane)
            assert len(store.indices()) == num_records
        # Ray finds no actor of this name
        async with control_plane(store, known=[]) as plane:
            before = await plane.membership(-1, 0)
            assert before.members == ()
            await replica.check_at(plane)
            after = await plane.membership(before.version, 10)
            assert [member.rank for member in after.members] == [0]
            # it says itself that it is not empty any more, so a flush does not take it for a newcomer
            (row,) = (await plane.info())["ranks"]
            assert row["incarnation"] == scheduler.record.incarnation
            assert not scheduler.record.is_empty
            num_records = len(store.indices())
            await replica.check_at(plane)
            assert len(store.indices()) == num_records

    run(scenario())
