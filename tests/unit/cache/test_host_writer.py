"""A rank's end of the tier: slots in, pages out, nothing forgotten."""

from __future__ import annotations

import numpy as np

from cache.page_checksum import copy_page, page_checksum
from cache.types import Epoch
from tests.unit.cache.host_parts import HostNode, content_of, key_of

KEYS = [key_of(number) for number in range(8)]


def test_without_a_slot_a_page_is_dropped_and_counted():
    node = HostNode()
    writer = node.new_rank().writer
    assert not writer.write(KEYS[0], Epoch(0), 0, content_of(KEYS[0]))
    assert writer.dropped == {"no_slot": 1}
    assert writer.take_commits() == []


def test_refused_pages_are_counted_by_reason():
    node = HostNode()
    rank = node.new_rank()
    rank.writer.accept(node.tier.lease(rank.holder, 2))
    for key in KEYS[:2]:
        rank.writer.write(key, Epoch(0), 0, content_of(key))
    node.page.raise_floor(term=1, floor=1)
    node.commit(rank)
    assert rank.writer.dropped == {"below_floor": 2}
    assert (rank.writer.num_written, rank.writer.written_bytes) == (2, 2 * node.page_bytes)
    assert rank.writer.held() == []


def test_slots_are_used_in_the_order_they_were_leased():
    node = HostNode()
    rank = node.new_rank()
    first, second = node.tier.lease(rank.holder, 2), node.tier.lease(rank.holder, 2)
    rank.writer.accept(first)
    rank.writer.accept(second)
    assert rank.writer.num_ready == 4
    for key in KEYS[:4]:
        rank.writer.write(key, Epoch(0), 0, content_of(key))
    slots = [entry.slot for entry in rank.writer.take_commits()]
    assert slots == [ref.slot for ref in (*first.slots, *second.slots)]


def test_after_a_host_flush_unused_slots_go_back():
    node = HostNode()
    rank = node.new_rank()
    rank.writer.accept(node.tier.lease(rank.holder, 3))
    rank.writer.write(KEYS[0], Epoch(0), 0, content_of(KEYS[0]))
    node.tier.drop_all()
    assert node.commit(rank) == ["old_drop"]
    assert rank.writer.num_ready == 0
    returns = rank.writer.take_returns()
    assert node.tier.release(rank.holder, returns) == 2
    assert rank.writer.take_returns() == []
    assert node.tier.counts().free == 8


def test_a_newer_lease_sends_older_slots_back():
    node = HostNode()
    rank = node.new_rank()
    rank.writer.accept(node.tier.lease(rank.holder, 2))
    node.tier.drop_all()
    rank.writer.accept(node.tier.lease(rank.holder, 1))
    assert rank.writer.num_ready == 1
    assert len(rank.writer.take_returns()) == 2


def test_a_lease_from_before_a_host_flush_goes_back_whenever_it_comes():
    node = HostNode()
    rank = node.new_rank()
    late = node.tier.lease(rank.holder, 2)
    node.tier.drop_all()
    rank.writer.keep_up(node.page.read().drop)
    rank.writer.accept(late)
    assert rank.writer.num_ready == 0
    assert rank.writer.take_returns() == list(late.slots)


def test_what_is_held_is_what_may_still_be_written_or_committed():
    node = HostNode()
    rank = node.new_rank()
    lease = node.tier.lease(rank.holder, 3)
    rank.writer.accept(lease)
    rank.writer.write(KEYS[0], Epoch(0), 0, content_of(KEYS[0]))
    assert sorted(rank.writer.held()) == sorted(lease.slots)
    entries = rank.writer.take_commits()
    assert sorted(rank.writer.held()) == sorted(lease.slots)
    rank.writer.forget(entries)
    assert sorted(rank.writer.held()) == sorted(lease.slots[1:])
    assert rank.writer.dropped == {"no_answer": 1}
    rank.writer.lose(lease.slots)
    assert rank.writer.held() == []


def test_lost_slots_are_not_committed():
    node = HostNode()
    rank = node.new_rank()
    lease = node.tier.lease(rank.holder, 1)
    rank.writer.accept(lease)
    rank.writer.write(KEYS[0], Epoch(0), 0, content_of(KEYS[0]))
    rank.writer.lose(lease.slots)
    assert rank.writer.take_commits() == []


def test_the_checksum_is_of_the_source_not_of_what_lies_in_the_slot():
    """Hole H13: whoever else writes to the slot, the checksum stays that of the page that was owned."""
    source = np.random.default_rng(0).integers(0, 256, 700_000, np.uint8)
    target = np.zeros_like(source)
    checksum = copy_page(source, target, hashed=source, seed=5)
    assert checksum == page_checksum(source, 5)
    assert (target == source).all()
    stray = source.copy()
    stray[300_000:] = 0
    assert copy_page(source, stray[:], hashed=source, seed=5) == checksum
    assert page_checksum(source, 6) != checksum


def test_a_read_hashes_what_arrived():
    source = np.random.default_rng(0).integers(0, 256, 700_000, np.uint8)
    target = np.zeros_like(source)
    assert copy_page(source, target, hashed=target, seed=5) == page_checksum(source, 5)
    assert (target == source).all()
