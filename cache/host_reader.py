"""How a rank reads the host tier: without asking anybody, and believing nothing it has not checked.

Look up the chain's slots in the mapped index, copy a page, check its checksum, load the slot's state word last. Any
store of the index's writer in between, a crash of any process, a stray write or a flipped bit ends in a miss
(protocol.md section 5, invariants 12 and 13). No word is written, so a killed reader blocks nobody.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from cache.arena import SLOT_WORDS, Arena, PageView
from cache.control_page import ControlPage, NodeWords
from cache.host_index import HostIndex, KeyArray
from cache.keys import PageKeys
from cache.page_checksum import copy_page, entry_seed
from cache.shared_words import Words
from cache.slot_owners import SlotRef
from cache.slot_table import (
    BIRTH,
    CHECKSUM,
    COMMITTED,
    DROP,
    EPOCH,
    GENERATION_SHIFT,
    KEY_HIGH,
    KEY_LOW,
    STATE,
    STATE_MASK,
)
from cache.types import Epoch

#: full: every page is hashed.  sampled: one in SAMPLE_EVERY.  off: the state word alone decides, which x86-64's order
#: of stores makes safe against reuse and crashes, but not against flipped bits and stray writes
Verification = Literal["full", "sampled", "off"]
SAMPLE_EVERY = 16

#: why a page was not read
MissReason = Literal[
    "absent",  # no slot holds the key
    "below_floor",  # a flush of all tiers has made its epoch void
    "old_drop",  # a flush of the host tier has made the page void
    "too_old",  # its chain was begun before the birth floor
    "reused",  # its slot was given up between look-up and copy
    "corrupt",  # other bytes than were committed; to be reported
]

#: hits and corrupt pages remembered until the writer is told; older ones are forgotten
_MAX_TOLD = 65_536
#: words of a row's first cache line
_LINE_WORDS = 8


@dataclass(frozen=True, slots=True)
class HostMatch:
    """The longest leading part of a chain that the tier held at the look-up. Valid until loaded, not a promise."""

    #: generation and state of each slot, loaded before the rest of its row
    state_words: list[int]
    slots: list[int]
    #: uint64 [num_pages, 8], a copy
    rows: NDArray[np.uint64]
    #: why the page behind them cannot be loaded; None: none was asked for
    cut: MissReason | None = None

    @property
    def birth_ns(self) -> int:
        """CLOCK_BOOTTIME of the oldest KV in it; only where there is a page."""
        return int(self.rows[:, BIRTH].min())

    @property
    def num_pages(self) -> int:
        return len(self.slots)

    def ref(self, index: int) -> SlotRef:
        return SlotRef(self.slots[index], self.state_words[index] >> GENERATION_SHIFT)


class HostReader:
    """One rank's view, used by one thread. Changes only its own counters."""

    def __init__(self, arena: Arena, page: ControlPage, verification: Verification = "full") -> None:
        self._page = page
        self._index = HostIndex(arena.index)
        self._states = arena.slots
        self._lines = arena.slots.reshape(-1, _LINE_WORDS)
        self._pages = arena.pages
        self._every = {"full": 1, "sampled": SAMPLE_EVERY, "off": 0}[verification]
        self._num_loads = 0
        #: pages copied and accepted; bytes of them
        self.num_hits = 0
        self.hit_bytes = 0
        #: one for each chain that was cut, by the reason of the page at the cut
        self.misses: Counter[MissReason] = Counter()
        #: pages read since the writer was last told, parents first
        self.touched: deque[SlotRef] = deque(maxlen=_MAX_TOLD)
        #: pages to report to the writer
        self.corrupt: deque[SlotRef] = deque(maxlen=_MAX_TOLD)

    @property
    def drop(self) -> int:
        """The tier's drop number now."""
        return self._page.read().drop

    def look_up(self, keys: PageKeys, epoch: Epoch, birth_floor_ns: int = 0) -> HostMatch:
        """The longest leading part of `keys` that can be loaded now. 512 keys take less than 100 us; copies no page.

        epoch: of the asking request's admission, the one its keys were made with.  birth_floor_ns: of the asking rank,
        which may know of a flush by age before the control page says so.
        """
        words = self._words(birth_floor_ns)
        asked: KeyArray = np.frombuffer(keys, "<u8").reshape(-1, 2)
        if words.is_retired or epoch < words.floor:
            return self._cut("below_floor")
        slots = self._index.find(asked)
        # as unsigned, none (-1) is out of range too, and so is what a flipped bit makes of an index word
        num_found = _num_leading(slots.view(np.uint64) < len(self._pages))
        match, reason = self._read_rows(asked[:num_found], slots[:num_found], epoch, words)
        if reason is None and num_found == len(asked):
            return match
        return replace(match, cut=self._miss(reason or "absent"))

    def known(self, keys: PageKeys, epoch: Epoch) -> NDArray[np.bool_]:
        """For each key by itself: could its page be loaded now? About as fast as `look_up`; counts nothing."""
        words = self._page.read()
        asked: KeyArray = np.frombuffer(keys, "<u8").reshape(-1, 2)
        if words.is_retired or epoch < words.floor:
            return np.zeros(len(asked), np.bool_)
        slots = self._index.find(asked)
        is_known = slots.view(np.uint64) < len(self._pages)
        slots = np.where(is_known, slots, 0)
        state_words = self._states.take(slots * SLOT_WORDS + STATE)
        rows = self._lines.take(slots * (SLOT_WORDS // _LINE_WORDS), axis=0)
        for _, is_good in _row_checks(asked, state_words, rows, epoch, words):
            is_known &= is_good
        return is_known

    def load(self, match: HostMatch, index: int, target: PageView) -> MissReason | None:
        """Copy page `index` of `match` into `target`. None: it is what was committed, and may be computed on.

        Otherwise `target` holds bytes of no meaning and the chain ends before this page. About 1.3 times a memcpy
        with full verification.
        """
        row: list[int] = match.rows[index].tolist()
        slot, generation = ref = match.ref(index)
        source = self._pages[slot]
        self._num_loads += 1
        if self._every and self._num_loads % self._every == 0:
            seed = entry_seed(row[KEY_LOW], row[KEY_HIGH], slot, generation, row[EPOCH], row[DROP], row[BIRTH])
            is_intact = copy_page(source, target, hashed=target, seed=seed) == row[CHECKSUM]
        else:
            target[:] = source
            is_intact = True
        # last of all: a slot that was given up while we copied has another state word by now
        if self._states.item(slot * SLOT_WORDS + STATE) != match.state_words[index]:
            return self._miss("reused")
        reason = _void_reason(row, self._page.read())
        if reason is not None:
            return self._miss(reason)
        if not is_intact:
            self.corrupt.append(ref)
            return self._miss("corrupt")
        self.num_hits += 1
        self.hit_bytes += len(target)
        self.touched.append(ref)
        return None

    def load_chain(self, match: HostMatch, targets: Sequence[PageView]) -> int:
        """Load the pages of `match` into `targets` in order, up to the first miss. How many were loaded."""
        for index, target in enumerate(targets[: match.num_pages]):
            if self.load(match, index, target) is not None:
                return index
        return min(len(targets), match.num_pages)

    def _read_rows(
        self, asked: KeyArray, slots: NDArray[np.int64], epoch: Epoch, words: NodeWords
    ) -> tuple[HostMatch, MissReason | None]:
        """Keep the leading slots whose rows say what was asked for; the reason why the next one does not."""
        # state words first: a row that changes while it is read no longer fits them when the page was copied
        state_words = self._states.take(slots * SLOT_WORDS + STATE)
        rows = self._lines.take(slots * (SLOT_WORDS // _LINE_WORDS), axis=0)
        num_pages, reason = len(slots), None
        for failure, is_good in _row_checks(asked, state_words, rows, epoch, words):
            num_good = _num_leading(is_good[:num_pages])
            if num_good < num_pages:
                num_pages, reason = num_good, failure
        return HostMatch(state_words[:num_pages].tolist(), slots[:num_pages].tolist(), rows[:num_pages]), reason

    def _cut(self, reason: MissReason) -> HostMatch:
        return HostMatch([], [], np.empty((0, _LINE_WORDS), np.uint64), self._miss(reason))

    def _words(self, birth_floor_ns: int) -> NodeWords:
        words = self._page.read()
        if birth_floor_ns <= words.birth_floor_ns:
            return words
        return words._replace(birth_floor_ns=birth_floor_ns)

    def _miss(self, reason: MissReason) -> MissReason:
        self.misses[reason] += 1
        return reason


def _row_checks(
    asked: KeyArray, state_words: Words, rows: NDArray[np.uint64], epoch: Epoch, words: NodeWords
) -> list[tuple[MissReason, NDArray[np.bool_]]]:
    """For each reason of a miss, which of the rows do not have it."""
    return [
        ("reused", state_words & np.uint64(STATE_MASK) == COMMITTED),
        ("absent", (rows[:, KEY_LOW] == asked[:, 0]) & (rows[:, KEY_HIGH] == asked[:, 1])),
        ("absent", rows[:, EPOCH] == epoch),
        ("old_drop", rows[:, DROP] == words.drop),
        ("too_old", rows[:, BIRTH] >= words.birth_floor_ns),
    ]


def _void_reason(row: list[int], words: NodeWords) -> MissReason | None:
    """Why the page of a row may not be used any more: a flush that came while it was copied."""
    if words.floor > row[EPOCH]:
        return "below_floor"
    if words.drop != row[DROP]:
        return "old_drop"
    return "too_old" if row[BIRTH] < words.birth_floor_ns else None


def _num_leading(is_good: NDArray[np.bool_]) -> int:
    """How many are good before the first that is not."""
    return len(is_good) if is_good.all() else int(is_good.argmin())
