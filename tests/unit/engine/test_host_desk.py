"""The scheduler and a host tier, event by event: what is ordered when, who owns what, what a flush does about it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cache.types import DEFAULT_NAMESPACE
from cache.write_policy import WritePolicy
from configs.errors import InvariantError
from engine.control_words import ControlWords
from engine.copy_jobs import HostCounters, LoadJob, WriteJob
from engine.events import AbortRequested, CheckDue, CopyEnded, TierAttached
from engine.flush import FlushMode, FlushScope, FlushVerdict
from engine.flush_gate import PendingFlush
from engine.flush_policy import COPY_GRACE_S
from engine.host_calls import HostSettings
from tests.fake_host import FakeCopier, FakeTier
from tests.fakes import FakeRank, flush_command, foretell, tokens_of

PAGE_SIZE = 4
PAGE_BYTES = 10
PROMPT = list(range(1, 22))


class HostRank(FakeRank):
    """A fake rank on a fake tier; copies end when the test says."""

    def __init__(self, policy: WritePolicy = "write_back", num_pages: int = 16, max_inflight: int = 64) -> None:
        self.tier = FakeTier()
        self.copier = FakeCopier(self.tier)
        settings = HostSettings("layout", "weights", PAGE_BYTES, policy, "full", max_inflight * PAGE_BYTES, 0.25, 0.5)
        super().__init__(num_pages, PAGE_SIZE, host=settings, copier=self.copier)
        self.copier.runner = self.runner
        self.loop.post(TierAttached(self.tier, "lineage"))

    @property
    def host(self) -> HostCounters:
        counters = self.loop.snapshot().host
        assert counters is not None
        return counters

    @property
    def loads(self) -> list[LoadJob]:
        return [job for job in self.copier.open if isinstance(job, LoadJob)]

    @property
    def writes(self) -> list[WriteJob]:
        return [job for job in self.copier.open if isinstance(job, WriteJob)]

    def end_copies(self, num_done: int = 1000) -> None:
        while self.copier.open:
            self.copier.end(0, num_done)
        self.turn()

    def ask(self, request_id: str, prompt: list[int] = PROMPT, namespace: str = "") -> None:
        """Answer a request; copies that it needs end at once."""
        request = self.submit(request_id, prompt, namespace, max_new_tokens=2, ignore_eos=True)
        while self.turn() or self.copier.open:
            while self.copier.open:
                self.copier.end(0, 1000)
        assert self.token_ids(request_id) == foretell(request, self.max_total).token_ids

    def forget_device(self) -> None:
        """A flush of the device alone: what is left is in the host tier."""
        assert self.flush(tiers=("device",), epoch=0).status == "flushed"

    def flush(self, mode: FlushMode = "fence", **fields: object) -> FlushVerdict:
        pending = self.offer(mode, **fields)
        self.turn()
        return pending.ended.result(0)

    def offer(self, mode: FlushMode, **fields: object) -> PendingFlush:
        flush_id = f"f{self.clock.now_s}-{len(fields)}-{mode}"
        offered = self.loop.offer_flush(flush_command(flush_id, mode, **fields))  # pyright: ignore[reportArgumentType]
        assert isinstance(offered, PendingFlush)
        return offered

    def cached(self, request_id: str) -> tuple[int, int]:
        """Tokens of the answered request from the device and from the host."""
        last = self.answers[request_id].last
        assert last is not None
        assert last.stats is not None
        tiers = last.stats.cached_by_tier
        assert sum(tiers.values()) == last.stats.num_cached_tokens
        return tiers["device"], tiers["host"]


@pytest.fixture
def warm() -> Callable[[], HostRank]:
    """A rank whose host tier holds the prompt's five whole pages, and whose device holds nothing."""

    def make() -> HostRank:
        rank = HostRank("write_through")
        rank.ask("first")
        rank.forget_device()
        return rank

    return make


Warm = Callable[[], HostRank]


