"""Every rule of the device tier that can be looked up after the fact. Reads all, changes nothing, returns words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from cache.fence import FencedSpan
from cache.node_table import NO_CHILDREN, NodeId
from cache.pages import PAGE_ID_BYTES, PageIds
from cache.prefix_index import PrefixIndex

if TYPE_CHECKING:
    from cache.device_cache import DeviceCache
    from cache.page_hold import PageHold


@dataclass(frozen=True, slots=True)
class _View:
    """The cache as read once."""

    cache: DeviceCache
    index: PrefixIndex
    #: nodes that can be matched, parents before children
    live: list[NodeId]
    #: nodes of dropped stems
    dropped: list[NodeId]
    spans: list[FencedSpan]

    def pages_of(self, nodes: list[NodeId]) -> list[PageIds]:
        return list(map(self.index.table.pages.__getitem__, nodes))


def violations(cache: DeviceCache) -> list[str]:
    """What is wrong with the cache, in words; empty when sound. O(pages)."""
    index = cache.index
    live = _subtrees(index, [top for _, top in index.tops()])
    view = _View(cache, index, live, _subtrees(index, _dropped_tops(index)), _spans(cache))
    checks = (_page_states, _counts, _tree, _stems, _pins, _queue, _holds)
    return [violation for check in checks for violation in check(view)]


def _page_states(view: _View) -> Iterator[str]:
    """Each page has exactly one state."""
    cache = view.cache
    parts = [hold.private_pages() for hold in cache.holds] + [span.pages for span in view.spans]
    parts += view.pages_of(view.live) + view.pages_of(view.dropped)
    free = cache.pool.free_pages()
    uses = np.bincount(np.concatenate((free, np.frombuffer(b"".join(parts), np.int32))), minlength=cache.num_pages)
    if len(uses) > cache.num_pages or (uses != 1).any():
        yield f"pages without exactly one state: {np.flatnonzero(uses != 1)[:8].tolist()}"
    if len(free) != cache.pool.num_free:
        yield f"{len(free)} free pages, counted as {cache.pool.num_free}"


def _counts(view: _View) -> Iterator[str]:
    """The counters say how many pages are in which state."""
    cache, index, counts = view.cache, view.index, view.cache.counts()
    pinned = [node for node in view.live if index.table.owners[node]]
    found = {
        "free": cache.pool.num_free + _num_pages(view.pages_of(view.dropped)),
        "cached": _num_pages(view.pages_of(view.live)) - _num_pages(view.pages_of(pinned)),
        "pinned": _num_pages(view.pages_of(pinned)),
        "copying": sum(hold.num_private_pages for hold in cache.holds if hold.is_copy),
        "private": sum(hold.num_private_pages for hold in cache.holds if not (hold.is_fenced or hold.is_copy)),
        "fenced": sum(hold.num_private_pages for hold in cache.holds if hold.is_fenced and not hold.is_copy)
        + _num_pages([span.pages for span in view.spans]),
    }
    for state, num_pages in found.items():
        if getattr(counts, state) != num_pages:
            yield f"{num_pages} {state} pages, counted as {getattr(counts, state)}"
    if sum(found.values()) != cache.num_pages:
        yield f"states sum to {sum(found.values())} of {cache.num_pages} pages"


def _tree(view: _View) -> Iterator[str]:
    """Links, edges and positions agree."""
    index, table = view.index, view.index.table
    tokens_per_page = index.page_bytes // PAGE_ID_BYTES
    for node in view.live:
        edge, parent = table.edges[node], table.parents[node]
        links = table.children[parent] if parent >= 0 else index.stems.spaces[~parent].tops
        if not edge or links.get(edge[: index.page_bytes]) != node:
            yield f"node {node}: the page that leads to it is not its first"
        if len(table.pages[node]) * tokens_per_page != len(edge):
            yield f"node {node}: {len(edge)} token bytes in {len(table.pages[node])} page bytes"
        if table.starts[node] != (table.end(NodeId(parent)) if parent >= 0 else 0):
            yield f"node {node}: begins at {table.starts[node]}, not where its parent {parent} ends"
    if NO_CHILDREN:
        yield "the shared empty dict of leaves was written to"
    num_nodes = len(view.live) + len(view.dropped)
    if len(table) != num_nodes:
        yield f"{len(table)} rows in use for {num_nodes} nodes"


def _stems(view: _View) -> Iterator[str]:
    """Pages of a stem are what its nodes hold."""
    index, found = view.index, Counter[int]()
    stem_of: dict[int, int] = {}
    for node in view.live:
        parent = index.table.parents[node]
        stem_of[node] = stem = ~parent if parent < 0 else stem_of[parent]
        found[stem] += len(index.table.pages[node]) // PAGE_ID_BYTES
    counted = {stem: num_pages for stem, num_pages in enumerate(index.stems.num_pages) if num_pages}
    if found != counted:
        wrong = sorted(stem for stem in found.keys() | counted.keys() if found[stem] != counted.get(stem))
        yield f"pages of stems {wrong[:8]} are miscounted"
    if index.num_pages != found.total():
        yield f"{found.total()} pages in the index, counted as {index.num_pages}"
    for namespace, space in index.spaces.items():
        if not space.tops or space.namespace != namespace:
            yield f"namespace {namespace!r} is empty but kept, or under another's name"


def _pins(view: _View) -> Iterator[str]:
    """A node's owners are the holds that pin it and its children with owners."""
    table = view.index.table
    owners = Counter[int](hold.node for hold in view.cache.holds if hold.node >= 0)
    for node in reversed(view.live):  # children before parents
        if table.owners[node] != owners[node]:
            yield f"node {node}: {table.owners[node]} owners, should be {owners[node]}"
        if table.owners[node]:
            owners[table.parents[node]] += 1
    if pinned_elsewhere := owners.keys() - set(view.live) - {parent for parent in owners if parent < 0}:
        yield f"pinned nodes {sorted(pinned_elsewhere)[:8]} are not in the index"


