"""A whole engine with a host tier: real model, real copier thread, real arena."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from cache.device_cache import DeviceCache
from cache.write_policy import WritePolicy
from engine.events import RequestArrived
from engine.flush import FlushMode
from engine.flush_gate import PendingFlush
from engine.generation import Collector, Generation
from engine.host_calls import HostSettings
from engine.host_copier import HostCopier
from engine.limits import SchedulerLimits
from engine.loop import EngineLoop
from engine.models import load_model
from engine.page_store import page_store
from engine.request import Request, SamplingParams
from engine.runner import ModelRunner
from engine.scheduler import Scheduler
from tests.fakes import flush_command, tokens_of
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
        self.flushes: list[PendingFlush] = []
        if node is not None:
            self.loop.attach_tier(node.place())

    def offer_flush(self, mode: FlushMode, epoch: int) -> None:
        offered = self.loop.offer_flush(flush_command(f"f{epoch}", mode, epoch=epoch, budget_s=600.0))
        assert isinstance(offered, PendingFlush)
        self.flushes.append(offered)

    def settle(self) -> None:
        """Take turns until no copy is under way."""
        while self.loop.turn() or self.scheduler.num_copies_in_flight:
            if not self.scheduler.has_work:
                self.loop._sleep()


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


def serve(rank: Rank, requests: list[Request], flush: FlushMode | None = None, epoch: int = 0) -> list[Generation]:
    """Post a few at a time, offer the flush while they run, turn until all have ended."""
    collector = Collector(requests)
    rank.loop._on_outputs = collector.take
    waiting = list(requests)
    num_turns = 0
    while collector.open_ids:
        num_turns += 1
        if num_turns == 10 and flush is not None:
            rank.offer_flush(flush, epoch)
        for request in waiting[:3]:
            rank.loop.post(RequestArrived(request))
        del waiting[:3]
        if not rank.loop.turn() and collector.open_ids and not waiting:
            assert rank.scheduler.num_copies_in_flight, "nothing to do, nothing under way, and requests are open"
            rank.loop._sleep()
    rank.settle()
    return collector.generations


@pytest.mark.parametrize("policy", ["write_back", "write_through", "write_through_selective"])
def test_two_ranks_on_one_arena_equal_plain_generation(tmp_path: Path, policy: WritePolicy) -> None:
    """16 at once in pools so small that most pages travel; the second rank sees only what the first has computed."""
    rng = np.random.default_rng(7)
    stems = [rng.integers(0, 512, length).tolist() for length in (60, 90, 130, 170)]
    #: equal questions with equal answers are compared once
    answers: dict[tuple[tuple[int, ...], tuple[int, ...]], Generation] = {}
    modes: tuple[FlushMode | None, ...] = (None, "fence", "retract", "drain")
    with model_and_node(tmp_path) as (directory, node):
        first, second = Rank(directory, 56, policy, node), Rank(directory, 56, policy, node)
        try:
            for lap, mode in enumerate(modes):
                prompts = [
                    stems[n % 4][: int(rng.integers(40, 171))] + rng.integers(0, 512, 9).tolist() for n in range(16)
                ]
                num_new = int(rng.integers(2, 8))
                # asked twice: `selective` copies what is hit
                parts: list[tuple[Rank, FlushMode | None]] = [(first, mode), (first, None), (second, None)]
                for part, (rank, flush) in enumerate(parts):
                    if rank is second and mode is not None:
                        second.offer_flush("fence", epoch=lap)
                        node.page.raise_floor(1, lap)
                    requests = requests_of(prompts, num_new, prefix=f"{lap}-{part}-")
                    for prompt, answer in zip(prompts, serve(rank, requests, flush, lap), strict=True):
                        answers[tuple(prompt), tuple(answer.token_ids)] = answer
                    rank.scheduler.check()
                    node.check()
        finally:
            first.loop.close()
            second.loop.close()
        node.check()
    plain = PlainModel(directory)
    for (prompt, token_ids), answer in answers.items():
        assert answer.finish == "length"
        plain.compare(list(prompt), list(token_ids))
    counts = {"ties": plain.num_ties}
    for name, rank in (("first", first), ("second", second)):
        snapshot = rank.loop.snapshot()
        host = snapshot.host
        assert host is not None
        counts |= {
            f"{name} loaded": host.num_loaded_pages,
            f"{name} evicted": snapshot.num_evicted_pages,
            f"{name} written": host.num_written_pages if rank is first else 1,
        }
        print(policy, name, host, snapshot.counters.num_retractions)
    assert counts.pop("ties") <= 1
    assert all(counts.values()), counts
    assert [pending.ended.result(0).status for pending in (*first.flushes, *second.flushes)] == ["flushed"] * 6
    assert any(answer.stats is not None and answer.stats.cached_by_tier["host"] for answer in answers.values())


def test_flipped_bits_cost_time_and_never_a_token(tmp_path: Path) -> None:
    """One bit in each page of the arena, as another process or the memory itself may flip it."""
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, 512, 70).tolist() for _ in range(8)]
    with model_and_node(tmp_path) as (directory, node):
        rank = Rank(directory, 96, "write_through", node)
        try:
            rank.loop.generate(requests_of(prompts, 4, "before"))
            rank.settle()
            num_pages = node.num_committed
            for slot in node.tier.order:
                node.arena.pages[slot, rng.integers(rank.runner.bytes_per_page)] ^= 1 << int(rng.integers(8))
            offered = rank.loop.offer_flush(flush_command("f", "fence", epoch=0))
            assert isinstance(offered, PendingFlush)
            rank.loop.turn()
            answers = rank.loop.generate(requests_of(prompts, 4, "after"))
            rank.settle()
        finally:
            rank.loop.close()
        rank.scheduler.check()
        node.check()
        host = rank.loop.snapshot().host
        assert host is not None
        assert num_pages == len(prompts) * 9
        assert (host.num_loaded_pages, host.misses["corrupt"]) == (0, len(prompts))
        assert node.tier.counts().quarantined == len(prompts), "each bad page that was read is out of use"
    plain = PlainModel(directory)
    for prompt, answer in zip(prompts, answers, strict=True):
        plain.compare(prompt, answer.token_ids)
