"""The prefix index: a compressed radix tree over pages, one set of trees per namespace.

Edges are contiguous int32 token bytes, so a whole edge is verified by one memcmp and a mismatch is located only on the
one edge where paths part. A match changes nothing; edges are split on insert only. Positions (`start`, `stop`, `limit`)
are in token bytes and whole pages.

After RadixAttention (SGLang, arXiv 2312.07104); tricks and figures: docs/decisions/0001-prefix-index.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from cache.dropped import DroppedParts
from cache.eviction import EvictionQueue
from cache.keys import KEY_BYTES
from cache.node_table import NO_CHILDREN, NO_NODE, NodeId, NodeTable
from cache.pages import PAGE_ID_BYTES, PageIds
from cache.stems import StemId, StemIds, StemTable
from cache.types import TOKEN_BYTES, Namespace, TokenBytes
from configs.errors import InvariantError

#: a leaf grows in place while its edge is this short or the new part is a good share of it; beyond that a new node is
#: cheaper than copying the edge (a 128k prompt published in chunks of 2k: 9 edges, not 64)
_GROW_FREELY_BYTES: Final = 1 << 16
_GROW_SHARE: Final = 8


class PrefixIndex:
    """Maps (namespace, tokens) to pages. It owns the pages that were inserted until it returns them by `evict`,
    `dropped.release` or `take_pages`; it never allocates one.
    """

    __slots__ = (
        "_tick", "dropped", "num_pages", "num_pinned", "page_bytes", "queue", "spaces", "stems", "table",
    )  # fmt: skip

    def __init__(self, page_size: int) -> None:
        self.page_bytes = page_size * TOKEN_BYTES
        self.table = NodeTable()
        self.queue = EvictionQueue(self.table)
        self.stems = StemTable()
        self.dropped = DroppedParts(self.table, self.queue, self.stems)
        #: namespaces that link to something
        self.spaces = self.stems.by_namespace
        #: pages that can be matched
        self.num_pages = 0
        #: of these, pages of nodes with owners
        self.num_pinned = 0
        #: order of uses; not a clock
        self._tick = 1

    @property
    def num_evictable(self) -> int:
        return self.num_pages - self.num_pinned

    # ------------------------------------------------------------------------------------------------- match and pin
    def match(self, namespace: Namespace, tokens: TokenBytes, limit: int) -> tuple[NodeId, int]:
        """The longest cached prefix of tokens[:limit]: (node in which it ends, its length), (NO_NODE, 0) if none.

        The match may end inside the node's edge. Changes nothing. One dict get and one memcmp an edge.
        """
        space = self.spaces.get(namespace)
        if space is None:
            return NO_NODE, 0
        node, end = self._walk(space.tops, NO_NODE, 0, tokens, limit)
        if node >= 0 and self.dropped.marked and self.stems.is_dropped(self.stem_of(node)):
            return NO_NODE, 0
        return node, end

    def path_pages(self, node: NodeId, stop: int) -> PageIds:
        """Pages of the sequence up to `stop`, which lies in the node's edge. O(edges) and one copy."""
        pages, parents = self.table.pages, self.table.parents
        parts: list[PageIds] = []
        above: int = node
        while above >= 0:
            parts.append(pages[above])
            above = parents[above]
        parts.reverse()
        return b"".join(parts)[: stop // self.page_bytes * PAGE_ID_BYTES]

    def pin(self, node: NodeId) -> None:
        """The node and all above it are not evicted until `unpin`.

        Owners are counted up to the first node that has some already: O(1) on a path in use. Safety would not need
        the walk, an exact number of pinned pages does.
        """
        owners, parents, pages = self.table.owners, self.table.parents, self.table.pages
        above: int = node
        while above >= 0:
            owners[above] += 1
            if owners[above] > 1:
                return
            self.num_pinned += len(pages[above]) // PAGE_ID_BYTES
            above = parents[above]

    def unpin(self, node: NodeId) -> None:
        """Undo one `pin`, and stamp the node as used now."""
        owners, parents, pages = self.table.owners, self.table.parents, self.table.pages
        self._tick += 1
        self.table.used[node] = self._tick
        above: int = node
        while above >= 0:
            owners[above] -= 1
            if owners[above]:
                break
            self.num_pinned -= len(pages[above]) // PAGE_ID_BYTES
            above = parents[above]
        if not owners[node]:
            self.queue.use(node)

    # -------------------------------------------------------------------------------------------------------- insert
    def insert(
        self, namespace: Namespace, handle: NodeId, start: int, tokens: TokenBytes, stop: int, pages: PageIds,
        birth_s: float,
    ) -> tuple[NodeId, int]:  # fmt: skip
        """Record that `pages` hold the KV of tokens[start:stop].

        handle: a pinned node in whose edge tokens[:start] ends (NO_NODE with start 0); the tree is read from there.
        birth_s: no KV among `pages` is older; the stem's birth is at most that from now on.
        Returns (node in which tokens[:stop] now ends, known): tokens[start:known] were in the tree already, these of
        `pages` stay the caller's; the index takes ownership of the others. The node is not pinned. O(edges + len).
        """
        node, known = self._resume(namespace, handle, start, tokens, stop)
        if known < start:
            raise InvariantError(f"tokens[:{start}] are not those under which node {handle} was pinned")
        if node >= 0:
            self.stems.lower_birth(self.stem_of(node), birth_s)
        if known < stop:
            fresh = pages[(known - start) // self.page_bytes * PAGE_ID_BYTES :]
            node = self._add(namespace, handle, node, known, tokens[known:stop], fresh, birth_s)
        return node, known

    def _resume(
        self, namespace: Namespace, handle: NodeId, start: int, tokens: TokenBytes, stop: int
    ) -> tuple[NodeId, int]:
        table = self.table
        above: int = handle
        while above >= 0 and table.starts[above] >= start:  # the edge was split since the handle was pinned
            above = table.parents[above]
        if above < 0:
            return self.match(namespace, tokens, stop)
        node = NodeId(above)
        if table.end(node) == start:
            return self._walk(table.children[node], node, start, tokens, stop)
        cut, edge = start - table.starts[node], table.edges[node]
        if edge[cut : cut + self.page_bytes] != tokens[start : start + self.page_bytes]:
            return node, start
        return self._walk(self._siblings(node), NO_NODE, table.starts[node], tokens, stop)

    def _walk(
        self, children: dict[bytes, NodeId], node: NodeId, pos: int, tokens: TokenBytes, limit: int
    ) -> tuple[NodeId, int]:
        page_bytes, edges, links = self.page_bytes, self.table.edges, self.table.children
        while pos < limit:
            child = children.get(tokens[pos : pos + page_bytes])
            if child is None:
                return node, pos
            edge = edges[child]
            if not tokens.startswith(edge, pos):
                return child, pos + self._common(edge, tokens, pos, limit)
            node = child
            pos += len(edge)
            children = links[child]
        return node, min(pos, limit)

    def _common(self, edge: TokenBytes, tokens: TokenBytes, pos: int, limit: int) -> int:
        """Bytes, in whole pages, that `edge` and tokens[pos:limit] have in common; they are known to part or end."""
        num_bytes = min(len(edge), limit - pos)
        view, starts_with, page_bytes = memoryview(edge), tokens.startswith, self.page_bytes
        if num_bytes < len(edge) and starts_with(view[:num_bytes], pos):
            return num_bytes  # the tokens end inside the edge: a prompt whose answer is cached with it
        # halving by memcmp reads little beyond the common part; comparing all with numpy takes twice as long
        equal, differing = 0, num_bytes // page_bytes
        while differing - equal > 1:
            middle = (equal + differing) // 2
            if starts_with(view[equal * page_bytes : middle * page_bytes], pos + equal * page_bytes):
                equal = middle
            else:
                differing = middle
        return equal * page_bytes

    def _add(
        self, namespace: Namespace, handle: NodeId, node: NodeId, pos: int, edge: TokenBytes, pages: PageIds,
        birth_s: float,
    ) -> NodeId:  # fmt: skip
        table = self.table
        if node >= 0 and pos < table.end(node):
            node = self._split(node, pos)
        num_pages = len(pages) // PAGE_ID_BYTES
        if self._may_grow(node, handle) and _grows_in_place(len(table.edges[node]), len(edge)):
            table.edges[node] += edge
            table.pages[node] += pages
            if table.owners[node]:
                self.num_pinned += num_pages
        else:
            node = self._attach(namespace, node, pos, edge, pages, birth_s)
        self._count(self.stem_of(node), num_pages)
        return node

    def _may_grow(self, node: NodeId, handle: NodeId) -> bool:
        """A leaf that nobody else pins: another's pin would hold pages that it does not use."""
        return node >= 0 and not self.table.children[node] and self.table.owners[node] == (node == handle)

    def _attach(
        self, namespace: Namespace, parent: int, pos: int, edge: TokenBytes, pages: PageIds, birth_s: float
    ) -> NodeId:
        table = self.table
        if parent < 0:
            siblings, parent = self._new_stem(namespace, edge[: self.page_bytes], birth_s)
        else:
            siblings = table.children[parent]
            if siblings is NO_CHILDREN:
                siblings = table.children[parent] = {}
        leaf = table.add(edge, pages, parent, pos, self._tick)
        siblings[edge[: self.page_bytes]] = leaf
        return leaf

    def _split(self, node: NodeId, pos: int) -> NodeId:
        """Cut the node's edge at `pos`. The node keeps the lower part, so whoever pinned it stays right."""
        table, edge, pages = self.table, self.table.edges[node], self.table.pages[node]
        cut = pos - table.starts[node]
        page_cut = cut // self.page_bytes * PAGE_ID_BYTES
        siblings = self._siblings(node)
        upper = table.add(edge[:cut], pages[:page_cut], table.parents[node], table.starts[node], table.used[node])
        table.owners[upper] = 1 if table.owners[node] else 0
        table.children[upper] = {edge[cut : cut + self.page_bytes]: node}
        table.edges[node], table.pages[node] = edge[cut:], pages[page_cut:]
        table.parents[node], table.starts[node] = upper, pos
        self._split_host_part(node, upper, page_cut // PAGE_ID_BYTES)
        siblings[edge[: self.page_bytes]] = upper
        return upper

    def _split_host_part(self, node: NodeId, upper: NodeId, num_upper: int) -> None:
        """What is known of the edge's pages for the host tier goes with them."""
        table = self.table
        if keys := table.keys[node]:
            table.keys[upper], table.keys[node] = keys[: num_upper * KEY_BYTES], keys[num_upper * KEY_BYTES :]
        if num_backed := table.backed[node]:
            table.backed[upper] = min(num_backed, num_upper)
            table.backed[node] = num_backed - table.backed[upper]

    # --------------------------------------------------------------------------------------------------------- evict
    def evict(self, num_pages: int) -> list[PageIds]:
        """Give up at least one leaf's tail at a time until `num_pages` are out, least recently used first.

        Pages of nodes with owners stay. Returns the pages, which are the caller's; fewer than asked when nothing
        evictable is left. The last leaf loses only the part that is needed.
        Call it only when nothing is left in `dropped`: pages that are as good as free go first.
        """
        if self.dropped:
            raise InvariantError("eviction while dropped pages wait to be freed")
        out: list[PageIds] = []
        while num_pages > 0 and (node := self.queue.pop()) >= 0:
            pages = self.give_up(node, num_pages)
            num_pages -= len(pages) // PAGE_ID_BYTES
            out.append(pages)
        return out

    def give_up(self, leaf: NodeId, num_pages: int) -> PageIds:
        """Take the last `num_pages` pages, or all if there are fewer, of a leaf that `queue.pop` has returned."""
        return self._trim(leaf, num_pages) if self._is_longer(leaf, num_pages) else self._remove(leaf)

    def _is_longer(self, node: NodeId, num_pages: int) -> bool:
        return len(self.table.pages[node]) > num_pages * PAGE_ID_BYTES

    def _trim(self, leaf: NodeId, num_pages: int) -> PageIds:
        table, pages = self.table, self.table.pages[leaf]
        table.edges[leaf] = table.edges[leaf][: -num_pages * self.page_bytes]
        table.pages[leaf] = pages[: -num_pages * PAGE_ID_BYTES]
        num_left = len(table.pages[leaf]) // PAGE_ID_BYTES
        table.keys[leaf] = table.keys[leaf][: num_left * KEY_BYTES]
        table.backed[leaf] = min(table.backed[leaf], num_left)
        self.queue.offer_first(leaf)
        self._count(self.stem_of(leaf), -num_pages)
        return pages[-num_pages * PAGE_ID_BYTES :]

    def _remove(self, leaf: NodeId) -> PageIds:
        table, pages, parent = self.table, self.table.pages[leaf], self.table.parents[leaf]
        stem = self.stem_of(leaf)
        self._count(stem, -(len(pages) // PAGE_ID_BYTES))
        if parent >= 0:
            above = NodeId(parent)
            del table.children[above][table.edges[leaf][: self.page_bytes]]
            if not table.children[above]:
                table.children[above] = NO_CHILDREN
                self.queue.offer_first(above)
        else:
            self.stems.unlink(stem)
            self.stems.release(stem)
        table.release(leaf)
        return pages

    # --------------------------------------------------------------------------------------------------------- scope
    def stem_of(self, node: NodeId) -> StemId:
        """O(depth)."""
        parents = self.table.parents
        above = parents[node]
        while above >= 0:
            above = parents[above]
        return StemId(~above)

    def birth_of(self, node: NodeId) -> float:
        """Seconds; the chain that ends here holds no KV computed earlier. O(depth)."""
        return self.stems.births[self.stem_of(node)]

    def tops(self) -> Iterator[tuple[Namespace, NodeId]]:
        """(namespace, first node) of every stem that can be matched."""
        for namespace, space in self.spaces.items():
            for top in space.tops.values():
                if not self.stems.is_dropped(self.stem_of(top)):
                    yield namespace, top

    def stems_with(self, namespace: Namespace, start: TokenBytes) -> list[StemId]:
        """Stems of the namespace whose first page begins with `start`; O(1) if that is a whole page."""
        space = self.spaces.get(namespace)
        if space is None:
            return []
        if len(start) == self.page_bytes:
            tops = [space.tops[start]] if start in space.tops else []
        else:
            tops = [top for first_page, top in space.tops.items() if first_page.startswith(start)]
        return [self.stem_of(top) for top in tops]

    def drop(self, stems: StemIds) -> int:
        """Nothing of these stems can be matched from now on; nothing in them may have owners any more.

        Their pages are in `dropped` until it releases them. Returns how many. No node is touched.
        """
        num_pages = self.dropped.drop(stems)
        self.num_pages -= num_pages
        return num_pages

    def take_pages(self, node: NodeId, stem: StemId) -> PageIds:
        """Move the pages of a pinned node out of the index for good: they go on as fenced pages, owned elsewhere.

        stem: the node's own, which takes a walk to the top to find and is the same for a whole path.
        The caller drops the node's stem, or gives the whole index up, before anything is matched.
        """
        pages = self.table.pages[node]
        num_pages = len(pages) // PAGE_ID_BYTES
        self.table.pages[node] = b""
        self.table.owners[node] = 0
        self.num_pinned -= num_pages
        self._count(stem, -num_pages)
        return pages

    def shrink(self, budget: int) -> int:
        """Take apart an index that nobody uses any more; returns what is left of the budget (0: call again)."""
        while budget > 0 and self.spaces:
            self.dropped.unlinked.append(self.spaces.popitem()[1].tops)
            budget -= 1
        budget = self.dropped.forget(budget)
        budget = self.table.shrink(budget)
        return self.stems.shrink(budget)

    # ------------------------------------------------------------------------------------------------------- private
    def _siblings(self, node: NodeId) -> dict[bytes, NodeId]:
        """The dict that links to the node."""
        parent = self.table.parents[node]
        return self.table.children[parent] if parent >= 0 else self.stems.spaces[~parent].tops

    def _count(self, stem: StemId, num_pages: int) -> None:
        self.num_pages += num_pages
        self.stems.num_pages[stem] += num_pages

    def _new_stem(self, namespace: Namespace, first_page: bytes, birth_s: float) -> tuple[dict[bytes, NodeId], int]:
        """The dict that is to link to its first node, and that node's parent."""
        space = self.stems.space_for(namespace)
        if first_page in space.tops:  # of a dropped stem that is linked still
            self.dropped.unlink(self.stem_of(space.tops[first_page]))
            space = self.stems.space_for(namespace)
        return space.tops, ~self.stems.add(space, first_page, birth_s)


def _grows_in_place(edge_bytes: int, fresh_bytes: int) -> bool:
    return edge_bytes <= _GROW_FREELY_BYTES or edge_bytes <= _GROW_SHARE * fresh_bytes
