"""A whole engine with a host tier: real model, real copier thread, real arena."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cache.device_cache import DeviceCache
from cache.write_policy import WritePolicy
from engine.host_calls import HostSettings
from engine.host_copier import HostCopier
from engine.limits import SchedulerLimits
from engine.loop import EngineLoop
from engine.models import load_model
from engine.page_store import page_store
from engine.request import Request, SamplingParams
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from tests.fakes import tokens_of
from tests.host_tier import HostNode, host_node
from tests.models import write_random_model
from tests.oracle import PlainModel

PAGE_SIZE = 8


class Rank:
    """An engine on a node's tier; the scheduler is looked over after each test."""

    def __init__(self, directory: Path, num_pages: int, policy: WritePolicy, node: HostNode | None = None) -> None:
        self.runner = ModelRunner(load_model(directory, "cpu", "float32", None), num_pages, PAGE_SIZE)
        # what an earlier owner left in a page must not matter, NaN included
        self.runner.kv_pool.pages.fill_(float("nan"))
        facts = self.runner.facts
        settings = HostSettings(
            facts.layout_digest,
            facts.weights_digest,
            self.runner.bytes_per_page,
            policy,
            low_watermark=0.3,
            high_watermark=0.5,
        )
        self.cache = DeviceCache(num_pages, PAGE_SIZE)
        self.scheduler = Scheduler(self.cache, SchedulerLimits(16, 192, 2048), settings)
        copier = HostCopier(page_store(self.runner.kv_pool), settings)
        self.loop = EngineLoop(self.scheduler, self.runner, copier=copier)
        if node is not None:
            self.loop.attach_tier(node.place())


@contextmanager
def model_and_node(tmp_path: Path, num_slots: int = 512) -> Iterator[tuple[Path, HostNode]]:
    directory = write_random_model(tmp_path, "llama")
    page_bytes = ModelRunner(load_model(directory, "cpu", "float32", None), 1, PAGE_SIZE).bytes_per_page
    with host_node(num_slots, page_bytes) as node:
        yield directory, node


def requests_of(prompts: list[list[int]], num_new: int, prefix: str = "r") -> list[Request]:
    params = SamplingParams(temperature=0.0, max_new_tokens=num_new, ignore_eos=True)
    return [Request(f"{prefix}{n}", tokens_of(prompt), params) for n, prompt in enumerate(prompts)]


@pytest.mark.parametrize("policy", ["write_back", "write_through", "write_through_selective"])
def test_pages_that_left_the_device_come_back_from_the_host(tmp_path: Path, policy: WritePolicy) -> None:
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 512, 90).tolist() for _ in range(6)]
    with model_and_node(tmp_path) as (directory, node):
        rank = Rank(directory, 24, policy, node)
        try:
            answers = [
                rank.loop.generate(requests_of([prompt], 6, prefix=f"{lap}-{n}-"))[0]
                for lap in range(3)
                for n, prompt in enumerate(prompts)
                for _ in range(2 if lap == 0 else 1)
            ]
        finally:
            rank.loop.close()
        rank.scheduler.check()
        node.check()
        plain = PlainModel(directory)
        for answer in answers:
            prompt = prompts[int(answer.request_id.split("-")[1])]
            plain.compare(prompt, answer.token_ids)
        host = rank.loop.snapshot().host
        assert host is not None
        print(policy, host)
        assert min(host.num_loaded_pages, host.num_written_pages, rank.cache.num_evicted_pages) > 20
