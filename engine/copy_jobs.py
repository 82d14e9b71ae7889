"""Copies between a rank's device pages and its node's host tier, as the scheduler orders them. Frozen plain data."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cache.host_reader import HostMatch
from cache.keys import PageKeys
from cache.types import Epoch


@dataclass(frozen=True, slots=True)
class HostFound:
    """The leading pages of a chain that the tier held when asked; a hint until each was copied and verified."""

    #: in the order of the chain
    matches: tuple[HostMatch, ...] = ()
    num_pages: int = 0
    #: seconds of the engine's clock; no KV in it is older. Of no meaning without a page
    birth_s: float = 0.0
    #: why the chain ends there; "" when all that was asked for is there
    cut: str = ""


class HostView(Protocol):
    """What the scheduler may know of an attached tier, read from mapped memory without asking anybody."""

    @property
    def number(self) -> int:
        """Of the attachment; jobs carry it."""
        ...

    @property
    def drop(self) -> int:
        """Flushes of the tier alone that it has seen, now; what is ordered under one does not outlive it."""
        ...

    def find(self, keys: PageKeys, epoch: Epoch, born_after_s: float) -> HostFound:
        """The longest leading part of `keys` that can be loaded now and has no KV from before `born_after_s`."""
        ...

    def known(self, keys: PageKeys, epoch: Epoch) -> NDArray[np.bool_]:
        """For each key by itself: is its page there?"""
        ...

    def boot_ns(self, engine_s: float) -> int:
        """A moment of the engine's clock in the clock of births, never later than it really was."""
        ...


@dataclass(frozen=True, slots=True)
class LoadJob:
    """Copy pages of the tier into device pages, in order, up to the first that fails."""

    copy_id: int
    tier: int
    found: HostFound
    #: int32, one for each page found
    pages: NDArray[np.int32]


@dataclass(frozen=True, slots=True)
class WriteJob:
    """Copy device pages to the tier and commit them."""

    copy_id: int
    tier: int
    #: one for each page, parents first
    keys: PageKeys
    pages: NDArray[np.int32]
    #: under which the pages were computed
    epoch: Epoch
    birth_ns: int
    #: of the tier when the copy was ordered: under a higher one none of its pages may be committed
    drop: int = 0


CopyJob: TypeAlias = LoadJob | WriteJob


@dataclass(slots=True)
class HostCounters:
    """What went between the rank and the host tier since the engine started; only grows. Written by the scheduler."""

    #: admissions that looked into the tier, and pages they found
    num_lookups: int = 0
    num_found_pages: int = 0
    #: chains cut short, by the reason of the page at the cut: at the look-up or while loading
    misses: Counter[str] = field(default_factory=Counter)
    num_loaded_pages: int = 0
    loaded_bytes: int = 0
    #: pages copied into slots; what the tier made of them is in `commits`
    num_written_pages: int = 0
    written_bytes: int = 0
    #: seconds the copier spent on each
    load_s: float = 0.0
    write_s: float = 0.0
    #: pages committed, and refused by reason
    commits: Counter[str] = field(default_factory=Counter)
    #: pages that were to be written and were not, by reason
    drops: Counter[str] = field(default_factory=Counter)
    #: pages not copied because the tier had them
    num_known_pages: int = 0

    def copy(self) -> HostCounters:
        return HostCounters(
            self.num_lookups, self.num_found_pages, self.misses.copy(), self.num_loaded_pages, self.loaded_bytes,
            self.num_written_pages, self.written_bytes, self.load_s, self.write_s, self.commits.copy(),
            self.drops.copy(), self.num_known_pages,
        )  # fmt: skip
