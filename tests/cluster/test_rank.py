"""Ranks on real Ray and Serve: what a kill of each process does to streams, to the rank, and to the controller."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import ray
from ray import serve

from actors.controller import ensure_controller
from actors.fleet import Fleet
from actors.messages import NAMESPACE, Member
from configs.errors import RankLost
from configs.schema import Settings
from deployments.rank import rank_deployment
from engine.request import Output, Request, SamplingParams
from tests.fakes import tokens_of
from tests.unit.actors.ranks import until

pytestmark = pytest.mark.cluster

NUM_RANKS = 2
CPU_RANK = "cpu_rank"


@pytest.fixture(scope="module")
def settings(tiny_model: Path) -> Iterator[Settings]:
    """Two ranks of the tiny model on a Ray and a Serve of our own, torn down at the end."""
    folder = Path(tempfile.mkdtemp(prefix="tgr-"))
    settings = Settings.model_validate(
        {
            "model": {"path": tiny_model},
            "engine": {"device": "cpu", "threads": 1, "num_pages": 512},
            "ray": {"cpu_rank_resource": CPU_RANK, "tcp": False},
            "control": {"shared_dir": folder},
            "dp": NUM_RANKS,
            "state_dir": folder / "state",
        }
    )
    ray.init(
        address="local", num_cpus=4, resources={CPU_RANK: NUM_RANKS}, include_dashboard=False, namespace=NAMESPACE,
        object_store_memory=100 * 2**20, log_to_driver=False, configure_logging=False, _temp_dir=str(folder / "ray"),
    )  # fmt: skip
    try:
        serve.start(proxy_location="Disabled")
        serve.run(rank_deployment(settings).bind(settings), name="ranks", route_prefix=None)
        yield settings
    finally:
        serve.shutdown()
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


class Cluster:
    """The ranks as an Api process sees them, and their processes."""

    def __init__(self, settings: Settings, controller: Any, fleet: Fleet) -> None:
        self.settings = settings
        self.controller = controller
        self.fleet = fleet

    async def members(self, condition: Callable[[tuple[Member, ...]], bool] = lambda members: True) -> list[Member]:
        """The members by rank, as soon as there are all and `condition` holds."""
        version = -1
        while True:
            membership = await self.controller.membership.remote(version, 30)
            version = membership.version
            if len(membership.members) == NUM_RANKS and condition(membership.members):
                return sorted(membership.members, key=lambda member: member.rank)

    async def returned(self, gone: str) -> list[Member]:
        """All members again, without the incarnation that is gone."""
        return await self.members(lambda members: all(member.incarnation != gone for member in members))

    async def answer(self, incarnation: str, asked: Request) -> list[int]:
        """Wait until this process, too, knows the incarnation; then generate."""
        await until(lambda: incarnation in {member.incarnation for member in self.fleet.members().members})
        return [token async for output in self.fleet.generate(incarnation, asked) for token in output.token_ids]

    async def scheduler_pid(self, incarnation: str) -> int:
        status = await self.controller.status.remote()
        return next(row["pid"] for row in status["ranks"] if row["incarnation"] == incarnation)

    def sockets(self) -> set[str]:
        return {path.name.partition("-")[0] for path in (self.settings.resolved_state_dir / "ipc").iterdir()}


@asynccontextmanager
async def api_process(settings: Settings) -> AsyncIterator[Cluster]:
    controller: Any = ensure_controller(settings)

    async def watch(known_version: int, timeout_s: float) -> Any:
        return await controller.membership.remote(known_version, timeout_s)

    fleet = Fleet(watch, ray.get_runtime_context().get_node_id())
    await fleet.start()
    try:
        yield Cluster(settings, controller, fleet)
    finally:
        await fleet.close()


def run(coroutine: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(coroutine, 120))


def request(request_id: str, num_tokens: int = 12) -> Request:
    sampling = SamplingParams(temperature=0.0, max_new_tokens=num_tokens, ignore_eos=True)
    return Request(request_id, tokens_of(range(1, 40)), sampling)


def wrappers_beside(scheduler_pid: int) -> list[int]:
    """Pids of the Rank replicas of the cluster (the raylet) that the scheduler belongs to."""
    raylet = parent_of(scheduler_pid)
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        try:
            title = (entry / "cmdline").read_bytes() if entry.name.isdigit() else b""
            if title.startswith(b"ray::ServeReplica:ranks:rank") and parent_of(int(entry.name)) == raylet:
                found.append(int(entry.name))
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def test_ranks_register_and_answer_alike(settings: Settings) -> None:
    async def scenario() -> None:
        async with api_process(settings) as cluster:
            members = await cluster.members()
            assert [member.rank for member in members] == [0, 1]
            answers = [await cluster.answer(m.incarnation, request(f"r{m.rank}")) for m in members]
            assert len(answers[0]) == 12
            assert answers[0] == answers[1]
            assert cluster.sockets() == {member.incarnation for member in members}
            named: list[Any] = ray.util.list_named_actors(all_namespaces=True)
            names = {actor["name"] for actor in named}
            assert names >= {f"scheduler-{member.rank}-{member.incarnation}" for member in members}

    run(scenario())


def test_a_killed_scheduler_ends_its_streams_and_a_new_incarnation_serves(settings: Settings) -> None:
    async def scenario() -> None:
        async with api_process(settings) as cluster:
            victim, other = await cluster.members()
            asked = request("victim", 1900)
            async with aclosing(cluster.fleet.generate(victim.incarnation, asked)) as stream:
                await anext(stream)
                bystander = asyncio.create_task(cluster.answer(other.incarnation, request("bystander", 400)))
                os.kill(await cluster.scheduler_pid(victim.incarnation), signal.SIGKILL)
                begin = time.monotonic()
                with pytest.raises(RankLost):
                    _ = [output async for output in stream]
            assert time.monotonic() - begin < 1.0
            assert len(await bystander) == 400
            begin = time.monotonic()
            members = await cluster.returned(victim.incarnation)
            print(f"scheduler killed: a new incarnation after {time.monotonic() - begin:.1f} s")
            assert [member.rank for member in members] == [0, 1]
            fresh = next(member for member in members if member.incarnation != other.incarnation)
            assert len(await cluster.answer(fresh.incarnation, request("after"))) == 12
            # the dead one's socket was swept when the new one began
            assert cluster.sockets() == {member.incarnation for member in members}
            assert (await cluster.controller.hello.remote())["controller_restarts"] == 0

    run(scenario())


def test_a_killed_replica_takes_its_scheduler_along_and_comes_back(settings: Settings) -> None:
    async def scenario() -> None:
        async with api_process(settings) as cluster:
            members = await cluster.members()
            streams = {
                m.incarnation: cluster.fleet.generate(m.incarnation, request(m.incarnation, 1900)) for m in members
            }
            for stream in streams.values():
                await anext(stream)
            pid = await cluster.scheduler_pid(members[0].incarnation)
            wrappers = wrappers_beside(pid)
            assert len(wrappers) == NUM_RANKS
            os.kill(wrappers[0], signal.SIGKILL)
            ended = [incarnation for incarnation in streams if await is_lost(streams[incarnation])]
            assert len(ended) == 1
            back = await cluster.returned(ended[0])
            assert [member.rank for member in back] == [0, 1]
            for member in back:
                assert len(await cluster.answer(member.incarnation, request(f"after-{member.rank}"))) == 12
            assert (await cluster.controller.hello.remote())["controller_restarts"] == 0

    run(scenario())


async def is_lost(stream: AsyncIterator[Output]) -> bool:
    """Read a stream to its end: did its rank die?"""
    try:
        outputs = [output async for output in stream]
    except RankLost:
        return True
    assert outputs[-1].finish == "length"
    return False


def test_a_flush_through_the_controller_reaches_every_rank(settings: Settings) -> None:
    async def scenario() -> None:
        async with api_process(settings) as cluster:
            for member in await cluster.members():
                await cluster.answer(member.incarnation, request(f"warm-{member.rank}"))
            answer = await cluster.controller.flush.remote(timeout_s=10)
            assert answer["success"], answer
            assert [row["status"] for row in answer["ranks"]] == ["flushed", "flushed"]
            assert all(row["freed_pages"] > 0 for row in answer["ranks"])

    run(scenario())
