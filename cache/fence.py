"""Fenced pages: shared pages that a flush took out of the index while requests were still computing on them.

They are never matched, published or handed out again; they go back to the pool exactly when their last owner ends.
"""

from __future__ import annotations

from cache.node_table import NodeId
from cache.pages import PAGE_ID_BYTES, PageIds
from cache.prefix_index import PrefixIndex
from cache.stems import StemId


class FencedSpan:
    """The pages of one former node and how many own them: holds that pinned it + spans below it."""

    __slots__ = ("above", "num_owners", "pages")

    def __init__(self, pages: PageIds) -> None:
        self.pages = pages
        self.num_owners = 0
        self.above: FencedSpan | None = None

    @property
    def num_pages(self) -> int:
        return len(self.pages) // PAGE_ID_BYTES


def fence_path(index: PrefixIndex, node: NodeId, spans: dict[NodeId, FencedSpan]) -> FencedSpan:
    """Move the pages of a pinned node and all above it out of the index; the caller owns the span returned.

    spans: what was fenced by the same flush already; extended. A node that several holds pin is moved once.
    O(nodes on the path).
    """
    stem = index.stem_of(node)
    bottom = span = _span_of(index, node, stem, spans)
    bottom.num_owners += 1
    above = index.table.parents[node]
    while span.num_owners == 1 and above >= 0:  # more owners: everything above is counted already
        span.above = _span_of(index, NodeId(above), stem, spans)
        span = span.above
        span.num_owners += 1
        above = index.table.parents[above]
    return bottom


def _span_of(index: PrefixIndex, node: NodeId, stem: StemId, spans: dict[NodeId, FencedSpan]) -> FencedSpan:
    span = spans.get(node)
    if span is None:
        span = spans[node] = FencedSpan(index.take_pages(node, stem))
    return span


def num_pinned_by(index: PrefixIndex, nodes: list[NodeId]) -> int:
    """Pages of these pinned nodes and of all above them, each once: what fencing them would take out of the index."""
    table, seen = index.table, set[int]()
    for node in nodes:
        above: int = node
        while above >= 0 and above not in seen:
            seen.add(above)
            above = table.parents[above]
    return sum(len(table.pages[node]) for node in seen) // PAGE_ID_BYTES


def release_span(span: FencedSpan | None) -> list[PageIds]:
    """Give up one ownership; returns the pages that nobody owns any more."""
    out: list[PageIds] = []
    while span is not None:
        span.num_owners -= 1
        if span.num_owners:
            break
        out.append(span.pages)
        span = span.above
    return out


def carried_pages(spans: list[FencedSpan]) -> list[PageIds]:
    """Pages of these spans and of all above them, each once."""
    out: list[PageIds] = []
    seen: set[int] = set()
    for bottom in spans:
        span: FencedSpan | None = bottom
        while span is not None and id(span) not in seen:
            seen.add(id(span))
            out.append(span.pages)
            span = span.above
    return out
