"""A real host tier for tests: a real arena file in /dev/shm, the real writer, and calls that need no process."""

from __future__ import annotations

import os
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from actors.node_processes import NodeClock, NodeProcesses
from cache.arena import Arena
from cache.control_page import ControlPageWriter, FileIdentity
from cache.host_eviction import LruOrder
from cache.host_tier import HostTier
from cache.page_checksum import PageEntry
from cache.shared_file import FileMaker, FilePaths
from cache.shared_words import fence_for
from cache.slot_owners import SlotRef
from cache.slot_table import Holder
from engine.host_calls import SubEpochs, TierAnswers, TierPlace

LINEAGE = "lineage"
FENCE = fence_for("x86_64")


class DirectCalls:
    """A rank's calls, carried out on the caller's thread; the tier's lock stands for its one thread."""

    def __init__(self, node: HostNode, holder: Holder, answers: TierAnswers) -> None:
        self._node = node
        self._holder = holder
        self._answers = answers

    def lease(self, num_slots: int) -> None:
        if self._node.loses("lease"):
            self._answers.lease_failed()
            return
        with self._node.lock:
            lease = self._node.tier.lease(self._holder, num_slots)
        if self._node.loses("lease_answer"):
            self._answers.lease_failed()
        else:
            self._answers.leased(lease)

    def commit(self, entries: Sequence[PageEntry]) -> None:
        if self._node.loses("commit"):
            self._answers.commit_lost(entries)
            return
        with self._node.lock:
            outcomes = self._node.tier.commit(self._holder, entries)
        if self._node.loses("commit_answer"):
            self._answers.commit_lost(entries)
        else:
            self._answers.committed(entries, outcomes)

    def reconcile(self, held: Sequence[SlotRef]) -> None:
        if self._node.loses("reconcile"):
            self._answers.reconcile_failed()
            return
        with self._node.lock:
            not_ours = self._node.tier.reconcile(self._holder, held)
        self._answers.reconciled(not_ours)

    def release(self, slots: Sequence[SlotRef]) -> None:
        with self._node.lock:
            self._node.tier.release(self._holder, slots)

    def told(self, touched: Sequence[SlotRef], corrupt: Sequence[SlotRef]) -> None:
        with self._node.lock:
            self._node.tier.touch(touched)
            for ref in corrupt:
                self._node.tier.report_corrupt(ref)


@dataclass
class HostNode:
    """One node's file and its writer."""

    arena: Arena
    page: ControlPageWriter
    tier: HostTier
    lock: threading.Lock = field(default_factory=threading.Lock)
    #: which call is lost now; asked for each call
    loses: Callable[[str], bool] = lambda name: False
    _num_ranks: int = 0

    def place(self, sub_epochs: SubEpochs = ()) -> TierPlace:
        """For a rank of its own."""
        self._num_ranks += 1
        holder = Holder.of(f"rank-{self._num_ranks}", NodeProcesses().own_id())
        return TierPlace(self.arena, self.page, lambda answers: DirectCalls(self, holder, answers), LINEAGE, sub_epochs)

    @property
    def num_committed(self) -> int:
        with self.lock:
            return self.tier.counts().committed

    def check(self) -> None:
        with self.lock:
            assert self.tier.sanity_check() == []


@contextmanager
def host_node(num_slots: int, page_bytes: int, max_leased: int = 4096) -> Iterator[HostNode]:
    """A node with a lease that does not end; its file is gone afterwards."""
    identity = FileIdentity(LINEAGE, "layout", num_slots, page_bytes)
    paths = FilePaths(Path("/dev/shm"), f"test-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    owned = FileMaker(identity, NodeProcesses(), NodeClock(), FENCE, nonce=1).open(paths)
    try:
        arena = owned.arena()
        yield HostNode(arena, owned.page, HostTier(arena, owned.page, LruOrder(), NodeProcesses(), max_leased))
    finally:
        owned.retire()
