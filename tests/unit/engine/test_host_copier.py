"""The copier thread on a real arena, with answers that get lost, tiers that are full, gone or wrong."""

from __future__ import annotations

import queue
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from cache.arena import PageView
from cache.host_reader import HostReader, Verification
from cache.types import Epoch
from engine import host_copier
from engine.copy_jobs import HostFound, LoadJob, WriteJob
from engine.events import CopyEnded, Event, PagesCommitted
from engine.host_calls import HostSettings
from engine.host_copier import SLOT_PATIENCE_S, HostCopier
from engine.kv_pool import KvPool
from engine.page_store import page_store
from tests.host_tier import HostNode, host_node

NUM_PAGES = 24
POOL = (NUM_PAGES, 4, 2, 2, 8)


def key_of(number: int) -> bytes:
    return np.random.default_rng(number).bytes(16)


def settings_of(page_bytes: int, lease_batch: int = 8, verification: Verification = "full") -> HostSettings:
    return HostSettings("layout", "weights", page_bytes, verification=verification, lease_batch=lease_batch)


@dataclass
class Copying:
    """A pool of random bytes, a copier, and the events it posts."""

    node: HostNode
    pool: KvPool
    settings: HostSettings
    copier: HostCopier = field(init=False)
    events: queue.SimpleQueue[Event] = field(default_factory=queue.SimpleQueue)
    outcomes: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        rng = np.random.default_rng(0)
        self.bytes = rng.integers(0, 256, (NUM_PAGES, self.pool.bytes_per_page), np.uint8)
        self.store = page_store(self.pool)
        for page in range(NUM_PAGES):
            self.view(page)[:] = self.bytes[page]
        self.copier = HostCopier(self.store, self.settings)
        self.copier.connect(self.events.put)
        self.copier.attach(1, self.node.place())
        self.reader = HostReader(self.node.arena, self.node.page)

    def view(self, page: int) -> PageView:
        return self.pool.page_bytes(page).numpy()

    def write(self, pages: Sequence[int], copy_id: int = 1, tier: int = 1, epoch: int = 0, drop: int = 0) -> None:
        keys = b"".join(map(key_of, pages))
        self.copier.start([WriteJob(copy_id, tier, keys, np.array(pages, np.int32), Epoch(epoch), 7, drop)])

    def load(self, keys_of: Sequence[int], targets: Sequence[int], copy_id: int = 2, tier: int = 1) -> None:
        match = self.reader.look_up(b"".join(map(key_of, keys_of)), Epoch(0))
        found = HostFound((match,), match.num_pages)
        self.copier.start([LoadJob(copy_id, tier, found, np.array(targets[: match.num_pages], np.int32))])

    def ended(self) -> CopyEnded:
        while not isinstance(event := self.events.get(timeout=10), CopyEnded):
            self._note(event)
        return event

    def wait_for_commits(self, num_pages: int) -> None:
        """Until the tier has answered for so many pages."""
        while sum(self.outcomes.values()) < num_pages:
            self._note(self.events.get(timeout=10))

    def _note(self, event: Event) -> None:
        assert isinstance(event, PagesCommitted)
        for outcome, number in event.outcomes.items():
            self.outcomes[outcome] = self.outcomes.get(outcome, 0) + number


@contextmanager
def copying(
    num_slots: int = 64, lease_batch: int = 8, verification: Verification = "full", max_leased: int = 64
) -> Iterator[Copying]:
    pool = KvPool(*POOL[:2], *POOL[2:], torch.float32, torch.device("cpu"))
    with host_node(num_slots, pool.bytes_per_page, max_leased) as node:
        parts = Copying(node, pool, settings_of(pool.bytes_per_page, lease_batch, verification))
        try:
            yield parts
        finally:
            parts.copier.stop()
            node.check()


def test_pages_go_out_and_come_back() -> None:
    with copying() as parts:
        parts.write(range(12))
        ended = parts.ended()
        assert (ended.copy_id, ended.num_pages, ended.reason) == (1, 12, "")
        parts.wait_for_commits(12)
        parts.load(range(12), range(12, 24))
        assert parts.ended().num_pages == 12
        for page in range(12):
            assert (parts.view(12 + page) == parts.bytes[page]).all()


