"""In which order the host tier gives up pages: one small class for each policy, in the memory of the index's writer.

Readers never ask before they read, so hits are told afterwards, in batches (`HostTier.touch`). An order knows slots
only; a slot is in it exactly while it is committed.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from typing import Protocol


class EvictionOrder(Protocol):
    """What the tier asks of a policy. Every call is O(1) but for iteration."""

    def add(self, slot: int) -> None:
        """A page was committed in `slot`, which is not in the order."""
        ...

    def touch(self, slot: int) -> None:
        """A page was read; nothing if `slot` is not in the order."""
        ...

    def discard(self, slot: int) -> None:
        """The page is gone for another reason than `pop`; nothing if `slot` is not in the order."""
        ...

    def pop(self) -> int | None:
        """Take out the slot to give up next; None if there is none."""
        ...

    def __len__(self) -> int: ...

    def __contains__(self, slot: int) -> bool: ...

    def __iter__(self) -> Iterator[int]: ...


class LruOrder:
    """Least recently used first."""

    def __init__(self) -> None:
        #: coldest first. OrderedDict: taking the first of a plain dict is O(slots taken before)
        self._slots: OrderedDict[int, None] = OrderedDict()

    def add(self, slot: int) -> None:
        self._slots[slot] = None

    def touch(self, slot: int) -> None:
        if slot in self._slots:
            self._slots.move_to_end(slot)

    def discard(self, slot: int) -> None:
        self._slots.pop(slot, None)

    def pop(self) -> int | None:
        return self._slots.popitem(last=False)[0] if self._slots else None

    def __len__(self) -> int:
        return len(self._slots)

    def __contains__(self, slot: int) -> bool:
        return slot in self._slots

    def __iter__(self) -> Iterator[int]:
        return iter(self._slots)


class SlruOrder:
    """Segmented LRU: pages read at least once are protected from a scan of pages that nobody reads again.

    In public traces 76 % of the pages are used once (Mooncake, FAST 2025); under LRU each of them pushes out a page
    that may be read again. After Karedla, Love, Wherry, "Caching strategies to improve disk system performance", 1994.
    """

    def __init__(self, protected_share: float = 0.8) -> None:
        """protected_share: of all pages, how many may be protected; the coldest of them above it are so no longer."""
        self._probation = LruOrder()
        self._protected = LruOrder()
        self._protected_share = protected_share

    def add(self, slot: int) -> None:
        self._probation.add(slot)

    def touch(self, slot: int) -> None:
        if slot in self._protected:
            self._protected.touch(slot)
        elif slot in self._probation:
            self._probation.discard(slot)
            self._protected.add(slot)
            self._shrink_protected()

    def discard(self, slot: int) -> None:
        self._probation.discard(slot)
        self._protected.discard(slot)

    def pop(self) -> int | None:
        slot = self._probation.pop()
        return self._protected.pop() if slot is None else slot

    def __len__(self) -> int:
        return len(self._probation) + len(self._protected)

    def __contains__(self, slot: int) -> bool:
        return slot in self._probation or slot in self._protected

    def __iter__(self) -> Iterator[int]:
        yield from self._probation
        yield from self._protected

    def _shrink_protected(self) -> None:
        while len(self._protected) > self._protected_share * len(self):
            slot = self._protected.pop()
            assert slot is not None, "a share below one leaves nothing to take only when nothing is there"
            self._probation.add(slot)
