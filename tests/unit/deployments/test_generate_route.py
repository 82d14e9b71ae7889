"""/generate keeps SGLang's contract, on the tokens of a real model."""

from __future__ import annotations

import asyncio
from itertools import pairwise
from typing import Any

import pytest

from deployments.http import native_shapes
from deployments.logprobs import native_logprobs
from deployments.sampling_fields import seed_of_choice
from deployments.tokenizer import Tokenizer
from engine.request import TokenLogprobs
from tests.unit.deployments.api_server import Demo, Server, scenario, serving, until
from tests.unit.deployments.asgi_client import sse_events

GREEDY = {"temperature": 0, "max_new_tokens": 12, "ignore_eos": True}


async def generate(server: Server, **body: Any) -> Any:
    response = await server.post("/generate", body)
    assert response.status_code == 200, response.text
    return response.json()


@scenario
async def test_text_and_its_ids_give_the_same_answer(demo: Demo) -> None:
    async with serving(demo) as server:
        ids = list(memoryview(demo.tokenizer.encode("The tide comes in.")).cast("i"))
        by_text = await generate(server, text="The tide comes in.", sampling_params=GREEDY, rid="by-text")
        by_ids = await generate(server, input_ids=ids, sampling_params=GREEDY)
    assert by_text["output_ids"] == by_ids["output_ids"]
    assert by_text["text"] == demo.tokenizer.decode(by_text["output_ids"])
    meta = by_text["meta_info"]
    assert meta["id"] == "by-text"
    assert meta["finish_reason"] == {"type": "length", "length": 12}
    assert meta["prompt_tokens"] == len(ids)
    assert meta["completion_tokens"] == 12 == len(by_text["output_ids"])
    assert (meta["cached_tokens"], meta["kv_epoch"], meta["num_retractions"]) == (0, None, 0)
    assert meta["weight_version"] == "default"
    assert meta["e2e_latency"] > 0


@scenario
async def test_a_repeated_prompt_names_its_cached_tokens_and_their_epoch(demo: Demo) -> None:
    prompt = [(7 * i) % 250 + 3 for i in range(100)]
    async with serving(demo) as server:
        await generate(server, input_ids=prompt, sampling_params=GREEDY)
        meta = (await generate(server, input_ids=prompt, sampling_params=GREEDY))["meta_info"]
    assert meta["cached_tokens"] == 96
    assert meta["cached_tokens_details"] == {"device": 96, "host": 0}
    assert meta["kv_epoch"] == 0


@scenario
async def test_lists_give_lists_and_each_prompt_its_own_parameters(demo: Demo) -> None:
    async with serving(demo) as server:
        answers = await generate(
            server,
            text=["one", "two"],
            rid=["a", "b"],
            sampling_params=[GREEDY, GREEDY | {"max_new_tokens": 3, "n": 2}],
        )
    assert [answer["meta_info"]["id"] for answer in answers] == ["a", "b#0", "b#1"]
    assert [answer["meta_info"]["completion_tokens"] for answer in answers] == [12, 3, 3]


@scenario
async def test_a_list_of_one_gives_a_list_of_one(demo: Demo) -> None:
    async with serving(demo) as server:
        assert len(await generate(server, input_ids=[[5, 6, 7]], sampling_params=GREEDY)) == 1


@scenario
async def test_the_stream_is_cumulative_and_ends_with_the_whole(demo: Demo) -> None:
    async with serving(demo) as server:
        whole = await generate(server, text="A long story", sampling_params=GREEDY)
        body = {"text": "A long story", "sampling_params": GREEDY, "stream": True}
        events = sse_events((await server.post("/generate", body)).text)
    assert len(events) == 12
    assert all(later["text"].startswith(earlier["text"]) for earlier, later in pairwise(events))
    assert [event["meta_info"]["completion_tokens"] for event in events] == list(range(1, 13))
    assert all(event["meta_info"]["finish_reason"] is None for event in events[:-1])
    assert events[-1]["text"] == whole["text"]
    assert events[-1]["output_ids"] == whole["output_ids"]
    assert events[-1]["meta_info"]["finish_reason"]["type"] == "length"


@scenario
async def test_a_streamed_list_names_the_prompt_of_each_event(demo: Demo) -> None:
    async with serving(demo) as server:
        body = {"text": ["one", "two"], "sampling_params": GREEDY, "stream": True}
        events = sse_events((await server.post("/generate", body)).text)
        whole = await generate(server, text=["one", "two"], sampling_params=GREEDY)
    assert {event["index"] for event in events} == {0, 1}
    last = {event["index"]: event["text"] for event in events}
    assert [last[0], last[1]] == [answer["text"] for answer in whole]


@scenario
async def test_logprobs_are_triples_and_the_greedy_token_is_the_likeliest(demo: Demo) -> None:
    async with serving(demo) as server:
        body = {"text": "x", "sampling_params": GREEDY, "return_logprob": True, "top_logprobs_num": 3}
        meta = (await generate(server, **body, return_text_in_logprobs=True))["meta_info"]
        bare = (await generate(server, **body))["meta_info"]
    assert len(meta["output_token_logprobs"]) == len(meta["output_top_logprobs"]) == 12
    for (logprob, token_id, text), tops in zip(meta["output_token_logprobs"], meta["output_top_logprobs"], strict=True):
        assert logprob <= 0
        assert text == demo.tokenizer.token_text(token_id)
        assert [logprob, token_id, text] == tops[0]
        assert len(tops) == 3
    assert {triple[2] for triple in bare["output_token_logprobs"]} == {None}


