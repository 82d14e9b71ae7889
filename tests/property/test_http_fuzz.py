"""Random JSON at every route: never a 5xx, never a hang, and every page is free again afterwards.

Bodies are mostly right, with single fields replaced by anything: that reaches deeper than noise, which is refused at
the first field.
"""

from __future__ import annotations

import asyncio
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deployments.tokenizer import Tokenizer
from engine.demo_model import write_demo_model
from engine.models import load_model
from tests.unit.deployments.api_server import Demo, Server, serving
from tests.unit.deployments.asgi_client import sse_events

ANSWER_WITHIN_S = 20
TOO_LATE = ("timed_out", "unreachable", "unavailable", "expired_command")
DEEP = bool(os.environ.get("TIDEGATE_DEEP"))

scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 600),
    st.integers(),
    st.floats(allow_nan=False, allow_infinity=False),
    st.text(max_size=12),
    st.sampled_from(["", "tiny", "default", "x" * 400, "🌊", "\x00", "{{ 7 * 7 }}", "<|im_end|>", "-1", "NaN"]),
)
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(st.text(max_size=6), inner, max_size=3)),
    max_leaves=8,
)
#: what lies on, or just beyond, the border of some field's range
edges = st.sampled_from(
    [0, -1, 1e-9, 2.1, 1e300, 2**31, 2**63, -(2**64), 512, "a#1", "job 1", "600", [512], [""], {"5": 101}]
)

# Right values only; `bodies` spoils one field at a time.
sampling = {
    "temperature": st.sampled_from([0, 1e-9, 0.5, 2, -0.0]),
    "top_p": st.sampled_from([1, 0.1, 1e-12]),
    "top_k": st.sampled_from([-1, 1, 5, 10**6]),
    "min_p": st.sampled_from([0, 0.5, 1]),
    "presence_penalty": st.sampled_from([-2, 0, 2]),
    "frequency_penalty": st.sampled_from([-2, 0, 2]),
    "repetition_penalty": st.sampled_from([0.01, 1, 2]),
    "stop": st.one_of(st.text(min_size=1, max_size=3), st.lists(st.text(min_size=1, max_size=3), max_size=4)),
    "stop_token_ids": st.lists(st.integers(0, 511), max_size=4),
    "logit_bias": st.dictionaries(st.sampled_from(["5", "511"]), st.sampled_from([-100, 0, 100]), max_size=2),
    "regex": st.sampled_from(["", "a+", "[0-9]{1,3}", "(é|🌊)*"]),
    "ignore_eos": st.booleans(),
    "skip_special_tokens": st.booleans(),
    "no_stop_trim": st.booleans(),
    "n": st.integers(1, 4),
}
openai = sampling | {
    "model": st.sampled_from(["tiny", "default"]),
    "min_tokens": st.integers(0, 1),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "cache_salt": st.text(max_size=4),
    "data_parallel_rank": st.integers(0, 1),
    "user": st.text(max_size=4),
}
streamed = st.sampled_from([{}, {"stream": True}, {"stream": True, "stream_options": {"include_usage": True}}])
ids = st.lists(st.integers(0, 511), min_size=1, max_size=24)
text = st.text(min_size=1, max_size=20)
messages = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["user", "system", "assistant"]), "content": st.text(max_size=9)}),
    min_size=1,
    max_size=3,
)
prompts = st.one_of(text, ids, st.lists(text, min_size=1, max_size=3), st.lists(ids, min_size=1, max_size=3))
few = st.integers(1, 8)
native_sampling = sampling | {"min_new_tokens": st.integers(0, 1), "sampling_seed": st.integers(0, 9)}
native_prompts = st.one_of(
    st.fixed_dictionaries({"text": st.one_of(text, st.lists(text, min_size=1, max_size=3))}),
    st.fixed_dictionaries({"input_ids": st.one_of(ids, st.lists(ids, min_size=1, max_size=3))}),
)
native = {
    "stream": st.booleans(),
    "return_logprob": st.booleans(),
    "top_logprobs_num": st.integers(0, 3),
    "return_text_in_logprobs": st.booleans(),
    "extra_key": st.text(max_size=4),
}
flushes = {
    "timeout_s": st.sampled_from([0, 0.01, 0.1]),
    "mode": st.sampled_from(["wait", "fence", "drain", "retract", "abort"]),
    "tiers": st.just(["device"]),
    "dry_run": st.booleans(),
    "flush_id": st.sampled_from(["a", "b", "a" * 128]),
    "scope": st.one_of(
        st.sampled_from([{"namespace": "a"}, {"cache_salt": "b"}, {"adapter": "c"}, {"older_than_s": 5}, None]),
        st.sampled_from([{"prefix_text": "The tide "}, {"prefix_tokens": [5, 6]}]),
        st.dictionaries(st.sampled_from(["namespace", "prefix_text", "prefix_tokens", "older_than_s"]), anything),
    ),
}


