"""The controller without its actor: real log, real clock, real process proofs; ranks of plain Python."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import ray.exceptions

from actors.clock import BootClock
from actors.log_records import FlushIntent, FlushOutcome, RankJoined
from actors.log_stores import MemoryStore
from actors.process_proof import start_time_of
from configs.errors import ControlUnavailable, InvalidField, RankLost
from engine.flush import ALREADY_IN_PROGRESS, TIMED_OUT_WAITING, Blockers, FlushCommand, FlushVerdict
from tests.unit.actors.control import add, child_process, control_plane, run
from tests.unit.actors.fakes import FakeRank, make_request, rank_record

# the answer's own 50 ms, and as much again for a machine that does other things
LATEST_S = 0.15


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


def test_a_lost_rank_takes_no_requests_but_still_counts() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            fleet = ranks(2)
            await add(plane, *fleet)
            before = await plane.membership(-1, 0)
            waiting = asyncio.create_task(plane.membership(before.version, 10))
            fleet[1].dies.set()
            after = await waiting
            assert [member.rank for member in after.members] == [0]
            fleet[1].behave = never
            answer = await plane.flush(timeout_s=0)
            assert statuses(answer) == ["flushed", "unreachable"]
            rows = (await plane.status(timeout_s=1))["ranks"]
            assert [(row["rank"], row["status"]) for row in rows] == [(0, "serving"), (1, "lost")]

    run(scenario())


def test_the_membership_poll_ends_with_its_time() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            empty = await plane.membership(-1, 10)
            begin = time.monotonic()
            assert await plane.membership(empty.version, 0.05) == empty
            assert time.monotonic() - begin < 0.05 + LATEST_S

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
            membership = await plane.membership(-1, 0)
            while len(membership.members) < 2:
                membership = await plane.membership(membership.version, 10)
            assert membership.floor == first["epoch"]
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
            assert fleet[0].closed == fleet[1].closed == [("cut", term)]
        async with control_plane(store, known=fleet) as plane:
            assert (await plane.flush_status("cut"))["success"]
            assert len(fleet[0].closed) == 1

    run(scenario())


class Failing(MemoryStore):
    """Fails at records of one kind."""

    def __init__(self, kind: type) -> None:
        super().__init__()
        self._mark = f'"{kind.__struct_config__.tag}"'.encode()

    def create(self, index: int, data: bytes) -> bool:
        if self._mark in data:
            raise OSError("disk full")
        return super().create(index, data)


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


def test_a_registration_that_cannot_be_stored_is_taken_back() -> None:
    async def scenario() -> None:
        async with control_plane(Failing(RankJoined)) as plane:
            with pytest.raises(ControlUnavailable, match="cannot be written"):
                await add(plane, *ranks(1))
            assert (await plane.membership(-1, 0)).members == ()

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


def test_registering_is_refused_to_strangers() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            other_version = FakeRank(rank_record(0, message_version=99))
            with pytest.raises(InvalidField, match="99"):
                await add(plane, other_version)
            own = rank_record(0)
            recycled = FakeRank(rank_record(0, start_time=(start_time_of(own.pid) or 0) + 1))
            with pytest.raises(RankLost):
                await add(plane, recycled)
            assert (await plane.membership(-1, 0)).members == ()

    run(scenario())


def test_abort_goes_to_every_rank() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            fleet = ranks(2)
            await add(plane, *fleet)
            answer = await plane.abort("request-1", False, 5.0, "test", "tests")
            assert answer["success"]
            assert answer["num_aborted"] == 4
            assert [rank.aborted[0].request_ids for rank in fleet] == [("request-1",), ("request-1",)]
            left_s = fleet[0].aborted[0].valid_until_s - BootClock().now_s()
            assert 4.5 < left_s <= 5.0 + LATEST_S
            assert fleet[0].aborted[0].term == (await plane.hello())["term"]
            assert (await plane.abort(None, True, 5.0, "test", "tests"))["success"]
            assert fleet[0].aborted[-1].request_ids is None
            for request_id, everything in ((None, False), ("a", True), (7, False), ([], 1)):
                refused = await plane.abort(request_id, everything, 5.0, "test", "tests")
                assert refused["status"] == "invalid"

    run(scenario())


def test_status_names_who_does_not_answer_within_its_time() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            fleet = ranks(2)
            await add(plane, *fleet)

            async def silent() -> dict[str, Any]:
                await asyncio.Event().wait()
                raise AssertionError

            fleet[1].do_status = silent
            begin = time.monotonic()
            answer = await plane.status(timeout_s=0.1)
            assert time.monotonic() - begin < 0.1 + LATEST_S
            assert not answer["success"]
            assert [(row["rank"], row["status"]) for row in answer["ranks"]] == [(0, "serving"), (1, "unreachable")]
            assert answer["ranks"][0]["pages"] == {"free": 64}
            assert answer["ranks"][0]["longest_step_s"] == 0.1
            assert (await plane.status(timeout_s=math.nan))["status"] == "invalid"

    run(scenario())


def test_info_tells_no_endpoint_and_no_key() -> None:
    async def scenario() -> None:
        async with control_plane() as plane:
            await add(plane, FakeRank(rank_record(0, tcp_key="secret", tcp_endpoint="tcp://10.0.0.1:5")))
            info = await plane.info()
            assert info["ranks"][0]["page_size"] == 16
            assert "secret" not in str(info)
            assert "tcp://" not in str(info)
            assert (await plane.flush_status("unknown"))["http_status"] == 404
            assert (await plane.flush_status(7))["http_status"] == 400

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
