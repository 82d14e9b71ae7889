"""POST, GET and DELETE of /v1/cache/flush in all modes, the audit log, and scopes as HTTP spells them."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import numpy as np
import pytest

from configs.errors import ControlUnavailable
from deployments.auth import Keys
from engine.flush import FLUSH_MODES
from tests.unit.deployments.api_server import Demo, Server, scenario, serving, until

GREEDY = {"temperature": 0, "max_new_tokens": 400, "ignore_eos": True}
PROMPT = [(7 * i) % 250 + 3 for i in range(100)]


async def generate(server: Server, prompt: list[int], num_tokens: int = 2, **fields: Any) -> dict[str, Any]:
    sampling = GREEDY | {"max_new_tokens": num_tokens}
    response = await server.post("/generate", {"input_ids": prompt, "sampling_params": sampling} | fields)
    assert response.status_code == 200, response.text
    return response.json()


async def flush(server: Server, **body: Any) -> httpx.Response:
    return await server.post("/v1/cache/flush", body)


async def cached(server: Server, prompt: list[int], **fields: Any) -> int:
    return int((await generate(server, prompt, **fields))["meta_info"]["cached_tokens"])


@asynccontextmanager
async def running(server: Server) -> AsyncIterator[asyncio.Task[dict[str, Any]]]:
    """A generation on rank 0 that has some hundred steps to go; the block's end waits for its own."""
    before = server.ranks[0].num_outputs
    task = asyncio.create_task(generate(server, PROMPT[:20], 400, data_parallel_rank=0))
    await until(lambda: server.ranks[0].num_outputs > before + 2, "the rank generates")
    yield task
    await task


async def is_pending(server: Server) -> bool:
    """A flush waits on a rank: its intent is stored, so that it is remembered however it ends."""
    return server.ranks[0].engine.snapshot().pending_flush_id is not None


@pytest.mark.parametrize("mode", ["fence", "retract", "abort"])
@scenario
async def test_these_modes_need_no_idle_moment(demo: Demo, mode: str) -> None:
    async with serving(demo, num_ranks=2) as server:
        alone = await generate(server, PROMPT[:20], 400)
        await server.idle()
        async with running(server) as stream:
            done = await flush(server, mode=mode)
            assert done.status_code == 200, done.text
            assert mode == "abort" or not stream.done(), "it went on after the flush"
        answer, result = done.json(), stream.result()
    assert (answer["success"], answer["mode"], answer["floor_raised"]) == (True, mode, True)
    assert {row["status"] for row in answer["ranks"]} <= {"flushed", "fenced"}
    if mode == "abort":
        assert result["meta_info"]["finish_reason"]["type"] == "abort"
    else:
        assert result["text"] == alone["text"], "a pause, and the same tokens"


@scenario
async def test_a_drain_holds_what_comes_and_lets_go(demo: Demo) -> None:
    async with serving(demo) as server:
        async with running(server):
            draining = asyncio.create_task(flush(server, mode="drain", timeout_s=20))
            await until(lambda: is_pending(server), "the drain is pending")
            held = asyncio.create_task(generate(server, PROMPT[:8]))
            await until(lambda: server.ranks[0].engine.snapshot().num_waiting == 1, "the new request waits")
        assert (await draining).json()["success"] is True
        assert (await held)["meta_info"]["completion_tokens"] == 2
        async with running(server):
            given_up = await flush(server, mode="drain", timeout_s=0.05)
            assert (await generate(server, PROMPT[:8]))["meta_info"]["completion_tokens"] == 2
    assert given_up.status_code == 504
    assert given_up.json()["ranks"][0]["blockers"]["running"] == 1


@scenario
async def test_the_same_id_joins_and_reads_again(demo: Demo) -> None:
    async with serving(demo) as server:
        async with running(server):
            first = asyncio.create_task(flush(server, flush_id="nightly", timeout_s=20))
            await until(lambda: is_pending(server), "the first is pending")
            joined = asyncio.create_task(flush(server, flush_id="nightly", timeout_s=20))
            under_way = await server.client.get("/v1/cache/flush/nightly")
        answers = [(await task).json() for task in (first, joined)]
        answers.append((await flush(server, flush_id="nightly", timeout_s=20)).json())
        read = await server.client.get("/v1/cache/flush/nightly")
    assert under_way.status_code == 200
    assert under_way.json()["status"] == "pending"
    assert [answer["replayed"] for answer in answers] == [False, True, True]
    assert len({answer["epoch"] for answer in answers}) == len({answer["started_at"] for answer in answers}) == 1
    assert read.json()["late"] == []


