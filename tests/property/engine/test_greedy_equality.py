"""The main test of everything: greedy tokens of the whole engine are those of plain transformers, whatever happens.

A real scheduler, device cache and runner serve randomised prompts (shared prefixes, 1 to 600 tokens) in a pool that is
too small for them, with flushes in between. What was meant to happen is counted; a count of 0 fails the test.
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
from tests.fakes import flush_command
from tests.models import ARCHITECTURES, Architecture, write_random_model
from tests.oracle import PlainModel

VOCAB_SIZE = 512
PAGE_SIZE = 8
#: 640 tokens, while ten running sequences may come to 6,000
NUM_PAGES = 80
SHORT = 20
FLUSHES: tuple[FlushMode, ...] = ("fence", "retract", "fence", "retract")


def prompts_of(rng: np.random.Generator, num: int) -> list[list[int]]:
    """Prefixes that many prompts share, each followed by a tail of its own; some prompts come twice.

    In the middle ten short ones come together.
    """
    prefixes = [rng.integers(0, VOCAB_SIZE, rng.integers(1, 400)).tolist() for _ in range(max(2, num // 8))]
    prompts: list[list[int]] = [[7], rng.integers(0, VOCAB_SIZE, 600).tolist()]
    while len(prompts) < num:
        if len(prompts) == num // 2:
            prompts += [rng.integers(0, VOCAB_SIZE, SHORT).tolist() for _ in range(10)]
        prefix = prefixes[rng.integers(len(prefixes))]
        tail = rng.integers(0, VOCAB_SIZE, rng.integers(1, 200)).tolist()
        prompts.append(prompts[rng.integers(len(prompts))] if rng.random() < 0.1 else (prefix + tail)[:600])
    return prompts[:num]


def requests_of(rng: np.random.Generator, prompts: list[list[int]]) -> list[Request]:
    """Short prompts get long answers: together they outgrow the pool that took them in."""
    return [
        Request(
            request_id=str(index),
            tokens=np.array(prompt, np.int32).tobytes(),
            sampling=SamplingParams(
                temperature=0.0,
                max_new_tokens=int(rng.integers(50, 70) if len(prompt) == SHORT else rng.integers(4, 16)),
                ignore_eos=True,
            ),
        )
        for index, prompt in enumerate(prompts)
    ]


class Served:
    """Requests served by one engine, a flush after each fifth of them; what happened is in `loop` and `verdicts`."""

    def __init__(self, directory: Path, requests: list[Request]) -> None:
        model = load_model(directory, "cpu", "float32", None)
        runner = ModelRunner(model, NUM_PAGES, PAGE_SIZE)
        limits = SchedulerLimits(10, 96, model.facts.max_len, (), runner.bytes_per_page, VOCAB_SIZE)
        self.scheduler = Scheduler(DeviceCache(NUM_PAGES, PAGE_SIZE), limits)
        collector = Collector(requests)
        self.loop = EngineLoop(self.scheduler, runner, on_outputs=collector.take)
        self.flushes: list[PendingFlush] = []
        self._run(requests, collector)
        self.generations = collector.generations
        self.verdicts = [v for f in self.flushes if (v := self.loop.flush_verdict(f.command.flush_id))]

    def _run(self, requests: list[Request], collector: Collector) -> None:
        waiting = list(requests)
        num_fifth = len(requests) // (len(FLUSHES) + 1)
        while collector.open_ids:
            while waiting and len(collector.open_ids) - len(waiting) < 16:
                self.loop.post(RequestArrived(waiting.pop(0)))
            num_ended = len(requests) - len(collector.open_ids)
            if len(self.flushes) < len(FLUSHES) and num_ended >= num_fifth * (len(self.flushes) + 1):
                self._flush(FLUSHES[len(self.flushes)])
            self.loop.turn()
            self.scheduler.check()

    def _flush(self, mode: FlushMode) -> None:
        number = len(self.flushes) + 1
        pending = self.loop.offer_flush(flush_command(f"flush-{number}", mode, epoch=number, budget_s=60.0))
        assert isinstance(pending, PendingFlush)
        self.flushes.append(pending)


@pytest.mark.parametrize("num_prompts", [30, pytest.param(200, marks=pytest.mark.deep)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_tokens_equal_plain_generation(tmp_path: Path, architecture: Architecture, num_prompts: int) -> None:
    directory = write_random_model(tmp_path, architecture)
    rng = np.random.default_rng(num_prompts)
    prompts = prompts_of(rng, num_prompts)
    requests = requests_of(rng, prompts)

    served = Served(directory, requests)

    plain = PlainModel(directory)
    for prompt, request, generation in zip(prompts, requests, served.generations, strict=True):
        assert generation.finish == "length", generation.message
        assert len(generation.token_ids) == request.sampling.max_new_tokens
        plain.compare(prompt, generation.token_ids)
    print(f"{architecture}: {num_prompts} prompts, {plain.num_ties} ties")
    snapshot = served.loop.snapshot()
    num_retracted = sum(verdict.num_retracted for verdict in served.verdicts)
    happened = {
        "cache hits": snapshot.counters.num_cached_tokens,
        "retractions for want of pages": snapshot.counters.num_retractions - num_retracted,
        "retractions by a flush": num_retracted,
        "evictions": snapshot.num_evicted_pages,
        "chunks": snapshot.counters.num_chunks,
        "flushes": len([verdict for verdict in served.verdicts if verdict.status == "flushed"]),
    }
    print(happened)
    assert all(happened.values()), happened
    assert happened["flushes"] == len(FLUSHES)
    assert plain.num_ties <= num_prompts // 50
