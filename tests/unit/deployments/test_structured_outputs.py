"""Answers that follow a schema, a regular expression or a grammar: over every route, streamed, seeded, flushed."""

from __future__ import annotations

import asyncio
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from tests.unit.deployments.api_server import Demo, scenario, serving, until
from tests.unit.deployments.asgi_client import sse_events
from tests.unit.deployments.test_grpc import grpc_door

PERSON: dict[str, Any] = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog"]},
    },
    "required": ["name", "age", "kind"],
    "additionalProperties": False,
}
AS_PERSON = {"type": "json_schema", "json_schema": {"name": "person", "schema": PERSON, "strict": True}}
CHAT: dict[str, Any] = {"messages": [{"role": "user", "content": "who?"}], "max_tokens": 400}
SUM = 'root ::= [0-9] ("+" [0-9]){1,3} "="'


def is_person(text: str) -> bool:
    jsonschema.validate(json.loads(text), PERSON)
    return True


@scenario
async def test_chat_follows_a_schema_whole_streamed_and_many_times(demo: Demo) -> None:
    async with serving(demo, num_ranks=2) as server:
        body = CHAT | {"response_format": AS_PERSON, "seed": 7, "n": 4}
        answer = (await server.post("/v1/chat/completions", body)).json()
        texts = [choice["message"]["content"] for choice in answer["choices"]]
        assert all(map(is_person, texts))
        assert {choice["finish_reason"] for choice in answer["choices"]} == {"stop"}
        assert len(set(texts)) > 1
        again = (await server.post("/v1/chat/completions", body)).json()
        assert [choice["message"]["content"] for choice in again["choices"]] == texts
        streamed = [""] * 4
        for chunk in sse_events((await server.post("/v1/chat/completions", body | {"stream": True})).text):
            for choice in chunk["choices"]:
                streamed[choice["index"]] += choice["delta"].get("content") or ""
        assert streamed == texts
        await server.idle()


@scenario
async def test_every_way_to_name_a_grammar(demo: Demo) -> None:
    async with serving(demo) as server:
        for field, value, pattern in (
            ("regex", "(yes|no)!", "(yes|no)!"),
            ("ebnf", SUM, r"\d(\+\d){1,3}="),
            ("response_format", {"type": "json_schema", "json_schema": {"schema": {"const": "x"}}}, '"x"'),
        ):
            body = {"prompt": "x", "max_tokens": 60, field: value}
            choice = (await server.post("/v1/completions", body)).json()["choices"][0]
            assert choice["finish_reason"] == "stop"
            assert re.fullmatch(pattern, choice["text"]), (field, choice)
        for schema in (json.dumps(PERSON), PERSON):
            sampling = {"max_new_tokens": 400, "json_schema": schema}
            answer = (await server.post("/generate", {"text": "x", "sampling_params": sampling})).json()
            assert is_person(answer["text"])
        # one prompt each, with and without
        kinds = [{"regex": "[ab]{3}"}, {"ebnf": SUM}, {}]
        body = {"text": ["x", "y", "z"], "sampling_params": [{"max_new_tokens": 20} | kind for kind in kinds]}
        first, second, free = (await server.post("/generate", body)).json()
        assert re.fullmatch("[ab]{3}", first["text"])
        assert re.fullmatch(r"\d(\+\d){1,3}=", second["text"])
        assert free["meta_info"]["completion_tokens"] > 0


@pytest.mark.parametrize("any_object", [{"type": "json_object"}, {"type": "json_schema", "json_schema": {"name": "o"}}])
def test_any_json_object(demo: Demo, any_object: dict[str, Any]) -> None:
    @scenario
    async def run() -> None:
        async with serving(demo) as server:
            body = CHAT | {"response_format": any_object, "n": 8, "seed": 1, "max_tokens": 300}
            choices = (await server.post("/v1/chat/completions", body)).json()["choices"]
            ended = [choice["message"]["content"] for choice in choices if choice["finish_reason"] == "stop"]
            assert len(ended) > 1
            assert all(isinstance(json.loads(text), dict) for text in ended)
            assert all(choice["message"]["content"].startswith("{") for choice in choices)

    run()


