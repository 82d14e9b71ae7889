"""From keys to slots, one store at a time."""

from __future__ import annotations

import numpy as np
import pytest

from cache.arena import ArenaGeometry
from cache.host_index import HostIndex
from cache.slot_table import key_words

NUM_SLOTS = 64


def new_index() -> HostIndex:
    return HostIndex(np.zeros(ArenaGeometry(NUM_SLOTS, 1).num_buckets * 8, np.uint64))


def put(index: HostIndex, key: bytes, slot: int) -> int:
    position = index.room(key)
    assert position is not None
    index.put(position, key, slot)
    return position


def find(index: HostIndex, *keys: bytes) -> list[int]:
    return index.find(np.array([key_words(key) for key in keys], np.uint64)).tolist()


def random_keys(count: int) -> list[bytes]:
    return [np.random.default_rng(7).bytes(16 * count)[16 * i : 16 * i + 16] for i in range(count)]


def test_every_key_is_found_until_it_is_cleared():
    index, keys = new_index(), random_keys(NUM_SLOTS)
    positions = [put(index, key, slot) for slot, key in enumerate(keys)]
    assert find(index, *keys) == list(range(NUM_SLOTS))
    for position in positions[::2]:
        index.clear(position)
    assert find(index, *keys) == [-1 if slot % 2 == 0 else slot for slot in range(NUM_SLOTS)]


def test_an_unknown_key_is_not_found():
    index = new_index()
    put(index, random_keys(1)[0], 5)
    assert find(index, bytes(16), b"\xff" * 16) == [-1, -1]


def test_room_is_the_emptier_bucket_until_both_are_full():
    index = new_index()
    low = (3 | 5 << 32).to_bytes(8, "little")
    keys = [low + (tag << 32).to_bytes(8, "little") for tag in range(1, 18)]
    positions = [put(index, key, slot) for slot, key in enumerate(keys[:16])]
    buckets = [position // 8 for position in positions]
    assert sorted(buckets) == [3] * 8 + [5] * 8
    assert buckets[:4] in ([3, 5, 3, 5], [5, 3, 5, 3])
    assert index.room(keys[16]) is None
    assert find(index, *keys) == [*range(16), -1]


def test_keys_that_share_a_tag_and_buckets_are_told_apart_by_the_writer():
    index = new_index()
    twins = [bytes(8) + (7 << 32 | number).to_bytes(8, "little") for number in range(2)]
    for slot, key in enumerate(twins):
        put(index, key, slot)
    assert sorted(slot for _, slot in index.candidates(twins[0])) == [0, 1]
    assert find(index, *twins)[0] in (0, 1)


def test_a_word_knows_the_buckets_it_belongs_to():
    index, keys = new_index(), random_keys(8)
    positions = np.array([put(index, key, slot) for slot, key in enumerate(keys)])
    words = np.array([key_words(key) for key in keys], np.uint64)
    assert index.is_place_of(positions, words).all()
    assert not index.is_place_of((positions + 8 * 5) % (16 * 8), words).all()


@pytest.mark.parametrize("num_slots", [1, 2, 3, 100, 4096, 5000])
def test_the_index_is_never_more_than_half_full(num_slots: int):
    geometry = ArenaGeometry(num_slots, 1)
    assert geometry.num_buckets * 8 >= 2 * num_slots
    assert geometry.num_buckets & (geometry.num_buckets - 1) == 0


def test_a_full_tier_fills_no_bucket():
    num_slots = 20_000
    index = HostIndex(np.zeros(ArenaGeometry(num_slots, 1).num_buckets * 8, np.uint64))
    keys = np.random.default_rng(1).bytes(16 * num_slots)
    for slot in range(num_slots):
        put(index, keys[16 * slot : 16 * slot + 16], slot)
    assert (index.find(np.frombuffer(keys, "<u8").reshape(-1, 2)) == np.arange(num_slots)).all()
