"""Every rule of the device tier that can be looked up after the fact. Reads all, changes nothing, returns words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import numpy as np

from cache.fence import FencedSpan
from cache.node_table import NO_CHILDREN, NodeId
from cache.pages import PAGE_ID_BYTES
from cache.prefix_index import PrefixIndex

if TYPE_CHECKING:
    from cache.device_cache import DeviceCache


def violations(cache: DeviceCache) -> list[str]:
    """What is wrong with the cache, in words; empty when sound. O(pages)."""
    index = cache.index
    return [*_page_owners(cache), *_tree(index), *_totals(index), *_pins(cache), *_queue(index), *_holds(cache)]


def _page_owners(cache: DeviceCache) -> Iterator[str]:
    """Each page has exactly one state, and the counters say how many are in which."""
    index = cache.index
    spans = _spans(cache)
    private = [hold.private_pages() for hold in cache.holds]
    live = list(_live_nodes(index))
    detached = list(_detached_nodes(index))
    cached = [index.table.pages[node] for node in live]
    pending = [index.table.pages[node] for node in detached]
    free = cache.pool.free_pages()
    owned = np.frombuffer(b"".join(private + [span.pages for span in spans] + cached + pending), np.int32)
    every_page = np.concatenate((free, owned))
    uses = np.bincount(every_page, minlength=cache.num_pages)
    if len(uses) > cache.num_pages or (uses != 1).any():
        yield f"pages without exactly one state: {np.flatnonzero(uses != 1)[:8].tolist()}"
    counts = cache.counts()
    num_pinned = sum(len(index.table.pages[node]) for node in live if index.table.owners[node]) // PAGE_ID_BYTES
    num_fenced = sum(span.num_pages for span in spans) + _num_private(cache, is_fenced=True)
    seen = (len(free) + sum(map(len, pending)) // PAGE_ID_BYTES, num_pinned, _num_private(cache, False), num_fenced)
    if seen != (counts.free, counts.pinned, counts.private, counts.fenced):
        yield f"(free, pinned, private, fenced) are {seen}, counted as {counts}"
    if len(free) != cache.pool.num_free:
        yield f"{len(free)} free pages, counted as {cache.pool.num_free}"
    total = counts.free + counts.cached + counts.pinned + counts.private + counts.fenced
    if total != cache.num_pages:
        yield f"states sum to {total} of {cache.num_pages} pages"


def _tree(index: PrefixIndex) -> Iterator[str]:
    """Links, edges and positions agree."""
    table = index.table
    for links, parent, start in _all_links(index):
        for first_page, node in links.items():
            edge = table.edges[node]
            if not edge or len(edge) % index.page_bytes or edge[: index.page_bytes] != first_page:
                yield f"node {node}: its edge does not begin with the page that leads to it"
            if len(table.pages[node]) * index.page_bytes != len(edge) * PAGE_ID_BYTES:
                yield f"node {node}: {len(edge)} token bytes in {len(table.pages[node])} page bytes"
            if table.starts[node] != start or (table.parents[node] != parent if parent >= 0 else False):
                yield f"node {node}: parent {table.parents[node]} at {table.starts[node]}, not {parent} at {start}"
    if NO_CHILDREN:
        yield "the shared empty dict of leaves was written to"


def _totals(index: PrefixIndex) -> Iterator[str]:
    """Pages per stem, namespace and index are what the nodes hold."""
    table, total = index.table, 0
    for namespace, space in index.spaces.items():
        if not space.tops:
            yield f"namespace {namespace!r} is empty but kept"
        in_space = 0
        for top in space.tops.values():
            stem = index.stem_of(top)
            num_pages = sum(len(table.pages[node]) for node in _subtree(index, top)) // PAGE_ID_BYTES
            if index.stems.num_pages[stem] != num_pages or index.stems.namespaces[stem] != namespace:
                yield f"stem {stem} of {namespace!r}: {num_pages} pages, counted as {index.stems.num_pages[stem]}"
            in_space += num_pages
        if space.num_pages != in_space:
            yield f"namespace {namespace!r}: {in_space} pages, counted as {space.num_pages}"
        total += in_space
    if index.num_pages != total:
        yield f"{total} cached pages, counted as {index.num_pages}"
    num_rows = len(list(_live_nodes(index))) + len(list(_detached_nodes(index)))
    if not num_rows <= len(table) <= num_rows + len(index.queue):
        yield f"{len(table)} rows in use for {num_rows} nodes"


def _pins(cache: DeviceCache) -> Iterator[str]:
    """A node's owners are the holds that pin it and its children with owners."""
    index = cache.index
    pins: dict[int, int] = {}
    for hold in cache.holds:
        if hold.node >= 0:
            pins[hold.node] = pins.get(hold.node, 0) + 1
    for node in _live_nodes(index):
        above = [child for child in index.table.children[node].values() if index.table.owners[child]]
        expected = pins.pop(node, 0) + len(above)
        if index.table.owners[node] != expected:
            yield f"node {node}: {index.table.owners[node]} owners, should be {expected}"
    if pins:
        yield f"pinned nodes {sorted(pins)} are not in the index"


