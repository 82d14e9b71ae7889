"""Real answers of two ranks behind Ray Serve, against plain transformers; and bad input in each route's dialect."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.cluster.server import Server, until
from tests.cluster.sse import events

PROMPTS = ["The tide", "A flush must mean flushed, in every tier and on every rank.", "x " * 300]
GREEDY = {"temperature": 0, "max_new_tokens": 24, "ignore_eos": True}


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Any:
    """prompt ids -> greedy continuation of plain transformers in float32."""
    model: Any = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)

    def generate(ids: list[int], num_tokens: int) -> list[int]:
        out = model.generate(
            torch.tensor([ids]), max_new_tokens=num_tokens, min_new_tokens=num_tokens, do_sample=False,
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
        )  # fmt: skip
        return out[0, len(ids) :].tolist()

    return generate


def _generate(client: httpx.Client, **body: Any) -> dict[str, Any]:
    response = client.post("/generate", json=body)
    assert response.status_code == 200, response.text
    return response.json()


@pytest.mark.parametrize("prompt", PROMPTS)
def test_greedy_ids_equal_plain_transformers(
    client: httpx.Client, tiny_model: Path, reference: Any, prompt: str
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    ids = tokenizer(prompt)["input_ids"]
    expected = reference(ids, 24)
    by_ids = _generate(client, input_ids=ids, sampling_params=GREEDY)
    by_text = _generate(client, text=prompt, sampling_params=GREEDY)
    assert by_ids["output_ids"] == expected
    assert by_text["output_ids"] == expected
    assert by_text["text"] == tokenizer.decode(expected, skip_special_tokens=True)
    assert by_ids["meta_info"]["prompt_tokens"] == len(ids)
    assert by_ids["meta_info"]["completion_tokens"] == 24
    assert by_ids["meta_info"]["finish_reason"]["type"] == "length"


def test_generate_streams_cumulative_text(client: httpx.Client) -> None:
    whole = _generate(client, text=PROMPTS[1], sampling_params=GREEDY)
    body = {"text": PROMPTS[1], "sampling_params": GREEDY, "stream": True}
    with client.stream("POST", "/generate", json=body) as response:
        seen = list(events(response))
    texts = [event["text"] for event in seen]
    assert all(later.startswith(earlier) for earlier, later in pairwise(texts))
    counts = [event["meta_info"]["completion_tokens"] for event in seen]
    assert counts == sorted(counts)
    assert len(seen) > 1
    assert texts[-1] == whole["text"]
    assert counts[-1] == 24


def test_the_official_client_chats_streams_and_completes(server: Server, tiny_model: Path) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="unused", max_retries=0) as openai:
        model = openai.models.list().data[0].id
        messages: Any = [{"role": "user", "content": "Say something about the sea."}]
        whole = openai.chat.completions.create(model=model, messages=messages, max_tokens=16, temperature=0)
        stream = openai.chat.completions.create(
            model=model, messages=messages, max_tokens=16, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = list(stream)
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == whole.choices[0].message.content
        assert chunks[-1].usage is not None
        assert whole.usage is not None
        assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
        several = openai.completions.create(model=model, prompt="The tide", max_tokens=8, n=3, temperature=0.8, seed=5)
        again = openai.completions.create(model=model, prompt="The tide", max_tokens=8, n=3, temperature=0.8, seed=5)
        assert [c.text for c in several.choices] == [c.text for c in again.choices]
        assert sorted(c.index for c in several.choices) == [0, 1, 2]
        logged = openai.chat.completions.create(
            model=model, messages=messages, max_tokens=4, temperature=0, logprobs=True, top_logprobs=3
        )
        assert logged.choices[0].logprobs is not None
        assert logged.choices[0].logprobs.content is not None
        assert all(len(t.top_logprobs) == 3 and t.logprob <= 0 for t in logged.choices[0].logprobs.content)
        full = openai.completions.create(model=model, prompt="The tide", max_tokens=24, temperature=0)
        stop = full.choices[0].text[4:7]
        stopped = openai.completions.create(model=model, prompt="The tide", max_tokens=24, temperature=0, stop=[stop])
        assert stopped.choices[0].finish_reason == "stop"
        assert stopped.choices[0].text == full.choices[0].text[: full.choices[0].text.index(stop)]


def test_a_client_that_leaves_frees_its_pages(client: httpx.Client) -> None:
    body = {"text": "Leave early", "sampling_params": GREEDY | {"max_new_tokens": 1800}, "stream": True}
    with client.stream("POST", "/generate", json=body) as response:
        first = next(events(response))
    assert first["meta_info"]["completion_tokens"] >= 1

    def nothing_runs() -> bool:
        loads = client.get("/v1/loads").json()["loads"]
        return all(load["num_running_reqs"] == 0 and load["num_waiting_reqs"] == 0 for load in loads)

    until(nothing_runs, 10, "the request of the client that left still runs")


BAD = [
    ("POST", "/v1/chat/completions", {"model": "nobody", "messages": [{"role": "user", "content": "x"}]}, 404),
    ("POST", "/v1/completions", {"prompt": "x", "max_tokens": "many"}, 400),
    ("POST", "/v1/completions", {"prompt": "x", "temperature": -1}, 400),
    ("POST", "/v1/completions", {"prompt": "", "max_tokens": 3}, 400),
    ("POST", "/v1/completions", {"prompt": "word " * 5000, "max_tokens": 3}, 400),
    ("POST", "/v1/completions", {"prompt": "x", "max_tokens": 1_000_000}, 400),
    ("POST", "/v1/completions", {"prompt": [1, 99_999_999], "max_tokens": 3}, 400),
    ("POST", "/generate", {"input_ids": [], "sampling_params": {}}, 400),
    ("POST", "/generate", {"input_ids": [-1], "sampling_params": {}}, 400),
    ("POST", "/generate", {"sampling_params": {}}, 400),
    ("GET", "/generate", None, 405),
    ("GET", "/v1/chat/completions", None, 405),
    ("GET", "/no/such/route", None, 404),
]


@pytest.mark.parametrize(("method", "route", "body", "status"), BAD)
def test_bad_input_is_a_4xx_with_the_reason(
    client: httpx.Client, method: str, route: str, body: Any, status: int
) -> None:
    response = client.request(method, route, json=body)
    assert response.status_code == status, response.text
    answer = response.json()
    error = answer["error"] if route.startswith("/v1/") else answer
    assert error["message"]
    assert error["code"] == status
    assert status != 400 or error["param"], "the field is named"
    assert "Traceback" not in response.text
    assert client.get("/health").status_code == 200


def test_invalid_json_is_a_400(client: httpx.Client) -> None:
    for route in ("/generate", "/v1/completions", "/v1/chat/completions"):
        response = client.post(route, content=b'{"prompt": ', headers={"content-type": "application/json"})
        assert response.status_code == 400, response.text


def test_info_routes_name_the_model_and_hold_no_secret(client: httpx.Client) -> None:
    models = client.get("/v1/models").json()
    assert models["data"][0]["owned_by"] == "sglang"
    server_info = client.get("/server_info").json()
    model_info = client.get("/model_info").json()
    assert server_info["dp_size"] == 2
    assert model_info["is_generation"] is True
    assert "weight_version" in model_info
    assert "admin_key" not in str(server_info)