def test_more_pages_than_slots_are_ready_wait_for_a_lease() -> None:
    with copying(lease_batch=2) as parts:
        parts.write(range(20))
        assert parts.ended().num_pages == 20
        parts.wait_for_commits(20)
        assert parts.outcomes == {"committed": 20}


def test_a_host_without_slots_costs_the_pages_at_once() -> None:
    with copying(max_leased=3, lease_batch=3) as parts:
        parts.node.loses = lambda name: name == "commit"
        parts.write(range(10))
        ended = parts.ended()
        assert (ended.num_pages, ended.reason) == (3, "no_slot")


def test_writes_wait_for_a_slot_together_and_not_one_after_the_other() -> None:
    with copying() as parts:
        now_s = 5.0
        copier = HostCopier(parts.store, parts.settings, lambda: now_s)
        copier.connect(parts.events.put)
        copier._attach(1, parts.node.place())
        jobs = [WriteJob(n, 1, key_of(n), np.array([n], np.int32), Epoch(0), 7) for n in range(3)]
        copier._take(jobs)
        copier._write_next(copier._writes[0])
        assert len(copier._writes) == 3
        now_s += SLOT_PATIENCE_S
        for _ in range(3):
            copier._write_next(copier._writes[0])
        assert [parts.ended().reason for _ in range(3)] == ["no_slot"] * 3
        assert not copier._writes


def test_jobs_of_another_tier_end_undone() -> None:
    with copying() as parts:
        parts.write([0, 1], copy_id=5, tier=2)
        assert (parts.ended().copy_id, parts.node.num_committed) == (5, 0)
        parts.copier.attach(2, None)
        parts.write([0, 1], copy_id=6, tier=1)
        ended = parts.ended()
        assert (ended.copy_id, ended.num_pages, ended.reason) == (6, 0, "tier_gone")


def test_a_copy_from_before_a_flush_is_refused_when_it_lands() -> None:
    with copying() as parts:
        parts.node.page.raise_floor(1, floor=3)
        parts.write([0, 1], epoch=2)
        assert parts.ended().num_pages == 2
        parts.wait_for_commits(2)
        assert parts.outcomes == {"below_floor": 2}


def test_a_flush_of_the_tier_ends_a_write_that_is_half_copied() -> None:
    """G3: the rest of it would get slots of the new drop number and be found."""
    with copying(max_leased=4, lease_batch=4) as parts:
        flushes = iter([parts.node.tier.drop_all])

        def flush_at_the_first_commit(name: str) -> bool:
            if name == "commit":
                next(flushes, lambda: 0)()
            return False

        parts.node.loses = flush_at_the_first_commit
        parts.write(range(12))
        ended = parts.ended()
        assert (ended.num_pages, ended.reason) == (4, "old_drop")
        parts.write(range(4), copy_id=2, drop=1)
        assert parts.ended().num_pages == 4
        parts.copier.stop()
        assert parts.node.num_committed == 4
        assert parts.outcomes["old_drop"] == 4


def test_slots_from_before_a_flush_of_the_tier_cost_nothing_behind_it() -> None:
    with copying() as parts:
        parts.write([0])
        assert parts.ended().num_pages == 1
        parts.wait_for_commits(1)
        with parts.node.lock:
            parts.node.tier.drop_all()
        parts.write(range(3), copy_id=2, drop=1)
        assert parts.ended().num_pages == 3
        parts.copier.stop()
        assert parts.node.num_committed == 3


@pytest.mark.parametrize("lost", ["lease", "lease_answer", "commit", "commit_answer", "reconcile"])
def test_a_lost_answer_costs_pages_and_no_slot(lost: str) -> None:
    with copying(num_slots=16, lease_batch=4) as parts:
        parts.write([0], copy_id=10)
        parts.ended()
        parts.wait_for_commits(1)
        losses = iter([True] * 2)
        parts.node.loses = lambda name: name == lost and next(losses, False)
        for number in range(1, 6):
            parts.write([number, number + 10], copy_id=10 + number)
            parts.ended()
        parts.write([20], copy_id=20)
        while parts.ended().num_pages == 0:
            parts.write([20], copy_id=20)
        parts.copier.stop()
        counts = parts.node.tier.counts()
        assert counts.leased == 0
        assert counts.free + counts.committed == 16
        assert parts.node.tier.sanity_check() == []


