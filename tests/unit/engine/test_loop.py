"""The engine thread and its border: order in a turn, sleep and wake, deadlines during a step, whole answers."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from configs.errors import InvariantError
from engine.batch import Batch
from engine.control_words import ALWAYS_VALID, ControlWords
from engine.events import RequestArrived
from engine.flush import TIMED_OUT_WAITING, Blockers, FlushVerdict
from engine.flush_gate import PendingFlush
from engine.loop import EngineLoop
from engine.request import Output, Request, SamplingParams
from tests.fakes import FakeClock, FakeRank, flush_command, foretell, tokens_of

PROMPT = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
#: no wait of these tests takes so long; it only keeps a fault from hanging them
PATIENCE_S = 20.0


@contextmanager
def running(loop: EngineLoop) -> Iterator[threading.Thread]:
    thread = threading.Thread(target=loop.run, name="engine")
    thread.start()
    try:
        yield thread
    finally:
        loop.stop()
        thread.join(PATIENCE_S)
        assert not thread.is_alive()


class LongStep:
    """Makes each run of the fake model wait until it is let go."""

    def __init__(self, rank: FakeRank) -> None:
        self.has_begun = threading.Event()
        self.may_end = threading.Event()
        rank.runner.during_run = self._run

    def _run(self, batch: Batch) -> None:
        self.has_begun.set()
        assert self.may_end.wait(PATIENCE_S)


class Ends:
    """Counts ends of requests; another thread can wait for them."""

    def __init__(self, num_expected: int) -> None:
        self._left = num_expected
        self.all_here = threading.Event()
        self.outputs: list[Output] = []

    def take(self, outputs: list[Output]) -> None:
        self.outputs += outputs
        self._left -= sum(output.finish is not None for output in outputs)
        if self._left <= 0:
            self.all_here.set()


# ------------------------------------------------------------------------------------------------------ order in a turn
def test_words_are_read_after_the_inbox_was_drained_and_before_the_match() -> None:
    """Invariant 6, hole H7."""
    rank = FakeRank()
    seen: list[tuple[int, int]] = []

    def read_words() -> ControlWords:
        snapshot = rank.scheduler.snapshot()
        seen.append((snapshot.num_waiting, snapshot.num_running))
        if len(seen) == 1:
            rank.submit("late", PROMPT, max_new_tokens=1)
        return ALWAYS_VALID

    rank.loop._read_words = read_words
    rank.submit("early", PROMPT, max_new_tokens=1)
    rank.turn()
    assert seen == [(1, 0)], "taken from the inbox, not matched"
    assert list(rank.answers) == ["early"], "what came after the words were read waits for the next ones"
    rank.turn()
    assert seen[1:] == [(1, 0)]
    assert list(rank.answers) == ["early", "late"]


def test_a_request_sent_after_the_floor_was_raised_never_hits_older_pages() -> None:
    """Invariant 1 on one rank: the floor rises while the inbox is being drained."""
    rank = FakeRank(page_size=4)
    rank.submit("old", PROMPT, max_new_tokens=1)
    rank.finish()
    rank.words = ControlWords(floor=6)
    rank.submit("new", PROMPT, max_new_tokens=1)
    rank.finish()
    last = rank.answers["new"].last
    assert last is not None
    assert last.stats is not None
    assert last.stats.kv_epoch is None


def test_the_snapshot_is_replaced_before_the_answer_leaves() -> None:
    """A flush right behind the last answer meets an idle engine, even with timeout 0."""
    rank = FakeRank()
    offered: list[PendingFlush | FlushVerdict] = []

    def flush_at_the_end(outputs: list[Output]) -> None:
        if outputs[-1].finish is not None:
            offered.append(rank.loop.offer_flush(flush_command(budget_s=0.0)))

    rank.loop._on_outputs = flush_at_the_end
    rank.submit("r", PROMPT, max_new_tokens=3, ignore_eos=True)
    rank.finish()
    (pending,) = offered
    assert isinstance(pending, PendingFlush)
    assert pending.ended.result(0).status == "flushed"


# ------------------------------------------------------------------------------------------------------ sleep and wake
def test_an_idle_engine_sleeps_until_something_is_posted() -> None:
    rank = FakeRank()
    asleep = threading.Semaphore(0)

    class Sleeping(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            assert timeout is None, "no polling"
            asleep.release()
            return super().wait()

    rank.loop._wakeup = Sleeping()
    num_turns = 0

    def read_words() -> ControlWords:
        nonlocal num_turns
        num_turns += 1
        return ALWAYS_VALID

    rank.loop._read_words = read_words
    with running(rank.loop):
        assert asleep.acquire(timeout=PATIENCE_S)
        before = num_turns
        rank.submit("r", PROMPT, max_new_tokens=3, ignore_eos=True)
        assert asleep.acquire(timeout=PATIENCE_S)
        # three steps, at most one turn before it sleeps and one for a wake-up set while it was awake
        assert before + 3 <= num_turns <= before + 5
    assert rank.answers["r"].finishes == ["length"]


def test_what_is_posted_just_before_the_engine_falls_asleep_wakes_it() -> None:
    rank = FakeRank()
    ends = Ends(num_expected=1)
    rank.loop._on_outputs = ends.take
    take_turn = rank.loop.turn
    num_idle_turns = 0

    def turn() -> bool:
        nonlocal num_idle_turns
        has_work = take_turn()
        num_idle_turns += not has_work
        if not has_work and num_idle_turns == 1:
            rank.submit("r", PROMPT, max_new_tokens=1)
        return has_work

    rank.loop.turn = turn
    with running(rank.loop):
        assert ends.all_here.wait(PATIENCE_S)


def test_requests_posted_by_many_threads_are_all_answered() -> None:
    rank = FakeRank(num_pages=48)
    ends = Ends(num_expected=60)
    rank.loop._on_outputs = ends.take
    requests = [
        Request(f"r{n}", tokens_of([*PROMPT[: n % 12 + 1], n]), SamplingParams(temperature=0, max_new_tokens=8))
        for n in range(60)
    ]

    def post(part: list[Request]) -> None:
        for request in part:
            rank.loop.post(RequestArrived(request))

    with running(rank.loop):
        threads = [threading.Thread(target=post, args=(requests[n::4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        assert ends.all_here.wait(PATIENCE_S)
        for thread in threads:
            thread.join()
    for request in requests:
        tokens = [t for output in ends.outputs if output.request_id == request.request_id for t in output.token_ids]
        assert tokens == foretell(request, rank.max_total).token_ids


# ------------------------------------------------------------------------------------------------- during a long step
def test_a_deadline_is_answered_while_a_step_runs() -> None:
    rank = FakeRank()
    step = LongStep(rank)
    rank.submit("r", PROMPT, max_new_tokens=3, ignore_eos=True)
    with running(rank.loop):
        assert step.has_begun.wait(PATIENCE_S)
        pending = rank.loop.offer_flush(flush_command())
        assert isinstance(pending, PendingFlush)
        rank.clock.now_s = pending.deadline_s
        verdict = rank.loop.expire_flush(pending)
        assert verdict is not None
        assert (verdict.status, verdict.message) == ("timed_out", TIMED_OUT_WAITING)
        assert verdict.blockers == Blockers(half_prefilled=1)
        assert rank.loop.snapshot().is_stepping
        step.may_end.set()
    assert rank.cache.generation == 0


def test_timeout_zero_is_refused_while_a_step_runs() -> None:
    rank = FakeRank()
    step = LongStep(rank)
    rank.submit("r", PROMPT, max_new_tokens=3, ignore_eos=True)
    with running(rank.loop):
        assert step.has_begun.wait(PATIENCE_S)
        verdict = rank.loop.offer_flush(flush_command(budget_s=0.0))
        assert isinstance(verdict, FlushVerdict)
        assert verdict.status == "refused"
        step.may_end.set()


def test_timeout_zero_that_slips_in_before_a_step_is_refused_before_that_step_runs() -> None:
    rank = FakeRank()
    offered: list[PendingFlush | FlushVerdict] = []
    ended_before_the_step: list[bool] = []

    def read_words() -> ControlWords:
        if not offered:
            # the snapshot still says idle, and the turn's events are already drained
            offered.append(rank.loop.offer_flush(flush_command(budget_s=0.0)))
        return ALWAYS_VALID

    def during(batch: Batch) -> None:
        (pending,) = offered
        assert isinstance(pending, PendingFlush)
        ended_before_the_step.append(pending.ended.done() and pending.ended.result().status == "refused")

    rank.loop._read_words = read_words
    rank.runner.during_run = during
    rank.submit("r", PROMPT, max_new_tokens=1)
    rank.finish()
    assert ended_before_the_step == [True]


def test_other_threads_can_cancel_and_re_read() -> None:
    rank = FakeRank()
    rank.submit("r", PROMPT, max_new_tokens=9, ignore_eos=True)
    rank.turn()
    assert isinstance(rank.loop.offer_flush(flush_command("f")), PendingFlush)
    verdict = rank.loop.withdraw_flush(("f", 0))
    assert isinstance(verdict, FlushVerdict)
    assert rank.loop.flush_verdict(("f", 0)) == verdict
    rank.loop.see_term(9)
    late = rank.loop.offer_flush(flush_command("g", term=8))
    assert isinstance(late, FlushVerdict)
    assert late.status == "refused"
    rank.finish()
    assert rank.cache.generation == 0


# ------------------------------------------------------------------------------------------------------ end and failure
def test_stop_ends_what_is_left_and_closes_the_gate() -> None:
    rank = FakeRank()
    step = LongStep(rank)
    rank.submit("r", PROMPT, max_new_tokens=50, ignore_eos=True)
    with running(rank.loop):
        assert step.has_begun.wait(PATIENCE_S)
        pending = rank.loop.offer_flush(flush_command(mode="drain", budget_s=60.0))
        assert isinstance(pending, PendingFlush)
        rank.loop.stop()
        step.may_end.set()
    assert rank.answers["r"].finishes == ["abort"]
    assert pending.ended.result(0).message == "The engine has stopped."
    assert isinstance(rank.loop.offer_flush(flush_command("late")), FlushVerdict)


def test_a_broken_promise_ends_the_engine_and_closes_the_gate() -> None:
    rank = FakeRank()
    rank.submit("r", PROMPT, max_new_tokens=5)
    rank.runner.failure = InvariantError("page 3 has two owners")
    with pytest.raises(InvariantError, match="two owners"):
        rank.loop.run()
    late = rank.loop.offer_flush(flush_command())
    assert isinstance(late, FlushVerdict)
    assert late.message == "The engine has failed."


def test_the_cache_is_looked_over_on_a_timer(caplog: pytest.LogCaptureFixture) -> None:
    rank = FakeRank()
    clock = FakeClock()
    loop = EngineLoop(rank.scheduler, rank.runner, clock=clock, sanity_check_s=30.0)
    loop.turn()
    sound, rank.cache.sanity_check = rank.cache.sanity_check, lambda: ["page 3 has two owners"]
    loop.turn()
    assert loop.snapshot().counters.num_violations == 0
    clock.now_s += 30.0
    with caplog.at_level(logging.ERROR):
        loop.turn()
    rank.cache.sanity_check = sound
    assert loop.snapshot().counters.num_violations == 1
    assert "page 3 has two owners" in caplog.text


def test_running_answers_are_paused_for_a_look_only_when_no_idle_instant_comes() -> None:
    rank = FakeRank()
    clock = FakeClock()
    loop = EngineLoop(rank.scheduler, rank.runner, clock=clock, sanity_check_s=30.0)
    looks: list[float] = []
    rank.cache.sanity_check = lambda: looks.append(clock.now_s) or []
    loop.post(RequestArrived(Request("r", tokens_of(PROMPT), SamplingParams(max_new_tokens=60, ignore_eos=True))))
    start_s = clock.now_s
    for _ in range(40):
        loop.turn()
        clock.now_s += 10.0
    assert [look - start_s for look in looks] == [300.0]


# -------------------------------------------------------------------------------------------------------- whole answers
def requests_of(*lengths: int) -> list[Request]:
    return [
        Request(f"r{n}", tokens_of([n + 1] * length), SamplingParams(temperature=0, max_new_tokens=6, num_logprobs=0))
        for n, length in enumerate(lengths)
    ]


def test_generate_answers_in_the_order_of_the_requests() -> None:
    rank = FakeRank(num_pages=16)
    requests = requests_of(30, 1, 500, 9, 20)
    generations = rank.loop.generate(requests)
    assert [generation.request_id for generation in generations] == [request.request_id for request in requests]
    assert generations[2].finish == "error"
    assert "prompt has 500 tokens" in generations[2].message
    for request, generation in zip(requests, generations, strict=True):
        if generation.finish != "error":
            foretold = foretell(request, rank.max_total)
            assert (generation.token_ids, generation.finish) == (foretold.token_ids, foretold.finish)
            assert len(generation.logprobs) == len(generation.token_ids)
            assert generation.stats is not None
    assert rank.answers == {}, "nobody else is told"


def test_generate_refuses_two_requests_with_one_id() -> None:
    request = requests_of(3)[0]
    with pytest.raises(ValueError, match="'r0'"):
        FakeRank().loop.generate([request, request])


def test_generate_can_be_interrupted_and_used_again() -> None:
    rank = FakeRank()
    requests = requests_of(9, 12)
    rank.runner.failure = KeyboardInterrupt()
    with pytest.raises(KeyboardInterrupt):
        rank.loop.generate(requests)
    generations = rank.loop.generate(requests)
    assert [g.token_ids for g in generations] == [foretell(r, rank.max_total).token_ids for r in requests]
    rank.scheduler.check()
