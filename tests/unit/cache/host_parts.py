"""A host tier in plain memory: the same bytes that a file would hold, with one writer and any number of readers."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from cache.arena import Arena, ArenaGeometry, PageView, control_words
from cache.control_page import ControlPage, ControlPageWriter, FileIdentity
from cache.host_eviction import EvictionOrder, LruOrder
from cache.host_reader import HostReader, Verification
from cache.host_tier import CommitOutcome, HostTier
from cache.host_writer import HostWriter
from cache.processes import ProcessId
from cache.shared_words import Store, fence_for, store_word
from cache.slot_table import Holder
from cache.types import Epoch
from tests.unit.cache.node_files import ToldProcesses

FENCE = fence_for("x86_64")
PAGE_BYTES = 96


def key_of(number: int) -> bytes:
    """A page key that looks like a digest."""
    return np.random.default_rng(number).bytes(16)


def content_of(key: bytes, page_bytes: int = PAGE_BYTES) -> PageView:
    """The one right content of a key's page."""
    return np.frombuffer(np.random.default_rng(list(key)).bytes(page_bytes), np.uint8)


@dataclass
class Rank:
    """One rank: its incarnation and its end of the tier."""

    holder: Holder
    writer: HostWriter


@dataclass
class HostNode:
    """The shared memory of a node, and the processes around it."""

    num_slots: int = 8
    page_bytes: int = PAGE_BYTES
    max_leased: int = 64
    store: Store = store_word
    processes: ToldProcesses = field(default_factory=ToldProcesses)

    def __post_init__(self) -> None:
        self.geometry = ArenaGeometry(self.num_slots, self.page_bytes)
        self.memory = bytearray(self.geometry.file_bytes)
        self.arena = Arena(self.memory, self.memory, self.geometry.data_offset, self.geometry)
        self.page = ControlPageWriter(control_words(self.memory), FENCE, self.store)
        self.page.initialise(FileIdentity("cafe", "layout", self.num_slots, self.page_bytes), nonce=1)
        self.tier = self.begin_tier()
        self.num_ranks = 0

    def begin_tier(self, order: EvictionOrder | None = None) -> HostTier:
        """A new writer on the same memory, as after a crash of the old one."""
        order = LruOrder() if order is None else order
        self.tier = HostTier(self.arena, self.page, order, self.processes, self.max_leased, self.store)
        return self.tier

    def new_rank(self) -> Rank:
        self.num_ranks += 1
        process = ProcessId(1000 + self.num_ranks, self.num_ranks)
        return Rank(Holder.of(f"incarnation-{self.num_ranks}", process), HostWriter(self.arena))

    def reader(self, verification: Verification = "full") -> HostReader:
        return HostReader(self.arena, ControlPage(control_words(self.memory), FENCE), verification)

    def put(
        self, rank: Rank, keys: list[bytes], epoch: int = 0, birth_ns: int = 0, content: PageView | None = None
    ) -> list[CommitOutcome]:
        """Lease, write and commit pages of these keys."""
        rank.writer.accept(self.tier.lease(rank.holder, len(keys)))
        for key in keys:
            page = content_of(key, self.page_bytes) if content is None else content
            rank.writer.write(key, Epoch(epoch), birth_ns, page)
        return self.commit(rank)

    def commit(self, rank: Rank) -> list[CommitOutcome]:
        entries = rank.writer.take_commits()
        outcomes = self.tier.commit(rank.holder, entries)
        rank.writer.settle(entries, outcomes)
        return outcomes

    def get(self, keys: list[bytes], epoch: int = 0, reader: HostReader | None = None) -> list[bytes]:
        """Bytes of the leading pages that the tier gives back, each checked against its key's content."""
        reader = self.reader() if reader is None else reader
        match = reader.look_up(b"".join(keys), Epoch(epoch))
        targets = [np.zeros(self.page_bytes, np.uint8) for _ in keys]
        num_loaded = reader.load_chain(match, targets)
        return [target.tobytes() for target in targets[:num_loaded]]


def write_one(node: HostNode, rank: Rank, epoch: int = 0, birth_ns: int = 0) -> bytes:
    """Lease a slot and write a page there, without committing it. The page's key."""
    key = key_of(0)
    rank.writer.accept(node.tier.lease(rank.holder, 1))
    assert rank.writer.write(key, Epoch(epoch), birth_ns, content_of(key, node.page_bytes))
    return key


def check(tier: HostTier) -> None:
    assert tier.sanity_check() == []
