"""A node's agent: it writes what it is granted, lets the lease run out, and proves the end of processes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors.clock import BootClock
from actors.host_messages import HostDropOrder, HostDropped, HostPlace
from actors.messages import LeaseAnswer, NodeRenewal, ProcessName
from actors.process_proof import start_time_of
from tests.unit.actors.nodes import FakeNode
from tests.unit.actors.planes import child_process, run, until
from tests.unit.actors.test_host_store import KEYS, Rank
from tests.unit.actors.test_host_store import Node as Tier

LEASE_S = 0.2


class FakeController:
    """Grants as it is told."""

    def __init__(self, lineage: str = "lineage") -> None:
        self.lineage = lineage
        self.term = 3
        self.floor = 5
        self.lease_s = LEASE_S
        self.renewals: list[NodeRenewal] = []

    async def renew(self, renewal: NodeRenewal, handle: Any) -> LeaseAnswer:
        self.renewals.append(renewal)
        return LeaseAnswer(self.lineage, self.term, self.floor, self.lease_s, period_s=0.01)


def has_lease(node: FakeNode) -> bool:
    return node.file is not None and node.lease_left_s > 0


def test_the_lease_counts_from_before_it_was_asked_for_and_brings_its_floor() -> None:
    async def scenario() -> None:
        controller = FakeController()
        node = FakeNode("n", lambda: controller)
        node.start()
        await until(lambda: has_lease(node))
        assert node.file is not None
        words = node.file.page.read()
        assert (words.floor, words.term) == (5, 3)
        assert words.lease_end_ns <= int((controller.renewals[-1].sent_s + LEASE_S) * 1e9)
        # the first renewal had no page yet, because the agent knew no lineage
        assert controller.renewals[0].page is None
        await until(lambda: len(controller.renewals) > 3)
        assert controller.renewals[-1].page is not None
        assert controller.renewals[-1].page.nonce == node.file.page.nonce
        assert controller.renewals[-1].floor == 5
        node.close()

    run(scenario())


def test_without_an_answer_the_lease_runs_out_and_comes_back() -> None:
    async def scenario() -> None:
        controller = FakeController()
        found: list[FakeController | None] = [controller]
        node = FakeNode("n", lambda: found[0])
        node.start()
        await until(lambda: has_lease(node))
        found[0] = None
        await until(lambda: not has_lease(node))
        assert node.agent.facts()["message"] != ""
        controller.floor = 9
        found[0] = controller
        await until(lambda: has_lease(node))
        assert node.floor == 9
        node.close()

    run(scenario())


def test_a_refused_lease_is_not_written() -> None:
    async def scenario() -> None:
        controller = FakeController()
        controller.lease_s = 0.0
        node = FakeNode("n", lambda: controller)
        node.start()
        await until(lambda: len(controller.renewals) > 3)
        assert node.file is not None
        assert node.file.page.read().lease_end_ns == 0
        node.close()

    run(scenario())


def test_an_outranked_controller_is_obeyed_in_nothing() -> None:
    async def scenario() -> None:
        controller = FakeController()
        node = FakeNode("n", lambda: controller)
        node.start()
        await until(lambda: has_lease(node))
        assert (await node.agent.raise_floor(8, 12)).is_refused is False
        assert node.floor == 12
        answer = await node.agent.raise_floor(7, 99)
        assert (answer.is_refused, answer.floor, node.floor) == (True, 12, 12)
        controller.floor = 50  # of term 3
        await until(lambda: not has_lease(node))
        assert node.floor == 12
        node.close()

    run(scenario())


def test_an_agent_that_starts_again_goes_on_with_the_page() -> None:
    async def scenario() -> None:
        controller = FakeController()
        node = FakeNode("n", lambda: controller)
        node.start()
        await until(lambda: has_lease(node))
        file = node.file
        node.kill()
        node.start()
        seen = len(controller.renewals)
        await until(lambda: len(controller.renewals) > seen + 2)
        assert node.file is file
        node.close()

    run(scenario())


def test_another_lineage_ends_the_file() -> None:
    async def scenario() -> None:
        controller = FakeController()
        node = FakeNode("n", lambda: controller)
        node.start()
        await until(lambda: has_lease(node))
        old = node.file
        assert old is not None
        controller.lineage, controller.term, controller.floor = "another", 1, 0
        await until(lambda: node.file is not old and has_lease(node))
        assert old.page.read().is_retired
        assert node.file is not None
        assert node.file.page.nonce != old.page.nonce
        assert node.floor == 0
        node.close()

    run(scenario())


def test_the_end_of_a_process_is_told_to_all_who_wait_and_to_those_who_come_later() -> None:
    async def scenario() -> None:
        node = FakeNode("n", lambda: None, BootClock())
        node.start()
        child = child_process()
        name = ProcessName(child.pid, start_time_of(child.pid) or 0)
        first = asyncio.create_task(node.agent.until_gone(name))
        second = asyncio.create_task(node.agent.until_gone(name))
        await asyncio.sleep(0)
        third = asyncio.create_task(node.agent.until_gone(name))
        third.cancel()
        done, _ = await asyncio.wait({first, second}, timeout=0.02)
        assert not done
        child.kill()
        assert await first
        assert await second
        child.communicate()
        assert await node.agent.until_gone(name)
        # a process of another pid namespace is none that could be seen from here
        assert not await node.agent.until_gone(ProcessName(1, 1, "there"))
        node.close()

    run(scenario())


@pytest.mark.parametrize("older_than_s", [None, 0.0])
def test_a_flush_without_an_arena_is_kept_by_the_next_agent(tmp_path: Path, older_than_s: float | None) -> None:
    """The arena of a dead node is taken over after it."""

    async def scenario() -> None:
        dead = Tier(tmp_path, name="dead")
        dead.begin("lineage")
        writer = Rank(dead, 11, lineage="lineage")
        await writer.claim_it()
        assert await writer.write(KEYS[0], epoch=5) == "committed"
        dead.store.close()
        controller = FakeController()
        node = FakeNode("n", lambda: controller, host=Tier(tmp_path).store)
        node.start()
        await until(lambda: has_lease(node))
        order = HostDropOrder(7, older_than_s, controller.term, node.clock.now_s() + 5)
        assert await node.agent.drop_host(order) == HostDropped(0, 0)
        node.kill()
        second = Tier(tmp_path)
        node.host = second.store
        node.start()
        seen = len(controller.renewals)
        await until(lambda: len(controller.renewals) > seen + 2)
        heir = Rank(second, 12, lineage="lineage")
        assert isinstance(await heir.claim_it(), HostPlace)
        assert not heir.finds(KEYS[0], epoch=5)
        node.close()

    run(scenario())
