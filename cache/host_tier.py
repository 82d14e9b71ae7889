"""The host tier's one writer: who may write which slot, which pages readers can find, and when a slot is free again.

A machine without clock or I/O but for the mapped words: each method is called by one thread of the process that holds
the writer's lock, changes what it says, and returns. The file is right for readers and for an adopter after every
single store; what is held in memory here is rebuilt from it (`cache.host_adoption`). Rules: protocol.md section 5.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np

from cache.arena import Arena
from cache.control_page import ControlPageWriter, NodeWords
from cache.host_adoption import adopt
from cache.host_eviction import EvictionOrder
from cache.host_index import HostIndex
from cache.host_sanity import Violation, count_by_version, violations
from cache.page_checksum import PageEntry, page_checksum
from cache.processes import Processes
from cache.shared_words import Store, store_word
from cache.slot_owners import SlotLease, SlotOwners, SlotRef
from cache.slot_table import BIRTH, COMMITTED, DROP, EPOCH, STATE, STATE_MASK, Holder, SlotTable

#: what became of one page that a rank wanted to commit. In all cases but the last the slot is no longer the rank's.
CommitOutcome = Literal[
    "committed",
    "known",  # another rank had committed the page before: equal by content, its copy stays
    "below_floor",  # a flush came between the copy and the commit
    "old_drop",  # a flush of the host tier alone came between the lease and the commit
    "too_old",  # its chain was begun before the birth floor
    "index_full",  # both buckets of the key are full
    "no_lease",  # the slot is not, or no longer, leased to this holder under this generation
]

#: rows looked at in one slice of `reclaim`: about 50 us
_SCAN_SLOTS = 4096


class TierCounts(NamedTuple):
    """Slots by state; they sum to all slots."""

    free: int
    leased: int
    committed: int
    quarantined: int


class HostTier:
    """See the module. Beginning is adopting: a new file is one in which every slot is free."""

    def __init__(
        self,
        arena: Arena,
        page: ControlPageWriter,
        order: EvictionOrder,
        processes: Processes,
        max_leased: int,
        store: Store = store_word,
    ) -> None:
        """order: empty, becomes the tier's.  max_leased: slots one holder may have leased at once."""
        self.page = page
        self.table = SlotTable(arena.slots, store)
        self.index = HostIndex(arena.index, store)
        self.arena = arena
        self._max_leased = max_leased
        inventory = adopt(self.table, self.index, processes)
        #: slots without a page
        self.owners = SlotOwners(self.table, inventory, processes)
        #: slots with a page, next to be given up first
        self.order = order
        for slot in inventory.committed:
            order.add(slot)
        #: (epoch, drop) -> committed pages
        self.num_by_version = count_by_version(self.table, order)
        #: pages by outcome and by reason of their end; only rise
        self.events: Counter[str] = Counter()
        # floor, drop and birth floor that the last sweep of the table looked for, and how far it has come
        self._swept_for = (0, 0, 0)
        self._sweep_slot = 0

    def lease(self, holder: Holder, num_slots: int) -> SlotLease:
        """Give `holder` up to `num_slots` slots to write; fewer, or none, if the tier or the holder's share is full.

        Evicts committed pages if no slot is free. Each lease is in the slot table before this returns.
        """
        drop = self.page.read().drop
        slots: list[SlotRef] = []
        for _ in range(min(num_slots, self._max_leased - self.owners.num_leased(holder))):
            ref = self.owners.take(holder, drop)
            while ref is None and self._evict():
                ref = self.owners.take(holder, drop)
            if ref is None:
                self.events["lease_short"] += 1
                break
            slots.append(ref)
        return SlotLease(drop, tuple(slots))

    def commit(self, holder: Holder, entries: Sequence[PageEntry]) -> list[CommitOutcome]:
        """Let readers find the pages that `holder` has written. One outcome for each entry.

        entries: in the order of their chains, parents first. The holder writes none of their slots any more.
        """
        words = self.page.read()
        outcomes: list[CommitOutcome] = [self._commit_one(holder, entry, words) for entry in entries]
        # parents last, hence warmer than their children: a page without its parents is of no use
        for entry, outcome in zip(reversed(entries), reversed(outcomes), strict=True):
            if outcome == "committed" and entry.slot in self.order:
                self.order.discard(entry.slot)
                self.order.add(entry.slot)
        self.events.update(outcomes)
        return outcomes

    def release(self, holder: Holder, slots: Iterable[SlotRef]) -> int:
        """Take back slots that `holder` writes no more and does not commit. How many of them were its own."""
        return sum(self.owners.end(holder, ref) for ref in slots)

    def reconcile(self, holder: Holder, held: Iterable[SlotRef]) -> list[SlotRef]:
        """`holder` says which slots it may still write; it waits for no answer of ours.

        Frees every other slot of its own, such as those of a lease whose answer was lost with our predecessor.
        Returns what of `held` is not its own: it must not write there.
        """
        return self.owners.reconcile(holder, held)

    def holder_left(self, holder: Holder) -> None:
        """`holder` is said to be dead: free its slots if the kernel says so too, else quarantine them (hole H14)."""
        self.owners.holder_left(holder)

    def check_holders(self) -> int:
        """Free the slots of all holders that are gone by now. How many slots that were. One probe for each holder."""
        return self.owners.check_holders()

    def touch(self, pages: Sequence[SlotRef]) -> None:
        """Pages that were read, parents first; those given up meanwhile are passed over."""
        for ref in reversed(pages):
            if self._is_committed(ref):
                self.order.touch(ref.slot)

    def report_corrupt(self, ref: SlotRef) -> bool:
        """A reader found other bytes than were committed. Quarantine the slot if that is so here too; True if it was.

        Hashes the page (about 30 us per MB). A report on a page that was given up meanwhile is nothing.
        """
        if not self._is_committed(ref):
            return False
        entry = self.table.entry(ref.slot)
        if page_checksum(self.arena.pages[ref.slot], entry.seed()) == entry.checksum:
            return False
        self.order.discard(ref.slot)
        self._unlink(ref.slot)
        self.owners.quarantine_bytes(ref.slot)
        self.events["corrupt"] += 1
        return True

    def drop_all(self) -> int:
        """Flush of the host tier alone: no page is found, no lease commits any more. O(1). How many pages it were."""
        return self.drop_below(self.page.read().drop + 1)

    def drop_below(self, drop: int) -> int:
        """The same for what has a lower drop number; how many pages it were. Nothing the second time."""
        num_before = self.num_valid
        self.page.raise_drop(drop)
        return num_before - self.num_valid

    @property
    def num_valid(self) -> int:
        """Committed pages that floor and drop number still allow; those below the birth floor are not told apart."""
        words = self.page.read()
        return sum(
            count for (epoch, drop), count in self.num_by_version.items() if epoch >= words.floor and drop == words.drop
        )

    def reclaim(self, max_pages: int) -> bool:
        """Free up to `max_pages` pages that a flush has made void; True while there may be more.

        Looks at one slice of the table (about 50 us, plus 5 us a page freed). Needed for room only: no reader finds
        such a page, and `lease` evicts when it must.
        """
        words = self.page.read()
        looking_for = (words.floor, words.drop, words.birth_floor_ns)
        if looking_for != self._swept_for:
            self._swept_for, self._sweep_slot = looking_for, 0
        begin = self._sweep_slot
        rows = self.table.rows[begin : begin + _SCAN_SLOTS]
        is_void = (rows[:, STATE] & np.uint64(STATE_MASK) == COMMITTED) & (
            (rows[:, EPOCH] < words.floor) | (rows[:, DROP] != words.drop) | (rows[:, BIRTH] < words.birth_floor_ns)
        )
        void = (np.flatnonzero(is_void)[:max_pages] + begin).tolist()
        for slot in void:
            self._give_up(slot)
        self.events["reclaimed"] += len(void)
        self._sweep_slot = void[-1] + 1 if len(void) == max_pages else begin + len(rows)
        return self._sweep_slot < len(self.table)

    def counts(self) -> TierCounts:
        owners = self.owners
        num_leased, num_quarantined = (sum(map(len, by.values())) for by in (owners.leased, owners.quarantined))
        return TierCounts(len(owners.free), num_leased, len(self.order), num_quarantined)

    def sanity_check(self) -> list[str]:
        """What is wrong between memory, table and index, in words; empty when sound. O(slots), changes nothing."""
        return [violation.text for violation in violations(self)]

    def violations(self) -> list[Violation]:
        """What is wrong, for `isolate`. As `sanity_check`; in any thread while nobody changes the tier."""
        return violations(self)

    def isolate(self, found: Sequence[Violation]) -> None:
        """Put every slot that is named into quarantine. Never raises; O(slots) for each."""
        for violation in found:
            self._isolate(violation)
        if found:
            self.num_by_version = count_by_version(self.table, self.order)
        self.events["violations"] += len(found)

    def _commit_one(self, holder: Holder, entry: PageEntry, words: NodeWords) -> CommitOutcome:
        ref = SlotRef(entry.slot, entry.generation)
        refusal = self._refusal(holder, ref, entry, words)
        position = None if refusal else self.index.room(entry.key)
        if refusal or position is None:
            self.owners.end(holder, ref)
            return refusal or "index_full"
        self.owners.leased[holder].discard(entry.slot)
        self.table.commit(entry)
        self.index.put(position, entry.key, entry.slot)
        self.order.add(entry.slot)
        self.num_by_version[entry.epoch, entry.drop] += 1
        return "committed"

    def _refusal(self, holder: Holder, ref: SlotRef, entry: PageEntry, words: NodeWords) -> CommitOutcome | None:
        """Why the page may not be found; None: it may. Gives up a void page of the same key."""
        if not self.owners.has_leased(holder, ref):
            return "no_lease"
        if entry.epoch < words.floor:
            return "below_floor"
        if not entry.drop == words.drop == self.table.lease_drop(entry.slot):
            return "old_drop"
        if entry.birth_ns < words.birth_floor_ns:
            return "too_old"
        known = self._find_alone(entry.key)
        if known is None:
            return None
        page = self.table.entry(known)
        if (page.epoch, page.drop) == (entry.epoch, words.drop) and page.birth_ns >= words.birth_floor_ns:
            return "known"
        self._give_up(known)
        return None

    def _is_committed(self, ref: SlotRef) -> bool:
        return ref.slot in self.order and self.table.generation(ref.slot) == ref.generation

    def _find_alone(self, key: bytes) -> int | None:
        """Slot of the committed page of `key`, made the only one that readers take for it.

        Gives up pages of other keys with the same tag in the same buckets, of which a reader sees one only: by chance 1
        in 2.7e8, else a key in which a bit was flipped.
        """
        known = None
        for position, slot in self.index.candidates(key):
            if slot not in self.order:
                self.index.clear(position)
            elif self.table.key(slot) == key:
                known = slot
            else:
                self.index.clear(position)
                self._give_up(slot)
        return known

    def _evict(self) -> bool:
        """Give up the coldest page. False if there is none."""
        slot = self.order.pop()
        if slot is None:
            return False
        self.events["evicted"] += 1
        self._give_up(slot)
        return True

    def _give_up(self, slot: int) -> None:
        """A committed slot becomes free, out of readers' reach first."""
        self.order.discard(slot)
        self._unlink(slot)
        if self.table.state(slot) == COMMITTED:
            self.owners.set_free(slot)
        else:
            self.owners.quarantine_bytes(slot)

    def _unlink(self, slot: int) -> None:
        """Take the slot's words out of the index."""
        page = self.table.entry(slot)
        for position, found in self.index.candidates(page.key):
            if found == slot:
                self.index.clear(position)
        version = page.epoch, page.drop
        self.num_by_version[version] -= 1
        if not self.num_by_version[version]:
            del self.num_by_version[version]

    def _isolate(self, violation: Violation) -> None:
        """Out of use with it: a slot on which memory and table disagree, a word of the index that leads nowhere."""
        if violation.position is not None:
            self.index.clear(violation.position)
        slot = violation.slot
        if slot is None:
            return
        if slot in self.order:
            self.order.discard(slot)
            self._unlink(slot)
        self.owners.forget(slot)
        self.owners.quarantine_bytes(slot)
