"""From a page's key to its slot: an open-addressing table of single words that many read while one writes.

A word is the high half of the key's second word (tag) and, in its low half, the slot's number plus one; 0 is empty.
A key may lie in either of two buckets of eight words (one cache line each), so a look-up reads at most two lines, and
adding or removing is one store with no tombstone and no moving. At half load 1,000,000 keys filled no bucket beyond 7.
What a reader finds is a hint: it then reads the slot's row, which has the whole key.
"""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from cache.arena import BUCKET_WORDS
from cache.page_checksum import key_words
from cache.shared_words import Store, Words, store_word

_HALF: Final = np.uint64(32)
_LOW_MASK: Final = 0xFFFF_FFFF

#: uint64 [n, 2]: keys as words, `np.frombuffer(page_keys, "<u8").reshape(-1, 2)`
KeyArray = NDArray[np.uint64]


class HostIndex:
    """Readers and the writer have the same view; only the writer calls `put` and `clear`.

    words: BUCKET_WORDS for each bucket, the number of buckets a power of two.
    """

    def __init__(self, words: Words, store: Store = store_word) -> None:
        self._words = words
        self._buckets = words.reshape(-1, BUCKET_WORDS)
        self._mask = len(self._buckets) - 1
        self._store = store

    def find(self, keys: KeyArray) -> NDArray[np.int64]:
        """For each key the slot that may hold it, or -1. About 40 us for 512 keys.

        Of two keys with one tag in one bucket a reader finds one; the tier lets no two such in.
        """
        num_keys = len(keys)
        words = self._buckets.take(self._both_buckets(keys), axis=0)
        tags = (keys[:, 1] >> _HALF).astype(np.uint32)
        # the high half of each little-endian word, without shifting them all
        matches = np.flatnonzero(words.view(np.uint32)[:, 1::2] == np.concatenate((tags, tags))[:, None])
        slots = np.full(num_keys, -1, np.int64)
        slots[matches // BUCKET_WORDS % num_keys] = _slots_of(words.ravel()[matches])
        return slots

    def candidates(self, key: bytes) -> list[tuple[int, int]]:
        """(position, slot) of every word that may stand for `key`, also of those of which `find` would see one."""
        tag = key_words(key)[1] >> 32
        return [
            (begin + offset, (word & _LOW_MASK) - 1)
            for begin, words in self._read_buckets(key)
            for offset, word in enumerate(words)
            if word and word >> 32 == tag
        ]

    def room(self, key: bytes) -> int | None:
        """Position of a free word for `key`, in the emptier of its buckets; None if both are full."""
        begin, words = max(self._read_buckets(key), key=lambda bucket: bucket[1].count(0))
        return begin + words.index(0) if 0 in words else None

    def put(self, position: int, key: bytes, slot: int) -> None:
        """One store: from now on readers find the slot. The slot's row is complete before."""
        self._store(self._words, position, (key_words(key)[1] >> 32) << 32 | slot + 1)

    def clear(self, position: int) -> None:
        """One store: readers find it no longer."""
        self._store(self._words, position, 0)

    def occupied(self) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.uint64]]:
        """Position, slot and tag of every word in use; copies."""
        positions = np.flatnonzero(self._words)
        words = self._words[positions]
        return positions, _slots_of(words), words >> _HALF

    def is_place_of(self, positions: NDArray[np.int64], keys: KeyArray) -> NDArray[np.bool_]:
        """For each key: does its position lie in one of its two buckets?"""
        buckets = self._both_buckets(keys).reshape(2, -1)
        return (positions // BUCKET_WORDS == buckets).any(axis=0)

    def _both_buckets(self, keys: KeyArray) -> NDArray[np.int64]:
        """[2n]: the first buckets of all keys, then the second ones."""
        mask = np.uint64(self._mask)
        low = keys[:, 0]
        return np.concatenate((low & mask, (low >> _HALF) & mask)).astype(np.int64)

    def _read_buckets(self, key: bytes) -> list[tuple[int, list[int]]]:
        """Position of the first word and the words of the key's buckets: two, or one if they are the same."""
        low = key_words(key)[0]
        begins = {low & self._mask: None, (low >> 32) & self._mask: None}
        return [(bucket * BUCKET_WORDS, self._buckets[bucket].tolist()) for bucket in begins]


def _slots_of(words: NDArray[np.uint64]) -> NDArray[np.int64]:
    return (words & np.uint64(_LOW_MASK)).astype(np.int64) - 1
