"""The five flush modes, their claims and verdicts, the control words, on one engine driven turn by turn."""

from __future__ import annotations

import sys
from typing import Any

import pytest

from cache.device_cache import DeviceCache
from engine.control_words import ControlWords
from engine.events import FlushArrived
from engine.flush import (
    ALREADY_IN_PROGRESS,
    STEP_MODES,
    TIMED_OUT_WAITING,
    Blockers,
    FlushMode,
    FlushScope,
    FlushVerdict,
)
from engine.flush_gate import TIMED_OUT_STEP, PendingFlush
from engine.request import Request
from tests.fakes import FakeRank, flush_command, foretell

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
LONG: dict[str, Any] = {"max_new_tokens": 40, "ignore_eos": True}


def offer(rank: FakeRank, mode: FlushMode = "wait", flush_id: str = "f", **fields: Any) -> PendingFlush:
    offered = rank.loop.offer_flush(flush_command(flush_id, mode, **fields))
    assert isinstance(offered, PendingFlush)
    return offered


def verdict_of(pending: PendingFlush) -> FlushVerdict:
    assert pending.ended.done(), "no verdict yet"
    return pending.ended.result(0)


def cached_tokens(rank: FakeRank, prompt: list[int], namespace: str = "") -> int:
    """How much of a prompt is found now; leaves the cache as it was."""
    request = rank.submit(f"probe{rank.loop.snapshot().counters.num_arrived}", prompt, namespace, max_new_tokens=1)
    rank.finish()
    last = rank.answers[request.request_id].last
    assert last is not None
    assert last.stats is not None
    return last.stats.num_cached_tokens


def assert_as_foretold(rank: FakeRank, *requests: Request) -> None:
    for request in requests:
        foretold = foretell(request, rank.max_total)
        assert rank.token_ids(request.request_id) == foretold.token_ids
        assert rank.answers[request.request_id].finishes == [foretold.finish]


# -------------------------------------------------------------------------------------------------------- idle engine
@pytest.mark.parametrize("mode", ["wait", "drain", "retract", "abort", "fence"])
def test_an_idle_engine_flushes_at_once_in_every_mode(mode: FlushMode) -> None:
    rank = FakeRank(page_size=4)
    assert cached_tokens(rank, PROMPT) == 0
    assert cached_tokens(rank, PROMPT) == 8
    # the controller sends step modes with a budget of step_grace_s
    pending = offer(rank, mode, epoch=5, budget_s=5.0 if mode in STEP_MODES else 0.0, timeout_s=0.0)
    rank.turn()
    verdict = verdict_of(pending)
    assert (verdict.status, verdict.epoch, verdict.freed_pages, verdict.freed_bytes) == ("flushed", 5, 3, 3000)
    assert rank.cache.epoch == 5
    assert cached_tokens(rank, PROMPT) == 0


def test_waiting_requests_own_no_page_and_are_no_blockers() -> None:
    """They arrived before the flush, in the same turn; they are matched after it."""
    rank = FakeRank()
    cached_tokens(rank, PROMPT)
    request = rank.submit("r", PROMPT, max_new_tokens=3)
    pending = offer(rank, "wait", budget_s=0.0)
    rank.turn()
    assert verdict_of(pending).status == "flushed"
    rank.finish()
    assert_as_foretold(rank, request)
    last = rank.answers["r"].last
    assert last is not None
    assert last.stats is not None
    assert (last.stats.num_cached_tokens, last.stats.kv_epoch) == (0, None)


