"""Profiles of a real engine: the steps asked for and no others, in files that torch's own viewers open."""

from __future__ import annotations

import gzip
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch

from cache.device_cache import DeviceCache
from engine.demo_model import write_demo_model
from engine.limits import SchedulerLimits
from engine.loop import EngineLoop
from engine.models import LoadedModel, load_model
from engine.profile_spec import Profiled, ProfileSpec
from engine.profiler import IN_PROGRESS, Profiler
from engine.request import Request, SamplingParams
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from tests.fakes import tokens_of

MAX_STEPS = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    directory = tmp_path_factory.mktemp("profile") / "tiny"
    write_demo_model(directory, "tiny")
    return load_model(directory, "cpu", "float32", None)


class Rank:
    """An engine with a profiler, driven by the test."""

    def __init__(self, model: LoadedModel, root: Path, **more: Any) -> None:
        self.root = root
        self.profiler = Profiler(root, torch.device("cpu"), MAX_STEPS, **more)
        scheduler = Scheduler(DeviceCache(128, 8), SchedulerLimits(8, 16, 512))
        self.loop = EngineLoop(scheduler, ModelRunner(model, 128, 8), observer=self.profiler)
        self.profiler.wake = self.loop.wake

    def serve(self, num_prompt: int = 40, num_new: int = 6, first: int = 5) -> list[int]:
        params = SamplingParams(temperature=0.0, max_new_tokens=num_new, ignore_eos=True)
        request = Request(f"r{num_prompt}-{num_new}", tokens_of(list(range(first, first + num_prompt))), params)
        return self.loop.generate([request])[0].token_ids

    def start(self, spec: ProfileSpec) -> str:
        return self.profiler.start(spec, "rank0")

    def stop(self) -> Profiled:
        ended = self.profiler.stop()
        assert ended is not None
        self.loop.turn()
        return ended.result(10)

    def steps(self, name: str) -> Counter[str]:
        """How many steps of each kind a trace holds."""
        with gzip.open(self.root / name, "rt") as file:
            events = json.load(file)["traceEvents"]
        found = (re.match(r"(step|prefill|decode) \d+: ", str(event.get("name"))) for event in events)
        return Counter(match[1] for match in found if match is not None)


@pytest.fixture
def new_rank(model: LoadedModel, tmp_path: Path) -> Iterator[Callable[..., Rank]]:
    ranks: list[Rank] = []

    def make(**more: Any) -> Rank:
        ranks.append(Rank(model, tmp_path, **more))
        return ranks[-1]

    yield make
    for rank in ranks:
        rank.profiler.close()


def test_from_start_to_stop(new_rank: Callable[..., Rank]) -> None:
    rank = new_rank()
    plain = rank.serve()
    assert rank.start(ProfileSpec("p-1", folder="a/b", prefix="bench")) == ""
    assert rank.profiler.running_id == "p-1"
    assert rank.serve(num_prompt=41) != []
    (trace,) = rank.stop().traces
    assert trace.name == "a/b/bench-p-1-rank0.trace.json.gz"
    assert trace.num_bytes == (rank.root / trace.name).stat().st_size
    assert rank.steps(trace.name) == {"step": trace.num_steps}
    assert trace.num_steps >= 6
    assert rank.profiler.running_id == ""
    assert rank.profiler.stop() is None
    # nothing else is left behind, and the engine answers as before
    assert [path.name for path in rank.root.rglob("*") if path.is_file()] == ["bench-p-1-rank0.trace.json.gz"]
    assert rank.serve() == plain


def test_the_steps_that_were_asked_for(new_rank: Callable[..., Rank]) -> None:
    rank = new_rank()
    assert rank.start(ProfileSpec("p-2", start_step=3, num_steps=2)) == ""
    rank.serve()
    rank.profiler.close()
    (path,) = rank.root.glob("*.gz")
    with gzip.open(path, "rt") as file:
        text = file.read()
    assert rank.steps(path.name) == {"step": 2}
    assert {int(number) for number in re.findall(r'"step (\d+): ', text)} == {3, 4}
    assert rank.profiler.running_id == ""


