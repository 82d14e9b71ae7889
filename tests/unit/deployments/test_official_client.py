"""The official `openai` client, unchanged, against the application in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI

from tests.unit.deployments.api_server import Demo, scenario, serving

MESSAGES: Any = [{"role": "user", "content": "Say something about the sea."}]


@asynccontextmanager
async def official_client(demo: Demo) -> AsyncIterator[AsyncOpenAI]:
    async with serving(demo, num_ranks=2) as server:
        # Typed for a fork of httpx; the client only calls `send`, `build_request` and `aclose`, which both have.
        http: Any = httpx.AsyncClient(transport=httpx.ASGITransport(server.app), base_url="http://api/v1")
        async with AsyncOpenAI(base_url="http://api/v1", api_key="unused", max_retries=0, http_client=http) as client:
            yield client


@scenario
async def test_models_chat_stream_and_usage(demo: Demo) -> None:
    async with official_client(demo) as client:
        model = (await client.models.list()).data[0].id
        whole = await client.chat.completions.create(model=model, messages=MESSAGES, max_tokens=16, temperature=0)
        stream = await client.chat.completions.create(
            model=model, messages=MESSAGES, max_tokens=16, temperature=0, stream=True,
            stream_options={"include_usage": True},
        )  # fmt: skip
        chunks = [chunk async for chunk in stream]
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content
    assert whole.usage is not None
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == whole.usage.completion_tokens
    assert whole.usage.prompt_tokens_details is not None


@scenario
async def test_completions_choices_logprobs_and_stop(demo: Demo) -> None:
    async with official_client(demo) as client:
        several = await client.completions.create(model="tiny", prompt="The tide", max_tokens=8, n=3, seed=5)
        full = await client.completions.create(
            model="tiny", prompt="The tide", max_tokens=24, temperature=0, logprobs=2
        )
        text = full.choices[0].text
        stopped = await client.completions.create(
            model="tiny", prompt="The tide", max_tokens=24, temperature=0, stop=[text[4:7]]
        )
        logged = await client.chat.completions.create(
            model="tiny", messages=MESSAGES, max_tokens=4, logprobs=True, top_logprobs=3
        )
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    assert full.choices[0].logprobs is not None
    assert full.choices[0].logprobs.token_logprobs is not None
    assert stopped.choices[0].text == text[: text.index(text[4:7])]
    assert stopped.choices[0].finish_reason == "stop"
    assert logged.choices[0].logprobs is not None
    assert logged.choices[0].logprobs.content is not None
    assert all(len(token.top_logprobs) == 3 for token in logged.choices[0].logprobs.content)


@scenario
async def test_its_own_error_classes_arrive(demo: Demo) -> None:
    async with official_client(demo) as client:
        with pytest.raises(openai.NotFoundError, match="not served"):
            await client.completions.create(model="nobody", prompt="x")
        with pytest.raises(openai.BadRequestError) as refused:
            await client.chat.completions.create(model="tiny", messages=MESSAGES, max_tokens=99_999)
    assert refused.value.param == "max_tokens"
