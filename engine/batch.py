"""One engine step as host arrays: what the scheduler plans and the runner executes. numpy only.

Legend: T tokens of the step, B sequences (rows), S rows that sample a token.
A row contributes `q_lens[b]` consecutive tokens; they sit side by side in the ragged row of T tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.grammar_state import GrammarState
from engine.request import SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SampleRow:
    """Everything the sampler needs for one sampled token; it keeps no state of its own between steps."""

    params: SamplingParams
    #: the request's seed, drawn at the border when the caller gave none
    seed: int
    #: tokens generated so far = position of this token in the output; with `seed` it fixes the random number
    num_generated: int
    #: int32; prompt and output tokens, only filled when a penalty needs them
    prompt_tokens: NDArray[np.int32] | None = None
    output_tokens: NDArray[np.int32] | None = None
    #: ids that may not be chosen at this position (stop tokens before min_new_tokens)
    banned_ids: tuple[int, ...] = ()
    #: where the output stands in its grammar, and int32 [n], the output tokens that have not been taken in yet
    grammar: GrammarState | None = None
    grammar_tokens: NDArray[np.int32] | None = None


@dataclass(frozen=True, slots=True)
class Batch:
    """One ragged row. All arrays are owned by the batch; the runner does not change them."""

    step: int
    #: int32 [T]
    input_ids: NDArray[np.int32]
    #: int32 [T], position of each token in its own sequence
    positions: NDArray[np.int32]
    #: int32 [B], new tokens of each row in this step, >= 1
    q_lens: NDArray[np.int32]
    #: int32 [B], tokens of each row including this step's; KV of the first kv_len - q_len is in its pages
    kv_lens: NDArray[np.int32]
    #: per row int32 [ceil(kv_len / page_size)]: pages in order of the sequence
    page_tables: list[NDArray[np.int32]]
    #: int32 [S], rows (indices into B, rising) whose last token samples
    sample_rows: NDArray[np.int32]
    #: S entries
    samples: list[SampleRow]

    @property
    def num_tokens(self) -> int:
        return int(self.input_ids.shape[0])


@dataclass(frozen=True, slots=True)
class StepResult:
    """Answers of one step, S entries each, in the order of `Batch.sample_rows`."""

    step: int
    token_ids: list[int]
    #: None where the row asked for none
    logprobs: list[TokenLogprobs | None]
    #: place -> why this sequence cannot go on; its token means nothing
    failed: Mapping[int, str] = field(default_factory=dict[int, str])
