"""What a controller that took over knows, and what it ends."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.clock import BootClock
from actors.control_log import ControlLog
from actors.flush_run import flush_answer
from actors.log_records import FlushIntent, FlushOutcome, RankJoined
from actors.log_stores import MemoryStore
from configs.errors import ControlUnavailable
from engine.flush import FlushVerdict
from tests.unit.actors.fakes import FakeRank, SetClock, make_request, rank_record
from tests.unit.actors.planes import (
    Failing,
    add,
    child_process,
    control_plane,
    never,
    ranks,
    run,
    statuses,
    until,
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


@pytest.mark.parametrize("mode", ["wait", "fence"])
def test_two_interrupted_flushes_of_one_id_are_both_ended_and_the_newer_one_has_the_id(mode: str) -> None:
    """The first intent was thought lost, its caller tried again under the same id, and the controller died."""

    async def scenario() -> None:
        store = MemoryStore()
        fleet = ranks(1)
        log = ControlLog(store, BootClock())
        log.take_over("controller-actor", "cluster")
        log.append(RankJoined(fleet[0].record))
        members = (fleet[0].record.incarnation,)
        older, newer = (
            log.append(FlushIntent(make_request("twice", mode=mode, timeout_s=5), True, members, "then")).index
            for _ in range(2)
        )
        goes_on = asyncio.Event()

        async def close(flush_id: str, index: int, term: int) -> FlushVerdict:
            if index == newer:
                await goes_on.wait()
            return FlushVerdict(flush_id, "flushed" if index == newer else "refused", epoch=index)

        fleet[0].do_close_flush = close
        async with control_plane(store, known=fleet) as plane:
            await until(lambda: older not in plane._log.state.open_flushes)
            goes_on.set()
            answer = await plane.flush(flush_id="twice", mode=mode, timeout_s=5)
            await until(lambda: not plane._log.state.open_flushes)
            assert (answer["success"], answer["replayed"], answer["epoch"]) == (True, True, newer)
            assert plane._log.state.ended["twice"].answer["epoch"] == newer
            assert plane._desk.read("twice") == answer | {"replayed": False, "late": []}

    run(scenario())


def test_the_answer_of_the_newer_flush_of_an_id_stays_whichever_ends_last() -> None:
    store = MemoryStore()
    log = ControlLog(store, BootClock())
    state = log.take_over("controller-actor", "cluster").state
    older, newer = (log.append(FlushIntent(make_request("twice"), True, (), "then")).index for _ in range(2))
    for index in (newer, older):
        answer = flush_answer(
            make_request("twice"), success=index == newer, status="flushed", message="", http_status=200
        )
        log.append(FlushOutcome(index, 0, answer))
    state = ControlLog(store, BootClock()).take_over("controller-actor", "cluster").state
    assert (state.ended["twice"].index, state.ended["twice"].answer["success"]) == (newer, True)
    assert (state.open_flushes, state.open_since) == ({}, {})


@pytest.mark.parametrize("mode", ["fence", "retract", "abort"])
def test_a_flush_that_is_finished_forward_ends_no_requests_after_its_callers_deadline(mode: str) -> None:
    async def scenario() -> None:
        store, clock = MemoryStore(), SetClock()
        fleet = ranks(1)
        log = ControlLog(store, clock)
        log.take_over("controller-actor", "cluster")
        log.append(RankJoined(fleet[0].record))
        request = make_request("late", mode=mode, timeout_s=10)
        index = log.append(FlushIntent(request, True, (fleet[0].record.incarnation,), "then")).index
        begun_s = clock.now_s()
        clock.time_s += 60
        async with control_plane(store, known=fleet, clock=clock, answer_slack_s=0.5) as plane:
            await fleet[0].has_command.wait()
            (command,) = fleet[0].commands
            assert command.index == index
            if mode == "fence":
                assert command.valid_until_s >= clock.now_s()
            else:
                assert command.valid_until_s <= begun_s + 10 + 0.5
                assert command.budget_s == 0
            assert plane._log.state.floor == index

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
