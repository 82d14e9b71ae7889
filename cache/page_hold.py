"""A request's pages, from its admission to its end."""

from __future__ import annotations

from typing import Final

import numpy as np
from numpy.typing import NDArray

from cache.fence import FencedSpan
from cache.node_table import NO_NODE, NodeId
from cache.pages import PAGE_ID_BYTES, PageIds
from cache.types import TOKEN_BYTES, Epoch, Namespace, TokenBytes, TreeGeneration


class PageHold:
    """What one admission of a request, or one copy, owns: pinned pages of the index first, then private ones.

    Read by the scheduler, changed only by the DeviceCache that opened it. A hold is fenced once a flush covered it:
    it keeps its pages, but nothing it computes is published any more (taint follows the request).
    """

    __slots__ = (
        "_page_size", "birth_s", "epoch", "first_page", "generation", "is_closed", "is_copy", "is_fenced", "namespace",
        "node", "num_cached_tokens", "num_loaded_tokens", "num_shared_pages", "opened_s", "page_table", "span",
    )  # fmt: skip

    def __init__(
        self, namespace: Namespace, first_page: TokenBytes, epoch: Epoch, generation: TreeGeneration, opened_s: float,
        page_size: int,
    ) -> None:  # fmt: skip
        self.namespace: Final = namespace
        #: the sequence's first page, or what is known of it: a prompt can be shorter. Whole once anything is pinned
        self.first_page = first_page
        #: of the admission; everything computed under this hold carries them
        self.epoch: Final = epoch
        self.generation: Final = generation
        self.opened_s: Final = opened_s
        #: no KV that is private to this hold is older; below opened_s once pages of the host tier joined it
        self.birth_s = opened_s
        #: int32, writable by nobody but us: pages of the sequence in order. Replaced on change, never changed in
        #: place, so a batch may keep a view of it.
        self.page_table: NDArray[np.int32] = NO_PAGES
        #: tokens whose KV was found at the admission; a multiple of page_size
        self.num_cached_tokens = 0
        #: tokens behind those whose KV was loaded from the host tier; a multiple of page_size
        self.num_loaded_tokens = 0
        #: entries of page_table that the index owned when they were last looked at; the rest is private
        self.num_shared_pages = 0
        #: pinned; the shared pages end in its edge. NO_NODE when there are none
        self.node: NodeId = NO_NODE
        #: in the place of `node` once fenced
        self.span: FencedSpan | None = None
        self.is_fenced = False
        self.is_closed = False
        #: of a copy to or from the host tier, not of a request: private pages are counted as copying
        self.is_copy = False
        self._page_size = page_size

    @property
    def num_tokens_capacity(self) -> int:
        """Tokens whose KV has room in the pages held."""
        return len(self.page_table) * self._page_size

    @property
    def kv_epoch(self) -> Epoch | None:
        """Lowest epoch of any KV reused, None when nothing was: the index holds one epoch at a time."""
        return self.epoch if self.num_cached_tokens or self.num_loaded_tokens else None

    @property
    def num_private_pages(self) -> int:
        return len(self.page_table) - self.num_shared_pages

    def private_pages(self) -> PageIds:
        return self.page_table[self.num_shared_pages :].tobytes()

    def replace_pages(self, *parts: PageIds | memoryview) -> None:
        """The page table becomes these parts, one after the other."""
        self.page_table = np.frombuffer(bytearray().join(parts), np.int32)

    def shared_bytes(self) -> int:
        """Length of the shared part in token bytes."""
        return self.num_shared_pages * self._page_size * TOKEN_BYTES

    def has_first_page(self, first_page: TokenBytes) -> bool:
        """True if the sequence begins with these tokens, or may come to: its prompt can be shorter than a page."""
        return self.first_page.startswith(first_page) or first_page.startswith(self.first_page)


NO_PAGES: Final[NDArray[np.int32]] = np.zeros(0, np.int32)
assert NO_PAGES.itemsize == PAGE_ID_BYTES
