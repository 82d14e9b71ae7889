"""What a scoped drop covers. A drop may take more than asked, never less."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from cache.page_hold import PageHold
from cache.prefix_index import PrefixIndex
from cache.stems import StemIds
from cache.types import Namespace, TokenBytes


@dataclass(frozen=True, slots=True)
class NamespaceScope:
    """Everything of one namespace."""

    namespace: Namespace

    def covers(self, hold: PageHold, index: PrefixIndex) -> bool:
        return hold.namespace == self.namespace

    def stems(self, index: PrefixIndex) -> StemIds:
        space = index.spaces.get(self.namespace)
        return index.stems.of_space(space) if space else np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class PrefixScope:
    """Everything of one namespace that begins with `first_page`: a whole page or, covering more, less than one."""

    namespace: Namespace
    first_page: TokenBytes

    def covers(self, hold: PageHold, index: PrefixIndex) -> bool:
        return hold.namespace == self.namespace and hold.has_first_page(self.first_page)

    def stems(self, index: PrefixIndex) -> StemIds:
        return np.array(index.stems_with(self.namespace, self.first_page), np.int64)


@dataclass(frozen=True, slots=True)
class AgeScope:
    """Every chain whose oldest page was, or may have been, computed before `birth_s`."""

    birth_s: float

    def covers(self, hold: PageHold, index: PrefixIndex) -> bool:
        # the birth of a stem is at most that of any hold that pins it: both stand or fall together
        birth_s = min(index.birth_of(hold.node), hold.birth_s) if hold.node >= 0 else hold.birth_s
        return birth_s < self.birth_s

    def stems(self, index: PrefixIndex) -> StemIds:
        return index.stems.born_before(self.birth_s)
