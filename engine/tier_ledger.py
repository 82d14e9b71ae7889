"""What a rank's copier has of its host tier: leased slots ahead of need, commits in batches, and answers that get lost.

Belongs to the copier's thread; no clock, nothing blocks. After a lost answer nobody knows what is whose: what was told
is forgotten, and the tier is told what the rank still holds (`reconcile`); until it has answered nothing is written.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from cache.host_reader import HostReader, Verification
from cache.host_tier import CommitOutcome
from cache.host_writer import HostWriter
from cache.page_checksum import PageEntry
from cache.slot_owners import SlotLease, SlotRef
from engine.host_calls import TierAnswers, TierPlace

#: entries that are committed although more are being written
_COMMIT_BATCH = 64
#: pages read that are told although more are being read
_TOLD_BATCH = 256


class TierLedger:
    """One attachment. `next_calls` is called after every piece of work and every answer."""

    def __init__(
        self,
        place: TierPlace,
        answers: TierAnswers,
        lease_batch: int,
        verification: Verification,
        on_commits: Callable[[Counter[str]], None],
    ) -> None:
        """on_commits: gets what the tier made of each batch, outcome -> pages."""
        self.reader = HostReader(place.arena, place.page, verification)
        self.writer = HostWriter(place.arena)
        self._calls = place.connect(answers)
        self._lease_batch = lease_batch
        self._on_commits = on_commits
        self._is_leasing = False
        self._num_commits_open = 0
        # a file may be attached again whose tier knows of slots that an earlier attachment has forgotten
        self._needs_reconcile = True
        self._is_reconciling = False
        #: the tier had no slot, or did not answer: asked again when there is something new to write
        self._is_refused = False
        self._is_closed = False

    @property
    def may_write(self) -> bool:
        """A slot is ready, and it is known to be ours."""
        return self.writer.num_ready > 0 and not self._needs_reconcile

    @property
    def is_refused(self) -> bool:
        """No slot will come without a new question."""
        return self._is_refused and not self._is_leasing

    def current_drop(self) -> int:
        """The tier's drop number now; from here on slots of an older one are not written."""
        drop = self.reader.drop
        self.writer.keep_up(drop)
        return drop

    def note_work(self) -> None:
        """There is something new to write: worth another question."""
        self._is_refused = False

    def next_calls(self, num_waiting: int, *, is_idle: bool) -> None:
        """Ask what there is to ask. num_waiting: pages that wait for a slot.  is_idle: nothing else is to be copied."""
        if self._needs_reconcile:
            self._reconcile()
            return
        if returns := self.writer.take_returns():
            self._calls.release(returns)
        self._commit(is_idle=is_idle)
        self._lease(num_waiting)
        self._tell(is_idle=is_idle)

    def leased(self, lease: SlotLease) -> None:
        self._is_leasing = False
        self._is_refused = not lease.slots
        if self._is_closed:
            self._calls.release(lease.slots)
        else:
            self.writer.accept(lease)

    def lease_failed(self) -> None:
        self._is_leasing = False
        self._is_refused = self._needs_reconcile = True

    def committed(self, entries: Sequence[PageEntry], outcomes: Sequence[CommitOutcome]) -> None:
        self._num_commits_open -= 1
        self.writer.settle(entries, outcomes)
        self._on_commits(Counter[str](outcomes))

    def commit_lost(self, entries: Sequence[PageEntry]) -> None:
        self._num_commits_open -= 1
        self._needs_reconcile = True
        self.writer.forget(entries)
        self._on_commits(Counter({"no_answer": len(entries)}))

    def reconciled(self, not_ours: Sequence[SlotRef]) -> None:
        self._is_reconciling = self._needs_reconcile = self._is_refused = False
        self.writer.lose(not_ours)

    def reconcile_failed(self) -> None:
        self._is_reconciling = False
        self._is_refused = True

    def close(self) -> None:
        """Commit what is written and give the rest back; no answer is waited for."""
        self._is_closed = True
        entries = self.writer.take_commits()
        if entries:
            self._calls.commit(entries)
        written = {SlotRef(entry.slot, entry.generation) for entry in entries}
        rest = [ref for ref in self.writer.held() if ref not in written]
        if rest:
            self._calls.release(rest)
        self.writer.lose(rest)

    def _reconcile(self) -> None:
        """Once every open call has its answer, or it would free what is on its way."""
        if self._is_reconciling or self._is_leasing or self._num_commits_open or self._is_refused:
            return
        self._is_reconciling = True
        self._calls.reconcile(self.writer.held())

    def _commit(self, *, is_idle: bool) -> None:
        if is_idle or self.writer.num_to_commit >= _COMMIT_BATCH:
            entries = self.writer.take_commits()
            if entries:
                self._num_commits_open += 1
                self._calls.commit(entries)

    def _lease(self, num_waiting: int) -> None:
        num_ready = self.writer.num_ready
        is_low = num_ready < max(1, self._lease_batch // 2) or num_ready < num_waiting
        if is_low and not (self._is_leasing or self._is_refused):
            self._is_leasing = True
            self._calls.lease(self._lease_batch + num_waiting - num_ready)

    def _tell(self, *, is_idle: bool) -> None:
        touched, corrupt = self.reader.touched, self.reader.corrupt
        if not (touched or corrupt) or not (is_idle or corrupt or len(touched) >= _TOLD_BATCH):
            return
        self._calls.told(list(touched), list(corrupt))
        touched.clear()
        corrupt.clear()
