"""The scheduler machine with a host tier whose copies end late, early, in any order, in part, or at the very end only.

Bytes of a copy are read when it ends and rubbish is written into the targets of loads until then: a page that was
handed out before its copy had ended gives a wrong token. Stale pages are seen by the age that every KV inherits.
"""

from __future__ import annotations

import logging

import pytest
from hypothesis import strategies as st
from hypothesis.stateful import precondition, rule

from cache.write_policy import WritePolicy
from engine.copy_jobs import LoadJob, WriteJob
from engine.events import CheckDue, TierAttached
from engine.host_calls import HostSettings
from tests.fake_host import FakeCopier, FakeTier
from tests.fakes import FakeRank
from tests.property.test_scheduler_machine import (
    MUST_HAPPEN,
    NUM_PAGES,
    PAGE_SIZE,
    STEMS,
    SchedulerMachine,
    Sent,
    run_machine,
    totals,
)

PAGE_BYTES = 10


class WriteBackMachine(SchedulerMachine):
    tiers = ("device", "host")
    policy: WritePolicy = "write_back"

    def make_rank(self) -> FakeRank:
        self.tier = FakeTier(before_look=self._check_lease)
        self.copier = FakeCopier(self.tier)
        settings = HostSettings("layout", "weights", PAGE_BYTES, self.policy, "full", 9 * PAGE_BYTES, 0.3, 0.6)
        rank = FakeRank(
            NUM_PAGES,
            PAGE_SIZE,
            max_running=4,
            max_step_tokens=7,
            max_len=40,
            cache=self.cache,
            host=settings,
            copier=self.copier,
        )
        self.void_writes: set[int] = set()
        self.copier.runner = rank.runner
        rank.loop.post(TierAttached(self.tier, "lineage"))
        return rank

    def _check_lease(self) -> None:
        assert self.cache.words.lease_ok, "invariant 5: looked into the tier with the lease over"

    @precondition(lambda self: self.copier.open)
    @rule(data=st.data(), is_whole=st.sampled_from([True, True, True, False]), count=st.integers(1, 3))
    def end_copies(self, data: st.DataObject, is_whole: bool, count: int) -> None:
        for _ in range(min(count, len(self.copier.open))):
            index = data.draw(st.integers(0, len(self.copier.open) - 1))
            num_done = 1000 if is_whole else data.draw(st.integers(0, 2))
            self._end(index, num_done)

    @rule(data=st.data())
    def tier_evicts(self, data: st.DataObject) -> None:
        for key in data.draw(st.lists(st.sampled_from(sorted(self.tier.pages)), max_size=3)) if self.tier.pages else ():
            self.tier.pages.pop(key, None)

    @rule(order=st.permutations(range(3)), namespace=st.sampled_from(["", "", "a"]), ends=st.sampled_from([0, 1, 1, 1]))
    def converse(self, order: list[int], namespace: str, ends: int) -> None:
        """Long prompts one after the other, more than the device holds, with copies that end soon."""
        for number in order:
            request_id = f"r{len(self.sent)}"
            prompt = [*STEMS[number], 30 + number, 31, 32, 33]
            request = self.rank.submit(request_id, prompt, namespace, max_new_tokens=6, ignore_eos=True)
            self.sent[request_id] = Sent(request, self.flushed_epoch, len(self.scoped))
            for _ in range(8):
                self._turn()
                for _ in range(min(ends, len(self.copier.open))):
                    self._end(0, 1000)

    @rule(is_new=st.booleans(), fate=st.sampled_from(["nothing", "flushed", "flushed", "back", "back", "gone"]))
    def tier_is_lost_or_flushed(self, is_new: bool, fate: str) -> None:
        """Its actor has died; perhaps it is back at once, with its pages or without. Or it is flushed by itself."""
        if fate == "nothing":
            return
        if fate == "flushed":
            self.void_writes |= {job.copy_id for job in self.copier.open if isinstance(job, WriteJob)}
            self.tier.drop_all()
            totals["tier flushed amid writes"] += bool(self.void_writes)
            return
        self.tier.number += 1
        if is_new:
            self.tier.pages.clear()
        self.rank.loop.post(TierAttached(self.tier if fate == "back" else None, "lineage"))
        totals["tier lost"] += 1

    @rule(is_broken=st.sampled_from([False, False, True]))
    def look_over(self, is_broken: bool) -> None:
        """The timer's look at the cache, which may find it broken and begin anew."""
        if is_broken:
            self.cache._num_private += 1
            totals["begun anew"] += 1
        self.rank.loop._carry_out(self.rank.scheduler.handle(CheckDue(), self.rank.clock.now_s))
        self.rank.scheduler.check()

    def _turn(self) -> bool:
        self.copier.scribble()
        return super()._turn()

    def _end(self, index: int, num_done: int) -> None:
        before = dict(self.tier.pages)
        job = self.copier.end(index, num_done)
        if job.copy_id in self.void_writes:
            assert self.tier.pages == before, "G3: it was on its way into the tier at the flush"
        totals["load ended" if isinstance(job, LoadJob) else "write ended"] += 1

    def come_to_rest(self) -> None:
        """What nobody has ended so far ends at last, one copy at a time."""
        for _ in range(3000):
            if self._turn():
                continue
            if not self.copier.open:
                break
            self._end(0, 1000)
        else:
            raise AssertionError("the engine does not come to rest")
        snapshot = self.rank.loop.snapshot()
        host = snapshot.host
        assert host is not None
        assert (snapshot.num_copying_pages, snapshot.blockers.copies_in_flight) == (0, 0)
        totals["loaded pages"] += host.num_loaded_pages
        totals["written pages"] += host.num_written_pages
        totals["dropped pages"] += host.drops.total()
        totals["known pages"] += host.num_known_pages


class WriteThroughMachine(WriteBackMachine):
    policy: WritePolicy = "write_through"


class SelectiveMachine(WriteBackMachine):
    policy: WritePolicy = "write_through_selective"


MACHINES: dict[str, type[WriteBackMachine]] = {
    "write_back": WriteBackMachine,
    "write_through": WriteThroughMachine,
    "write_through_selective": SelectiveMachine,
}
_MUST = (
    *("load ended", "write ended", "loaded pages", "written pages", "dropped pages", "known pages", "tier lost"),
    "tier flushed amid writes",
    *("begun anew", "retractions", "evicted pages", "floor swaps", "steps after a scoped flush", "wait flushed"),
    *("publishes refused for taint", "uncached admissions", "ended with abort", "ended with length"),
)


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "engine.loop")


@pytest.mark.parametrize("policy", list(MACHINES))
def test_copies_that_end_whenever_they_like_harm_nobody(policy: str) -> None:
    run_machine(MACHINES[policy], 100, _MUST)


@pytest.mark.deep
@pytest.mark.parametrize("policy", list(MACHINES))
def test_copies_that_end_whenever_they_like_harm_nobody_for_long(policy: str) -> None:
    run_machine(MACHINES[policy], 3000, (*MUST_HAPPEN, *_MUST))
