"""A rank's control loop between the controller and the engine's gate."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from actors.rank_flushes import RankFlushes
from configs.errors import ConfigError
from engine.flush import FlushCommand, FlushScope, FlushVerdict
from tests.fakes import FakeRank, flush_command
from tests.unit.actors.planes import run, until

BOOT_S = 5000.0


class Flushes:
    """A rank with an engine of production that takes turns when the test says so."""

    def __init__(self, *, is_serving: bool = True) -> None:
        self.rank = FakeRank()
        self.told: list[int] = []
        self.refused: list[FlushVerdict] = []
        self.boot_s = BOOT_S
        self.flushes = RankFlushes(
            self.rank.loop, lambda: self.boot_s, self.told.append, lambda command, verdict: self.refused.append(verdict)
        )
        if is_serving:
            self.flushes.serve()

    async def flush(self, command: FlushCommand) -> FlushVerdict:
        flushing = asyncio.create_task(self.flushes.flush(command))
        while not flushing.done():
            self.rank.turn()
            await asyncio.sleep(0)
        return flushing.result()


def test_a_command_is_carried_out_while_it_is_valid() -> None:
    async def scenario() -> None:
        rank = Flushes()
        verdict = await rank.flush(replace(flush_command("f", epoch=4), valid_until_s=BOOT_S + 1))
        assert (verdict.status, verdict.epoch) == ("flushed", 4)
        assert rank.told == []

    run(scenario())


def test_a_command_that_lay_too_long_is_never_carried_out() -> None:
    async def scenario() -> None:
        rank = Flushes()
        command = replace(flush_command("f", "abort", epoch=4), valid_until_s=BOOT_S + 1)
        rank.boot_s = BOOT_S + 1.001  # the process was frozen meanwhile
        verdict = await rank.flush(command)
        assert verdict.status == "expired_command"
        assert rank.refused == [verdict]
        assert rank.rank.loop.snapshot().epoch == 0
        # and it stays so for this flush, however often it comes
        assert await rank.flush(replace(command, valid_until_s=BOOT_S + 100)) == verdict

    run(scenario())


def test_the_deadline_is_the_earlier_of_budget_and_validity() -> None:
    async def scenario() -> None:
        rank = Flushes()
        rank.rank.submit("r", [1, 2, 3], max_new_tokens=500, ignore_eos=True)
        rank.rank.turn()
        flushing = asyncio.create_task(
            rank.flushes.flush(replace(flush_command("f", budget_s=60.0), valid_until_s=BOOT_S + 0.02))
        )
        verdict = await asyncio.wait_for(flushing, 5)
        assert verdict.status == "timed_out"

    run(scenario())


def test_before_it_serves_a_rank_has_nothing_to_flush_and_remembers_the_epoch() -> None:
    async def scenario() -> None:
        rank = Flushes(is_serving=False)
        command = flush_command("f", epoch=9, budget_s=60.0)
        verdict = await asyncio.wait_for(rank.flushes.flush(command), 5)
        assert (verdict.status, verdict.epoch, verdict.freed_pages) == ("flushed", 9, 0)
        assert rank.told == [9]
        assert await rank.flushes.flush(command) == verdict

    run(scenario())


def test_before_it_serves_a_rank_remembers_the_scopes_that_were_flushed() -> None:
    async def scenario() -> None:
        rank = Flushes(is_serving=False)
        scope = FlushScope(namespace="tenant")
        scoped = replace(flush_command("f", scope=scope, budget_s=60.0, index=12), sub_epoch=12)
        assert (await rank.flushes.flush(scoped)).status == "flushed"
        await rank.flushes.flush(replace(scoped, flush_id="counted", index=-1, dry_run=True))
        assert rank.flushes.early_sub_epochs == ((scope, 12),)
        rank.flushes.serve()
        await rank.flush(replace(scoped, flush_id="later", index=13, sub_epoch=13))
        assert rank.flushes.early_sub_epochs == ((scope, 12),)  # the engine has the later one

    run(scenario())


def test_a_rank_that_another_lineage_has_told_an_epoch_does_not_serve() -> None:
    async def scenario() -> None:
        rank = Flushes(is_serving=False)
        await rank.flushes.flush(replace(flush_command("f", epoch=9), lineage="lost"))
        with pytest.raises(ConfigError, match="another lineage"):
            rank.flushes.serve("new")
        rank.flushes.serve("lost")

    run(scenario())


def test_closing_ends_what_waits_and_forbids_what_has_not_come() -> None:
    async def scenario() -> None:
        rank = Flushes()
        rank.rank.submit("r", [1, 2, 3], max_new_tokens=500, ignore_eos=True)
        rank.rank.turn()
        waiting = asyncio.create_task(rank.flushes.flush(flush_command("f", budget_s=60.0)))
        await asyncio.sleep(0)
        closed = await rank.flushes.close(("f", 0), 1)
        assert closed.status == "refused"
        assert await waiting == closed
        never = await rank.flushes.close(("g", 0), 1)
        assert await rank.flush(flush_command("g")) == never
        # a command of the old term is refused after the new one has spoken
        await rank.flushes.close(("h", 0), 5)
        assert (await rank.flush(flush_command("i", term=4))).status == "refused"

    run(scenario())


def test_a_hold_ends_at_its_deadline_although_the_call_was_cancelled() -> None:
    async def scenario() -> None:
        rank = Flushes()
        rank.rank.submit("long", range(1, 20), max_new_tokens=50)
        rank.rank.turn()
        flushing = asyncio.create_task(rank.flushes.flush(flush_command("f", "drain", epoch=4, budget_s=0.05)))
        await asyncio.sleep(0)
        flushing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await flushing
        await until(lambda: rank.rank.loop.flush_verdict(("f", 0)) is not None)
        verdict = rank.rank.loop.flush_verdict(("f", 0))
        assert verdict is not None
        assert verdict.status == "timed_out"

    run(scenario())
