"""From page tables to index tensors: what attention reads and writes in one step, worked out once for all layers.

Legend: T tokens of the step, B decode rows of a group, N pages a row, S page_size, C = N*S padded context, L layers,
Q query tokens of a block, K key tokens it sees, R query heads per KV head.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.batch import Batch
from engine.kv_pool import KvPool

#: a prefill chunk with a past is attended in blocks of so many queries: bounds the mask, and spares the keys
#: that a whole block may not see
QUERY_BLOCK = 256
#: a decode row joins a group only if it fills at least this part of the group's padded context
MIN_FILL = 0.75
#: gathered KV of one group, in bytes. On a CPU it must stay in the cache between gather and attention: at 1,008 tokens
#: of context 8 rows take 1.8 ms a layer in groups of 4-8 MiB, 2.8 in one of 16; 32 rows 6.9 and 13.9 (AMD EPYC, 32 MiB
#: L3). Elsewhere it only bounds the scratch
MAX_GATHER_BYTES = {"cpu": 4 * 2**20}
MAX_GATHER_BYTES_ELSEWHERE = 512 * 2**20


@dataclass(frozen=True, slots=True)
class DecodeGroup:
    """Rows of one query token each, gathered into one padded batch."""

    #: their places in the ragged row: a slice where they stand side by side, else int64 [B]
    tokens: slice | Tensor
    #: int64 [2*B*N], rows of `pool.blocks` of layer 0: the keys' of all rows, then the values'
    blocks: Tensor
    num_rows: int
    #: C
    context: int
    #: additive [B, 1, 1, C], None when no row is padded
    mask: Tensor | None


@dataclass(frozen=True, slots=True)
class PrefillRow:
    """One row of several query tokens, `[start, end)` of the ragged row."""

    start: int
    end: int
    #: int64 [2*N]: rows of `pool.blocks` of layer 0, keys' then values'; None when the row has no past
    blocks: Tensor | None
    #: per block of QUERY_BLOCK queries: additive [R*Q, K]
    masks: list[Tensor]


@dataclass(frozen=True, slots=True)
class AttentionPlan:
    #: int64 [L, 2, T]: rows of `pool.slots` that take each token's key and value
    writes: Tensor
    groups: list[DecodeGroup]
    prefills: list[PrefillRow]
    #: int64 [n]: pages that this step begins and leaves part-filled. They must be zeroed first: a padded gather reads
    #: their unwritten slots under a mask of -inf, and 0 * NaN is NaN, so what an earlier owner left there must be
    #: finite, whatever that owner computed. None when there is no such page
    begun_pages: Tensor | None


def plan_attention(pool: KvPool, batch: Batch, queries_per_kv: int) -> AttentionPlan:
    """The plan of one step; reads page tables, never KV."""
    planner = _Planner(pool, batch, queries_per_kv)
    return AttentionPlan(planner.writes(), planner.decode_groups(), planner.prefill_rows(), planner.begun_pages())


class _Planner:
    def __init__(self, pool: KvPool, batch: Batch, queries_per_kv: int) -> None:
        self._pool = pool
        self._batch = batch
        self._queries_per_kv = queries_per_kv
        self._starts = np.cumsum(batch.q_lens) - batch.q_lens
        self._num_past = batch.kv_lens - batch.q_lens
        self._num_pages = -(-batch.kv_lens // pool.page_size)
        #: all page tables end to end, and where each row's begins
        self._pages = np.concatenate(batch.page_tables)
        widths = np.array([len(table) for table in batch.page_tables])
        self._offsets = np.cumsum(widths) - widths
        max_bytes = MAX_GATHER_BYTES.get(pool.pages.device.type, MAX_GATHER_BYTES_ELSEWHERE)
        self._max_gather_pages = max_bytes * pool.pages.shape[1] // pool.bytes_per_page

    def writes(self) -> Tensor:
        size = self._pool.page_size
        num_layers = self._pool.pages.shape[1]
        offsets = np.repeat(self._offsets, self._batch.q_lens)
        page_ids = self._pages[offsets + self._batch.positions // size]
        rows = self._pool.slot_rows(page_ids, self._batch.positions % size)
        per_layer = np.arange(2 * num_layers, dtype=np.int64).reshape(num_layers, 2, 1) * size
        return self._tensor(rows + per_layer)

    def begun_pages(self) -> Tensor | None:
        kv_lens, size = self._batch.kv_lens, self._pool.page_size
        is_begun = (kv_lens % size != 0) & (self._num_past <= kv_lens // size * size)
        if not is_begun.any():
            return None
        last = self._offsets + self._num_pages - 1
        return self._tensor(self._pages[last[is_begun]].astype(np.int64))

    def decode_groups(self) -> list[DecodeGroup]:
        """Rows of one query token, cut where padding would exceed 1 - MIN_FILL or the gathered KV its bound."""
        rows = np.flatnonzero(self._batch.q_lens == 1)
        if not len(rows):
            return []
        num_pages = self._num_pages[rows]
        if num_pages.min() < MIN_FILL * num_pages.max():
            rows = rows[np.argsort(-num_pages, kind="stable")]
        groups: list[DecodeGroup] = []
        while len(rows):
            widest = int(self._num_pages[rows].max())
            is_close = self._num_pages[rows] >= MIN_FILL * widest
            # rows are in order of length, or all close: what is close stands at the front
            num_rows = min(int(is_close.sum()), max(1, self._max_gather_pages // widest))
            groups.append(self._decode_group(rows[:num_rows]))
            rows = rows[num_rows:]
        return groups

    def prefill_rows(self) -> list[PrefillRow]:
        return [self._prefill_row(int(row)) for row in np.flatnonzero(self._batch.q_lens > 1)]

    def _decode_group(self, rows: NDArray[np.intp]) -> DecodeGroup:
        lens, num_pages = self._batch.kv_lens[rows], self._num_pages[rows]
        width = int(num_pages.max())
        context = width * self._pool.page_size
        # padding repeats a row's own last page: never another row's KV, however it is masked
        columns = np.minimum(np.arange(width), num_pages[:, None] - 1)
        tables = self._pages[self._offsets[rows][:, None] + columns]
        mask = None
        if lens.min() < context:
            is_seen = torch.from_numpy(np.arange(context) < lens[:, None])
            mask = self._additive(is_seen)[:, None, None, :]
        return DecodeGroup(self._tokens(self._starts[rows]), self._blocks(tables), len(rows), context, mask)

    def _tokens(self, places: NDArray[np.integer]) -> slice | Tensor:
        first = int(places[0])
        if np.array_equal(places, np.arange(first, first + len(places))):
            return slice(first, first + len(places))
        return self._tensor(places.astype(np.int64))

    def _prefill_row(self, row: int) -> PrefillRow:
        start, num_past = int(self._starts[row]), int(self._num_past[row])
        num_queries = int(self._batch.q_lens[row])
        if not num_past:
            return PrefillRow(start, start + num_queries, None, [])
        first = int(self._offsets[row])
        blocks = self._blocks(self._pages[first : first + int(self._num_pages[row])])
        spans = [(q, min(q + QUERY_BLOCK, num_queries)) for q in range(0, num_queries, QUERY_BLOCK)]
        masks = [self._causal(num_past + begin, num_past + end) for begin, end in spans]
        return PrefillRow(start, start + num_queries, blocks, masks)

    def _causal(self, begin: int, end: int) -> Tensor:
        """Additive [R*Q, end]: query positions [begin, end) over keys [0, end)."""
        is_seen = torch.arange(end)[None, :] <= torch.arange(begin, end)[:, None]
        return self._additive(is_seen.repeat(self._queries_per_kv, 1))

    def _blocks(self, tables: NDArray[np.int32]) -> Tensor:
        keys = self._pool.block_rows(tables.ravel())
        return self._tensor(np.concatenate([keys, keys + 1]))

    def _additive(self, is_seen: Tensor) -> Tensor:
        mask = torch.zeros(is_seen.shape, dtype=self._pool.pages.dtype)
        return mask.masked_fill_(~is_seen, -torch.inf).to(self._pool.pages.device)

    def _tensor(self, array: NDArray[np.int64]) -> Tensor:
        return torch.from_numpy(array).to(self._pool.pages.device)