# --------------------------------------------------------------------------------------------------------------- loads
def test_a_request_waits_for_its_load_while_others_decode(warm: Warm) -> None:
    rank = warm()
    rank.submit("talker", [50, 51], max_new_tokens=20, ignore_eos=True)
    rank.turn(2)
    request = rank.submit("loader", PROMPT, max_new_tokens=2, ignore_eos=True)
    num_said = len(rank.token_ids("talker"))
    rank.turn(3)
    (job,) = rank.loads
    assert (len(job.pages), rank.cache.counts().copying) == (5, 5)
    assert len(rank.token_ids("talker")) == num_said + 3
    assert "loader" not in rank.answers
    rank.copier.scribble()
    rank.copier.end(0, 1000)
    rank.turn()
    assert rank.runner.batches[-1].q_lens.tolist() == [1, 1], "one token of the prompt was left to compute"
    rank.finish()
    assert rank.token_ids("loader") == foretell(request, rank.max_total).token_ids
    assert rank.cached("loader") == (0, 20)
    last = rank.answers["loader"].last
    assert last is not None
    assert last.stats is not None
    assert last.stats.kv_epoch == 0


def test_what_was_loaded_is_found_on_the_device_the_next_time(warm: Warm) -> None:
    rank = warm()
    rank.ask("second")
    assert rank.cached("second") == (0, 20)
    rank.ask("third")
    assert rank.cached("third") == (20, 0)
    assert rank.host.num_loaded_pages == 5


def test_the_engine_sleeps_while_all_wait_for_copies(warm: Warm) -> None:
    rank = warm()
    rank.submit("loader", PROMPT, max_new_tokens=2)
    rank.turn()
    assert not rank.turn()
    assert rank.scheduler.num_copies_in_flight == 5
    rank.copier.end(0, 1000)
    assert rank.loop._wakeup.is_set()
    rank.finish()
    assert rank.cached("loader") == (0, 20)


@pytest.mark.parametrize("num_done", [0, 2])
def test_what_a_load_did_not_bring_is_computed(warm: Warm, num_done: int) -> None:
    rank = warm()
    request = rank.submit("loader", PROMPT, max_new_tokens=2, ignore_eos=True)
    rank.turn()
    rank.copier.scribble()
    rank.copier.end(0, num_done)
    rank.finish()
    assert rank.token_ids("loader") == foretell(request, rank.max_total).token_ids
    assert rank.cached("loader") == (0, num_done * PAGE_SIZE)


def test_pages_of_an_aborted_load_come_back_when_it_has_ended(warm: Warm) -> None:
    rank = warm()
    rank.submit("loader", PROMPT, max_new_tokens=2)
    rank.turn()
    rank.loop.post(AbortRequested(("loader",)))
    rank.turn()
    assert rank.answers["loader"].finishes == ["abort"]
    counts = rank.cache.counts()
    assert (counts.copying, counts.free) == (5, 11)
    rank.end_copies()
    assert rank.cache.counts().free == 16


def test_the_oldest_does_not_give_way_to_a_load_that_keeps_its_pages(warm: Warm) -> None:
    rank = warm()
    old = rank.submit("old", list(range(20, 53)), max_new_tokens=20, ignore_eos=True)
    rank.turn()
    young = rank.submit("young", PROMPT, max_new_tokens=2, ignore_eos=True)
    while rank.turn():
        pass
    assert (len(rank.loads), rank.cache.counts().free) == (1, 0)
    assert [sequence.request_id for sequence in rank.scheduler.running] == ["old", "young"]
    rank.copier.end(0, 1000)
    while rank.turn() or rank.copier.open:
        rank.end_copies()
    for request in (old, young):
        assert rank.token_ids(request.request_id) == foretell(request, rank.max_total).token_ids
    last = rank.answers["old"].last
    assert last is not None
    assert last.stats is not None
    assert last.stats.num_retractions == 0


def test_a_request_that_waits_for_no_load_under_way_is_found_and_computes(warm: Warm) -> None:
    rank = warm()
    request = rank.submit("loader", PROMPT, max_new_tokens=2, ignore_eos=True)
    rank.turn()
    (sequence,) = rank.scheduler.running
    sequence.load = 999
    with pytest.raises(InvariantError, match="waits for a load"):
        rank.scheduler.check()
    assert rank.scheduler.handle(CheckDue(), rank.clock.now_s)
    while rank.turn() or rank.copier.open:
        rank.end_copies()
    assert rank.token_ids("loader") == foretell(request, rank.max_total).token_ids


