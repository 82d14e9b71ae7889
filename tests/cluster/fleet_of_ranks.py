"""Ranks of production on real Ray, but for the model, which tests can foretell; no Serve, no torch, quick to start."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import signal
import tempfile
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray

from actors.controller import ControllerActor
from actors.detached import find_actor, get_or_create
from actors.endpoints import new_incarnation
from actors.fleet import Fleet
from actors.messages import NAMESPACE, Member, Membership, RankRecord, Registered, node_agent_name
from actors.scheduler import SchedulerActor
from configs.schema import Settings
from engine.request import Request, SamplingParams
from tests.fakes import tokens_of
from tests.unit.actors.ranks import build_fake

#: a prompt of four pages, of which three are reused when it comes again
PROMPT = tuple(range(1, 14))
REUSED = 12


async def until(condition: Callable[[], Awaitable[bool]]) -> None:
    """Ask again until it holds; the scenario's own deadline ends it."""
    for _ in itertools.count():
        if await condition():
            return
        await asyncio.sleep(0.01)


@contextmanager
def ray_of_our_own(num_cpus: int = 16) -> Iterator[Path]:
    """Ray away from every other cluster of the machine; its folder, removed at the end."""
    folder = Path(tempfile.mkdtemp(prefix="tgc-"))
    ray.init(
        address="local", num_cpus=num_cpus, include_dashboard=False, object_store_memory=100 * 2**20,
        namespace=NAMESPACE, log_to_driver=False, configure_logging=False, _temp_dir=str(folder),
    )  # fmt: skip
    try:
        yield folder
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Rank:
    """One rank's actor."""

    incarnation: str
    actor: Any
    pid: int

    def send(self, signum: int) -> None:
        os.kill(self.pid, signum)


class Deployment:
    """A controller of its own name, its node's agent, and ranks."""

    def __init__(self, settings: Settings, name: str, node_id: str) -> None:
        self.settings = settings
        self.name = name
        self.node_id = node_id
        self.controller: Any = get_or_create(ControllerActor, name, settings)
        self.ranks: list[Rank] = []
        self.fleet = Fleet(self._membership, node_id)

    async def start_rank(self, rank: int) -> Rank:
        """Start one as its Serve replica does."""
        incarnation = new_incarnation()
        remote: Any = ray.remote(SchedulerActor)
        actor = remote.options(
            name=f"scheduler-{rank}-{incarnation}", namespace=NAMESPACE, num_cpus=0, max_concurrency=1000
        ).remote(self.settings, rank, incarnation, build_engine=build_fake)
        record: RankRecord = await actor.start.remote()
        registered: Registered = await self.controller.register.remote(record, actor)
        await actor.join.remote(registered)
        started = Rank(incarnation, actor, record.pid)
        self.ranks.append(started)
        return started

    async def flush(self, **arguments: Any) -> dict[str, Any]:
        return await self.controller.flush.remote(**arguments)

    async def members(self, number: int) -> list[Member]:
        """The members by rank, as soon as there are so many."""
        membership = await self._membership(-1, 0)
        while len(membership.members) != number:
            membership = await self._membership(membership.version, 10)
        return sorted(membership.members, key=lambda member: member.rank)

    async def cached(self, rank: Rank, prompt: Sequence[int] = PROMPT) -> int:
        """Have a rank answer a prompt; how many of its tokens were reused."""
        sampling = SamplingParams(temperature=0.0, max_new_tokens=2, ignore_eos=True)
        asked = Request(uuid.uuid4().hex, tokens_of(prompt), sampling)

        async def is_known() -> bool:
            return rank.incarnation in {member.incarnation for member in self.fleet.members().members}

        await until(is_known)
        outputs = [output async for output in self.fleet.generate(rank.incarnation, asked)]
        stats = outputs[-1].stats
        assert stats is not None, "the last output of a request says what it reused"
        return stats.num_cached_tokens

    async def row_of_node(self) -> dict[str, Any]:
        (row,) = (await self.controller.status.remote())["nodes"]
        return row

    async def pid_of_controller(self) -> int:
        return (await self.controller.hello.remote())["pid"]

    async def agent(self) -> Any:
        """The agent's handle; it is made when the controller starts."""
        name = node_agent_name(self.name, self.node_id)

        async def is_made() -> bool:
            return await asyncio.to_thread(find_actor, name) is not None

        await until(is_made)
        return await asyncio.to_thread(find_actor, name)

    async def _membership(self, known_version: int, timeout_s: float) -> Membership:
        return await self.controller.membership.remote(known_version, timeout_s)


@asynccontextmanager
async def deployment(folder: Path, num_ranks: int = 2, **control: Any) -> AsyncIterator[Deployment]:
    """A deployment for one test, ended at its end; nothing of it stays in shared memory."""
    name = f"controller-{uuid.uuid4().hex[:8]}"
    shared_dir = Path(tempfile.mkdtemp(prefix="tgc-", dir="/dev/shm"))
    settings = Settings.model_validate(
        {
            "state_dir": folder / name,
            "control": control | {"shared_dir": shared_dir},
            "ray": {"deployment": name, "tcp": False},
        }
    )
    started = Deployment(settings, name, ray.get_runtime_context().get_node_id())
    try:
        await started.fleet.start()
        for rank in range(num_ranks):
            await started.start_rank(rank)
        await started.members(num_ranks)
        yield started
    finally:
        await started.fleet.close()
        for rank in started.ranks:
            _end(rank.pid)
        agent = await started.agent()
        for actor in (started.controller, agent):
            ray.kill(actor)
        shutil.rmtree(shared_dir)


def _end(pid: int) -> None:
    """End a rank, stopped ones too."""
    try:
        os.kill(pid, signal.SIGKILL)
    except ProcessLookupError:
        return
