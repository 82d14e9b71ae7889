"""A rank's control methods beside a running engine thread: they answer on time whatever the engine does."""

from __future__ import annotations

import asyncio
import math
import os
import socket
import time
from dataclasses import replace

import pytest

from actors.fleet import Fleet
from actors.messages import AbortCommand
from configs.errors import InvariantError
from engine.batch import Batch
from engine.flush import ALREADY_IN_PROGRESS, TIMED_OUT_WAITING
from tests.fakes import flush_command
from tests.unit.actors.ranks import (
    LEASE_END,
    Members,
    Rank,
    collect,
    expected,
    fleet_of,
    rank_and_fleet,
    registered,
    request,
    run,
    running_rank,
    tokens,
    until,
)


def test_an_idle_rank_flushes_at_once() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            prompt = list(range(1, 14))
            await collect(fleet, rank.incarnation, request("first", prompt))
            verdict = await rank.actor.flush(flush_command(epoch=3, budget_s=0.0))
            assert verdict.status == "flushed"
            assert verdict.freed_pages > 0
            assert verdict.freed_bytes == verdict.freed_pages * 1000
            again = await collect(fleet, rank.incarnation, request("again", prompt))
            assert again[-1].stats is not None
            assert again[-1].stats.num_cached_tokens == 0
            status = await rank.actor.status()
            assert status["epoch"] == verdict.epoch == 3

    run(scenario())


def test_a_deadline_inside_a_long_step_is_answered_on_time_with_the_blockers() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            stream = asyncio.create_task(collect(fleet, rank.incarnation, request(num_tokens=30)))
            gate = await rank.inside_a_step()
            begin = time.monotonic()
            verdict = await rank.actor.flush(flush_command(epoch=1, budget_s=0.2))
            took_s = time.monotonic() - begin
            assert verdict.status == "timed_out"
            assert verdict.message == TIMED_OUT_WAITING
            assert verdict.blockers.any
            assert 0.19 < took_s < 1.0
            gate.open()
            assert tokens(await stream) == expected(request(num_tokens=30))
            assert (await rank.actor.status())["epoch"] == 0

    run(scenario())


def test_timeout_zero_is_refused_at_once_inside_a_step() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            stream = asyncio.create_task(collect(fleet, rank.incarnation, request()))
            gate = await rank.inside_a_step()
            verdict = await asyncio.wait_for(rank.actor.flush(flush_command(epoch=1, budget_s=0.0)), 2)
            assert verdict.status == "refused"
            assert verdict.blockers.any
            gate.open()
            await stream

    run(scenario())


def test_every_control_call_answers_inside_a_step() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            stream = asyncio.create_task(collect(fleet, rank.incarnation, request()))
            gate = await rank.inside_a_step()
            hello = await rank.actor.hello()
            assert hello["incarnation"] == rank.incarnation
            assert hello["pid"] == os.getpid()
            status = await rank.actor.status()
            assert status["is_stepping"]
            assert status["blockers"]["half_prefilled"] + status["blockers"]["running"] == 1
            assert await rank.actor.abort(AbortCommand(("r",), "enough", 1, math.inf)) == {"num_aborted": 1}
            gate.open()
            assert (await stream)[-1].finish == "abort"

    run(scenario())


def test_one_flush_waits_a_second_is_told_so_and_a_repeat_joins() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            stream = asyncio.create_task(collect(fleet, rank.incarnation, request()))
            gate = await rank.inside_a_step()
            first = asyncio.create_task(rank.actor.flush(flush_command("one", epoch=1, budget_s=10)))
            await until(lambda: rank.engine.open_flush(("one", 0)) is not None)
            second = await rank.actor.flush(flush_command("two", epoch=2, budget_s=10))
            assert (second.status, second.message) == ("busy", ALREADY_IN_PROGRESS)
            repeat = asyncio.create_task(rank.actor.flush(flush_command("one", epoch=1, budget_s=9)))
            gate.open()
            assert (await first).status == "flushed"
            assert await repeat == await first
            # the flush came after the last token: an idle instant, not an abort
            assert (await stream)[-1].finish == "length"
            assert await rank.actor.flush(flush_command("one", epoch=1, budget_s=5)) == await first

    run(scenario())


