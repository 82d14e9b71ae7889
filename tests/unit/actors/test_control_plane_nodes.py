"""The controller with nodes: floors on their pages, leases that run out, controllers that follow each other."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from actors import control_plane as control_plane_module
from actors.clock import BootClock
from actors.end_proofs import LocalEnd
from actors.log_records import FlushIntent, decode_entry
from actors.log_stores import MemoryStore
from configs.errors import ControlUnavailable
from engine.flush import FlushCommand, FlushScope, FlushVerdict
from tests.unit.actors.fakes import NODE, FakeRank, rank_record
from tests.unit.actors.planes import add, child_process, run, until, world

LEASE_S = 0.3


class ShiftedClock(BootClock):
    """The clock of another machine, booted at another time."""

    def now_s(self) -> float:
        return super().now_s() + 10_000.0


async def never(command: FlushCommand) -> FlushVerdict:
    await asyncio.Event().wait()
    raise AssertionError


async def silent(*args: Any) -> dict[str, Any]:
    await asyncio.Event().wait()
    raise AssertionError


def gated(gate: asyncio.Event, status: str = "flushed") -> Callable[[FlushCommand], Any]:
    async def behave(command: FlushCommand) -> FlushVerdict:
        await gate.wait()
        return FlushVerdict(command.flush_id, status, epoch=command.epoch)  # type: ignore[arg-type]

    return behave


def statuses(answer: dict[str, Any]) -> list[str]:
    return [row["status"] for row in answer["ranks"]]


def elsewhere(rank: int, **facts: Any) -> FakeRank:
    """A rank of another node."""
    return FakeRank(rank_record(rank, node_id="elsewhere", **facts))


def test_a_fence_needs_no_word_of_a_frozen_rank() -> None:
    async def scenario() -> None:
        async with world() as around, around.start() as plane:
            fast, frozen = FakeRank(rank_record(0)), FakeRank(rank_record(1))
            frozen.behave = never
            await add(plane, fast, frozen)
            begin = time.monotonic()
            answer = await plane.flush(timeout_s=2, mode="fence")
            assert time.monotonic() - begin < 0.5
            assert answer["success"], answer
            assert statuses(answer) == ["flushed", "fenced"]
            assert answer["floor_raised"]
            assert around.node().floor == answer["epoch"]
            membership = await plane.membership(-1, 0)
            assert membership.floor == answer["epoch"]

    run(scenario())


def test_the_floor_is_on_the_page_before_a_rank_is_told() -> None:
    async def scenario() -> None:
        async with world() as around, around.start() as plane:
            rank = FakeRank(rank_record(0))
            floors: list[int] = []

            async def look(command: FlushCommand) -> FlushVerdict:
                floors.append(around.node().floor)
                return FlushVerdict(command.flush_id, "flushed", epoch=command.epoch)

            rank.behave = look
            await add(plane, rank)
            for mode in ("retract", "abort", "fence"):
                answer = await plane.flush(mode=mode)
                assert floors[-1] == answer["epoch"]
            waited = await plane.flush(mode="wait")
            assert floors[-1] < waited["epoch"]
            await until(lambda: around.node().floor == waited["epoch"])

    run(scenario())


def test_a_retract_that_a_rank_does_not_answer_is_no_success_and_cannot_be_taken_back() -> None:
    async def scenario() -> None:
        async with world() as around, around.start(step_grace_s=0.1) as plane:
            frozen = FakeRank(rank_record(0))
            frozen.behave = never
            await add(plane, frozen)
            answer = await plane.flush(mode="retract", timeout_s=0.1)
            assert (answer["status"], answer["floor_raised"]) == ("unreachable", True)
            assert around.node().floor == answer["epoch"]
            # what is not promised is not told to routers, who would refuse answers by it
            assert (await plane.membership(-1, 0)).floor == 0

    run(scenario())


def test_a_node_out_of_lease_counts_and_is_told_the_floor_with_its_next_lease() -> None:
    async def scenario() -> None:
        async with world() as around, around.start(lease_s=LEASE_S) as plane:
            near, far = FakeRank(rank_record(0)), elsewhere(1)
            await add(plane, near, far)
            far.behave = never
            node = around.node("elsewhere")
            node.kill()
            assert node.lease_left_s > 0
            answer = await plane.flush(timeout_s=10)
            assert statuses(answer) == ["flushed", "expired"]
            assert answer["success"]
            assert node.lease_left_s < 0
            floor = answer["epoch"]
            assert node.floor < floor
            node.start()
            await until(lambda: node.lease_left_s > 0)
            assert node.floor == floor

    run(scenario())


@pytest.mark.parametrize("arguments", [{"scope": {"namespace": "tenant"}}, {"tiers": ["device"]}])
def test_a_lost_node_blocks_no_flush_without_an_epoch_and_drops_all_when_it_is_back(arguments: dict[str, Any]) -> None:
    async def scenario() -> None:
        hosts: dict[str, Any] = {"nowhere": None}  # so that there is a host tier to leave alone
        async with world(hosts=hosts) as around, around.start(lease_s=0.2) as plane:
            near, far = FakeRank(rank_record(0)), elsewhere(1)
            await add(plane, near, far)
            far.behave = never
            node = around.nodes["elsewhere"]
            node.kill()
            answer = await plane.flush(timeout_s=1, **arguments)
            assert statuses(answer) == ["flushed", "expired"]
            assert (answer["success"], answer["epoch"]) == (True, 0)
            node.start()
            await until(lambda: node.lease_left_s > 0)
            (index,) = {command.index for command in near.commands}
            assert node.floor == index > 0
            assert around.nodes[NODE].floor == 0
            # who joins there keeps to it as well, under the next controller too
            late = elsewhere(2)
            await add(plane, late)
            assert late.registered is not None
            assert late.registered.floor == index
            far.behave = near.behave
            assert (await plane.flush(mode="fence", timeout_s=1))["epoch"] > index

    run(scenario())


def test_a_lost_node_does_not_make_status_and_abort_fail_for_ever() -> None:
    async def scenario() -> None:
        async with world() as around, around.start(lease_s=0.2) as plane:
            near, far = FakeRank(rank_record(0)), elsewhere(1)
            await add(plane, near, far)
            far.do_status = far.do_abort = silent  # type: ignore[method-assign]
            around.nodes["elsewhere"].kill()
            assert (await plane.status(0.01))["status"] == "unreachable"
            await until(lambda: plane._leases.is_over("elsewhere", around.clock.now_s()))
            for answer in (await plane.status(0.05), await plane.abort(None, True, 0.05, "test")):
                assert answer["success"], answer
                assert [row["status"] for row in answer["ranks"]] == ["serving", "expired"]

    run(scenario())


def test_a_node_that_renews_while_its_expiry_is_being_stored_gets_no_lease_without_the_floor() -> None:
    class Slow(MemoryStore):
        """Holds outcomes back until it is let go."""

        def __init__(self) -> None:
            super().__init__()
            self.may_store = threading.Event()
            self.may_store.set()

        def create(self, index: int, data: bytes) -> bool:
            if b'"flush_outcome"' in data:
                assert self.may_store.wait(timeout=10), "the test has forgotten to let the store go"
            return super().create(index, data)

    async def scenario() -> None:
        store = Slow()
        async with world(store=store) as around, around.start(lease_s=LEASE_S) as plane:
            near, far = FakeRank(rank_record(0)), elsewhere(1)
            await add(plane, near, far)
            far.behave = never
            node = around.node("elsewhere")
            node.kill()
            store.may_store.clear()
            flushing = asyncio.create_task(plane.flush(timeout_s=10, flush_id="f"))
            await until(lambda: plane._leases.why_not("elsewhere", around.clock.now_s()) is not None)
            assert (await plane.flush_status("f"))["status"] == "pending"
            node.start()
            await until(lambda: "being stored" in node.agent.message)
            assert node.lease_left_s < 0
            store.may_store.set()
            answer = await flushing
            assert statuses(answer) == ["flushed", "expired"]
            await until(lambda: node.lease_left_s > 0)
            assert node.floor == answer["epoch"]

    run(scenario())


def test_without_a_controller_every_lease_runs_out() -> None:
    async def scenario() -> None:
        async with world() as around:
            async with around.start(lease_s=LEASE_S) as plane:
                await add(plane, FakeRank(rank_record(0)))
                assert around.node().lease_left_s > 0
            await until(lambda: around.node().lease_left_s < 0)
            async with around.start(lease_s=LEASE_S):
                await until(lambda: around.node().lease_left_s > 0)

    run(scenario())


def test_without_its_log_a_controller_grants_nothing() -> None:
    class Failing(MemoryStore):
        fails = False

        def read(self, index: int) -> bytes | None:
            if self.fails:
                raise OSError("no answer")
            return super().read(index)

        def create(self, index: int, data: bytes) -> bool:
            if self.fails:
                raise OSError("no answer")
            return super().create(index, data)

    async def scenario() -> None:
        store = Failing()
        async with world(store=store) as around, around.start(lease_s=LEASE_S) as plane:
            await add(plane, FakeRank(rank_record(0)))
            store.fails = True
            await until(lambda: around.node().lease_left_s < 0)
            (row,) = (await plane.status(1))["nodes"]
            assert not row["has_lease"]
            assert "log" in row["message"]
            store.fails = False
            await until(lambda: around.node().lease_left_s > 0)

    run(scenario())


def test_a_superseded_controller_grants_nothing_and_ends_its_process() -> None:
    async def scenario() -> None:
        async with world() as around, around.start(lease_s=LEASE_S) as old:
            await add(old, FakeRank(rank_record(0)))
            async with around.start(lease_s=LEASE_S):
                await until(lambda: around.num_ended == 1)
                answer = old._nodes.renew(around.node().agent._renewal(), around.node())
                assert answer.lease_s == 0
                assert "taken over" in answer.message
                refused = await old.flush()
                assert refused["status"] == "unavailable"

    run(scenario())


def test_a_page_that_obeys_a_higher_term_makes_the_controller_look_at_the_log() -> None:
    async def scenario() -> None:
        async with world() as around, around.start(lease_s=30) as old:
            await add(old, FakeRank(rank_record(0)))
            node = around.node()
            node.freeze()  # no renewal tells it
            async with around.start(lease_s=30) as new:
                await node.agent.raise_floor((await new.hello())["term"], 0)
                node.thaw()
                await old._nodes.raise_floor(node.node_id, 1)
                await until(lambda: around.num_ended == 1)

    run(scenario())


def test_a_new_controller_counts_no_lease_as_over_before_two_lease_times() -> None:
    async def scenario() -> None:
        async with world() as around:
            near, far = FakeRank(rank_record(0)), elsewhere(1)
            around.ranks = [near, far]
            async with around.start(lease_s=LEASE_S) as plane:
                await add(plane, near, far)
            node = around.node("elsewhere")
            node.kill()
            far.behave = never
            begin = time.monotonic()
            async with around.start(lease_s=LEASE_S) as plane:
                answer = await plane.flush(timeout_s=10)
                assert time.monotonic() - begin >= 2 * LEASE_S
                assert statuses(answer) == ["flushed", "expired"]

    run(scenario())


def test_longer_leases_of_an_earlier_controller_are_waited_for() -> None:
    async def scenario() -> None:
        async with world() as around:
            near, far = FakeRank(rank_record(0)), elsewhere(1)
            around.ranks = [near, far]
            async with around.start(lease_s=60) as plane:
                await add(plane, near, far)
            around.node("elsewhere").kill()
            far.behave = never
            async with around.start(lease_s=LEASE_S) as plane:
                answer = await plane.flush(timeout_s=4 * LEASE_S)
                assert statuses(answer) == ["flushed", "unreachable"]

    run(scenario())


def test_a_fence_that_its_controller_did_not_finish_is_finished_by_the_next() -> None:
    async def scenario() -> None:
        async with world() as around:
            fleet = [FakeRank(rank_record(0)), FakeRank(rank_record(1))]
            around.ranks = fleet
            fleet[0].behave = fleet[1].behave = never
            async with around.start() as plane:
                await add(plane, *fleet)
                around.node().freeze()  # the floor does not get there
                flushing = asyncio.create_task(plane.flush(mode="fence", flush_id="cut"))
                await fleet[0].has_command.wait()
                flushing.cancel()
            around.node().thaw()
            for rank in fleet:
                rank.behave = rank.flushes
            async with around.start() as plane:
                answer = await plane.flush(mode="fence", flush_id="cut")
                assert answer["replayed"]
                assert answer["success"], answer
                assert answer["epoch"] == fleet[0].commands[0].epoch
                assert fleet[0].closed == []
                await until(lambda: around.node().floor >= answer["epoch"])
                following = await plane.flush(mode="fence")
                assert following["epoch"] > answer["epoch"]

    run(scenario())


def test_who_joined_after_an_interrupted_flush_began_was_told_its_epoch() -> None:
    async def scenario() -> None:
        async with world() as around:
            old, fresh = FakeRank(rank_record(0)), FakeRank(rank_record(1))
            around.ranks = [old, fresh]
            old.behave = never
            async with around.start() as plane:
                await add(plane, old)
                flushing = asyncio.create_task(plane.flush(timeout_s=60, flush_id="cut"))
                await old.has_command.wait()
                await add(plane, fresh)
                flushing.cancel()
            async with around.start() as plane:
                answer = await plane.flush(timeout_s=60, flush_id="cut")
                assert statuses(answer) == ["flushed", "joined"]

    run(scenario())


def test_a_rank_of_another_node_is_gone_by_its_agents_word() -> None:
    async def scenario() -> None:
        async with world() as around, around.start() as plane:
            child = child_process()
            near, far = FakeRank(rank_record(0)), elsewhere(1, pid=child.pid, pid_namespace="here")
            hidden = elsewhere(2, pid=child.pid, pid_namespace="there")
            far.behave = hidden.behave = never
            await add(plane, near, far, hidden)
            flushing = asyncio.create_task(plane.flush(timeout_s=1))
            await far.has_command.wait()
            child.kill()
            child.communicate()
            answer = await flushing
            # an agent that does not see the process proves nothing
            assert statuses(answer) == ["flushed", "gone", "unreachable"]

    run(scenario())


def test_an_agent_that_was_away_proves_the_end_when_it_is_back() -> None:
    async def scenario() -> None:
        async with world() as around, around.start() as plane:
            near, far = FakeRank(rank_record(0)), elsewhere(1)
            far.behave = never
            await add(plane, near, far)
            node = around.node("elsewhere")
            ended = asyncio.Event()
            node.find_process = lambda name: None if ended.is_set() else LocalEnd.of(name)
            node.kill()
            flushing = asyncio.create_task(plane.flush(timeout_s=4))
            await far.has_command.wait()
            ended.set()
            node.start()
            answer = await flushing
            assert statuses(answer) == ["flushed", "gone"]

    run(scenario())


def test_commands_end_in_the_clock_of_their_receiver() -> None:
    async def scenario() -> None:
        async with world(clocks={"elsewhere": ShiftedClock()}) as around, around.start() as plane:
            near, far = FakeRank(rank_record(0)), elsewhere(1)
            await add(plane, near, far)
            here_s = BootClock().now_s()
            answer = await plane.flush(timeout_s=2)
            assert answer["success"]
            near_left_s = near.commands[0].valid_until_s - here_s
            far_left_s = far.commands[0].valid_until_s - (here_s + 10_000.0)
            assert 2.0 < near_left_s < 2.5
            # never later than the near one, and earlier only by the way of the last renewal and the clocks' drift
            assert near_left_s - 0.1 < far_left_s <= near_left_s + 1e-6

    run(scenario())


def test_a_rank_takes_requests_when_its_node_has_its_first_lease() -> None:
    async def scenario() -> None:
        async with world() as around, around.start() as plane:
            around.node("elsewhere").freeze()
            rank = elsewhere(0)
            joining = asyncio.create_task(add(plane, rank))
            await until(lambda: plane._roster.book.is_joining("incarnation-0"))
            assert (await plane.membership(-1, 0)).members == ()
            # it holds nothing and will be told whatever is flushed meanwhile
            await add(plane, FakeRank(rank_record(1)))
            answer = await plane.flush()
            assert statuses(answer) == ["joined", "flushed"]
            assert rank.commands == []
            around.node("elsewhere").thaw()
            await joining
            assert rank.registered is not None
            assert rank.registered.epoch == answer["epoch"]
            assert len((await plane.membership(-1, 0)).members) == 2

    run(scenario())


def test_a_node_that_gets_no_lease_takes_no_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_plane_module, "_NODE_TIMEOUT_S", 0.3)

    class OtherMachine(BootClock):
        def __init__(self) -> None:
            self.boot_id = "another machine"

    async def scenario() -> None:
        async with world(clocks={"elsewhere": OtherMachine()}) as around, around.start() as plane:
            with pytest.raises(ControlUnavailable, match="serves one machine"):
                await add(plane, elsewhere(0))
            assert plane._roster.records() == []
        async with world(clocks={"elsewhere": OtherMachine()}, is_one_machine=False) as around, around.start() as plane:
            await add(plane, elsewhere(0))

    run(scenario())


def test_which_page_a_rank_reads_is_asked_when_its_file_was_made_anew() -> None:
    async def scenario() -> None:
        async with world() as around, around.start(lease_s=LEASE_S, step_grace_s=0.2) as plane:
            rank = FakeRank(rank_record(0))
            rank.behave = never
            await add(plane, rank)
            node = around.node()
            node.kill()
            node.file = None  # somebody removed it
            node.start()
            await until(lambda: node.file is not None and node.lease_left_s > 0)
            assert node.file is not None
            answer = await plane.flush(mode="fence", timeout_s=0)
            # the floor is on a page that this rank does not read
            assert statuses(answer) == ["unreachable"]
            rank.page_nonce = node.file.page.nonce
            record = replace(rank.record, page_nonce=rank.page_nonce)
            await until(lambda: plane._roster.book.record("incarnation-0") == record)
            assert statuses(await plane.flush(mode="fence")) == ["fenced"]

    run(scenario())


def test_a_frozen_rank_that_reads_another_page_does_not_keep_the_log_from_being_read() -> None:
    async def scenario() -> None:
        async with world() as around, around.start(lease_s=LEASE_S) as plane:
            rank = FakeRank(rank_record(0))
            await add(plane, rank)
            rank.do_hello = silent
            node = around.node()
            node.kill()
            node.file = None  # somebody removed it
            node.start()
            await until(lambda: node.file is not None and node.lease_left_s > 0)
            refusals = {plane._nodes.book.refusal(NODE)}
            ends_s = time.monotonic() + 4 * LEASE_S
            while time.monotonic() < ends_s:
                await asyncio.sleep(0.001)
                refusals.add(plane._nodes.book.refusal(NODE))
            assert refusals == {""}

    run(scenario())


def test_a_wait_gives_way_to_what_needs_no_idle_instant() -> None:
    async def scenario() -> None:
        async with world() as around, around.start() as plane:
            rank = FakeRank(rank_record(0))
            gate = asyncio.Event()

            async def behave(command: FlushCommand) -> FlushVerdict:
                if command.mode == "fence":
                    gate.set()
                    return FlushVerdict(command.flush_id, "flushed", epoch=command.epoch)
                return await gated(gate, "superseded")(command)

            rank.behave = behave
            await add(plane, rank)
            waiting = asyncio.create_task(plane.flush(timeout_s=60, flush_id="first"))
            await rank.has_command.wait()
            between_equals = await plane.flush(timeout_s=60, flush_id="second")
            assert between_equals["status"] == "in_progress"
            narrower = await plane.flush(mode="fence", scope={"namespace": "a"}, flush_id="third")
            assert narrower["status"] == "in_progress"
            fence = await plane.flush(mode="fence", flush_id="fence")
            assert fence["success"]
            gave_way = await waiting
            assert (gave_way["status"], gave_way["superseded_by"]) == ("superseded", "fence")
            assert statuses(gave_way) == ["superseded"]
            assert gave_way["epoch"] < fence["epoch"]

    run(scenario())


def test_a_wait_whose_ranks_are_silent_ends_with_the_flush_it_gave_way_to() -> None:
    async def scenario() -> None:
        async with world() as around, around.start() as plane:
            rank = FakeRank(rank_record(0))
            rank.behave = never
            await add(plane, rank)
            waiting = asyncio.create_task(plane.flush(timeout_s=60, flush_id="first"))
            await rank.has_command.wait()
            fence = await plane.flush(mode="fence", flush_id="fence")
            assert statuses(fence) == ["fenced"]
            gave_way = await asyncio.wait_for(waiting, 1)
            assert statuses(gave_way) == ["superseded"]

    run(scenario())


def test_a_pending_flush_can_be_cancelled() -> None:
    async def scenario() -> None:
        async with world() as around, around.start() as plane:
            rank = FakeRank(rank_record(0))
            gate = asyncio.Event()
            rank.behave = gated(gate)
            await add(plane, rank)
            waiting = asyncio.create_task(plane.flush(timeout_s=60, flush_id="f"))
            await rank.has_command.wait()

            async def close(flush_id: str, index: int, term: int) -> FlushVerdict:
                return FlushVerdict(flush_id, "refused", "Cancelled before it began.")

            rank.do_close_flush = close
            answer = await plane.cancel_flush("f", "tests")
            assert (answer["success"], answer["status"]) == (True, "cancelled")
            assert answer["flush"] == await waiting
            assert (await plane.flush_status("f"))["status"] == "cancelled"
            assert (await plane.cancel_flush("f", "tests"))["http_status"] == 409
            assert (await plane.cancel_flush("g", "tests"))["http_status"] == 404
            assert (await plane.cancel_flush(7, "tests"))["http_status"] == 400
            # the slot is free
            rank.behave = rank.flushes
            assert (await plane.flush())["success"]

    run(scenario())


def test_a_scope_has_a_sub_epoch_that_newcomers_are_told() -> None:
    async def scenario() -> None:
        async with world() as around, around.start() as plane:
            rank = FakeRank(rank_record(0))
            await add(plane, rank)
            answer = await plane.flush(scope={"namespace": "tenant"})
            assert answer["success"]
            assert (answer["epoch"], rank.commands[0].epoch) == (0, 0)
            assert answer["sub_epoch"] == rank.commands[0].sub_epoch > 0
            assert not answer["floor_raised"]
            fresh = FakeRank(rank_record(1))
            await add(plane, fresh)
            assert fresh.registered is not None
            (told,) = fresh.registered.sub_epochs
            assert (told.scope, told.index) == (FlushScope(namespace="tenant"), answer["sub_epoch"])
            # a flush of everything makes it needless
            await plane.flush()
            late = FakeRank(rank_record(2))
            await add(plane, late)
            assert late.registered is not None
            assert late.registered.sub_epochs == ()

    run(scenario())


def test_a_dry_run_leaves_no_record() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        async with world(store=store) as around, around.start() as plane:
            await add(plane, FakeRank(rank_record(0)))
            before = store.indices()
            answer = await plane.flush(mode="fence", dry_run=True)
            assert answer["success"]
            assert (answer["epoch"], answer["floor_raised"]) == (0, False)
            assert store.indices() == before

    run(scenario())


def test_every_call_is_in_the_audit_log() -> None:
    async def scenario() -> None:
        async with world() as around:
            async with around.start() as plane:
                await add(plane, FakeRank(rank_record(0)))
                await plane.flush(flush_id="good", caller="alice")
                await plane.flush(flush_id="good", caller="bob")
                await plane.flush(flush_id="good", timeout_s=1, caller="carol")
                await plane.flush(timeout_s="soon", caller="dave")
                await plane.cancel_flush("nothing", "erin")
                await plane.abort("r", False, 1.0, "why", "frank")
                await plane.abort(None, False, 1.0, "why", "grace")
            async with around.start() as plane:
                entries = (await plane.audit(100, None))["entries"]
                seen = [(entry["call"], entry["caller"], entry["status"]) for entry in reversed(entries)]
                assert seen == [
                    ("flush", "alice", "flushed"), ("flush", "bob", "flushed"), ("flush", "carol", "conflict"),
                    ("flush", "dave", "invalid"), ("cancel_flush", "erin", "unknown"), ("abort", "frank", "ok"),
                    ("abort", "", "invalid"),
                ]  # fmt: skip
                first = entries[-1]
                assert first["ranks"] == [[0, "incarnation-0", "flushed"]]
                assert (first["flush_id"], first["mode"], first["timeout_s"]) == ("good", "wait", 0.0)
                assert entries[-2]["replayed"]
                assert "soon" in entries[-4]["arguments"]["timeout_s"]
                of_one = (await plane.audit(100, "good"))["entries"]
                assert [entry["caller"] for entry in of_one] == ["carol", "bob", "alice"]
                for limit, flush_id in ((0, None), (True, None), ("x", None), (10, 7)):
                    assert (await plane.audit(limit, flush_id))["http_status"] == 400

    run(scenario())


class Uncertain(MemoryStore):
    """Stores the next record of this kind, and its answer is lost."""

    mark = b""

    def create(self, index: int, data: bytes) -> bool:
        created = super().create(index, data)
        if self.mark and self.mark in data:
            self.mark = b""
            raise OSError("no answer")
        return created


def test_an_intent_that_turns_up_in_the_log_later_is_closed_there() -> None:
    async def scenario() -> None:
        store = Uncertain()
        async with world(store=store) as around, around.start() as plane:
            rank = FakeRank(rank_record(0))
            await add(plane, rank)
            store.mark = b'"flush_intent"'
            assert (await plane.flush(flush_id="lost"))["status"] == "unavailable"
            assert (await plane.flush(flush_id="next"))["success"]
            await until(lambda: not plane._log.state.open_flushes)
            assert [command.flush_id for command in rank.commands] == ["next"]
        records = [decode_entry(store.read(index) or b"").record for index in store.indices()]
        assert len([record for record in records if isinstance(record, FlushIntent)]) == 2

    run(scenario())


def test_a_floor_that_rises_with_a_lost_intent_is_never_denied() -> None:
    async def scenario() -> None:
        store = Uncertain()
        async with world(store=store) as around:
            async with around.start(lease_s=0.5) as plane:
                rank = FakeRank(rank_record(0))
                await add(plane, rank)
                around.ranks.append(rank)
                store.mark = b'"flush_intent"'
                told = await plane.flush(flush_id="lost", mode="fence")
                assert (told["status"], told["floor_raised"], statuses(told)) == ("unavailable", False, ["unreachable"])
                await until(lambda: (plane._desk.read("lost") or {}).get("floor_raised", False))
                again = await plane.flush(flush_id="lost", mode="fence")
                assert (again["success"], again["replayed"], again["floor_raised"]) == (False, True, True)
                assert again["epoch"] == plane._log.state.floor
            async with around.start() as plane:
                read = await plane.flush(flush_id="lost", mode="fence")
                assert {key: read[key] for key in ("status", "epoch", "floor_raised", "message", "ranks")} == {
                    key: again[key] for key in ("status", "epoch", "floor_raised", "message", "ranks")
                }

    run(scenario())


def test_a_node_counted_as_out_of_lease_stays_so_while_the_outcome_is_in_doubt() -> None:
    async def scenario() -> None:
        store = Uncertain()
        async with world(store=store) as around:
            near, far = FakeRank(rank_record(0)), elsewhere(1)
            around.ranks += [near, far]
            far.behave = never
            async with around.start(lease_s=0.5) as plane:
                await add(plane, near, far)
                node = around.node("elsewhere")
                node.kill()
                store.mark = b'"flush_outcome"'
                told = await plane.flush(timeout_s=10, flush_id="f")
                assert (told["status"], statuses(told)) == ("unavailable", ["flushed", "expired"])
                node.start()
                await until(lambda: node.lease_left_s > 0)
                # the next controller reads a success there: no lease, not even of this one, may have a lower floor
                assert node.floor == plane._log.state.floor > 0
                again = await plane.flush(timeout_s=10, flush_id="f")
                assert again["success"], "the answer is amended when the record turns up"

    run(scenario())


@pytest.mark.parametrize("has_elders", [True, False])
def test_a_controller_without_its_log_says_nothing_while_earlier_leases_may_run(has_elders: bool) -> None:
    async def scenario() -> None:
        async with world() as around:
            async with around.start(lease_s=0.5) as plane:
                rank = FakeRank(rank_record(0))
                await add(plane, rank)
                node = around.node()
                await until(lambda: node.lease_left_s > 0)
                # cut off: neither its agent nor its rank hears of the next controller
                node.freeze()
            around.store, around.has_elders = MemoryStore(), has_elders
            async with around.start(lease_s=0.5):
                assert (node.lease_left_s <= 0) is has_elders
            node.thaw()

    run(scenario())


def test_status_shows_the_nodes() -> None:
    async def scenario() -> None:
        async with world() as around, around.start() as plane:
            await add(plane, FakeRank(rank_record(0)), elsewhere(1))
            await plane.flush(mode="fence")
            rows = (await plane.status(1))["nodes"]
            assert [row["node"] for row in rows] == ["elsewhere", "node-here"]
            assert all(row["has_lease"] and row["floor"] > 0 for row in rows)

    run(scenario())
