"""Every mode on two ranks under traffic: what succeeds, what becomes of streams, cancel, supersede, replay, audit."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import pytest

from tests.cluster.server import Server, until
from tests.cluster.sse import events

NUM_TOKENS = 300
PROMPTS = [[(31 * i + 7 * j) % 250 + 3 for j in range(40)] for i in range(4)]


def body(prompt: list[int], num_tokens: int, **fields: Any) -> dict[str, Any]:
    sampling = {"temperature": 0, "max_new_tokens": num_tokens, "ignore_eos": True}
    return {"input_ids": prompt, "sampling_params": sampling, "stream": True} | fields


class Streams:
    """Greedy streams without a pause, two on each rank; each is compared with what its prompt gives alone."""

    def __init__(self, url: str, expected: list[list[int]]) -> None:
        self._url = url
        self._expected = expected
        self._stop = threading.Event()
        #: by how they ended; `wrong`: other tokens than alone
        self.ended: dict[str, int] = {"length": 0, "abort": 0, "wrong": 0, "failed": 0}
        self.num_retractions = 0
        self._threads = [threading.Thread(target=self._run, args=(number,)) for number in range(len(expected))]

    def _run(self, number: int) -> None:
        with httpx.Client(base_url=self._url, timeout=60) as client:
            while not self._stop.is_set():
                try:
                    self._judge(number, self._one(client, number))
                except (httpx.HTTPError, KeyError, StopIteration):
                    self.ended["failed"] += 1
                    return

    def _one(self, client: httpx.Client, number: int) -> dict[str, Any]:
        asked = body(PROMPTS[number], NUM_TOKENS, data_parallel_rank=number % 2)
        with client.stream("POST", "/generate", json=asked) as response:
            return list(events(response))[-1]

    def _judge(self, number: int, last: dict[str, Any]) -> None:
        reason, tokens = last["meta_info"]["finish_reason"]["type"], last["output_ids"]
        is_right = tokens == self._expected[number][: len(tokens)]
        self.num_retractions += last["meta_info"]["num_retractions"]
        self.ended[reason if is_right else "wrong"] += 1

    def __enter__(self) -> Streams:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(timeout=60)


@pytest.fixture(scope="module")
def expected(server: Server) -> list[list[int]]:
    """Tokens of each prompt alone."""
    with httpx.Client(base_url=server.url, timeout=60) as client:
        answers = [client.post("/generate", json=body(prompt, NUM_TOKENS) | {"stream": False}) for prompt in PROMPTS]
    return [answer.json()["output_ids"] for answer in answers]


@contextmanager
def long_stream(server: Server) -> Iterator[None]:
    """One request on rank 0 that decodes for as long as the block lasts."""
    asked = body(PROMPTS[0], 1900, data_parallel_rank=0)
    with httpx.stream("POST", f"{server.url}/generate", json=asked, timeout=60) as response:
        # held: a generator that is dropped closes the response
        stream = events(response)
        next(stream)
        yield


def flush(server: Server, **fields: Any) -> httpx.Response:
    return httpx.post(f"{server.url}/v1/cache/flush", json=fields, timeout=60)


def running(client: httpx.Client) -> int:
    return sum(row["num_running_reqs"] for row in client.get("/v1/loads").json()["loads"])


@contextmanager
def flushing(server: Server, client: httpx.Client, **fields: Any) -> Iterator[Future[httpx.Response]]:
    """A flush that waits on rank 0 while the block begins."""
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(flush, server, **fields)

        def waits() -> bool:
            pending = client.get("/v1/cache").json()["pending_flush"]
            return pending is not None and len(pending["waiting_for"]) == 1

        until(waits, 10, "the flush waits on one rank")
        yield answer


@pytest.mark.parametrize("mode", ["fence", "retract", "abort"])
def test_under_traffic_every_flush_succeeds_and_no_request_is_lost(
    server: Server, client: httpx.Client, expected: list[list[int]], mode: str
) -> None:
    answers: list[dict[str, Any]] = []
    with Streams(server.url, expected) as streams:
        for _ in range(5):
            until(lambda: running(client) >= 3, 20, "streams run on both ranks")
            answers.append(flush(server, mode=mode).json())
        if mode != "abort":
            done = streams.ended["length"]
            until(lambda: streams.ended["length"] >= done + 4, 60, "streams go on to their end")
    assert [answer["status"] for answer in answers] == ["flushed"] * 5, answers
    epochs = [answer["epoch"] for answer in answers]
    assert epochs == sorted(set(epochs)), "each has an epoch of its own"
    assert all(answer["floor_raised"] for answer in answers)
    assert streams.ended["failed"] == streams.ended["wrong"] == 0, streams.ended
    assert (streams.ended["abort"] > 0) == (mode == "abort"), streams.ended
    assert (streams.num_retractions > 0) == (mode == "retract")
    page = client.get("/v1/cache").json()
    assert page["floor"] == epochs[-1]
    assert {row["epoch"] for row in page["ranks"]} == {epochs[-1]}


def test_a_drain_holds_new_requests_and_lets_go_when_it_ends(server: Server, client: httpx.Client) -> None:
    short = body(PROMPTS[1], 4, data_parallel_rank=0) | {"stream": False}

    def is_held() -> bool:
        return any(row["num_waiting_reqs"] == 1 for row in client.get("/v1/loads").json()["loads"])

    with long_stream(server), ThreadPoolExecutor(1) as pool:
        with flushing(server, client, mode="drain", flush_id="drain", timeout_s=60) as draining:
            held = pool.submit(httpx.post, f"{server.url}/generate", json=short, timeout=60)
            until(is_held, 20, "the new request waits in the queue")
            assert client.delete("/v1/cache/flush/drain").status_code == 200
            given_up = draining.result(timeout=30).json()
        answered = held.result(timeout=30)
        assert running(client) == 1, "it was let go while the long one still ran"
    assert (given_up["status"], given_up["floor_raised"]) == ("cancelled", False)
    assert answered.status_code == 200, "nothing was refused"
    until(lambda: running(client) == 0, 20, "the stream has ended")
    drained = flush(server, mode="drain", timeout_s=10)
    assert (drained.status_code, drained.json()["success"]) == (200, True)


def test_a_flush_is_joined_superseded_and_read_again(server: Server, client: httpx.Client) -> None:
    patient = {"flush_id": "patient", "timeout_s": 30}
    with long_stream(server), flushing(server, client, **patient) as first, ThreadPoolExecutor(1) as pool:
        joined = pool.submit(flush, server, **patient)
        other = flush(server, flush_id="patient", timeout_s=31)
        second = flush(server, timeout_s=30)
        fence = flush(server, flush_id="urgent", mode="fence")
        answers = [first.result(30).json(), joined.result(30).json()]
    assert other.status_code == second.status_code == 409
    assert second.json()["message"] == "Another flush_cache is already in progress."
    assert fence.json()["success"] is True
    assert [answer["status"] for answer in answers] == ["superseded"] * 2
    assert [answer["superseded_by"] for answer in answers] == ["urgent"] * 2
    assert [answer["replayed"] for answer in answers] == [False, True]
    again = flush(server, flush_id="urgent", mode="fence").json()
    assert (again["replayed"], again["epoch"], again["started_at"]) == (
        True, fence.json()["epoch"], fence.json()["started_at"],
    )  # fmt: skip
    read = client.get("/v1/cache/flush/urgent").json()
    assert (read["epoch"], read["success"]) == (again["epoch"], True)
    assert client.get("/v1/cache/flush/nobody").status_code == 404


def test_a_cancelled_flush_leaves_the_busy_rank_as_it_was(server: Server, client: httpx.Client) -> None:
    with long_stream(server), flushing(server, client, flush_id="given-up", timeout_s=30) as waiting:
        before = {row["rank"]: row["epoch"] for row in client.get("/v1/cache").json()["ranks"]}
        cancelled = client.delete("/v1/cache/flush/given-up")
        first = waiting.result(30)
        after = {row["rank"]: row["epoch"] for row in client.get("/v1/cache").json()["ranks"]}
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled"), cancelled.text
    assert (first.status_code, first.json()["status"]) == (409, "cancelled")
    assert after[0] == before[0]
    assert client.delete("/v1/cache/flush/given-up").status_code == 409


def test_a_caller_that_hangs_up_does_not_cancel_its_flush(server: Server, client: httpx.Client) -> None:
    def status() -> str:
        return client.get("/v1/cache/flush/left-alone").json().get("status", "")

    with long_stream(server):
        asked = {"flush_id": "left-alone", "timeout_s": 60}
        with pytest.raises(httpx.ReadTimeout):
            httpx.post(f"{server.url}/v1/cache/flush", json=asked, timeout=httpx.Timeout(10, read=0.5))
        until(lambda: status() == "pending", 10, "the flush goes on")
    until(lambda: status() == "flushed", 30, "it is done when the stream has ended")


def test_the_audit_log_shows_all_of_them_and_refused_ones(server: Server, client: httpx.Client) -> None:
    refused = flush(server, mode="gently")
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "mode")
    assert flush(server, mode="fence", scope={"cache_salt": "nobody's"}, flush_id="part").json()["success"] is True

    def entries() -> list[dict[str, Any]]:
        return client.get("/v1/cache/audit", params={"limit": 200}).json()["entries"]

    def outcome(flush_id: str) -> set[tuple[str, str]]:
        return {(entry["call"], entry["status"]) for entry in entries() if entry.get("flush_id") == flush_id}

    until(lambda: any("gently" in str(entry.get("arguments")) for entry in entries()), 10, "the refused one is there")
    assert outcome("part") == {("flush", "flushed")}
    assert outcome("patient") >= {("flush", "superseded"), ("flush", "conflict")}
    assert outcome("given-up") >= {("flush", "cancelled"), ("cancel_flush", "cancelled")}
    times = [entry["at"] for entry in entries()]
    assert times == sorted(times, reverse=True)