# --------------------------------------------------------------------------------------------------------------- wait
def test_wait_leaves_everybody_alone_and_flushes_at_the_first_idle_instant() -> None:
    rank = FakeRank()
    request = rank.submit("r", PROMPT, max_new_tokens=10, ignore_eos=True)
    rank.turn(2)
    pending = offer(rank, "wait")
    later = rank.submit("later", PROMPT, max_new_tokens=3, ignore_eos=True)
    rank.turn()
    assert rank.loop.snapshot().num_running == 2, "admitted as usual"
    assert rank.loop.snapshot().pending_flush_id == "f"
    rank.finish()
    verdict = verdict_of(pending)
    assert verdict.status == "flushed"
    assert verdict.waited_ms > 0
    assert_as_foretold(rank, request, later)
    assert rank.cache.counts().free == rank.cache.num_pages


def test_wait_that_times_out_names_what_was_in_the_way_and_touches_nothing() -> None:
    rank = FakeRank(max_step_tokens=8)
    rank.submit("decoding", PROMPT[:3], **LONG)
    rank.turn(2)
    rank.submit("prefilling", PROMPT * 5, **LONG)
    pending = offer(rank, "wait", budget_s=0.002)
    generation = rank.cache.generation
    rank.turn(2)
    assert not pending.ended.done()
    rank.turn()
    verdict = verdict_of(pending)
    assert (verdict.status, verdict.message) == ("timed_out", TIMED_OUT_WAITING)
    assert verdict.blockers == Blockers(running=1, half_prefilled=1)
    assert (rank.cache.epoch, rank.cache.generation) == (0, generation)
    assert rank.loop.snapshot().pending_flush_id is None


@pytest.mark.parametrize("mode", ["wait", "drain"])
def test_a_half_prefilled_request_is_in_the_way(mode: FlushMode) -> None:
    rank = FakeRank(max_step_tokens=8)
    rank.submit("prefilling", PROMPT * 5, max_new_tokens=1)
    rank.turn()
    pending = offer(rank, mode)
    rank.turn(2)
    assert not pending.ended.done()
    rank.finish()
    assert verdict_of(pending).status == "flushed"
    assert rank.answers["prefilling"].finishes == ["length"]


@pytest.mark.parametrize("mode", ["wait", "drain"])
def test_timeout_zero_on_a_busy_engine_is_refused_at_once(mode: FlushMode) -> None:
    rank = FakeRank()
    rank.submit("r", PROMPT, **LONG)
    rank.turn()
    verdict = rank.loop.offer_flush(flush_command(mode=mode, budget_s=0.0))
    assert isinstance(verdict, FlushVerdict)
    assert (verdict.status, verdict.message) == ("refused", "Not idle: 1 running.")
    rank.submit("more", PROMPT, **LONG)
    rank.turn()
    assert rank.loop.snapshot().num_running == 2, "a refused drain holds nobody"


# -------------------------------------------------------------------------------------------------------------- drain
def test_drain_holds_new_requests_until_the_running_ones_have_ended() -> None:
    rank = FakeRank()
    running = rank.submit("running", PROMPT, max_new_tokens=8, ignore_eos=True)
    rank.turn(2)
    pending = offer(rank, "drain")
    held = rank.submit("held", PROMPT, max_new_tokens=3, ignore_eos=True)
    while not pending.ended.done():
        assert rank.loop.snapshot().num_running <= 1
        rank.turn()
    assert rank.answers["running"].finishes == ["length"]
    assert verdict_of(pending).status == "flushed"
    rank.finish()
    assert_as_foretold(rank, running, held)


def test_a_hold_ends_with_the_ranks_own_deadline() -> None:
    rank = FakeRank()
    rank.submit("running", PROMPT, **LONG)
    rank.turn()
    pending = offer(rank, "drain", budget_s=0.003)
    rank.submit("held", PROMPT, **LONG)
    rank.turn(3)
    assert rank.loop.snapshot().num_waiting == 1
    rank.turn()
    assert verdict_of(pending).status == "timed_out"
    assert rank.loop.snapshot().num_running == 2


