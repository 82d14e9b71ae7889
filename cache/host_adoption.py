"""What a writer finds in the file when it begins: every slot accounted for, every crash of its predecessor cleaned up.

A new file is the simple case. After a crash, of any process between any two stores, the state words are right (each
was one store); what can be left over is an index word without its page or a page without its index word.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from cache.host_index import HostIndex
from cache.processes import Processes
from cache.slot_table import (
    BIRTH,
    COMMITTED,
    FREE,
    KEY_HIGH,
    KEY_LOW,
    LEASED,
    NOBODY,
    QUARANTINED,
    Holder,
    SlotTable,
)


@dataclass(slots=True)
class Inventory:
    """Each slot of the table in exactly one of these."""

    #: taken from the end; so the first slots, which are pre-faulted first, are leased first
    free: list[int]
    #: the chain begun first is the first to be given up: who was read last is not known after a crash
    committed: list[int]
    leased: defaultdict[Holder, set[int]] = field(default_factory=lambda: defaultdict(set))
    quarantined: defaultdict[Holder, set[int]] = field(default_factory=lambda: defaultdict(set))


def adopt(table: SlotTable, index: HostIndex, processes: Processes) -> Inventory:
    """Bring table and index of a file whose writer's lock we hold into a consistent state, and list it.

    Slots leased by living processes stay theirs (hole H18); those of processes proven gone are freed. Pages below the
    floor stay until they are reclaimed: their keys name their epoch, so nobody finds them. O(slots), vectorised.
    """
    _quarantine_unreadable(table)
    held = _sort_held(table, processes)
    bad_positions, unindexed = index_faults(table, index)
    for position in bad_positions.tolist():
        index.clear(position)
    for slot in unindexed.tolist():
        _index_again(table, index, slot)
    states = table.states()
    committed = np.flatnonzero(states == COMMITTED)
    committed = committed[np.argsort(table.rows[committed, BIRTH], kind="stable")]
    return Inventory(np.flatnonzero(states == FREE)[::-1].tolist(), committed.tolist(), *held)


def index_faults(table: SlotTable, index: HostIndex) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Positions of index words that name no committed page or not where its key belongs, and committed slots
    that no word names. Both empty in a sound file. Changes nothing."""
    is_committed = table.states() == COMMITTED
    positions, slots, tags = index.occupied()
    in_range = (slots >= 0) & (slots < len(table))
    named = np.where(in_range, slots, 0)
    keys = table.rows[named, KEY_LOW : KEY_HIGH + 1]
    good = in_range & is_committed[named] & (tags == keys[:, 1] >> np.uint64(32)) & index.is_place_of(positions, keys)
    is_first = np.zeros(len(slots), np.bool_)
    is_first[np.unique(slots, return_index=True)[1]] = True
    good &= is_first
    is_indexed = np.zeros(len(table), np.bool_)
    is_indexed[slots[good]] = True
    return positions[~good], np.flatnonzero(is_committed & ~is_indexed)


def _quarantine_unreadable(table: SlotTable) -> None:
    """A state that no writer stores: a stray process or a flipped bit."""
    for slot in np.flatnonzero(table.states() > QUARANTINED).tolist():
        table.quarantine_bytes(slot)


def _sort_held(
    table: SlotTable, processes: Processes
) -> tuple[defaultdict[Holder, set[int]], defaultdict[Holder, set[int]]]:
    """Leased and quarantined slots by holder, after those of the gone were freed."""
    leased: defaultdict[Holder, set[int]] = defaultdict(set)
    quarantined: defaultdict[Holder, set[int]] = defaultdict(set)
    states = table.states()
    is_gone: dict[Holder, bool] = {NOBODY: False}
    for state, holders in ((LEASED, leased), (QUARANTINED, quarantined)):
        for slot in np.flatnonzero(states == state).tolist():
            holder = table.holder(slot)
            if holder not in is_gone:
                is_gone[holder] = processes.is_gone(holder.process)
            if is_gone[holder]:
                table.free(slot)
            else:
                holders[holder].add(slot)
    return leased, quarantined


def _index_again(table: SlotTable, index: HostIndex, slot: int) -> None:
    """A page whose writer died before or after the page's index word was stored: name it, or give its slot back."""
    key = table.key(slot)
    is_known = any(table.key(other) == key for _, other in index.candidates(key))
    position = None if is_known else index.room(key)
    if position is None:
        table.free(slot)
    else:
        index.put(position, key, slot)