def test_two_requests_with_one_prompt_load_it_once(warm: Warm) -> None:
    rank = warm()
    for number in range(2):
        rank.submit(f"r{number}", PROMPT, max_new_tokens=2, ignore_eos=True)
    rank.turn()
    assert len(rank.loads) == 1
    rank.copier.end(0, 1000)
    rank.finish()
    assert (rank.cached("r0"), rank.cached("r1")) == ((0, 20), (20, 0))


def test_loads_beyond_the_cap_are_computed(warm: Warm) -> None:
    rank = HostRank("write_through", max_inflight=2)
    rank.ask("first")
    rank.ask("again")
    rank.forget_device()
    rank.submit("loader", PROMPT, max_new_tokens=2)
    rank.turn()
    assert [len(job.pages) for job in rank.loads] == [2]


def test_with_the_lease_over_nothing_is_loaded_and_nothing_written(warm: Warm) -> None:
    rank = warm()
    rank.submit("before", PROMPT, max_new_tokens=2)
    rank.turn()
    rank.words = ControlWords(lease_ok=False)
    rank.turn()
    rank.end_copies()
    rank.finish()
    assert rank.cached("before") == (0, 0), "it landed under words that nobody may trust any more"
    num_lookups = rank.host.num_lookups
    rank.ask("after", list(range(30, 50)))
    assert rank.host.num_lookups == num_lookups
    assert not rank.copier.open


def test_a_lost_tier_is_asked_nothing(warm: Warm) -> None:
    rank = warm()
    rank.loop.post(TierAttached(None))
    rank.ask("second")
    assert rank.cached("second") == (0, 0)


# -------------------------------------------------------------------------------------------------------------- writes
def test_write_back_lets_the_coldest_leave_ahead_of_need() -> None:
    rank = HostRank("write_back")
    for number in range(5):
        rank.submit(f"r{number}", [10 * number + n for n in range(12)], max_new_tokens=1)
        while rank.turn():
            pass
    counts = rank.cache.counts()
    assert counts.copying == sum(len(job.pages) for job in rank.writes) == 7
    assert (counts.free, counts.cached) == (1, 8)
    rank.end_copies()
    assert rank.cache.counts().free == 8
    rank.ask("again", list(range(12)))
    assert rank.cached("again")[1] > 0


def test_pages_the_tier_has_leave_without_a_copy() -> None:
    rank = HostRank("write_back")
    for lap in range(2):
        for number in range(6):
            rank.ask(f"{lap}-{number}", [9 * number + n for n in range(12)])
    assert rank.host.num_known_pages > 0
    assert rank.host.num_written_pages == len(rank.tier.pages)


def test_a_full_host_costs_the_pages_and_is_counted() -> None:
    rank = HostRank("write_back")
    for number in range(5):
        rank.submit(f"r{number}", [10 * number + n for n in range(12)], max_new_tokens=1)
        while rank.turn():
            pass
    rank.end_copies(num_done=0)
    assert rank.host.drops == {"no_slot": 7}
    assert (rank.cache.counts().copying, rank.cache.counts().free) == (0, 8)


def test_who_needs_room_now_does_not_wait_for_copies() -> None:
    rank = HostRank("write_back", max_inflight=2)
    for number in range(3):
        rank.submit(f"r{number}", [20 * number + n for n in range(16)], max_new_tokens=1)
        while rank.turn():
            pass
    assert rank.host.drops["no_time"] == 0
    request = rank.submit("big", [5, *range(40)], max_new_tokens=1)
    rank.turn(2)
    rank.finish()
    assert rank.token_ids("big") == foretell(request, rank.max_total).token_ids
    assert rank.host.drops["no_time"] > 0


