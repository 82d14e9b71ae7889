"""What a controller that took over knows, and what it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.clock import BootClock
from actors.control_log import ControlLog
from actors.log_records import FlushIntent, FlushOutcome, RankJoined
from actors.log_stores import MemoryStore
from configs.errors import ControlUnavailable
from engine.flush import FlushVerdict
from tests.unit.actors.fakes import FakeRank, make_request, rank_record
from tests.unit.actors.planes import (
    Failing,
    add,
    child_process,
    control_plane,
    never,
    ranks,
    run,
    statuses,
)


def test_a_restarted_controller_knows_its_ranks_and_epochs() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        fleet = ranks(2)
        async with control_plane(store) as plane:
            await add(plane, *fleet)
            first = await plane.flush(flush_id="kept")
            hello = await plane.hello()
        async with control_plane(store, known=fleet) as plane:
            again = await plane.hello()
            assert again["lineage"] == hello["lineage"]
            assert again["term"] > hello["term"]
            assert again["controller_restarts"] == 1
            # the first answer names them all: an Api that reads it drops nobody
            membership = await plane.membership(-1, 0)
            assert [member.rank for member in membership.members] == [0, 1]
            assert membership.floor == first["epoch"]
            assert plane._desk.seconds_since_flush() is not None, "a restart does not forget the last success"
            assert await plane.flush(flush_id="kept") == first | {"replayed": True}
            second = await plane.flush()
            assert second["success"]
            assert second["epoch"] > first["epoch"]
            assert fleet[0].commands[-1].term == again["term"]

    run(scenario())


def test_an_answer_of_another_boot_is_readable_and_never_replayed() -> None:
    class OtherBoot(BootClock):
        def __init__(self) -> None:
            self.boot_id = "another boot"

    async def scenario() -> None:
        store = MemoryStore()
        fleet = ranks(1)
        async with control_plane(store, clock=OtherBoot()) as plane:
            await add(plane, *fleet)
            first = await plane.flush(flush_id="nightly")
        async with control_plane(store, known=fleet) as plane:
            assert (await plane.flush_status("nightly"))["epoch"] == first["epoch"]
            assert plane._desk.seconds_since_flush() is None, "clocks of two boots have no difference"
            again = await plane.flush(flush_id="nightly")
            assert again["success"]
            assert not again["replayed"]
            assert again["epoch"] > first["epoch"]

    run(scenario())


def test_a_frozen_rank_is_still_counted_after_a_controller_restart() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        fleet = ranks(2)
        async with control_plane(store) as plane:
            await add(plane, *fleet)
        fleet[1].behave = never

        async def no_hello() -> dict[str, Any]:
            await asyncio.Event().wait()
            raise AssertionError

        fleet[1].do_hello = no_hello
        async with control_plane(store, known=fleet) as plane:
            answer = await plane.flush(timeout_s=0.1)
            assert statuses(answer) == ["flushed", "unreachable"]

    run(scenario())


def test_a_rank_whose_actor_was_not_found_serves_again_when_it_registers_again() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        fleet = ranks(2)
        async with control_plane(store) as plane:
            await add(plane, *fleet)
        async with control_plane(store, known=fleet[:1]) as plane:
            before = await plane.membership(-1, 0)
            assert [member.rank for member in before.members] == [0]
            term = (await plane.hello())["term"]
            assert (await plane.register(fleet[1].record, fleet[1])).term == term
            after = await plane.membership(before.version, 10)
            assert [member.rank for member in after.members] == [0, 1]
            assert statuses(await plane.flush()) == ["flushed", "flushed"]

    run(scenario())


def test_a_rank_that_ended_while_no_controller_watched_is_forgotten() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        child = child_process()
        alive, doomed = FakeRank(rank_record(0)), FakeRank(rank_record(1, pid=child.pid))
        async with control_plane(store) as plane:
            await add(plane, alive, doomed)
        child.kill()
        child.communicate()
        async with control_plane(store, known=[alive]) as plane:
            answer = await plane.flush()
            assert answer["success"]
            assert statuses(answer) == ["flushed"]

    run(scenario())


def test_an_interrupted_flush_is_closed_by_asking_the_ranks() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        fleet = ranks(2)
        fleet[0].behave = fleet[1].behave = never
        async with control_plane(store) as plane:
            await add(plane, *fleet)
            flushing = asyncio.create_task(plane.flush(timeout_s=60, flush_id="cut"))
            await fleet[1].has_command.wait()
            flushing.cancel()
        async with control_plane(store, known=fleet) as plane:
            answer = await plane.flush(timeout_s=60, flush_id="cut")
            assert answer["replayed"]
            assert answer["success"]
            assert statuses(answer) == ["flushed", "flushed"]
            assert answer["epoch"] == fleet[0].commands[0].epoch
            term = (await plane.hello())["term"]
            index = fleet[0].commands[0].index
            assert index == answer["epoch"]
            assert fleet[0].closed == fleet[1].closed == [("cut", index, term)]
        async with control_plane(store, known=fleet) as plane:
            assert (await plane.flush_status("cut"))["success"]
            assert len(fleet[0].closed) == 1

    run(scenario())


def test_a_repeat_of_an_interrupted_flush_is_answered_by_its_own_deadline() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        fleet = ranks(1)
        fleet[0].behave = never
        async with control_plane(store) as plane:
            await add(plane, *fleet)
            flushing = asyncio.create_task(plane.flush(flush_id="cut"))
            await fleet[0].has_command.wait()
            flushing.cancel()
        may_answer = asyncio.Event()

        async def close(flush_id: str, index: int, term: int) -> FlushVerdict:
            await may_answer.wait()
            return FlushVerdict(flush_id, "flushed", epoch=index)

        fleet[0].do_close_flush = close
        async with control_plane(store, known=fleet) as plane:
            answer = await plane.flush(flush_id="cut")
            assert (answer["status"], answer["http_status"], answer["epoch"]) == ("unavailable", 503, 0)
            may_answer.set()
            assert (await plane.flush(flush_id="cut"))["success"]

    run(scenario())


def test_of_two_interrupted_flushes_one_that_cannot_be_ended_blocks_nothing() -> None:
    async def scenario() -> None:
        store = Failing(FlushOutcome, RuntimeError, times=1)
        fleet = ranks(1)
        log = ControlLog(store, BootClock())
        log.take_over("controller-actor", "cluster")
        log.append(RankJoined(fleet[0].record))
        for flush_id in ("first", "second"):
            log.append(FlushIntent(make_request(flush_id), True, (fleet[0].record.incarnation,), "then"))
        async with control_plane(store, known=fleet) as plane:
            second = await plane.flush(flush_id="second")
            assert second["replayed"]
            assert second["success"]
            assert [flush_id for flush_id, *_ in fleet[0].closed] == ["first", "second"]
            assert (await plane.flush())["success"]

    run(scenario())


def test_a_superseded_controller_decides_nothing_any_more() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        fleet = ranks(1)
        async with control_plane(store) as old:
            await add(old, *fleet)
            async with control_plane(store, known=fleet) as new:
                answer = await old.flush()
                assert (answer["success"], answer["status"]) == (False, "unavailable")
                assert "another controller has taken over" in answer["message"]
                assert fleet[0].commands == []
                with pytest.raises(ControlUnavailable):
                    await add(old, FakeRank(rank_record(7)))
                assert (await new.flush())["success"]

    run(scenario())
