"""An idle flush over N ranks beside a bare asyncio fan-out to the same actors.

    python -m benchmarks.flush_fanout_bench [--ranks 2 8 32] [--trials 40] [--runs 5] [--settle-ms 30]

Ranks are real Ray actors, each a process, that answer a flush at once; controller, node agent, log and audit are those
of production. Per trial, in turn: a bare fan-out (an actor that gathers `flush.remote` of all ranks and does nothing
else) and a flush in mode `wait`, both asked for by this process, so that both have the same way there and back; then a
fence, and one call of the node's agent. Between two of them the machine settles, so that what comes behind an answer
(the audit log, synced) is not charged to the next trial. `flush_ratio` is the flush's median over the fan-out's in the
same run.

`fence_floor` is the time until the floor stands on the node's control page, from when no rank of the node matches
anything older: one call per node, whatever the number of ranks. A last fence finds every rank stopped (SIGSTOP): it
succeeds by those calls alone. A fence waits 10 ms and 2 ms for each rank for their own words: `fence_by_floor` is the
share of ranks that had not spoken until then, and of whom the answer says `fenced` instead of `flushed`.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shutil
import signal
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean, median, quantiles
from typing import Any

import ray

from actors.controller import ControllerActor
from actors.detached import find_actor, get_or_create
from actors.messages import NAMESPACE, Registered, node_agent_name
from benchmarks.harness import Figures, report
from benchmarks.idle_rank import IdleRank
from cache.control_page import ControlPage, FileIdentity
from cache.shared_file import FilePaths, attach
from cache.shared_words import fence_for
from configs.schema import Settings
from engine.flush import FlushCommand

FENCE = fence_for("x86_64")
TARGETS = [("", "flush_ratio", 1.3)]


class BareFanOut:
    """Calls all ranks at once and waits for all of them; nothing else."""

    def __init__(self, ranks: list[Any]) -> None:
        self._ranks = ranks

    async def flush(self, command: FlushCommand) -> float:
        """Milliseconds until the last verdict was there."""
        begin = time.perf_counter()
        verdicts = await asyncio.gather(*(rank.flush.remote(command) for rank in self._ranks))
        assert all(verdict.status == "flushed" for verdict in verdicts)
        return (time.perf_counter() - begin) * 1e3


class FloorWatch:
    """Sees in a thread when a node's control page shows a floor above the one it had."""

    def __init__(self, page: ControlPage) -> None:
        self._page = page

    def arm(self) -> Callable[[], float]:
        """Begin to look, about ten times a millisecond; call the result to wait for the perf_counter instant."""
        before = self._page.read().floor
        seen: list[float] = []
        pause = threading.Event()

        def look() -> None:
            while self._page.read().floor <= before:
                pause.wait(1e-4)
            seen.append(time.perf_counter())

        thread = threading.Thread(target=look, daemon=True)
        thread.start()

        def seen_at() -> float:
            thread.join(timeout=10)
            return seen[0]

        return seen_at


class Node:
    """One controller, its agent and ranks that are added as the benchmark goes on."""

    def __init__(self, settings: Settings) -> None:
        self.name = settings.ray.deployment
        self.controller: Any = get_or_create(ControllerActor, self.name, settings)
        self.ranks: list[Any] = []
        self.pids: list[int] = []
        self.bare: Any = None
        self.watch: FloorWatch

    async def grow(self, num_ranks: int) -> None:
        """Have so many ranks registered."""
        remote: Any = ray.remote(IdleRank)
        added = [remote.options(num_cpus=0, max_concurrency=1000).remote(rank)
                 for rank in range(len(self.ranks), num_ranks)]  # fmt: skip
        for rank in added:
            self.pids.append(await rank.pid.remote())
            registered = await rank.join.remote(self.controller)
            if not self.ranks:
                self.watch = FloorWatch(_page_of(registered))
            self.ranks.append(rank)
        fan_out: Any = ray.remote(BareFanOut)
        if self.bare is not None:
            ray.kill(self.bare)
        self.bare = fan_out.options(num_cpus=0, max_concurrency=1000).remote(self.ranks)

    async def agent(self) -> Any:
        node_id = ray.get_runtime_context().get_node_id()
        return await asyncio.to_thread(find_actor, node_agent_name(self.name, node_id))


