"""One row per slot of the arena: in which state it is, which page it holds, who has leased it.

State and generation share one word, so a slot has exactly one state at every instant and changes it by one store. The
other words of a row are written only while that word says that nobody reads them; what a crash leaves in them is never
used, because the state word was not reached.

    free --lease--> leased --commit--> committed --free--> free
                    leased, committed --quarantine--> quarantined --free--> free
"""

from __future__ import annotations

import hashlib
from typing import Final, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache.arena import SLOT_WORDS
from cache.page_checksum import PageEntry, key_of_words, key_words
from cache.processes import ProcessId
from cache.shared_words import Store, Words, store_word

FREE, LEASED, COMMITTED, QUARANTINED = range(4)
STATE_NAMES: Final = ("free", "leased", "committed", "quarantined")

# Columns of a row. The first eight are one cache line: all that readers need.
STATE, KEY_LOW, KEY_HIGH, EPOCH, DROP, BIRTH, CHECKSUM = range(7)
HOLDER, PID, START_TIME, LEASE_DROP = range(8, 12)

#: the low byte of the state word is the state, the rest the generation
GENERATION_SHIFT: Final = 8
STATE_MASK: Final = (1 << GENERATION_SHIFT) - 1


class Holder(NamedTuple):
    """One incarnation of a rank, as the table names it."""

    #: 64-bit digest of the incarnation's id
    incarnation: int
    process: ProcessId

    @classmethod
    def of(cls, incarnation: str, process: ProcessId) -> Holder:
        digest = hashlib.blake2b(incarnation.encode(), digest_size=8).digest()
        return cls(int.from_bytes(digest, "little"), process)


#: holder of slots that are quarantined for their bytes; never proven gone
NOBODY: Final = Holder(0, ProcessId(0, 0))


class SlotTable:
    """The writer's view. Every method that stores leaves a table that a reader or an adopter can use after each store.

    words: SLOT_WORDS for each slot.  store: one word at a time, in the order written here.
    """

    def __init__(self, words: Words, store: Store = store_word) -> None:
        self._words = words
        self._load = words.item
        self._store = store
        #: [num_slots, SLOT_WORDS] over the same memory
        self.rows: NDArray[np.uint64] = words.reshape(-1, SLOT_WORDS)

    def __len__(self) -> int:
        return len(self.rows)

    def state(self, slot: int) -> int:
        return self._load(slot * SLOT_WORDS + STATE) & STATE_MASK

    def generation(self, slot: int) -> int:
        return self._load(slot * SLOT_WORDS + STATE) >> GENERATION_SHIFT

    def lease(self, slot: int, holder: Holder, drop: int) -> int:
        """Record who may write the slot from now on, then make it leased. The slot's new generation."""
        base = slot * SLOT_WORDS
        self._store_holder(base, holder)
        self._store(self._words, base + LEASE_DROP, drop)
        generation = self.generation(slot) + 1
        self._store(self._words, base + STATE, generation << GENERATION_SHIFT | LEASED)
        return generation

    def commit(self, entry: PageEntry) -> None:
        """Write down which page the leased slot holds, then make it committed. The index does not know it yet."""
        base = entry.slot * SLOT_WORDS
        low, high = key_words(entry.key)
        for column, value in (
            (KEY_LOW, low),
            (KEY_HIGH, high),
            (EPOCH, entry.epoch),
            (DROP, entry.drop),
            (BIRTH, entry.birth_ns),
            (CHECKSUM, entry.checksum),
            (STATE, entry.generation << GENERATION_SHIFT | COMMITTED),
        ):
            self._store(self._words, base + column, value)

    def free(self, slot: int) -> None:
        """One store. The caller has made sure that nobody writes the slot any more."""
        self._set_state(slot, FREE)

    def quarantine(self, slot: int) -> None:
        """One store: the slot is out of use until its holder is gone, who is still written beside it."""
        self._set_state(slot, QUARANTINED)

    def quarantine_bytes(self, slot: int) -> None:
        """The slot is out of use for the life of the file: its memory, or who writes to it, cannot be trusted."""
        self._store_holder(slot * SLOT_WORDS, NOBODY)
        self._set_state(slot, QUARANTINED)

    def key(self, slot: int) -> bytes:
        base = slot * SLOT_WORDS
        return key_of_words(self._load(base + KEY_LOW), self._load(base + KEY_HIGH))

    def entry(self, slot: int) -> PageEntry:
        """The page of a committed slot."""
        row = self.rows[slot].tolist()
        key = key_of_words(row[KEY_LOW], row[KEY_HIGH])
        return PageEntry(slot, row[STATE] >> GENERATION_SHIFT, key, row[EPOCH], row[DROP], row[BIRTH], row[CHECKSUM])

    def holder(self, slot: int) -> Holder:
        base = slot * SLOT_WORDS
        return Holder(self._load(base + HOLDER), ProcessId(self._load(base + PID), self._load(base + START_TIME)))

    def lease_drop(self, slot: int) -> int:
        """Drop number under which the slot was leased."""
        return self._load(slot * SLOT_WORDS + LEASE_DROP)

    def states(self) -> NDArray[np.uint64]:
        """State of every slot, a copy."""
        return self.rows[:, STATE] & np.uint64(STATE_MASK)

    def _set_state(self, slot: int, state: int) -> None:
        self._store(self._words, slot * SLOT_WORDS + STATE, self.generation(slot) << GENERATION_SHIFT | state)

    def _store_holder(self, base: int, holder: Holder) -> None:
        self._store(self._words, base + HOLDER, holder.incarnation)
        self._store(self._words, base + PID, holder.process.pid)
        self._store(self._words, base + START_TIME, holder.process.start_time)