@scenario
async def test_a_stream_writes_every_logprob_once(demo: Demo, monkeypatch: pytest.MonkeyPatch) -> None:
    num_written = 0

    def counting(token_ids: list[int], logprobs: list[TokenLogprobs], tokenizer: Tokenizer | None) -> Any:
        nonlocal num_written
        num_written += len(token_ids)
        return native_logprobs(token_ids, logprobs, tokenizer)

    monkeypatch.setattr(native_shapes, "native_logprobs", counting)
    body = {"text": "x", "sampling_params": GREEDY, "return_logprob": True, "top_logprobs_num": 3}
    async with serving(demo) as server:
        events = sse_events((await server.post("/generate", body | {"stream": True})).text)
        num_streamed = num_written
        whole = await generate(server, **body)
    assert num_streamed == 12
    metas = [event["meta_info"] for event in events]
    assert [len(meta["output_token_logprobs"]) for meta in metas] == list(range(1, 13))
    assert all(
        len(event["output_ids"]) == len(meta["output_top_logprobs"]) for event, meta in zip(events, metas, strict=True)
    )
    assert [triple[1] for triple in metas[-1]["output_token_logprobs"]] == whole["output_ids"]
    assert metas[-1]["output_top_logprobs"][0][0] == metas[0]["output_token_logprobs"][0]


@pytest.mark.parametrize("keep", [False, True])
@scenario
async def test_a_stop_string_ends_the_text_there_and_the_request_at_once(demo: Demo, keep: bool) -> None:
    async with serving(demo) as server:
        whole = await generate(server, text="Stop me", sampling_params=GREEDY | {"max_new_tokens": 40})
        stop = whole["text"][9:14]
        cut = whole["text"].index(stop) + (len(stop) if keep else 0)
        sampling = GREEDY | {"max_new_tokens": 1500, "stop": ["never there", stop], "no_stop_trim": keep}
        stopped = await generate(server, text="Stop me", sampling_params=sampling)
        await server.idle()
        num_steps = server.ranks[0].engine.snapshot().counters.num_generated_tokens
    assert stopped["text"] == whole["text"][:cut]
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop}
    num_tokens = stopped["meta_info"]["completion_tokens"]
    assert stopped["output_ids"] == whole["output_ids"][:num_tokens]
    assert stop in demo.tokenizer.decode(stopped["output_ids"])
    assert stop not in demo.tokenizer.decode(stopped["output_ids"][:-1])
    assert num_steps < 40 + 1500


@scenario
async def test_a_stop_token_counts_and_is_not_shown(demo: Demo) -> None:
    async with serving(demo) as server:
        whole = await generate(server, text="Stop me", sampling_params=GREEDY)
        stop_id = whole["output_ids"][5]
        place = whole["output_ids"].index(stop_id)
        stopped = await generate(server, text="Stop me", sampling_params=GREEDY | {"stop_token_ids": [stop_id]})
    assert stopped["output_ids"] == whole["output_ids"][: place + 1]
    assert stopped["text"] == demo.tokenizer.decode(whole["output_ids"][:place])
    assert stopped["meta_info"]["finish_reason"] == {"type": "stop", "matched": stop_id}


@scenario
async def test_the_same_seed_gives_the_same_tokens_and_choices_differ(demo: Demo) -> None:
    sampling = {"temperature": 1.0, "max_new_tokens": 16, "ignore_eos": True, "sampling_seed": 7, "n": 3}
    async with serving(demo, num_ranks=2) as server:
        first = await generate(server, text="Chance", sampling_params=sampling)
        second = await generate(server, text="Chance", sampling_params=sampling)
    assert [a["output_ids"] for a in first] == [a["output_ids"] for a in second]
    assert len({tuple(a["output_ids"]) for a in first}) == 3


def test_choices_of_neighbouring_seeds_have_no_seed_in_common() -> None:
    seeds = [seed_of_choice(seed, choice) for seed in (*range(50), (1 << 63) - 1) for choice in range(20)]
    assert len(set(seeds)) == len(seeds)
    assert all(seed is not None and 0 <= seed < 1 << 63 for seed in seeds)
    assert [seed_of_choice(7, 0), seed_of_choice(None, 3)] == [7, None]
    assert seed_of_choice(7, 1) == seed_of_choice(7, 1)


@scenario
async def test_a_start_of_logprobs_means_nothing_without_them_and_ids_may_be_long(demo: Demo) -> None:
    async with serving(demo) as server:
        answer = await generate(server, text="x", sampling_params=GREEDY, logprob_start_len=0, rid="r" * 256)
        wanted = await generate(server, text="x", sampling_params=GREEDY, logprob_start_len=-1, return_logprob=True)
    assert answer["meta_info"]["id"] == "r" * 256
    assert "output_token_logprobs" not in answer["meta_info"]
    assert len(wanted["meta_info"]["output_token_logprobs"]) == 12


@scenario
async def test_abort_ends_all_sequences_of_exactly_that_request(demo: Demo) -> None:
    long = GREEDY | {"max_new_tokens": 1800}
    async with serving(demo, num_ranks=2) as server:
        mine = asyncio.create_task(generate(server, text="mine", rid="job-1", sampling_params=long | {"n": 2}))
        other = asyncio.create_task(generate(server, text="other", rid="job-10", sampling_params=GREEDY))
        await until(lambda: sum(len(rank.requests) for rank in server.ranks) == 3, "all are running")
        response = await server.post("/abort_request", {"rid": "job-1"})
        assert response.json()["num_aborted"] == 2
        answers = await mine
        assert [answer["meta_info"]["finish_reason"]["type"] for answer in answers] == ["abort", "abort"]
        assert (await other)["meta_info"]["finish_reason"]["type"] == "length"
        unknown = await server.post("/abort_request", {"rid": "nobody"})
        assert unknown.status_code == 200
        assert unknown.json()["status"] == "unknown"
