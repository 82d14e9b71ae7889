"""When a device page is copied to the host tier.

| policy | when | what of the chain |
|---|---|---|
| write_through | at the first insert, and at a hit what was left out then | parents first, no gap |
| write_through_selective | at the second use, which is the first hit | parents first, no gap |
| write_back | when the device is about to evict it | the evicted pages only, never their ancestors |

A policy owns nothing and waits for nothing: whoever asks starts the copies, which own their pages until they have
landed. Under write_back that is why eviction runs ahead of need, at a watermark: one that had to wait for its copy
would stall decoding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import ceil
from typing import Final, Literal

from cache.node_table import NodeId
from cache.pages import PAGE_ID_BYTES
from cache.prefix_index import PrefixIndex

WritePolicy = Literal["write_through", "write_through_selective", "write_back"]


@dataclass(frozen=True, slots=True)
class WriteMoments:
    """The moments at which a policy looks for pages to copy."""

    at_publish: bool = False
    at_hit: bool = False
    at_eviction: bool = False


#: a page inserted once and hit once was used twice, so `selective` needs no count of uses
WRITE_MOMENTS: Final[dict[WritePolicy, WriteMoments]] = {
    "write_through": WriteMoments(at_publish=True, at_hit=True),
    "write_through_selective": WriteMoments(at_hit=True),
    "write_back": WriteMoments(at_eviction=True),
}


@dataclass(frozen=True, slots=True)
class Watermarks:
    """How far ahead of need `write_back` evicts; in pages."""

    low: int
    high: int

    @classmethod
    def of_shares(cls, low: float, high: float, num_pages: int) -> Watermarks:
        return cls(ceil(low * num_pages), ceil(high * num_pages))

    def num_to_evict(self, num_free: int, num_leaving: int) -> int:
        """Pages to evict now, when so many are free and so many will be once their copies have landed."""
        num_ready = num_free + num_leaving
        return self.high - num_ready if num_ready < self.low else 0


def backed_stop(index: PrefixIndex, node: NodeId) -> int:
    """Position in token bytes up to which the sequence that ends in `node` is in the host tier or on its way."""
    table = index.table
    above: int = node
    while above >= 0 and not table.backed[above]:
        above = table.parents[above]
    return table.starts[above] + table.backed[above] * index.page_bytes if above >= 0 else 0


def mark_backed(index: PrefixIndex, node: NodeId, stop: int) -> None:
    """Copies of the whole sequence up to `stop`, which the node's path reaches, have been made or begun."""
    table = index.table
    above: int = node
    while above >= 0:
        if table.starts[above] >= stop:
            above = table.parents[above]
            continue
        num_pages = min(len(table.pages[above]) // PAGE_ID_BYTES, (stop - table.starts[above]) // index.page_bytes)
        if table.backed[above] >= num_pages:
            return
        table.backed[above] = num_pages
        above = table.parents[above]


def mark_lost(index: PrefixIndex, node: NodeId, position: int) -> None:
    """The copy of the page at `position` failed: neither it nor what lies below it counts as backed. O(subtree)."""
    table = index.table
    top = node
    while table.starts[top] > position:
        top = NodeId(table.parents[top])
    table.backed[top] = min(table.backed[top], (position - table.starts[top]) // index.page_bytes)
    below = list(table.children[top].values())
    for child in below:
        table.backed[child] = 0
        below.extend(table.children[child].values())


def forget_backed(index: PrefixIndex) -> None:
    """The host tier is another one: nothing is backed. O(nodes)."""
    index.table.backed[:] = [0] * len(index.table.backed)


def backing_violations(index: PrefixIndex, policy: WritePolicy) -> Iterator[str]:
    """Backed-up children under parents that are not, in words: an error where parents go first, normal elsewhere.

    O(nodes). A parent whose page the tier has given up since still counts as backed: ranks are not told.
    """
    if policy == "write_back":
        return
    table = index.table
    for node, num_backed in enumerate(table.backed):
        parent = table.parents[node]
        num_pages = len(table.pages[node]) // PAGE_ID_BYTES
        if num_backed > num_pages:
            yield f"node {node} has {num_backed} pages backed up of {num_pages}"
        elif num_backed and parent >= 0 and table.backed[parent] * PAGE_ID_BYTES < len(table.pages[parent]):
            yield f"node {node} is backed up, its parent {parent} is not wholly"
