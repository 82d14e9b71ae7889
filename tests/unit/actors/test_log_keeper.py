"""The controller's end of its log: the state is what is stored, and the log stays short."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from actors.control_log import KEEP_S, ControlLog, Superseded
from actors.log_keeper import CHECKPOINT_EVERY, LogEvents, LogKeeper, Stored, Unstored
from actors.log_records import Checkpoint, FlushIntent, Probe, RankJoined, RankLeft, TakeOver, decode_entry
from actors.log_stores import LogStore, MemoryStore
from actors.log_thread import LogThread
from tests.unit.actors.fakes import SetClock, make_request, rank_record
from tests.unit.actors.planes import run


@dataclass
class Kept:
    keeper: LogKeeper
    store: LogStore
    clock: SetClock
    checked: list[float] = field(default_factory=list)
    superseded: list[Superseded] = field(default_factory=list)

    @property
    def records(self) -> list[Any]:
        return [decode_entry(self.store.read(index) or b"").record for index in self.store.indices()]


@asynccontextmanager
async def kept(store: LogStore | None = None) -> AsyncIterator[Kept]:
    store = store or MemoryStore()
    clock = SetClock()
    all_of_it: list[Kept] = []
    events = LogEvents(
        checked=lambda begun_s: all_of_it[0].checked.append(begun_s),
        superseded=lambda reason: all_of_it[0].superseded.append(reason),
    )
    keeper = LogKeeper(LogThread(ControlLog(store, clock)), clock, events)
    all_of_it.append(Kept(keeper, store, clock))
    await keeper.take_over("actor", "cluster", 5.0)
    yield all_of_it[0]
    keeper.close()


def intent(flush_id: str) -> FlushIntent:
    return FlushIntent(make_request(flush_id), True, (), "then")


def test_the_state_is_what_is_stored_when_the_caller_hears_of_it() -> None:
    async def scenario() -> None:
        async with kept() as log:
            epochs: list[tuple[int, int]] = []
            appends = [log.keeper.append(intent(f"f{number}")) for number in range(5)]
            for append in appends:
                append.add_done_callback(
                    lambda done: epochs.append((done.result().index, log.keeper.state.epoch))  # type: ignore[union-attr]
                )
            await asyncio.wait(appends)
            await asyncio.sleep(0)
            assert [index for index, _ in epochs] == [2, 3, 4, 5, 6]
            assert all(epoch >= index for index, epoch in epochs)
            assert log.checked == [100.0] * 5

    run(scenario())


def test_another_controller_is_told_once() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        async with kept(store) as old, kept(store):
            assert isinstance(await old.keeper.append(RankLeft("x")), Unstored)
            await old.keeper.check()
            assert len(old.superseded) == 1
            assert old.checked == []
            assert old.keeper.state.epoch == 0

    run(scenario())


def test_a_store_that_fails_is_no_check() -> None:
    class Failing(MemoryStore):
        fails = False

        def read(self, index: int) -> bytes | None:
            if self.fails:
                raise OSError("no answer")
            return super().read(index)

    async def scenario() -> None:
        store = Failing()
        async with kept(store) as log:
            store.fails = True
            await log.keeper.check()
            assert log.checked == []
            store.fails = False
            await log.keeper.check()
            assert log.checked == [100.0]

    run(scenario())


def test_a_record_that_is_there_after_all_is_folded_in_and_told() -> None:
    class Uncertain(MemoryStore):
        fails = False

        def create(self, index: int, data: bytes) -> bool:
            created = super().create(index, data)
            if self.fails:
                self.fails = False
                raise OSError("no answer")
            return created

    async def scenario() -> None:
        store = Uncertain()
        async with kept(store) as log:
            store.fails = True
            lost = await log.keeper.append(intent("lost"))
            assert isinstance(lost, Unstored)
            assert lost.fate is not None
            assert not lost.fate.done()
            assert log.keeper.state.epoch == 0
            assert await log.keeper.append(RankJoined(rank_record(0))) == Stored(3)
            assert await lost.fate == 2
            assert log.keeper.state.epoch == 2
            assert list(log.keeper.state.members) == ["incarnation-0"]

    run(scenario())


def test_what_became_of_a_record_in_doubt_is_found_out_without_another_flush() -> None:
    class Bad(MemoryStore):
        num_bad = 0

        def create(self, index: int, data: bytes) -> bool:
            self.num_bad -= 1
            if self.num_bad >= 0:
                raise OSError("no answer")
            return super().create(index, data)

    async def scenario() -> None:
        store = Bad()
        async with kept(store) as log:
            store.num_bad = 3
            lost = [await log.keeper.append(intent(name)) for name in ("a", "b")]
            log.keeper.tidy()
            await log.keeper.check()
            fates = [unstored.fate for unstored in lost if isinstance(unstored, Unstored)]
            assert not any(fate is None or fate.done() for fate in fates), "a probe that fails says nothing"
            log.keeper.tidy()
            assert [await fate for fate in fates if fate is not None] == [None, None]
            assert [type(record) for record in log.records] == [TakeOver, Probe]
            log.keeper.tidy()
            await log.keeper.check()
            assert len(log.records) == 2, "one is enough"

    run(scenario())


def test_a_checkpoint_when_it_is_due_and_what_it_replaces_ten_minutes_later() -> None:
    async def scenario() -> None:
        async with kept() as log:
            for number in range(CHECKPOINT_EVERY - 1):
                log.keeper.append(RankLeft(f"x{number}"))
            last = log.keeper.append(RankJoined(rank_record(0)))
            # not while a record is under way: the state would not say what the log says
            log.keeper.tidy()
            await last
            assert not any(isinstance(record, Checkpoint) for record in log.records)
            log.keeper.tidy()
            log.keeper.tidy()
            await log.keeper.append(RankLeft("y"))
            checkpoints = [record for record in log.records if isinstance(record, Checkpoint)]
            assert [list(checkpoint.state.members) for checkpoint in checkpoints] == [["incarnation-0"]]
            log.clock.time_s += KEEP_S
            log.keeper.tidy()
            await log.keeper.check()
            assert len(log.store.indices()) == CHECKPOINT_EVERY + 3
            log.clock.time_s += 1
            log.keeper.tidy()
            await log.keeper.check()
            assert [type(record) for record in log.records] == [Checkpoint, RankLeft]
        async with kept(log.store) as again:
            assert list(again.keeper.state.members) == ["incarnation-0"]
            assert again.keeper.state.lineage == log.keeper.state.lineage

    run(scenario())