def _queue(index: PrefixIndex) -> Iterator[str]:
    """Whatever is evictable can be found."""
    table = index.table
    entries = index.queue.nodes()
    if len(entries) != len(set(entries)):
        yield "a node has two entries in the eviction queue"
    if set(entries) != {node for node in range(len(table.edges)) if table.is_queued[node]}:
        yield "the eviction queue and the nodes' marks differ"
    for node in _live_nodes(index):
        if not (table.children[node] or table.owners[node] or table.is_queued[node]):
            yield f"node {node} is an evictable leaf without an entry in the eviction queue"


def _holds(cache: DeviceCache) -> Iterator[str]:
    """Holds point at their own pages, and no fenced hold has a way back into the index."""
    for hold in cache.holds:
        if hold.is_closed:
            yield "a closed hold is among the open ones"
        if hold.generation != cache.generation and not hold.is_fenced:
            yield "a hold of an earlier generation is not fenced"
        if hold.is_fenced:
            if hold.node >= 0:
                yield "a fenced hold pins the index"
            continue
        if hold.epoch != cache.epoch or hold.span is not None:
            yield "a hold that may publish is of another epoch, or owns fenced pages"
        if hold.num_shared_pages:
            yield from _shared_part(cache.index, hold.node, hold.page_table, hold.num_shared_pages)


def _shared_part(index: PrefixIndex, node: NodeId, table: np.ndarray, num_shared: int) -> Iterator[str]:
    stop = num_shared * index.page_bytes
    if not index.table.starts[node] < index.table.end(node) >= stop:
        yield f"a hold shares {num_shared} pages; its node {node} ends before"
    if index.path_pages(node, stop) != table[:num_shared].tobytes():
        yield f"the shared pages of a hold are not those of its node {node}"


def _num_private(cache: DeviceCache, is_fenced: bool) -> int:
    return sum(hold.num_private_pages for hold in cache.holds if hold.is_fenced == is_fenced)


def _spans(cache: DeviceCache) -> list[FencedSpan]:
    found: dict[int, FencedSpan] = {}
    for hold in cache.holds:
        span = hold.span
        while span is not None:
            found[id(span)] = span
            span = span.above
    return list(found.values())


def _subtree(index: PrefixIndex, node: NodeId) -> Iterator[NodeId]:
    waiting = [node]
    while waiting:
        node = waiting.pop()
        yield node
        waiting.extend(index.table.children[node].values())


def _live_nodes(index: PrefixIndex) -> Iterator[NodeId]:
    for _, _, top in index.iter_tops():
        yield from _subtree(index, top)


def _detached_nodes(index: PrefixIndex) -> Iterator[NodeId]:
    for links in index.detached:
        for node in links.values():
            yield from _subtree(index, node)


def _all_links(index: PrefixIndex) -> Iterator[tuple[dict[bytes, NodeId], int, int]]:
    for space in index.spaces.values():
        yield space.tops, -1, 0
    for node in _live_nodes(index):
        yield index.table.children[node], node, index.table.end(node)
