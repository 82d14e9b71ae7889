"""Flushes from the arguments to the answer, over ranks that flush, refuse, die, keep silent."""

from __future__ import annotations

import asyncio
import math
import threading
import time

import pytest
import ray.exceptions

from actors.controller import ControllerActor
from actors.log_records import FlushIntent, FlushOutcome
from actors.log_stores import MemoryStore
from engine.flush import ALREADY_IN_PROGRESS, TIMED_OUT_WAITING, FlushCommand, FlushVerdict
from tests.unit.actors.fakes import FakeRank, make_request, rank_record
from tests.unit.actors.planes import (
    LATEST_S,
    Failing,
    add,
    child_process,
    control_plane,
    gated,
    ranks,
    run,
    says,
    statuses,
    until,
)


def test_a_flush_reaches_every_rank_with_a_new_epoch() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            fleet = ranks(3)
            await add(plane, *fleet)
            answer = await plane.flush(timeout_s=2, mode="fence", tiers=["device"])
            assert answer["success"], answer
            assert statuses(answer) == ["flushed"] * 3
            assert [row["freed_pages"] for row in answer["ranks"]] == [3, 3, 3]
            commands = [rank.commands[0] for rank in fleet]
            assert {command.epoch for command in commands} == {answer["epoch"]}
            assert {command.mode for command in commands} == {"fence"}
            assert {command.timeout_s for command in commands} == {2.0}
            # a floor-first mode gets the grace of one step as budget
            assert all(4.5 < command.budget_s <= 5.0 for command in commands)
            second = await plane.flush(timeout_s=2)
            assert second["epoch"] > answer["epoch"]
            assert all(1.5 < rank.commands[1].budget_s <= 2.0 for rank in fleet)
            membership = await plane.membership(-1, 0)
            assert membership.epoch == membership.floor == second["epoch"]

    run(scenario())


def test_no_rank_is_no_success_and_the_id_stays_free() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            answer = await plane.flush(flush_id="early", timeout_s=10)
            assert (answer["success"], answer["status"], answer["http_status"]) == (False, "no_ranks", 503)
            await add(plane, *ranks(1))
            answer = await plane.flush(flush_id="early")
            assert answer["success"]
            assert not answer["replayed"]

    run(scenario())


@pytest.mark.parametrize("timeout", [math.nan, math.inf, -1, "3", True, 3601, 10**400])
def test_senseless_timeouts_are_plain_refusals(timeout: object) -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            fleet = ranks(1)
            await add(plane, *fleet)
            answer = await plane.flush(timeout_s=timeout)
            assert (answer["success"], answer["status"], answer["http_status"]) == (False, "invalid", 400)
            assert answer["param"] == "timeout_s"
            assert fleet[0].commands == []

    run(scenario())


def test_a_silent_rank_is_unreachable_by_the_deadline_and_its_late_verdict_is_kept() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            fast, slow = ranks(2)
            gate = asyncio.Event()
            slow.behave = gated(gate)
            await add(plane, fast, slow)
            begin = time.monotonic()
            answer = await plane.flush(timeout_s=0.2, flush_id="late")
            took_s = time.monotonic() - begin
            assert 0.2 <= took_s <= 0.2 + LATEST_S
            assert statuses(answer) == ["flushed", "unreachable"]
            assert (answer["status"], answer["http_status"]) == ("unreachable", 503)
            assert not answer["floor_raised"]
            assert (await plane.flush_status("late"))["late"] == []
            (leg,) = [task for task in asyncio.all_tasks() if task.get_name() == "flush-late"]
            gate.set()
            await leg
            late = (await plane.flush_status("late"))["late"]
            assert [(row["rank"], row["status"]) for row in late] == [(1, "flushed")]

    run(scenario())


def test_refusals_and_timeouts_name_what_was_in_the_way() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            fleet = ranks(2)
            for rank in fleet:
                rank.behave = says("timed_out", TIMED_OUT_WAITING)
            await add(plane, *fleet)
            answer = await plane.flush(timeout_s=1)
            assert (answer["status"], answer["message"]) == ("timed_out", TIMED_OUT_WAITING)
            assert answer["http_status"] == 504
            assert answer["ranks"][0]["blockers"]["running"] == 2
            fleet[0].behave = fleet[0].flushes
            answer = await plane.flush(timeout_s=1)
            assert statuses(answer) == ["flushed", "timed_out"]
            assert not answer["success"]

    run(scenario())


