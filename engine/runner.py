"""Runs one engine step: a batch of host arrays in, sampled tokens out. The KV goes into the pool's pages."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.attention import PagedStep, Scratch
from engine.attention_plan import plan_attention
from engine.batch import Batch, StepResult
from engine.grammar import GrammarBook
from engine.kv_pool import KvPool
from engine.models import LoadedModel, ModelFacts
from engine.sampling import sample


class ModelRunner:
    """A loaded model and its KV pool. Keeps no state of a request between steps; one thread at a time."""

    def __init__(
        self,
        model: LoadedModel,
        num_pages: int,
        page_size: int,
        num_threads: int | None = None,
        grammars: GrammarBook | None = None,
    ) -> None:
        """Allocates the pool; raises ConfigError when it does not fit.

        num_threads: torch's threads for the whole process; None leaves them as they are.
        grammars: of the model's vocabulary; None: rows that have one fail.
        """
        if num_threads is not None:
            torch.set_num_threads(num_threads)
        facts = model.facts
        self.facts: ModelFacts = facts
        self.kv_pool = KvPool(
            num_pages,
            page_size,
            facts.num_layers,
            facts.num_kv_heads,
            facts.head_dim,
            model.module.dtype,
            model.device,
        )
        self._model = model
        self._scratch = Scratch()
        self._grammars = grammars or GrammarBook(Path(), facts.vocab_size, facts.eos_token_ids)

    @property
    def bytes_per_page(self) -> int:
        return self.kv_pool.bytes_per_page

    def run(self, batch: Batch) -> StepResult:
        """Compute the batch's tokens, write their KV into the pages, and sample one token per sample row.

        Blocks until the tokens are known. The caller owns all pages of the batch until then; the pages of one row
        that it does not write may be shared with other rows.
        """
        with torch.inference_mode():
            logits = self._forward(batch)
            # a GPU computes the logits meanwhile
            masks = self._grammars.masks(batch.samples)
            token_ids, logprobs = sample(logits, batch.samples, masks)
        return StepResult(batch.step, token_ids, logprobs, {} if masks is None else masks.failed)

    def _forward(self, batch: Batch) -> Tensor:
        """Logits `[S, vocab]` of the rows that sample."""
        facts = self.facts
        plan = plan_attention(self.kv_pool, batch, facts.num_heads // facts.num_kv_heads)
        last = (np.cumsum(batch.q_lens) - 1)[batch.sample_rows]
        keep = self._tensor(last)
        logits = self._model.module(
            input_ids=self._tensor(batch.input_ids)[None],
            position_ids=self._tensor(batch.positions)[None],
            use_cache=False,
            logits_to_keep=keep,
            paged=PagedStep(self.kv_pool, plan, self._scratch),
        ).logits[0]
        # a few models ignore logits_to_keep and answer for every token
        return logits if logits.shape[0] == len(last) else logits.index_select(0, keep)

    def _tensor(self, array: NDArray[np.integer]) -> Tensor:
        """int64 on the model's device."""
        return torch.from_numpy(array.astype(np.int64)).to(self._model.device)