def test_write_through_copies_at_publish_and_pins_what_it_reads() -> None:
    rank = HostRank("write_through")
    rank.submit("r", PROMPT, max_new_tokens=1)
    while rank.turn():
        pass
    (job,) = rank.writes
    assert (len(job.pages), rank.cache.counts().pinned) == (5, 5)
    rank.end_copies()
    assert (rank.cache.counts().pinned, rank.cache.counts().cached) == (0, 5)
    assert len(rank.tier.pages) == 5


def test_selective_copies_what_was_hit() -> None:
    rank = HostRank("write_through_selective")
    rank.ask("first")
    assert not rank.tier.pages
    rank.ask("second")
    assert len(rank.tier.pages) == 5
    rank.ask("third")
    assert rank.host.num_written_pages == 5


def test_a_page_whose_copy_failed_is_copied_at_its_next_hit() -> None:
    rank = HostRank("write_through")
    rank.submit("r", PROMPT, max_new_tokens=1)
    while rank.turn():
        pass
    rank.end_copies(num_done=2)
    assert (len(rank.tier.pages), rank.host.drops) == (2, {"no_slot": 3})
    rank.ask("again")
    assert (len(rank.tier.pages), rank.host.num_written_pages) == (5, 5)


# ------------------------------------------------------------------------------------------------------------- flushes
@pytest.mark.parametrize("mode", ["fence", "retract", "abort", "wait", "drain"])
def test_a_flush_leaves_pages_under_copy_to_the_copy(mode: FlushMode) -> None:
    rank = HostRank("write_through")
    rank.submit("r", PROMPT, max_new_tokens=1)
    while rank.turn():
        pass
    pages = set(rank.writes[0].pages.tolist())
    verdict = rank.flush(mode, epoch=1, timeout_s=0.0, budget_s=5.0, tiers=("device", "host"))
    assert (verdict.status, verdict.copies_in_flight, verdict.epoch) == ("flushed", 5, 1)
    hold = rank.cache.open(DEFAULT_NAMESPACE, tokens_of([1]), 0, now_s=0.0)
    assert rank.cache.try_extend(hold, 11 * PAGE_SIZE)
    assert not pages & set(hold.page_table.tolist())
    rank.cache.close(hold)
    rank.end_copies()
    assert rank.cache.counts().free == 16
    rank.ask("after")
    assert rank.cached("after") == (0, 0), "written under the old epoch"


def test_wait_lets_copies_land_within_its_time() -> None:
    rank = HostRank("write_through")
    rank.submit("r", PROMPT, max_new_tokens=1)
    while rank.turn():
        pass
    pending = rank.offer("wait", epoch=1, budget_s=1.0, tiers=("device", "host"))
    assert not rank.turn()
    assert not pending.ended.done()
    assert rank.loop.snapshot().blockers.copies_in_flight == 5
    rank.copier.end(0, 1000)
    rank.turn()
    verdict = pending.ended.result(0)
    assert (verdict.status, verdict.copies_in_flight) == ("flushed", 0)


def test_copies_alone_never_make_a_flush_fail() -> None:
    rank = HostRank("write_through")
    rank.submit("r", PROMPT, max_new_tokens=1)
    while rank.turn():
        pass
    pending = rank.offer("drain", epoch=1, budget_s=1.0, tiers=("device", "host"))
    rank.turn()
    assert rank.scheduler.wakes_at_s == pytest.approx(pending.deadline_s - COPY_GRACE_S)
    rank.clock.now_s = pending.deadline_s - COPY_GRACE_S
    rank.turn()
    verdict = pending.ended.result(0)
    assert (verdict.status, verdict.copies_in_flight) == ("flushed", 5)
    rank.end_copies()


SCOPES = [FlushScope(namespace=""), FlushScope(prefix_tokens=tokens_of(PROMPT)), FlushScope(older_than_s=0.0)]


@pytest.mark.parametrize("scope", SCOPES, ids=["namespace", "prefix", "age"])
def test_after_a_scoped_flush_no_host_page_in_scope_is_found(warm: Warm, scope: FlushScope) -> None:
    rank = warm()
    rank.ask("other", PROMPT, "tenant")
    tiers = ("device", "host")
    assert rank.flush("fence", epoch=0, scope=scope, sub_epoch=7, tiers=tiers).status == "flushed"
    rank.tier.birth_floor_s = rank.clock.now_s if scope.older_than_s is not None else 0.0
    rank.ask("second")
    assert rank.cached("second") == (0, 0)
    rank.forget_device()
    rank.ask("third")
    assert rank.cached("third") == (0, 20), "what was computed since may be found"