@scenario
async def test_a_pending_flush_is_cancelled_an_ended_one_is_not(demo: Demo) -> None:
    async with serving(demo) as server:
        async with running(server):
            waiting = asyncio.create_task(flush(server, flush_id="w", timeout_s=20))
            await until(lambda: is_pending(server), "the flush is pending")
            cancelled = await server.client.delete("/v1/cache/flush/w")
            first = await waiting
        again = await server.client.delete("/v1/cache/flush/w")
        unknown = await server.client.delete("/v1/cache/flush/nobody")
        entries = (await server.client.get("/v1/cache/audit", params={"limit": 3})).json()["entries"]
    assert (cancelled.status_code, cancelled.json()["status"]) == (200, "cancelled")
    assert (first.status_code, first.json()["status"]) == (409, "cancelled")
    assert again.status_code == 409
    assert (unknown.status_code, set(unknown.json())) == (404, {"error"})
    assert [entry["call"] for entry in entries] == ["cancel_flush"] * 3
    assert entries[0]["caller"].startswith("http:/v1/cache/flush")


@scenario
async def test_a_wait_gives_way_to_a_fence(demo: Demo) -> None:
    async with serving(demo) as server, running(server):
        waiting = asyncio.create_task(flush(server, flush_id="patient", timeout_s=20))
        await until(lambda: is_pending(server), "the flush is pending")
        shown = (await server.client.get("/v1/cache")).json()["pending_flush"]
        fence = await flush(server, flush_id="urgent", mode="fence")
        first = await waiting
    assert (shown["flush_id"], shown["mode"], shown["waiting_for"]) == ("patient", "wait", ["incarnation-0"])
    assert fence.json()["success"] is True
    assert (first.status_code, first.json()["status"]) == (409, "superseded")
    assert first.json()["superseded_by"] == "urgent"


@scenario
async def test_a_salt_is_flushed_alone_and_a_dry_run_flushes_nothing(demo: Demo) -> None:
    async with serving(demo) as server:
        for salt in ("a", "b"):
            await cached(server, PROMPT, extra_key=salt)
        await server.idle()
        dry = (await flush(server, scope={"cache_salt": "a"}, dry_run=True)).json()
        assert dry["success"] is True
        assert dry["ranks"][0]["freed_pages"] == 6
        assert await cached(server, PROMPT, extra_key="a") == 96
        await server.idle()
        done = await flush(server, scope={"cache_salt": "a"})
        assert done.status_code == 200, done.text
        assert [await cached(server, PROMPT, extra_key=salt) for salt in ("a", "b")] == [0, 96]


@pytest.mark.parametrize("text", ["The tide turns twice ", "The tide turns tw"])
@scenario
async def test_a_text_prefix_drops_every_prompt_that_begins_with_it(demo: Demo, text: str) -> None:
    def ids(prompt: str) -> list[int]:
        return np.frombuffer(demo.tokenizer.encode(prompt), dtype="<i4").tolist()

    mine = ids("The tide turns twice a day. " * 8)
    other = ids("A gate lets water out and never in. " * 8)
    async with serving(demo) as server:
        for prompt in (mine, other):
            await cached(server, prompt)
        await server.idle()
        done = await flush(server, scope={"prefix_text": text})
        assert done.status_code == 200, done.text
        assert await cached(server, mine) == 0
        assert await cached(server, other) > 0


