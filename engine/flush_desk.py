"""The scheduler's side of a flush: one slot, looked at in every turn, ended by whoever wins the claim."""

from __future__ import annotations

import math

from cache.device_cache import DeviceCache
from cache.types import Epoch
from engine.commands import FlushEnded
from engine.flush import ALREADY_IN_PROGRESS, Blockers, FlushCommand, FlushVerdict
from engine.flush_gate import PendingFlush
from engine.flush_policy import Choice, choose, copies_until_s, impossible, is_idle, is_in_scope
from engine.host_desk import HostDesk
from engine.invalidation import count_invalidated, invalidate
from engine.roster import Roster
from engine.sequence import Sequence
from engine.story import Story


class FlushDesk:
    """Part of the scheduler, changed by it alone. Nothing in here fails: what cannot be done is a verdict."""

    def __init__(
        self, cache: DeviceCache, roster: Roster, story: Story, bytes_per_page: int, host: HostDesk | None = None
    ) -> None:
        self._cache = cache
        self._host = host
        self._roster = roster
        self._story = story
        self._bytes_per_page = bytes_per_page
        #: the flush that waits for its instant; the gate may have ended it meanwhile
        self.pending: PendingFlush | None = None
        #: epoch and freed pages of the last swap a floor forced; the flush behind it comes later and counts them
        self._floor_swap: tuple[int, int] = (-1, 0)

    @property
    def holds_admission(self) -> bool:
        """A drain is pending: whoever is queued stays so, nobody is refused."""
        return self.pending is not None and self.pending.command.mode == "drain"

    @property
    def waits_until_s(self) -> float:
        """When to look at the pending flush at the latest, if nothing happens before; inf: then it need not be."""
        pending = self.pending
        if pending is None or pending.claim.state != "pending" or not is_idle(self._roster.blockers()):
            return math.inf
        return copies_until_s(pending)

    def take(self, newcomer: PendingFlush, now_s: float) -> FlushEnded | None:
        """Keep it for the next look. The gate lets one through at a time; what goes round the gate is told `busy`."""
        current = self.pending
        if current is newcomer or newcomer.claim.state != "pending":
            return None
        if current is None or current.claim.state != "pending":
            self.pending = newcomer
            return None
        if not newcomer.claim.try_claim():
            return None
        verdict = newcomer.verdict("busy", now_s, self._cache.epoch, ALREADY_IN_PROGRESS)
        return self._answer(newcomer, verdict, now_s)

    def swap_to_floor(self, epoch: int, now_s: float) -> None:
        """The control words ask for a higher epoch: nothing older may be matched from this turn on."""
        swapped = self._cache.swap(Epoch(epoch))
        self._floor_swap = (epoch, swapped.freed_pages)
        if self._host is not None:
            self._host.swapped(self._cache.epoch)
        self._story.tell(now_s, "", f"swapped to epoch {epoch}, which the control words ask for")

    def look(self, now_s: float) -> FlushEnded | None:
        """At a step boundary, after the words were read and before anything is matched."""
        pending = self.pending
        if pending is None:
            return None
        blockers = self._roster.blockers()
        choice = choose(pending, blockers, now_s)
        if choice == "wait":
            return None
        self.pending = None
        if choice == "over" or not pending.claim.try_claim():
            return None
        if choice == "execute":
            verdict = self._execute(pending, now_s)
        else:
            verdict = self._declined(pending, choice, blockers, now_s)
        return self._answer(pending, verdict, now_s)

    def _declined(self, pending: PendingFlush, choice: Choice, blockers: Blockers, now_s: float) -> FlushVerdict:
        epoch = self._cache.epoch
        if choice == "time_out":
            return pending.timed_out(now_s, epoch, blockers)
        if choice == "refuse":
            return pending.refused_as_busy(now_s, epoch, blockers)
        return pending.verdict("refused", now_s, epoch, impossible(pending.command) or "")

    def _execute(self, pending: PendingFlush, now_s: float) -> FlushVerdict:
        """The claim is ours: end or retract whom the mode names, drop, and say so."""
        command, cache = pending.command, self._cache
        if command.dry_run:
            freed_pages = count_invalidated(cache, command, now_s).freed_pages
            return self._flushed(pending, now_s, "Dry run: nothing was dropped.", freed_pages, 0)
        num_copies = self._roster.blockers().copies_in_flight
        num_free = cache.counts().free
        victims = self._victims(command)
        for sequence in victims:
            self._remove(sequence, command, now_s)
        invalidate(cache, command, now_s)
        if self._host is not None:
            self._host.flushed(command, now_s)
        freed_pages = cache.counts().free - num_free
        if self._floor_swap[0] == command.epoch:
            freed_pages += self._floor_swap[1]
            self._floor_swap = (-1, 0)
        return self._flushed(pending, now_s, "", freed_pages, len(victims), num_copies)

    def _victims(self, command: FlushCommand) -> list[Sequence]:
        """Running requests that the mode ends or retracts, youngest first."""
        if command.mode not in ("abort", "retract"):
            return []
        size = self._cache.page_size
        return [sequence for sequence in reversed(self._roster.running) if is_in_scope(sequence, command.scope, size)]

    def _remove(self, sequence: Sequence, command: FlushCommand, now_s: float) -> None:
        if command.mode == "retract":
            self._roster.retract(sequence, now_s, may_publish=False)
            return
        self._roster.leave(sequence, now_s, may_publish=False)
        self._roster.finish(sequence, "abort", f"flush {command.flush_id} ends running requests", now_s)

    def _flushed(
        self,
        pending: PendingFlush,
        now_s: float,
        message: str,
        freed_pages: int,
        num_victims: int,
        num_copies: int = 0,
    ) -> FlushVerdict:
        mode = pending.command.mode
        return pending.verdict(
            "flushed",
            now_s,
            self._cache.epoch,
            message,
            # went past: they carry their epoch and can bring nothing back
            blockers=Blockers(copies_in_flight=num_copies),
            freed_pages=freed_pages,
            freed_bytes=freed_pages * self._bytes_per_page,
            num_aborted=num_victims if mode == "abort" else 0,
            num_retracted=num_victims if mode == "retract" else 0,
        )

    def _answer(self, pending: PendingFlush, verdict: FlushVerdict, now_s: float) -> FlushEnded:
        self._story.tell(now_s, "", f"flush {verdict.flush_id}: {verdict.status} {verdict.message}")
        return FlushEnded(pending, verdict)