def test_one_at_a_time_and_the_same_id_joins() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            (rank,) = ranks(1)
            gate = asyncio.Event()
            rank.behave = gated(gate)
            await add(plane, rank)
            first = asyncio.create_task(plane.flush(timeout_s=10, flush_id="one"))
            await rank.has_command.wait()
            second = await plane.flush(timeout_s=10, flush_id="two")
            assert (second["success"], second["message"]) == (False, ALREADY_IN_PROGRESS)
            assert (second["http_status"], second["pending_flush_id"]) == (409, "one")
            pending = (await plane.status(timeout_s=1))["pending_flush"]
            assert (pending["flush_id"], pending["waiting_for"]) == ("one", ["incarnation-0"])
            joined = asyncio.create_task(plane.flush(timeout_s=10, flush_id="one"))
            conflict = await plane.flush(timeout_s=11, flush_id="one")
            assert (conflict["status"], conflict["http_status"]) == ("conflict", 409)
            gate.set()
            answer, same = await first, await joined
            assert answer["success"]
            assert not answer["replayed"]
            assert same == answer | {"replayed": True}
            assert await plane.flush(timeout_s=10, flush_id="one") == answer | {"replayed": True}
            assert len(rank.commands) == 1

    run(scenario())


def test_a_caller_that_hangs_up_does_not_cancel_its_flush() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            (rank,) = ranks(1)
            gate = asyncio.Event()
            rank.behave = gated(gate)
            await add(plane, rank)
            caller = asyncio.create_task(plane.flush(timeout_s=10, flush_id="left"))
            await rank.has_command.wait()
            caller.cancel()
            await asyncio.gather(caller, return_exceptions=True)
            gate.set()
            answer = await plane.flush(timeout_s=10, flush_id="left")
            assert answer["success"]
            assert answer["replayed"]

    run(scenario())


def test_a_rank_that_dies_between_record_and_fan_out_has_its_row() -> None:
    async def scenario() -> None:
        child = child_process()
        alive, doomed = FakeRank(rank_record(0)), FakeRank(rank_record(1, pid=child.pid))
        doomed.behave = says("flushed")

        class Killing(MemoryStore):
            """Kills the rank while the intent is being stored."""

            def create(self, index: int, data: bytes) -> bool:
                if b'"flush_intent"' in data:
                    child.kill()
                    child.wait(timeout=10)
                return super().create(index, data)

        async with control_plane(Killing()) as plane:
            await add(plane, alive, doomed)
            answer = await plane.flush(timeout_s=5)
            child.communicate()
            assert statuses(answer) == ["flushed", "gone"]
            assert answer["success"]
            assert doomed.commands == []
            following = await plane.flush(timeout_s=5)
            assert [row["incarnation"] for row in following["ranks"]] == ["incarnation-0"]

    run(scenario())


def test_a_rank_that_dies_while_it_is_asked_is_gone_only_with_a_proof() -> None:
    async def scenario() -> None:
        async def dies(command: FlushCommand) -> FlushVerdict:
            raise ray.exceptions.ActorDiedError()

        async with control_plane() as plane:
            here, elsewhere = FakeRank(rank_record(0)), FakeRank(rank_record(1, node_id="elsewhere"))
            here.behave = elsewhere.behave = dies
            await add(plane, here, elsewhere, FakeRank(rank_record(2)))
            begin = time.monotonic()
            answer = await plane.flush(timeout_s=0.2)
            # the process of rank 0 lives on: Ray's word alone proves nothing, and the proof might still come
            assert 0.2 <= time.monotonic() - begin <= 0.2 + LATEST_S
            assert statuses(answer) == ["unreachable", "unreachable", "flushed"]
            assert "Ray reports" in answer["ranks"][0]["message"]

    run(scenario())


def test_who_registers_during_a_flush_is_told_its_epoch_and_has_a_row() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            old, fresh, warm = FakeRank(rank_record(0)), FakeRank(rank_record(1)), FakeRank(rank_record(2, epoch=1))
            gate = asyncio.Event()
            old.behave = gated(gate)
            await add(plane, old)
            flushing = asyncio.create_task(plane.flush(timeout_s=10))
            await old.has_command.wait()
            registered = await plane.register(fresh.record, fresh)
            assert registered.epoch == old.commands[0].epoch
            # an incarnation that holds KV already has to flush like all others
            await plane.register(warm.record, warm)
            await warm.has_command.wait()
            gate.set()
            answer = await flushing
            assert answer["success"]
            assert statuses(answer) == ["flushed", "joined", "flushed"]
            assert fresh.commands == []

    run(scenario())


