"""A flush id that is free again flushes again: the real controller, and a rank with a real gate and a real cache."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from actors.flush_book import REREAD_S
from engine.flush import FlushCommand, FlushVerdict
from tests import fakes
from tests.unit.actors.fakes import FakeRank, SetClock, rank_record
from tests.unit.actors.planes import add, control_plane, run

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6]
A_DAY_S = 86_400.0
assert A_DAY_S > REREAD_S


class EngineRank(FakeRank):
    """A rank whose flushes are carried out by an engine."""

    def __init__(self) -> None:
        super().__init__(rank_record(0))
        self.engine = fakes.FakeRank(page_size=4)
        self._num_requests = 0
        self.behave = self._flush

    def fill(self) -> None:
        """Serve a prompt in namespace `a`, which leaves its two pages in the cache."""
        self._num_requests += 1
        self.engine.submit(f"r{self._num_requests}", PROMPT, "a", max_new_tokens=1)
        self.engine.finish()

    @property
    def num_cached_pages(self) -> int:
        return self.engine.cache.counts().cached

    async def _flush(self, command: FlushCommand) -> FlushVerdict:
        offered = self.engine.loop.offer_flush(command)
        if isinstance(offered, FlushVerdict):
            return offered
        self.engine.finish()
        return await asyncio.wrap_future(offered.ended)


@pytest.mark.parametrize("arguments", [{"scope": {"namespace": "a"}}, {}], ids=["namespace", "everything"])
def test_a_nightly_id_drops_the_pages_every_night(arguments: dict[str, Any]) -> None:
    async def scenario() -> None:
        clock, rank = SetClock(), EngineRank()
        async with control_plane(clock=clock) as plane:
            await add(plane, rank)
            for _ in range(3):
                rank.fill()
                assert rank.num_cached_pages == 2
                answer = await plane.flush(flush_id="nightly-a", **arguments)
                assert (answer["status"], answer["replayed"]) == ("flushed", False)
                assert answer["ranks"][0]["freed_pages"] == 2
                assert rank.num_cached_pages == 0
                clock.time_s += A_DAY_S

    run(scenario())


def test_a_dry_run_of_the_same_id_counts_anew() -> None:
    async def scenario() -> None:
        clock, rank = SetClock(), EngineRank()
        async with control_plane(clock=clock) as plane:
            await add(plane, rank)
            first = await plane.flush(flush_id="look", dry_run=True)
            rank.fill()
            clock.time_s += A_DAY_S
            second = await plane.flush(flush_id="look", dry_run=True)
            assert [answer["ranks"][0]["freed_pages"] for answer in (first, second)] == [0, 2]

    run(scenario())
