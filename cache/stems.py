"""Stems: everything cached under one first page of one namespace. The unit of scoped drops.

A node above which there is none carries `~stem_id` as its parent, so any node finds its stem by walking up. Columns
that drops and their dry runs sum over are arrays: 100,000 stems are looked through in 0.1 ms, without touching a node.
"""

from __future__ import annotations

import math
from array import array
from typing import Final, NewType

import numpy as np
from numpy.typing import NDArray

from cache.node_table import NodeId
from cache.types import Namespace

StemId = NewType("StemId", int)
#: stem ids of a selection
StemIds = NDArray[np.int64]

#: `Space.number` of stems that are vacant or dropped
_NO_SPACE: Final = -1


class Space:
    """One namespace's trees."""

    __slots__ = ("namespace", "number", "tops")

    def __init__(self, namespace: Namespace, number: int) -> None:
        self.namespace: Final = namespace
        #: never used again
        self.number: Final = number
        #: first page of the sequence -> the node that begins with it
        self.tops: dict[bytes, NodeId] = {}


class StemTable:
    """Columns of the stems; rows are used again."""

    __slots__ = ("_num_spaces", "_numbers", "_vacant", "births", "by_namespace", "first_pages", "num_pages", "spaces")

    def __init__(self) -> None:
        #: namespaces that link to something
        self.by_namespace: dict[Namespace, Space] = {}
        self._num_spaces = 0
        #: seconds, the caller's clock: no page of the stem was computed before. The birth of a chain is that of its
        #: oldest page, and every chain of the stem contains its first page, so one number serves all of them.
        #: inf in a vacant or dropped row
        self.births = array("d")
        #: pages that can be matched; 0 in a vacant or dropped row
        self.num_pages = array("q")
        self._numbers = array("q")
        self.spaces: list[Space] = []
        self.first_pages: list[bytes] = []
        self._vacant: list[StemId] = []

    def space_for(self, namespace: Namespace) -> Space:
        """The namespace's space; a new one is to be linked to something, or left, at once."""
        space = self.by_namespace.get(namespace)
        if space is None:
            self._num_spaces += 1
            space = self.by_namespace[namespace] = Space(namespace, self._num_spaces)
        return space

    def unlink(self, stem: StemId) -> dict[bytes, NodeId]:
        """Remove the link to the stem's first node, and return it."""
        space, first_page = self.spaces[stem], self.first_pages[stem]
        link = {first_page: space.tops.pop(first_page)}
        if not space.tops:
            del self.by_namespace[space.namespace]
        return link

    def add(self, space: Space, first_page: bytes, birth_s: float) -> StemId:
        """A new stem without pages; linking its first node from `space.tops` is the caller's."""
        if not self._vacant:
            self.births.append(birth_s)
            self.num_pages.append(0)
            self._numbers.append(space.number)
            self.spaces.append(space)
            self.first_pages.append(first_page)
            return StemId(len(self.spaces) - 1)
        stem = self._vacant.pop()
        self.births[stem], self.num_pages[stem], self._numbers[stem] = birth_s, 0, space.number
        self.spaces[stem], self.first_pages[stem] = space, first_page
        return stem

    def release(self, stem: StemId) -> None:
        """The stem's last node is gone."""
        self.births[stem], self.num_pages[stem], self._numbers[stem] = math.inf, 0, _NO_SPACE
        self._vacant.append(stem)

    def lower_birth(self, stem: StemId, birth_s: float) -> None:
        """KV of this age joined the stem, or a hold of this age pins it."""
        if birth_s < self.births[stem]:
            self.births[stem] = birth_s

    def is_dropped(self, stem: StemId) -> bool:
        return self._numbers[stem] == _NO_SPACE

    def of_space(self, space: Space) -> StemIds:
        """Stems of a namespace. O(stems), 1 ns each."""
        return np.flatnonzero(np.frombuffer(self._numbers, np.int64) == space.number)

    def born_before(self, birth_s: float) -> StemIds:
        """Stems with KV that may be older than `birth_s`. O(stems), 1 ns each."""
        return np.flatnonzero(np.frombuffer(self.births, np.float64) < birth_s)

    def count(self, stems: StemIds) -> int:
        """Pages of these stems that can be matched."""
        return int(np.frombuffer(self.num_pages, np.int64)[stems].sum())

    def drop(self, stems: StemIds) -> None:
        """Mark these stems as dropped. Their nodes stay linked until the index unlinks them."""
        np.frombuffer(self.births, np.float64)[stems] = math.inf
        np.frombuffer(self.num_pages, np.int64)[stems] = 0
        np.frombuffer(self._numbers, np.int64)[stems] = _NO_SPACE

    def shrink(self, budget: int) -> int:
        """Take rows off a table nobody uses any more; returns what is left of the budget (0: call again)."""
        num_vacancies = min(budget, len(self._vacant))
        del self._vacant[len(self._vacant) - num_vacancies :]
        budget -= num_vacancies
        num_left = max(0, len(self.spaces) - budget)
        budget -= len(self.spaces) - num_left
        for column in (self.births, self.num_pages, self._numbers, self.spaces, self.first_pages):
            del column[num_left:]
        return budget