BAD: list[tuple[Any, str]] = [
    ({"mode": None, "tiers": "device"}, "tiers"),
    ({"tiers": [1]}, "tiers"),
    ({"tiers": ["device", "disk"]}, "tiers"),
    ({"mode": 1}, "mode"),
    ({"mode": "WAIT"}, "mode"),
    ({"dry_run": 1}, "dry_run"),
    ({"flush_id": 7}, "flush_id"),
    ({"flush_id": "x" * 129}, "flush_id"),
    ({"timeout_s": [1]}, "timeout_s"),
    ({"timeout_s": 1e400}, "timeout_s"),
    ({"scope": "all"}, "scope"),
    ({"scope": {}}, "scope"),
    ({"scope": {"namespace": None}}, "scope"),
    ({"scope": {"cache_salt": None}}, "scope"),
    ({"scope": {"cache_salt": "a", "namespace": "a"}}, "scope"),
    ({"scope": {"tenant": "a"}}, "scope.tenant"),
    ({"scope": {"namespace": ""}}, "scope.namespace"),
    ({"scope": {"older_than_s": -1}}, "scope.older_than_s"),
    ({"scope": {"older_than_s": "1"}}, "scope.older_than_s"),
    ({"scope": {"prefix_tokens": []}}, "scope.prefix_tokens"),
    ({"scope": {"prefix_tokens": [-1]}}, "scope.prefix_tokens"),
    ({"scope": {"prefix_tokens": [2**31]}}, "scope.prefix_tokens"),
    ({"scope": {"prefix_tokens": [10**6]}}, "scope.prefix_tokens"),
    ({"scope": {"prefix_tokens": [3] * 100_000}}, "scope.prefix_tokens"),
    ({"scope": {"prefix_text": "word " * 100_000}}, "scope.prefix_text"),
    ({"scope": {"prefix_text": "unending"}}, "scope.prefix_text"),
    ({"scope": {"prefix_text": 5}}, "scope.prefix_text"),
    ({"scope": {"weather": 1}, "dry_run": True}, "scope.weather"),
    ([], "body"),
    ("wait", "body"),
]


@scenario
async def test_bad_input_is_a_400_that_names_the_field_and_is_in_the_audit_log(demo: Demo) -> None:
    async with serving(demo) as server:
        for body, field in BAD:
            # not `json=`: httpx refuses numbers that JSON has no name for
            response = await server.client.post(
                "/v1/cache/flush", content=_dumps(body), headers={"content-type": "application/json"}
            )
            assert response.status_code == 400, (body, response.text)
            assert (response.json()["error"]["param"] or "").startswith(field), (body, response.json())
        no_json = await server.client.post(
            "/v1/cache/flush", content=b"{mode: wait}", headers={"content-type": "application/json"}
        )
        no_number = await server.client.post("/flush_cache?timeout=soon")
        for query in ("limit=0", "limit=-1", "limit=x", "limit=1001", "limit=1.5", "flush_id="):
            bad = await server.client.get(f"/v1/cache/audit?{query}")
            assert (bad.status_code, bad.json()["error"]["param"]) == (400, query.partition("=")[0])

        async def all_noted() -> bool:
            entries = (await server.client.get("/v1/cache/audit?limit=1000")).json()["entries"]
            refused = [entry for entry in entries if entry["status"] == "invalid"]
            return len(refused) == len(BAD) + 2 and all(entry["caller"].startswith("http:/") for entry in refused)

        await until(all_noted, "every refusal is in the audit log")
    assert (no_json.status_code, no_number.status_code) == (400, 400)


def _dumps(body: Any) -> bytes:
    return json.dumps(body).replace("Infinity", "1e400").encode()


@scenario
async def test_the_audit_log_shows_who_asked_for_what_and_what_came_of_it(demo: Demo) -> None:
    async with serving(demo, num_ranks=2) as server:
        for mode in FLUSH_MODES:
            await flush(server, mode=mode, flush_id=f"one-{mode}", timeout_s=1)
        newest = (await server.client.get("/v1/cache/audit?limit=2")).json()["entries"]
        one = (await server.client.get("/v1/cache/audit?flush_id=one-drain")).json()["entries"]
    assert [entry["flush_id"] for entry in newest] == ["one-fence", "one-abort"]
    assert [(entry["mode"], entry["status"], entry["timeout_s"]) for entry in one] == [("drain", "flushed", 1.0)]
    assert [row[::2] for row in one[0]["ranks"]] == [[0, "flushed"], [1, "flushed"]]


