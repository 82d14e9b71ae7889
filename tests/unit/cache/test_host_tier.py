"""The index's writer: leases, commits, evictions, flushes, and what it finds after a crash."""

from __future__ import annotations

import numpy as np
import pytest

from cache.host_eviction import SlruOrder
from cache.host_tier import TierCounts
from cache.shared_words import Words, store_word
from cache.slot_owners import SlotRef
from cache.slot_table import STATE, Holder
from cache.types import Epoch
from tests.unit.cache.host_parts import HostNode, check, content_of, key_of, write_one

KEYS = [key_of(number) for number in range(20)]


def test_a_page_of_one_rank_is_read_by_every_other():
    node = HostNode()
    assert node.put(node.new_rank(), KEYS[:3]) == ["committed"] * 3
    assert node.get(KEYS[:4]) == [content_of(key).tobytes() for key in KEYS[:3]]
    assert node.tier.counts() == TierCounts(free=5, leased=0, committed=3, quarantined=0)
    check(node.tier)


def test_a_page_that_is_there_already_is_not_taken_twice():
    node = HostNode()
    node.put(node.new_rank(), KEYS[:2])
    assert node.put(node.new_rank(), KEYS[1:3]) == ["known", "committed"]
    assert node.tier.counts().committed == 3
    check(node.tier)


def test_a_holder_gets_its_share_and_no_more():
    node = HostNode(max_leased=3)
    rank = node.new_rank()
    assert len(node.tier.lease(rank.holder, 2).slots) == 2
    assert len(node.tier.lease(rank.holder, 5).slots) == 1
    assert node.tier.lease(rank.holder, 5).slots == ()
    assert len(node.tier.lease(node.new_rank().holder, 5).slots) == 3


def test_a_full_tier_gives_up_its_coldest_pages():
    node = HostNode(num_slots=4)
    rank = node.new_rank()
    node.put(rank, KEYS[:2])
    node.put(rank, KEYS[2:4])
    node.get(KEYS[:1], reader=(reader := node.reader()))
    node.tier.touch(list(reader.touched))
    node.put(rank, [KEYS[10]])
    # 1 was the coldest: 0 was read, and a parent is warmer than its child
    assert [len(node.get([key])) for key in KEYS[:4]] == [1, 0, 1, 1]
    assert node.tier.events["evicted"] == 1
    check(node.tier)


def test_parents_outlive_their_children():
    node = HostNode(num_slots=3)
    rank = node.new_rank()
    node.put(rank, KEYS[:3])
    node.put(rank, [KEYS[10]])
    assert len(node.get(KEYS[:3])) == 2


def test_a_tier_full_of_leases_gives_none_and_counts_it():
    node = HostNode(num_slots=2)
    node.tier.lease(node.new_rank().holder, 2)
    assert node.tier.lease(node.new_rank().holder, 1).slots == ()
    assert node.tier.events["lease_short"] == 1


@pytest.mark.parametrize("change", [{"slot": 7}, {"slot": 99}, {"generation": 9}])
def test_only_the_leased_slot_and_generation_can_be_committed(change: dict[str, int]):
    node = HostNode()
    rank = node.new_rank()
    rank.writer.accept(node.tier.lease(rank.holder, 1))
    rank.writer.write(KEYS[0], Epoch(0), 0, content_of(KEYS[0]))
    entry = rank.writer.take_commits()[0]
    assert node.tier.commit(rank.holder, [entry._replace(**change)]) == ["no_lease"]
    assert node.tier.commit(node.new_rank().holder, [entry]) == ["no_lease"]
    assert node.tier.commit(rank.holder, [entry]) == ["committed"]
    assert node.tier.commit(rank.holder, [entry]) == ["no_lease"]
    check(node.tier)


def test_invariant_3_a_copy_that_a_flush_overtook_is_refused():
    """Reserve, flush, finish: the race that lets old KV come back elsewhere."""
    node = HostNode()
    rank = node.new_rank()
    write_one(node, rank, epoch=4)
    node.page.raise_floor(term=1, floor=5)
    assert node.commit(rank) == ["below_floor"]
    assert node.get(KEYS[:1], epoch=4) == []
    assert node.tier.counts() == TierCounts(8, 0, 0, 0)
    check(node.tier)


def test_invariant_3_a_lease_of_before_a_host_flush_cannot_commit():
    node = HostNode()
    rank = node.new_rank()
    write_one(node, rank)
    node.tier.drop_all()
    assert node.commit(rank) == ["old_drop"]
    write_one(node, rank)
    assert node.commit(rank) == ["committed"]
    check(node.tier)


def test_a_chain_older_than_the_birth_floor_is_refused():
    node = HostNode()
    rank = node.new_rank()
    write_one(node, rank, birth_ns=10)
    node.page.raise_birth_floor(11)
    assert node.commit(rank) == ["too_old"]
    write_one(node, rank, birth_ns=11)
    assert node.commit(rank) == ["committed"]


def test_a_flush_makes_all_pages_unreachable_at_once_and_their_slots_free_later():
    node = HostNode()
    rank = node.new_rank()
    node.put(rank, KEYS[:3], epoch=1)
    node.put(rank, KEYS[3:5], epoch=2)
    assert node.tier.num_valid == 5
    node.page.raise_floor(term=1, floor=2)
    assert node.tier.num_valid == 2
    assert node.get(KEYS[:1], epoch=1) == []
    assert len(node.get(KEYS[3:5], epoch=2)) == 2
    while node.tier.reclaim(max_pages=1):
        check(node.tier)
    assert node.tier.counts() == TierCounts(6, 0, 2, 0)
    assert node.tier.reclaim(max_pages=1) is False


