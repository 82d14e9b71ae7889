"""`from tidegate import Client, AsyncClient` against the real application, over a port and over the controller."""

from __future__ import annotations

import asyncio
import inspect
import pickle
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import httpx
import pytest

import tidegate
from actors.controller import ControllerActor
from configs.errors import (
    Conflict,
    ControlUnavailable,
    Forbidden,
    InvalidField,
    NotOffered,
    Overloaded,
    RankLost,
    Unauthorized,
    UnknownModel,
    UnknownResource,
)
from deployments.auth import Keys
from tests.unit.deployments.api_server import Demo, Server, scenario, serving, until
from tests.unit.deployments.local_ranks import Handle
from tests.unit.deployments.on_a_port import on_a_port, traffic
from tidegate import AsyncClient, Client, FlushFailed, NoAnswer, StreamCut, Unreachable
from tidegate.results import Generation

LONG: dict[str, Any] = {"max_new_tokens": 2000, "ignore_eos": True}


def over_asgi(server: Server, key: str | None = None) -> AsyncClient:
    return AsyncClient("http://api", key, transport=httpx.ASGITransport(server.app))


def controller_of(server: Server) -> Handle:
    actor = ControllerActor.__new__(ControllerActor)
    actor._plane = server.plane
    return Handle(actor)


@scenario
async def test_blocking_and_awaited_calls_tell_the_same(demo: Demo) -> None:
    def use(url: str) -> tuple[list[Any], list[str]]:
        with Client(url) as client:
            whole = client.generate("once upon a time", max_new_tokens=12, temperature=0, request_id="one")
            steps = list(client.stream_generate("once upon a time", max_new_tokens=12, temperature=0))
            chat = client.chat("hello", max_tokens=12, temperature=0)
            pieces = list(client.stream_chat([{"role": "user", "content": "hello"}], max_tokens=12, temperature=0))
            return [whole, steps[-1], chat, client.flush(timeout_s=5), client.cache(), client.status()], pieces

    async with on_a_port(demo) as (_, url):
        (whole, last, chat, flushed, cache, status), pieces = await asyncio.to_thread(use, url)
        assert whole.request_id == "one"
        assert whole.completion_tokens == len(whole.token_ids) == 12
        assert (whole.text, whole.token_ids, whole.finish_reason) == (last.text, last.token_ids, "length")
        assert chat.content == "".join(pieces) != ""
        assert flushed.success
        assert flushed.status == "flushed"
        assert [row.name for row in flushed.ranks] == ["rank 0", "rank 1"]
        assert all(row.is_good for row in flushed.ranks)
        assert (cache.success, cache.epoch, len(cache.ranks)) == (True, flushed.epoch, 2)
        assert (status.success, status.model, len(status.ranks)) == (True, "tiny", 2)
        async with AsyncClient(url) as client:
            again = await client.generate("once upon a time", max_new_tokens=12, temperature=0)
            assert again.token_ids == whole.token_ids
            by_ids = await client.generate([1, 2, 3], max_new_tokens=3, ignore_eos=True, namespace="a", rank=1)
            assert (by_ids.prompt_tokens, by_ids.rank) == (3, 1)
            assert [piece async for piece in client.stream_chat("hello", max_tokens=12, temperature=0)] == pieces
            assert (await client.chat("hello", max_tokens=12, temperature=0)).content == chat.content


@scenario
async def test_a_flush_that_did_not_flush_raises_with_its_rows(demo: Demo) -> None:
    async with serving(demo) as server, over_asgi(server) as client:
        async with traffic(server):
            with pytest.raises(FlushFailed, match=r"^flush .* (refused|busy|timed_out): .*rank 0 is ") as failed:
                await client.flush()
            unchecked = await client.flush(check=False)
        result = failed.value.result
        assert not result.success
        assert not result.ranks[0].is_good
        assert sum(result.ranks[0].blockers.values()) > 0
        assert not unchecked.success
        copy = pickle.loads(pickle.dumps(failed.value))
        assert (copy.message, copy.result) == (failed.value.message, result)
        await server.idle()
        assert (await client.flush(timeout_s=5, mode="drain", flush_id="f-1")).flush_id == "f-1"
        assert (await client.flush(timeout_s=5, mode="drain", flush_id="f-1")).replayed
        assert (await client.flush_status("f-1")).success


