"""When a device page is copied to the host tier: three policies, each a function of one frozen view.

| policy | when | what of the chain |
|---|---|---|
| write_through | at the first insert | parents first, no gap |
| write_through_selective | at the second hit | parents first, no gap |
| write_back | when the device is about to evict | the evicted pages only, never their ancestors |

They own nothing and wait for nothing. What they choose is started by the caller, who owns a page until its copy has
landed; under write_back that is why they run ahead of need, at a watermark: an eviction that had to wait for its copy
would stall decoding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from cache.types import PageId

WritePolicy = Literal["write_through", "write_through_selective", "write_back"]

#: landed: the tier has committed it.  moving: a copy is under way.  none: neither.
Backing = Literal["none", "moving", "landed"]

#: hits at which `write_through_selective` copies a page: one used once is never copied
SELECTIVE_HITS: Final = 2


@dataclass(frozen=True, slots=True)
class CachedPage:
    """A page of the device's prefix index, as a policy sees it."""

    page_id: PageId
    #: of the request's chain; None: the page begins a sequence
    parent: PageId | None
    #: requests that inserted or matched it
    num_hits: int
    backing: Backing


@dataclass(frozen=True, slots=True)
class WriteView:
    """What a policy may look at. All counts are pages."""

    #: chains that were inserted or hit in this step; in each, parents first
    chains: Sequence[Sequence[CachedPage]]
    #: pages the device would evict next, coldest first; children before their parents
    victims: Sequence[CachedPage]
    #: device pages that nobody uses, and the watermark below which eviction runs ahead
    num_free: int
    low_watermark: int
    #: copies that may be started now: what bytes in flight and leased slots still allow
    num_startable: int


@dataclass(frozen=True, slots=True)
class WriteChoice:
    """What to do now. Every page named is in the view."""

    #: start these copies, in this order
    writes: tuple[PageId, ...] = ()
    #: give these up without a copy, because the host cannot take them in time; count them as `host_full`
    drops: tuple[PageId, ...] = ()


def write_through(view: WriteView) -> WriteChoice:
    """Copy every page at its first insert."""
    return _write_chains(view, num_hits=1)


def write_through_selective(view: WriteView) -> WriteChoice:
    """Copy a page once it was used twice."""
    return _write_chains(view, num_hits=SELECTIVE_HITS)


def write_back(view: WriteView) -> WriteChoice:
    """Copy what the device is about to evict, until free pages and those it can evict at once reach the watermark.

    A victim that is moving counts as one that can be evicted soon. When no copy can be started and not even a quarter
    of the watermark is free, the rest is dropped: the next prefill must find room now.
    """
    num_ready = view.num_free + sum(page.backing != "none" for page in view.victims)
    unbacked = [page.page_id for page in view.victims if page.backing == "none"]
    wanted = unbacked[: max(0, view.low_watermark - num_ready)]
    writes, rest = wanted[: view.num_startable], wanted[view.num_startable :]
    is_short = view.num_free < view.low_watermark // 4
    return WriteChoice(tuple(writes), tuple(rest) if is_short else ())


WRITE_POLICIES: Final[Mapping[WritePolicy, Callable[[WriteView], WriteChoice]]] = {
    "write_through": write_through,
    "write_through_selective": write_through_selective,
    "write_back": write_back,
}


def _write_chains(view: WriteView, num_hits: int) -> WriteChoice:
    """The un-backed pages of each chain up to the first that is not hot enough: no child goes before its parent."""
    chosen: dict[PageId, None] = {}
    for chain in view.chains:
        for page in chain:
            if page.num_hits < num_hits or len(chosen) == view.num_startable:
                break
            if page.backing == "none":
                chosen[page.page_id] = None
    return WriteChoice(tuple(chosen))


def backing_violations(pages: Sequence[CachedPage], policy: WritePolicy) -> list[str]:
    """Backed-up children under parents that are not, in words: an error where parents go first, normal elsewhere.

    pages: of the whole index; a parent outside it was evicted and is not looked at.
    """
    if policy == "write_back":
        return []
    return list(_orphans({page.page_id: page for page in pages}))


def _orphans(pages: Mapping[PageId, CachedPage]) -> Iterator[str]:
    for page in pages.values():
        parent = None if page.parent is None else pages.get(page.parent)
        if parent is not None and page.backing != "none" and parent.backing == "none":
            yield f"page {page.page_id} is backed up ({page.backing}), its parent {parent.page_id} is not"
