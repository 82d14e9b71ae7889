"""How a rank writes pages to the host tier: copy into a slot it has leased, then ask the tier to let readers find it.

The caller owns the source page until `write` has returned: it stays out of the pool's reach through flush, retract,
abort and eviction (hole H13). Nothing here waits or asks: a page without a slot is dropped and counted.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cache.arena import Arena, PageView
from cache.host_tier import CommitOutcome
from cache.page_checksum import PageEntry, copy_page, entry_seed, key_words
from cache.slot_owners import SlotLease, SlotRef
from cache.types import Epoch


class HostWriter:
    """One rank's leased slots and the pages it has written but not committed. Used by one thread."""

    def __init__(self, arena: Arena) -> None:
        self._pages = arena.pages
        self._drop = 0
        self._ready: list[SlotRef] = []
        self._written: list[PageEntry] = []
        self._told: list[PageEntry] = []
        self._to_give_back: list[SlotRef] = []
        #: pages copied, bytes of them
        self.num_written = 0
        self.written_bytes = 0
        #: pages that did not reach the tier, by reason: `no_slot`, `no_answer`, or what the tier said to a commit
        self.dropped: Counter[str] = Counter()

    @property
    def num_ready(self) -> int:
        """Slots leased and not written: how many pages `write` can still take."""
        return len(self._ready)

    @property
    def num_to_commit(self) -> int:
        """Pages written that `take_commits` would return."""
        return len(self._written)

    def accept(self, lease: SlotLease) -> None:
        """Slots that the tier has leased to us. Those of an older drop number can commit no more: they go back."""
        self.keep_up(lease.drop)
        if lease.drop < self._drop:
            self._to_give_back += lease.slots
            return
        # taken from the end; so the tier's order is kept
        self._ready[:0] = reversed(lease.slots)

    def keep_up(self, drop: int) -> None:
        """The tier has this drop number: slots leased under an older one can commit no more and go back."""
        if drop > self._drop:
            self._to_give_back += self._ready
            self._ready = []
            self._drop = drop

    def write(self, key: bytes, epoch: Epoch, birth_ns: int, source: PageView) -> bool:
        """Copy `source` into a leased slot. False: there is none, the page is dropped and counted.

        key, epoch: those under which the page was computed, for life.  birth_ns: CLOCK_BOOTTIME of the oldest page of
        its chain.  source: owned by the caller until this returns. About 1.1 times a memcpy.
        """
        if not self._ready:
            self.dropped["no_slot"] += 1
            return False
        slot, generation = self._ready.pop()
        seed = entry_seed(*key_words(key), slot, generation, epoch, self._drop, birth_ns)
        checksum = copy_page(source, self._pages[slot], hashed=source, seed=seed)
        self._written.append(PageEntry(slot, generation, key, epoch, self._drop, birth_ns, checksum))
        self.num_written += 1
        self.written_bytes += len(source)
        return True

    def take_commits(self) -> list[PageEntry]:
        """The pages written since the last call, in order, for `HostTier.commit`. `settle` takes the answer."""
        entries, self._written = self._written, []
        self._told += entries
        return entries

    def settle(self, entries: Sequence[PageEntry], outcomes: Sequence[CommitOutcome]) -> None:
        """What the tier made of pages it was told: their slots are no longer ours."""
        settled = set(entries)
        self._told = [entry for entry in self._told if entry not in settled]
        self.dropped.update(outcome for outcome in outcomes if outcome not in ("committed", "known"))
        if "old_drop" in outcomes:
            self._to_give_back += self._ready
            self._ready = []

    def forget(self, entries: Sequence[PageEntry]) -> None:
        """The tier's answer on these was lost: they may be committed or not, and are written no more."""
        self.dropped["no_answer"] += len(entries)
        lost = set(entries)
        self._told = [entry for entry in self._told if entry not in lost]

    def take_returns(self) -> list[SlotRef]:
        """Slots to give back with `HostTier.release`."""
        returns, self._to_give_back = self._to_give_back, []
        return returns

    def held(self) -> list[SlotRef]:
        """Every slot that may still be written or committed, for `HostTier.reconcile`. Ask when no call is out."""
        written = [SlotRef(entry.slot, entry.generation) for entry in (*self._told, *self._written)]
        return [*self._ready, *self._to_give_back, *written]

    def lose(self, refs: Sequence[SlotRef]) -> None:
        """The tier says these are not ours (another file, or reclaimed): they are written no more."""
        lost = set(refs)
        self._ready = [ref for ref in self._ready if ref not in lost]
        self._to_give_back = [ref for ref in self._to_give_back if ref not in lost]
        self._written = [entry for entry in self._written if SlotRef(entry.slot, entry.generation) not in lost]
        self._told = [entry for entry in self._told if SlotRef(entry.slot, entry.generation) not in lost]
