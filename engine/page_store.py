"""The bytes of device pages as the host can copy them: in place on a CPU, through pinned memory elsewhere."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from cache.arena import PageView
from engine.kv_pool import KvPool

#: pinned memory of one batch; a batch costs one wait for the device, about 20 us
_STAGING_BYTES: Final = 16 * 1024 * 1024
#: a batch where nothing is staged: how much is copied before the copier looks for something more urgent
_DIRECT_BYTES: Final = 1024 * 1024
_DIRECT_PAGES: Final = 64
#: where the model computes on the cores and the memory that copies use too. At full speed writes made a step of a 20M
#: model 2.6 times as long (a bare memcpy beside it did the same), at 0.1 (0.6 GB/s) 1.3 times, at 0.05 (0.3 GB/s) 1.2
_SHARE_BESIDE_MODEL: Final = 0.05


class PageStore(Protocol):
    """Used by one thread. At most `batch_pages` pages at once; views are valid until the next call."""

    @property
    def batch_pages(self) -> int: ...

    @property
    def write_share(self) -> float:
        """Of the copier's time, how much writes may take; they are in no hurry. 1: no pauses."""
        ...

    def fetch(self, pages: NDArray[np.int32]) -> Sequence[PageView]:
        """The bytes of these pages. The caller owns the pages until it has done with the views."""
        ...

    def targets(self, pages: NDArray[np.int32]) -> Sequence[PageView]:
        """Where to write the bytes of these pages, which the caller owns."""
        ...

    def land(self, pages: NDArray[np.int32]) -> None:
        """What was written into the targets of these, the first ones, is in the pages when this returns."""
        ...


def page_store(pool: KvPool) -> PageStore:
    """The store that fits the pool's device."""
    return DirectPages(pool) if pool.pages.device.type == "cpu" else StagedPages(pool)


class DirectPages:
    """Pages in host memory: copied from and to where they lie."""

    def __init__(self, pool: KvPool) -> None:
        pages = pool.pages.view(pool.num_pages, -1).view(torch.uint8)
        self._pages: NDArray[np.uint8] = pages.numpy()
        self.batch_pages = min(max(1, _DIRECT_BYTES // pool.bytes_per_page), _DIRECT_PAGES)
        self.write_share = _SHARE_BESIDE_MODEL

    def fetch(self, pages: NDArray[np.int32]) -> Sequence[PageView]:
        return [self._pages[page] for page in pages]

    def targets(self, pages: NDArray[np.int32]) -> Sequence[PageView]:
        return self.fetch(pages)

    def land(self, pages: NDArray[np.int32]) -> None:
        """They are there."""


class StagedPages:
    """Pages on an accelerator: copied on a stream of their own, beside the model's, through pinned memory.

    What is hashed is the staging buffer, which nobody else writes (hole H13). Source pages are complete: the engine
    publishes a page only after the step that computed it has returned its tokens.
    """

    def __init__(self, pool: KvPool) -> None:
        self._pool = pool
        self._module = torch.get_device_module(pool.pages.device)
        self._stream = self._module.Stream(device=pool.pages.device)
        self.batch_pages = max(1, _STAGING_BYTES // pool.bytes_per_page)
        self.write_share = 1.0
        staging = torch.empty((self.batch_pages, pool.bytes_per_page), dtype=torch.uint8, pin_memory=True)
        self._staging = staging
        self._views: NDArray[np.uint8] = staging.numpy()

    def fetch(self, pages: NDArray[np.int32]) -> Sequence[PageView]:
        with self._module.stream(self._stream):
            for row, page in enumerate(pages.tolist()):
                self._staging[row].copy_(self._pool.page_bytes(page), non_blocking=True)
        self._stream.synchronize()
        return list(self._views[: len(pages)])

    def targets(self, pages: NDArray[np.int32]) -> Sequence[PageView]:
        return list(self._views[: len(pages)])

    def land(self, pages: NDArray[np.int32]) -> None:
        with self._module.stream(self._stream):
            for row, page in enumerate(pages.tolist()):
                self._pool.page_bytes(page).copy_(self._staging[row], non_blocking=True)
        self._stream.synchronize()
