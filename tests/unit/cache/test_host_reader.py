"""Readers believe nothing they have not checked, and say why they missed."""

from __future__ import annotations

import numpy as np
import pytest

from cache.host_reader import SAMPLE_EVERY, HostReader, Verification
from cache.slot_table import CHECKSUM, STATE
from cache.types import Epoch
from tests.unit.cache.host_parts import PAGE_BYTES, HostNode, content_of, key_of

KEYS = [key_of(number) for number in range(6)]
CHAIN = b"".join(KEYS)


def filled(verification: Verification = "full", num_pages: int = 3) -> tuple[HostNode, HostReader]:
    node = HostNode()
    node.put(node.new_rank(), KEYS[:num_pages])
    return node, node.reader(verification)


def page() -> np.ndarray:
    return np.zeros(PAGE_BYTES, np.uint8)


def test_the_longest_leading_part_is_found():
    node, reader = filled()
    assert reader.look_up(CHAIN, Epoch(0)).num_pages == 3
    assert reader.misses == {"absent": 1}
    node.put(node.new_rank(), [KEYS[5]])
    assert reader.look_up(CHAIN, Epoch(0)).num_pages == 3
    assert reader.look_up(KEYS[3] + KEYS[0], Epoch(0)).num_pages == 0
    assert reader.look_up(b"", Epoch(0)).num_pages == 0


def test_what_is_loaded_is_counted_and_told():
    _, reader = filled()
    match = reader.look_up(CHAIN, Epoch(0))
    targets = [page() for _ in range(2)]
    assert reader.load_chain(match, targets) == 2
    assert [target.tobytes() for target in targets] == [content_of(key).tobytes() for key in KEYS[:2]]
    assert (reader.num_hits, reader.hit_bytes) == (2, 2 * PAGE_BYTES)
    assert list(reader.touched) == [match.ref(0), match.ref(1)]


def test_a_page_of_another_epoch_is_absent_even_under_its_key():
    _, reader = filled()
    assert reader.look_up(CHAIN, Epoch(1)).num_pages == 0
    assert reader.misses == {"absent": 1}


def test_below_the_floor_nothing_is_found():
    node, reader = filled()
    match = reader.look_up(CHAIN, Epoch(0))
    node.page.raise_floor(term=1, floor=1)
    assert reader.load(match, 0, page()) == "below_floor"
    assert reader.look_up(CHAIN, Epoch(0)).num_pages == 0
    assert reader.misses == {"absent": 1, "below_floor": 2}


def test_in_a_retired_file_nothing_is_found():
    node, reader = filled()
    match = reader.look_up(CHAIN, Epoch(0))
    node.page.retire()
    assert reader.load(match, 0, page()) == "below_floor"
    assert reader.look_up(CHAIN, Epoch(2**62)).num_pages == 0


def test_after_a_host_flush_nothing_is_found_or_loaded():
    node, reader = filled()
    match = reader.look_up(CHAIN, Epoch(0))
    node.tier.drop_all()
    assert reader.load(match, 0, page()) == "old_drop"
    assert reader.look_up(CHAIN, Epoch(0)).num_pages == 0
    assert reader.misses["old_drop"] == 2


def test_a_chain_that_was_begun_before_the_birth_floor_is_too_old():
    node = HostNode()
    node.put(node.new_rank(), KEYS[:1], birth_ns=5)
    reader = node.reader()
    match = reader.look_up(KEYS[0], Epoch(0))
    node.page.raise_birth_floor(6)
    assert reader.load(match, 0, page()) == "too_old"
    assert reader.look_up(KEYS[0], Epoch(0)).num_pages == 0
    assert reader.misses == {"too_old": 2}


@pytest.mark.parametrize("verification", ["full", "off"])
def test_a_slot_that_was_given_to_another_page_is_a_miss(verification: Verification):
    node, reader = filled(verification)
    match = reader.look_up(CHAIN, Epoch(0))
    for number in range(8):
        node.put(node.new_rank(), [key_of(50 + number)])
    assert reader.load(match, 0, page()) == "reused"


def test_invariant_17_a_page_that_is_not_what_was_committed_ends_the_chain():
    node, reader = filled()
    match = reader.look_up(CHAIN, Epoch(0))
    node.arena.pages[match.slots[1], 7] ^= 0x80
    assert reader.load_chain(match, [page() for _ in range(3)]) == 1
    assert reader.misses["corrupt"] == 1
    assert list(reader.corrupt) == [match.ref(1)]
    assert node.tier.report_corrupt(reader.corrupt[0])


def test_invariant_13_every_single_flipped_bit_is_a_miss():
    node, _ = filled(num_pages=1)
    slot = node.reader().look_up(KEYS[0], Epoch(0)).slots[0]
    position = int(np.flatnonzero(node.arena.index)[0])
    row = node.arena.slots[slot * 16 + STATE : slot * 16 + CHECKSUM + 1]
    for area in (row, node.arena.index[position : position + 1], node.arena.pages[slot]):
        flippable = area.view(np.uint8)
        for bit in range(8 * len(flippable)):
            flippable[bit // 8] ^= 1 << bit % 8
            assert node.get(KEYS[:1]) == [], f"bit {bit}"
            flippable[bit // 8] ^= 1 << bit % 8
    assert len(node.get(KEYS[:1])) == 1


def test_sampled_verification_checks_one_in_so_many():
    node, reader = filled("sampled", num_pages=1)
    match = reader.look_up(KEYS[0], Epoch(0))
    node.arena.pages[match.slots[0], 0] ^= 1
    reasons = [reader.load(match, 0, page()) for _ in range(2 * SAMPLE_EVERY)]
    assert reasons.count("corrupt") == 2


def test_without_verification_only_the_state_word_counts():
    node, reader = filled("off", num_pages=1)
    match = reader.look_up(KEYS[0], Epoch(0))
    node.arena.pages[match.slots[0], 0] ^= 1
    assert reader.load(match, 0, page()) is None
    assert reader.num_hits == 1


def test_a_reader_changes_no_byte():
    node, reader = filled()
    before = bytes(node.memory)
    reader.load_chain(reader.look_up(CHAIN, Epoch(0)), [page() for _ in range(6)])
    assert bytes(node.memory) == before
