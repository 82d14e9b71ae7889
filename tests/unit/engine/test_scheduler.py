"""Continuous batching, prefix hits, retraction, ends. The tokens of every answer are foretold by the fake model."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from cache.device_cache import DeviceCache
from configs.errors import ConfigError, InvariantError
from engine.batch import StepResult
from engine.control_words import ALWAYS_VALID, ControlWords
from engine.events import AbortRequested, CheckDue, RequestArrived, StepFinished, TurnStarted
from engine.limits import SchedulerLimits
from engine.request import Request, SamplingParams
from engine.scheduler import Scheduler
from tests.fakes import EOS, VOCAB_SIZE, FakeRank, foretell, tokens_of

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]


def assert_as_foretold(rank: FakeRank, *requests: Request) -> None:
    """Each request ended once, with the tokens and the reason of the pure function."""
    for request in requests:
        foretold = foretell(request, rank.max_total)
        answer = rank.answers[request.request_id]
        assert answer.token_ids == foretold.token_ids
        assert answer.finishes == [foretold.finish]


def all_pages_are_back(rank: FakeRank) -> bool:
    counts = rank.cache.counts()
    return counts.free + counts.cached == rank.cache.num_pages


# ---------------------------------------------------------------------------------------------------------- batching
def test_a_request_runs_to_its_end() -> None:
    rank = FakeRank()
    request = rank.submit("r", PROMPT, max_new_tokens=9, ignore_eos=True)
    rank.finish()
    assert_as_foretold(rank, request)
    assert len(rank.token_ids("r")) == 9
    assert all_pages_are_back(rank)


def test_decodes_come_first_and_a_long_prompt_is_prefilled_in_chunks_beside_them() -> None:
    rank = FakeRank(max_step_tokens=16)
    short = rank.submit("short", PROMPT[:3], max_new_tokens=20, ignore_eos=True)
    rank.turn()
    long = rank.submit("long", PROMPT * 4, max_new_tokens=5)
    rank.turn()
    batch = rank.runner.batches[-1]
    assert (batch.q_lens.tolist(), batch.kv_lens.tolist()) == ([1, 15], [4, 15])
    assert batch.sample_rows.tolist() == [0], "a half-prefilled prompt has nothing to sample from"
    rank.finish()
    assert_as_foretold(rank, short, long)
    assert max(batch.num_tokens for batch in rank.runner.batches) <= 16
    assert rank.loop.snapshot().counters.num_chunks == 3


def test_arrays_of_a_mixed_step() -> None:
    rank = FakeRank(page_size=4)
    rank.submit("a", [7, 8, 9], max_new_tokens=5, ignore_eos=True)
    rank.turn()
    rank.submit("b", [1, 2, 3, 4, 5], max_new_tokens=5)
    rank.turn()
    batch = rank.runner.batches[-1]
    assert batch.input_ids.tolist() == [rank.token_ids("a")[0], 1, 2, 3, 4, 5]
    assert batch.positions.tolist() == [3, 0, 1, 2, 3, 4]
    assert [len(table) for table in batch.page_tables] == [1, 2]
    for array in (batch.input_ids, batch.positions, batch.q_lens, batch.kv_lens, batch.sample_rows, *batch.page_tables):
        assert array.dtype == np.int32


def test_no_more_run_than_may() -> None:
    rank = FakeRank(max_running=2)
    requests = [rank.submit(f"r{n}", [n + 1] * 3, max_new_tokens=6) for n in range(5)]
    rank.turn()
    assert (rank.loop.snapshot().num_running, rank.loop.snapshot().num_waiting) == (2, 3)
    assert rank.loop.snapshot().num_waiting_tokens == 9
    rank.finish()
    assert rank.loop.snapshot().num_waiting_tokens == 0
    assert_as_foretold(rank, *requests)


def test_a_step_too_small_for_all_rows_runs_fewer() -> None:
    rank = FakeRank(max_running=8, max_step_tokens=3)
    requests = [rank.submit(f"r{n}", [n + 1], max_new_tokens=5) for n in range(6)]
    rank.finish()
    assert_as_foretold(rank, *requests)
    assert max(len(batch.q_lens) for batch in rank.runner.batches) == 3


def test_limits_that_cannot_work_are_refused() -> None:
    with pytest.raises(ConfigError, match="max_running is 0"):
        SchedulerLimits(0, 16, 128)


# ------------------------------------------------------------------------------------------------------------- cache
def test_a_repeated_prompt_computes_what_is_left_after_whole_cached_pages() -> None:
    rank = FakeRank(page_size=4)
    first = rank.submit("first", PROMPT, max_new_tokens=3)
    rank.finish()
    again = rank.submit("again", PROMPT, max_new_tokens=3)
    rank.finish()
    assert_as_foretold(rank, first, again)
    last = rank.answers["again"].last
    assert last is not None
    assert last.stats is not None
    # 12 tokens are three whole pages, but one token must be computed to sample from
    assert (last.stats.num_cached_tokens, last.stats.cached_by_tier, last.stats.kv_epoch) == (
        8,
        {"device": 8, "host": 0},
        0,
    )


def test_output_is_cached_too() -> None:
    rank = FakeRank(page_size=4)
    rank.submit("turn1", PROMPT, max_new_tokens=9, ignore_eos=True)
    rank.finish()
    rank.submit("turn2", PROMPT + rank.token_ids("turn1") + [9, 9], max_new_tokens=2)
    rank.finish()
    # 20 of the 21 tokens have KV: the last one sampled was never fed back
    assert rank.loop.snapshot().counters.num_cached_tokens == 20


def test_another_request_hits_what_a_half_prefilled_one_has_published() -> None:
    rank = FakeRank(page_size=4, max_step_tokens=16)
    long = rank.submit("long", PROMPT * 5, max_new_tokens=3)
    rank.turn()
    other = rank.submit("other", [*PROMPT[:8], 60], max_new_tokens=3)
    rank.finish()
    assert_as_foretold(rank, long, other)
    assert rank.loop.snapshot().counters.num_cached_tokens == 8


def test_equal_prompts_that_come_together_are_prefilled_once() -> None:
    rank = FakeRank(page_size=4, max_step_tokens=16)
    prompt = PROMPT * 3
    requests = [rank.submit(f"r{n}", [*prompt, n], max_new_tokens=4) for n in range(4)]
    rank.finish()
    assert_as_foretold(rank, *requests)
    counters = rank.loop.snapshot().counters
    assert counters.num_cached_tokens == 3 * 36
    assert counters.num_prefill_tokens <= 37 + 3


def test_who_waits_for_a_running_prefill_does_not_hold_up_those_behind_it() -> None:
    rank = FakeRank(page_size=4)
    first = rank.submit("first", PROMPT, max_new_tokens=4)
    alike = [rank.submit(f"alike{n}", [*PROMPT, n], max_new_tokens=4) for n in range(3)]
    other = rank.submit("other", [50, 51, 52], max_new_tokens=2, ignore_eos=True)
    rank.turn()
    assert list(rank.answers) == ["first", "other"], "it needed nothing of the first prompt"
    rank.finish()
    assert_as_foretold(rank, first, *alike, other)
    assert rank.loop.snapshot().counters.num_cached_tokens == 3 * 12, "who waited for the prefill found it whole"


def test_nobody_waits_for_a_prefix_that_will_never_be_published() -> None:
    for cache, words in (
        (DeviceCache(64, 4, enabled=False), ALWAYS_VALID),
        (DeviceCache(64, 4), ControlWords(lease_ok=False)),
    ):
        rank = FakeRank(cache=cache, max_step_tokens=16)
        rank.words = words
        requests = [rank.submit(f"r{n}", PROMPT[:7], max_new_tokens=4) for n in range(2)]
        rank.turn()
        assert len(rank.scheduler.running) == 2
        rank.finish()
        assert_as_foretold(rank, *requests)


def test_nobody_waits_for_a_decoding_request_to_publish_its_output() -> None:
    rank = FakeRank(page_size=4)
    rank.submit("first", PROMPT[:3], max_new_tokens=20, ignore_eos=True)
    rank.turn()
    rank.submit("second", [*PROMPT[:3], *rank.token_ids("first"), 9], max_new_tokens=2)
    rank.turn()
    assert len(rank.scheduler.running) == 2


def test_namespaces_never_meet() -> None:
    rank = FakeRank()
    requests = [rank.submit(name, PROMPT, name, max_new_tokens=3) for name in ("a", "b")]
    rank.finish()
    assert_as_foretold(rank, *requests)
    assert rank.loop.snapshot().counters.num_cached_tokens == 0


# -------------------------------------------------------------------------------------------------------- retraction
def test_when_pages_run_out_the_youngest_gives_way_and_goes_on_later() -> None:
    rank = FakeRank(num_pages=8, page_size=4)
    old = rank.submit("old", [11, 12, 13], max_new_tokens=18, ignore_eos=True)
    young = rank.submit("young", [21, 22, 23], max_new_tokens=18, ignore_eos=True)
    queued = rank.submit("queued", [31, 32, 33] * 7, max_new_tokens=2, ignore_eos=True)
    while not rank.loop.snapshot().counters.num_retractions:
        rank.turn()
    assert [sequence.request_id for sequence in rank.scheduler.running] == ["old"]
    rank.finish()
    assert_as_foretold(rank, old, young, queued)
    assert list(rank.answers) == ["old", "young", "queued"], "the retracted one comes before what was queued"
    last = rank.answers["young"].last
    assert last is not None
    assert last.stats is not None
    assert last.stats.num_retractions >= 1
    assert any("retracted" in line.what for line in rank.scheduler.story("young"))
    assert not any("retracted" in line.what for line in rank.scheduler.story("old"))


def test_admission_leaves_a_page_for_each_that_runs() -> None:
    rank = FakeRank(num_pages=8, page_size=4)
    rank.submit("a", [1] * 12, max_new_tokens=12, ignore_eos=True)
    rank.turn()
    rank.submit("b", [2] * 20, max_new_tokens=2, ignore_eos=True)
    rank.turn()
    assert [sequence.request_id for sequence in rank.scheduler.running] == ["a"], "b would take the last page"
    rank.finish()
    assert rank.loop.snapshot().counters.num_retractions == 0


def test_a_retracted_request_may_grow_to_the_whole_pool() -> None:
    rank = FakeRank(num_pages=8, page_size=4, max_len=1000)
    requests = [rank.submit(f"r{n}", [n + 1] * 9, max_new_tokens=500, ignore_eos=True) for n in range(3)]
    rank.finish()
    assert_as_foretold(rank, *requests)
    # the pool holds the KV of 32 tokens; the 33rd is sampled from them
    assert [len(rank.token_ids(f"r{n}")) for n in range(3)] == [24, 24, 24]
    assert rank.loop.snapshot().counters.num_retractions > 0


def test_eviction_serves_new_prompts_from_old_ones_pages() -> None:
    rank = FakeRank(num_pages=8, page_size=4)
    requests = [rank.submit(f"r{n}", [n + 1] * 13, max_new_tokens=4) for n in range(6)]
    rank.finish()
    assert_as_foretold(rank, *requests)
    assert rank.loop.snapshot().num_evicted_pages > 0


def test_a_match_that_pins_more_than_it_uses_does_not_lock_the_pool() -> None:
    """One long chain fills the pool; a short prompt matches its first page and needs another one."""
    rank = FakeRank(num_pages=8, page_size=4)
    rank.submit("long", [7] * 32, max_new_tokens=1)
    rank.finish()
    assert rank.cache.counts().cached == 8
    request = rank.submit("short", [7] * 4 + [8], max_new_tokens=20, ignore_eos=True)
    rank.finish()
    assert_as_foretold(rank, request)


# -------------------------------------------------------------------------------------------------------------- ends
def test_eos_ends_unless_ignored() -> None:
    rank = FakeRank()
    requests = [rank.submit(f"r{n}", [n + 1], max_new_tokens=100) for n in range(20)]
    rank.finish()
    assert_as_foretold(rank, *requests)
    stopped = [r for r in requests if rank.answers[r.request_id].finishes == ["stop"]]
    assert stopped
    for request in stopped:
        assert rank.token_ids(request.request_id)[-1] == EOS
    ignoring = rank.submit("ignoring", [int(stopped[0].request_id[1:]) + 1], max_new_tokens=100, ignore_eos=True)
    rank.finish()
    assert_as_foretold(rank, ignoring)
    assert EOS in rank.token_ids("ignoring")


def test_stop_ids_end_with_the_token_and_its_id() -> None:
    rank = FakeRank()
    rank.submit("free", PROMPT, max_new_tokens=20, ignore_eos=True)
    rank.finish()
    free = rank.token_ids("free")
    stop = free[5]
    rank.submit("stopped", PROMPT, max_new_tokens=20, ignore_eos=True, stop_token_ids=(stop,))
    rank.finish()
    last = rank.answers["stopped"].last
    assert last is not None
    assert (last.finish, last.matched_stop) == ("stop", stop)
    assert rank.token_ids("stopped") == free[: free.index(stop) + 1]


def test_stop_ids_are_banned_until_min_new_tokens() -> None:
    rank = FakeRank()
    rank.submit("free", PROMPT, max_new_tokens=8, ignore_eos=True)
    rank.finish()
    first = rank.token_ids("free")[0]
    request = rank.submit("min", PROMPT, max_new_tokens=60, min_new_tokens=5, stop_token_ids=(first,))
    rank.finish()
    assert_as_foretold(rank, request)
    assert first not in rank.token_ids("min")[:5]
    samples = [s for batch in rank.runner.batches for s in batch.samples if s.params is request.sampling]
    assert [sample.banned_ids for sample in samples[:6]] == [(EOS, first)] * 5 + [()]


def test_the_context_length_ends_with_length() -> None:
    rank = FakeRank(max_len=16)
    request = rank.submit("r", PROMPT, max_new_tokens=100, ignore_eos=True)
    rank.finish()
    assert_as_foretold(rank, request)
    assert len(rank.token_ids("r")) == 4


@pytest.mark.parametrize(
    ("prompt", "params", "reason"),
    [
        ([1] * 128, {}, "prompt has 128 tokens; this model takes 127"),
        ([1] * 65, {}, "prompt has 65 tokens; the KV pool holds 64"),
        ([], {}, "at least one"),
        ([1, VOCAB_SIZE], {}, f"token id {VOCAB_SIZE} does not exist"),
        ([1, -1], {}, "token id -1 does not exist"),
        ([1], {"stop_token_ids": (VOCAB_SIZE + 1,)}, "does not exist"),
        ([1], {"logit_bias": ((-3, 1.0),)}, "token id -3 does not exist"),
        ([1], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([1], {"top_p": math.nan}, "top_p is nan"),
        ([1], {"repetition_penalty": math.inf}, "repetition_penalty is inf"),
        ([1], {"min_p": 1.5}, "min_p is 1.5"),
        ([1], {"top_k": 0}, "top_k is 0"),
    ],
)
def test_what_can_never_be_served_is_refused_with_the_reason(
    prompt: list[int], params: dict[str, Any], reason: str
) -> None:
    rank = FakeRank(num_pages=16, page_size=4, max_len=128)
    rank.submit("bad", prompt, **params)
    good = rank.submit("good", PROMPT, max_new_tokens=3)
    rank.finish()
    last = rank.answers["bad"].last
    assert last is not None
    assert last.finish == "error"
    assert reason in last.message
    assert_as_foretold(rank, good)


def test_bytes_that_are_no_token_ids_are_refused() -> None:
    rank = FakeRank()
    rank.loop.post(RequestArrived(Request("odd", b"12345", SamplingParams())))
    rank.finish()
    assert rank.answers["odd"].finishes == ["error"]


def test_the_longest_prompt_that_fits_is_served() -> None:
    rank = FakeRank(num_pages=8, page_size=4)
    request = rank.submit("r", [5] * 32, max_new_tokens=9, ignore_eos=True)
    rank.finish()
    assert_as_foretold(rank, request)
    assert len(rank.token_ids("r")) == 1


# ------------------------------------------------------------------------------------------------------------- aborts
def test_abort_ends_a_running_and_a_queued_request_within_one_turn() -> None:
    rank = FakeRank(max_running=1)
    rank.submit("running", PROMPT, max_new_tokens=50, ignore_eos=True)
    rank.submit("queued", PROMPT, max_new_tokens=50)
    rank.turn(3)
    rank.loop.post(AbortRequested(("running", "queued", "unknown"), "the client is gone"))
    assert not rank.turn()
    for name, num_tokens in (("running", 3), ("queued", 0)):
        answer = rank.answers[name]
        assert (answer.finishes, len(answer.token_ids)) == (["abort"], num_tokens)
        assert answer.last is not None
        assert answer.last.message == "the client is gone"
    assert all_pages_are_back(rank)


def test_abort_of_all_leaves_nobody() -> None:
    rank = FakeRank(max_running=2)
    for n in range(4):
        rank.submit(f"r{n}", [n + 1] * 5, max_new_tokens=50, ignore_eos=True)
    rank.turn(2)
    rank.loop.post(AbortRequested(None))
    rank.turn()
    assert [answer.finishes for answer in rank.answers.values()] == [["abort"]] * 4


def test_abort_during_a_step_ends_the_request_with_that_step() -> None:
    cache = DeviceCache(16, 4)
    scheduler = Scheduler(cache, SchedulerLimits(4, 32, 128))
    scheduler.handle(RequestArrived(Request("r", tokens_of(PROMPT), SamplingParams())), 1.0)
    scheduler.handle(TurnStarted(ALWAYS_VALID), 1.0)
    assert scheduler.handle(AbortRequested(("r",)), 1.1) == [], "the model still writes its pages"
    (emit,) = scheduler.handle(StepFinished(StepResult(1, [7], [None])), 1.2)
    assert [output.finish for output in emit.outputs] == [None, "abort"]  # pyright: ignore[reportAttributeAccessIssue]
    scheduler.check()
    assert cache.counts().private == 0


def test_a_repeated_frame_is_dropped_and_a_newer_attempt_takes_over() -> None:
    rank = FakeRank()
    request = rank.submit("r", PROMPT, max_new_tokens=4, ignore_eos=True)
    rank.turn()
    rank.loop.post(RequestArrived(request))
    rank.turn()
    assert rank.loop.snapshot().counters.num_duplicates == 1
    newer = Request("r", request.tokens, request.sampling, attempt=1)
    rank.loop.post(RequestArrived(newer))
    rank.finish()
    answer = rank.answers["r"]
    assert answer.finishes == ["abort", "length"]
    assert answer.token_ids[2:] == foretell(newer, rank.max_total).token_ids
    assert answer.last is not None
    assert answer.last.attempt == 1


# ------------------------------------------------------------------------------------------------------------ failure
def test_a_failing_step_ends_its_requests_and_the_rank_goes_on() -> None:
    rank = FakeRank(page_size=4)
    good = rank.submit("good", PROMPT, max_new_tokens=4)
    rank.finish()
    rank.submit("unlucky", PROMPT + [7] * 9, max_new_tokens=4)
    rank.runner.failure = RuntimeError("out of memory at /some/path")
    rank.finish()
    last = rank.answers["unlucky"].last
    assert last is not None
    assert (last.finish, last.message) == ("error", "The model failed in this step: RuntimeError.")
    assert all_pages_are_back(rank)
    again = rank.submit("again", PROMPT + [7] * 9, max_new_tokens=4)
    rank.finish()
    assert_as_foretold(rank, good, again)
    counters = rank.loop.snapshot().counters
    assert (counters.num_failed_steps, counters.num_finished_error) == (1, 1)


def test_requests_outside_the_failing_step_go_on() -> None:
    rank = FakeRank(max_step_tokens=4)
    rank.submit("in", [1] * 6, max_new_tokens=4)
    rank.submit("out", [2] * 6, max_new_tokens=4)
    rank.runner.failure = RuntimeError("no")
    rank.turn()
    assert list(rank.answers) == ["in"]
    rank.finish()
    assert [rank.answers[name].finishes[0] == "error" for name in ("in", "out")] == [True, False]


# --------------------------------------------------------------------------------------------------------- the machine
def test_an_illegal_event_raises_and_changes_nothing() -> None:
    scheduler = Scheduler(DeviceCache(16, 4), SchedulerLimits(4, 32, 128))
    before = scheduler.snapshot()
    with pytest.raises(InvariantError, match="StepFinished came while between_steps"):
        scheduler.handle(StepFinished(StepResult(0, [], [])), 1.0)
    assert scheduler.snapshot() == before
    scheduler.handle(RequestArrived(Request("r", tokens_of(PROMPT), SamplingParams())), 1.0)
    scheduler.handle(TurnStarted(ALWAYS_VALID), 1.0)
    for event in (TurnStarted(ALWAYS_VALID), CheckDue()):
        with pytest.raises(InvariantError, match="came while stepping"):
            scheduler.handle(event, 1.0)
    with pytest.raises(InvariantError, match="does not answer step 1"):
        scheduler.handle(StepFinished(StepResult(1, [1, 2], [None, None])), 1.0)
    assert scheduler.handle(StepFinished(StepResult(1, [1], [None])), 1.0)


def test_facts_come_with_the_first_token_and_with_the_end() -> None:
    rank = FakeRank()
    outputs = []
    rank.loop._on_outputs = outputs.extend
    rank.submit("r", PROMPT, max_new_tokens=4, ignore_eos=True, num_logprobs=0)
    rank.clock.now_s += 0.5
    rank.finish()
    assert [output.stats is not None for output in outputs] == [True, False, False, True]
    assert [len(output.logprobs or ()) for output in outputs] == [1, 1, 1, 1]
    stats = outputs[-1].stats
    assert (stats.num_prompt_tokens, stats.num_cached_tokens, stats.kv_epoch) == (12, 0, None)


def test_waiting_time_is_counted_from_the_arrival() -> None:
    rank = FakeRank(max_running=1)
    rank.submit("first", [1], max_new_tokens=10, ignore_eos=True)
    rank.submit("second", [2], max_new_tokens=1)
    rank.finish()
    last = rank.answers["second"].last
    assert last is not None
    assert last.stats is not None
    assert last.stats.queue_s == pytest.approx(0.010)
    assert last.stats.first_token_s == pytest.approx(0.010)


def test_the_sampler_is_told_the_past_only_when_a_penalty_needs_it() -> None:
    rank = FakeRank()
    rank.submit("plain", [1, 2], max_new_tokens=2, ignore_eos=True, seed=5)
    rank.submit("presence", [3, 4], max_new_tokens=2, ignore_eos=True, presence_penalty=0.5)
    rank.submit("repetition", [3, 4], max_new_tokens=2, ignore_eos=True, repetition_penalty=1.5)
    rank.finish()
    plain, presence, repetition = rank.runner.batches[1].samples
    assert (plain.seed, plain.num_generated, plain.prompt_tokens, plain.output_tokens) == (5, 1, None, None)
    assert presence.prompt_tokens is None
    assert presence.output_tokens is not None
    assert presence.output_tokens.tolist() == rank.token_ids("presence")[:1]
    assert repetition.prompt_tokens is not None
    assert repetition.output_tokens is not None
    assert repetition.prompt_tokens.tolist() == [3, 4]
    assert repetition.output_tokens.tolist() == rank.token_ids("repetition")[:1]


def test_a_request_without_a_seed_gets_the_same_one_in_every_run() -> None:
    seeds = []
    for _ in range(2):
        rank = FakeRank()
        rank.submit("r", PROMPT, max_new_tokens=1)
        rank.finish()
        seeds.append(rank.runner.batches[0].samples[0].seed)
    assert seeds[0] == seeds[1]


@pytest.mark.parametrize("fault", ["a page in two holds", "a page that does not exist"])
def test_after_a_violation_nobody_owns_a_page_of_before(fault: str) -> None:
    rank = FakeRank(page_size=4)
    requests = [rank.submit(f"r{n}", [n + 1] * 9, max_new_tokens=12, ignore_eos=True) for n in range(3)]
    rank.turn(3)
    first, second, _ = [sequence.hold for sequence in rank.scheduler.running]
    assert first is not None
    assert second is not None
    stray = int(first.page_table[-1]) if fault == "a page in two holds" else rank.cache.num_pages + 7
    second.page_table = np.append(second.page_table[:-1], np.int32(stray))
    (suspect,) = rank.scheduler.handle(CheckDue(), rank.clock.now_s)
    assert suspect.violations  # pyright: ignore[reportAttributeAccessIssue]
    assert rank.cache.sanity_check() == []
    rank.finish()
    assert_as_foretold(rank, *requests)
    assert all_pages_are_back(rank)
    assert rank.cache.sanity_check() == []


def test_a_violation_empties_the_cache_and_is_never_fatal() -> None:
    rank = FakeRank()
    rank.submit("r", PROMPT, max_new_tokens=2)
    rank.finish()
    assert rank.scheduler.handle(CheckDue(), 1.0) == []
    sound, rank.cache.sanity_check = rank.cache.sanity_check, lambda: ["page 3 has two owners"]
    (suspect,) = rank.scheduler.handle(CheckDue(), 1.0)
    rank.cache.sanity_check = sound
    assert suspect.violations == ["page 3 has two owners"]  # pyright: ignore[reportAttributeAccessIssue]
    assert rank.cache.counts().cached == 0
    again = rank.submit("again", PROMPT, max_new_tokens=2)
    rank.finish()
    assert_as_foretold(rank, again)
    assert rank.loop.snapshot().counters.num_violations == 1
