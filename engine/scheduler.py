"""Continuous batching over a page pool, as a machine: events in, commands out, no clock, no threads, no torch.

A turn: the inbox was drained, the control words were read, `TurnStarted` brings them. Then, in this order: swap if a
floor says so, look at the pending flush, decode rows, prefill chunks, admissions with their match. A match is never
done anywhere else, so none outlives the words it was made under (protocol.md, invariants 5 and 6).

When pages run out the youngest running request gives way: it keeps its tokens, loses its KV and waits in front. The
oldest one never gives way to anybody, so it always ends, and after it the next.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, TypeAlias

from cache.device_cache import DeviceCache
from configs.errors import InvariantError
from engine.batch import StepResult
from engine.commands import CacheSuspect, Command, Emit, RunBatch, StartCopies
from engine.events import (
    AbortRequested,
    CheckDue,
    CopyEnded,
    Event,
    FlushArrived,
    PagesCommitted,
    RequestArrived,
    StepFailed,
    StepFinished,
    TierAttached,
    TurnStarted,
)
from engine.flush_desk import FlushDesk
from engine.host_calls import HostSettings
from engine.host_desk import HostDesk
from engine.limits import SchedulerLimits
from engine.plan import Row, build_batch
from engine.request import FinishReason
from engine.roster import Roster
from engine.sequence import Sequence
from engine.snapshot import Counters, EngineSnapshot
from engine.story import Story, StoryLine

State: TypeAlias = Literal["between_steps", "stepping"]
#: events that come from outside, whatever the engine does
_ANY_TIME = frozenset({RequestArrived, AbortRequested, FlushArrived, TierAttached, CopyEnded, PagesCommitted})
#: the legal moves; what is not here raises and changes nothing
LEGAL: dict[State, frozenset[type[Event]]] = {
    "between_steps": _ANY_TIME | {TurnStarted, CheckDue},
    "stepping": _ANY_TIME | {StepFinished, StepFailed},
}
#: nodes of old trees taken apart per turn; 0.6 us each (DeviceCache.reap), so well under 1 ms
REAP_NODES = 1000


class Scheduler:
    """One rank's requests and who of them computes what next. Only `handle` changes anything."""

    def __init__(self, cache: DeviceCache, limits: SchedulerLimits, host: HostSettings | None = None) -> None:
        """host: how to use a host tier once one is attached; None: there will be none."""
        self._cache = cache
        self._host = None if host is None else HostDesk(cache, host)
        self._limits = limits
        self._story = Story()
        self._counters = Counters()
        self._roster = Roster(cache, limits, self._counters, self._story, self._host)
        self._desk = FlushDesk(cache, self._roster, self._story, limits.bytes_per_page, self._host)
        #: rows of the batch that is out; empty between steps
        self._rows: list[Row] = []
        self._step = 0
        #: old trees are being taken apart
        self._has_litter = False
        #: the last turn found nothing to compute before a copy has ended
        self._is_waiting_for_copies = False

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Take an event in; what is to be done now, in order. An illegal event raises and changes nothing.

        `now_s` is seconds of a clock that never goes back. Raises InvariantError with the story.
        """
        if type(event) not in LEGAL[self.state]:
            raise self._broken(f"{type(event).__name__} came while {self.state}")
        commands = self._dispatch(event, now_s)
        outputs, self._roster.outputs = self._roster.outputs, []
        if self._host is not None and self._host.jobs:
            commands.append(StartCopies(self._host.jobs))
            self._host.jobs = []
        return [Emit(outputs), *commands] if outputs else commands

    @property
    def state(self) -> State:
        return "stepping" if self._rows else "between_steps"

    @property
    def has_work(self) -> bool:
        """Whether another turn would do something; without, the driver may sleep until the next event."""
        roster = self._roster
        if self._is_waiting_for_copies:
            return self._has_litter
        return bool(roster.running or roster.waiting or self._desk.pending is not None or self._has_litter)

    @property
    def num_copies_in_flight(self) -> int:
        """Pages on their way from or to the host tier; the end of each of their copies is an event to come."""
        return 0 if self._host is None else self._host.num_in_flight

    @property
    def wakes_at_s(self) -> float:
        """When to take a turn although nothing has happened, on the clock of `now_s`; inf: never."""
        return self._desk.waits_until_s if self._is_waiting_for_copies else math.inf

    @property
    def running(self) -> tuple[Sequence, ...]:
        """Admitted sequences, oldest first."""
        return tuple(self._roster.running)

    @property
    def rows(self) -> tuple[Row, ...]:
        """The batch that is out, row by row."""
        return tuple(self._rows)

    def story(self, request_id: str) -> list[StoryLine]:
        """What happened to a request and around it, oldest first; a bounded memory."""
        return self._story.of(request_id)

    def snapshot(self) -> EngineSnapshot:
        """The picture other threads see. O(running)."""
        cache, counts, pending = self._cache, self._cache.counts(), self._desk.pending
        return EngineSnapshot(
            step=self._step,
            is_stepping=bool(self._rows),
            blockers=self._roster.blockers(),
            num_waiting=len(self._roster.waiting),
            num_waiting_tokens=self._roster.waiting.num_tokens,
            epoch=cache.epoch,
            generation=cache.generation,
            num_pages=cache.num_pages,
            num_free_pages=counts.free,
            num_cached_pages=counts.cached,
            num_pinned_pages=counts.pinned,
            num_private_pages=counts.private,
            num_fenced_pages=counts.fenced,
            num_copying_pages=counts.copying,
            num_evicted_pages=cache.num_evicted_pages,
            lease_ok=self._roster.lease_ok,
            pending_flush_id=None if pending is None else pending.command.flush_id,
            counters=replace(self._counters),
            host=None if self._host is None else self._host.counters.copy(),
        )

    def check(self) -> None:
        """Look everything over. Raises InvariantError with the story. O(pages); for tests and post-mortems."""
        faults = self._cache.sanity_check() + self._roster.faults() + self._host_faults()
        if faults:
            raise self._broken("; ".join(faults))

    def _host_faults(self) -> list[str]:
        return [] if self._host is None else self._host.faults(self._roster.running)

    def _broken(self, message: str) -> InvariantError:
        return InvariantError(message, self._story.latest())

    def _dispatch(self, event: Event, now_s: float) -> list[Command]:
        match event:
            case TurnStarted():
                return self._turn(event, now_s)
            case StepFinished(result):
                self._finish_step(result, now_s)
                self._make_room_ahead()
            case RequestArrived():
                self._arrive(event, now_s)
            case AbortRequested():
                self._abort(event, now_s)
            case FlushArrived(pending):
                ended = self._desk.take(pending, now_s)
                return [] if ended is None else [ended]
            case StepFailed(message):
                self._fail_step(message, now_s)
            case CheckDue():
                return self._check_cache(now_s)
            case CopyEnded() | TierAttached() | PagesCommitted():
                self._hear_of_host_tier(event, now_s)
        return []

    def _hear_of_host_tier(self, event: CopyEnded | TierAttached | PagesCommitted, now_s: float) -> None:
        host = self._host
        if host is None:
            raise self._broken(f"{type(event).__name__} came to an engine without a host tier")
        match event:
            case CopyEnded():
                self._end_copy(host, event, now_s)
                self._make_room_ahead()
            case TierAttached(view, lineage, sub_epochs):
                host.attach(view, lineage, sub_epochs)
                self._story.tell(now_s, "", "host tier attached" if view else "host tier lost")
            case PagesCommitted(outcomes):
                host.counters.commits.update(outcomes)

    def _make_room_ahead(self) -> None:
        if self._host is not None and self._roster.lease_ok:
            self._host.run_ahead()

    def _end_copy(self, host: HostDesk, event: CopyEnded, now_s: float) -> None:
        roster = self._roster
        sequence = host.ended(event.copy_id, event.num_pages, event.reason, event.took_s, lease_ok=roster.lease_ok)
        if sequence is None or sequence.hold is None:
            return
        self._counters.num_cached_tokens += sequence.hold.num_loaded_tokens
        self._story.tell(now_s, sequence.request_id, f"{sequence.hold.num_loaded_tokens} tokens loaded")
        roster.publish(sequence, sequence.hold, sequence.num_computed, now_s)

    # ----------------------------------------------------------------------------------------------------- arrivals
    def _arrive(self, event: RequestArrived, now_s: float) -> None:
        request = event.request
        known = self._roster.live.get(request.request_id)
        if known is not None and request.attempt <= known.request.attempt:
            self._counters.num_duplicates += 1
            return
        if known is not None:
            self._abort_one(known, f"attempt {request.attempt} took its place", now_s)
        self._roster.take_in(request, now_s)

    def _abort(self, event: AbortRequested, now_s: float) -> None:
        live = self._roster.live
        ids = live if event.request_ids is None else event.request_ids
        for sequence in [live[request_id] for request_id in dict.fromkeys(ids) if request_id in live]:
            self._abort_one(sequence, event.reason, now_s)

    def _abort_one(self, sequence: Sequence, reason: str, now_s: float) -> None:
        """End it now, or, while the model writes its pages, when the step is over."""
        if any(row.sequence is sequence for row in self._rows):
            sequence.abort_reason = reason
        else:
            self._roster.abort(sequence, reason, now_s)

    # ----------------------------------------------------------------------------------------------------- the turn
    def _turn(self, event: TurnStarted, now_s: float) -> list[Command]:
        commands: list[Command] = []
        words, cache = event.words, self._cache
        self._roster.lease_ok = words.lease_ok
        if words.least_epoch > cache.epoch:
            self._desk.swap_to_floor(words.least_epoch, now_s)
            self._counters.num_floor_swaps += 1
        ended = self._desk.look(now_s)
        if ended is not None:
            commands.append(ended)
        self._rows = self._plan(now_s)
        if self._host is not None:
            self._is_waiting_for_copies = not self._rows and self._host.num_in_flight > 0
        if self._rows:
            self._step += 1
            commands.append(RunBatch(build_batch(self._step, self._rows, cache.page_size)))
        self._has_litter = cache.reap(REAP_NODES)
        return commands

    def _plan(self, now_s: float) -> list[Row]:
        """Decodes first, then prompts under way, then newcomers, within max_step_tokens."""
        num_retractions = self._counters.num_retractions
        rows = self._decode_rows(now_s)
        budget = self._limits.max_step_tokens - len(rows)
        for sequence in self._roster.running:
            if budget and sequence.num_remaining > 1 and sequence.load is None:
                rows.append(Row(sequence, min(sequence.num_remaining, budget)))
                budget -= rows[-1].num_new
        # Who was just retracted would take its pages back from those it made room for, unless nobody is left.
        is_short_of_pages = self._counters.num_retractions > num_retractions and self._roster.running
        if not is_short_of_pages and not self._desk.holds_admission:
            rows.extend(self._admitted_rows(budget, now_s))
            if not rows and self._roster.waiting and not self.num_copies_in_flight:
                raise self._broken("nothing runs, and the first of the queue does not get its pages")
        return rows

    def _decode_rows(self, now_s: float) -> list[Row]:
        """One row per sequence that wants its next token, after the youngest gave way where pages are short."""
        wanting = [
            sequence for sequence in self._roster.running if sequence.num_remaining == 1 and sequence.load is None
        ]
        return [Row(sequence, 1) for sequence in wanting if self._make_room(sequence, now_s)]

    def _make_room(self, sequence: Sequence, now_s: float) -> bool:
        """Pages for all its tokens; False if it gave way itself, now or to an older one before, or waits for copies.

        Who waits for a load does not give way: the load would keep the pages. Once it has ended, he can.
        """
        while (hold := sequence.hold) is not None:
            if sequence.num_tokens <= hold.num_tokens_capacity or self._cache.try_extend(hold, sequence.num_tokens):
                return True
            youngest = next(other for other in reversed(self._roster.running) if other.load is None)
            if youngest is sequence and self.num_copies_in_flight:
                return False
            self._roster.retract(youngest, now_s, may_publish=True)
        return False

    def _admitted_rows(self, budget: int, now_s: float) -> Iterator[Row]:
        """Admit from the front of the queue while tokens, places and pages last."""
        while budget and (sequence := self._roster.try_admit_next(now_s)) is not None:
            if sequence.load is not None:
                continue
            row = Row(sequence, min(sequence.num_remaining, budget))
            budget -= row.num_new
            yield row

    # ------------------------------------------------------------------------------------------- the end of a step
    def _finish_step(self, result: StepResult, now_s: float) -> None:
        if result.step != self._step or len(result.token_ids) != sum(row.samples for row in self._rows):
            raise self._broken(f"the result of step {result.step} does not answer step {self._step}")
        rows, self._rows = self._rows, []
        self._counters.num_steps += 1
        place = 0
        for row in rows:
            samples = row.samples
            self._advance(row, result, place if samples else None, now_s)
            place += samples

    def _advance(self, row: Row, result: StepResult, place: int | None, now_s: float) -> None:
        """One row was computed; `place` is where its sampled token stands in the result."""
        sequence, roster = row.sequence, self._roster
        is_prefill = row.num_new > 1 or place is None
        sequence.num_computed += row.num_new
        self._counters.num_prefill_tokens += row.num_new if is_prefill else 0
        self._counters.num_chunks += place is None
        if place is not None and place in result.failed:
            roster.leave(sequence, now_s, may_publish=True)
            roster.finish(sequence, "error", result.failed[place], now_s)
            return
        finish = None if place is None else self._take_token(sequence, result, place, now_s)
        if finish is not None:
            roster.leave(sequence, now_s, may_publish=True)
            roster.forget(sequence, finish, now_s)
        elif sequence.abort_reason is not None:
            roster.abort(sequence, sequence.abort_reason, now_s)
        elif is_prefill and sequence.hold is not None:
            roster.publish(sequence, sequence.hold, sequence.num_computed, now_s)

    def _take_token(self, sequence: Sequence, result: StepResult, place: int, now_s: float) -> FinishReason | None:
        token = result.token_ids[place]
        finish = sequence.append(token, now_s)
        self._counters.num_generated_tokens += 1
        self._roster.outputs.append(sequence.output(token, result.logprobs[place], finish))
        return finish

    def _fail_step(self, message: str, now_s: float) -> None:
        """End the requests of the step; what the model left in their pages is published nowhere."""
        rows, self._rows = self._rows, []
        self._counters.num_failed_steps += 1
        self._story.tell(now_s, "", f"step {self._step} failed: {message}")
        for row in rows:
            self._roster.leave(row.sequence, now_s, may_publish=False)
            self._roster.finish(row.sequence, "error", message, now_s)

    def _check_cache(self, now_s: float) -> list[Command]:
        """A violation is never fatal: the cache begins anew, whoever ran computes again, in pages that are his own."""
        violations = self._cache.sanity_check() + self._host_faults()
        if not violations:
            return []
        self._counters.num_violations += len(violations)
        self._cache.begin_anew()
        if self._host is not None:
            self._host.begin_anew()
        for sequence in reversed(self.running):
            self._roster.retract(sequence, now_s, may_publish=False)
        self._story.tell(now_s, "", f"cache emptied after {len(violations)} violations: {violations[0]}")
        return [CacheSuspect(violations)]