@pytest.mark.parametrize("place", [0, 1, 500])
def test_every_flipped_bit_is_found_with_full_verification(place: int) -> None:
    with copying() as parts:
        parts.write(range(12))
        parts.ended()
        parts.wait_for_commits(12)
        for bad in reversed(range(12)):
            match = parts.reader.look_up(b"".join(map(key_of, range(12))), Epoch(0))
            parts.node.arena.pages[match.slots[bad], place] ^= 1 << (bad % 8)
            parts.load(range(bad + 1), range(12, 24), copy_id=30 + bad)
            ended = parts.ended()
            assert (ended.num_pages, ended.reason) == (bad, "corrupt")
            for page in range(bad):
                assert (parts.view(12 + page) == parts.bytes[page]).all()


def test_a_corrupt_page_is_reported_and_its_slot_left_alone() -> None:
    with copying() as parts:
        parts.write(range(3))
        parts.ended()
        parts.wait_for_commits(3)
        match = parts.reader.look_up(b"".join(map(key_of, range(3))), Epoch(0))
        parts.node.arena.pages[match.slots[1], 5] ^= 4
        parts.load(range(3), range(12, 15))
        assert parts.ended().num_pages == 1
        parts.copier.stop()
        assert parts.node.tier.counts().quarantined == 1


def test_a_page_given_up_between_look_up_and_copy_is_a_miss() -> None:
    with copying() as parts:
        parts.write(range(3))
        parts.ended()
        parts.wait_for_commits(3)
        match = parts.reader.look_up(b"".join(map(key_of, range(3))), Epoch(0))
        with parts.node.lock:
            parts.node.tier._evict()
            parts.node.tier._evict()
        parts.copier.start([LoadJob(3, 1, HostFound((match,), 3), np.arange(12, 15, dtype=np.int32))])
        ended = parts.ended()
        assert (ended.num_pages, ended.reason) == (1, "reused")


def test_stopping_gives_every_slot_back_and_ends_what_is_open() -> None:
    with copying() as parts:
        parts.write([0])
        parts.ended()
        parts.copier.stop()
        counts = parts.node.tier.counts()
        assert (counts.leased, counts.committed) == (0, 1)
        parts.copier.stop()


def test_a_page_that_outlives_the_stop_is_said_to_be_copied_still(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_copier, "_JOIN_S", 0.01)
    is_inside, may_go_on = threading.Event(), threading.Event()
    with copying() as parts:
        fetch = parts.store.fetch

        def slow(pages: NDArray[np.int32]) -> Sequence[PageView]:
            is_inside.set()
            assert may_go_on.wait(10)
            return fetch(pages)

        monkeypatch.setattr(parts.store, "fetch", slow)
        parts.write([0])
        assert is_inside.wait(10)
        assert not parts.copier.stop()
        assert not parts.copier.stop()
        may_go_on.set()
        assert parts.ended().num_pages == 1
        thread = parts.copier._ending
        assert thread is not None
        thread.join(10)
        assert parts.copier.stop()


def test_calls_that_fail_cost_the_tier_and_no_job(caplog: pytest.LogCaptureFixture) -> None:
    """A broken promise of whoever carries them."""

    def broken(name: str) -> bool:
        raise RuntimeError(name)

    with copying() as parts:
        parts.write([0], copy_id=3)
        assert parts.ended().num_pages == 1
        parts.wait_for_commits(1)
        parts.node.loses = broken
        for copy_id in (4, 5):
            parts.write([1, 2], copy_id=copy_id)
        assert {parts.ended().copy_id, parts.ended().copy_id} == {4, 5}
        parts.write([3], copy_id=6)
        assert (parts.ended().reason, "not used any more" in caplog.text) == ("tier_gone", True)
        parts.node.loses = lambda name: False
        parts.copier.attach(2, parts.node.place())
        parts.write([3], copy_id=7, tier=2)
        assert parts.ended().num_pages == 1


def test_a_store_that_fails_ends_the_job_and_not_the_thread() -> None:
    with copying() as parts:
        parts.write([0, NUM_PAGES + 5], copy_id=4)
        ended = parts.ended()
        assert (ended.copy_id, ended.reason) == (4, "copy_failed")
        parts.write([1], copy_id=5)
        assert parts.ended().num_pages == 1
