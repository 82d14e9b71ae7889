"""The main test of everything: what the whole engine answers is what plain transformers generates, token for token.

200 prompts per architecture with shared prefixes and lengths 1 to 600 go through scheduler, cache, pages and model
together: mixed batches, chunks, prefix hits, retraction and eviction in a pool that is too small, flushes in between.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from cache.device_cache import DeviceCache
from engine.events import RequestArrived
from engine.flush import FlushMode
from engine.flush_gate import PendingFlush
from engine.generation import Collector
from engine.limits import SchedulerLimits
from engine.loop import EngineLoop
from engine.models import load_model
from engine.request import Request, SamplingParams
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from tests.fakes import flush_command, tokens_of
from tests.models import ARCHITECTURES, Architecture, write_random_model
from tests.oracle import PlainModel

NUM_PROMPTS = 200
PAGE_SIZE = 8
#: one prompt of 600 tokens just fits, so that running requests must give way and cached pages go
NUM_PAGES = 80
#: one after the other, while requests run
FLUSHES: tuple[FlushMode, ...] = ("fence", "retract", "drain", "fence", "retract")
NUM_TURNS_BETWEEN_FLUSHES = 25


def is_talker(number: int) -> bool:
    """Short prompt, long answer; ten in a row, which together outgrow the pool."""
    return number % 100 < 10


def random_prompts(rng: np.random.Generator) -> list[list[int]]:
    """Lengths 1 to 600; most begin with a part of one of six stems."""
    stems = [rng.integers(0, 512, length).tolist() for length in (24, 64, 150, 300, 450, 590)]
    prompts: list[list[int]] = []
    for _ in range(NUM_PROMPTS):
        stem = stems[rng.integers(len(stems))]
        shared = stem[: int(rng.integers(0, len(stem) + 1))]
        tail = rng.integers(0, 512, int(rng.integers(1, 60))).tolist()
        prompts.append((shared + tail)[: 600 - int(rng.integers(0, 3))])
    prompts = [prompt[: n % 10 * 2 + 1] if is_talker(n) else prompt for n, prompt in enumerate(prompts)]
    prompts[-1] = stems[-1] + stems[0][:10]
    return prompts


class Traffic:
    """One engine, fed from a list of requests while it runs."""

    def __init__(self, directory: Path, rng: np.random.Generator) -> None:
        runner = ModelRunner(load_model(directory, "cpu", "float32", None), NUM_PAGES, PAGE_SIZE)
        # what an earlier owner left in a page must not matter, NaN included
        runner.kv_pool.pages.fill_(float("nan"))
        self.scheduler = Scheduler(DeviceCache(NUM_PAGES, PAGE_SIZE), SchedulerLimits(8, 192, 2048))
        self.loop = EngineLoop(self.scheduler, runner)
        self.flushes: list[PendingFlush] = []
        self._rng = rng

    def serve(self, requests: list[Request]) -> Collector:
        """Post a few at a time, offer the flushes, turn until all have ended."""
        collector = Collector(requests)
        self.loop._on_outputs = collector.take
        waiting = list(requests)
        num_turns = 0
        while collector.open_ids:
            if num_turns % NUM_TURNS_BETWEEN_FLUSHES == 15:
                self._offer_next()
            for _ in range(int(self._rng.integers(0, 4))):
                if waiting:
                    self.loop.post(RequestArrived(waiting.pop(0)))
            self.loop.turn()
            num_turns += 1
        self.scheduler.check()
        return collector

    def _offer_next(self) -> None:
        number = len(self.flushes)
        if number == len(FLUSHES) or not all(pending.ended.done() for pending in self.flushes):
            return
        offered = self.loop.offer_flush(flush_command(f"f{number}", FLUSHES[number], epoch=number + 1, budget_s=600.0))
        assert isinstance(offered, PendingFlush)
        self.flushes.append(offered)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_whole_engine_equals_plain_generation(architecture: Architecture, tmp_path: Path) -> None:
    directory = write_random_model(tmp_path, architecture)
    rng = np.random.default_rng(ARCHITECTURES.index(architecture))
    prompts = random_prompts(rng)
    requests = [
        Request(
            f"r{n}",
            tokens_of(prompt),
            SamplingParams(
                temperature=0.0, max_new_tokens=80 if is_talker(n) else int(rng.integers(1, 14)), ignore_eos=True
            ),
        )
        for n, prompt in enumerate(prompts)
    ]
    traffic = Traffic(directory, rng)

    generations = traffic.serve(requests).generations

    plain = PlainModel(directory)
    for prompt, request, generation in zip(prompts, requests, generations, strict=True):
        assert (generation.finish, len(generation.token_ids)) == ("length", request.sampling.max_new_tokens)
        plain.compare(prompt, generation.token_ids)
    snapshot = traffic.loop.snapshot()
    verdicts = [pending.ended.result(0) for pending in traffic.flushes]
    counts = {
        "ties": plain.num_ties,
        "cached tokens": snapshot.counters.num_cached_tokens,
        "retractions": snapshot.counters.num_retractions - sum(v.num_retracted for v in verdicts),
        "evictions": snapshot.num_evicted_pages,
        "chunks": snapshot.counters.num_chunks,
        "flushes": [verdict.status for verdict in verdicts].count("flushed"),
    }
    print(architecture, counts)
    assert counts.pop("ties") <= 1
    assert all(counts.values()), counts
    assert counts["flushes"] == len(FLUSHES)
    assert {len(prompt) for prompt in prompts} >= {1, 600}
