"""What the plan reads and writes, looked at page by page; the tokens that come of it are in test_equality."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from engine.attention_plan import MAX_GATHER_BYTES, MIN_FILL, QUERY_BLOCK, AttentionPlan, DecodeGroup, plan_attention
from engine.batch import Batch
from engine.kv_pool import KvPool

SIZE = 4


def plan_of(rows: list[tuple[int, int]], num_pages: int = 400) -> tuple[AttentionPlan, Batch, KvPool]:
    """rows: (q_len, kv_len). Pages are handed out from the end of the pool."""
    pool = KvPool(
        num_pages, SIZE, num_layers=2, num_kv_heads=1, head_dim=2, dtype=torch.float32, device=torch.device("cpu")
    )
    free = list(range(num_pages))
    tables = [np.array([free.pop() for _ in range(-(-kv_len // SIZE))], np.int32) for _, kv_len in rows]
    positions = np.concatenate([np.arange(kv_len - q_len, kv_len) for q_len, kv_len in rows]).astype(np.int32)
    batch = Batch(
        step=1,
        input_ids=np.zeros(len(positions), np.int32),
        positions=positions,
        q_lens=np.array([q for q, _ in rows], np.int32),
        kv_lens=np.array([k for _, k in rows], np.int32),
        page_tables=tables,
        sample_rows=np.array([], np.int32),
        samples=[],
    )
    return plan_attention(pool, batch, queries_per_kv=3), batch, pool


def places(group: DecodeGroup) -> list[int]:
    return torch.arange(10_000)[group.tokens].tolist()


def test_each_token_writes_its_own_slot_of_its_own_page() -> None:
    plan, batch, pool = plan_of([(3, 9), (1, 4), (6, 6)])
    owners = [0, 0, 0, 1, 2, 2, 2, 2, 2, 2]
    for token, (row, position) in enumerate(zip(owners, batch.positions, strict=True)):
        page = int(batch.page_tables[row][position // SIZE])
        for layer in range(2):
            for kv in range(2):
                marks = torch.zeros(pool.slots.shape[0])
                marks[plan.writes[layer, kv, token]] = 1
                place = marks.view(pool.pages.shape[:4]).nonzero().tolist()
                assert place == [[page, layer, kv, position % SIZE]]


def test_decode_rows_alike_in_length_are_one_group_in_order() -> None:
    plan, batch, _ = plan_of([(1, 16), (1, 13), (1, 15)])

    (group,) = plan.groups
    assert group.tokens == slice(0, 3)
    assert (group.num_rows, group.context) == (3, 16)
    assert group.mask is not None
    assert group.mask[:, 0, 0].isinf().sum(1).tolist() == [0, 3, 1]
    assert plan.prefills == []
    keys = group.blocks[: len(group.blocks) // 2].view(3, -1)
    assert (keys // 4).tolist() == [table.tolist() for table in batch.page_tables]


def test_full_pages_need_no_mask() -> None:
    plan, _, _ = plan_of([(1, 16), (1, 16)])

    assert plan.groups[0].mask is None


def test_padding_is_bounded_and_every_decode_row_is_in_one_group() -> None:
    lens = [1, 500, 3, 480, 100, 90, 350, 8, 40, 39]
    plan, _, _ = plan_of([(1, length) for length in lens], num_pages=800)

    assert len(plan.groups) > 2
    members = [places(group) for group in plan.groups]
    assert sorted(token for tokens in members for token in tokens) == list(range(len(lens)))
    for group, tokens in zip(plan.groups, members, strict=True):
        pages = [-(-lens[token] // SIZE) for token in tokens]
        assert group.context == max(pages) * SIZE
        assert min(pages) >= MIN_FILL * max(pages)


def test_gathered_kv_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """A page of one layer is 64 bytes here: 1 KiB are 16 pages, four rows of four."""
    monkeypatch.setitem(MAX_GATHER_BYTES, "cpu", 1024)
    plan, _, _ = plan_of([(1, 16)] * 9 + [(1, 200)])

    assert [places(group) for group in plan.groups] == [[9], [0, 1, 2, 3], [4, 5, 6, 7], [8]]
    assert [group.tokens for group in plan.groups] == [slice(9, 10), slice(0, 4), slice(4, 8), slice(8, 9)]


def test_rows_apart_are_gathered_by_place() -> None:
    plan, _, _ = plan_of([(1, 9), (2, 4), (1, 9)])

    assert isinstance(plan.groups[0].tokens, torch.Tensor)
    assert places(plan.groups[0]) == [0, 3]


def test_padding_repeats_the_rows_own_pages() -> None:
    plan, batch, _ = plan_of([(1, 64), (1, 50)])

    keys = plan.groups[0].blocks[: len(plan.groups[0].blocks) // 2].view(2, -1) // 4
    assert set(keys[1].tolist()) == set(batch.page_tables[1].tolist())


def test_prefill_rows_beside_decode_rows() -> None:
    plan, batch, _ = plan_of([(1, 9), (5, 5), (7, 19)])

    (group,) = plan.groups
    assert places(group) == [0]
    first, later = plan.prefills
    assert (first.start, first.end, first.blocks) == (1, 6, None)
    assert (later.start, later.end) == (6, 13)
    assert later.blocks is not None
    assert (later.blocks[:5] // 4).tolist() == batch.page_tables[2].tolist()
    (mask,) = later.masks
    assert mask.shape == (3 * 7, 19)
    assert (mask == 0).sum(1).tolist() == list(range(13, 20)) * 3


def test_long_chunks_are_cut_into_blocks() -> None:
    plan, _, _ = plan_of([(2 * QUERY_BLOCK + 10, 2 * QUERY_BLOCK + 30)], num_pages=200)

    assert [mask.shape for mask in plan.prefills[0].masks] == [
        (3 * QUERY_BLOCK, 20 + QUERY_BLOCK),
        (3 * QUERY_BLOCK, 20 + 2 * QUERY_BLOCK),
        (3 * 10, 30 + 2 * QUERY_BLOCK),
    ]


def test_begun_pages_are_those_begun_and_left_part_filled() -> None:
    plan, batch, _ = plan_of([
        (1, 9),  # first token of its third page
        (1, 10),  # second token: begun earlier
        (1, 8),  # completes a page
        (6, 6),  # fills one page, begins another
        (4, 4),  # fills its page
        (3, 7),  # begins its second page
        (1, 1),
    ])  # fmt: skip

    assert plan.begun_pages is not None
    assert plan.begun_pages.tolist() == [int(batch.page_tables[row][-1]) for row in (0, 3, 5, 6)]
    assert plan_of([(1, 8), (4, 12)])[0].begun_pages is None
