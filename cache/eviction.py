"""Which leaf goes next: a list of nodes by last use, linked through the columns of their table.

A node moves to the new end when a pin on it ends: O(1), and no reuse is ever paid for by a later eviction. The list may
hold nodes that cannot go (in use, or with children); they are taken out when they come up, each paid for by the use
that put it in. One that becomes a leaf after that goes to the old end: its own last use is older than anything in the
list, and that of its last child was the oldest. So the order is exact.
"""

from __future__ import annotations

from cache.node_table import NO_NODE, NodeId, NodeTable


class EvictionQueue:
    """Order of the nodes of one table. Evictable means: no owners, no children. Every operation is O(1)."""

    __slots__ = ("_newest", "_oldest", "_table")

    def __init__(self, table: NodeTable) -> None:
        self._table = table
        self._newest: int = NO_NODE
        self._oldest: int = NO_NODE

    def use(self, node: NodeId) -> None:
        """The node was used last of all."""
        table, newest = self._table, self._newest
        if node == newest:
            return
        if table.is_queued[node]:
            self._unlink(node)
        table.is_queued[node] = 1
        table.older[node], table.newer[node] = newest, NO_NODE
        if newest >= 0:
            table.newer[newest] = node
        else:
            self._oldest = node
        self._newest = node

    def offer_first(self, node: NodeId) -> None:
        """Nothing in the list was unused for longer, unless the node is in it already."""
        table, oldest = self._table, self._oldest
        if table.is_queued[node]:
            return
        table.is_queued[node] = 1
        table.older[node], table.newer[node] = NO_NODE, oldest
        if oldest >= 0:
            table.older[oldest] = node
        else:
            self._newest = node
        self._oldest = node

    def pop(self) -> NodeId:
        """The evictable node unused for longest, out of the list; NO_NODE when there is none."""
        table = self._table
        while (node := self._oldest) >= 0:
            self._unlink(NodeId(node))
            if not (table.owners[node] or table.children[node]):
                return NodeId(node)
        return NO_NODE

    def discard(self, node: NodeId) -> None:
        """The node is about to be released."""
        if self._table.is_queued[node]:
            self._unlink(node)

    def nodes(self) -> list[NodeId]:
        """All in order, oldest first, for checks. O(n)."""
        nodes: list[NodeId] = []
        node = self._oldest
        while node >= 0:
            nodes.append(NodeId(node))
            node = self._table.newer[node]
        return nodes

    def _unlink(self, node: NodeId) -> None:
        table = self._table
        table.is_queued[node] = 0
        older, newer = table.older[node], table.newer[node]
        if older >= 0:
            table.newer[older] = newer
        else:
            self._oldest = newer
        if newer >= 0:
            table.older[newer] = older
        else:
            self._newest = older