@scenario
async def test_a_pending_flush_is_seen_and_cancelled(demo: Demo) -> None:
    async with serving(demo) as server, over_asgi(server) as client, traffic(server):
        waiting = asyncio.create_task(client.flush(timeout_s=25, flush_id="w-1"))

        async def is_begun() -> bool:
            # before its intent is stored, a flush that is cancelled leaves no trace
            pending = (await client.cache()).pending_flush
            return pending is not None and pending["epoch"] > 0

        await until(is_begun, "the flush is pending")
        assert (await client.flush_status("w-1")).status == "pending"
        cancelled = await client.cancel_flush("w-1")
        assert cancelled.status == "cancelled"
        with pytest.raises(FlushFailed, match="w-1 cancelled"):
            await waiting
        with pytest.raises(Conflict):
            await client.cancel_flush("w-1")
        for ask in (client.cancel_flush, client.flush_status):
            with pytest.raises(UnknownResource):
                await ask("nobody")
        calls = [entry.call for entry in await client.audit(flush_id="w-1")]
        assert "flush" in calls


@scenario
async def test_a_stream_is_ended_by_an_abort_and_by_closing_it(demo: Demo) -> None:
    async with on_a_port(demo, num_ranks=1) as (server, url), AsyncClient(url) as client:
        steps = [step async for step in _aborting(client)]
        assert steps[-1].finish_reason == "abort"
        assert len(steps[-1].token_ids) < 2000
        async with aclosing(client.stream_generate("on and on", **LONG)) as stream:
            assert (await anext(stream)).finish_reason is None
        await server.idle()
        assert (await client.abort(all=True)).num_aborted == 0
        with pytest.raises(InvalidField):
            await client.abort()


async def _aborting(client: AsyncClient) -> AsyncGenerator[Generation, None]:
    """The steps of a stream that is aborted by id after its first one."""
    has_aborted = False
    async for step in client.stream_generate("on and on", request_id="long", **LONG):
        if not has_aborted:
            assert (await client.abort("long")).num_aborted == 1
            has_aborted = True
        yield step


@scenario
async def test_a_rank_that_dies_in_mid_stream_is_an_error_and_no_short_answer(demo: Demo) -> None:
    async with serving(demo) as server, over_asgi(server) as client:
        server.ranks[0].dies_after = 3
        with pytest.raises(RankLost):
            [step async for step in client.stream_generate("on and on", **LONG)]


@scenario
async def test_refusals_are_typed(demo: Demo) -> None:
    async with (
        serving(demo, keys=Keys(api_key="user", admin_key="admin")) as server,
        over_asgi(server) as nobody,
        over_asgi(server, "user") as user,
        over_asgi(server, "admin") as admin,
    ):
        with pytest.raises(Unauthorized):
            await nobody.generate("x")
        with pytest.raises(Forbidden):
            await user.flush()
        assert (await admin.flush(timeout_s=5)).success
        with pytest.raises(UnknownModel):
            await user.chat("x", model="other")
        with pytest.raises(InvalidField) as refused:
            await user.generate("x", temperature=-1)
        assert refused.value.param == "sampling_params.temperature"
        with pytest.raises(InvalidField) as streamed:
            [step async for step in user.stream_generate("x", temperature=-1)]
        assert streamed.value.message == refused.value.message
        with pytest.raises(InvalidField, match="mode"):
            await admin.flush(mode="gently")
        with pytest.raises(InvalidField, match="timeout_s"):
            await admin.flush(timeout_s=float("nan"))
        with pytest.raises(InvalidField, match="no JSON"):
            await user.generate("x", temperature=float("inf"))
        with pytest.raises(InvalidField, match="one sequence"):
            await user.generate("x", n=2)


