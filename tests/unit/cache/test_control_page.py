"""The words a rank reads in each step: who may raise them, and in which order they are seen."""

from __future__ import annotations

import pytest

from cache.control_page import (
    CONTROL_PAGE_BYTES,
    RETIRED_FLOOR,
    ControlPage,
    ControlPageWriter,
    FileIdentity,
    NodeWords,
)
from cache.shared_words import Words, fence_for, store_word, words_at
from configs.errors import ConfigError, InvariantError

FENCE = fence_for("x86_64")
IDENTITY = FileIdentity("cafe", "layout", num_slots=8, page_bytes=64)


def make_page(store=store_word) -> tuple[Words, ControlPageWriter]:
    words = words_at(bytearray(CONTROL_PAGE_BYTES), 0, CONTROL_PAGE_BYTES // 8)
    page = ControlPageWriter(words, FENCE, store)
    page.initialise(IDENTITY, nonce=7)
    return words, page


def test_a_new_page_has_no_lease_and_says_whose_it_is():
    words, _ = make_page()
    page = ControlPage(words, FENCE)
    assert page.read() == NodeWords(0, 0, 0, 0, 0, 0)
    assert page.read().is_lease_over(now_ns=0)
    assert page.nonce == 7
    assert IDENTITY.difference(page) is None


@pytest.mark.parametrize(
    ("other", "word"),
    [
        (FileIdentity("beef", "layout", 8, 64), "lineage"),
        (FileIdentity("cafe", "other", 8, 64), "layout"),
        (FileIdentity("cafe", "layout", 9, 64), "8 slots of 64 bytes, not 9 of 64"),
        (FileIdentity("cafe", "layout", 8, 128), "not 8 of 128"),
    ],
)
def test_a_difference_is_named(other: FileIdentity, word: str):
    words, _ = make_page()
    assert word in str(other.difference(ControlPage(words, FENCE)))


def test_a_page_of_another_format_is_refused():
    words, page = make_page()
    words[1] = 99
    assert "format 99" in str(IDENTITY.difference(page))


def test_a_grant_only_raises():
    _, page = make_page()
    assert page.grant(term=3, floor=5, weights_floor=2, lease_end_ns=100)
    assert page.grant(term=3, floor=4, weights_floor=1, lease_end_ns=90)
    assert page.read() == NodeWords(100, 5, 2, 3, 0, 0)


def test_a_lower_term_changes_nothing():
    _, page = make_page()
    page.grant(term=3, floor=5, weights_floor=2, lease_end_ns=100)
    before = page.read()
    assert not page.grant(term=2, floor=9, weights_floor=9, lease_end_ns=900)
    assert not page.raise_floor(term=2, floor=9)
    assert page.read() == before


def test_the_floor_is_stored_before_the_lease_that_vouches_for_it():
    order: list[int] = []

    def remember(words: Words, index: int, value: int) -> None:
        order.append(value)
        store_word(words, index, value)

    _, page = make_page(remember)
    order.clear()
    page.grant(term=3, floor=5, weights_floor=2, lease_end_ns=100)
    assert order.index(5) < order.index(100)
    assert order.index(2) < order.index(100)
    order.clear()
    page.retire()
    assert order == [RETIRED_FLOOR, 0]


def test_retiring_ends_the_lease_for_everybody_and_the_page_for_its_writer():
    words, page = make_page()
    page.grant(term=3, floor=5, weights_floor=2, lease_end_ns=100)
    page.retire()
    reading = ControlPage(words, FENCE).read()
    assert reading.is_retired
    assert reading.is_lease_over(now_ns=0)
    with pytest.raises(InvariantError):
        page.grant(term=9, floor=9, weights_floor=9, lease_end_ns=900)


def test_the_lease_is_over_at_its_end():
    _, page = make_page()
    page.grant(term=1, floor=0, weights_floor=0, lease_end_ns=100)
    assert not page.read().is_lease_over(99)
    assert page.read().is_lease_over(100)


def test_drop_and_birth_floor_rise():
    _, page = make_page()
    page.raise_drop(2)
    page.raise_drop(1)
    page.raise_birth_floor(50)
    page.raise_birth_floor(40)
    assert page.read() == NodeWords(0, 0, 0, 0, 2, 50)


def test_a_reader_cannot_write():
    words = words_at(memoryview(bytes(CONTROL_PAGE_BYTES)), 0, CONTROL_PAGE_BYTES // 8)
    with pytest.raises(ValueError, match="read-only"):
        ControlPageWriter(words, FENCE).raise_drop(1)


def test_a_machine_with_loose_stores_needs_a_fence(monkeypatch: pytest.MonkeyPatch):
    fence_for("aarch64")()

    def no_library(name: str) -> None:
        raise OSError(f"{name}: not found")

    monkeypatch.setattr("ctypes.CDLL", no_library)
    with pytest.raises(ConfigError, match="aarch64"):
        fence_for("aarch64")
