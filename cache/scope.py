"""What a scoped drop covers. A drop may take more than asked, never less."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from cache.page_hold import PageHold
from cache.prefix_index import PrefixIndex
from cache.types import Namespace, TokenBytes


@dataclass(frozen=True, slots=True)
class NamespaceScope:
    """Everything of one namespace."""

    namespace: Namespace

    def covers(self, hold: PageHold, index: PrefixIndex) -> bool:
        return hold.namespace == self.namespace

    def count(self, index: PrefixIndex) -> int:
        space = index.spaces.get(self.namespace)
        return space.num_pages if space else 0

    def detach(self, index: PrefixIndex) -> int:
        return index.detach_space(self.namespace)


@dataclass(frozen=True, slots=True)
class PrefixScope:
    """Everything of one namespace that begins with `first_page`, a whole page or, covering more, less than one."""

    namespace: Namespace
    first_page: TokenBytes

    def covers(self, hold: PageHold, index: PrefixIndex) -> bool:
        return hold.namespace == self.namespace and hold.has_first_page(self.first_page)

    def count(self, index: PrefixIndex) -> int:
        return sum(index.num_stem_pages(self.namespace, page) for page in self._first_pages(index))

    def detach(self, index: PrefixIndex) -> int:
        return sum(index.detach_stem(self.namespace, page) for page in self._first_pages(index))

    def _first_pages(self, index: PrefixIndex) -> list[bytes]:
        space = index.spaces.get(self.namespace)
        if space is None:
            return []
        if len(self.first_page) == index.page_bytes:
            return [self.first_page] if self.first_page in space.tops else []
        return [page for page in space.tops if page.startswith(self.first_page)]


@dataclass(frozen=True, slots=True)
class AgeScope:
    """Every chain whose oldest page was, or may have been, computed before `birth_s`. O(first pages cached)."""

    birth_s: float

    def covers(self, hold: PageHold, index: PrefixIndex) -> bool:
        # the birth of a stem is at most that of any hold that pins it: both stand or fall together
        birth_s = index.birth_of(hold.node) if hold.node >= 0 else hold.opened_s
        return birth_s < self.birth_s

    def count(self, index: PrefixIndex) -> int:
        return sum(index.num_stem_pages(namespace, page) for namespace, page in self._stems(index))

    def detach(self, index: PrefixIndex) -> int:
        return sum(index.detach_stem(namespace, page) for namespace, page in list(self._stems(index)))

    def _stems(self, index: PrefixIndex) -> Iterator[tuple[Namespace, bytes]]:
        for namespace, first_page, top in index.iter_tops():
            if index.birth_of(top) < self.birth_s:
                yield namespace, first_page
