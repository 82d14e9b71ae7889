"""The controller's calls with nodes: flushes that give way or are cancelled, scopes, dry runs, audit."""

from __future__ import annotations

import asyncio

from actors.clock import BootClock
from actors.log_stores import MemoryStore
from engine.flush import FlushCommand, FlushScope, FlushVerdict
from tests.unit.actors.fakes import FakeRank, rank_record
from tests.unit.actors.planes import add, elsewhere, gated, never, run, statuses, world

LEASE_S = 0.3


class ShiftedClock(BootClock):
    """The clock of another machine, booted at another time."""

    def now_s(self) -> float:
        return super().now_s() + 10_000.0


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


def test_status_shows_the_nodes() -> None:
    async def scenario() -> None:
        async with world() as around, around.start() as plane:
            await add(plane, FakeRank(rank_record(0)), elsewhere(1))
            await plane.flush(mode="fence")
            rows = (await plane.status(1))["nodes"]
            assert [row["node"] for row in rows] == ["elsewhere", "node-here"]
            assert all(row["has_lease"] and row["floor"] > 0 for row in rows)

    run(scenario())
