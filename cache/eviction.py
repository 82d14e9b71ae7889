"""Which leaf goes next: a heap of leaves by last use, put right lazily.

An entry is one int, `used << 32 | node`: compared faster than a tuple and invisible to the garbage collector. A node
has at most one entry. Using a node does not touch the heap; an entry that comes up with an outdated stamp is pushed
again with the right one.
"""

from __future__ import annotations

from heapq import heappop, heappush
from typing import Final

from cache.node_table import NO_NODE, NodeId, NodeTable

_NODE_BITS: Final = 32
_NODE_MASK: Final = (1 << _NODE_BITS) - 1
#: dead entries that are not worth a compaction
_TOLERATED_DEAD: Final = 4096


class EvictionQueue:
    """Entries of the leaves of one table. Evictable means: no owners, no children."""

    __slots__ = ("_heap", "_moving", "_num_dead", "_table")

    def __init__(self, table: NodeTable) -> None:
        self._table = table
        self._heap: list[int] = []
        #: a heap under compaction: its entries move to _heap from the end, which leaves both valid heaps
        self._moving: list[int] = []
        #: entries whose node was released by a drop
        self._num_dead = 0

    def __len__(self) -> int:
        return len(self._heap) + len(self._moving)

    def offer(self, node: NodeId) -> None:
        """Enter the node if it is evictable and has no entry yet. O(log n)."""
        table = self._table
        if not (table.is_queued[node] or table.owners[node] or table.children[node]):
            table.is_queued[node] = 1
            heappush(self._heap, table.used[node] << _NODE_BITS | node)

    def pop(self) -> NodeId:
        """The evictable node unused for longest, without its entry; NO_NODE when there is none."""
        table = self._table
        while entry := self._pop_entry():
            node = NodeId(entry & _NODE_MASK)
            table.is_queued[node] = 0
            if not table.edges[node]:
                self._drop_dead(node)
            elif table.owners[node] or table.children[node]:
                continue  # offered again when its last owner or its last child goes
            elif table.used[node] != entry >> _NODE_BITS:
                self.offer(node)
            else:
                return node
        return NO_NODE

    def note_dead(self) -> None:
        """A node that has an entry was released."""
        self._num_dead += 1

    def compact(self, budget: int) -> int:
        """Drop dead entries once they are the majority, at most `budget` looked at; returns what is left of it."""
        if not self._moving:
            if self._num_dead < _TOLERATED_DEAD or 2 * self._num_dead < len(self._heap):
                return budget
            self._moving, self._heap = self._heap, []
        moved = self._moving[-budget:]
        del self._moving[-budget:]
        for entry in moved:
            node = NodeId(entry & _NODE_MASK)
            if self._table.edges[node]:
                heappush(self._heap, entry)
            else:
                self._table.is_queued[node] = 0
                self._drop_dead(node)
        return budget - len(moved)

    def shrink(self, budget: int) -> int:
        """Drop entries of a queue nobody uses any more; returns what is left of the budget (0: call again)."""
        for heap in (self._heap, self._moving):
            num_entries = min(budget, len(heap))
            del heap[len(heap) - num_entries :]
            budget -= num_entries
        return budget

    def nodes(self) -> list[NodeId]:
        """The node of every entry, dead ones included, for checks. O(n)."""
        return [NodeId(entry & _NODE_MASK) for entry in self._heap + self._moving]

    def _pop_entry(self) -> int:
        """The smallest entry of both heaps; 0 when both are empty (no entry is 0: ticks begin at 1)."""
        if self._moving and (not self._heap or self._moving[0] < self._heap[0]):
            return heappop(self._moving)
        return heappop(self._heap) if self._heap else 0

    def _drop_dead(self, node: NodeId) -> None:
        self._num_dead -= 1
        self._table.vacate(node)
