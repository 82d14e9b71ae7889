"""Storage of the prefix index: one list per field of a node, a node is an index into them.

Why not an object per node: the cyclic garbage collector visits every tracked object in a full pass, and 100,000 node
objects with their dicts cost it a pause of several ms on the engine thread. Bytes, ints and dicts of bytes to ints are
not tracked, so here it sees thirteen lists. A whole table is also taken apart by popping the ends of its lists.
"""

from __future__ import annotations

from typing import Final, NewType

from cache.keys import PageKeys
from cache.pages import PageIds
from cache.types import TokenBytes

#: row of the table; rows are used again after `release`
NodeId = NewType("NodeId", int)
#: "above the first page": the parent of nothing, the match of nothing
NO_NODE: Final = NodeId(-1)

#: the children of every leaf; shared, so nobody may write to it
NO_CHILDREN: Final[dict[bytes, NodeId]] = {}

#: token bytes of an edge whose release counts like one more node when a table is taken apart (freeing memory is
#: what costs there: 64 KiB are 16 pages of the operating system)
EDGE_BYTES_PER_UNIT: Final = 1 << 16


class NodeTable:
    """Columns of the tree. Plain data: the rules live in PrefixIndex and EvictionQueue."""

    __slots__ = (
        "_vacant", "backed", "children", "edges", "is_queued", "keys", "newer", "older", "owners", "pages", "parents",
        "starts", "used",
    )  # fmt: skip

    def __init__(self) -> None:
        #: tokens from the parent's end to the node's own, whole pages, at least one; b"" in a vacant or dead row
        self.edges: list[TokenBytes] = []
        #: pages of these tokens, one id per page_size tokens
        self.pages: list[PageIds] = []
        #: first page of the child's edge -> child; NO_CHILDREN in a leaf
        self.children: list[dict[bytes, NodeId]] = []
        #: node above; in a node without one, ~stem_id (negative)
        self.parents: list[int] = []
        #: position of the edge's first byte in the sequence, in token bytes
        self.starts: list[int] = []
        #: holds that pin this node + children with owners; above 0 the node is not evictable
        self.owners: list[int] = []
        #: tick of the last use, stamped when a pin ends
        self.used: list[int] = []
        #: keys of the edge's first pages, as far as they were asked for (`cache.chain_keys`); b"" without a host tier
        self.keys: list[PageKeys] = []
        #: of the edge's pages, how many from its start are in the host tier or on their way; write-through only
        self.backed: list[int] = []
        #: 1 while the node is in the eviction queue, and then its neighbours there; NO_NODE at the ends
        self.is_queued = bytearray()
        self.newer: list[int] = []
        self.older: list[int] = []
        self._vacant: list[NodeId] = []

    def __len__(self) -> int:
        """Rows in use."""
        return len(self.edges) - len(self._vacant)

    def add(self, edge: TokenBytes, pages: PageIds, parent: int, start: int, used: int) -> NodeId:
        """A new leaf with no owners; linking it under `parent` is the caller's."""
        if self._vacant:
            node = self._vacant.pop()
            self.edges[node], self.pages[node] = edge, pages
            self.parents[node], self.starts[node], self.used[node] = parent, start, used
            return node
        self.edges.append(edge)
        self.pages.append(pages)
        self.children.append(NO_CHILDREN)
        self.parents.append(parent)
        self.starts.append(start)
        self.owners.append(0)
        self.used.append(used)
        self.keys.append(b"")
        self.backed.append(0)
        self.is_queued.append(0)
        self.newer.append(NO_NODE)
        self.older.append(NO_NODE)
        return NodeId(len(self.edges) - 1)

    def end(self, node: NodeId) -> int:
        """Position behind the edge's last byte in the sequence, in token bytes."""
        return self.starts[node] + len(self.edges[node])

    def release(self, node: NodeId) -> None:
        """The node is gone and its row vacant. It is not in the eviction queue any more."""
        self.edges[node] = b""
        self.pages[node] = b""
        self.children[node] = NO_CHILDREN
        self.owners[node] = 0
        self.keys[node] = b""
        self.backed[node] = 0
        self._vacant.append(node)

    def shrink(self, budget: int) -> int:
        """Take rows off the end until `budget` is used up; returns what is left of it (0: call again).

        For tables nobody uses any more. One unit is a vacancy, a row, a child link, or 64 KiB of an edge.
        """
        num_vacancies = min(budget, len(self._vacant))
        del self._vacant[len(self._vacant) - num_vacancies :]
        budget -= num_vacancies
        edges, children = self.edges, self.children
        while budget > 0 and edges:
            links = children[-1]
            while links and budget > 0:
                links.popitem()
                budget -= 1
            if links:
                return 0
            budget -= 1 + len(edges.pop()) // EDGE_BYTES_PER_UNIT
            children.pop()
            self.pages.pop()
        for column in (
            self.parents, self.starts, self.owners, self.used, self.keys, self.backed, self.newer, self.older,
        ):  # fmt: skip
            del column[len(edges) :]
        return max(budget, 0)
