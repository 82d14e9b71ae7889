"""/v1/completions and /v1/chat/completions in OpenAI's shapes, on the tokens of a real model."""

from __future__ import annotations

import math
from typing import Any

import pytest

from deployments.logprobs import TextOffsets, completion_logprobs
from deployments.openai_models import Message
from engine.request import TokenLogprobs
from tests.unit.deployments.api_server import Demo, Server, scenario, serving
from tests.unit.deployments.asgi_client import sse_events

USER = [{"role": "user", "content": "Tell me about the sea."}]


async def chat(server: Server, **body: Any) -> dict[str, Any]:
    defaults = {"model": "tiny", "messages": USER, "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    response = await server.post("/v1/chat/completions", defaults | body)
    assert response.status_code == 200, response.text
    return response.json() if not body.get("stream") else {"events": sse_events(response.text)}


async def complete(server: Server, **body: Any) -> dict[str, Any]:
    defaults = {"model": "tiny", "prompt": "The tide", "max_tokens": 12, "temperature": 0, "ignore_eos": True}
    response = await server.post("/v1/completions", defaults | body)
    assert response.status_code == 200, response.text
    return response.json() if not body.get("stream") else {"events": sse_events(response.text)}


@scenario
async def test_a_chat_is_the_completion_of_its_template(demo: Demo) -> None:
    prompt = demo.tokenizer.render_chat(USER, continue_final=False, options={})
    async with serving(demo) as server:
        answer = await chat(server)
        completion = await complete(server, prompt=prompt)
    choice = answer["choices"][0]
    assert answer["object"] == "chat.completion"
    assert answer["model"] == "tiny"
    assert choice["message"]["role"] == "assistant"
    assert choice["message"]["content"] == completion["choices"][0]["text"]
    assert choice["finish_reason"] == "length"
    assert answer["usage"]["prompt_tokens"] == completion["usage"]["prompt_tokens"]
    assert answer["usage"]["completion_tokens"] == 12


@scenario
async def test_usage_counts_prompt_once_and_names_cached_tokens(demo: Demo) -> None:
    prompt = [(5 * i) % 200 + 3 for i in range(40)]
    async with serving(demo) as server:
        first = await complete(server, prompt=prompt, n=3, temperature=1)
        second = await complete(server, prompt=prompt)
    assert first["usage"] == {
        "prompt_tokens": 40,
        "completion_tokens": 36,
        "total_tokens": 76,
        "prompt_tokens_details": {"cached_tokens": first["usage"]["prompt_tokens_details"]["cached_tokens"]},
    }
    assert second["usage"]["prompt_tokens_details"] == {"cached_tokens": 32}


@scenario
async def test_a_chat_stream_gives_role_then_text_then_end_then_usage(demo: Demo) -> None:
    async with serving(demo) as server:
        whole = await chat(server)
        events = (await chat(server, stream=True, stream_options={"include_usage": True}))["events"]
        bare = (await chat(server, stream=True))["events"]
    assert {event["object"] for event in events} == {"chat.completion.chunk"}
    assert len({event["id"] for event in events}) == 1
    deltas = [event["choices"][0]["delta"] for event in events if event["choices"]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    assert "".join(delta.get("content", "") for delta in deltas) == whole["choices"][0]["message"]["content"]
    assert [event["choices"][0]["finish_reason"] for event in events[:-2]] == [None] * (len(events) - 2)
    assert events[-2]["choices"][0]["finish_reason"] == "length"
    assert events[-1]["choices"] == []
    assert events[-1]["usage"]["completion_tokens"] == 12
    assert all(event["usage"] is None for event in events[:-1])
    assert all("usage" not in event for event in bare)
    assert all(event["choices"] for event in bare)


@scenario
async def test_a_completion_stream_has_text_in_every_chunk(demo: Demo) -> None:
    async with serving(demo) as server:
        whole = await complete(server)
        events = (await complete(server, stream=True))["events"]
    assert "".join(event["choices"][0]["text"] for event in events) == whole["choices"][0]["text"]
    assert events[-1]["choices"][0]["finish_reason"] == "length"


@scenario
async def test_several_prompts_and_choices_are_numbered_prompt_by_prompt(demo: Demo) -> None:
    async with serving(demo, num_ranks=2) as server:
        both = await complete(server, prompt=["one", "two"], n=2, temperature=1, seed=3)
        second = await complete(server, prompt="two", n=2, temperature=1, seed=3)
        streamed = (await complete(server, prompt=["one", "two"], n=2, temperature=1, seed=3, stream=True))["events"]
    texts = [choice["text"] for choice in both["choices"]]
    assert [choice["index"] for choice in both["choices"]] == [0, 1, 2, 3]
    assert texts[2:] == [choice["text"] for choice in second["choices"]]
    assert texts[2] != texts[3]
    joined = ["", "", "", ""]
    for event in streamed:
        joined[event["choices"][0]["index"]] += event["choices"][0]["text"]
    assert joined == texts


@pytest.mark.parametrize("stream", [False, True])
@scenario
async def test_a_stop_string_is_never_shown(demo: Demo, stream: bool) -> None:
    async with serving(demo) as server:
        text = (await complete(server, max_tokens=40))["choices"][0]["text"]
        stop = text[11:15]
        answer = await complete(server, max_tokens=1000, stop=[stop], stream=stream)
    if stream:
        shown = "".join(event["choices"][0]["text"] for event in answer["events"])
        end = answer["events"][-1]["choices"][0]
    else:
        shown, end = answer["choices"][0]["text"], answer["choices"][0]
    assert shown == text[: text.index(stop)]
    assert end["finish_reason"] == "stop"
    assert end["matched_stop"] == stop


@scenario
async def test_chat_logprobs_name_token_bytes_and_alternatives(demo: Demo) -> None:
    async with serving(demo) as server:
        answer = await chat(server, logprobs=True, top_logprobs=2)
        events = (await chat(server, logprobs=True, top_logprobs=2, stream=True))["events"]
        without = await chat(server)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == 12
    assert (
        bytes(byte for token in content for byte in token["bytes"]).decode(errors="replace")
        == (answer["choices"][0]["message"]["content"])
    )
    assert all(token["top_logprobs"][0]["logprob"] == token["logprob"] <= 0 for token in content)
    assert all(len(token["top_logprobs"]) == 2 for token in content)
    chunks = [event["choices"][0]["logprobs"] for event in events]
    assert [token for chunk in chunks if chunk for token in chunk["content"]] == content
    assert without["choices"][0]["logprobs"] is None


@scenario
async def test_completion_logprobs_name_offsets_of_the_text(demo: Demo) -> None:
    async with serving(demo) as server:
        answer = await complete(server, logprobs=2)
        events = (await complete(server, logprobs=2, stream=True))["events"]
        chosen_only = await complete(server, logprobs=0)
    logprobs = answer["choices"][0]["logprobs"]
    assert len(logprobs["tokens"]) == len(logprobs["token_logprobs"]) == len(logprobs["text_offset"]) == 12
    assert logprobs["text_offset"][0] == 0
    assert all(len(tops) <= 3 for tops in logprobs["top_logprobs"])
    pairs = zip(logprobs["tokens"], logprobs["token_logprobs"], logprobs["top_logprobs"], strict=True)
    assert all(tops[token] == logprob for token, logprob, tops in pairs)
    assert all(math.isfinite(value) for value in logprobs["token_logprobs"])
    streamed = [token for event in events for token in event["choices"][0]["logprobs"]["tokens"]]
    assert streamed == logprobs["tokens"]
    streamed_offsets = [offset for event in events for offset in event["choices"][0]["logprobs"]["text_offset"]]
    assert streamed_offsets == logprobs["text_offset"]
    only = chosen_only["choices"][0]["logprobs"]
    assert only["top_logprobs"] == [
        {token: one} for token, one in zip(only["tokens"], only["token_logprobs"], strict=True)
    ]


def test_completion_logprobs_of_half_characters_and_of_unlikely_tokens(demo: Demo) -> None:
    tokens = [next(i for i in range(512) if demo.tokenizer.token_bytes(i) == byte) for byte in (b"a", b"\xc3", b"\xa9")]
    half, rest = tokens[1:]
    one = TokenLogprobs(-5.0, (half, rest), (-0.5, -1.0))
    offsets = TextOffsets()
    shown = completion_logprobs(tokens, [one, one, one], offsets, demo.tokenizer)
    assert shown["tokens"] == ["a", "bytes:\\xc3", "bytes:\\xa9"]
    assert shown["top_logprobs"][0] == {"bytes:\\xc3": -0.5, "bytes:\\xa9": -1.0, "a": -5.0}
    assert shown["text_offset"] == [0, 1, 1]
    # pieces go on where the last one ended, whatever of its text was held back
    assert completion_logprobs(tokens[:1], [one], offsets, demo.tokenizer)["text_offset"] == [2]


@scenario
async def test_without_max_tokens_a_chat_may_fill_the_context(demo: Demo) -> None:
    async with serving(demo) as server:
        long = [{"role": "user", "content": "sea " * 660}]
        answer = await server.post("/v1/chat/completions", {"messages": long, "temperature": 0, "ignore_eos": True})
        usage = answer.json()["usage"]
    assert usage["total_tokens"] == demo.model.facts.max_len


@scenario
async def test_max_completion_tokens_goes_before_max_tokens(demo: Demo) -> None:
    async with serving(demo) as server:
        answer = await chat(server, max_completion_tokens=3, max_tokens=9)
    assert answer["usage"]["completion_tokens"] == 3


@scenario
async def test_a_message_may_come_in_text_parts_and_be_continued(demo: Demo) -> None:
    parts = [
        {"role": "user", "content": [{"type": "text", "text": "Tell me "}, {"type": "text", "text": "about the sea."}]}
    ]
    begun = [*USER, {"role": "assistant", "content": "Well"}]
    async with serving(demo) as server:
        assert (await chat(server, messages=parts))["choices"] == (await chat(server))["choices"]
        continued = await chat(server, messages=begun, continue_final_message=True)
        prompt = demo.tokenizer.render_chat(begun, continue_final=True, options={})
        assert (
            continued["choices"][0]["message"]["content"]
            == ((await complete(server, prompt=prompt))["choices"][0]["text"])
        )


@scenario
async def test_salted_requests_share_no_prefix(demo: Demo) -> None:
    prompt = list(range(10, 80))
    async with serving(demo) as server:
        await complete(server, prompt=prompt, cache_salt="tenant-a")
        other = await complete(server, prompt=prompt, cache_salt="tenant-b")
        same = await complete(server, prompt=prompt, cache_salt="tenant-a")
    assert other["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert same["usage"]["prompt_tokens_details"]["cached_tokens"] == 64


@scenario
async def test_fields_that_are_not_used_are_named_and_harmless_ones_are_not(demo: Demo) -> None:
    body = {"prompt": "x", "max_tokens": 1, "user": "u", "metadata": {"a": "b"}, "my_unknown_field": 1, "best_of": 1}
    async with serving(demo) as server:
        response = await server.post("/v1/completions", body)
    assert response.status_code == 200
    assert response.headers["x-tidegate-ignored-fields"] == "my_unknown_field"


@scenario
async def test_fields_that_change_nothing_at_their_defaults_are_taken(demo: Demo) -> None:
    neutral = {
        "spaces_between_special_tokens": True,
        "truncate_prompt_tokens": None,
        "return_cached_tokens_details": False,
        "add_generation_prompt": True,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": False},
    }
    turns = [*USER, {"role": "assistant", "content": "It is"}]
    async with serving(demo) as server:
        assert (await chat(server, **neutral))["events"]
        await chat(server, messages=turns, add_generation_prompt=False, continue_final_message=True)


def test_the_template_sees_who_speaks() -> None:
    named = Message.model_validate({"role": "user", "content": [{"type": "text", "text": "hi"}], "name": "ada"})
    bare = Message.model_validate({"role": "user", "content": "hi", "name": None})
    assert named.for_template == {"role": "user", "content": "hi", "name": "ada"}
    assert bare.for_template == {"role": "user", "content": "hi"}


@scenario
async def test_null_means_not_given(demo: Demo) -> None:
    body = {
        "prompt": "x",
        "max_tokens": None,
        "stop": None,
        "n": None,
        "stream": None,
        "temperature": None,
        "seed": None,
    }
    async with serving(demo) as server:
        response = await server.post("/v1/completions", body)
    assert response.status_code == 200
    assert response.json()["usage"]["completion_tokens"] <= 16