@scenario
async def test_an_answer_goes_on_where_a_flush_stopped_it(demo: Demo) -> None:
    async with serving(demo) as server:
        body = {"text": "x", "sampling_params": {"max_new_tokens": 600, "json_schema": PERSON, "sampling_seed": 3}}
        expected = (await server.post("/generate", body)).json()
        going = [asyncio.create_task(server.post("/generate", body)) for _ in range(4)]
        await until(lambda: server.ranks[0].engine.snapshot().num_running > 0, "they run")
        flushed = (await server.post("/v1/cache/flush", {"mode": "retract", "timeout_s": 10})).json()
        assert flushed["success"], flushed
        for answer in [task.json() for task in await asyncio.gather(*going)]:
            assert answer["output_ids"] == expected["output_ids"]
            assert is_person(answer["text"])


BAD: list[tuple[str, dict[str, Any], str, str]] = [
    ("chat/completions", {"response_format": {"type": "json_schema"}}, "response_format.json_schema", "needed"),
    ("chat/completions", {"response_format": {"type": "text", "json_schema": {}}}, "response_format.json_schema", "no"),
    (
        "chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "objekt"}}}},
        "response_format.json_schema",
        "objekt",
    ),
    (
        "chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": [1]}}},
        "response_format.json_schema.schema",
        "object",
    ),
    ("chat/completions", {"response_format": {"type": "json_object"}, "regex": "a"}, "regex", "only one"),
    ("chat/completions", {"regex": "(?=a)b"}, "regex", "look-ahead"),
    ("chat/completions", {"ebnf": "root ::= nothing"}, "ebnf", "nothing"),
    ("chat/completions", {"guided_json": {"type": "object"}}, "guided_json", "response_format"),
    ("generate", {"json_schema": "{"}, "sampling_params.json_schema", "Expecting"),
    ("generate", {"json_schema": "3"}, "sampling_params.json_schema", "an object"),
    ("generate", {"json_schema": {"properties": 3}}, "sampling_params.json_schema", "properties"),
    ("generate", {"json_schema": {"not": {}}}, "sampling_params.json_schema", "not"),
    ("generate", {"regex": "a", "ebnf": SUM}, "sampling_params.ebnf", "only one"),
    ("generate", {"regex": "a" * 200_000}, "sampling_params.regex", "131072"),
    ("generate", {"structural_tag": "{}"}, "sampling_params.structural_tag", "json_schema"),
]


@scenario
async def test_what_cannot_be_followed_is_named(demo: Demo) -> None:
    async with serving(demo) as server:
        for route, fields, param, words in BAD:
            if route == "generate":
                refused = await server.post("/generate", {"text": "x", "sampling_params": fields})
                error = refused.json()
            else:
                refused = await server.post(f"/v1/{route}", CHAT | fields)
                error = refused.json()["error"]
            assert refused.status_code == 400, (fields, error)
            assert error["param"] == param, (fields, error)
            assert words in error["message"], (fields, error)
        # off, in all the ways clients write it
        for off in ({"response_format": {"type": "text"}}, {"response_format": None}, {"regex": ""}, {"ebnf": None}):
            assert (await server.post("/v1/chat/completions", CHAT | {"max_tokens": 2} | off)).status_code == 200
        await server.idle()


@scenario
async def test_grpc_constraints_are_followed(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path) as door:
        for constraint, pattern in (
            ({"regex": "(yes|no)!"}, "(yes|no)!"),
            ({"ebnf_grammar": SUM}, r"\d(\+\d){1,3}="),
            ({"json_schema": json.dumps({"enum": ["red", "blue"]})}, '"(red|blue)"'),
        ):
            (answer,) = await door.generate([5, 6, 7], sampling_params=constraint | {"max_new_tokens": 40})
            text = demo.tokenizer.decode(answer["complete"]["output_ids"])
            assert re.fullmatch(pattern, text), (constraint, text)
