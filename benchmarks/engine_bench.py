"""Prefill and decode tokens/s of our engine against transformers' `generate` and its continuous batching.

    python -m benchmarks.engine_bench [--dtype float32] [--threads 1] [--batches 1 8 32] [--clock cpu] [--model DIR]

The same random 20M Llama, the same fresh prompts of equal length (no padding for `generate`), greedy, no end of
sequence; engines alternate. A figure comes from two timed calls on prompts of their own: one that makes one token
(prefill), and one that makes `--tokens` (the difference is decode). Ours is the whole offline loop: scheduler, prefix
cache, runner. The last lines compare medians with the better of the two peers; the target is 0.7.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any, cast

import numpy as np
import torch
from transformers import AutoModelForCausalLM, ContinuousBatchingConfig, GenerationConfig
from transformers.utils import logging as transformers_logging

from benchmarks.harness import Figures, alternate, report
from cache.device_cache import DeviceCache
from engine.demo_model import write_demo_model
from engine.limits import SchedulerLimits
from engine.loop import EngineLoop
from engine.models import load_model
from engine.request import Request, SamplingParams
from engine.runner import ModelRunner
from engine.scheduler import Scheduler

PAGE_SIZE = 16
#: `cpu` compares engines on a machine that others use too
_CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": time.process_time}
OURS, GENERATE, CONTINUOUS = "tidegate", "generate", "continuous batching"
#: prompts and number of new tokens in, new tokens out
Engine = Callable[[list[list[int]], int], list[list[int]]]


def main() -> None:
    args = _parse()
    torch.set_num_threads(args.threads)
    transformers_logging.set_verbosity_error()
    with ExitStack() as stack:
        directory = args.model
        if directory is None:
            directory = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            write_demo_model(directory, "small")
        peer = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, args.dtype), local_files_only=True)
        engines: dict[str, Engine] = {
            OURS: _our_engine(directory, args.dtype, max(args.batches), args.prompt + args.tokens),
            GENERATE: partial(_generate, peer.eval()),
            CONTINUOUS: stack.enter_context(_continuous_batching(directory, args.dtype, args)),
        }
        vocab_size = int(peer.config.vocab_size)
        _check_equal(engines, vocab_size)
        for batch in args.batches:
            _run(engines, vocab_size, batch, args)


def _run(engines: dict[str, Engine], vocab_size: int, batch: int, args: argparse.Namespace) -> None:
    seeds, clock = count(batch * 1000), _CLOCKS[args.clock]

    def measure(engine: Engine) -> Figures:
        prefill_s = _time_s(engine, _prompts(next(seeds), batch, args.prompt, vocab_size), 1, clock)
        both_s = _time_s(engine, _prompts(next(seeds), batch, args.prompt, vocab_size), args.tokens, clock)
        return {
            "prefill_tokens_per_s": batch * args.prompt / prefill_s,
            "decode_tokens_per_s": batch * (args.tokens - 1) / (both_s - prefill_s),
        }

    for engine in engines.values():
        measure(engine)
    results = alternate({name: partial(measure, engine) for name, engine in engines.items()}, args.runs)
    report(
        f"engine {args.dtype}, {args.clock} time, batch {batch}, prompt {args.prompt}, {args.tokens} tokens", results
    )
    for figure in ("prefill_tokens_per_s", "decode_tokens_per_s"):
        medians = {name: median(results[name][figure]) for name in engines}
        best = max(medians[GENERATE], medians[CONTINUOUS])
        print(f"  batch {batch} {figure}: {medians[OURS] / best:.2f} of the better peer (target 0.7)")


def _time_s(engine: Engine, prompts: list[list[int]], num_tokens: int, clock: Callable[[], float]) -> float:
    start = clock()
    outputs = engine(prompts, num_tokens)
    took = clock() - start
    assert [len(output) for output in outputs] == [num_tokens] * len(prompts)
    return took


def _prompts(seed: int, batch: int, length: int, vocab_size: int) -> list[list[int]]:
    """Fresh ones: no engine may find them in a prefix cache."""
    return np.random.default_rng(seed).integers(3, vocab_size, (batch, length)).tolist()


def _check_equal(engines: dict[str, Engine], vocab_size: int) -> None:
    """Engines that answer differently are not compared. (16-bit answers may differ: printed, not refused.)"""
    answers = {name: engine(_prompts(0, 3, 40, vocab_size), 8) for name, engine in engines.items()}
    print("same tokens:", {name: answer == answers[GENERATE] for name, answer in answers.items()})


def _our_engine(directory: Path, dtype: str, max_running: int, max_len: int) -> Engine:
    model = load_model(directory, "cpu", dtype, None)
    num_pages = (max_running + 1) * -(-max_len // PAGE_SIZE)
    runner = ModelRunner(model, num_pages, PAGE_SIZE)
    limits = SchedulerLimits(max_running, 512, model.facts.max_len, (), runner.bytes_per_page)
    loop = EngineLoop(Scheduler(DeviceCache(num_pages, PAGE_SIZE), limits), runner)
    ids = count()

    def run(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        params = SamplingParams(temperature=0.0, max_new_tokens=num_tokens, ignore_eos=True)
        requests = [Request(str(next(ids)), np.array(prompt, np.int32).tobytes(), params) for prompt in prompts]
        return [generation.token_ids for generation in loop.generate(requests)]

    return run


def _generate(model: Any, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
    ids = torch.tensor(prompts)
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=num_tokens,
            eos_token_id=[],
            pad_token_id=0,
        )
    return output[:, ids.shape[1] :].tolist()


@contextmanager
def _continuous_batching(directory: Path, dtype: str, args: argparse.Namespace) -> Iterator[Engine]:
    """A manager that stays up between calls, with a cache of the same number of tokens as ours."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype), local_files_only=True).eval()
    page_size = 256
    tokens = (max(args.batches) + 1) * (args.prompt + args.tokens + page_size)
    config = ContinuousBatchingConfig(page_size=page_size, num_blocks=tokens // page_size, max_batch_tokens=512)
    # an id that no model makes: nothing ends early
    generation = GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=args.tokens)
    with cast("Any", model).continuous_batching_context_manager(
        generation_config=generation, continuous_batching_config=config, block=True, timeout=5
    ) as manager:

        def run(prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
            ids = [manager.add_request(prompt, max_new_tokens=num_tokens) for prompt in prompts]
            answers: dict[str, list[int]] = {}
            while len(answers) < len(ids):
                result = manager.get_result(timeout=60)
                if result is not None and result.is_finished():
                    answers[result.request_id] = result.generated_tokens
            return [answers[request_id] for request_id in ids]

        yield run


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt", type=int, default=128, help="tokens of each prompt")
    parser.add_argument("--tokens", type=int, default=64, help="new tokens of each sequence")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--clock", choices=sorted(_CLOCKS), default="wall", help="cpu: seconds of CPU, all threads")
    parser.add_argument("--model", type=Path, default=None, help="directory; default: the demo model `small`")
    return parser.parse_args()


if __name__ == "__main__":
    main()
