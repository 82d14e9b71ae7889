"""Tidegate's engine in one process, without Ray: load a model, generate, flush, generate again.

    python examples/offline.py                 # the tiny demo model, written to a temporary directory
    python examples/offline.py --model DIR     # any checkpoint that the engine can serve

In the first round the prompts share the page that the first of them has computed; in the second all of them are in
the cache; after the flush nothing older is used.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from cache import DeviceCache
from engine.demo_model import write_demo_model
from engine.flush import FlushCommand
from engine.flush_gate import PendingFlush
from engine.limits import SchedulerLimits
from engine.loop import EngineLoop
from engine.models import load_model
from engine.request import Request, SamplingParams
from engine.runner import ModelRunner
from engine.scheduler import Scheduler

PROMPTS = (
    "A tide gate lets water out and never lets it back in.",
    "A tide gate lets water out and never lets it back in. So does a flush:",
    "A tide gate lets water out and never lets it back in. After a flush,",
)
NUM_PAGES = 256
PAGE_SIZE = 16


def open_engine(directory: Path) -> EngineLoop:
    """Load the model and put an engine around it."""
    runner = ModelRunner(load_model(directory, "auto", "auto", None), NUM_PAGES, PAGE_SIZE)
    limits = SchedulerLimits(
        max_running=8,
        max_step_tokens=64,
        max_len=runner.facts.max_len,
        eos_token_ids=runner.facts.eos_token_ids,
        bytes_per_page=runner.bytes_per_page,
        vocab_size=runner.facts.vocab_size,
    )
    return EngineLoop(Scheduler(DeviceCache(NUM_PAGES, PAGE_SIZE), limits), runner)


def generate(engine: EngineLoop, tokenizer: Tokenizer, title: str) -> int:
    """Answer all prompts once and print the answers; how many prompt tokens came out of the cache."""
    greedy = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
    ids = [np.array(tokenizer.encode(prompt).ids, dtype=np.int32) for prompt in PROMPTS]
    requests = [Request(f"{title}-{n}", tokens.tobytes(), greedy) for n, tokens in enumerate(ids)]
    num_cached = 0
    print(f"\n{title}")
    for generation in engine.generate(requests):
        assert generation.stats is not None
        stats = generation.stats
        num_cached += stats.num_cached_tokens
        print(f"  {stats.num_cached_tokens:3d} of {stats.num_prompt_tokens} prompt tokens from the cache"
              f"  {tokenizer.decode(generation.token_ids)!r}")  # fmt: skip
    return num_cached


def flush(engine: EngineLoop, epoch: int) -> None:
    """Drop everything cached. Idle as the engine is, the next turn does it."""
    pending = engine.offer_flush(FlushCommand("offline", "wait", ("device",), epoch, term=0, budget_s=10.0))
    assert isinstance(pending, PendingFlush)
    engine.turn()
    verdict = pending.ended.result(timeout=0)
    print(f"\nflush: {verdict.status}, {verdict.freed_pages} pages, epoch {verdict.epoch}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Tidegate's engine without Ray")
    parser.add_argument("--model", type=Path, help="a checkpoint in Hugging Face format; default: the demo model")
    directory = parser.parse_args().model
    with tempfile.TemporaryDirectory() as scratch:
        if directory is None:
            directory = Path(scratch) / "demo"
            write_demo_model(directory, "tiny")
        engine = open_engine(directory)
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        cold = generate(engine, tokenizer, "first")
        warm = generate(engine, tokenizer, "again")
        flush(engine, epoch=1)
        flushed = generate(engine, tokenizer, "after-flush")
    print(f"\ncached tokens: {cold} cold, {warm} warm, {flushed} after the flush")


if __name__ == "__main__":
    main()
