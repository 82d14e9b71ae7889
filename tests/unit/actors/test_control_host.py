"""Flushes of the host tier from the arguments to the answer: a real controller, agent and tier, on a real file."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from actors.control_plane import ControlPlane
from tests.unit.actors.fakes import NODE, FakeRank, rank_record
from tests.unit.actors.nodes import FakeNode
from tests.unit.actors.planes import World, add, ranks, run, statuses, until, world
from tests.unit.actors.test_host_store import KEYS, PAGE_BYTES, Node, Rank


@dataclass
class Scene:
    """One rank on one node whose tier holds one page."""

    around: World
    plane: ControlPlane
    node: FakeNode
    rank: FakeRank
    writer: Rank


@asynccontextmanager
async def scene(directory: Path) -> AsyncIterator[Scene]:
    tier = Node(directory)
    async with world(hosts={NODE: tier.store}) as around, around.start(lease_s=0.2) as plane:
        (rank,) = ranks(1)
        await add(plane, rank)
        assert rank.registered is not None
        writer = Rank(tier, 11, lineage=rank.registered.lineage)
        await writer.claim_it()
        assert await writer.write(KEYS[0], epoch=rank.registered.epoch) == "committed"
        yield Scene(around, plane, around.nodes[NODE], rank, writer)


def tier_row(answer: dict[str, Any]) -> tuple[str, int, int]:
    (row,) = answer["host_tiers"]
    assert row["node"] == NODE
    return row["status"], row["freed_pages"], row["freed_bytes"]


def test_the_host_tier_alone_is_flushed_by_its_agent(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with scene(tmp_path) as now:
            answer = await now.plane.flush(tiers=["host"], timeout_s=1)
            assert answer["success"], answer
            assert tier_row(answer) == ("flushed", 1, PAGE_BYTES)
            assert (answer["epoch"], answer["untouched_tiers"], statuses(answer)) == (0, ["device"], ["flushed"])
            assert now.rank.commands == []
            assert not now.writer.finds(KEYS[0])

    run(scenario())


def test_a_fence_says_what_it_voided_and_refuses_what_lands_later(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with scene(tmp_path) as now:
            answer = await now.plane.flush(mode="fence")
            assert answer["success"], answer
            assert tier_row(answer) == ("flushed", 1, PAGE_BYTES)
            assert await now.writer.write(KEYS[1], epoch=answer["epoch"] - 1) == "below_floor"
            assert await now.writer.write(KEYS[1], epoch=answer["epoch"]) == "committed"

    run(scenario())


def test_a_wait_counts_what_the_tier_held_and_its_floor_follows(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with scene(tmp_path) as now:

            async def is_reported() -> bool:
                (row,) = (await now.plane.status(1.0))["host_tiers"]
                return row["valid"] == 1

            while not await is_reported():
                continue
            answer = await now.plane.flush(timeout_s=1)
            assert answer["success"], answer
            assert tier_row(answer) == ("flushed", 1, PAGE_BYTES)
            await until(lambda: now.node.floor == answer["epoch"])
            assert await now.writer.write(KEYS[1], epoch=answer["epoch"] - 1) == "below_floor"

    run(scenario())


def test_an_age_goes_to_the_tier_too(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with scene(tmp_path) as now:
            answer = await now.plane.flush(scope={"older_than_s": 0}, timeout_s=1)
            assert answer["success"], answer
            assert tier_row(answer)[0] == "flushed"
            # its chain was begun 100 ns after the machine's boot
            assert not now.writer.finds(KEYS[0])
            assert await now.writer.write(KEYS[1]) == "too_old"
            assert await now.writer.write(KEYS[1], birth_ns=int(now.node.clock.now_s() * 1e9)) == "committed"

    run(scenario())


def test_a_frozen_agent_is_no_success_for_its_tier_alone(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with scene(tmp_path) as now:
            now.node.freeze()
            answer = await now.plane.flush(tiers=["host"], timeout_s=0.05)
            assert (answer["success"], answer["status"], answer["http_status"]) == (False, "unreachable", 503)
            assert tier_row(answer)[0] == "unreachable"
            now.node.thaw()
            assert (await now.plane.flush(tiers=["host"], timeout_s=1))["success"]

    run(scenario())


@pytest.mark.parametrize("arguments", [{"tiers": ["host"]}, {"scope": {"older_than_s": 0}}])
def test_a_controller_that_has_just_begun_waits_for_the_nodes_of_its_ranks(
    tmp_path: Path, arguments: dict[str, Any]
) -> None:
    async def scenario() -> None:
        async with scene(tmp_path) as now:
            now.around.ranks.append(now.rank)
            now.node.freeze()  # it renews nothing while the next controller begins
            async with now.around.start(lease_s=5.0) as second:
                assert not (await second.flush(**arguments, timeout_s=0.05))["success"]
                assert now.writer.finds(KEYS[0])
                flushing = asyncio.create_task(second.flush(**arguments, timeout_s=5))
                now.node.thaw()
                answer = await flushing
                assert answer["success"], answer
                assert tier_row(answer)[0] == "flushed"
                assert not now.writer.finds(KEYS[0])

    run(scenario())


def test_a_node_that_missed_a_flush_has_no_lease_before_it_has_made_up_for_it(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with scene(tmp_path) as now, now.around.start(lease_s=0.2) as second:
            now.around.ranks.append(now.rank)
            now.node.kill()
            near = FakeRank(rank_record(1, node_id="near"))
            await add(second, near)
            answer = await second.flush(tiers=["host"], timeout_s=1)
            assert answer["success"], answer
            assert {row["node"]: row["status"] for row in answer["host_tiers"]}[NODE] == "expired"
            assert now.writer.finds(KEYS[0])
            now.node.start()
            await until(lambda: now.node.lease_left_s > 0)
            assert not now.writer.finds(KEYS[0])

    run(scenario())


def test_a_tier_that_is_not_configured_says_so(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with world() as around, around.start() as plane:
            answer = await plane.flush(tiers=["host"])
            assert (answer["status"], answer["param"]) == ("invalid", "tiers")
            assert "not configured; there is device" in answer["message"]
            assert (await plane.status(1.0))["host_tiers"] == []

    run(scenario())
