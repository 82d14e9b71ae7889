"""Whole ranks without Ray: SchedulerActor on a real socket with a real engine thread; only the model is foretold."""

from __future__ import annotations

import asyncio
import itertools
import platform
import tempfile
import threading
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from actors.fleet import Fleet
from actors.messages import Member, Membership, PagePlace, RankRecord, Registered
from actors.node_processes import NodeProcesses
from actors.place import Place
from actors.rank_engine import EngineHooks, RankEngine
from actors.scheduler import SchedulerActor
from cache.control_page import ControlPageWriter, FileIdentity
from cache.device_cache import DeviceCache
from cache.shared_file import FileMaker, FilePaths
from cache.shared_words import MAX_WORD, Words, fence_for
from configs.schema import Settings
from engine.batch import Batch
from engine.limits import SchedulerLimits
from engine.loop import EngineLoop
from engine.request import Output, Request, SamplingParams
from engine.scheduler import Scheduler
from tests.fakes import EOS, VOCAB_SIZE, FakeRunner, foretell, tokens_of
from tests.unit.cache.node_files import FastClock

NODE = "node-here"
PAGE_SIZE = 4
NUM_PAGES = 4096
MAX_LEN = 8192
#: tokens of an answer that is still under way whatever the machine does meanwhile: a second and more of steps
LONG = 5000
#: word of a control page that holds the end of the lease
LEASE_END = 67
LIMITS = SchedulerLimits(16, 256, MAX_LEN, (EOS,), 1000, VOCAB_SIZE)


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a scenario on a loop of its own; hanging is failing."""
    asyncio.run(asyncio.wait_for(coroutine, 20))


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop turn until a fact holds that sends no event; the scenario's own deadline ends it."""
    for _ in itertools.count():
        if condition():
            return
        await asyncio.sleep(0)


def request(request_id: str = "r", prompt: Sequence[int] = (5, 6, 7), num_tokens: int = 8, attempt: int = 0) -> Request:
    """A greedy request that generates exactly `num_tokens`."""
    sampling = SamplingParams(temperature=0.0, max_new_tokens=num_tokens, ignore_eos=True)
    return Request(request_id, tokens_of(prompt), sampling, attempt=attempt)


def expected(asked: Request) -> list[int]:
    """The tokens that the fake model must answer."""
    return foretell(asked, LIMITS.max_total_tokens(NUM_PAGES * PAGE_SIZE)).token_ids


async def collect(fleet: Fleet, incarnation: str, asked: Request) -> list[Output]:
    """All outputs of one request."""
    return [output async for output in fleet.generate(incarnation, asked)]


def tokens(outputs: Sequence[Output]) -> list[int]:
    return [token for output in outputs for token in output.token_ids]


class Gate:
    """Holds the engine inside a step until it is let go."""

    def __init__(self, runner: FakeRunner) -> None:
        self.is_inside = threading.Event()
        self._go = threading.Event()
        runner.during_run = self._hold

    def _hold(self, batch: Batch) -> None:
        self.is_inside.set()
        assert self._go.wait(20)

    def open(self) -> None:
        self._go.set()


@dataclass
class Rank:
    """One running rank and what it told."""

    actor: SchedulerActor
    record: RankRecord
    runner: FakeRunner
    engine: EngineLoop
    state_dir: Path
    #: exit statuses the process was ended with
    exits: list[int] = field(default_factory=list)
    #: of its node; with a lease without end
    page: ControlPageWriter = field(init=False)

    @property
    def words(self) -> Words:
        """The page, word by word: a test may take a lease away, which no writer can."""
        return self.page._words

    @property
    def incarnation(self) -> str:
        return self.record.incarnation

    @property
    def member(self) -> Member:
        r = self.record
        return Member(
            r.rank, r.incarnation, r.node_id, r.ipc_endpoint, r.tcp_endpoint, r.max_len, r.page_size, r.tcp_key
        )

    @property
    def has_socket(self) -> bool:
        """Its socket file is there."""
        return Path(self.record.ipc_endpoint.removeprefix("ipc://")).is_socket()

    async def inside_a_step(self) -> Gate:
        """Close the gate and wait until the engine, which must have work, stands in a step."""
        gate = Gate(self.runner)
        assert await asyncio.to_thread(gate.is_inside.wait, 10)
        return gate