@scenario
async def test_the_cache_page_shows_tiers_nodes_and_the_pending_flush(demo: Demo) -> None:
    async with serving(demo, num_ranks=2) as server:
        await cached(server, PROMPT)
        await server.idle()
        done = (await flush(server, mode="fence")).json()
        await cached(server, PROMPT)
        await server.idle()
        page = (await server.client.get("/v1/cache")).json()
        server.ranks[1].is_mute = True
        silent = await server.client.get("/v1/cache")
    assert (page["epoch"], page["floor"], page["pending_flush"]) == (done["epoch"], done["epoch"], None)
    assert page["tiers"] == ["device"]
    (device,) = page["occupancy"]
    assert (device["tier"], device["num_pages"]) == ("device", sum(row["num_pages"] for row in page["ranks"]))
    assert device["num_cached_pages"] == 6
    assert device["cached_bytes"] == 6 * page["ranks"][0]["bytes_per_page"]
    assert 0 < device["used"] < 1
    assert [node["has_lease"] for node in page["nodes"]] == [True]
    assert silent.status_code == 503
    assert len(silent.json()["ranks"]) == 2
    assert silent.json()["occupancy"][0]["num_pages"] == page["ranks"][0]["num_pages"]


@scenario
async def test_every_cache_route_is_an_admin_route(demo: Demo) -> None:
    routes = [
        ("GET", "/v1/cache"), ("GET", "/v1/cache/audit"), ("POST", "/v1/cache/flush"),
        ("GET", "/v1/cache/flush/x"), ("DELETE", "/v1/cache/flush/x"), ("POST", "/flush_cache"),
    ]  # fmt: skip
    async with serving(demo, keys=Keys(api_key="user", admin_key="admin")) as server:
        for method, path in routes:
            codes = [
                (await server.client.request(method, path, json={}, headers=headers)).status_code
                for headers in ({}, {"authorization": "Bearer user"}, {"authorization": "Bearer admin"})
            ]
            assert codes[:2] == [401, 403], path
            assert codes[2] not in (401, 403), path


@scenario
async def test_a_controller_that_is_away_is_a_503_on_all_of_them(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    async def silent(*_: object) -> Any:
        raise ControlUnavailable("the controller does not answer")

    async with serving(demo) as server:
        for name in ("flush_status", "cancel_flush", "audit"):
            monkeypatch.setattr(server.core.controller, name, silent)
        codes = [
            (await server.client.get("/v1/cache/flush/x")).status_code,
            (await server.client.delete("/v1/cache/flush/x")).status_code,
            (await server.client.get("/v1/cache/audit")).status_code,
        ]
    assert codes == [503, 503, 503]


@scenario
async def test_the_floor_that_the_api_checks_by_is_that_of_the_last_success(demo: Demo) -> None:
    async with serving(demo, num_ranks=2) as server:

        async def floor() -> int:
            """As this replica's fleet would be told by its long poll."""
            server.fleet.floor = (await server.plane.membership(-1, 0.0)).floor
            return server.fleet.floor

        floors = [await floor()]
        for mode in ("wait", "drain", "fence"):
            answer = (await flush(server, mode=mode, timeout_s=5)).json()
            assert await floor() == answer["epoch"] > floors[-1]
            floors.append(answer["epoch"])
        async with running(server):
            assert (await flush(server)).status_code == 409
            assert await floor() == floors[-1], "one rank is untouched, and its KV may be used"
        await cached(server, PROMPT, data_parallel_rank=1)
        warm = await generate(server, PROMPT, data_parallel_rank=1)
    assert warm["meta_info"]["cached_tokens"] == 96
    # that rank did flush, for a flush which failed on the other: its KV is newer than any promise
    assert warm["meta_info"]["kv_epoch"] > floors[-1]
    assert server.core.counters.num_stale == 0


@scenario
async def test_an_abort_is_in_the_audit_log_with_its_caller(demo: Demo) -> None:
    async with serving(demo) as server:
        await server.post("/abort_request", {"rid": "nobody"})
        (entry,) = (await server.client.get("/v1/cache/audit")).json()["entries"]
    assert (entry["call"], entry["caller"]) == ("abort", "http:/abort_request from 127.0.0.1")
    assert "nobody" in str(entry["request_ids"])
