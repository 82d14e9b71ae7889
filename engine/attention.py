"""Paged attention behind transformers' attention interface: one ragged row, page tables as a keyword.

Legend: T tokens of the step, B decode rows of a group, S page_size, C padded context, Q query tokens of a chunk,
K key tokens, H query heads, G KV heads, R = H / G, D head_dim.

The model is called with input_ids and position_ids `[1, T]`, `use_cache=False` and `paged=<AttentionStep>`; no mask
is registered for our name, so transformers builds none. Each layer then calls `paged_attention`.
Rows that decode are gathered into padded batches; each prefill row is attended apart.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from configs.errors import InvariantError
from engine.attention_plan import QUERY_BLOCK, AttentionPlan, DecodeGroup, PrefillRow
from engine.kv_pool import KvPool

ATTENTION_NAME = "tidegate_paged"


class AttentionStep(Protocol):
    """What a model's forward is given as `paged`: it decides what each layer's attention reads and writes."""

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scaling: float) -> Tensor:
        """Output `[T, H, D]` of one layer, contiguous. Key and value are of the step's tokens only."""
        ...


def paged_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    paged: AttentionStep | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The function registered with transformers. query [1, H, T, D], key and value [1, G, T, D] -> [1, T, H, D].

    What a model may pass beyond these (softcap, sinks, windows) was looked at when it was loaded (`engine.probe`).
    Raises InvariantError when the model was called without `paged`.
    """
    if paged is None:
        raise InvariantError(f"{type(module).__name__} reached paged attention without a step")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = cast("int", module.layer_idx)
    return paged.attend(layer, query[0], key[0], value[0], scale).unsqueeze(0), None


AttentionInterface.register(ATTENTION_NAME, paged_attention)


class Scratch:
    """One growing buffer for gathered KV. Not shared between threads.

    On the CPU a fresh allocation of tens of MB is faulted in page by page at about 1.6 GB/s, in every layer of every
    step; a kept one is written at memcpy speed.
    """

    __slots__ = ("_buffer",)

    def __init__(self) -> None:
        self._buffer: Tensor | None = None

    def take(self, num_rows: int, like: Tensor) -> Tensor:
        """`[num_rows, *like.shape[1:]]` with like's dtype and device; contents undefined, valid until the next take."""
        if self._buffer is None or self._buffer.shape[0] < num_rows:
            # a quarter more than asked: contexts grow a page at a time
            self._buffer = like.new_empty((num_rows + num_rows // 4, *like.shape[1:]))
        return self._buffer[:num_rows]


class PagedStep:
    """Attention of one step: writes the step's KV into the pages, then attends over them. Used for one forward."""

    __slots__ = ("_plan", "_pool", "_scratch")

    def __init__(self, pool: KvPool, plan: AttentionPlan, scratch: Scratch) -> None:
        """Zeroes the pages that the step begins (see `AttentionPlan.begun_pages`)."""
        self._pool = pool
        self._plan = plan
        self._scratch = scratch
        if plan.begun_pages is not None:
            pool.clear(plan.begun_pages)

    def attend(self, layer: int, q_HTD: Tensor, k_GTD: Tensor, v_GTD: Tensor, scaling: float) -> Tensor:
        writes, slots = self._plan.writes, self._pool.slots
        slots.index_copy_(0, writes[layer, 0], k_GTD.transpose(0, 1))
        slots.index_copy_(0, writes[layer, 1], v_GTD.transpose(0, 1))
        q_THD = q_HTD.transpose(0, 1)
        groups = self._plan.groups
        if len(groups) == 1 and groups[0].tokens == slice(0, q_THD.shape[0]):
            return self._decode(layer, groups[0], q_THD, scaling)
        out_THD = torch.empty(q_THD.shape, dtype=q_THD.dtype, device=q_THD.device)
        for group in groups:
            out_THD[group.tokens] = self._decode(layer, group, q_THD[group.tokens], scaling)
        for row in self._plan.prefills:
            span = slice(row.start, row.end)
            if row.blocks is None:
                out_THD[span] = _attend_first_chunk(q_HTD[:, span], k_GTD[:, span], v_GTD[:, span], scaling)
            else:
                out_THD[span] = self._next_chunk(layer, row, row.blocks, q_HTD[:, span], scaling)
        return out_THD

    def _decode(self, layer: int, group: DecodeGroup, q_BHD: Tensor, scaling: float) -> Tensor:
        kv = self._gather(layer, group.blocks).view(2, group.num_rows, group.context, *self._pool.slots.shape[1:])
        k_BGCD, v_BGCD = kv.transpose(2, 3).unbind(0)
        # the R queries that share a KV head stand on the query axis: no copy of the KV per query head
        q_BGRD = q_BHD.reshape(group.num_rows, k_BGCD.shape[1], -1, q_BHD.shape[-1])
        out = scaled_dot_product_attention(q_BGRD, k_BGCD, v_BGCD, attn_mask=group.mask, scale=scaling)
        return out.reshape(q_BHD.shape)

    def _next_chunk(self, layer: int, row: PrefillRow, blocks: Tensor, q_HQD: Tensor, scaling: float) -> Tensor:
        """A chunk whose earlier tokens lie in pages; its own were written there just before."""
        num_heads, num_queries, head_dim = q_HQD.shape
        kv = self._gather(layer, blocks).view(2, -1, *self._pool.slots.shape[1:])
        k_GKD, v_GKD = kv.transpose(1, 2).unbind(0)
        q_GRQD = q_HQD.reshape(k_GKD.shape[0], -1, num_queries, head_dim)
        outs: list[Tensor] = []
        for start, mask in zip(range(0, num_queries, QUERY_BLOCK), row.masks, strict=True):
            q = q_GRQD[:, :, start : start + QUERY_BLOCK].flatten(1, 2).unsqueeze(0)
            num_keys = mask.shape[1]
            k, v = k_GKD[None, :, :num_keys], v_GKD[None, :, :num_keys]
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scaling)
            outs.append(out.reshape(num_heads, -1, head_dim))
        return torch.cat(outs, dim=1).transpose(0, 1)

    def _gather(self, layer: int, blocks: Tensor) -> Tensor:
        """`[len(blocks), S, G, D]` in the scratch."""
        source = self._pool.blocks
        out = self._scratch.take(blocks.shape[0], source)
        return torch.index_select(source, 0, blocks + 2 * layer, out=out)


def _attend_first_chunk(q_HQD: Tensor, k_GQD: Tensor, v_GQD: Tensor, scaling: float) -> Tensor:
    """No past: all keys are the chunk's own, nothing is read from pages."""
    q, k, v = q_HQD.unsqueeze(0), k_GQD.unsqueeze(0), v_GQD.unsqueeze(0)
    out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True, scale=scaling)
    return out[0].transpose(0, 1)
