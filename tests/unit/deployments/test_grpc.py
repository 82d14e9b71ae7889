"""The gRPC door on a real port, with real engine loops behind it and a client that has none of our code."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import io
import threading
import zipfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from configs.errors import ConfigError
from deployments import grpc_service
from deployments.auth import Keys
from deployments.grpc_server import GrpcServer
from deployments.grpc_service import GrpcService, status_of
from deployments.protos import RPCS
from deployments.tokenizer_archive import tokenizer_archive
from engine.flush import ALREADY_IN_PROGRESS, TIMED_OUT_WAITING
from tests.unit.deployments.api_server import Demo, Server, scenario, serving, until
from tests.unit.deployments.grpc_client import Client, grpc_client

OFFERED = {
    "Generate", "HealthCheck", "Abort", "GetModelInfo", "GetServerInfo", "GetLoads", "FlushCache", "GetTokenizer",
    "StartProfile", "StopProfile",
}  # fmt: skip
GREEDY = {"temperature": 0, "top_p": 1, "top_k": -1, "repetition_penalty": 1, "max_new_tokens": 8, "ignore_eos": True}
LONG = {"tokenized": {"input_ids": [5, 6, 7]}, "stream": True, "sampling_params": GREEDY | {"max_new_tokens": 1900}}


@dataclass
class Door:
    server: Server
    client: Client
    address: str
    folder: Path

    async def generate(self, ids: list[int], **more: Any) -> list[dict[str, Any]]:
        sampling = GREEDY | more.pop("sampling_params", {})
        request = {"tokenized": {"input_ids": ids}, "sampling_params": sampling, **more}
        reply = await self.client.call("Generate", request)
        assert reply.code == "OK", reply.details
        return reply.messages


@asynccontextmanager
async def grpc_door(
    demo: Demo, folder: Path, keys: Keys | None = None, num_ranks: int = 1, traces: Path | None = None
) -> AsyncIterator[Door]:
    async with serving(demo, num_ranks=num_ranks, traces=traces) as server:
        service = GrpcService(server.core, keys or Keys(), "0.test", 3600.0)
        grpc_server = GrpcServer(service, max_message_bytes=1 << 20)
        address = f"127.0.0.1:{await grpc_server.start('127.0.0.1', 0)}"
        try:
            async with grpc_client(address, folder) as client:
                yield Door(server, client, address, folder)
        finally:
            await grpc_server.stop(0)


@asynccontextmanager
async def running_stream(door: Door) -> AsyncIterator[None]:
    """A long generation of another client; aborted at the end of the block."""
    async with grpc_client(door.address, door.folder) as other:
        calling = asyncio.create_task(other.call("Generate", LONG | {"request_id": "long-one"}))
        await until(lambda: door.server.core.admission.num_inflight == 1, "the stream has begun")
        await until(lambda: not door.server.ranks[0].is_idle, "the rank runs it")
        try:
            yield
        finally:
            await door.client.call("Abort", {"request_id": "long-one"}, key="admin")
            await calling


@scenario
async def test_health_model_and_server_facts(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path, num_ranks=2) as door:
        health = (await door.client.call("HealthCheck")).message
        assert health == {"healthy": True, "message": "2 ranks serve"}
        info = (await door.client.call("GetModelInfo")).message
        assert info["served_model_name"] == "tiny"
        assert info["vocab_size"] == demo.model.facts.vocab_size
        assert info["max_context_length"] == demo.model.facts.max_len
        assert info["max_req_input_len"] == demo.model.facts.max_len - 1
        assert info["eos_token_ids"] == list(demo.model.facts.eos_token_ids)
        assert info["tokenizer_path"] == str(demo.directory)
        assert info["is_generation"] is True
        server = (await door.client.call("GetServerInfo")).message
        assert server["server_args"]["dp_size"] == 2
        assert server["sglang_version"] == "0.test"
        loads = (await door.client.call("GetLoads", {"include": ["all"]})).message
        assert [load.get("dp_rank", 0) for load in loads["loads"]] == [0, 1]
        assert all(load["max_total_num_tokens"] > 0 for load in loads["loads"])
        one = (await door.client.call("GetLoads", {"dp_rank": 1})).message
        assert [load["dp_rank"] for load in one["loads"]] == [1]


@scenario
async def test_loads_without_a_rank_are_a_status(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path, num_ranks=2) as door:
        nobody = await door.client.call("GetLoads", {"dp_rank": 9})
        assert nobody.code == "INVALID_ARGUMENT"
        assert "dp_rank" in nobody.details
        door.server.ranks[1].is_mute = True
        silent = await door.client.call("GetLoads")
        assert (silent.code, silent.details) == ("UNAVAILABLE", "no answer from rank 1")
        assert (await door.client.call("GetLoads", {"dp_rank": 1})).code == "UNAVAILABLE"
        assert (await door.client.call("GetLoads", {"dp_rank": 0})).code == "OK"


@scenario
async def test_no_rank_is_not_healthy(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path) as door:
        door.server.ranks[0].die()
        health = (await door.client.call("HealthCheck")).message
        assert "healthy" not in health
        refused = await door.client.call("Generate", {"tokenized": {"input_ids": [1, 2]}})
        assert refused.code == "UNAVAILABLE"


@scenario
async def test_tokens_are_those_of_the_http_door(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path) as door:
        ids = list(range(20, 60))
        body = {"input_ids": ids, "sampling_params": {"temperature": 0, "max_new_tokens": 8, "ignore_eos": True}}
        expected = (await door.server.post("/generate", body)).json()["output_ids"]
        (whole,) = await door.generate(ids, request_id="mine")
        assert whole["request_id"] == "mine"
        assert whole["complete"]["output_ids"] == expected
        assert whole["complete"]["finish_reason"] == "length"
        assert (whole["complete"]["prompt_tokens"], whole["complete"]["completion_tokens"]) == (40, 8)
        assert whole["complete"]["cached_tokens"] == 32
        *chunks, last = await door.generate(ids, stream=True)
        assert [token for one in chunks for token in one["chunk"]["token_ids"]] == expected
        assert [one["chunk"]["completion_tokens"] for one in chunks][-1] == 8
        assert last["complete"]["output_ids"] == expected


@scenario
async def test_n_logprobs_and_stops(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path) as door:
        ids = list(range(30, 50))
        (greedy,) = await door.generate(ids)
        expected = greedy["complete"]["output_ids"]
        both = await door.generate(ids, sampling_params={"n": 2})
        assert sorted(one["complete"].get("index", 0) for one in both) == [0, 1]
        assert all(one["complete"]["output_ids"] == expected for one in both)
        (logged,) = await door.generate(ids, return_logprob=True, top_logprobs_num=2)
        logprobs = logged["complete"]["output_logprobs"]
        assert logprobs["token_ids"] == expected
        assert all(value <= 0 for value in logprobs["token_logprobs"])
        assert all(len(top["token_ids"]) == 2 for top in logprobs["top_logprobs"])
        (by_id,) = await door.generate(ids, sampling_params={"stop_token_ids": [expected[3]]})
        assert by_id["complete"]["finish_reason"] == "stop"
        assert by_id["complete"]["matched_token_id"] == expected[3]
        stop = demo.tokenizer.token_text(expected[2])
        (by_text,) = await door.generate(ids, sampling_params={"stop": [stop]})
        assert by_text["complete"]["matched_stop_str"] == stop


@scenario
async def test_a_flush_empties_the_cache(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path, num_ranks=2) as door:
        ids = list(range(100, 140))
        await door.generate(ids)
        (warm,) = await door.generate(ids)
        assert warm["complete"]["cached_tokens"] == 32
        flushed = (await door.client.call("FlushCache", {"timeout_s": 5})).message
        assert flushed == {"success": True}
        (cold,) = await door.generate(ids)
        assert "cached_tokens" not in cold["complete"]


@scenario
async def test_a_busy_server_refuses_or_waits_until_a_deadline(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path) as door, running_stream(door):
        now = (await door.client.call("FlushCache", {"timeout_s": 0})).message
        assert "success" not in now
        assert now["message"]
        waited = (await door.client.call("FlushCache", {"timeout_s": 0.1})).message
        assert waited == {"message": TIMED_OUT_WAITING}
        late = await door.client.call("FlushCache", {"timeout_s": 30}, timeout_s=0.5)
        assert late.code == "DEADLINE_EXCEEDED"
        # the flush ended with its caller's deadline: the next one is not told that one is in progress
        again = (await door.client.call("FlushCache", {"timeout_s": 0.1})).message
        assert again == {"message": TIMED_OUT_WAITING}


@scenario
async def test_a_second_flush_is_refused_at_once(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path) as door, running_stream(door), grpc_client(door.address, tmp_path) as other:
        waiting = asyncio.create_task(other.call("FlushCache", {"timeout_s": 20}))

        async def is_pending() -> bool:
            return bool((await door.server.core.controller.status()).get("pending_flush"))

        await until(is_pending, "the first flush waits")
        second = (await door.client.call("FlushCache", {"timeout_s": 20})).message
        assert second == {"message": ALREADY_IN_PROGRESS}
        await door.client.call("Abort", {"request_id": "long-one"})
        assert (await waiting).message == {"success": True}


@scenario
async def test_a_timeout_that_is_none_is_an_invalid_argument(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path) as door:
        for timeout_s in ("NaN", "Infinity", "-Infinity", -1, -1e-9, 1e9):
            reply = await door.client.call("FlushCache", {"timeout_s": timeout_s})
            assert reply.code == "INVALID_ARGUMENT", timeout_s
            assert "timeout_s" in reply.details

        async def all_noted() -> bool:
            entries = (await door.server.core.controller.audit(100, None))["entries"]
            return sum(entry["caller"] == "grpc:FlushCache" for entry in entries) == 6

        await until(all_noted, "the audit log shows them")
        assert (await door.client.call("FlushCache", {"timeout_s": 1})).message == {"success": True}


BAD: list[tuple[dict[str, Any], str]] = [
    ({}, "tokenized.input_ids"),
    ({"tokenized": {"original_text": "words"}}, "tokenized.input_ids"),
    ({"tokenized": {"input_ids": [1, 4_000_000_000]}}, "input_ids"),
    ({"tokenized": {"input_ids": [1, 1_000_000]}}, "input_ids"),
    ({"tokenized": {"input_ids": [1]}, "sampling_params": {"temperature": "NaN"}}, "sampling_params.temperature"),
    ({"tokenized": {"input_ids": [1]}, "sampling_params": {"temperature": -1}}, "sampling_params.temperature"),
    ({"tokenized": {"input_ids": [1]}, "sampling_params": {"top_p": 2}}, "sampling_params.top_p"),
    ({"tokenized": {"input_ids": [1]}, "sampling_params": {"regex": "a("}}, "regex"),
    ({"tokenized": {"input_ids": [1]}, "sampling_params": {"max_new_tokens": 1_000_000}}, "max_new_tokens"),
    ({"tokenized": {"input_ids": [1]}, "request_id": "a#1"}, "rid"),
    ({"tokenized": {"input_ids": [1]}, "mm_inputs": {"image_urls": ["x"]}}, "mm_inputs"),
    ({"tokenized": {"input_ids": [1]}, "lora_id": "x"}, "lora_id"),
    ({"tokenized": {"input_ids": list(range(5)) * 1000}}, "prompt"),
]


@scenario
async def test_bad_requests_are_invalid_arguments(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path) as door:
        for request, named in BAD:
            reply = await door.client.call("Generate", request)
            assert reply.code == "INVALID_ARGUMENT", request
            assert named in reply.details
        assert (await door.client.call("Abort", {})).code == "INVALID_ARGUMENT"
        assert (await door.client.call("GetLoads", {"include": ["everything"]})).code == "INVALID_ARGUMENT"
        # proto3 cannot tell an absent number from zero: zero is "off" where it is out of range
        assert len(await door.generate([1, 2], sampling_params={"top_p": 0, "top_k": 0, "repetition_penalty": 0})) == 1


@scenario
async def test_what_is_not_offered_says_so(demo: Demo, tmp_path: Path) -> None:
    assert set(RPCS) > OFFERED
    async with grpc_door(demo, tmp_path) as door:
        for rpc in sorted(set(RPCS) - OFFERED):
            reply = await door.client.call(rpc)
            assert reply.code == "UNIMPLEMENTED", rpc
            assert rpc in reply.details


@scenario
async def test_a_caller_that_hangs_up_frees_its_pages(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path) as door:
        cut = await door.client.call("Generate", LONG, cancel_after=2)
        assert cut.code == "CANCELLED"
        await door.server.idle()
        late = await door.client.call("Generate", LONG, timeout_s=0.3)
        assert late.code == "DEADLINE_EXCEEDED"
        await door.server.idle()


@scenario
async def test_an_abort_ends_a_stream_of_another_client(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path) as door, grpc_client(door.address, tmp_path) as other:
        calling = asyncio.create_task(other.call("Generate", LONG | {"request_id": "r-1"}))
        await until(lambda: not door.server.ranks[0].is_idle, "the rank runs it")
        assert (await door.client.call("Abort", {"request_id": "r-1", "reason": "test"})).message["success"] is True
        reply = await calling
        assert reply.code == "OK"
        assert reply.messages[-1]["complete"]["finish_reason"] == "abort"
        await door.server.idle()


@scenario
async def test_keys_are_asked_for(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path, Keys(api_key="user", admin_key="admin")) as door:
        assert (await door.client.call("HealthCheck")).message["healthy"] is True
        for rpc in ("GetModelInfo", "GetServerInfo", "GetLoads", "Generate", "GetTokenizer", "Abort", "FlushCache"):
            assert (await door.client.call(rpc)).code == "UNAUTHENTICATED", rpc
        for rpc in ("FlushCache", "Abort"):
            assert (await door.client.call(rpc, {}, key="user")).code == "PERMISSION_DENIED", rpc
        ended = await door.client.call("Abort", {"request_id": "nobody"}, key="admin")
        assert ended.code == "OK"
        assert (await door.client.call("FlushCache", {"timeout_s": 1}, key="admin")).message == {"success": True}
        assert (await door.client.call("GetModelInfo", key="user")).message["served_model_name"] == "tiny"
        told = [await door.client.call(rpc, key="user") for rpc in ("GetModelInfo", "GetServerInfo", "GetLoads")]
        assert "admin" not in str(told).replace("administration", "")


@scenario
async def test_admin_calls_are_closed_beyond_loopback_without_a_key(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path, Keys(host="0.0.0.0")) as door:
        assert (await door.client.call("FlushCache")).code == "PERMISSION_DENIED"


@scenario
async def test_the_tokenizer_travels_whole(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path) as door:
        reply = await door.client.call("GetTokenizer")
        archive = b"".join(base64.b64decode(one["data"]) for one in reply.messages)
        assert [one.get("sha256", "") for one in reply.messages[:-1]] == [""] * (len(reply.messages) - 1)
        assert reply.messages[-1]["sha256"] == hashlib.sha256(archive).hexdigest()
        with zipfile.ZipFile(io.BytesIO(archive)) as files:
            names = set(files.namelist())
            assert {"tokenizer.json", "tokenizer_config.json", "config.json"} <= names
            assert not any(name.endswith(".safetensors") for name in names)
            assert files.read("tokenizer.json") == (demo.directory / "tokenizer.json").read_bytes()


@scenario
async def test_a_taken_port_is_a_clear_error(demo: Demo, tmp_path: Path) -> None:
    async with grpc_door(demo, tmp_path) as door:
        service = GrpcService(door.server.core, Keys(), "0.test", 3600.0)
        second = GrpcServer(service, max_message_bytes=1 << 20)
        port = int(door.address.rpartition(":")[2])
        with pytest.raises(ConfigError, match=r"gRPC cannot listen on 127\.0\.0\.1:.*grpc\.port"):
            await second.start("127.0.0.1", port)
        await second.stop(0)


@scenario
async def test_replicas_of_a_node_share_a_port_when_told_to(demo: Demo, tmp_path: Path) -> None:
    async with serving(demo) as server:
        service = GrpcService(server.core, Keys(), "0.test", 3600.0)
        first, second = (GrpcServer(service, max_message_bytes=1 << 20, is_shared=True) for _ in range(2))
        try:
            port = await first.start("127.0.0.1", 0)
            assert await second.start("127.0.0.1", port) == port
            await first.stop(0)
            async with grpc_client(f"127.0.0.1:{port}", tmp_path) as client:
                assert (await client.call("HealthCheck")).message["healthy"] is True
        finally:
            await first.stop(0)
            await second.stop(0)


def test_an_unexpected_error_tells_nothing_of_the_server() -> None:
    code, text = status_of(RuntimeError("/secret/path in pid 4711"))
    assert code.name == "INTERNAL"
    assert "secret" not in text
    assert "4711" not in text


@scenario
async def test_the_tokenizer_is_packed_once_and_in_a_thread(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[int] = []

    def noting(directory: Path) -> tuple[bytes, str]:
        threads.append(threading.get_ident())
        return tokenizer_archive(directory)

    tokenizer_archive.cache_clear()
    monkeypatch.setattr(grpc_service, "tokenizer_archive", noting)
    async with grpc_door(demo, tmp_path) as door:
        first, second = [await door.client.call("GetTokenizer") for _ in range(2)]
    assert first.messages == second.messages
    assert tokenizer_archive.cache_info().misses == 1
    assert len(threads) == 2
    assert threading.get_ident() not in threads
