"""Where what lies: no two areas share a byte, and nothing is outside the file."""

from __future__ import annotations

import numpy as np
import pytest

from cache.arena import SLOT_WORDS, Arena, ArenaGeometry
from configs.errors import ConfigError

GIB = 2**30


@pytest.mark.parametrize(("num_slots", "page_bytes"), [(1, 1), (7, 100), (1000, 4096), (100_000, 1_835_008)])
def test_areas_lie_one_after_the_other(num_slots: int, page_bytes: int):
    geometry = ArenaGeometry(num_slots, page_bytes)
    slots_end = 4096 + num_slots * SLOT_WORDS * 8
    index_end = geometry.index_offset + geometry.num_buckets * 64
    assert slots_end <= geometry.index_offset
    assert index_end <= geometry.data_offset
    assert geometry.data_offset % 4096 == 0
    assert geometry.page_stride >= page_bytes
    assert geometry.data_offset + num_slots * geometry.page_stride <= geometry.file_bytes


def test_a_large_arena_begins_its_data_at_a_huge_page():
    assert ArenaGeometry(2000, 1_835_008).data_offset % (2 * 1024 * 1024) == 0


@pytest.mark.parametrize("page_bytes", [1, 100, 4096, 1_835_008])
def test_the_largest_arena_that_fits_is_chosen(page_bytes: int):
    geometry = ArenaGeometry.fitting(3 * GIB // 100, page_bytes)
    assert geometry.file_bytes <= 3 * GIB // 100
    assert ArenaGeometry(geometry.num_slots + 1, page_bytes).file_bytes > 3 * GIB // 100


def test_a_size_that_holds_no_page_is_refused_with_the_way_out():
    with pytest.raises(ConfigError, match=r"no page of 1,048,576 bytes.*host_tier\.size_gb"):
        ArenaGeometry.fitting(1_000_000, 1_048_576)
    with pytest.raises(ConfigError, match="page of 0 bytes"):
        ArenaGeometry.fitting(GIB, 0)


def test_pages_do_not_overlap_and_prefault_changes_none():
    geometry = ArenaGeometry(5, 100)
    memory = bytearray(geometry.file_bytes)
    arena = Arena(memory, memory, geometry.data_offset, geometry)
    for slot in range(5):
        arena.pages[slot] = slot + 1
    before = bytes(memory)
    assert list(arena.prefault(slice_bytes=256)) == [256, 512, 640]
    assert bytes(memory) == before
    assert [set(page.tolist()) for page in arena.pages] == [{slot + 1} for slot in range(5)]
    assert not np.any(arena.slots)
    assert not np.any(arena.index)
