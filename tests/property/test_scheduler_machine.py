"""Random arrivals, aborts, flushes, failures and small pools: every request ends once, with the tokens foretold.

The oracle is the fake model's pure function: whatever was hit, evicted, retracted, flushed or failed on the way, the
tokens of an answer depend on its prompt alone. Beside it the invariants of protocol.md are checked under their numbers.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test

from cache.device_cache import DeviceCache, Dropped, Swapped
from cache.page_hold import PageHold
from cache.types import Epoch, Namespace, TokenBytes
from engine.batch import Batch
from engine.control_words import ControlWords
from engine.events import AbortRequested
from engine.flush import FLUSH_MODES, FlushMode, FlushScope, FlushVerdict
from engine.flush_gate import PendingFlush
from engine.request import Request
from tests.fakes import FakeRank, flush_command, foretell, tokens_of

PAGE_SIZE = 2
NUM_PAGES = 14
#: prompts begin with a part of one of these, so that prefixes are shared
STEMS = ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12], [1, 2, 3, 4, 40, 41, 42, 43], [20, 21, 22])
SCOPES = (
    None,
    None,
    None,
    FlushScope(namespace="a"),
    FlushScope(prefix_tokens=tokens_of(STEMS[0])),
    FlushScope(older_than_s=0.01),
)
#: what happened over all examples; each must have happened
totals: Counter[str] = Counter()


class WitnessCache(DeviceCache):
    """The real cache, telling what was done to it and checking when it may be done."""

    def __init__(self) -> None:
        super().__init__(NUM_PAGES, PAGE_SIZE)
        self.words = ControlWords()
        #: requests taken in when the words of this turn were read; None between turns
        self.num_arrived_at_words: int | None = None
        self.num_arrived = 0
        #: swaps and drops since the last look
        self.num_invalidations = 0

    def open(self, namespace: Namespace, tokens: TokenBytes, max_cached_tokens: int, now_s: float) -> PageHold:
        assert self.num_arrived_at_words == self.num_arrived, "invariant 6: matched without words read after it came"
        hold = super().open(namespace, tokens, max_cached_tokens, now_s)
        assert self.words.least_epoch <= self.epoch, "invariant 5: matched below the floor"
        assert self.words.lease_ok or not hold.num_cached_tokens, "invariant 5: matched with the lease over"
        assert hold.num_cached_tokens < len(tokens) // 4, "nothing would be left to sample from"
        return hold

    def publish(self, hold: PageHold, tokens: TokenBytes, num_tokens: int, now_s: float) -> None:
        before = self.index.num_pages
        super().publish(hold, tokens, num_tokens, now_s)
        is_current = (hold.epoch, hold.generation) == (self.epoch, self.generation) and self.words.lease_ok
        assert is_current or self.index.num_pages == before, "invariant 3: published what a flush has covered"
        totals["publishes refused for taint"] += not is_current

    def swap(self, epoch: Epoch) -> Swapped:
        self.num_invalidations += 1
        return super().swap(epoch)

    def drop_namespace(self, namespace: Namespace) -> Dropped:
        self.num_invalidations += 1
        return super().drop_namespace(namespace)

    def drop_prefix(self, namespace: Namespace, first_page: TokenBytes) -> Dropped:
        self.num_invalidations += 1
        return super().drop_prefix(namespace, first_page)

    def drop_older(self, birth_s: float) -> Dropped:
        self.num_invalidations += 1
        return super().drop_older(birth_s)


@dataclass(frozen=True)
class Sent:
    """A request, and the epoch of the last full flush that had returned when it was sent."""

    request: Request
    least_epoch: int
    #: scoped flushes that had returned
    num_scoped: int


@dataclass(frozen=True)
class Scoped:
    """A scoped flush that has returned: what it covers, and from when on KV in scope may be."""

    scope: FlushScope
    num_steps: int
    birth_s: float

    def covers(self, request: Request) -> bool:
        scope = self.scope
        if scope.prefix_tokens is not None:
            first_page = scope.prefix_tokens[: 4 * PAGE_SIZE]
            return request.tokens[: 4 * PAGE_SIZE] == first_page
        return scope.older_than_s is not None or scope.namespace == request.namespace


class SchedulerMachine(RuleBasedStateMachine):
    tiers: tuple[str, ...] = ("device",)

    def __init__(self) -> None:
        super().__init__()
        self.cache = WitnessCache()
        self.rank = self.make_rank()
        self.rank.loop._read_words = self._read_words
        self.rank.loop._gate._on_end = self._take_verdict
        self.sent: dict[str, Sent] = {}
        self.flushes: list[PendingFlush] = []
        self.verdicts: dict[str, FlushVerdict] = {}
        self.num_flushes = 0
        self.scoped: list[Scoped] = []
        self.rank.runner.during_run = self._check_scopes
        #: epochs are allotted from one counter, to flushes and floors
        self.epoch = 0
        self.flushed_epoch = 0
        self.verdicts_of_turn: list[tuple[PendingFlush, FlushVerdict]] = []

    def make_rank(self) -> FakeRank:
        return FakeRank(NUM_PAGES, PAGE_SIZE, max_running=4, max_step_tokens=7, max_len=40, cache=self.cache)

    def _read_words(self) -> ControlWords:
        assert not self.rank.loop._inbox, "invariant 6: words read before the inbox was drained"
        self.cache.num_arrived = self.rank.scheduler.snapshot().counters.num_arrived
        self.cache.num_arrived_at_words = self.cache.num_arrived
        self.cache.words = self.rank.words
        return self.rank.words

    def _check_scopes(self, batch: Batch) -> None:
        """Invariant 16: whoever was sent after a scoped flush reads nothing in scope that is older."""
        for number, row in enumerate(self.rank.scheduler.rows):
            sent = self.sent.get(row.sequence.request_id)
            before = [] if sent is None else [s for s in self.scoped[: sent.num_scoped] if s.covers(sent.request)]
            if not before:
                continue
            step, birth_s = self.rank.runner.oldest(number, batch)
            for flush in before:
                is_new = birth_s >= flush.birth_s if flush.scope.older_than_s is not None else step >= flush.num_steps
                assert is_new, f"invariant 16: KV of step {step}, born at {birth_s}, after {flush}"
            totals["steps after a scoped flush"] += 1

    def _take_verdict(self, pending: PendingFlush, verdict: FlushVerdict) -> None:
        flush_id = pending.command.flush_id
        assert flush_id not in self.verdicts, "invariant 7: a second verdict"
        self.verdicts[flush_id] = verdict
        self.verdicts_of_turn.append((pending, verdict))
        totals[f"{pending.command.mode} {verdict.status}"] += 1
        totals[verdict.status] += 1
        is_full = pending.command.scope is None and not pending.command.dry_run
        if verdict.status == "flushed":
            assert self.rank.clock.now_s < pending.deadline_s, "invariant 8: executed after its end"
            if pending.command.mode in ("wait", "drain") and not pending.command.dry_run:
                assert not any(hold.is_fenced for hold in self.cache.holds if not hold.is_copy), (
                    "G2: somebody ran at the swap"
                )
            if is_full:
                assert verdict.epoch >= pending.command.epoch
                self.flushed_epoch = max(self.flushed_epoch, pending.command.epoch)
            if pending.command.scope is not None and not pending.command.dry_run:
                scope = pending.command.scope
                birth_s = self.rank.clock.now_s - (scope.older_than_s or 0.0)
                self.scoped.append(Scoped(scope, len(self.rank.runner.batches), birth_s))

    # ------------------------------------------------------------------------------------------------------ requests
    @rule(
        stem=st.sampled_from(STEMS),
        cut=st.integers(0, 12),
        tail=st.lists(st.integers(50, 60), max_size=8),
        namespace=st.sampled_from(["", "", "a"]),
        max_new_tokens=st.integers(1, 30),
        min_new_tokens=st.sampled_from([0, 0, 3]),
        stop=st.sampled_from([(), (), (7, 9, 11)]),
        num_turns=st.integers(0, 3),
    )
    def submit(
        self,
        stem: list[int],
        cut: int,
        tail: list[int],
        namespace: str,
        max_new_tokens: int,
        min_new_tokens: int,
        stop: tuple[int, ...],
        num_turns: int,
    ) -> None:
        request_id = f"r{len(self.sent)}"
        prompt = (stem[:cut] + tail) or [33]
        request = self.rank.submit(
            request_id,
            prompt,
            namespace,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            stop_token_ids=stop,
        )
        self.sent[request_id] = Sent(request, self.flushed_epoch, len(self.scoped))
        self.turns(num_turns)

    @precondition(lambda self: self.sent)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        ids = data.draw(st.lists(st.sampled_from(sorted(self.sent)), min_size=1, max_size=3))
        self.rank.loop.post(AbortRequested(tuple(ids)))

    # -------------------------------------------------------------------------------------------------------- control
    @rule(
        mode=st.sampled_from(FLUSH_MODES),
        budget_s=st.sampled_from([0.003, 0.01, 1.0]),
        is_now_or_never=st.sampled_from([False, False, True]),
        scope=st.sampled_from(SCOPES),
        dry_run=st.sampled_from([False, False, False, True]),
        then=st.sampled_from(["turn", "turn", "turn", "freeze", "rival"]),
    )
    def flush(
        self,
        mode: FlushMode,
        budget_s: float,
        is_now_or_never: bool,
        scope: FlushScope | None,
        dry_run: bool,
        then: str,
    ) -> None:
        self._offer(mode, budget_s, 0.0 if is_now_or_never else budget_s, scope, dry_run)
        if then == "freeze":
            self.rank.clock.now_s += 2.0
        elif then == "rival":
            self._turn()
            self._offer("fence", 1.0, 1.0, None, False)
        self._turn()

    def _offer(
        self, mode: FlushMode, budget_s: float, timeout_s: float, scope: FlushScope | None, dry_run: bool
    ) -> None:
        self.num_flushes += 1
        takes_epoch = scope is None and not dry_run
        # a scoped flush takes an index of the same log
        self.epoch += not dry_run
        command = flush_command(
            f"f{self.num_flushes}",
            mode,
            epoch=self.epoch if takes_epoch else 0,
            budget_s=budget_s,
            timeout_s=timeout_s,
            scope=scope,
            dry_run=dry_run,
            tiers=self.tiers,
            sub_epoch=0 if takes_epoch or dry_run else self.epoch,
        )
        offered = self.rank.loop.offer_flush(command)
        if isinstance(offered, PendingFlush):
            self.flushes.append(offered)
        else:
            totals[offered.status] += 1

    @precondition(lambda self: self.flushes)
    @rule(is_cancel=st.booleans())
    def end_early(self, is_cancel: bool) -> None:
        """The control loop's side: its clock is past the deadline, or the caller withdraws."""
        pending = self.flushes[-1]
        if is_cancel:
            self.rank.loop.withdraw_flush(pending.command.key)
        else:
            self.rank.loop.expire_flush(pending)
        assert pending.ended.done(), "on one thread nothing stays claimed without a verdict"

    @rule(lease_ok=st.booleans(), raise_floor=st.sampled_from([False, False, True]))
    def change_words(self, lease_ok: bool, raise_floor: bool) -> None:
        self.epoch += raise_floor
        floor = self.epoch if raise_floor else self.rank.words.floor
        self.rank.words = ControlWords(lease_ok=lease_ok, floor=floor)

    @rule(seconds=st.sampled_from([0.001, 0.004, 0.02, 2.0]))
    def time_passes(self, seconds: float) -> None:
        self.rank.clock.now_s += seconds

    # ---------------------------------------------------------------------------------------------------------- turns
    @rule(count=st.integers(1, 4))
    def turns(self, count: int) -> None:
        for _ in range(count):
            self._turn()

    @rule(fails=st.sampled_from([False, False, False, True]))
    def failing_step(self, fails: bool) -> None:
        self.rank.runner.failure = RuntimeError("as ordered") if fails else None
        self._turn()
        self.rank.runner.failure = None

    def _turn(self) -> bool:
        self.verdicts_of_turn = []
        self.cache.num_invalidations = 0
        needs_floor_swap = self.rank.words.least_epoch > self.cache.epoch
        began_s = self.rank.clock.now_s
        has_work = self.rank.turn()
        self.cache.num_arrived_at_words = None
        was_flushed = any(v.status == "flushed" and not p.command.dry_run for p, v in self.verdicts_of_turn)
        if not was_flushed and not needs_floor_swap:
            assert not self.cache.num_invalidations, "invariant 7: a flush that did not happen has dropped something"
        for pending in self.flushes:
            assert pending.ended.done() or began_s < pending.deadline_s, "invariant 19: a hold outlived its deadline"
        counts = self.cache.counts()
        total = counts.free + counts.cached + counts.pinned + counts.private + counts.fenced + counts.copying
        assert total == NUM_PAGES, "invariant 10: pages are lost or in two states"
        return has_work

    # ------------------------------------------------------------------------------------------------------------ end
    def teardown(self) -> None:
        self.come_to_rest()
        self._check_answers()
        for pending in self.flushes:
            flush_id = pending.command.flush_id
            assert pending.ended.result(0) == self.verdicts[flush_id] == self.rank.loop.flush_verdict((flush_id, 0))
        counts = self.cache.counts()
        assert counts.free + counts.cached == NUM_PAGES
        snapshot = self.rank.loop.snapshot()
        assert snapshot.counters.num_arrived == len(self.sent)
        totals["retractions"] += snapshot.counters.num_retractions
        totals["chunks"] += snapshot.counters.num_chunks
        totals["cached tokens"] += snapshot.counters.num_cached_tokens
        totals["failed steps"] += snapshot.counters.num_failed_steps
        totals["evicted pages"] += snapshot.num_evicted_pages
        totals["floor swaps"] += snapshot.counters.num_floor_swaps
        totals["uncached admissions"] += snapshot.counters.num_uncached_admissions

    def come_to_rest(self) -> None:
        for _ in range(3000):
            if not self._turn():
                return
        raise AssertionError("the engine does not come to rest")

    def _check_answers(self) -> None:
        for request_id, sent in self.sent.items():
            answer = self.rank.answers[request_id]
            assert len(answer.finishes) == 1, "a request ends exactly once"
            foretold = foretell(sent.request, self.rank.max_total)
            (finish,) = answer.finishes
            totals[f"ended with {finish}"] += 1
            if finish in ("abort", "error"):
                assert answer.token_ids == foretold.token_ids[: len(answer.token_ids)]
            else:
                assert (answer.token_ids, finish) == (foretold.token_ids, foretold.finish)
            assert answer.last is not None
            assert answer.last.stats is not None
            kv_epoch = answer.last.stats.kv_epoch
            assert kv_epoch is None or kv_epoch >= sent.least_epoch, "invariant 1: reused KV older than the flush"


MUST_HAPPEN = (
    *("retractions", "chunks", "cached tokens", "evicted pages", "failed steps", "floor swaps", "uncached admissions"),
    *("ended with stop", "ended with length", "ended with abort", "ended with error", "publishes refused for taint"),
    *(f"{mode} flushed" for mode in FLUSH_MODES),
    *("steps after a scoped flush", "wait timed_out", "drain timed_out", "wait superseded", "busy", "refused"),
)


def run_machine(machine: type[SchedulerMachine], max_examples: int, must_happen: tuple[str, ...] = MUST_HAPPEN) -> None:
    """Run the examples of one machine; each thing of `must_happen` has happened in them."""
    totals.clear()
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=max_examples,
            stateful_step_count=40,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large, HealthCheck.filter_too_much],
        ),
    )
    print(dict(sorted(totals.items())))
    assert [what for what in must_happen if not totals[what]] == []


@pytest.fixture(autouse=True)
def _quiet(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, "engine.loop")


def test_whatever_happens_answers_are_those_foretold() -> None:
    run_machine(SchedulerMachine, max_examples=500)


@pytest.mark.deep
def test_whatever_happens_for_long_answers_are_those_foretold() -> None:
    run_machine(SchedulerMachine, max_examples=5000)
