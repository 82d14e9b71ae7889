"""Page-first against layer-first KV pool: what attention gathers and writes, and a page's copy to the host.

    python -m benchmarks.kv_layout_bench

Sizes of an 8B model's layer in bfloat16 (8 KV heads of 128) with 16-token pages, pages in random order. Gather: K and V
of 8 rows of 1,024 tokens of one layer, four rows at a time as the engine does. Write: one token of 32 rows of one
layer. Copy: 32 pages, all layers, into a page-first host arena.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from benchmarks.harness import Figures, alternate, report, time_us

PAGES, LAYERS, PAGE_SIZE, HEADS, HEAD_DIM = 1024, 8, 16, 8, 128
ROWS, PAGES_PER_ROW, ROWS_PER_GATHER, WRITES = 8, 64, 4, 32
LAYER = 3
DTYPE = torch.bfloat16


def main() -> None:
    torch.set_num_threads(1)
    rng = np.random.default_rng(0)
    tables = torch.from_numpy(rng.permutation(PAGES)[: ROWS * PAGES_PER_ROW]).view(-1, ROWS_PER_GATHER * PAGES_PER_ROW)
    written = torch.from_numpy(rng.permutation(PAGES)[:WRITES])
    page_first = torch.zeros(PAGES, LAYERS, 2, PAGE_SIZE, HEADS, HEAD_DIM, dtype=DTYPE)
    layer_first = torch.zeros(LAYERS, 2, PAGES, PAGE_SIZE, HEADS, HEAD_DIM, dtype=DTYPE)
    pools = {
        "page-first": (page_first, lambda page, kv: (page * LAYERS + LAYER) * 2 + kv),
        "layer-first": (layer_first, lambda page, kv: (LAYER * 2 + kv) * PAGES + page),
    }
    operations = {name: _operations(name, pool, block_of, tables, written) for name, (pool, block_of) in pools.items()}

    def measure() -> Figures:
        return time_us(
            {f"{name} {what}_us": run for name, runs in operations.items() for what, run in runs.items()},
            num_calls=1,
            num_rounds=51,
        )

    with torch.inference_mode():
        report("KV layout, 1 thread", alternate({"": measure}))


def _operations(
    name: str, pool: Tensor, block_of: Callable[[Tensor, int], Tensor], tables: Tensor, written: Tensor
) -> dict[str, Callable[[], None]]:
    blocks, slots = pool.view(-1, PAGE_SIZE, HEADS, HEAD_DIM), pool.view(-1, HEADS, HEAD_DIM)
    gathers = [torch.cat([block_of(group, 0), block_of(group, 1)]) for group in tables]
    scratch = torch.empty(len(gathers[0]), PAGE_SIZE, HEADS, HEAD_DIM, dtype=DTYPE)
    key_slots, value_slots = (block_of(written, kv) * PAGE_SIZE + 5 for kv in (0, 1))
    token = torch.ones(WRITES, HEADS, HEAD_DIM, dtype=DTYPE)
    source = pool.view(torch.int16).numpy()
    arena = np.zeros((64, LAYERS, 2, PAGE_SIZE, HEADS, HEAD_DIM), np.int16)

    def gather() -> None:
        for rows in gathers:
            torch.index_select(blocks, 0, rows, out=scratch)

    def write() -> None:
        slots.index_copy_(0, key_slots, token)
        slots.index_copy_(0, value_slots, token)

    def copy() -> None:
        for slot, page in enumerate(written.tolist()):
            arena[slot] = source[page] if name == "page-first" else source[:, :, page]

    return {"gather": gather, "write": write, "copy": copy}


if __name__ == "__main__":
    main()
