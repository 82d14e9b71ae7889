"""A flush means flushed: on every rank, at once or by its deadline, never two at a time, from every door."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest

from tests.cluster.server import Server, until
from tests.cluster.sse import events

LONG = {"temperature": 0, "max_new_tokens": 1500, "ignore_eos": True}


def _cached_tokens(client: httpx.Client, prompt: list[int]) -> int:
    body = {"input_ids": prompt, "sampling_params": {"temperature": 0, "max_new_tokens": 4, "ignore_eos": True}}
    response = client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return int(response.json()["meta_info"]["cached_tokens"])


@contextmanager
def _running_stream(server: Server) -> Iterator[None]:
    """One request that decodes for as long as the block lasts."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        body = {"text": "Go on and on", "sampling_params": LONG, "stream": True}
        with client.stream("POST", "/generate", json=body) as response:
            # held: a generator that is dropped closes the response
            stream = events(response)
            next(stream)
            yield


def _idle(client: httpx.Client) -> None:
    def nothing_runs() -> bool:
        return all(load["num_running_reqs"] == 0 for load in client.get("/v1/loads").json()["loads"])

    until(nothing_runs, 10, "a request still runs")


def test_cached_tokens_are_page_aligned_before_a_flush_and_zero_after(client: httpx.Client) -> None:
    _idle(client)
    prompt = [(7 * i) % 250 + 1 for i in range(200)]
    assert client.post("/flush_cache?timeout=10").status_code == 200
    assert _cached_tokens(client, prompt) == 0
    # 199 tokens may be reused (one is always computed): 12 whole pages of 16
    assert _cached_tokens(client, prompt) == 192
    flushed = client.get("/flush_cache", params={"timeout": 10})
    assert flushed.status_code == 200
    assert flushed.text.startswith("Cache flushed.")
    assert _cached_tokens(client, prompt) == 0


def _flush_now(client: httpx.Client) -> httpx.Response:
    """A flush that does not wait. A disk that stalls for longer than its 50 ms gives `unavailable`: ask again."""
    answers: list[httpx.Response] = []

    def is_begun() -> bool:
        answers.append(client.post("/v1/cache/flush", json={"timeout_s": 0}))
        return answers[-1].json()["status"] != "unavailable"

    until(is_begun, 10, "the control log takes a record")
    return answers[-1]


def test_a_busy_rank_refuses_at_once_without_a_timeout(server: Server, client: httpx.Client) -> None:
    with _running_stream(server):
        response = client.post("/flush_cache")
        assert response.status_code == 400
        assert response.text.strip()
        verdict = _flush_now(client)
    assert verdict.status_code == 409, verdict.text
    rows = {row["status"]: row for row in verdict.json()["ranks"]}
    # the idle rank did flush, and says so; that makes no success of the whole
    assert set(rows) == {"refused", "flushed"}
    assert rows["refused"]["blockers"]["running"] == 1


def test_two_at_once_exactly_one_is_refused_and_the_other_ends_when_traffic_does(
    server: Server, client: httpx.Client
) -> None:
    answers: list[httpx.Response] = []
    with _running_stream(server):
        waiting = threading.Thread(
            target=lambda: answers.append(httpx.post(f"{server.url}/flush_cache?timeout=30", timeout=60))
        )
        waiting.start()
        until(lambda: client.get("/v1/cache").json()["pending_flush"] is not None, 10, "the flush is pending")
        second = client.post("/flush_cache?timeout=30")
        assert second.status_code == 400
        assert "Another flush_cache is already in progress." in second.text
    waiting.join(timeout=30)
    assert [answer.status_code for answer in answers] == [200]