def control_page(folder: Path) -> ControlPageWriter:
    """A node's control page in a file, let go by its writer so that a rank of this process may map it."""
    maker = FileMaker(FileIdentity("lineage"), NodeProcesses(), FastClock(), fence_for(platform.machine()), nonce=1)
    owned = maker.open(FilePaths(folder, "n"))
    owned.close()
    return owned.page


def registered(folder: Path, *, term: int = 1, epoch: int = 0, floor: int = 0) -> Registered:
    """What a controller answers to a rank of the node whose page lies there."""
    return Registered(term, "lineage", epoch, floor, PagePlace(str(folder), "n", nonce=1))


def build_fake(settings: Settings, hooks: EngineHooks) -> RankEngine:
    """The engine of production around the fake model."""
    loop = EngineLoop(
        Scheduler(DeviceCache(NUM_PAGES, PAGE_SIZE), LIMITS),
        FakeRunner(NUM_PAGES, PAGE_SIZE),
        read_words=hooks.read_words,
        on_outputs=hooks.on_outputs,
        on_flush=hooks.on_flush,
    )
    return RankEngine(loop, MAX_LEN, PAGE_SIZE, NUM_PAGES, 1000, "layout", "weights")


@asynccontextmanager
async def running_rank(
    incarnation: str = "0123456789ab", *, number: int = 0, joined: bool = True, tcp: bool = False
) -> AsyncIterator[Rank]:
    """One rank that has joined at epoch 0 of term 1; stopped at the end. Its directory's path is short."""
    with tempfile.TemporaryDirectory(prefix="tg-") as folder:
        exits: list[int] = []
        built: list[RankEngine] = []

        def build(settings: Settings, hooks: EngineHooks) -> RankEngine:
            built.append(build_fake(settings, hooks))
            return built[0]

        settings = Settings.model_validate({"state_dir": folder, "ray": {"tcp": tcp}})
        place = Place(NODE, "127.0.0.1", (), f"scheduler-{number}-{incarnation}")
        actor = SchedulerActor(
            settings, number, incarnation, build_engine=build, find_place=lambda: place, end_process=exits.append
        )
        record = await actor.start()
        runner = built[0].loop._runner
        assert isinstance(runner, FakeRunner)
        rank = Rank(actor, record, runner, built[0].loop, Path(folder), exits)
        page = control_page(Path(folder))
        page.grant(1, 0, 0, MAX_WORD)
        rank.page = page
        if joined:
            await actor.join(registered(Path(folder)))
        try:
            yield rank
        finally:
            runner.during_run = lambda batch: None
            await actor.stop()


class Members:
    """A membership that the test changes; answers long polls as the controller does."""

    def __init__(self, *ranks: Rank) -> None:
        self.current = Membership(1, 0, 0, tuple(rank.member for rank in ranks))
        #: raised by polls while set
        self.failure: Exception | None = None
        self._changed = asyncio.Event()

    def set(self, *ranks: Rank, epoch: int = 0) -> None:
        members = tuple(rank.member for rank in ranks)
        self.current = Membership(self.current.version + 1, epoch, 0, members)
        self.wake()

    def wake(self) -> None:
        """Let a pending poll look again."""
        self._changed.set()
        self._changed = asyncio.Event()

    async def watch(self, known_version: int, timeout_s: float) -> Membership:
        while self.failure is None and known_version == self.current.version:
            await self._changed.wait()
        if self.failure is not None:
            raise self.failure
        return self.current


@asynccontextmanager
async def fleet_of(members: Members, node_id: str = NODE) -> AsyncIterator[Fleet]:
    """A started fleet, closed at the end."""
    fleet = Fleet(members.watch, node_id)
    await fleet.start()
    try:
        yield fleet
    finally:
        await fleet.close()


@asynccontextmanager
async def rank_and_fleet(**options: Any) -> AsyncIterator[tuple[Rank, Fleet]]:
    """One rank and one Api process that knows it."""
    async with running_rank(**options) as rank, fleet_of(Members(rank)) as fleet:
        yield rank, fleet