def test_a_hold_ends_when_the_loop_expires_the_drain() -> None:
    rank = FakeRank()
    rank.submit("running", PROMPT, **LONG)
    rank.turn()
    pending = offer(rank, "drain")
    rank.submit("held", PROMPT, **LONG)
    rank.turn()
    verdict = rank.loop.expire_flush(pending)
    assert verdict is not None
    assert verdict.blockers == Blockers(running=1)
    rank.turn()
    assert rank.loop.snapshot().num_running == 2


# ------------------------------------------------------------------------------------------------------------ retract
def test_retract_takes_the_kv_and_loses_no_request() -> None:
    rank = FakeRank(max_step_tokens=16)
    requests = [rank.submit(f"r{n}", [*PROMPT, n], max_new_tokens=12, ignore_eos=True) for n in range(3)]
    rank.turn(6)
    pending = offer(rank, "retract", epoch=4)
    rank.turn()
    verdict = verdict_of(pending)
    assert (verdict.status, verdict.num_retracted, verdict.num_aborted) == ("flushed", 3, 0)
    assert {sequence.hold.epoch for sequence in rank.scheduler.running if sequence.hold} == {4}
    assert next(sequence.request_id for sequence in rank.scheduler.running) == "r0", "oldest first again"
    rank.finish()
    assert_as_foretold(rank, *requests)
    stats = [answer.last.stats for answer in rank.answers.values() if answer.last]
    assert all(s is not None and s.num_retractions == 1 for s in stats)


# -------------------------------------------------------------------------------------------------------------- abort
def test_abort_ends_running_requests_before_the_verdict_and_serves_the_queued_ones() -> None:
    rank = FakeRank(max_running=2)
    order: list[str] = []
    take = rank.loop._on_outputs
    rank.loop._on_outputs = lambda outputs: (take(outputs), order.extend(o.finish or "" for o in outputs))[0]
    for n in range(3):
        rank.submit(f"r{n}", [*PROMPT, n], max_new_tokens=9, ignore_eos=True)
    rank.turn(3)
    pending = offer(rank, "abort")
    pending.ended.add_done_callback(lambda future: order.append("verdict"))
    order.clear()
    rank.turn()
    assert order[:3] == ["abort", "abort", "verdict"]
    verdict = verdict_of(pending)
    assert (verdict.status, verdict.num_aborted) == ("flushed", 2)
    rank.finish()
    assert [answer.finishes for answer in rank.answers.values()] == [["abort"], ["abort"], ["length"]]


# -------------------------------------------------------------------------------------------------------------- fence
def test_fence_needs_no_idle_moment_and_the_running_ones_keep_pages_nobody_else_gets() -> None:
    rank = FakeRank(num_pages=24, page_size=4)
    cached_tokens(rank, PROMPT)
    old = rank.submit("old", PROMPT, max_new_tokens=20, ignore_eos=True)
    rank.turn(3)
    pending = offer(rank, "fence", epoch=9)
    rank.turn()
    assert verdict_of(pending).status == "flushed"
    assert rank.cache.counts().fenced > 0
    others = [rank.submit(f"n{n}", [*PROMPT, n], max_new_tokens=9, ignore_eos=True) for n in range(6)]
    rank.finish()
    assert_as_foretold(rank, old, *others)
    first = rank.answers["n0"].last
    assert first is not None
    assert first.stats is not None
    assert first.stats.num_cached_tokens == 0
    last = rank.answers["old"].last
    assert last is not None
    assert last.stats is not None
    assert last.stats.kv_epoch == 0
    assert rank.cache.counts().fenced == 0


def test_what_a_fenced_request_computes_is_never_published() -> None:
    """Invariant 3, hole H2: a chunked prefill across a flush."""
    rank = FakeRank(page_size=4, max_step_tokens=16)
    long = rank.submit("long", PROMPT * 4, max_new_tokens=6, ignore_eos=True)
    rank.turn()
    offer(rank, "fence", epoch=2)
    rank.finish()
    assert_as_foretold(rank, long)
    assert rank.cache.counts().free == rank.cache.num_pages
    assert cached_tokens(rank, PROMPT * 4) == 0


