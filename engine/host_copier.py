"""The thread that copies pages between the device and the node's host tier, beside the engine's.

Jobs in, `CopyEnded` out; each job ends exactly once, whatever fails. Loads go before writes, because a request waits
for them; writes go in small parts, with pauses where the model computes on the same cores. Bytes move in numpy copies
and xxh3 hashes that release the GIL. The engine thread never waits for this one, and this one never for the tier: a
page for which no slot comes in time is dropped.
"""

from __future__ import annotations

import logging
import math
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cache.arena import PageView
from cache.host_tier import CommitOutcome
from cache.keys import KEY_BYTES
from cache.page_checksum import PageEntry
from cache.slot_owners import SlotLease, SlotRef
from engine.copy_jobs import CopyJob, LoadJob, WriteJob
from engine.events import CopyEnded, Event, PagesCommitted
from engine.host_calls import HostSettings, TierPlace
from engine.page_store import PageStore
from engine.tier_ledger import TierLedger

logger = logging.getLogger(__name__)

#: how long a write may wait for a slot before its pages are given up; a tier answers in a few ms
SLOT_PATIENCE_S: Final = 0.25
#: for the page that is being copied when the engine stops
_JOIN_S: Final = 5.0

_Message: TypeAlias = Callable[[], None]


@dataclass(slots=True)
class _Write:
    """A write under way."""

    job: WriteJob
    num_done: int = 0
    took_s: float = 0.0


class _Answers:
    """Where the answers of one attachment go: into the copier's inbox, with the ledger that asked."""

    def __init__(self, inbox: SimpleQueue[_Message]) -> None:
        self._inbox = inbox
        self.ledger: TierLedger

    def leased(self, lease: SlotLease) -> None:
        self._inbox.put(lambda: self.ledger.leased(lease))

    def lease_failed(self) -> None:
        self._inbox.put(lambda: self.ledger.lease_failed())

    def committed(self, entries: Sequence[PageEntry], outcomes: Sequence[CommitOutcome]) -> None:
        self._inbox.put(lambda: self.ledger.committed(entries, outcomes))

    def commit_lost(self, entries: Sequence[PageEntry]) -> None:
        self._inbox.put(lambda: self.ledger.commit_lost(entries))

    def reconciled(self, not_ours: Sequence[SlotRef]) -> None:
        self._inbox.put(lambda: self.ledger.reconciled(not_ours))

    def reconcile_failed(self) -> None:
        self._inbox.put(lambda: self.ledger.reconcile_failed())


