"""Every stream ends: the client leaves, the rank dies, the model fails, the server is full. And pages come back."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator
from dataclasses import replace
from typing import Any

import pytest

from configs.errors import RankLost
from deployments.merge import merged
from deployments.sequences import Finish, Piece, SequenceJob
from engine.batch import Batch, StepResult
from engine.request import Output, Request, RequestStats
from tests.unit.actors.ranks import expected, rank_and_fleet
from tests.unit.actors.ranks import request as wire_request
from tests.unit.deployments.api_server import Demo, scenario, serving, until
from tests.unit.deployments.asgi_client import HangingUp, sse_events

LONG: dict[str, Any] = {"temperature": 0, "max_new_tokens": 1800, "ignore_eos": True}
SHORT: dict[str, Any] = LONG | {"max_new_tokens": 8}


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@scenario
async def test_a_client_that_leaves_frees_its_pages(demo: Demo, stream: bool, n: int) -> None:
    async with serving(demo, num_ranks=2) as server:
        body = {"text": "Leave early", "sampling_params": LONG | {"n": n, "temperature": 1}, "stream": stream}
        request = HangingUp(server.app, "/generate", body)
        await until(lambda: sum(rank.num_outputs for rank in server.ranks) > 3, "tokens come")
        request.hang_up()
        await request.task
        counters = [rank.engine.snapshot().counters for rank in server.ranks]

        def aborted() -> int:
            return sum(rank.engine.snapshot().counters.num_finished_abort for rank in server.ranks)

        await until(lambda: aborted() == n, "every sequence is aborted")
        await server.idle()
    assert sum(counter.num_generated_tokens for counter in counters) < 1800
    assert bool(request.chunks) == stream


@pytest.mark.parametrize("stream", [True, False])
@scenario
async def test_a_client_that_leaves_before_the_first_token_frees_its_place(
    demo: Demo, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    may_compute = threading.Event()
    async with serving(demo) as server:
        runner: Any = server.ranks[0].engine._runner
        compute = runner.run

        def waits(batch: Batch) -> StepResult:
            assert may_compute.wait(10)
            return compute(batch)

        monkeypatch.setattr(runner, "run", waits)
        request = HangingUp(server.app, "/generate", {"text": "a", "sampling_params": LONG, "stream": stream})
        await until(lambda: server.ranks[0].engine.snapshot().is_stepping, "the model computes")
        request.hang_up()
        await request.task
        assert server.core.admission.num_inflight == 0
        may_compute.set()
        await server.idle()
        counters = server.ranks[0].engine.snapshot().counters
    assert request.chunks == []
    assert counters.num_steps == 1
    assert counters.num_finished_abort == 1


@pytest.mark.parametrize("path", ["/generate", "/v1/completions", "/v1/chat/completions"])
@scenario
async def test_a_rank_lost_in_mid_stream_is_one_error_event_and_done(demo: Demo, path: str) -> None:
    async with serving(demo, num_ranks=2) as server:
        for rank in server.ranks:
            rank.dies_after = 4
        body = _body(path, stream=True)
        response = await server.post(path, body)
        events = sse_events(response.text)
    assert response.status_code == 200
    assert events[-1]["error"]["type"] == "rank_lost_error"
    assert all("error" not in event for event in events[:-1])
    assert len(events) > 1


@pytest.mark.parametrize("stream", [True, False])
@scenario
async def test_a_rank_lost_before_the_first_token_is_replaced_unseen(demo: Demo, stream: bool) -> None:
    async with serving(demo, num_ranks=2) as server:
        server.ranks[0].dies_after = 0
        response = await server.post("/generate", {"text": "again", "sampling_params": SHORT, "stream": stream})
        again = await server.post("/generate", {"text": "again", "sampling_params": SHORT, "stream": stream})
        sent = [[request.attempt for request in rank.requests] for rank in server.ranks]
        num_resent = server.core.counters.num_resent
    assert response.status_code == again.status_code == 200
    answer = sse_events(response.text)[-1] if stream else response.json()
    assert answer["meta_info"]["completion_tokens"] == 8
    assert answer["meta_info"]["dp_rank"] == 1
    assert [len(attempts) for attempts in sent] == [1, 2]
    assert sent[0] < sent[1]
    assert len({*sent[0], *sent[1]}) == 3
    assert num_resent == 1


@scenario
async def test_no_rank_left_is_a_503_that_says_when_to_come_back(demo: Demo) -> None:
    async with serving(demo) as server:
        server.ranks[0].dies_after = 0
        lost = await server.post("/generate", {"text": "x", "sampling_params": SHORT, "stream": True})
        none = await server.post("/v1/completions", {"prompt": "x"})
        health = await server.client.get("/health")
    assert (lost.status_code, none.status_code, health.status_code) == (503, 503, 503)
    assert none.headers["retry-after"]
    assert none.json()["error"]["type"] == "unavailable_error"


@pytest.mark.parametrize("stream", [True, False])
@scenario
async def test_a_model_that_fails_is_told_without_its_insides(
    demo: Demo, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    async with serving(demo) as server:
        runner: Any = server.ranks[0].engine._runner
        compute = runner.run

        def fails_later(batch: Batch) -> StepResult:
            if batch.step > 3:
                raise RuntimeError("/secret/path is broken")
            return compute(batch)

        monkeypatch.setattr(runner, "run", fails_later)
        response = await server.post(
            "/v1/completions", {"prompt": "x", "stream": stream, "max_tokens": 30, "ignore_eos": True}
        )
        await server.idle()
    assert "secret" not in response.text
    if stream:
        assert sse_events(response.text)[-1]["error"]["type"] == "server_error"
    else:
        assert response.status_code == 500
        assert response.json()["error"]["message"]


@scenario
async def test_more_than_the_server_takes_is_a_429_and_costs_nothing(demo: Demo) -> None:
    async with serving(demo, max_inflight=2) as server:
        running = HangingUp(server.app, "/generate", {"text": "a", "sampling_params": LONG | {"n": 2}, "stream": True})
        await running.got_chunk.wait()
        refused = await server.post("/v1/completions", {"prompt": "x"})
        never = await server.post("/v1/completions", {"prompt": "x", "n": 3})
        running.hang_up()
        await running.task
        await server.idle()
        accepted = await server.post("/v1/completions", {"prompt": "x"})
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["type"] == "overloaded_error"
    assert never.status_code == 400
    assert accepted.status_code == 200


@scenario
async def test_texts_that_are_being_tokenised_count_as_taken_in(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    may_encode = threading.Event()
    encode = demo.tokenizer.encode

    def waits(text: str, **options: Any) -> bytes:
        assert may_encode.wait(10)
        return encode(text, **options)

    async with serving(demo, max_inflight=1) as server:
        monkeypatch.setattr(demo.tokenizer, "encode", waits)
        long = {"prompt": "word " * 2000, "max_tokens": 1}
        first = asyncio.create_task(server.post("/v1/completions", long))
        await until(lambda: server.core.admission.num_inflight == 1, "the first is being tokenised")
        second = await server.post("/v1/completions", long)
        may_encode.set()
        assert (await first).status_code == 400
    assert second.status_code == 429


@scenario
async def test_every_id_of_a_list_is_in_flight(demo: Demo) -> None:
    sampling = {"temperature": 0, "max_new_tokens": 1500, "ignore_eos": True}
    async with serving(demo) as server:
        body = {"text": ["x", "y"], "rid": ["a", "b"], "sampling_params": sampling | {"n": 2}}
        first = asyncio.create_task(server.post("/generate", body))
        await until(lambda: len(server.ranks[0].requests) == 4, "all are running")
        for rid in ("a", "b", ["c", "b"]):
            texts = ["x"] * len(rid) if isinstance(rid, list) else "x"
            again = await server.post("/generate", {"text": texts, "rid": rid})
            assert again.status_code == 409
            assert again.json()["param"] == "rid"
        await server.core.abort(None, "test")
        await first
        assert (await server.post("/generate", {"text": "x", "rid": "b"})).status_code == 200


@scenario
async def test_an_id_in_flight_is_refused_and_free_again_afterwards(demo: Demo) -> None:
    async with serving(demo) as server:
        running = HangingUp(
            server.app, "/generate", {"text": "a", "rid": "mine", "sampling_params": LONG, "stream": True}
        )
        await running.got_chunk.wait()
        second = await server.post("/generate", {"text": "a", "rid": "mine", "sampling_params": SHORT})
        running.hang_up()
        await running.task
        third = await server.post("/generate", {"text": "a", "rid": "mine", "sampling_params": SHORT})
    assert second.status_code == 409
    assert second.json()["param"] == "rid"
    assert third.status_code == 200


@scenario
async def test_an_id_used_again_inside_a_step_gets_its_own_tokens(demo: Demo) -> None:
    first = wire_request("job-7", (5, 6, 7), num_tokens=30)
    again = wire_request("job-7", (8, 9), num_tokens=6)
    async with serving(demo) as server, rank_and_fleet() as (rank, fleet):
        core = replace(server.core, fleet=fleet)

        async def pieces(asked: Request) -> list[Piece]:
            job = SequenceJob(asked.request_id, asked.tokens, asked.sampling)
            return [piece async for piece in core.stream(asked.request_id, [job])]

        leaving = asyncio.create_task(pieces(first))
        gate = await rank.inside_a_step()
        leaving.cancel()
        await asyncio.wait({leaving})
        second = asyncio.create_task(pieces(again))
        # the rank has taken the second in while the step still computes for the first
        await until(lambda: len(rank.engine._inbox) == 2, "both the abort and the request have come")
        gate.open()
        answer = await second
    assert [token for piece in answer for token in piece.token_ids] == expected(again)
    assert answer[-1].finish == Finish("length")


@scenario
async def test_an_answer_from_below_the_floor_is_stopped_and_counted(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(demo) as server:
        rank = server.ranks[0]
        deliver = rank._hand_out

        def from_old_pages(outputs: list[Output]) -> None:
            stats = RequestStats(num_prompt_tokens=1, num_cached_tokens=16, kv_epoch=4)
            deliver([replace(output, stats=stats) for output in outputs])

        monkeypatch.setattr(rank, "_hand_out", from_old_pages)
        server.fleet.floor = 5
        stale = await server.post("/generate", {"text": "stale", "sampling_params": LONG})
        await server.idle()
        server.fleet.floor = 4
        fresh = await server.post("/generate", {"text": "fresh", "sampling_params": SHORT})
    assert (stale.status_code, fresh.status_code) == (500, 200)
    assert server.core.counters.num_stale == 1


@scenario
async def test_a_retried_seedless_request_keeps_the_seed_it_drew(demo: Demo) -> None:
    async with serving(demo, num_ranks=2) as server:
        server.ranks[0].dies_after = 0
        await server.post("/generate", {"text": "again", "sampling_params": SHORT | {"temperature": 1}})
        await server.post("/generate", {"text": "other", "sampling_params": SHORT | {"temperature": 1}})
        seeds = [request.sampling.seed for rank in server.ranks for request in rank.requests]
    assert len(set(seeds)) == 2
    assert len(seeds) == 3


@scenario
async def test_merged_streams_close_all_when_one_fails() -> None:
    closed: list[str] = []

    async def endless(name: str) -> AsyncGenerator[str, None]:
        try:
            while True:
                yield name
                await asyncio.sleep(0)
        finally:
            closed.append(name)

    async def failing() -> AsyncGenerator[str, None]:
        yield "f"
        raise RankLost("gone")

    with pytest.raises(RankLost):
        async for _ in merged([endless("a"), failing(), endless("b")]):
            pass
    assert sorted(closed) == ["a", "b"]


@scenario
async def test_merged_streams_close_when_the_reader_stops() -> None:
    closed: list[int] = []

    async def endless(number: int) -> AsyncGenerator[int, None]:
        try:
            while True:
                yield number
        finally:
            closed.append(number)

    stream = merged([endless(number) for number in range(3)])
    seen = {await anext(stream) for _ in range(12)}
    await stream.aclose()
    assert seen == {0, 1, 2}
    assert sorted(closed) == [0, 1, 2]


@scenario
async def test_a_stream_without_an_end_is_an_error_not_a_short_answer(
    demo: Demo, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serving(demo) as server:

        async def ends_early(request: Any) -> Any:
            yield Output(request.request_id, 0, [5])

        monkeypatch.setattr(server.ranks[0], "generate", ends_early)
        response = await server.post("/generate", {"text": "x", "sampling_params": SHORT})
    assert response.status_code == 503


def _body(path: str, *, stream: bool) -> dict[str, Any]:
    openai = {"max_tokens": 60, "ignore_eos": True, "temperature": 0, "stream": stream}
    return {
        "/generate": {"text": "x", "sampling_params": LONG, "stream": stream},
        "/v1/completions": {"prompt": "x"} | openai,
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]} | openai,
    }[path]
