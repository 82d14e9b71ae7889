"""The KV pool: where a token's key lies, and that a page is one block of bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from configs.errors import ConfigError
from engine.kv_pool import KvPool

CPU = torch.device("cpu")


def pool_of(dtype: torch.dtype = torch.float32) -> KvPool:
    return KvPool(num_pages=6, page_size=4, num_layers=3, num_kv_heads=2, head_dim=8, dtype=dtype, device=CPU)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_page_bytes_are_the_page(dtype: torch.dtype) -> None:
    pool = pool_of(dtype)
    pool.pages.copy_(torch.randn(pool.pages.shape))
    before = pool.pages.clone()
    raw = pool.page_bytes(4)

    assert raw.shape == (pool.bytes_per_page,) == (3 * 2 * 4 * 2 * 8 * dtype.itemsize,)
    assert raw.numpy().tobytes() == before[4].contiguous().view(torch.uint8).numpy().tobytes()
    pool.page_bytes(1).numpy()[:] = raw.numpy()
    assert torch.equal(pool.pages[1], before[4])
    untouched = [0, 2, 3, 4, 5]
    assert torch.equal(pool.pages[untouched], before[untouched])


@pytest.mark.parametrize("page_id", [-1, 6])
def test_a_page_outside_the_pool(page_id: int) -> None:
    with pytest.raises(IndexError):
        pool_of().page_bytes(page_id)


def test_rows_name_the_places_they_say() -> None:
    pool = pool_of()
    pool.pages.copy_(torch.arange(pool.pages.numel()).view(pool.pages.shape))
    pages, slots = np.array([5, 0, 3], np.int32), np.array([3, 0, 2], np.int32)
    for layer in range(3):
        for kv in range(2):
            slot_rows = torch.from_numpy(pool.slot_rows(pages, slots) + (2 * layer + kv) * pool.page_size)
            block_rows = torch.from_numpy(pool.block_rows(pages) + 2 * layer + kv)
            assert torch.equal(pool.slots[slot_rows], pool.pages[pages, layer, kv, slots])
            assert torch.equal(pool.blocks[block_rows], pool.pages[pages, layer, kv])


def test_clear_zeroes_only_these_pages() -> None:
    pool = pool_of()
    pool.pages.fill_(torch.nan)
    pool.clear(torch.tensor([2, 5]))

    assert (pool.pages[[2, 5]] == 0).all()
    assert pool.pages[[0, 1, 3, 4]].isnan().all()


def test_a_pool_that_does_not_fit() -> None:
    with pytest.raises(ConfigError, match=r"GiB.*engine\.num_pages"):
        KvPool(2**40, 16, 32, 8, 128, torch.float32, CPU)