def test_a_deadline_answers_with_what_was_in_the_way(server: Server, client: httpx.Client) -> None:
    with _running_stream(server):
        refused = client.post("/flush_cache?timeout=0.3")
        assert refused.status_code == 400
        assert "Timed out waiting for idle state." in refused.text
        verdict = client.post("/v1/cache/flush", json={"timeout_s": 0.2}).json()
    busy = [row for row in verdict["ranks"] if row["status"] == "timed_out"]
    assert len(busy) == 1
    assert busy[0]["blockers"]["running"] == 1
    assert verdict["success"] is False


@pytest.mark.parametrize("timeout", ["nan", "NaN", "inf", "-inf", "1e309", "-1", "abc", "", "true", "1e9"])
def test_senseless_timeouts_are_refused(client: httpx.Client, timeout: str) -> None:
    response = client.post(f"/flush_cache?timeout={timeout}")
    assert response.status_code == 400
    assert "timeout" in response.text


JOB = """
import json, math, os, sys
import ray
import cache, actors
assert "job's own" in cache.__doc__ and "job's own" in actors.__doc__
ray.init(log_to_driver=False)
controller = ray.get_actor("controller", namespace="tidegate")
answers = {
    "flush": ray.get(controller.flush.remote(timeout_s=30)),
    "nan": ray.get(controller.flush.remote(timeout_s=math.nan)),
    "text": ray.get(controller.flush.remote(timeout_s="soon")),
}
print("ANSWERS " + json.dumps(answers))
"""


def submit_job(server: Server, folder: Path) -> dict[str, Any]:
    """Run JOB with `ray job submit` from a folder that has packages of our names; the answers it printed."""
    for package in ("cache", "actors"):
        (folder / package).mkdir(parents=True)
        (folder / package / "__init__.py").write_text('"""The job\'s own."""\n')
    (folder / "job.py").write_text(JOB)
    env = server.env | server.exports()
    ray = str(Path(sys.executable).parent / "ray")
    command = [ray, "job", "submit", "--address", f"http://127.0.0.1:{server.dashboard_port}", "--working-dir", ".",
               "--", "python", "job.py"]  # fmt: skip
    tries: list[subprocess.CompletedProcess[str]] = []

    def is_taken() -> bool:
        """Ray's own agent, which starts jobs, may come up seconds after the server."""
        tries.append(
            subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120, check=False)
        )
        return "No available agent to submit job" not in tries[-1].stderr

    until(is_taken, 60, "Ray takes jobs")
    done = tries[-1]
    lines = [line for line in done.stdout.splitlines() if "ANSWERS " in line]
    assert done.returncode == 0, done.stdout + done.stderr
    assert lines, done.stdout + done.stderr
    return json.loads(lines[-1].partition("ANSWERS ")[2])


def test_a_job_without_our_packages_flushes_and_gets_plain_data(
    server: Server, client: httpx.Client, tmp_path: Path
) -> None:
    _idle(client)
    answers = submit_job(server, tmp_path / "job")
    assert answers["flush"]["success"] is True
    assert [row["status"] for row in answers["flush"]["ranks"]] == ["flushed", "flushed"]
    assert answers["nan"]["success"] is False
    assert answers["text"]["success"] is False
    assert "timeout_s" in answers["nan"]["message"]


def test_grpc_flushes_and_says_no(server: Server, client: httpx.Client) -> None:
    from smg_grpc_proto.generated import common_pb2, sglang_scheduler_pb2, sglang_scheduler_pb2_grpc

    _idle(client)
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        stub = sglang_scheduler_pb2_grpc.SglangSchedulerStub(channel)
        assert stub.HealthCheck(sglang_scheduler_pb2.HealthCheckRequest(), timeout=10).healthy
        info = stub.GetModelInfo(sglang_scheduler_pb2.GetModelInfoRequest(), timeout=10)
        assert info.vocab_size > 0
        assert stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=10), timeout=20).success
        with pytest.raises(grpc.RpcError) as refused:
            stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=float("nan")), timeout=10)
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
        with _running_stream(server):
            busy = stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=0), timeout=10)
            assert not busy.success
            assert busy.message
