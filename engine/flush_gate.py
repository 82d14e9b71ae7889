"""The gate every flush of a rank passes: one pending flush, one end, one verdict per flush.

Two threads meet here. The control loop offers, expires and cancels; the engine thread claims and ends. Who ends a
flush is decided by its `Claim` alone; the gate's lock only guards the slot and the memory of verdicts, and nothing
slow happens under it. A flush whose claim is no longer pending has left the slot, even if its verdict is still being
written: the next one may come.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from threading import Lock
from typing import Protocol

from engine.flush import (
    ALREADY_IN_PROGRESS,
    STEP_MODES,
    TIMED_OUT_WAITING,
    Blockers,
    Claim,
    FlushCommand,
    FlushKey,
    FlushMode,
    FlushScope,
    FlushVerdict,
    Verdict,
)
from engine.snapshot import EngineSnapshot

#: "now" still has to reach an engine thread that sleeps: on an idle engine no timeout is shorter than this. Same as
#: the slack the controller answers within (configs: control.answer_slack_s).
NOW_GRACE_S = 0.05
TIMED_OUT_STEP = "Timed out waiting for the next step boundary."
NUM_REMEMBERED_VERDICTS = 256


def _running_future() -> Future[FlushVerdict]:
    """A future nobody can cancel: a caller that hangs up does not end the flush."""
    future: Future[FlushVerdict] = Future()
    future.set_running_or_notify_cancel()
    return future


@dataclass(frozen=True, slots=True, eq=False)
class PendingFlush:
    """A flush this rank has taken in. Whoever wins `claim` ends it through `FlushGate.end`."""

    command: FlushCommand
    #: both in seconds of this process's monotonic clock; a hold ends with the deadline, whatever the controller does
    arrived_s: float
    deadline_s: float
    claim: Claim = field(default_factory=Claim)
    #: resolved exactly once, by the thread that ended it; `asyncio.wrap_future` makes it awaitable
    ended: Future[FlushVerdict] = field(default_factory=_running_future)

    @property
    def is_now_or_never(self) -> bool:
        """Wants an idle engine, and does not want to wait for one."""
        return self.command.timeout_s == 0 and self.command.mode not in STEP_MODES

    def verdict(
        self,
        status: Verdict,
        now_s: float,
        epoch: int,
        message: str = "",
        *,
        blockers: Blockers | None = None,
        freed_pages: int = 0,
        freed_bytes: int = 0,
        num_aborted: int = 0,
        num_retracted: int = 0,
    ) -> FlushVerdict:
        """The verdict about this flush at `now_s`. Changes nothing."""
        blockers = blockers or Blockers()
        return FlushVerdict(
            self.command.flush_id,
            status,
            message,
            epoch=epoch,
            waited_ms=max(0.0, (now_s - self.arrived_s) * 1000.0),
            freed_pages=freed_pages,
            freed_bytes=freed_bytes,
            copies_in_flight=blockers.copies_in_flight,
            blockers=blockers,
            num_aborted=num_aborted,
            num_retracted=num_retracted,
        )

    def timed_out(self, now_s: float, epoch: int, blockers: Blockers) -> FlushVerdict:
        """The deadline has passed without an instant to flush in."""
        message = TIMED_OUT_STEP if self.command.mode in STEP_MODES else TIMED_OUT_WAITING
        return self.verdict("timed_out", now_s, epoch, message, blockers=blockers)

    def refused_as_busy(self, now_s: float, epoch: int, blockers: Blockers) -> FlushVerdict:
        """`timeout_s=0` met a busy engine, or one that did not wake up in time."""
        named = describe(blockers)
        message = f"Not idle: {named}." if named else "The engine did not look at it in time."
        return self.verdict("refused", now_s, epoch, message, blockers=blockers)


def describe(blockers: Blockers) -> str:
    """What is in the way, in words: `2 running, 1 half-prefilled`; empty when nothing is."""
    parts = [
        (blockers.running, "running"),
        (blockers.half_prefilled, "half-prefilled"),
        (blockers.copies_in_flight, "copies in flight"),
    ]
    return ", ".join(f"{count} {what}" for count, what in parts if count)


class FlushTerms(Protocol):
    """What two flushes are compared by, as a rank or the controller knows them."""

    @property
    def mode(self) -> FlushMode: ...
    @property
    def tiers(self) -> tuple[str, ...]: ...
    @property
    def scope(self) -> FlushScope | None: ...
    @property
    def dry_run(self) -> bool: ...


def gives_way(pending: FlushTerms, newcomer: FlushTerms) -> bool:
    """Whether a pending `wait` yields to a newcomer that needs no idle instant and drops at least as much."""
    return (
        pending.mode == "wait"
        and newcomer.mode in STEP_MODES
        and not newcomer.dry_run
        and newcomer.scope in (None, pending.scope)
        and set(pending.tiers) <= set(newcomer.tiers)
    )


def _same_flush(one: FlushCommand, other: FlushCommand) -> bool:
    """A repeat: the budget shrinks from hop to hop and the term may have changed hands, the rest may not."""
    return all(getattr(one, name) == getattr(other, name) for name in ("mode", "tiers", "epoch", "scope", "dry_run"))


class FlushGate:
    """One optional slot, never a queue, and the last verdicts. Every method may be called by any thread."""

    def __init__(self, on_end: Callable[[PendingFlush, FlushVerdict], None] = lambda pending, verdict: None) -> None:
        """`on_end` is called once per flush taken in, by the thread that ended it, after `ended` was resolved."""
        self._on_end = on_end
        self._lock = Lock()
        #: the flush that waits for its instant; free as soon as its claim has left `pending`
        self._slot: PendingFlush | None = None
        #: taken in and without a verdict yet; more than one only while a predecessor's verdict is being written
        self._live: dict[FlushKey, PendingFlush] = {}
        #: oldest first, at most NUM_REMEMBERED_VERDICTS; no command: withdrawn before it came
        self._verdicts: OrderedDict[FlushKey, tuple[FlushCommand | None, FlushVerdict]] = OrderedDict()
        #: highest term seen; commands of lower ones come from a controller that was superseded
        self._term = 0
        self._closed_because: str | None = None

    @property
    def pending(self) -> PendingFlush | None:
        """The flush in the slot, if its end is still open."""
        slot = self._slot
        return slot if slot is not None and slot.claim.state == "pending" else None

    def verdict_of(self, key: FlushKey) -> FlushVerdict | None:
        """What was answered about a flush, if it is among the last ones."""
        with self._lock:
            known = self._verdicts.get(key)
        return known[1] if known else None

    def open_flush(self, key: FlushKey) -> PendingFlush | None:
        """A flush that was taken in and has no verdict yet: it waits, or its verdict is being written."""
        with self._lock:
            return self._live.get(key)

    def see_term(self, term: int) -> bool:
        """A controller of this term has spoken, in whatever matter. False: it was superseded by one known here."""
        with self._lock:
            self._term = max(self._term, term)
            return self._term == term

    def offer(
        self, command: FlushCommand, now_s: float, snapshot: EngineSnapshot, valid_until_s: float = math.inf
    ) -> PendingFlush | FlushVerdict:
        """Take a flush in, or say at once why not.

        A repeat of a flush that is still open joins it (the same `PendingFlush`); a repeat of an ended one gets its
        verdict again. A pending `wait` gives way to a newcomer that needs no idle instant. `now_s` and
        `valid_until_s` are of this process's clock; late commands are answered `expired_command`, never executed.
        """
        superseded: PendingFlush | None = None
        pending = self._arrival(command, now_s, valid_until_s, is_idle=snapshot.is_idle)
        with self._lock:
            known = self._known_answer(pending, now_s, snapshot.epoch)
            if known is not None:
                return known
            rival = self.pending
            if rival is not None:
                if not gives_way(rival.command, command):
                    return self._remember(pending, pending.verdict("busy", now_s, snapshot.epoch, ALREADY_IN_PROGRESS))
                superseded = rival if rival.claim.try_expire() else None
            self._slot = self._live[command.key] = pending
        if superseded is not None:
            reason = f"Gave way to {command.mode} flush {command.flush_id}."
            self.end(superseded, superseded.verdict("superseded", now_s, snapshot.epoch, reason))
        return pending

    def end(self, pending: PendingFlush, verdict: FlushVerdict) -> None:
        """Record the verdict and tell everyone who waits. Only the winner of the claim may call this, once."""
        with self._lock:
            self._live.pop(pending.command.key, None)
            if self._slot is pending:
                self._slot = None
            self._remember(pending, verdict)
        pending.ended.set_result(verdict)
        self._on_end(pending, verdict)

    def expire(self, pending: PendingFlush, now_s: float, snapshot: EngineSnapshot) -> FlushVerdict | None:
        """Its deadline has passed: end it as timed out. None if the engine was faster; then `pending.ended` tells."""
        if not pending.claim.try_expire():
            return None
        if pending.is_now_or_never:
            verdict = pending.refused_as_busy(now_s, snapshot.epoch, snapshot.blockers)
        else:
            verdict = pending.timed_out(now_s, snapshot.epoch, snapshot.blockers)
        self.end(pending, verdict)
        return verdict

    def withdraw(self, key: FlushKey, now_s: float, snapshot: EngineSnapshot) -> PendingFlush | FlushVerdict:
        """What became of a flush; if it has not begun, or not even come, it never will.

        A `PendingFlush`: the engine has begun it, `ended` will tell.
        """
        with self._lock:
            if key in self._verdicts:
                return self._verdicts[key][1]
            pending = self._live.get(key)
            if pending is None:
                verdict = FlushVerdict(key[0], "refused", "Withdrawn before it came.", epoch=snapshot.epoch)
                self._keep(key, None, verdict)
                return verdict
        if not pending.claim.try_expire():
            return pending
        verdict = pending.verdict("refused", now_s, snapshot.epoch, "Cancelled before it began.")
        self.end(pending, verdict)
        return verdict

    def end_unstarted(self, pending: PendingFlush, now_s: float) -> FlushVerdict | None:
        """An engine that has not served yet holds nothing, so what it took in is done. None if it has ended already."""
        if not pending.claim.try_claim():
            return None
        verdict = pending.verdict("flushed", now_s, pending.command.epoch, "Nothing was cached yet.")
        self.end(pending, verdict)
        return verdict

    def refuse_if_busy(self, pending: PendingFlush, now_s: float, snapshot: EngineSnapshot) -> FlushVerdict | None:
        """End a flush that does not want to wait, if the engine is busy; a step may be long. None: it stays.

        Called by the offering thread after its offer and by the engine thread after it published a busy snapshot and
        before it runs the step: whichever comes second sees what the other one wrote.
        """
        if not pending.is_now_or_never or snapshot.is_idle or not pending.claim.try_expire():
            return None
        verdict = pending.refused_as_busy(now_s, snapshot.epoch, snapshot.blockers)
        self.end(pending, verdict)
        return verdict

    def close(self, reason: str, now_s: float, snapshot: EngineSnapshot) -> None:
        """The engine is gone: end what is pending and refuse what comes."""
        self._closed_because = reason
        pending = self.pending
        if pending is not None and pending.claim.try_expire():
            self.end(pending, pending.verdict("refused", now_s, snapshot.epoch, reason))

    def _arrival(self, command: FlushCommand, now_s: float, valid_until_s: float, *, is_idle: bool) -> PendingFlush:
        pending = PendingFlush(command, now_s, now_s)
        is_short = command.timeout_s < NOW_GRACE_S and command.mode not in STEP_MODES
        has_grace = pending.is_now_or_never or (is_short and is_idle)
        budget_s = max(command.budget_s, NOW_GRACE_S) if has_grace else command.budget_s
        return PendingFlush(command, now_s, min(now_s + budget_s, valid_until_s))

    def _known_answer(self, pending: PendingFlush, now_s: float, epoch: int) -> PendingFlush | FlushVerdict | None:
        """The answer that needs no look at the slot: a wrong sender, a repeat, a late or impossible command."""
        command = pending.command
        is_over = command.term < self._term
        self._term = max(self._term, command.term)
        repeat = self._repeat(command)
        if repeat is not None:
            # Whoever asks: what is done is done, and what waits goes on waiting.
            told, answer = repeat
            reason = f"Flush id {command.flush_id} was used with other arguments."
            is_same = told is None or _same_flush(told, command)
            return answer if is_same else pending.verdict("refused", now_s, epoch, reason)
        if is_over:
            # Not remembered: the flush may still be finished by the controller that took over.
            reason = f"Term {command.term} is over; a controller of term {self._term} has taken over."
            return pending.verdict("refused", now_s, epoch, reason)
        if self._closed_because is not None:
            return pending.verdict("refused", now_s, epoch, self._closed_because)
        if not math.isfinite(command.budget_s) or command.budget_s < 0:
            reason = f"budget_s must be finite and not negative, not {command.budget_s}."
            return self._remember(pending, pending.verdict("refused", now_s, epoch, reason))
        if pending.deadline_s <= now_s:
            return self._remember(pending, pending.verdict("expired_command", now_s, epoch, "Came too late."))
        return None

    def _repeat(self, command: FlushCommand) -> tuple[FlushCommand | None, PendingFlush | FlushVerdict] | None:
        live = self._live.get(command.key)
        return (live.command, live) if live is not None else self._verdicts.get(command.key)

    def _remember(self, pending: PendingFlush, verdict: FlushVerdict) -> FlushVerdict:
        """The caller holds the lock."""
        self._keep(pending.command.key, pending.command, verdict)
        return verdict

    def _keep(self, key: FlushKey, command: FlushCommand | None, verdict: FlushVerdict) -> None:
        self._verdicts[key] = (command, verdict)
        while len(self._verdicts) > NUM_REMEMBERED_VERDICTS:
            self._verdicts.popitem(last=False)
