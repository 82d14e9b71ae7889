"""Inter-token latency of running requests while pages are written back to the host tier, against the same without.

    python -m benchmarks.host_itl_bench [--gb 1.0] [--runs 5] [--running 8] [--threads 1]

A 20M Llama decodes `--running` requests beside a device cache full of old pages (of 64 tokens, about 1 MB each). In one
case a host tier appears while they run, with watermarks so high that the engine writes all of the cache back: real
scheduler, real copier thread, real arena, pre-faulted. In the other there is none. Cases alternate; a run of the second
has as many steps as the run before it. Figures: the time between two tokens of a request, in ms, and what was written.
The target is a p99 of at most 1.3 times that without, over all runs.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from statistics import median

import numpy as np
import torch

from benchmarks.harness import Figures, alternate, report
from cache.device_cache import DeviceCache
from cache.types import DEFAULT_NAMESPACE
from engine.demo_model import write_demo_model
from engine.events import RequestArrived
from engine.host_calls import HostSettings
from engine.host_copier import HostCopier
from engine.limits import SchedulerLimits
from engine.loop import EngineLoop
from engine.models import LoadedModel, load_model
from engine.page_store import page_store
from engine.request import Output, Request, SamplingParams
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from tests.host_tier import HostNode, host_node

PAGE_SIZE = 64
#: pages of one cached prompt
RUN_PAGES = 8
WARM_STEPS = 20
#: steps after which a run ends although not all is written
MAX_STEPS = 1200
WITH, WITHOUT = "write-back", "no host tier"


@dataclass
class Bench:
    """Both cases on one model and one node."""

    model: LoadedModel
    node: HostNode
    args: argparse.Namespace
    seeds: count[int] = field(default_factory=count)
    num_steps: int = 0
    gaps_ms: dict[str, list[float]] = field(default_factory=lambda: {WITH: [], WITHOUT: []})

    def run(self, case: str) -> Figures:
        """One engine, one measurement."""
        runner = ModelRunner(self.model, self.args.num_pages, PAGE_SIZE)
        cache = DeviceCache(self.args.num_pages, PAGE_SIZE)
        settings = HostSettings("bench", "bench", runner.bytes_per_page, low_watermark=0.9, high_watermark=0.95)
        limits = SchedulerLimits(self.args.running, 512, 8192, (), runner.bytes_per_page)
        scheduler = Scheduler(cache, limits, settings)
        loop = EngineLoop(scheduler, runner, copier=HostCopier(page_store(runner.kv_pool), settings))
        self._fill(cache)
        try:
            return self._measure(loop, case)
        finally:
            loop.close()

    def _fill(self, cache: DeviceCache) -> None:
        """Publish prompts nobody has computed, until little is free; every run has tokens of its own."""
        rng = np.random.default_rng(next(self.seeds))
        num_tokens = RUN_PAGES * PAGE_SIZE
        while cache.counts().free > self.args.running * RUN_PAGES:
            tokens = rng.integers(0, 1 << 30, num_tokens).astype(np.int32).tobytes()
            hold = cache.open(DEFAULT_NAMESPACE, tokens, 0, 0.0)
            assert cache.try_extend(hold, num_tokens)
            cache.publish(hold, tokens, num_tokens, 0.0)
            cache.close(hold)

    def _measure(self, loop: EngineLoop, case: str) -> Figures:
        times: list[float] = []
        loop._on_outputs = partial(_note_time, times)
        prompt = np.arange(32, dtype=np.int32).tobytes()
        params = SamplingParams(temperature=0.0, max_new_tokens=MAX_STEPS + WARM_STEPS, ignore_eos=True)
        for number in range(self.args.running):
            loop.post(RequestArrived(Request(f"{next(self.seeds)}-{number}", prompt, params)))
        _turn_until(loop, lambda: len(times) >= WARM_STEPS)
        del times[:-1]
        if case == WITH:
            loop.attach_tier(self.node.place())
            _turn_until(loop, lambda: _written(loop) >= self.args.gb * 1e9 or len(times) > MAX_STEPS)
            self.num_steps = len(times)
        else:
            _turn_until(loop, lambda: len(times) >= self.num_steps)
        gaps = np.diff(times) * 1e3
        self.gaps_ms[case] += gaps.tolist()
        return {
            "p50_ms": float(np.percentile(gaps, 50)),
            "p99_ms": float(np.percentile(gaps, 99)),
            "worst_ms": float(gaps.max()),
            "steps": float(len(gaps)),
            "written_gb": _written(loop) / 1e9,
            "gb_per_s": _written(loop) / 1e9 / (times[-1] - times[0]),
        }


def _note_time(times: list[float], outputs: list[Output]) -> None:
    times.append(time.perf_counter())


def _turn_until(loop: EngineLoop, is_done: Callable[[], bool]) -> None:
    while not is_done():
        loop.turn()


def _written(loop: EngineLoop) -> int:
    host = loop.snapshot().host
    return 0 if host is None else host.written_bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gb", type=float, default=1.0)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--running", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as folder:
        write_demo_model(Path(folder), "small")
        model = load_model(Path(folder), "cpu", "float32", None)
    page_bytes = ModelRunner(model, 1, PAGE_SIZE).bytes_per_page
    args.num_pages = int(args.gb * 1e9 * 1.15 / page_bytes) + args.running * 2 * RUN_PAGES
    with host_node(args.num_pages, page_bytes) as node:
        for _ in node.arena.prefault():
            pass
        bench = Bench(model, node, args)
        cases = {WITH: partial(bench.run, WITH), WITHOUT: partial(bench.run, WITHOUT)}
        for case in cases.values():
            case()
        bench.gaps_ms = {WITH: [], WITHOUT: []}
        report(f"tokens beside write-back, pages of {page_bytes:,} B", alternate(cases, args.runs))
    p99 = {case: float(np.percentile(gaps, 99)) for case, gaps in bench.gaps_ms.items()}
    p50 = {case: median(gaps) for case, gaps in bench.gaps_ms.items()}
    print(f"  p50 of all runs: {p50[WITH]:.2f} ms beside {p50[WITHOUT]:.2f}, {p50[WITH] / p50[WITHOUT]:.2f} times")
    print(
        f"  p99 of all runs: {p99[WITH]:.2f} ms beside {p99[WITHOUT]:.2f}, {p99[WITH] / p99[WITHOUT]:.2f} times (1.3)"
    )


if __name__ == "__main__":
    main()
