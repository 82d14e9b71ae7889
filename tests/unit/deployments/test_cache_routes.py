"""/flush_cache keeps SGLang's contract, /v1/cache/flush tells the whole truth; over real engines and a controller."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Any

import pytest

from configs.errors import ControlUnavailable
from deployments.flush_surfaces import FLUSHED_TEXT
from deployments.tokenizer import Tokenizer
from engine.flush import ALREADY_IN_PROGRESS, TIMED_OUT_WAITING
from tests.unit.deployments.api_server import Demo, Server, scenario, serving, until
from tests.unit.deployments.asgi_client import HangingUp

PROMPT = [(7 * i) % 250 + 3 for i in range(100)]
LONG = {"temperature": 0, "max_new_tokens": 1800, "ignore_eos": True}


async def cached_tokens(server: Server) -> int:
    sampling = {"temperature": 0, "max_new_tokens": 2, "ignore_eos": True}
    response = await server.post("/generate", {"input_ids": PROMPT, "sampling_params": sampling})
    return int(response.json()["meta_info"]["cached_tokens"])


@asynccontextmanager
async def traffic(server: Server) -> AsyncIterator[None]:
    """One stream that runs for as long as the block."""
    running = HangingUp(server.app, "/generate", {"text": "on and on", "sampling_params": LONG, "stream": True})
    await running.got_chunk.wait()
    yield
    running.hang_up()
    await running.task


@scenario
async def test_a_long_prefix_text_is_tokenised_beside_the_loop(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[threading.Thread] = []
    encode = Tokenizer.encode

    def noted(self: Tokenizer, text: str, **options: bool) -> bytes:
        threads.append(threading.current_thread())
        return encode(self, text, **options)

    async with serving(demo, max_body_bytes=1 << 22) as server:
        monkeypatch.setattr(Tokenizer, "encode", noted)
        for text in ("word", "word " * 100_000):
            await server.post("/v1/cache/flush", {"scope": {"prefix_text": text}, "timeout_s": 5})
    assert [thread is threading.main_thread() for thread in threads] == [True, False]


@pytest.mark.parametrize("method", ["GET", "POST"])
@scenario
async def test_flush_cache_empties_every_rank(demo: Demo, method: str) -> None:
    async with serving(demo) as server:
        assert [await cached_tokens(server), await cached_tokens(server)] == [0, 96]
        await server.idle()
        response = await server.client.request(method, "/flush_cache?timeout=10")
        assert (response.status_code, response.text) == (200, FLUSHED_TEXT)
        assert response.headers["content-type"].startswith("text/plain")
        assert await cached_tokens(server) == 0


@scenario
async def test_a_busy_rank_refuses_without_a_timeout_and_outlasts_a_short_one(demo: Demo) -> None:
    async with serving(demo, num_ranks=2) as server:
        async with traffic(server):
            at_once = await server.client.post("/flush_cache")
            waited = await server.client.post("/flush_cache?timeout=0.1")
            verdict = await server.post("/v1/cache/flush", {"timeout_s": 0.1})
            refused = await server.post("/v1/cache/flush", {})
        await server.idle()
        after = await server.client.post("/flush_cache?timeout=5")
    assert at_once.status_code == waited.status_code == 400
    assert at_once.text.strip()
    assert TIMED_OUT_WAITING in waited.text
    assert verdict.status_code == 504
    assert sorted(row["status"] for row in verdict.json()["ranks"]) == ["flushed", "timed_out"]
    busy = next(row for row in verdict.json()["ranks"] if row["status"] == "timed_out")
    assert busy["blockers"]["running"] == 1
    assert refused.status_code == 409
    assert after.status_code == 200


@scenario
async def test_a_second_flush_is_refused_and_the_first_ends_with_the_traffic(demo: Demo) -> None:
    async with serving(demo) as server:
        async with traffic(server):
            waiting = asyncio.create_task(server.client.post("/flush_cache?timeout=20"))

            async def is_pending() -> bool:
                return (await server.client.get("/v1/cache")).json()["pending_flush"] is not None

            await until(is_pending, "the first is pending")
            second = await server.client.get("/flush_cache?timeout=20")
            whole = await server.post("/v1/cache/flush", {"timeout_s": 20})
        first = await waiting
    assert (second.status_code, second.text.strip()) == (400, ALREADY_IN_PROGRESS)
    assert whole.status_code == 409
    assert first.status_code == 200


@pytest.mark.parametrize(
    "given",
    [
        "nan",
        "NaN",
        "inf",
        "-inf",
        "Infinity",
        "1e309",
        "-1",
        "-0.001",
        "abc",
        "",
        "true",
        "3600.1",
        "1e9",
        "1_0",
        " 5",
        "٣",
        "0x10",
    ],
)
@scenario
async def test_a_timeout_that_is_none_is_a_400_that_names_it(demo: Demo, given: str) -> None:
    async with serving(demo) as server:
        response = await server.client.post("/flush_cache", params={"timeout": given})
    assert response.status_code == 400
    assert "timeout" in response.text


@pytest.mark.parametrize(
    ("query", "taken"),
    [
        ("timeout=0", 0.0),
        ("timeout=-0.0", 0.0),
        ("timeout=1e-9", 1e-9),
        ("timeout=2.5", 2.5),
        ("timeout=%2B5", 5.0),
        ("timeout=abc&timeout=1", 1.0),
        ("Timeout=abc", None),
        ("", None),
    ],
)
@scenario
async def test_a_timeout_that_is_one_is_taken_the_last_one_wins(
    demo: Demo, monkeypatch: pytest.MonkeyPatch, query: str, taken: float | None
) -> None:
    async with serving(demo) as server:
        asked: list[Mapping[str, object]] = []
        flush = server.core.controller.flush

        async def noting(arguments: Mapping[str, object]) -> dict[str, Any]:
            asked.append(arguments)
            return await flush({**arguments, "timeout_s": 10})

        monkeypatch.setattr(server.core.controller, "flush", noting)
        response = await server.client.post(f"/flush_cache?{query}", content=b'{"timeout": "ignored"}')
    assert response.status_code == 200, response.text
    assert asked[0].get("timeout_s") == taken


BAD_FLUSHES: list[tuple[dict[str, Any], str]] = [
    ({"timeout_s": -1}, "timeout_s"),
    ({"timeout_s": "5"}, "timeout_s"),
    ({"timeout_s": True}, "timeout_s"),
    ({"timeout_s": 1e9}, "timeout_s"),
    ({"mode": "soon"}, "mode"),
    ({"tiers": ["host"]}, "tiers"),
    ({"tiers": []}, "tiers"),
    ({"scope": {"namespace": "a", "adapter": "b"}}, "scope"),
    ({"scope": {"prefix_text": ""}}, "scope.prefix_text"),
    ({"scope": {"prefix_text": "word " * 3000}}, "scope.prefix_text"),
    ({"flush_id": "no spaces"}, "flush_id"),
    ({"dry_run": "yes"}, "dry_run"),
    ({"caller": "somebody else"}, "caller"),
    ({"timeout": 5}, "timeout"),
]


@pytest.mark.parametrize(("body", "field"), BAD_FLUSHES)
@scenario
async def test_a_flush_with_a_bad_field_names_it(demo: Demo, body: dict[str, Any], field: str) -> None:
    async with serving(demo) as server:
        response = await server.post("/v1/cache/flush", body)
    assert response.status_code == 400, response.text
    answer = response.json()
    assert set(answer) == {"error"}, "one shape of error on all /v1 routes"
    assert field in answer["error"]["param"]


@scenario
async def test_a_flush_is_read_again_by_its_id(demo: Demo) -> None:
    async with serving(demo) as server:
        first = await server.post("/v1/cache/flush", {"flush_id": "nightly-1", "timeout_s": 5})
        again = await server.post("/v1/cache/flush", {"flush_id": "nightly-1", "timeout_s": 5})
        other = await server.post("/v1/cache/flush", {"flush_id": "nightly-1", "timeout_s": 6})
        read = await server.client.get("/v1/cache/flush/nightly-1")
        unknown = await server.client.get("/v1/cache/flush/nightly-2")
    assert first.json()["success"] is True
    assert first.json()["ranks"][0]["status"] == "flushed"
    assert again.json()["replayed"] is True
    assert other.status_code == 409
    assert read.json()["epoch"] == first.json()["epoch"]
    assert unknown.status_code == 404


@scenario
async def test_a_dead_rank_is_never_a_success_while_it_is_not_proven_gone(demo: Demo) -> None:
    async with serving(demo, num_ranks=2) as server:
        server.ranks[1].die()
        server.ranks[1].flush = never
        native = await server.client.post("/flush_cache?timeout=0.1")
        whole = await server.post("/v1/cache/flush", {"timeout_s": 0.1})
    assert native.status_code == 400
    assert whole.status_code == 503
    assert [row["status"] for row in whole.json()["ranks"]] == ["flushed", "unreachable"]


async def never(command: object) -> Any:
    await asyncio.Event().wait()


@scenario
async def test_a_controller_that_does_not_answer_is_a_503(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(arguments: object = None) -> Any:
        raise ControlUnavailable("the controller does not answer")

    async with serving(demo) as server:
        for name in ("flush", "status", "info"):
            monkeypatch.setattr(server.core.controller, name, silent)
        native = await server.client.post("/flush_cache")
        whole = await server.post("/v1/cache/flush", {})
        cache = await server.client.get("/v1/cache")
        info = await server.client.get("/server_info")
    assert (native.status_code, whole.status_code, cache.status_code) == (503, 503, 503)
    assert "retry-after" in whole.headers
    assert info.status_code == 200


@scenario
async def test_the_cache_page_shows_every_rank(demo: Demo) -> None:
    async with serving(demo, num_ranks=2) as server:
        await cached_tokens(server)
        await server.idle()
        cache = (await server.client.get("/v1/cache")).json()
    assert sorted(row["rank"] for row in cache["ranks"]) == [0, 1]
    for row in cache["ranks"]:
        states = ("free", "cached", "pinned", "private", "fenced")
        assert sum(row[f"num_{state}_pages"] for state in states) == row["num_pages"]