def _queue(view: _View) -> Iterator[str]:
    """Whatever is evictable can be found."""
    table, entries = view.index.table, view.index.queue.nodes()
    if len(entries) != len(set(entries)):
        yield "a node is twice in the eviction queue"
    if set(entries) != {node for node, is_queued in enumerate(table.is_queued) if is_queued}:
        yield "the eviction queue and the nodes' marks differ"
    live = set(view.live)
    used = [table.used[n] for n in entries if n in live and not (table.owners[n] or table.children[n])]
    if used != sorted(used):
        yield "the eviction queue is not in order of use"
    for node in view.live:
        if not (table.children[node] or table.owners[node] or table.is_queued[node]):
            yield f"node {node} is an evictable leaf without an entry in the eviction queue"


def _holds(view: _View) -> Iterator[str]:
    """Holds point at their own pages, and no fenced hold has a way back into the index."""
    cache = view.cache
    for hold in cache.holds:
        if hold.is_closed:
            yield "a closed hold is among the open ones"
        if hold.is_fenced:
            if hold.node >= 0:
                yield "a fenced hold pins the index"
        elif hold.generation != cache.generation or hold.epoch != cache.epoch or hold.span is not None:
            yield "a hold of another generation or epoch, or of fenced pages, is not fenced"
        elif hold.num_shared_pages:
            yield from _shared_part(view.index, hold)


def _shared_part(index: PrefixIndex, hold: PageHold) -> Iterator[str]:
    stop = hold.shared_bytes()
    if hold.node < 0 or index.table.end(hold.node) < stop:
        yield f"a hold shares {hold.num_shared_pages} pages; its node {hold.node} ends before"
    elif index.path_pages(hold.node, stop) != hold.page_table[: hold.num_shared_pages].tobytes():
        yield f"the shared pages of a hold are not those of its node {hold.node}"
    elif index.birth_of(hold.node) > hold.birth_s:
        yield f"node {hold.node} is pinned by an older hold than its stem's birth tells"


def _num_pages(parts: list[PageIds]) -> int:
    return sum(map(len, parts)) // PAGE_ID_BYTES


def _spans(cache: DeviceCache) -> list[FencedSpan]:
    found: dict[int, FencedSpan] = {}
    for hold in cache.holds:
        span = hold.span
        while span is not None and id(span) not in found:
            found[id(span)] = span
            span = span.above
    return list(found.values())


def _subtrees(index: PrefixIndex, nodes: list[NodeId]) -> list[NodeId]:
    """These nodes and all below them, parents before children. `nodes` is extended and returned."""
    children = index.table.children
    for node in nodes:
        if children[node]:
            nodes.extend(children[node].values())
    return nodes


def _dropped_tops(index: PrefixIndex) -> list[NodeId]:
    """First nodes of everything dropped: unlinked ones, and those that are linked still."""
    stems = index.stems
    linked = [top for space in index.spaces.values() for top in space.tops.values()]
    return [node for links in index.dropped.unlinked for node in links.values()] + [
        top for top in linked if stems.is_dropped(index.stem_of(top))
    ]
