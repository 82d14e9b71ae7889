"""Who uses each slot that holds no committed page: nobody, a rank that writes it, or quarantine.

A slot is leased again only when its last holder has answered for it or is proven gone (hole H14): a rank that was
frozen in the middle of a copy may finish that copy at any time, so being declared dead frees nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

from cache.host_adoption import Inventory
from cache.processes import Processes
from cache.slot_table import FREE, LEASED, NOBODY, Holder, SlotTable


class SlotRef(NamedTuple):
    """A slot under one generation: names one lease of it, or the page committed by that lease."""

    slot: int
    generation: int


@dataclass(frozen=True, slots=True)
class SlotLease:
    """Slots that a holder may write until it commits them, gives them back, or is gone."""

    #: drop number of the tier; after the next host flush the lease cannot commit
    drop: int
    slots: tuple[SlotRef, ...]


class SlotOwners:
    """Memory of the index's writer; each change is stored in the slot table first."""

    def __init__(self, table: SlotTable, inventory: Inventory, processes: Processes) -> None:
        self._table = table
        self._processes = processes
        #: slots nobody uses, taken from the end
        self.free = inventory.free
        #: slots being written, by who writes them
        self.leased = inventory.leased
        #: slots out of use until their holder is gone; NOBODY's are so for the life of the file
        self.quarantined = inventory.quarantined

    def take(self, holder: Holder, drop: int) -> SlotRef | None:
        """Lease a free slot; recorded in the table before this returns. None: no slot is free."""
        while self.free:
            slot = self.free.pop()
            if self._table.state(slot) != FREE:
                self.quarantine_bytes(slot)
                continue
            self.leased[holder].add(slot)
            return SlotRef(slot, self._table.lease(slot, holder, drop))
        return None

    def has_leased(self, holder: Holder, ref: SlotRef) -> bool:
        """May `holder` write this slot now?"""
        return (
            ref.slot in self.leased.get(holder, ())
            and self._table.generation(ref.slot) == ref.generation
            and self._table.state(ref.slot) == LEASED
        )

    def num_leased(self, holder: Holder) -> int:
        return len(self.leased.get(holder, ()))

    def end(self, holder: Holder, ref: SlotRef) -> bool:
        """`holder` has answered for the slot, be it in quarantine: it is free. False: it was not the holder's."""
        for slots in (self.leased.get(holder), self.quarantined.get(holder)):
            if slots and ref.slot in slots and self._table.generation(ref.slot) == ref.generation:
                slots.discard(ref.slot)
                self.set_free(ref.slot)
                return True
        return False

    def reconcile(self, holder: Holder, held: Iterable[SlotRef]) -> list[SlotRef]:
        """Free every slot of `holder` that is not in `held`; what of `held` is not its own. See `HostTier`."""
        held = set(held)
        ours = [*self.leased.get(holder, ()), *self.quarantined.get(holder, ())]
        known = {SlotRef(slot, self._table.generation(slot)) for slot in ours}
        for ref in sorted(known - held):
            self.end(holder, ref)
        return sorted(held - known)

    def holder_left(self, holder: Holder) -> None:
        """`holder` is said to be dead: free its slots if the kernel says so too, else quarantine them."""
        slots = self.leased.pop(holder, set())
        if self._processes.is_gone(holder.process):
            self._free_all(slots | self.quarantined.pop(holder, set()))
            return
        for slot in sorted(slots):
            self._table.quarantine(slot)
        if slots:
            self.quarantined[holder] |= slots

    def check_holders(self) -> int:
        """Free the slots of all holders that are gone by now. How many slots that were. One probe for each holder."""
        gone = [
            holder
            for holder in dict.fromkeys([*self.leased, *self.quarantined])
            if holder != NOBODY and self._processes.is_gone(holder.process)
        ]
        slots = [self.leased.pop(holder, set()) | self.quarantined.pop(holder, set()) for holder in gone]
        return sum(self._free_all(of_holder) for of_holder in slots)

    def set_free(self, slot: int) -> None:
        """Nobody uses the slot any more."""
        self._table.free(slot)
        self.free.append(slot)

    def quarantine_bytes(self, slot: int) -> None:
        """Take a slot that is in none of the lists out of use for the life of the file."""
        self._table.quarantine_bytes(slot)
        self.quarantined[NOBODY].add(slot)

    def forget(self, slot: int) -> None:
        """Take the slot out of every list. O(slots); for repair only."""
        for slots in (*self.leased.values(), *self.quarantined.values()):
            slots.discard(slot)
        self.free = [free for free in self.free if free != slot]

    def _free_all(self, slots: set[int]) -> int:
        for slot in sorted(slots):
            self.set_free(slot)
        return len(slots)