async def one_run(node: Node, num_trials: int, settle_s: float) -> Figures:
    """Interleaved trials; medians in milliseconds."""
    agent = await node.agent()
    times: dict[str, list[float]] = {}
    term = (await node.controller.hello.remote())["term"]
    for trial in range(num_trials):
        command = FlushCommand(f"bare-{trial}", "wait", ("device",), 1, 1, 5.0)
        inside_ms = await _timed(times, "bare_ms", lambda command=command: node.bare.flush.remote(command))
        times.setdefault("bare_inside_ms", []).append(inside_ms)
        await asyncio.sleep(settle_s)
        answer = await _timed(times, "flush_ms", lambda: node.controller.flush.remote(timeout_s=5))
        _check(answer, {"flushed"}, len(node.ranks))
        times.setdefault("flush_inside_ms", []).append(answer["took_ms"])
        await asyncio.sleep(settle_s)
        begin, seen_at = time.perf_counter(), node.watch.arm()
        answer = await _timed(times, "fence_ms", lambda: node.controller.flush.remote(mode="fence"))
        num_fenced = _check(answer, {"flushed", "fenced"}, len(node.ranks))
        times.setdefault("fence_by_floor", []).append(num_fenced / len(node.ranks))
        times.setdefault("fence_floor_ms", []).append((seen_at() - begin) * 1e3)
        await _timed(times, "agent_call_ms", lambda: agent.raise_floor.remote(term, 0))
        await asyncio.sleep(settle_s)
    figures = {name: median(values) for name, values in times.items()}
    figures["fence_by_floor"] = fmean(times["fence_by_floor"])
    figures["flush_p99_ms"] = quantiles(times["flush_ms"], n=100)[-1]
    return figures | {"flush_ratio": figures["flush_ms"] / figures["bare_ms"]}


async def stopped_run(node: Node) -> Figures:
    """A fence while no rank can answer: the floor on the page is all there is."""
    for pid in node.pids:
        os.kill(pid, signal.SIGSTOP)
    try:
        begin = time.perf_counter()
        answer = await node.controller.flush.remote(mode="fence")
        took_ms = (time.perf_counter() - begin) * 1e3
    finally:
        for pid in node.pids:
            os.kill(pid, signal.SIGCONT)
    _check(answer, {"fenced"}, len(node.ranks))
    return {"fence_all_stopped_ms": took_ms}


async def _timed(times: dict[str, list[float]], name: str, call: Callable[[], Awaitable[Any]]) -> Any:
    begin = time.perf_counter()
    result = await call()
    times.setdefault(name, []).append((time.perf_counter() - begin) * 1e3)
    return result


def _check(answer: dict[str, Any], statuses: set[str], num_ranks: int) -> int:
    """How many ranks are fenced by the floor alone, in a success of all of them."""
    rows = [row["status"] for row in answer["ranks"]]
    assert answer["success"], answer["message"]
    assert set(rows) <= statuses, rows
    assert len(rows) == num_ranks
    return rows.count("fenced")


def _page_of(registered: Registered) -> ControlPage:
    place = registered.page
    file = attach(FilePaths(Path(place.directory), place.name), FENCE, FileIdentity(registered.lineage))
    assert file is not None
    return file.page


@contextmanager
def cluster() -> Iterator[Settings]:
    """Ray away from every other cluster of the machine, and settings whose files go with it."""
    folder = Path(tempfile.mkdtemp(prefix="tgb-"))
    shared_dir = Path(tempfile.mkdtemp(prefix="tgb-", dir="/dev/shm"))
    ray.init(
        address="local", num_cpus=16, include_dashboard=False, object_store_memory=100 * 2**20, namespace=NAMESPACE,
        log_to_driver=False, configure_logging=False, _temp_dir=str(folder),
    )  # fmt: skip
    try:
        control = {"shared_dir": shared_dir}
        ray_settings = {"deployment": f"bench-{os.getpid()}", "tcp": False}
        yield Settings.model_validate({"state_dir": folder / "state", "control": control, "ray": ray_settings})
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)
        shutil.rmtree(shared_dir, ignore_errors=True)


async def measure(settings: Settings, sizes: list[int], num_trials: int, num_runs: int, settle_s: float) -> None:
    node = Node(settings)
    results: dict[str, dict[str, list[float]]] = {}
    for size in sorted(sizes):
        await node.grow(size)
        await one_run(node, 5, settle_s)  # connections are made
        for run in range(num_runs):
            figures = await one_run(node, num_trials, settle_s)
            if run == num_runs - 1:
                figures |= await stopped_run(node)
            for name, value in figures.items():
                results.setdefault(f"{size} ranks", {}).setdefault(name, []).append(value)
    report("idle flush beside a bare fan-out", results, TARGETS)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 8, 32])
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--settle-ms", type=float, default=30.0)
    arguments = parser.parse_args()
    with cluster() as settings:
        asyncio.run(measure(settings, arguments.ranks, arguments.trials, arguments.runs, arguments.settle_ms / 1e3))


if __name__ == "__main__":
    main()
