"""The controller with nodes: floors on their pages, leases that run out, ranks that come and go."""

from __future__ import annotations

import asyncio
import threading
import time
from dataclasses import replace
from typing import Any

import pytest

from actors import control_plane as control_plane_module
from actors.clock import BootClock
from actors.end_proofs import LocalEnd
from actors.log_stores import MemoryStore
from actors.messages import NodeRenewal
from actors.nodes import RENEWALS_PER_LEASE
from configs.errors import ControlUnavailable
from engine.flush import FlushCommand, FlushVerdict
from tests.unit.actors.fakes import NODE, FakeRank, rank_record
from tests.unit.actors.planes import add, child_process, elsewhere, never, run, silent, statuses, until, world

LEASE_S = 0.3


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


def test_a_frozen_rank_that_reads_another_page_does_not_keep_the_log_from_being_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
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
            book, refusals = plane._nodes.book, list[str | None]()
            decide = book.renew

            def renew(renewal: NodeRenewal, now_s: float) -> str | None:
                refusals.append(decide(renewal, now_s))
                return refusals[-1]

            monkeypatch.setattr(book, "renew", renew)
            await until(lambda: len(refusals) == 4 * RENEWALS_PER_LEASE)
            assert set(refusals) == {None}

    run(scenario())
