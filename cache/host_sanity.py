"""Every rule of the host tier that can be looked up after the fact, between the writer's memory, table and index.

Reads all, changes nothing. Which page is whose child is not known here: keys are opaque. What the write policy says
about parents is checked where the tree is (`cache.write_policy.backing_violations`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from cache.host_adoption import index_faults
from cache.slot_table import (
    COMMITTED,
    DROP,
    EPOCH,
    FREE,
    KEY_LOW,
    LEASED,
    NOBODY,
    QUARANTINED,
    STATE_NAMES,
    SlotTable,
)

if TYPE_CHECKING:
    from cache.host_tier import HostTier


class Violation(NamedTuple):
    """What is wrong, and what to take out of use because of it."""

    text: str
    slot: int | None = None
    #: of an index word
    position: int | None = None


def count_by_version(table: SlotTable, slots: Iterable[int]) -> Counter[tuple[int, int]]:
    """(epoch, drop) -> how many of these committed slots hold a page of it. O(slots) for each of the few epochs."""
    chosen = np.fromiter(slots, np.int64)
    epochs, drops = table.rows[chosen, EPOCH], table.rows[chosen, DROP]
    counts: Counter[tuple[int, int]] = Counter()
    for epoch in np.unique(epochs).tolist():
        of_epoch, numbers = np.unique(drops[epochs == epoch], return_counts=True)
        counts.update({(epoch, drop): number for drop, number in zip(of_epoch.tolist(), numbers.tolist(), strict=True)})
    return counts


def violations(tier: HostTier) -> list[Violation]:
    """What is wrong with the tier; empty when sound. O(slots), vectorised."""
    expected = _expected_states(tier)
    return [*_ownership(tier), *_states(tier, expected), *_holders(tier), *_index(tier), *_pages(tier)]


def _expected_states(tier: HostTier) -> NDArray[np.int64]:
    """State of each slot as memory has it; -1 where memory has none."""
    expected = np.full(len(tier.table), -1)
    for state, slots in _slots_by_state(tier):
        expected[slots] = state
    return expected


def _slots_by_state(tier: HostTier) -> Iterator[tuple[int, NDArray[np.int64]]]:
    yield FREE, np.array(tier.owners.free, np.int64)
    yield COMMITTED, np.fromiter(tier.order, np.int64)
    for state, holders in ((LEASED, tier.owners.leased), (QUARANTINED, tier.owners.quarantined)):
        for slots in holders.values():
            yield state, np.fromiter(slots, np.int64)


def _ownership(tier: HostTier) -> Iterator[Violation]:
    """free + leased + committed + quarantined = all, each slot in exactly one of them."""
    every_slot = np.concatenate([slots for _, slots in _slots_by_state(tier)])
    owners = np.bincount(every_slot, minlength=len(tier.table))
    for slot in np.flatnonzero(owners != 1).tolist():
        yield Violation(f"slot {slot} has {owners[slot]} states in memory, not one", slot)


def _states(tier: HostTier, expected: NDArray[np.int64]) -> Iterator[Violation]:
    states = tier.table.states()
    for slot in np.flatnonzero(states != expected).tolist():
        seen = int(states[slot])
        name = STATE_NAMES[seen] if seen < len(STATE_NAMES) else f"of unknown state {seen}"
        yield Violation(f"slot {slot} is {name} in the table, {STATE_NAMES[expected[slot]]} in memory", slot)


def _holders(tier: HostTier) -> Iterator[Violation]:
    for holders in (tier.owners.leased, tier.owners.quarantined):
        for holder, slots in holders.items():
            for slot in slots:
                if holder != NOBODY and tier.table.holder(slot) != holder:
                    yield Violation(f"slot {slot} is written by {holder}, not by {tier.table.holder(slot)}", slot)


def _index(tier: HostTier) -> Iterator[Violation]:
    bad_positions, unindexed = index_faults(tier.table, tier.index)
    for position in bad_positions.tolist():
        yield Violation(f"index word {position} names no page that belongs there", position=position)
    for slot in unindexed.tolist():
        yield Violation(f"slot {slot} is committed, but not in the index", slot)


def _pages(tier: HostTier) -> Iterator[Violation]:
    rows = tier.table.rows
    is_committed = tier.table.states() == COMMITTED
    for slot in np.flatnonzero(is_committed & (rows[:, DROP] > tier.page.read().drop)).tolist():
        yield Violation(f"slot {slot} was committed under a drop number that was never given", slot)
    committed = np.flatnonzero(is_committed)
    # half of a digest tells two keys apart; to sort whole keys takes ten times as long
    committed = committed[np.argsort(rows[committed, KEY_LOW])]
    keys = rows[committed, KEY_LOW]
    for slot in committed[1:][keys[1:] == keys[:-1]].tolist():
        yield Violation(f"slot {slot} holds the page of a key that another slot holds", slot)
    by_version = count_by_version(tier.table, tier.order)
    if by_version != tier.num_by_version:
        yield Violation(f"committed pages by (epoch, drop) are {by_version}, counted as {tier.num_by_version}")
