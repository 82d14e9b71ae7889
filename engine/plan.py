"""Which tokens the next step computes, and the arrays that say so to the runner.

Assembled once per step: a decode row costs a few list appends, and its page table is a view of the one its hold keeps.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.batch import Batch, SampleRow
from engine.sequence import Sequence


@dataclass(frozen=True, slots=True)
class Row:
    """One sequence's part of a step."""

    sequence: Sequence
    #: its tokens computed in this step, >= 1
    num_new: int

    @property
    def samples(self) -> bool:
        """Whether the step reaches the sequence's end, so that the next token can be chosen."""
        return self.num_new == self.sequence.num_remaining


def build_batch(step: int, rows: list[Row], page_size: int) -> Batch:
    """The ragged row of `rows`. Every row's hold covers its tokens; changes nothing."""
    begins: list[int] = []
    q_lens: list[int] = []
    kv_lens: list[int] = []
    page_tables: list[NDArray[np.int32]] = []
    sample_rows: list[int] = []
    samples: list[SampleRow] = []
    for index, row in enumerate(rows):
        sequence, num_new = row.sequence, row.num_new
        begin = sequence.num_computed
        kv_len = begin + num_new
        begins.append(begin)
        q_lens.append(num_new)
        kv_lens.append(kv_len)
        assert sequence.hold is not None, f"{sequence.request_id} is planned without pages"
        page_tables.append(sequence.hold.page_table[: -(-kv_len // page_size)])
        if kv_len == sequence.num_tokens:
            sample_rows.append(index)
            samples.append(sequence.sample_row())
    is_decode_only = len(samples) == len(rows) == sum(q_lens)
    lens = np.array(q_lens, dtype=np.int32)
    return Batch(
        step,
        _input_ids(rows, is_decode_only),
        _positions(begins, lens),
        lens,
        np.array(kv_lens, dtype=np.int32),
        page_tables,
        np.array(sample_rows, dtype=np.int32),
        samples,
    )


def _input_ids(rows: list[Row], is_decode_only: bool) -> NDArray[np.int32]:
    if is_decode_only:
        return np.array([row.sequence.last_token for row in rows], dtype=np.int32)
    return np.concatenate([row.sequence.tokens_ahead(row.num_new) for row in rows])


def _positions(begins: list[int], q_lens: NDArray[np.int32]) -> NDArray[np.int32]:
    """int32 [T]: each row's positions count up from where it begins."""
    firsts = np.array(begins, dtype=np.int32)
    if q_lens.max() == 1:
        return firsts
    offsets = np.cumsum(q_lens, dtype=np.int32) - q_lens
    return np.arange(q_lens.sum(), dtype=np.int32) + np.repeat(firsts - offsets, q_lens)
