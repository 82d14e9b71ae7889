"""After a crash, and after a fault: what the next writer finds, and what a writer does with what it cannot trust."""

from __future__ import annotations

import numpy as np
import pytest

from cache.host_eviction import LruOrder
from cache.host_tier import TierCounts
from cache.shared_words import Words, store_word
from cache.slot_owners import SlotRef
from cache.slot_table import CHECKSUM, DROP, EPOCH, STATE
from cache.types import Epoch
from tests.unit.cache.host_parts import HostNode, check, content_of, key_of, write_one

KEYS = [key_of(number) for number in range(20)]


def test_a_new_writer_keeps_pages_and_the_leases_of_the_living():
    node = HostNode()
    living, dead = node.new_rank(), node.new_rank()
    node.put(living, KEYS[:2])
    write_one(node, living)
    node.tier.lease(dead.holder, 3)
    node.processes.gone.add(dead.holder.process)
    tier = node.begin_tier()
    assert tier.counts() == TierCounts(5, 1, 2, 0)
    assert len(node.get(KEYS[:2])) == 2
    assert node.commit(living) == ["known"]
    check(tier)


def test_a_new_writer_keeps_quarantine_and_floor():
    node = HostNode()
    rank = node.new_rank()
    node.tier.lease(rank.holder, 2)
    node.tier.holder_left(rank.holder)
    node.page.raise_floor(term=3, floor=7)
    tier = node.begin_tier()
    assert tier.counts().quarantined == 2
    assert tier.page.read().floor == 7
    write_one(node, other := node.new_rank(), epoch=6)
    assert node.commit(other) == ["below_floor"]


class Crash(Exception):
    """The writer ends here."""


def test_invariant_14_a_writer_may_die_between_any_two_stores_of_a_commit():
    num_stores = count_stores_of_commit()
    assert num_stores > 14
    for last in range(num_stores):
        node = HostNode()
        budget = [10**6]

        def store(words: Words, index: int, value: int, budget: list[int] = budget) -> None:
            if budget[0] == 0:
                raise Crash
            budget[0] -= 1
            store_word(words, index, value)

        node.store = store
        node.begin_tier()
        rank = node.new_rank()
        rank.writer.accept(node.tier.lease(rank.holder, 2))
        for key in KEYS[:2]:
            rank.writer.write(key, Epoch(0), 0, content_of(key))
        budget[0] = last
        with pytest.raises(Crash):
            node.tier.commit(rank.holder, rank.writer.take_commits())
        budget[0] = 10**6
        tier = node.begin_tier()
        check(tier)
        assert sum(tier.counts()) == 8
        for key in KEYS[:2]:
            assert node.get([key]) in ([], [content_of(key).tobytes()])
        node.processes.gone.add(rank.holder.process)
        tier.check_holders()
        assert tier.counts().leased == 0


def count_stores_of_commit() -> int:
    count = [0]

    def store(words: Words, index: int, value: int) -> None:
        count[0] += 1
        store_word(words, index, value)

    node = HostNode(store=store)
    rank = node.new_rank()
    rank.writer.accept(node.tier.lease(rank.holder, 2))
    for key in KEYS[:2]:
        rank.writer.write(key, Epoch(0), 0, content_of(key))
    count[0] = 0
    node.tier.commit(rank.holder, rank.writer.take_commits())
    return count[0]


def test_a_page_that_lost_its_index_word_is_named_again():
    node = HostNode()
    node.put(node.new_rank(), KEYS[:2])
    node.arena.index[:] = 0
    assert node.get(KEYS[:1]) == []
    node.begin_tier()
    assert len(node.get(KEYS[:2])) == 2


def test_garbage_in_the_index_is_cleared_by_the_next_writer():
    node = HostNode()
    node.put(node.new_rank(), KEYS[:2])
    empty = np.flatnonzero(node.arena.index == 0)
    node.arena.index[empty] = np.random.default_rng(0).integers(1, 2**63, len(empty), np.uint64)
    assert node.begin_tier().sanity_check() == []
    assert len(node.get(KEYS[:2])) == 2


def test_a_corrupt_page_is_quarantined_for_good_if_the_writer_sees_it_too():
    node = HostNode()
    node.put(node.new_rank(), KEYS[:2])
    reader = node.reader()
    slot = reader.look_up(KEYS[0], Epoch(0)).slots[0]
    assert node.tier.report_corrupt(SlotRef(slot, 1)) is False
    assert node.tier.report_corrupt(SlotRef(slot, 2)) is False
    node.arena.pages[slot, 5] ^= 1
    assert node.tier.report_corrupt(SlotRef(slot, 1)) is True
    assert node.tier.counts() == TierCounts(6, 0, 1, 1)
    assert node.begin_tier().counts() == TierCounts(6, 0, 1, 1)
    assert node.tier.check_holders() == 0
    check(node.tier)


