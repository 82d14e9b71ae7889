"""`tidegate flush`, `cache` and `status` as processes, against the real routes on a real port."""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from deployments.auth import Keys
from engine.batch import Batch, StepResult
from tests.unit.deployments.api_server import Demo, Server, scenario, until
from tests.unit.deployments.on_a_port import on_a_port, traffic

TIDEGATE = str(Path(sys.executable).parent / "tidegate")


@dataclass
class Ran:
    status: int
    out: str
    err: str


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
async def busy(server: Server, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[None]:
    """One request in a step that lasts as long as the block: no idle moment, and nothing that takes time."""
    runner, inside, go_on = server.ranks[0].engine._runner, threading.Event(), threading.Event()
    run = runner.run

    def held(batch: Batch) -> StepResult:
        inside.set()
        assert go_on.wait(25)
        return run(batch)

    monkeypatch.setattr(runner, "run", held)
    request = asyncio.create_task(server.post("/generate", {"text": "on", "sampling_params": {"max_new_tokens": 2}}))
    await until(inside.is_set, "the step has begun")
    try:
        yield
    finally:
        go_on.set()
        await request
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
async def test_a_flush_is_read_and_cancelled_by_its_id(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    async with on_a_port(demo, num_ranks=1) as (server, url):

        async def is_pending() -> bool:
            pending = (await server.core.controller.status())["pending_flush"]
            return pending is not None and pending["waiting_for"] == ["incarnation-0"]

        async with busy(server, monkeypatch):
            waiting = asyncio.create_task(tidegate("flush", "--url", url, "--timeout", "20", "--id", "nightly"))
            await until(is_pending, "it is pending")
            pending, shown = await asyncio.gather(
                tidegate("flush", "--url", url, "--read", "nightly"), tidegate("cache", "--url", url)
            )
            cancelled = await tidegate("flush", "--url", url, "--cancel", "nightly")
            first = await waiting
        assert (pending.status, "pending" in pending.out) == (1, True), "a flush that runs is no success yet"
        assert "a flush is pending" in shown.out
        assert cancelled.status == 0, cancelled.out + cancelled.err
        assert (first.status, "cancelled" in first.out) == (1, True)
        again, unknown = await asyncio.gather(
            *(tidegate("flush", "--url", url, "--cancel", flush_id) for flush_id in ("nightly", "weekly"))
        )
        assert (again.status, "has ended" in again.out) == (1, True)
        assert (unknown.status, "'weekly'" in unknown.err) == (1, True)


@scenario
async def test_cancelling_and_reading_take_an_id_and_nothing_else(demo: Demo) -> None:
    more = (("--mode", "fence"), ("--read", "nightly"), ("--dry-run",))
    runs = await asyncio.gather(*(tidegate("flush", "--cancel", "nightly", *options) for options in more))
    for options, ran in zip(more, runs, strict=True):
        assert (ran.status, options[0] in ran.err) == (2, True), options


@scenario
async def test_the_audit_log_is_a_table_of_all_calls(demo: Demo) -> None:
    async with on_a_port(demo) as (_, url):
        scope = ("--prefix", "The tide turns ", "--tiers", "device", "--mode", "fence")
        assert (await tidegate("flush", "--url", url, "--id", "part", *scope)).status == 0
        assert (await tidegate("flush", "--url", url, "--tiers", "device,disk")).status == 2
        told = await tidegate("audit", "--url", url)
        assert told.status == 0, told.err
        refused, done = (line for line in told.out.splitlines() if "/v1/cache/flush" in line)
        assert "disk" in refused
        assert "invalid" in refused
        assert "2 flushed" in done
        assert "prefix" in done
        assert "part" in done
        one = json.loads((await tidegate("audit", "--url", url, "--id", "part", "--json")).out)
        assert [entry["flush_id"] for entry in one["entries"]] == ["part"]
        assert (await tidegate("audit", "--url", url, "--limit", "0")).status == 2


@scenario
async def test_a_flush_whose_answer_is_lost_says_how_to_ask_again(demo: Demo) -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async with await asyncio.start_server(hang_up, "127.0.0.1", 0) as door:
        url = f"http://127.0.0.1:{door.sockets[0].getsockname()[1]}"
        lost = await tidegate("flush", "--url", url)
        named = await tidegate("flush", "--url", url, "--id", "mine")
    assert (lost.status, "tidegate flush --read cli-" in lost.err) == (3, True)
    assert (named.status, "tidegate flush --read mine" in named.err) == (3, True)


@scenario
async def test_cache_and_status_show_every_rank(demo: Demo) -> None:
    async with on_a_port(demo) as (_, url):
        cache = await tidegate("cache", "--url", url)
        assert cache.status == 0, cache.err
        assert "incarnation-0" in cache.out
        assert "incarnation-1" in cache.out
        assert "epoch" in cache.out
        (device,) = (line for line in cache.out.splitlines() if line.startswith("device "))
        assert "512" in device, "the pages of both ranks"
        (node,) = (line for line in cache.out.splitlines() if line.startswith("node-"))
        assert "yes" in node
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
