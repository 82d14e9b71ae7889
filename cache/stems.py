"""Stems: everything cached under one first page of one namespace. The unit of scoped drops.

A node above which there is none carries `~stem_id` as its parent, so any node finds its stem by walking up.
"""

from __future__ import annotations

from typing import NewType

from cache.node_table import NodeId
from cache.types import Namespace

StemId = NewType("StemId", int)


class Space:
    """One namespace's trees."""

    __slots__ = ("num_pages", "tops")

    def __init__(self) -> None:
        #: first page of the sequence -> the node that begins with it
        self.tops: dict[bytes, NodeId] = {}
        self.num_pages = 0


class StemTable:
    """Columns of the stems; rows are used again."""

    __slots__ = ("_vacant", "births", "namespaces", "num_pages")

    def __init__(self) -> None:
        #: seconds, the caller's clock: no page of the stem was computed before. The birth of a chain is that of its
        #: oldest page, and every chain of the stem contains its first page, so one number serves all of them
        self.births: list[float] = []
        self.namespaces: list[Namespace] = []
        self.num_pages: list[int] = []
        self._vacant: list[StemId] = []

    def add(self, namespace: Namespace, birth_s: float) -> StemId:
        if self._vacant:
            stem = self._vacant.pop()
            self.namespaces[stem], self.births[stem], self.num_pages[stem] = namespace, birth_s, 0
            return stem
        self.namespaces.append(namespace)
        self.births.append(birth_s)
        self.num_pages.append(0)
        return StemId(len(self.births) - 1)

    def lower_birth(self, stem: StemId, birth_s: float) -> None:
        """KV of this age joined the stem, or a hold of this age pins it."""
        if birth_s < self.births[stem]:
            self.births[stem] = birth_s

    def release(self, stem: StemId) -> None:
        self._vacant.append(stem)

    def shrink(self, budget: int) -> int:
        """Take rows off a table nobody uses any more; returns what is left of the budget (0: call again)."""
        num_rows = min(budget, len(self.births))
        for column in (self.births, self.namespaces, self.num_pages):
            del column[len(column) - num_rows :]
        return budget - num_rows