def test_commands_of_a_lower_term_are_refused() -> None:
    async def scenario() -> None:
        async with running_rank() as rank:
            assert (await rank.actor.flush(flush_command("new", epoch=5, term=4))).status == "flushed"
            assert (await rank.actor.flush(flush_command("old", epoch=6, term=3))).status == "refused"
            assert (await rank.actor.status())["epoch"] == 5

    run(scenario())


def test_a_new_controller_ends_what_waits_and_learns_what_was_done() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            done = await rank.actor.flush(flush_command("done", epoch=1))
            stream = asyncio.create_task(collect(fleet, rank.incarnation, request()))
            gate = await rank.inside_a_step()
            waiting = asyncio.create_task(rank.actor.flush(flush_command("waits", epoch=2, budget_s=10)))
            await until(lambda: rank.engine.open_flush(("waits", 0)) is not None)
            assert (await rank.actor.close_flush("waits", 0, 2)).status == "refused"
            assert (await waiting).status == "refused"
            assert await rank.actor.close_flush("done", 0, 2) == done
            assert (await rank.actor.close_flush("unheard", 0, 2)).status == "refused"
            # it was under way all the time: too late
            assert (await rank.actor.flush(flush_command("unheard", epoch=3, term=1))).status == "refused"
            gate.open()
            await stream
            assert (await rank.actor.status())["epoch"] == 1

    run(scenario())


def test_nothing_is_matched_before_the_rank_has_joined_and_then_under_the_answered_epoch() -> None:
    async def scenario() -> None:
        async with running_rank(joined=False) as rank, fleet_of(Members(rank)) as fleet:
            assert (rank.record.lineage, rank.record.epoch) == ("", 0)
            asked = request(prompt=list(range(1, 10)))
            stream = asyncio.create_task(collect(fleet, rank.incarnation, asked))
            done, _ = await asyncio.wait({stream}, timeout=0.05)
            assert not done
            assert not rank.runner.batches
            assert not (await rank.actor.hello())["is_serving"]
            # a flush of an empty rank is done at once, and what it said holds from the first match on
            early = await asyncio.wait_for(rank.actor.flush(flush_command("early", epoch=8, budget_s=60.0)), 1)
            assert (early.status, early.epoch) == ("flushed", 8)
            await rank.actor.join(registered(rank.state_dir, term=2, epoch=9, floor=7))
            assert tokens(await stream) == expected(asked)
            assert (await rank.actor.status())["epoch"] == 9
            assert (await rank.actor.hello())["lineage"] == "lineage"
            assert (await rank.actor.hello())["page_nonce"] == rank.page.nonce

    run(scenario())


def test_out_of_lease_a_rank_serves_uncached_and_with_the_next_lease_under_its_floor() -> None:
    async def cached(rank: Rank, fleet: Fleet, name: str) -> int | None:
        outputs = await collect(fleet, rank.incarnation, request(name, list(range(1, 14))))
        assert tokens(outputs) == expected(request(name, list(range(1, 14))))
        assert outputs[-1].stats is not None
        return outputs[-1].stats.num_cached_tokens

    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            assert await cached(rank, fleet, "cold") == 0
            assert await cached(rank, fleet, "warm") == 12
            lease_end = rank.words[LEASE_END]
            rank.words[LEASE_END] = 0
            assert await cached(rank, fleet, "uncached") == 0
            status = await rank.actor.status()
            assert not status["lease_ok"]
            assert status["counters"]["num_uncached_admissions"] == 1
            rank.words[LEASE_END] = lease_end
            assert await cached(rank, fleet, "warm again") == 12
            assert rank.page.raise_floor(1, 5)
            assert await cached(rank, fleet, "fenced") == 0
            assert (await rank.actor.status())["epoch"] == 5
            assert await cached(rank, fleet, "warm under the floor") == 12

    run(scenario())


