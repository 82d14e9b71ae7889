"""What the device tier says of its pages: how many are in which state, and what a flush did to them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PageCounts:
    """Pages by state; they sum to the pool's size."""

    free: int
    #: in the index and evictable
    cached: int
    #: in the index and in use
    pinned: int
    private: int
    fenced: int
    #: owned by a copy to or from the host tier and by nobody else
    copying: int = 0


@dataclass(frozen=True, slots=True)
class Swapped:
    """What a swap did."""

    #: cached pages that became free
    freed_pages: int
    #: pages that go on as fenced until their owners close
    carried_pages: int


@dataclass(frozen=True, slots=True)
class Dropped:
    """What a scoped drop did, or would do."""

    #: cached pages that became free
    freed_pages: int
    #: pages that became fenced
    fenced_pages: int
