"""The KV of all pages, in one page-first tensor.

Legend: P pages, L layers, S page_size in tokens, H KV heads, D head_dim; the axis of 2 is key, value.
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from configs.errors import ConfigError


class KvPool:
    """Page-first storage `[P, L, 2, S, H, D]`: one page is one contiguous block.

    So a copy of a page to or from the host is one memcpy (0.96-1.02 of memcpy measured, 0.27-0.36 for per-layer
    indexing), and attention gathers the same `S*H*D` blocks that it would from a layer-first pool
    (benchmarks/kv_layout_bench.py measures both).

    The pool knows nothing of who owns a page. Written by the runner during a step, by page copies between steps.
    """

    __slots__ = ("_blocks", "_slots", "num_pages", "page_size", "pages")

    def __init__(
        self,
        num_pages: int,
        page_size: int,
        num_layers: int,
        num_kv_heads: int,
        head_dim: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        shape = (num_pages, num_layers, 2, page_size, num_kv_heads, head_dim)
        try:
            #: [P, L, 2, S, H, D]
            self.pages: Tensor = torch.zeros(shape, dtype=dtype, device=device)
        except RuntimeError as error:  # torch's own out-of-memory errors are RuntimeErrors too
            nbytes = int(np.prod(shape)) * dtype.itemsize
            raise ConfigError(
                f"no room for {num_pages} KV pages ({nbytes / 2**30:.2f} GiB) on {device} "
                "(engine.num_pages or engine.kv_memory_gb: less)"
            ) from error
        self.num_pages = num_pages
        self.page_size = page_size
        self._blocks = self.pages.view(num_pages * num_layers * 2, page_size, num_kv_heads, head_dim)
        self._slots = self.pages.view(num_pages * num_layers * 2 * page_size, num_kv_heads, head_dim)

    @property
    def bytes_per_page(self) -> int:
        return self.pages[0].numel() * self.pages.element_size()

    @property
    def blocks(self) -> Tensor:
        """View `[P*L*2, S, H, D]`; `block_rows` says which rows."""
        return self._blocks

    @property
    def slots(self) -> Tensor:
        """View `[P*L*2*S, H, D]`; `slot_rows` says which rows."""
        return self._slots

    def block_rows(self, page_ids: NDArray[np.int32]) -> NDArray[np.int64]:
        """Rows of `blocks` that hold layer 0's keys of the pages; layer l's values are at `+ 2*l + 1`. Any shape."""
        return page_ids.astype(np.int64) * (2 * self.pages.shape[1])

    def slot_rows(self, page_ids: NDArray[np.int32], slots: NDArray[np.int32]) -> NDArray[np.int64]:
        """Rows of `slots` that hold layer 0's keys; layer l's values are at `+ (2*l + 1) * S`. Any shape."""
        return self.block_rows(page_ids) * self.page_size + slots

    def page_bytes(self, page_id: int) -> Tensor:
        """The raw bytes of one page: uint8 view `[bytes_per_page]` on the pool's device, writable, no copy.

        The caller owns the page, and holds it until its copy has ended. On the CPU `.numpy()` of it is zero-copy.
        """
        if not 0 <= page_id < self.num_pages:
            raise IndexError(f"page {page_id} of a pool of {self.num_pages}")
        return self.pages[page_id].view(-1).view(torch.uint8)

    def clear(self, page_ids: Tensor) -> None:
        """Zero the pages. page_ids: int64 [n] on the pool's device."""
        self.pages.index_fill_(0, page_ids, 0)
