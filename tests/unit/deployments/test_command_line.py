"""`tidegate flush`, `cache` and `status` as processes, against the real routes on a real port."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import uvicorn

from deployments.auth import Keys
from tests.unit.deployments.api_server import Demo, Server, scenario, serving, until

TIDEGATE = str(Path(sys.executable).parent / "tidegate")


@dataclass
class Ran:
    status: int
    out: str
    err: str


@asynccontextmanager
async def on_a_port(demo: Demo, keys: Keys | None = None, num_ranks: int = 2) -> AsyncIterator[tuple[Server, str]]:
    """The HTTP door on a port of its own, and its address."""
    async with serving(demo, num_ranks=num_ranks, keys=keys) as server:
        config = uvicorn.Config(server.app, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        door = uvicorn.Server(config)
        listener = config.bind_socket()
        running = asyncio.create_task(door.serve(sockets=[listener]))
        try:
            yield server, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            door.should_exit = True
            await running


async def tidegate(*arguments: str, **env: str) -> Ran:
    process = await asyncio.create_subprocess_exec(
        TIDEGATE, *arguments, env={"PATH": "/usr/bin:/bin", "HOME": "/nonexistent"} | env,
        stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
    )  # fmt: skip
    out, err = await process.communicate()
    assert process.returncode is not None
    assert b"Traceback" not in err
    return Ran(process.returncode, out.decode(), err.decode())


@asynccontextmanager
async def traffic(server: Server) -> AsyncIterator[None]:
    """Requests that follow one another without an idle moment: a process takes longer to start than the tiny model
    to write a page."""
    body = {"text": "on and on", "sampling_params": {"max_new_tokens": 1000, "ignore_eos": True}}

    async def client() -> None:
        while True:
            await server.post("/generate", body)

    clients = [asyncio.create_task(client()) for _ in range(3)]
    await until(lambda: not server.ranks[0].is_idle, "the rank runs")
    try:
        yield
    finally:
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        await server.idle()


@scenario
async def test_a_flush_is_a_table_or_json_and_a_status(demo: Demo) -> None:
    async with on_a_port(demo) as (server, url):
        done = await tidegate("flush", "--url", url, "--timeout", "5")
        assert done.status == 0, done.err
        assert "Cache flushed." in done.out
        assert sum("flushed" in line and "incarnation-" in line for line in done.out.splitlines()) == 2
        told = await tidegate("flush", "--json", TIDEGATE_URL=url)
        answer = json.loads(told.out)
        assert answer["success"] is True
        assert len(answer["ranks"]) == 2
        server.ranks[1].die()
        half = await tidegate("flush", "--url", url, "--json")
        assert (half.status == 0) is json.loads(half.out)["success"]


@scenario
async def test_a_refused_flush_is_status_1_and_bad_arguments_are_2(demo: Demo) -> None:
    async with on_a_port(demo, num_ranks=1) as (server, url):
        async with traffic(server):
            refused = await tidegate("flush", "--url", url)
        assert refused.status == 1
        assert "running" in refused.out
        for arguments in (("--timeout", "nan"), ("--tier", "disk"), ("--mode", "gently")):
            assert (await tidegate("flush", "--url", url, *arguments)).status == 2, arguments


@scenario
async def test_cache_and_status_show_every_rank(demo: Demo) -> None:
    async with on_a_port(demo) as (_, url):
        cache = await tidegate("cache", "--url", url)
        assert cache.status == 0, cache.err
        assert "incarnation-0" in cache.out
        assert "incarnation-1" in cache.out
        assert "epoch 0" in cache.out
        status = await tidegate("status", "--url", url, "--json")
        told = json.loads(status.out)
        assert (status.status == 0) is told["success"]
        assert told["model"] == "tiny"
        assert [row["dp_rank"] for row in told["ranks"]] == [0, 1]


@scenario
async def test_keys_come_from_options_or_the_environment(demo: Demo) -> None:
    async with on_a_port(demo, Keys(api_key="user", admin_key="admin"), num_ranks=1) as (_, url):
        without = await tidegate("flush", "--url", url)
        assert without.status == 1
        assert "admin key" in without.err
        assert (await tidegate("flush", "--url", url, "--admin-key", "admin")).status == 0
        assert (await tidegate("flush", "--url", url, TIDEGATE_ADMIN_KEY="admin")).status == 0
        assert (await tidegate("status", "--url", url)).status == 1


@scenario
async def test_nobody_there_is_status_3(demo: Demo) -> None:
    assert (await tidegate("flush", "--url", "http://127.0.0.1:1")).status == 3


@scenario
async def test_settings_that_cannot_work_are_status_2_before_anything_starts(demo: Demo, tmp_path: Path) -> None:
    (tmp_path / "bad.yaml").write_text("engine: {devise: cpu}\n")
    state = ("--state-dir", str(tmp_path / "state"))
    for arguments, reason in (
        (("--config", str(tmp_path / "bad.yaml")), "did you mean 'engine.device'?"),
        (("--set", "dp=0"), "'dp'"),
        (("--model", str(tmp_path)), "holds no config.json"),
        (("--device", "cuda", "--dp", "64"), "each rank needs 1 GPU"),
    ):
        # TMPDIR: where Ray's folder goes, since pytest's paths are too long for its sockets
        ran = await tidegate("serve", *state, *arguments, TMPDIR=str(tmp_path))
        assert ran.status == 2, arguments
        assert reason in ran.err
