"""SIGKILL of a scheduler in mid-stream: one stream ends with an error, all else goes on, and the rank comes back."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

from engine.demo_model import write_demo_model
from tests.cluster.server import Server, serving, until
from tests.cluster.sse import events

#: long enough on any machine to be killed half way: the small model takes 10 ms a token
NUM_TOKENS = 1500


@pytest.fixture(scope="module")
def own_server(tmp_path_factory: pytest.TempPathFactory, short_home: Path) -> Iterator[Server]:
    """A server whose ranks may be killed."""
    home = short_home / "kills"
    home.mkdir()
    model = tmp_path_factory.mktemp("model") / "small"
    write_demo_model(model, "small")
    with serving(home, "--model", str(model), "--dp", "2") as running:
        yield running


def ranks_of(client: httpx.Client) -> list[dict[str, Any]]:
    """The living ranks as the controller knows them: each with pid and incarnation from its own hello."""
    return [rank for rank in client.get("/v1/cache").json()["ranks"] if rank["status"] == "serving"]


class Stream(threading.Thread):
    """One long stream read in a thread; what it got, how it ended."""

    def __init__(self, server: Server, text: str) -> None:
        super().__init__()
        self._url = server.url
        self._text = text
        self.begun = threading.Event()
        self.rank: int | None = None
        self.error: dict[str, Any] | None = None
        self.num_tokens = 0

    def run(self) -> None:
        sampling = {"temperature": 0, "max_new_tokens": NUM_TOKENS, "ignore_eos": True}
        body = {"text": self._text, "sampling_params": sampling, "stream": True}
        with (
            httpx.Client(base_url=self._url, timeout=120) as client,
            client.stream("POST", "/generate", json=body) as r,
        ):
            for event in events(r):
                if "error" in event:
                    self.error = event["error"]
                    continue
                self.rank = event["meta_info"]["dp_rank"]
                self.num_tokens = event["meta_info"]["completion_tokens"]
                self.begun.set()


def _is_a_rank(pid: int) -> bool:
    """Ray names a process by its actor's class."""
    return b"SchedulerActor" in Path(f"/proc/{pid}/cmdline").read_bytes()


def test_a_killed_rank_ends_its_stream_and_returns(own_server: Server) -> None:
    with httpx.Client(base_url=own_server.url, timeout=60) as client:
        before = ranks_of(client)
        assert len(before) == 2
        # two prompts without a common page go to the two ranks: routing is bounded by load
        streams = [Stream(own_server, "first " * 40), Stream(own_server, "other " * 40)]
        for stream in streams:
            stream.start()
            assert stream.begun.wait(60)
        assert {stream.rank for stream in streams} == {0, 1}
        victim = next(rank for rank in before if rank["rank"] == streams[0].rank)
        assert _is_a_rank(victim["pid"])
        # the flush waits for the streams; only then is the rank killed: it was asked, whoever notices its end first
        with ThreadPoolExecutor(1) as asking:
            answer = asking.submit(httpx.post, f"{own_server.url}/v1/cache/flush", json={"timeout_s": 20}, timeout=60)
            until(lambda: client.get("/v1/cache").json()["pending_flush"] is not None, 10, "the flush waits")
            os.kill(victim["pid"], signal.SIGKILL)
            verdict = answer.result().json()
        for stream in streams:
            stream.join(timeout=60)
            assert not stream.is_alive()
        assert streams[0].error is not None, f"{streams[0].num_tokens} tokens came; {verdict}"
        assert streams[0].num_tokens < NUM_TOKENS
        assert streams[1].error is None
        assert streams[1].num_tokens == NUM_TOKENS
        rows = {row["incarnation"]: row for row in verdict["ranks"]}
        assert victim["incarnation"] in rows
        assert rows[victim["incarnation"]]["status"] in {"gone", "unreachable"}
        until(lambda: len(ranks_of(client)) == 2, 60, "the rank is back")
        after = ranks_of(client)
        assert victim["incarnation"] not in {rank["incarnation"] for rank in after}
        body = {"text": "again", "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
        seen: set[int] = set()

        def both_answer() -> bool:
            answer = client.post("/generate", json=body | {"text": f"again {len(seen)} {os.urandom(8).hex()}"})
            assert answer.status_code == 200, answer.text
            seen.add(answer.json()["meta_info"]["dp_rank"])
            return seen == {0, 1}

        until(both_answer, 60, "both ranks answer again")
        flushed = client.post("/v1/cache/flush", json={"timeout_s": 20})
        assert flushed.status_code == 200, flushed.text
        assert client.get("/v1/cache").json()["controller_restarts"] == 0