def bodies(required: dict[str, Any], fields: dict[str, Any]) -> st.SearchStrategy[dict[str, Any]]:
    """A right body; every third time with one field replaced by something from an edge, or by anything."""
    right = st.fixed_dictionaries(required, optional=fields)
    names = st.sampled_from([*required, *fields, "rid", "unheard_of", "best_of", "tools"])
    spoilt = st.builds(lambda body, name, value: body | {name: value}, right, names, st.one_of(edges, anything))
    return st.one_of(right, right, spoilt)


def joined(*parts: st.SearchStrategy[dict[str, Any]]) -> st.SearchStrategy[dict[str, Any]]:
    return st.builds(lambda *dicts: {key: value for one in dicts for key, value in one.items()}, *parts)


completions = bodies({"prompt": prompts, "max_tokens": few}, openai | {"logprobs": st.integers(0, 20)})
chats = bodies(
    {"messages": messages, "max_tokens": few},
    openai | {"logprobs": st.just(True), "chat_template_kwargs": st.dictionaries(st.sampled_from("ab"), scalars)},
)
generates = bodies({"sampling_params": bodies({"max_new_tokens": few}, native_sampling)}, native)
ROUTES: dict[str, st.SearchStrategy[Any]] = {
    "/v1/completions": joined(streamed, completions),
    "/v1/chat/completions": joined(streamed, chats),
    "/generate": joined(native_prompts, generates),
    "/tokenize": bodies({"prompt": st.one_of(text, st.lists(text, max_size=3))}, {"add_special_tokens": st.booleans()}),
    "/detokenize": bodies({"tokens": st.one_of(ids, st.lists(ids, max_size=3))}, {"model": st.just("tiny")}),
    "/abort_request": bodies({"rid": st.sampled_from(["a", "b", ""])}, {"abort_all": st.booleans()}),
    "/v1/cache/flush": bodies({}, flushes),
}


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Demo:
    directory: Path = tmp_path_factory.mktemp("model") / "tiny"
    write_demo_model(directory, "tiny")
    torch.set_num_threads(1)
    return Demo(directory, load_model(directory, "cpu", "float32", None), Tokenizer(directory))


@pytest.mark.parametrize("route", ROUTES)
@given(data=st.data())
@settings(
    max_examples=300 if DEEP else 8,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)
def test_any_body_gets_an_answer_and_leaves_nothing(demo: Demo, route: str, data: st.DataObject) -> None:
    """One server per example, several bodies at once: they meet in one batch and in one cache."""
    together = data.draw(st.lists(ROUTES[route], min_size=6, max_size=6))
    asyncio.run(asyncio.wait_for(_answers_all(demo, route, together), ANSWER_WITHIN_S))


async def _answers_all(demo: Demo, route: str, together: list[Any]) -> None:
    async with serving(demo, num_ranks=2) as server:
        await asyncio.gather(*(_one(server, route, body) for body in together))
        await server.idle()
        assert (await server.client.get("/health_generate")).status_code == 200
        await server.idle()
        for rank in server.ranks:
            picture = rank.engine.snapshot()
            assert picture.num_free_pages + picture.num_cached_pages == picture.num_pages
            assert picture.counters.num_failed_steps == 0


async def _one(server: Server, route: str, body: Any) -> None:
    response = await server.client.post(
        route, content=json.dumps(body).encode(errors="surrogatepass"), headers={"content-type": "application/json"}
    )
    # a flush that did not come about in its time, on a machine where all compute, is a truthful 5xx; all else is fine
    # or the caller's fault
    is_late = route == "/v1/cache/flush" and response.json().get("status") in TOO_LATE
    assert response.status_code < 500 or is_late, (body, response.text)
    if response.headers["content-type"].startswith("text/event-stream"):
        events = sse_events(response.text)
        assert events
        assert all("error" not in event for event in events), (body, events[-1])
    else:
        json.loads(response.text)


@given(
    method=st.sampled_from(["GET", "POST", "PUT", "DELETE"]),
    route=st.sampled_from(
        [
            *ROUTES,
            "/flush_cache",
            "/v1/cache",
            "/v1/cache/audit",
            "/v1/cache/flush/x",
            "/v1/cache/flush/%00",
            "/v1/loads",
            "/v1/models/x",
            "/server_info",
            "/%00",
            "/v1//x",
        ]
    ),
    content=st.one_of(st.binary(max_size=64), st.just(b"{" * 3000)),
    query=st.text(max_size=12),
)
@settings(max_examples=3000 if DEEP else 60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_noise_is_never_a_5xx(demo: Demo, method: str, route: str, content: bytes, query: str) -> None:
    async def send() -> None:
        async with serving(demo) as server:
            response = await server.client.request(
                method, route, content=content,
                params={"timeout": query, "include": query, "dp_rank": query, "limit": query, "flush_id": query},
                headers={"content-type": "application/json"},
            )  # fmt: skip
            assert response.status_code < 500, response.text

    asyncio.run(asyncio.wait_for(send(), ANSWER_WITHIN_S))