def fault_state(node: HostNode, slot: int) -> None:
    node.tier.table.rows[slot, STATE] = 1 << 8 | 77


def fault_free(node: HostNode, slot: int) -> None:
    node.tier.table.rows[slot, STATE] = 1 << 8


def fault_key(node: HostNode, slot: int) -> None:
    node.tier.table.rows[slot, 2] ^= np.uint64(1 << 40)


def fault_drop(node: HostNode, slot: int) -> None:
    node.tier.table.rows[slot, DROP] = 5


def fault_epoch(node: HostNode, slot: int) -> None:
    node.tier.table.rows[slot, EPOCH] = 5


def fault_twin(node: HostNode, slot: int) -> None:
    other = next(iter(set(node.tier.order) - {slot}))
    node.tier.table.rows[slot, 1:3] = node.tier.table.rows[other, 1:3]


def fault_memory(node: HostNode, slot: int) -> None:
    node.tier.owners.free.append(slot)


def fault_index(node: HostNode, slot: int) -> None:
    node.arena.index[np.flatnonzero(node.arena.index)[0]] ^= np.uint64(1)


@pytest.mark.parametrize(
    ("fault", "word"),
    [
        (fault_state, "unknown state 77"),
        (fault_free, "is free in the table, committed in memory"),
        (fault_key, "not in the index"),
        (fault_drop, "drop number that was never given"),
        (fault_epoch, "counted as"),
        (fault_twin, "a key that another slot holds"),
        (fault_memory, "2 states in memory"),
        (fault_index, "names no page"),
    ],
)
def test_each_violation_is_named_and_healed_without_an_exception(fault, word: str):
    node = HostNode()
    node.put(node.new_rank(), KEYS[:3])
    slot = node.reader().look_up(KEYS[0], Epoch(0)).slots[0]
    fault(node, slot)
    assert any(word in text for text in node.tier.sanity_check())
    node.tier.isolate(node.tier.violations())
    check(node.tier)
    assert node.tier.events["violations"] > 0
    for number in range(30):
        node.put(node.new_rank(), [key_of(100 + number)])
    check(node.tier)


@pytest.mark.parametrize("column", range(STATE, CHECKSUM + 1))
def test_a_row_with_any_bit_flipped_hides_no_page(column: int):
    for bit in range(64):
        node = HostNode()
        rank = node.new_rank()
        node.put(rank, KEYS[:1])
        slot = node.reader().look_up(KEYS[0], Epoch(0)).slots[0]
        node.tier.table.rows[slot, column] ^= np.uint64(1 << bit)
        reader = node.reader()
        assert node.get(KEYS[:1], reader=reader) == []
        for ref in reader.corrupt:
            assert node.tier.report_corrupt(ref)
        node.tier.isolate(node.tier.violations())
        check(node.tier)
        assert node.put(rank, KEYS[:1]) == ["committed"]
        assert len(node.get(KEYS[:1])) == 1
        check(node.tier)


def test_a_free_slot_that_was_scribbled_on_is_not_leased():
    node = HostNode(num_slots=2)
    fault_state(node, 0)
    lease = node.tier.lease(node.new_rank().holder, 2)
    assert [ref.slot for ref in lease.slots] == [1]
    assert node.tier.counts() == TierCounts(0, 1, 0, 1)
    check(node.tier)


def test_a_leased_slot_that_was_scribbled_on_is_not_committed():
    node = HostNode()
    rank = node.new_rank()
    write_one(node, rank)
    slot = rank.writer.held()[0].slot
    node.tier.table.rows[slot, STATE] ^= np.uint64(2)
    assert node.commit(rank) == ["no_lease"]


def test_an_adopted_tier_gives_up_the_oldest_chain_first():
    node = HostNode(num_slots=2)
    rank = node.new_rank()
    node.put(rank, [KEYS[0]], birth_ns=9)
    node.put(rank, [KEYS[1]], birth_ns=3)
    node.begin_tier(LruOrder())
    node.put(rank, [KEYS[2]], birth_ns=10)
    assert [len(node.get([key])) for key in KEYS[:3]] == [1, 0, 1]