@scenario
async def test_the_controller_itself_answers_control_calls_only(demo: Demo) -> None:
    async with serving(demo, num_ranks=2) as server, AsyncClient(controller_of(server)) as client:
        flushed = await client.flush(timeout_s=5, flush_id="job-1")
        assert flushed.success
        assert (await client.flush_status("job-1")).epoch == flushed.epoch == (await client.cache()).epoch
        entries = await client.audit(1)
        assert [(entry.call, entry.caller) for entry in entries] == [("flush", "python client")]
        with pytest.raises(Conflict):
            await client.flush(timeout_s=9, flush_id="job-1")
        with pytest.raises(InvalidField) as refused:
            await client.flush(tiers=["disk"])
        assert refused.value.param == "tiers"
        with pytest.raises(UnknownResource):
            await client.flush_status("nobody")
        assert (await client.abort("nobody")).num_aborted == 0
        server.ranks[1].is_mute = True
        silent = await client.cache()
        assert not silent.success
        assert [row["status"] for row in silent.ranks][1] == "unreachable"
        with pytest.raises(NotOffered, match="the server's URL"):
            await client.generate("x")
        with pytest.raises(NotOffered, match="the server's URL"):
            [piece async for piece in client.stream_chat("x")]


def test_nobody_and_strangers_are_unreachable() -> None:
    with Client("http://127.0.0.1:9") as client, pytest.raises(Unreachable, match="cannot be reached"):
        client.cache()
    page = httpx.MockTransport(lambda request: httpx.Response(200, text="<html>"))
    with Client("http://elsewhere", transport=page) as client, pytest.raises(Unreachable, match="is it Tidegate"):
        client.cache()


def test_a_call_that_was_sent_and_not_answered_may_have_been_carried_out() -> None:
    def lose(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadTimeout("no answer", request=request)

    with Client("http://slow", transport=httpx.MockTransport(lose)) as client, pytest.raises(NoAnswer, match="in time"):
        client.flush()


def test_a_stream_without_its_end_is_cut() -> None:
    chunk = 'data: {"choices": [{"delta": {"content": "half"}}]}\n\n'
    for text in (chunk, chunk + "data: {"):
        cut = httpx.MockTransport(lambda request, text=text: httpx.Response(200, text=text))
        with Client("http://cut", transport=cut) as client:
            stream = client.stream_chat("x")
            assert next(stream) == "half"
            with pytest.raises(StreamCut):
                next(stream)


def test_being_busy_says_when_to_come_back() -> None:
    told = {"object": "error", "message": "too many", "type": "Too Many Requests", "param": None, "code": 429}
    full = httpx.MockTransport(lambda request: httpx.Response(429, json=told, headers={"retry-after": "7"}))
    with Client("http://full", transport=full) as client, pytest.raises(Overloaded) as error:
        client.generate("x")
    assert error.value.retry_after_s == 7.0
    away = httpx.MockTransport(lambda request: httpx.Response(503, json={"success": False, "message": "away"}))
    with Client("http://away", transport=away) as client, pytest.raises(ControlUnavailable, match="away"):
        client.audit()


def test_both_clients_offer_the_same() -> None:
    def offered(kind: type[Any]) -> dict[str, list[str]]:
        methods = inspect.getmembers(kind, inspect.isfunction)
        return {name: list(inspect.signature(one).parameters) for name, one in methods if not name.startswith("_")}

    assert offered(Client) == offered(AsyncClient)
    assert set(tidegate.__all__) <= {name for name in tidegate.__all__ if getattr(tidegate, name)}
    with pytest.raises(AttributeError):
        _ = tidegate.Cleint