def test_a_host_flush_drops_pages_that_are_then_written_anew():
    node = HostNode()
    rank = node.new_rank()
    node.put(rank, KEYS[:3])
    assert node.tier.drop_all() == 3
    assert node.get(KEYS[:3]) == []
    assert node.put(rank, KEYS[:1]) == ["committed"]
    assert len(node.get(KEYS[:3])) == 1
    assert node.tier.counts().committed == 3
    check(node.tier)


@pytest.mark.parametrize("num_slots", [1_000, 20_000])
def test_a_flush_stores_three_words_whatever_is_cached(num_slots: int):
    stored: list[int] = []

    def store(words: Words, index: int, value: int) -> None:
        stored.append(index)
        store_word(words, index, value)

    node = HostNode(num_slots=num_slots, page_bytes=1, max_leased=num_slots, store=store)
    fill(node)
    stored.clear()
    node.page.raise_floor(term=1, floor=9)
    node.tier.drop_all()
    assert len(stored) == 3  # term, floor, drop number
    assert node.tier.num_valid == 0


def fill(node: HostNode) -> None:
    """Commit a page in every slot, written as the words that commits leave; then adopt them."""
    rows = node.tier.table.rows
    rows[:, STATE] = 1 << 8 | 2
    rows[:, 1:3] = np.random.default_rng(0).integers(0, 2**63, (len(rows), 2), np.uint64)
    node.begin_tier()
    assert node.tier.counts().committed >= 0.999 * len(rows)


def test_a_dead_holder_s_slots_come_back_when_the_kernel_says_so():
    node = HostNode()
    rank = node.new_rank()
    node.tier.lease(rank.holder, 3)
    node.processes.gone.add(rank.holder.process)
    assert node.tier.check_holders() == 3
    assert node.tier.counts() == TierCounts(8, 0, 0, 0)


def test_invariant_11_a_holder_that_is_only_said_to_be_dead_keeps_its_slots_from_others():
    node = HostNode(num_slots=3)
    rank, other = node.new_rank(), node.new_rank()
    lease = node.tier.lease(rank.holder, 3)
    node.tier.holder_left(rank.holder)
    assert node.tier.counts() == TierCounts(0, 0, 0, 3)
    assert node.tier.lease(other.holder, 1).slots == ()
    assert node.tier.check_holders() == 0
    # it was frozen, wakes, and answers
    assert node.tier.release(rank.holder, lease.slots[:1]) == 1
    assert len(node.tier.lease(other.holder, 3).slots) == 1
    node.processes.gone.add(rank.holder.process)
    assert node.tier.check_holders() == 2
    check(node.tier)


def test_a_quarantined_holder_may_not_commit_but_its_answer_frees_the_slot():
    node = HostNode()
    rank = node.new_rank()
    write_one(node, rank)
    node.tier.holder_left(rank.holder)
    assert node.commit(rank) == ["no_lease"]
    assert node.tier.counts() == TierCounts(8, 0, 0, 0)


def test_generations_rise_at_each_lease():
    node = HostNode(num_slots=1)
    rank = node.new_rank()
    for generation in range(1, 5):
        lease = node.tier.lease(rank.holder, 1)
        assert lease.slots == (SlotRef(0, generation),)
        node.tier.release(rank.holder, lease.slots)


def test_a_lost_answer_leaks_no_slot():
    node = HostNode()
    rank = node.new_rank()
    rank.writer.accept(node.tier.lease(rank.holder, 2))
    node.tier.lease(rank.holder, 3)
    assert node.tier.reconcile(rank.holder, rank.writer.held()) == []
    assert node.tier.counts() == TierCounts(6, 2, 0, 0)
    stranger = SlotRef(7, 1)
    assert node.tier.reconcile(rank.holder, [*rank.writer.held(), stranger]) == [stranger]


def test_two_incarnations_in_one_process_are_two_holders():
    rank = HostNode().new_rank()
    assert Holder.of("a", rank.holder.process) != Holder.of("b", rank.holder.process)


def test_a_full_pair_of_buckets_drops_the_page_and_frees_its_slot():
    node = HostNode(num_slots=64, max_leased=64)
    # one pair of buckets for all: the bits that choose them are zero
    keys = [(tag << 8).to_bytes(8, "little") + (tag << 32).to_bytes(8, "little") for tag in range(1, 10)]
    assert node.put(node.new_rank(), keys) == ["committed"] * 8 + ["index_full"]
    assert node.tier.counts() == TierCounts(56, 0, 8, 0)
    check(node.tier)


def test_a_second_policy_does_the_same_work():
    node = HostNode(num_slots=4)
    node.begin_tier(SlruOrder())
    rank = node.new_rank()
    node.put(rank, KEYS[:4])
    node.get(KEYS[:2], reader=(reader := node.reader()))
    node.tier.touch(list(reader.touched))
    for key in KEYS[5:12]:
        node.put(rank, [key])
    assert len(node.get(KEYS[:2])) == 2
    check(node.tier)


def test_of_two_keys_that_look_alike_in_the_index_the_newer_stays():
    node = HostNode()
    twins = [bytes(8) + (7 << 32 | number).to_bytes(8, "little") for number in range(2)]
    rank = node.new_rank()
    assert node.put(rank, twins) == ["committed"] * 2
    assert [len(node.get([key])) for key in twins] == [0, 1]
    assert node.tier.counts().committed == 1
    check(node.tier)