def test_no_rank_is_told_what_could_not_be_stored() -> None:
    async def scenario() -> None:
        async with control_plane(Failing(FlushIntent)) as plane:
            fleet = ranks(1)
            await add(plane, *fleet)
            answer = await plane.flush()
            assert (answer["success"], answer["status"], answer["http_status"]) == (False, "unavailable", 503)
            assert fleet[0].commands == []

    run(scenario())


def test_success_is_not_said_before_it_is_stored() -> None:
    async def scenario() -> None:
        async with control_plane(Failing(FlushOutcome)) as plane:
            await add(plane, *ranks(1))
            answer = await plane.flush()
            assert (answer["success"], answer["status"]) == (False, "unavailable")
            assert statuses(answer) == ["flushed"]
            assert not answer["floor_raised"]

    run(scenario())


def test_ids_are_drawn_when_none_is_given() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            await add(plane, *ranks(1))
            one, two = await plane.flush(), await plane.flush()
            assert one["flush_id"] != two["flush_id"]
            request = make_request(one["flush_id"])
            assert request.flush_id == one["flush_id"]

    run(scenario())


class Slow(MemoryStore):
    """Takes its time for the intent of a flush: until it is told to go on, at most `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds
        self.goes_on = threading.Event()

    def create(self, index: int, data: bytes) -> bool:
        if b'"flush_intent"' in data:
            self.goes_on.wait(self._seconds)
        return super().create(index, data)


def test_a_slow_log_may_use_the_slack_as_long_as_nobody_was_told() -> None:
    async def scenario() -> None:
        async with control_plane(Slow(0.1), answer_slack_s=LATEST_S) as plane:
            await add(plane, *ranks(2))
            begin = time.monotonic()
            answer = await plane.flush(timeout_s=0)
            assert answer["success"], answer
            assert 0.1 <= time.monotonic() - begin <= LATEST_S

    run(scenario())


def test_a_flush_that_no_rank_was_told_of_has_a_row_for_each() -> None:
    async def scenario() -> None:
        store = Slow(10)
        async with control_plane(store, answer_slack_s=0.2) as plane:
            fleet = ranks(2)
            await add(plane, *fleet)
            begin = time.monotonic()
            answer = await plane.flush(timeout_s=0)
            assert time.monotonic() - begin <= 0.2 + LATEST_S  # the store hangs for ten
            assert (answer["success"], answer["status"]) == (False, "unavailable")
            assert statuses(answer) == ["refused", "refused"]
            assert all(row["message"].startswith("It was not told") for row in answer["ranks"])
            assert fleet[0].commands == fleet[1].commands == []
            store.goes_on.set()
            assert (await plane.flush(timeout_s=1))["success"]

    run(scenario())


def test_only_a_flush_of_everything_counts_as_the_last_flush() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            await add(plane, *ranks(2))
            dry = await plane.flush(dry_run=True)
            assert (dry["success"], dry["message"]) == (True, "Dry run: nothing was flushed.")
            assert (await plane.flush(scope={"namespace": "a"}))["message"] == "Cache flushed."
            assert plane._desk.seconds_since_flush() is None
            assert (await plane.flush())["success"]
            assert plane._desk.seconds_since_flush() is not None

    run(scenario())


def test_a_fault_of_ours_is_a_plain_answer_and_stands_in_nobodys_way() -> None:
    async def scenario() -> None:
        async with control_plane(Failing(FlushOutcome, RuntimeError, times=1)) as plane:
            await add(plane, *ranks(1))
            answer = await plane.flush(flush_id="cut", timeout_s=1)
            assert (answer["success"], answer["status"], answer["http_status"]) == (False, "unavailable", 500)
            assert "disk full" not in str(answer)
            await until(lambda: not plane._log.state.open_flushes)  # the next controller need not close it
            assert (await plane.flush(flush_id="cut", timeout_s=1))["success"]

    run(scenario())


def test_an_unknown_argument_is_a_plain_refusal_that_names_it() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            fleet = ranks(1)
            await add(plane, *fleet)
            actor = object.__new__(ControllerActor)
            actor._plane = plane
            answer = await actor.flush(timeout_s=1, time_out=5)
            assert (answer["success"], answer["status"], answer["http_status"]) == (False, "invalid", 400)
            assert answer["param"] == "time_out"
            assert fleet[0].commands == []
            assert (await actor.flush(timeout_s=1))["success"]

    run(scenario())