def test_loaded_pages_are_as_old_as_when_they_were_computed(warm: Warm) -> None:
    rank = warm()
    rank.clock.now_s += 100.0
    rank.ask("second")
    assert rank.cached("second") == (0, 20)
    rank.flush("fence", epoch=0, scope=FlushScope(older_than_s=50.0), sub_epoch=7, tiers=("device", "host"))
    rank.ask("third")
    assert rank.cached("third") == (0, 0)


def test_a_scoped_flush_leaves_the_rest(warm: Warm) -> None:
    rank = warm()
    scope = FlushScope(namespace="tenant")
    rank.flush("fence", epoch=0, scope=scope, sub_epoch=7, tiers=("device", "host"))
    rank.ask("second")
    assert rank.cached("second") == (0, 20)


def test_a_scoped_flush_of_the_device_keeps_the_host(warm: Warm) -> None:
    rank = warm()
    rank.ask("second")
    rank.flush("fence", epoch=0, scope=FlushScope(namespace=""), sub_epoch=7, tiers=("device",))
    rank.ask("third")
    assert rank.cached("third") == (0, 20)


def test_a_copy_in_flight_at_a_scoped_flush_is_never_found() -> None:
    rank = HostRank("write_through")
    rank.submit("r", PROMPT, max_new_tokens=1)
    while rank.turn():
        pass
    rank.flush("fence", epoch=0, scope=FlushScope(namespace=""), sub_epoch=7, tiers=("device", "host"))
    rank.end_copies()
    assert len(rank.tier.pages) == 5
    rank.ask("second")
    assert rank.cached("second") == (0, 0)


def test_a_write_ordered_before_a_flush_of_the_tier_says_so() -> None:
    rank = HostRank("write_through")
    rank.submit("r", PROMPT, max_new_tokens=1)
    while rank.turn():
        pass
    rank.tier.drop_all()
    rank.end_copies()
    assert (rank.tier.pages, rank.host.drops) == ({}, {"old_drop": 5})


def test_scoped_flushes_of_before_are_told_with_the_tier(warm: Warm) -> None:
    rank = warm()
    rank.loop.post(TierAttached(rank.tier, "lineage", ((FlushScope(namespace=""), 9),)))
    rank.ask("second")
    assert rank.cached("second") == (0, 0)


def test_scoped_flushes_of_before_the_epoch_are_not_made_again(warm: Warm) -> None:
    rank = warm()
    assert rank.flush("fence", epoch=12, tiers=("device", "host")).status == "flushed"
    rank.ask("second")
    rank.loop.post(TierAttached(rank.tier, "lineage", ((FlushScope(namespace=""), 9),)))
    rank.ask("third")
    assert rank.cached("third") == (20, 0), "the device keeps its pages"
    rank.forget_device()
    rank.ask("fourth")
    assert rank.cached("fourth") == (0, 20), "and so do the keys"


def test_another_lineage_finds_nothing_of_before(warm: Warm) -> None:
    rank = warm()
    rank.loop.post(TierAttached(rank.tier, "another"))
    rank.ask("second")
    assert rank.cached("second") == (0, 0)


def test_events_of_a_host_tier_are_illegal_without_one() -> None:
    rank = FakeRank()
    with pytest.raises(InvariantError, match="without a host tier"):
        rank.scheduler.handle(CopyEnded(1, 1), 0.0)
    with pytest.raises(InvariantError, match="made without one"):
        rank.loop.attach_tier(None)


def test_an_engine_without_a_host_tier_orders_nothing() -> None:
    rank = FakeRank()
    rank.submit("r", PROMPT, max_new_tokens=2)
    rank.finish()
    assert rank.loop.snapshot().host is None
    assert rank.cache.index.table.keys == [b""] * len(rank.cache.index.table.keys)