def test_commands_that_come_too_late_do_nothing() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            stream = asyncio.create_task(collect(fleet, rank.incarnation, request()))
            gate = await rank.inside_a_step()
            now_s = time.clock_gettime(time.CLOCK_BOOTTIME)
            late = replace(flush_command("late", "abort", epoch=1, budget_s=5.0), valid_until_s=now_s - 0.001)
            assert (await rank.actor.flush(late)).status == "expired_command"
            assert (await rank.actor.abort(AbortCommand(None, "late", 1, now_s - 0.001)))["num_aborted"] == 0
            assert (await rank.actor.abort(AbortCommand(None, "superseded", 0, now_s + 9)))["num_aborted"] == 0
            gate.open()
            assert (await stream)[-1].finish == "length"
            assert (await rank.actor.status())["epoch"] == 0

    run(scenario())


def test_watch_does_not_return_while_the_rank_lives() -> None:
    async def scenario() -> None:
        async with running_rank() as rank:
            watching = asyncio.create_task(rank.actor.watch())
            await rank.actor.flush(flush_command(epoch=1))
            assert not watching.done()
            watching.cancel()

    run(scenario())


def test_a_dead_engine_tells_every_client_and_ends_the_process() -> None:
    def broken(batch: Batch) -> None:
        raise InvariantError("a page was handed out twice")

    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            stream = asyncio.create_task(collect(fleet, rank.incarnation, request("running")))
            gate = await rank.inside_a_step()
            rank.runner.during_run = broken
            gate.open()
            last = (await stream)[-1]
            assert last.finish == "error"
            assert "page" not in last.message
            await until(lambda: bool(rank.exits))
            assert rank.exits == [70]
            assert not list((rank.state_dir / "ipc").iterdir())

    run(scenario())


def test_a_failed_step_ends_its_requests_only() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            rank.runner.failure = RuntimeError("out of memory")
            answer = await collect(fleet, rank.incarnation, request("bad"))
            assert answer[-1].finish == "error"
            asked = request("good")
            assert tokens(await collect(fleet, rank.incarnation, asked)) == expected(asked)
            assert rank.exits == []

    run(scenario())


def test_a_stopped_rank_leaves_no_socket_and_no_thread() -> None:
    async def scenario() -> None:
        async with running_rank() as rank:
            assert rank.has_socket
            await rank.actor.stop()
            assert not rank.has_socket
            await asyncio.to_thread(rank.actor._thread.join, 10)
            assert not rank.actor._thread.is_alive()
            assert rank.exits == []

    run(scenario())


def test_the_sockets_of_dead_ranks_are_swept_at_the_next_start() -> None:
    async def scenario() -> None:
        async with running_rank("aaaaaaaaaaaa") as rank:
            folder = rank.state_dir / "ipc"
            dead = folder / "bbbbbbbbbbbb-999999999-1.ipc"
            with socket.socket(socket.AF_UNIX) as gone:
                gone.bind(str(dead))
            foreign = folder / "something-else"
            foreign.touch()
            other = type(rank.actor)(
                rank.actor._settings,
                1,
                "cccccccccccc",
                build_engine=rank.actor._build_engine,
                find_place=rank.actor._find_place,
            )
            await other.start()
            assert not dead.exists()
            assert foreign.exists()
            assert rank.has_socket
            await other.stop()

    run(scenario())


def test_another_number_changes_the_record_and_nothing_else() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            await rank.actor.flush(flush_command(epoch=4))
            record = await rank.actor.renumber(5)
            assert (record.rank, record.incarnation) == (5, rank.incarnation)
            assert (record.lineage, record.epoch) == ("lineage", 4)
            asked = request()
            assert tokens(await collect(fleet, rank.incarnation, asked)) == expected(asked)

    run(scenario())


@pytest.mark.parametrize("mode", ["fence", "retract", "abort"])
def test_modes_that_need_no_idle_moment_end_with_the_step(mode: str) -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            asked = request(num_tokens=200)
            stream = asyncio.create_task(collect(fleet, rank.incarnation, asked))
            gate = await rank.inside_a_step()
            flushing = asyncio.create_task(
                rank.actor.flush(flush_command(mode=mode, epoch=2, budget_s=5))  # pyright: ignore[reportArgumentType]
            )
            gate.open()
            assert (await flushing).status == "flushed"
            answer = await stream
            assert answer[-1].finish == ("abort" if mode == "abort" else "length")
            if mode != "abort":
                assert tokens(answer) == expected(asked)

    run(scenario())