class HostCopier:
    """See the module. `connect`, `attach`, `start` and `stop` may be called by any thread; the rest is its own."""

    def __init__(self, store: PageStore, settings: HostSettings, clock: Callable[[], float] = time.monotonic) -> None:
        self._store = store
        self._settings = settings
        self._clock = clock
        self._post: Callable[[Event], None] = _nobody_listens
        self._inbox: SimpleQueue[_Message] = SimpleQueue()
        self._loads: deque[LoadJob] = deque()
        self._writes: deque[_Write] = deque()
        #: number of the attachment and what we have of it; None: no tier
        self._tier: tuple[int, TierLedger] | None = None
        #: while there is no slot, writes wait until then, all of them together; inf: there was one
        self._give_up_s = math.inf
        #: writes pause until then
        self._next_write_s = -math.inf
        self._is_stopping = False
        self._thread: Thread | None = None
        #: told to end
        self._ending: Thread | None = None

    # --------------------------------------------------------------------------------------------------- any thread
    def connect(self, post: Callable[[Event], None]) -> None:
        """Where events go. Once, before anything else."""
        self._post = post

    def attach(self, number: int, place: TierPlace | None) -> None:
        """Use this tier for jobs of this number; jobs of another one end undone. None: there is no tier any more."""
        if self._thread is None:
            self._thread = Thread(target=self._run, name="host-copier", daemon=True)
            self._thread.start()
        self._inbox.put(partial(self._attach, number, place))

    def start(self, jobs: Sequence[CopyJob]) -> None:
        """Begin these, in this order. The pages they name belong to them until their `CopyEnded`."""
        self._inbox.put(partial(self._take, jobs))

    def stop(self) -> bool:
        """Commit what is written, give slots back, end; twice is once. Returns when the thread has ended.

        False: the page under way took too long; the thread may still write to its slot.
        """
        thread, self._thread = self._thread, None
        if thread is not None:
            self._ending = thread
            self._inbox.put(self._begin_stop)
            thread.join(_JOIN_S)
        return self._ending is None or not self._ending.is_alive()

    # ------------------------------------------------------------------------------------------------ copier thread
    def _run(self) -> None:
        while not self._is_stopping:
            try:
                self._turn()
            except Exception:
                # of the calls or their answers; copies that fail end their own job. Without a tier all jobs end.
                logger.exception("the host tier is not used any more")
                self._tier = None
        self._drain(0.0)
        for job in [*self._loads, *(write.job for write in self._writes)]:
            self._post(CopyEnded(job.copy_id, 0, "stopped"))

    def _turn(self) -> None:
        """Take messages in, do one piece of work, ask what there is to ask."""
        self._drain(self._idle_s())
        if self._loads:
            self._load(self._loads.popleft())
        elif self._writes and self._clock() >= self._next_write_s:
            self._write_next(self._writes[0])
        if self._tier is not None:
            num_waiting = sum(len(write.job.pages) - write.num_done for write in self._writes)
            is_idle = not self._loads and not (self._writes and self._tier[1].may_write)
            self._tier[1].next_calls(num_waiting, is_idle=is_idle)

    def _drain(self, timeout_s: float) -> None:
        """Take in what has come; if that is nothing, wait so long for something."""
        try:
            message = self._inbox.get(timeout_s > 0, None if timeout_s == math.inf else timeout_s)
            while True:
                message()
                message = self._inbox.get_nowait()
        except Empty:
            pass

    def _idle_s(self) -> float:
        """How long nothing can be done unless a message comes; inf: for ever."""
        if self._loads:
            return 0.0
        if not self._writes:
            return math.inf
        starved = not (self._tier is None or self._tier[1].may_write or self._tier[1].is_refused)
        until_s = self._give_up_s if starved and self._give_up_s < math.inf else self._next_write_s
        return max(0.0, until_s - self._clock())

    def _attach(self, number: int, place: TierPlace | None) -> None:
        if self._tier is not None:
            self._tier[1].close()
        self._tier = None
        if place is None:
            return
        answers = _Answers(self._inbox)
        settings = self._settings
        ledger = TierLedger(place, answers, settings.lease_batch, settings.verification, self._told_commits)
        answers.ledger = ledger
        self._tier = number, ledger

    def _take(self, jobs: Sequence[CopyJob]) -> None:
        for job in jobs:
            if isinstance(job, LoadJob):
                self._loads.append(job)
                continue
            if not self._writes:
                self._give_up_s = math.inf
            self._writes.append(_Write(job))
            if self._tier is not None:
                self._tier[1].note_work()

    def _begin_stop(self) -> None:
        self._is_stopping = True
        if self._tier is not None:
            self._tier[1].close()

    def _told_commits(self, outcomes: Counter[str]) -> None:
        self._post(PagesCommitted(outcomes))

    def _ledger_of(self, job: CopyJob) -> TierLedger | None:
        return self._tier[1] if self._tier is not None and self._tier[0] == job.tier else None

    # ----------------------------------------------------------------------------------------------------------- load
    def _load(self, job: LoadJob) -> None:
        begin_s = self._clock()
        num_done, reason = 0, "tier_gone"
        ledger = self._ledger_of(job)
        if ledger is not None:
            try:
                num_done, reason = self._load_pages(ledger, job)
            except Exception:
                logger.exception("load %d failed", job.copy_id)
                num_done, reason = 0, "copy_failed"
        self._post(CopyEnded(job.copy_id, num_done, reason, self._clock() - begin_s))

    def _load_pages(self, ledger: TierLedger, job: LoadJob) -> tuple[int, str]:
        """Copy and verify; how many leading pages are on the device, and why no more."""
        sources = [(match, index) for match in job.found.matches for index in range(match.num_pages)]
        size = self._store.batch_pages
        num_done = 0
        for begin in range(0, len(sources), size):
            pages = job.pages[begin : begin + size]
            targets = self._store.targets(pages)
            for (match, index), target in zip(sources[begin : begin + size], targets, strict=True):
                reason = ledger.reader.load(match, index, target)
                if reason is not None:
                    self._store.land(pages[: num_done - begin])
                    return num_done, reason
                num_done += 1
            self._store.land(pages)
        return num_done, ""

    # ---------------------------------------------------------------------------------------------------------- write
    def _write_next(self, write: _Write) -> None:
        """Copy the next few pages of the first write, or end it."""
        ledger = self._ledger_of(write.job)
        reason = self._why_no_more(write, ledger)
        if ledger is not None and not reason and ledger.may_write:
            begin_s = self._clock()
            try:
                self._write_pages(ledger, write)
            except Exception:
                logger.exception("write %d failed", write.job.copy_id)
                reason = "copy_failed"
            end_s = self._clock()
            write.took_s += end_s - begin_s
            self._next_write_s = end_s + (end_s - begin_s) * (1 / self._store.write_share - 1)
        if reason or write.num_done == len(write.job.pages):
            self._writes.popleft()
            self._post(CopyEnded(write.job.copy_id, write.num_done, reason, write.took_s))

    def _why_no_more(self, write: _Write, ledger: TierLedger | None) -> str:
        if ledger is None:
            return "tier_gone"
        # Before each part: slots of this number cannot commit under a later one, and a job never gets slots of another.
        if ledger.current_drop() != write.job.drop:
            return "old_drop"
        if ledger.may_write:
            self._give_up_s = math.inf
            return ""
        self._give_up_s = min(self._give_up_s, self._clock() + SLOT_PATIENCE_S)
        return "no_slot" if ledger.is_refused or self._clock() >= self._give_up_s else ""

    def _write_pages(self, ledger: TierLedger, write: _Write) -> None:
        job, writer = write.job, ledger.writer
        num_pages = min(self._store.batch_pages, writer.num_ready, len(job.pages) - write.num_done)
        pages: NDArray[np.int32] = job.pages[write.num_done : write.num_done + num_pages]
        source: PageView
        for source in self._store.fetch(pages):
            key = job.keys[write.num_done * KEY_BYTES : (write.num_done + 1) * KEY_BYTES]
            writer.write(key, job.epoch, job.birth_ns, source)
            write.num_done += 1


def _nobody_listens(event: Event) -> None:
    """Before `connect`."""
