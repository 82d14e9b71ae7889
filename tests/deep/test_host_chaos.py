"""Real processes on a real file in /dev/shm, killed and frozen at random: no wrong byte, no lost slot, no blocking."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from cache.host_reader import HostReader
from cache.orphans import sweep
from cache.types import Epoch
from tests.deep.chaos_processes import (
    CHAIN_PAGES,
    FENCE,
    NUM_CHAINS,
    NUM_SLOTS,
    PAGE_BYTES,
    STATS,
    Place,
    chain_keys,
    content_of,
    open_tier,
    run_rank,
    run_tier,
    split,
)

pytestmark = pytest.mark.deep

NUM_RANKS = 3
NUM_KILLS = 120


class Crew:
    """The processes of one run: role 0 is the index writer, the others are ranks."""

    def __init__(self, place: Place, context: ForkServerContext) -> None:
        self._place = place
        self._context = context
        self._num_started = 0
        self.processes: dict[int, BaseProcess] = {}
        #: writers that were left frozen for their successor to end
        self.left_frozen: list[BaseProcess] = []
        self.events: Counter[str] = Counter()

    def start(self, role: int) -> None:
        self._num_started += 1
        main: Callable[..., None] = run_rank if role else run_tier
        args = (self._place, role, self._num_started) if role else (self._place, self._num_started)
        process = self._context.Process(target=main, args=args, daemon=True)
        process.start()
        self.processes[role] = process

    def signal(self, role: int, number: int) -> None:
        pid = self.processes[role].pid
        assert pid is not None
        os.kill(pid, number)

    def kill(self, role: int) -> None:
        process = self.processes[role]
        assert process.is_alive(), f"role {role} ended by itself with {process.exitcode}"
        process.kill()
        process.join(10)
        self.events["writer" if role == 0 else "rank"] += 1
        self.start(role)

    def replace_frozen_writer(self) -> None:
        """The old writer is only frozen; the new one has to end it to get the lock."""
        self.signal(0, signal.SIGSTOP)
        old = self.processes[0]
        self.start(0)
        old.join(10)
        assert old.exitcode == -signal.SIGKILL
        self.events["frozen_writer"] += 1

    def freeze_a_moment(self, role: int, pause: Callable[[float], object]) -> None:
        self.signal(role, signal.SIGSTOP)
        pause(0.05)
        self.signal(role, signal.SIGCONT)
        self.events["frozen_rank"] += 1

    def end(self) -> None:
        for process in self.processes.values():
            process.kill()
        for process in self.processes.values():
            process.join(10)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    place = Place(tmp_path, Path("/dev/shm"))
    np.memmap(tmp_path / "stats", np.int64, "w+", shape=(16, len(STATS))).flush()
    yield place
    keep = {path.stem.removeprefix("tidegate-") for path in Path("/dev/shm").glob("tidegate-*")} - {place.paths.name}
    sweep(Path("/dev/shm"), FENCE, keep)


def test_invariants_12_14_and_15_hold_over_a_hundred_random_kills(place: Place):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.deep.chaos_processes"])
    crew, rng, pause = Crew(place, context), np.random.default_rng(20), threading.Event().wait
    try:
        for role in range(NUM_RANKS + 1):
            crew.start(role)
        while crew.events["writer"] + crew.events["rank"] < NUM_KILLS:
            pause(float(rng.uniform(0.01, 0.12)))
            chance = rng.random()
            if chance < 0.04:
                crew.replace_frozen_writer()
            elif chance < 0.15:
                crew.freeze_a_moment(int(rng.integers(1, NUM_RANKS + 1)), pause)
            else:
                crew.kill(int(rng.integers(0, NUM_RANKS + 1)))
        let_everybody_work(place, pause)
    finally:
        crew.end()
    check_stats(place, crew.events)
    check_what_is_left(place)


def let_everybody_work(place: Place, pause: Callable[[float], object]) -> None:
    """Nobody is blocked: every rank reads right pages after the last kill."""
    before, deadline_s = place.stats()[1 : NUM_RANKS + 1, 0].copy(), time.monotonic() + 30
    while not (place.stats()[1 : NUM_RANKS + 1, 0] > before + 20).all():
        assert time.monotonic() < deadline_s, "a rank makes no progress"
        pause(0.02)


def check_stats(place: Place, events: Counter[str]) -> None:
    totals = dict(zip(STATS, place.stats().sum(axis=0).tolist(), strict=True))
    print(f"\n{dict(events)} {totals}")
    assert totals["wrong"] == 0
    assert totals["hits"] > 1000
    assert totals["committed"] > 500
    assert min(events["writer"], events["rank"], events["frozen_writer"], events["frozen_rank"]) > 0


def check_what_is_left(place: Place) -> None:
    """With everybody dead the next writer finds every slot free or with a right page, and the cache is warm."""
    tier, close = open_tier(place, nonce=10**6)
    assert tier.sanity_check() == []
    counts = tier.counts()
    assert (counts.leased, counts.quarantined) == (0, 0)
    assert counts.free + counts.committed == NUM_SLOTS
    assert counts.committed > 0
    epoch = tier.page.read().floor
    reader = HostReader(tier.arena, tier.page)
    num_pages = 0
    for chain in range(NUM_CHAINS):
        keys = chain_keys(epoch, chain)
        match = reader.look_up(keys, Epoch(epoch))
        targets = [np.zeros(PAGE_BYTES, np.uint8) for _ in range(CHAIN_PAGES)]
        assert reader.load_chain(match, targets) == match.num_pages
        for key, target in zip(split(keys)[: match.num_pages], targets, strict=False):
            assert (target == content_of(key)).all()
        num_pages += match.num_pages
    assert num_pages > 0
    close()
