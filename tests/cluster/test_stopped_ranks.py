"""A rank that is stopped, and a controller that is killed, in the middle of flushes of a real server."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml

from engine.demo_model import write_demo_model
from tests.cluster.server import Server, marked_processes, serving, until
from tests.cluster.sse import events

#: twenty in `make test-deep`: each wait takes its two seconds
TRIALS = 20 if os.environ.get("TIDEGATE_DEEP") else 4
TIMEOUT_S = 2.0
#: long enough to outlive a restart of the controller: the small model takes 10 ms a token
NUM_TOKENS = 1500
#: eight pages of 16, of which seven can be reused when the prompt comes again
PROMPT = [(7 * place) % 250 + 1 for place in range(128)]
REUSED = 112


def start(home: Path, model: Path, health_timeout_s: float) -> Any:
    """Two ranks of the small model; Serve replaces one that is silent for three times the health timeout."""
    home.mkdir()
    config = home / "config.yaml"
    config.write_text(yaml.safe_dump({"ray": {"health_timeout_s": health_timeout_s}}))
    return serving(home, "--model", str(model), "--dp", "2", "--config", str(config))


@pytest.fixture(scope="module")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("model") / "small"
    write_demo_model(directory, "small")
    return directory


@pytest.fixture(scope="module")
def patient(small_model: Path, short_home: Path) -> Iterator[Server]:
    """A server that leaves a stopped rank alone for as long as these tests take."""
    with start(short_home / "patient", small_model, health_timeout_s=120) as running:
        yield running


@pytest.fixture
def client(patient: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=patient.url, timeout=120) as http:
        yield http


def rank_row(client: httpx.Client, rank: int) -> dict[str, Any]:
    return next(row for row in client.get("/v1/cache").json()["ranks"] if row["rank"] == rank)


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    os.kill(pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


def cached_tokens(client: httpx.Client, rank: int) -> int:
    """How much of the prompt this rank reuses."""
    sampling = {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}
    body = {"input_ids": PROMPT, "sampling_params": sampling, "data_parallel_rank": rank}
    answer = client.post("/generate", json=body)
    assert answer.status_code == 200, answer.text
    return int(answer.json()["meta_info"]["cached_tokens"])


def takes_requests(client: httpx.Client, rank: int) -> bool:
    """Ray loses a process that is stopped for half a minute, and finds it again some seconds after it woke."""
    sampling = {"temperature": 0, "max_new_tokens": 1}
    body = {"input_ids": [1], "sampling_params": sampling, "data_parallel_rank": rank}
    return client.post("/generate", json=body).status_code == 200


def flush(client: httpx.Client, **body: Any) -> dict[str, Any]:
    return client.post("/v1/cache/flush", json=body).json()


def statuses(answer: dict[str, Any]) -> list[str]:
    return [row["status"] for row in answer["ranks"]]


def known_flush(client: httpx.Client, flush_id: str) -> dict[str, Any]:
    """What GET /v1/cache/flush/{id} says; {} while there is no controller."""
    answer = client.get(f"/v1/cache/flush/{flush_id}")
    return answer.json() if answer.status_code == 200 else {}


@pytest.mark.parametrize(
    ("mode", "verdict", "late"),
    # A rank that wakes after the deadline drops the command. The fences take less than the grace of each: the rank
    # that wakes meets all of them at once and takes one at a time.
    [("wait", "unreachable", {"expired_command"}), ("fence", "fenced", {"flushed", "busy"})],
)
def test_a_stopped_rank_is_named_on_time_and_serves_nothing_old_when_it_wakes(
    client: httpx.Client, mode: str, verdict: str, late: set[str]
) -> None:
    assert flush(client, timeout_s=10)["success"]
    assert [cached_tokens(client, rank) for rank in (0, 1, 0, 1)] == [0, 0, REUSED, REUSED]
    took_s: list[float] = []
    inside_s: list[float] = []
    with stopped(rank_row(client, 1)["pid"]):
        for trial in range(TRIALS):
            begin = time.monotonic()
            answer = flush(client, mode=mode, timeout_s=TIMEOUT_S, flush_id=f"{mode}-{trial}")
            took_s.append(time.monotonic() - begin)
            inside_s.append(answer["took_ms"] / 1000)
            by_rank = statuses(answer)
            assert by_rank[1] == verdict, answer
            # the floor speaks for a rank that has no processor just then, too
            assert by_rank[0] in {"flushed", verdict} if mode == "fence" else by_rank[0] == "flushed"
            assert answer["success"] is (mode == "fence")
    took_s.sort()
    print(f"{mode}, one of two ranks stopped, timeout {TIMEOUT_S:g} s: p50 {took_s[TRIALS // 2]:.3f} s, "
          f"p99 {took_s[-1]:.3f} s at the client, {max(inside_s):.3f} s at the controller")  # fmt: skip
    # The aim is 2.05 s for all of them. The worst may be those of a machine that does other things; an answer that
    # waited for the stopped rank would never have come.
    assert took_s[TRIALS // 2] <= (TIMEOUT_S + 0.1 if mode == "wait" else 0.5)
    assert took_s[-1] <= TIMEOUT_S + 1
    if mode == "wait":
        assert flush(client, timeout_s=30)["success"]
    until(lambda: takes_requests(client, 1), 30, "requests are sent to the rank again")
    assert [cached_tokens(client, 1), cached_tokens(client, 1)] == [0, REUSED]

    def is_late_verdict_known() -> bool:
        rows = known_flush(client, f"{mode}-0").get("late", [])
        return [row["rank"] for row in rows if row["status"] in late] == [1]

    until(is_late_verdict_known, 30, "the verdict of the rank that woke")


class Stream(threading.Thread):
    """One long answer of a rank, read in a thread."""

    def __init__(self, server: Server, rank: int) -> None:
        super().__init__()
        sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
        self._url = server.url
        self._body = {"text": "Go on", "sampling_params": sampling, "stream": True, "data_parallel_rank": rank}
        self.begun = threading.Event()
        self.num_tokens = 0
        self.errors: list[Any] = []

    def run(self) -> None:
        with (
            httpx.Client(base_url=self._url, timeout=120) as client,
            client.stream("POST", "/generate", json=self._body) as response,
        ):
            for event in events(response):
                if "error" in event:
                    self.errors.append(event["error"])
                    continue
                self.num_tokens = event["meta_info"]["completion_tokens"]
                self.begun.set()


@contextmanager
def streaming(server: Server, rank: int) -> Iterator[Stream]:
    """A stream that runs through the block, and at its end has brought every token."""
    stream = Stream(server, rank)
    stream.start()
    assert stream.begun.wait(60)
    yield stream
    stream.join(timeout=120)
    assert (stream.num_tokens, stream.errors) == (NUM_TOKENS, [])


def kill_controller(server: Server) -> None:
    (pid,) = [pid for pid, name in marked_processes(server.mark).items() if name.startswith("ray::ControllerActor")]
    os.kill(pid, signal.SIGKILL)


@contextmanager
def begun(server: Server, **body: Any) -> Iterator[Future[httpx.Response]]:
    """A flush that was asked for; what its caller is told may be anything when the controller dies."""
    with ThreadPoolExecutor(1) as asking:
        yield asking.submit(httpx.post, f"{server.url}/v1/cache/flush", json=body, timeout=120)


def test_a_wait_whose_controller_is_killed_is_reported_as_what_it_was(patient: Server, client: httpx.Client) -> None:
    before = flush(client, timeout_s=30)
    restarts = client.get("/v1/cache").json()["controller_restarts"]
    with streaming(patient, rank=0) as stream, begun(patient, timeout_s=60, flush_id="cut-wait"):
        until(lambda: len(known_flush(client, "cut-wait").get("waiting_for", [0, 1])) == 1, 30, "rank 1 has flushed")
        kill_controller(patient)
        num_tokens = stream.num_tokens
        until(lambda: stream.num_tokens > num_tokens, 30, "the rank goes on without a controller")

        def is_closed() -> bool:
            return known_flush(client, "cut-wait").get("status", "pending") != "pending"

        until(is_closed, 60, "the next controller says what became of it")
        answer = known_flush(client, "cut-wait")
    assert not answer["success"]
    assert not answer["floor_raised"]
    assert answer["message"].startswith("interrupted by a restart of the controller")
    assert [row["status"] == "flushed" for row in answer["ranks"]] == [False, True], answer
    after = client.get("/v1/cache").json()
    assert after["controller_restarts"] == restarts + 1
    assert after["epoch"] > before["epoch"]
    following = flush(client, timeout_s=30)
    assert following["success"], following
    assert following["epoch"] > after["epoch"]


@pytest.mark.deep
def test_a_retract_whose_controller_is_killed_is_finished_by_the_next(patient: Server, client: httpx.Client) -> None:
    before = flush(client, timeout_s=30)
    assert [cached_tokens(client, 1), cached_tokens(client, 1)] == [0, REUSED]
    pid = rank_row(client, 1)["pid"]
    with streaming(patient, rank=0), begun(patient, mode="retract", timeout_s=60, flush_id="cut-retract"):
        with stopped(pid):
            until(lambda: is_half_way(client, before), 30, "rank 0 has flushed, rank 1 cannot")
            kill_controller(patient)
        until(lambda: known_flush(client, "cut-retract").get("status") == "flushed", 90, "it is finished forward")
        answer = known_flush(client, "cut-retract")
    assert answer["success"]
    assert answer["epoch"] > before["epoch"]
    assert statuses(answer) == ["flushed", "flushed"]
    until(lambda: takes_requests(client, 1), 30, "requests are sent to the rank again")
    assert cached_tokens(client, 1) == 0
    following = flush(client, timeout_s=30)
    assert following["success"], following
    assert following["epoch"] > answer["epoch"]


def is_half_way(client: httpx.Client, before: dict[str, Any]) -> bool:
    known = known_flush(client, "cut-retract")
    return known.get("epoch", 0) > before["epoch"] and len(known.get("waiting_for", ())) == 1


@pytest.mark.deep
def test_a_rank_stopped_beyond_its_health_timeout_is_replaced_and_never_called_flushed(
    small_model: Path, short_home: Path
) -> None:
    with (
        start(short_home / "strict", small_model, health_timeout_s=1) as server,
        httpx.Client(base_url=server.url, timeout=180) as client,
    ):
        assert [cached_tokens(client, 1), cached_tokens(client, 1)] == [0, REUSED]
        old = rank_row(client, 1)
        os.kill(old["pid"], signal.SIGSTOP)
        begin = time.monotonic()
        answer = flush(client, timeout_s=90)
        took_s = time.monotonic() - begin
        rows = {row["incarnation"]: row["status"] for row in answer["ranks"]}
        print(f"stopped beyond the health timeout of 1 s: after {took_s:.1f} s {sorted(rows.values())}")
        assert rows[old["incarnation"]] == "gone", answer
        assert answer["success"], answer

        def is_replaced() -> bool:
            ranks = client.get("/v1/cache").json()["ranks"]
            return {row["rank"] for row in ranks if row["status"] == "serving"} == {0, 1}

        until(is_replaced, 60, "Serve has made another")
        fresh = rank_row(client, 1)
        assert fresh["incarnation"] != old["incarnation"]
        assert not Path(f"/proc/{old['pid']}").exists()
        assert [cached_tokens(client, 1), cached_tokens(client, 1)] == [0, REUSED]
