"""Drives a ModelRunner without the scheduler: random chunks, mixed batches, pages in no order, pages reused dirty."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from engine.batch import Batch, SampleRow
from engine.request import SamplingParams
from engine.runner import ModelRunner

GREEDY = SamplingParams(temperature=0.0)


@dataclass
class Sequence:
    """One request on its way: prompt and output so far, its pages, how many tokens have KV."""

    prompt: list[int]
    num_new: int
    params: SamplingParams = GREEDY
    output: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    num_computed: int = 0

    @property
    def tokens(self) -> list[int]:
        return self.prompt + self.output

    @property
    def is_finished(self) -> bool:
        return len(self.output) == self.num_new


class HandScheduler:
    """Runs sequences to their end in shuffled, mixed batches of at most `max_step_tokens` tokens."""

    def __init__(self, runner: ModelRunner, rng: np.random.Generator, max_step_tokens: int, max_running: int) -> None:
        self._runner = runner
        self._rng = rng
        self._max_step_tokens = max_step_tokens
        self._max_running = max_running
        self._free = rng.permutation(runner.kv_pool.num_pages).tolist()
        self.num_chunks = 0
        self.num_mixed_steps = 0
        self._step = 0

    def run(self, sequences: list[Sequence]) -> None:
        waiting, running = list(sequences), []
        while waiting or running:
            while waiting and len(running) < self._max_running:
                running.append(waiting.pop(0))
            self._run_step(running)
            for sequence in [s for s in running if s.is_finished]:
                self._free.extend(self._rng.permutation(sequence.pages).tolist())
                running.remove(sequence)

    def _run_step(self, running: list[Sequence]) -> None:
        budget = self._max_step_tokens
        chosen: list[tuple[Sequence, int]] = []
        for index in self._rng.permutation(len(running)):
            sequence = running[index]
            num_new = min(len(sequence.tokens) - sequence.num_computed, budget)
            if num_new:
                chosen.append((sequence, num_new))
                budget -= num_new
        batch = self._batch(chosen)
        self.num_chunks += sum(len(s.tokens) > s.num_computed + n for s, n in chosen)
        self.num_mixed_steps += len({n == 1 for _, n in chosen}) == 2
        result = self._runner.run(batch)
        for sequence, num_new in chosen:
            sequence.num_computed += num_new
        for row, token in zip(batch.sample_rows, result.token_ids, strict=True):
            chosen[row][0].output.append(token)

    def _batch(self, chosen: list[tuple[Sequence, int]]) -> Batch:
        self._step += 1
        q_lens = np.array([n for _, n in chosen], np.int32)
        kv_lens = np.array([s.num_computed + n for s, n in chosen], np.int32)
        for (sequence, _), kv_len in zip(chosen, kv_lens, strict=True):
            while len(sequence.pages) * self._runner.kv_pool.page_size < kv_len:
                sequence.pages.append(self._free.pop())
        spans = [range(s.num_computed, s.num_computed + n) for s, n in chosen]
        samples = [row for row, (s, _) in enumerate(chosen) if kv_lens[row] == len(s.tokens)]
        return Batch(
            step=self._step,
            input_ids=np.array([chosen[r][0].tokens[i] for r, span in enumerate(spans) for i in span], np.int32),
            positions=np.array([i for span in spans for i in span], np.int32),
            q_lens=q_lens,
            kv_lens=kv_lens,
            page_tables=[np.array(s.pages, np.int32) for s, _ in chosen],
            sample_rows=np.array(samples, np.int32),
            samples=[SampleRow(chosen[r][0].params, seed=0, num_generated=len(chosen[r][0].output)) for r in samples],
        )
