"""What scoped drops cut off: unreachable at once, taken apart in slices."""

from __future__ import annotations

from array import array

from cache.eviction import EvictionQueue
from cache.node_table import NodeId, NodeTable
from cache.pages import PAGE_ID_BYTES, PageIds
from cache.stems import StemId, StemIds, StemTable


class DroppedParts:
    """Dropped stems of one index on their way to being nothing: marked, then unlinked, then released node by node."""

    __slots__ = ("_queue", "_stems", "_table", "marked", "num_pages", "unlinked")

    def __init__(self, table: NodeTable, queue: EvictionQueue, stems: StemTable) -> None:
        self._table, self._queue, self._stems = table, queue, stems
        #: pages not returned yet: unreachable, unowned, as good as free
        self.num_pages = 0
        #: links to nodes to release, their children after them; empty dicts come off last
        self.unlinked: list[dict[bytes, NodeId]] = []
        #: dropped stems that may be linked still: while there are any, a match has to ask
        self.marked: list[array[int]] = []

    def __bool__(self) -> bool:
        """True: `release` has work."""
        return bool(self.unlinked or self.marked)

    def drop(self, stems: StemIds) -> int:
        """Cut these stems off; nothing in them may have owners any more. No node is touched. Returns their pages."""
        num_pages = self._stems.count(stems)
        self._stems.drop(stems)
        self.marked.append(array("q", stems.tobytes()))
        self.num_pages += num_pages
        return num_pages

    def unlink(self, stem: StemId) -> None:
        """Make way for a new stem with the same first page."""
        self.unlinked.append(self._stems.unlink(stem))

    def release(self, budget: int, out: list[PageIds]) -> int:
        """Take apart at most `budget` nodes; their pages are appended to `out` and the caller's.

        Returns what is left of the budget; 0: call again.
        """
        while budget > 0 and self:
            if not self.unlinked:
                self._unlink_marked()
            elif links := self.unlinked[-1]:
                self._release(links.popitem()[1], out)
            else:
                self.unlinked.pop()
                continue
            budget -= 1
        return budget

    def forget(self, budget: int) -> int:
        """Drop links of an index nobody uses any more, pages and all; returns what is left of the budget."""
        while budget > 0 and self.unlinked:
            if links := self.unlinked[-1]:
                links.popitem()
                budget -= 1
            else:
                self.unlinked.pop()
        return budget

    def _unlink_marked(self) -> None:
        if not (stems := self.marked[-1]):
            self.marked.pop()
            return
        stem = StemId(stems.pop())
        top = self._stems.spaces[stem].tops.get(self._stems.first_pages[stem])
        # it may have made way for another stem since, its row may even be another's by now
        if top is not None and self._table.parents[top] == ~stem and self._stems.is_dropped(stem):
            self.unlink(stem)

    def _release(self, node: NodeId, out: list[PageIds]) -> None:
        table = self._table
        if table.children[node]:
            self.unlinked.append(table.children[node])
        if table.parents[node] < 0:
            self._stems.release(StemId(~table.parents[node]))
        if pages := table.pages[node]:
            self.num_pages -= len(pages) // PAGE_ID_BYTES
            out.append(pages)
        self._queue.discard(node)
        table.release(node)