def test_fence_costs_as_many_calls_for_a_full_cache_as_for_an_empty_one() -> None:
    """Invariant 20: what a flush does between drain and match depends on the pinned pages only."""

    def calls_of_a_flush(num_cached_prompts: int) -> int:
        rank = FakeRank(num_pages=4096, page_size=1, max_step_tokens=64)
        for n in range(num_cached_prompts):
            rank.submit(f"r{n}", [n % 59 + 1, n // 59 + 1, 5, 6], max_new_tokens=1)
        rank.finish()
        rank.submit("running", [60, 60, 60], **LONG)
        rank.turn(2)
        offer(rank, "fence")
        num_calls = 0

        def count(frame: object, event: str, argument: object) -> None:
            nonlocal num_calls
            num_calls += event in ("call", "c_call")

        swap = rank.cache.swap
        rank.cache.swap = lambda epoch: (sys.setprofile(count), swap(epoch), sys.setprofile(None))[1]
        rank.loop.turn()
        assert rank.cache.epoch == 1
        return num_calls

    few = calls_of_a_flush(5)
    assert few > 10
    assert calls_of_a_flush(400) == few


def test_a_fence_supersedes_a_pending_wait() -> None:
    rank = FakeRank()
    rank.submit("r", PROMPT, **LONG)
    rank.turn()
    wait = offer(rank, "wait", "w")
    rank.turn()
    fence = offer(rank, "fence", "n", epoch=2)
    assert verdict_of(wait).status == "superseded"
    rank.turn()
    assert verdict_of(fence).status == "flushed"
    assert rank.cache.epoch == 2


# ----------------------------------------------------------------------------------------------- claims and deadlines
@pytest.mark.parametrize("mode", ["wait", "drain", "retract", "abort", "fence"])
def test_a_flush_the_engine_sees_too_late_has_timed_out_and_is_not_executed(mode: FlushMode) -> None:
    """Invariant 8: frozen, or in a long step, between the offer and the look; the loop's timer is late too."""
    rank = FakeRank()
    cached_tokens(rank, PROMPT)
    pending = offer(rank, mode, epoch=3)
    rank.clock.now_s += 1.5
    rank.turn()
    message = TIMED_OUT_STEP if mode in STEP_MODES else TIMED_OUT_WAITING
    assert (verdict_of(pending).status, verdict_of(pending).message) == ("timed_out", message)
    assert (rank.cache.epoch, rank.cache.generation) == (0, 0)
    assert cached_tokens(rank, PROMPT) == 8


def test_a_step_mode_that_the_loop_expired_during_a_long_step_is_not_executed() -> None:
    rank = FakeRank()
    rank.submit("r", PROMPT, **LONG)
    offered: list[PendingFlush] = []
    verdicts: list[FlushVerdict | None] = []

    def during(batch: object) -> None:
        if not offered:
            offered.append(offer(rank, "abort"))
            rank.clock.now_s += 2.0
            verdicts.append(rank.loop.expire_flush(offered[0]))

    rank.runner.during_run = during
    rank.turn(3)
    (verdict,) = verdicts
    assert verdict is not None
    assert (verdict.status, verdict.message, verdict.blockers) == (
        "timed_out",
        TIMED_OUT_STEP,
        Blockers(half_prefilled=1),
    )
    assert rank.answers["r"].finishes == []
    assert rank.cache.generation == 0


def test_what_goes_round_the_gate_is_told_busy() -> None:
    rank = FakeRank()
    rank.submit("r", PROMPT, **LONG)
    rank.turn()
    offer(rank, "wait")
    rank.turn()
    stray = PendingFlush(flush_command("stray", "fence"), 100.0, 200.0)
    rank.loop.post(FlushArrived(stray))
    rank.turn()
    verdict = verdict_of(stray)
    assert (verdict.status, verdict.message) == ("busy", ALREADY_IN_PROGRESS)
    assert rank.cache.epoch == 0


# ----------------------------------------------------------------------------------------------------- scopes, dry run
def test_a_namespace_scope_drops_that_namespace_only() -> None:
    rank = FakeRank(page_size=4)
    for namespace in ("a", "b"):
        cached_tokens(rank, PROMPT, namespace)
    pending = offer(rank, "fence", epoch=0, scope=FlushScope(namespace="a"))
    rank.turn()
    assert (verdict_of(pending).status, verdict_of(pending).freed_pages) == ("flushed", 3)
    assert (cached_tokens(rank, PROMPT, "a"), cached_tokens(rank, PROMPT, "b")) == (0, 8)


def test_a_prefix_scope_drops_the_first_page_in_every_namespace() -> None:
    rank = FakeRank(page_size=4)
    other = [60, *PROMPT]
    for namespace in ("a", "b"):
        cached_tokens(rank, PROMPT, namespace)
        cached_tokens(rank, other, namespace)
    offer(rank, "fence", scope=FlushScope(prefix_tokens=rank.submit("x", PROMPT[:2], max_new_tokens=1).tokens))
    rank.finish()
    assert [cached_tokens(rank, PROMPT, namespace) for namespace in ("a", "b")] == [0, 0]
    assert [cached_tokens(rank, other, namespace) for namespace in ("a", "b")] == [12, 12]


def test_an_age_scope_drops_what_is_older() -> None:
    rank = FakeRank(page_size=4)
    cached_tokens(rank, PROMPT)
    rank.clock.now_s += 60
    cached_tokens(rank, [60, *PROMPT])
    offer(rank, "fence", scope=FlushScope(older_than_s=30.0))
    rank.finish()
    assert (cached_tokens(rank, PROMPT), cached_tokens(rank, [60, *PROMPT])) == (0, 12)


@pytest.mark.parametrize("mode", ["abort", "retract"])
def test_a_scoped_flush_ends_or_retracts_only_who_is_in_scope(mode: FlushMode) -> None:
    rank = FakeRank()
    for namespace in ("a", "b"):
        rank.submit(namespace, PROMPT, namespace, **LONG)
    rank.turn(3)
    pending = offer(rank, mode, scope=FlushScope(namespace="a"))
    rank.turn()
    verdict = verdict_of(pending)
    assert (verdict.num_aborted + verdict.num_retracted, verdict.epoch) == (1, 0)
    rank.finish()
    assert rank.answers["b"].finishes == ["length"]
    assert rank.answers["a"].finishes == ["abort" if mode == "abort" else "length"]


@pytest.mark.parametrize(
    "scope", [None, FlushScope(namespace=""), FlushScope(prefix_tokens=b""), FlushScope(older_than_s=0.0)]
)
def test_a_dry_run_counts_and_drops_nothing(scope: FlushScope | None) -> None:
    rank = FakeRank(page_size=4)
    cached_tokens(rank, PROMPT)
    rank.submit("r", [50] * 3, **LONG)
    rank.turn()
    pending = offer(rank, "abort", epoch=0 if scope else 6, scope=scope, dry_run=True)
    rank.turn()
    verdict = verdict_of(pending)
    assert (verdict.status, verdict.freed_pages, verdict.epoch) == ("flushed", 3, 0)
    assert "nothing was dropped" in verdict.message
    assert rank.answers["r"].finishes == []
    assert cached_tokens(rank, PROMPT) == 8


@pytest.mark.parametrize(
    ("fields", "reason"),
    [({"tiers": ("host",)}, "holds no tier of host"), ({"scope": FlushScope(adapter="lora")}, "No adapter 'lora'")],
)
def test_what_this_rank_cannot_flush_is_refused_instead_of_succeeding_silently(
    fields: dict[str, Any], reason: str
) -> None:
    rank = FakeRank()
    cached_tokens(rank, PROMPT)
    pending = offer(rank, "fence", **fields)
    rank.turn()
    verdict = verdict_of(pending)
    assert verdict.status == "refused"
    assert reason in verdict.message
    assert cached_tokens(rank, PROMPT) == 8


def test_a_flush_of_part_of_the_tiers_takes_no_epoch_but_swaps() -> None:
    rank = FakeRank()
    rank.words = ControlWords(epoch=7)
    cached_tokens(rank, PROMPT)
    pending = offer(rank, "fence", epoch=0)
    rank.turn()
    assert verdict_of(pending).epoch == 7
    assert cached_tokens(rank, PROMPT) == 0


# ------------------------------------------------------------------------------------------------------ control words
def test_a_floor_above_the_epoch_swaps_before_the_match() -> None:
    """Invariant 5; and the flush that raised the floor counts the pages although they went before its command."""
    rank = FakeRank(page_size=4)
    cached_tokens(rank, PROMPT)
    rank.words = ControlWords(floor=3)
    assert cached_tokens(rank, PROMPT) == 0
    assert rank.cache.epoch == 3
    pending = offer(rank, "fence", epoch=3)
    rank.turn()
    assert verdict_of(pending).freed_pages == 3
    again = offer(rank, "fence", "again", epoch=3)
    rank.turn()
    assert verdict_of(again).freed_pages == 0


def test_what_is_newer_than_a_flush_is_not_dropped_by_its_late_command() -> None:
    rank = FakeRank(page_size=4)
    cached_tokens(rank, PROMPT)
    rank.words = ControlWords(floor=5)
    assert cached_tokens(rank, PROMPT) == 0
    for epoch in (3, 5):
        late = offer(rank, "fence", f"late-{epoch}", epoch=epoch)
        rank.turn()
        assert verdict_of(late).status == "flushed"
        assert verdict_of(late).epoch == 5
        assert cached_tokens(rank, PROMPT) == 8
    # one that takes no epoch drops what is there
    part = offer(rank, "fence", "part", epoch=0)
    rank.turn()
    assert verdict_of(part).freed_pages == 3
    assert cached_tokens(rank, PROMPT) == 0


def test_without_a_lease_nothing_is_matched_and_nothing_published() -> None:
    rank = FakeRank(page_size=4)
    cached_tokens(rank, PROMPT)
    rank.words = ControlWords(lease_ok=False)
    assert cached_tokens(rank, PROMPT) == 0
    fresh = rank.submit("fresh", [60, *PROMPT], max_new_tokens=9, ignore_eos=True)
    rank.finish()
    assert_as_foretold(rank, fresh)
    rank.words = ControlWords()
    assert (cached_tokens(rank, [60, *PROMPT]), cached_tokens(rank, PROMPT)) == (0, 8)
    assert rank.loop.snapshot().counters.num_uncached_admissions == 2


def test_a_request_admitted_before_the_lease_ended_publishes_nothing_after_it() -> None:
    rank = FakeRank(page_size=4, max_step_tokens=16)
    rank.submit("long", PROMPT * 4, max_new_tokens=3, ignore_eos=True)
    rank.turn()
    rank.words = ControlWords(lease_ok=False)
    rank.finish()
    rank.words = ControlWords()
    assert cached_tokens(rank, PROMPT * 4) == 16


def test_a_big_old_tree_is_taken_apart_in_slices_and_then_the_engine_rests() -> None:
    rank = FakeRank(num_pages=4096, page_size=1, cache=DeviceCache(4096, 1))
    for n in range(600):
        rank.submit(f"r{n}", [n % 60 + 1, n // 60 + 1, 5, 6], max_new_tokens=1)
    rank.finish()
    offer(rank, "fence")
    turns = 1
    while rank.turn():
        turns += 1
    assert turns > 1
    assert rank.cache.retired == []
