"""Controllers that follow each other: what a take-over, a lost log and a record in doubt do to leases and flushes."""

from __future__ import annotations

import asyncio
import time

import pytest

from actors.log_records import FlushIntent, decode_entry
from actors.log_stores import MemoryStore
from tests.unit.actors.fakes import FakeRank, rank_record
from tests.unit.actors.planes import add, elsewhere, never, run, statuses, until, world

LEASE_S = 0.3


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