def test_a_trace_for_each_stage(new_rank: Callable[..., Rank]) -> None:
    """The first prompt is two chunks of at most 16 tokens, the second three: decode steps lie between the four."""
    rank = new_rank()
    assert rank.start(ProfileSpec("p-3", num_steps=4, by_stage=True)) == ""
    rank.serve(num_prompt=30, num_new=4)
    rank.serve(num_prompt=45, num_new=9, first=100)
    rank.profiler.close()
    names = {stage: f"p-3-rank0-{stage}.trace.json.gz" for stage in ("prefill", "decode")}
    assert {path.name for path in rank.root.iterdir()} == set(names.values())
    for stage, name in names.items():
        assert rank.steps(name) == {stage: 4}


def test_one_at_a_time_and_each_id_once(new_rank: Callable[..., Rank]) -> None:
    rank = new_rank()
    assert rank.profiler.stop() is None
    assert rank.start(ProfileSpec("p-4")) == ""
    assert rank.start(ProfileSpec("p-5")) == IN_PROGRESS
    rank.serve()
    assert len(rank.stop().traces) == 1
    assert "was used before" in rank.start(ProfileSpec("p-4"))
    assert rank.start(ProfileSpec("p-5")) == ""
    idle = rank.stop()
    assert (idle.traces, "idle" in idle.message) == ((), True)


def test_traces_stay_below_the_root(new_rank: Callable[..., Rank], tmp_path_factory: pytest.TempPathFactory) -> None:
    rank = new_rank()
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (rank.root / "link").symlink_to(elsewhere)
    for folder in ("..", "/etc", "a/../../b", "link", str(elsewhere)):
        assert "below the root" in rank.start(ProfileSpec("p-6", folder=folder)), folder
    inside = str(rank.root / "inside")
    assert rank.start(ProfileSpec("p-6", folder=inside)) == ""
    rank.stop()
    assert list(elsewhere.iterdir()) == []


def test_a_profile_that_nobody_stops_ends(new_rank: Callable[..., Rank]) -> None:
    rank = new_rank()
    assert rank.start(ProfileSpec("p-7", num_steps=10**9, with_stack=False)) == ""
    rank.serve(num_new=MAX_STEPS + 10)
    rank.profiler.close()
    assert rank.steps("p-7-rank0.trace.json.gz") == {"step": MAX_STEPS}


def test_an_idle_engine_is_woken_by_the_stop(new_rank: Callable[..., Rank]) -> None:
    rank = new_rank()
    thread = Thread(target=rank.loop.run)
    thread.start()
    try:
        assert rank.start(ProfileSpec("p-8")) == ""
        ended = rank.profiler.stop()
        assert ended is not None
        assert ended.result(10).traces == ()
    finally:
        rank.loop.stop()
        thread.join(10)


def test_what_the_device_has_not_is_said(new_rank: Callable[..., Rank]) -> None:
    rank = new_rank()
    assert "computes on the CPU" in rank.start(ProfileSpec("p-9", activities=("GPU",)))
    assert rank.start(ProfileSpec("p-9", activities=("CPU", "GPU", "MEM"))) == ""
    rank.serve()
    profiled = rank.stop()
    assert "computes on the CPU" in profiled.message
    assert len(profiled.traces) == 1


def test_a_profiler_that_fails_ends_itself_and_no_step(new_rank: Callable[..., Rank]) -> None:
    class Broken:
        """torch's profiler when CUPTI is in other hands."""

        def __init__(self, **options: Any) -> None:
            self.is_warm_up = set(options) == {"activities"}

        def start(self) -> None:
            if not self.is_warm_up:
                raise RuntimeError("CUPTI is busy\nand more")

        def stop(self) -> None: ...

    rank = new_rank(record=Broken)
    assert rank.start(ProfileSpec("p-10")) == ""
    assert len(rank.serve()) == 6
    rank.profiler.close()
    assert rank.profiler.running_id == ""
    assert not list(rank.root.glob("*"))
