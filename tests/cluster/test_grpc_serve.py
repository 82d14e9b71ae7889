"""gRPC through Serve's own proxy: the same answers and statuses as from our own server."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from smg_grpc_proto.generated import common_pb2, sglang_scheduler_pb2, sglang_scheduler_pb2_grpc

from tests.cluster.server import Server, serving

ADMIN = (("authorization", "Bearer admin-key-1"),)


@pytest.fixture(scope="module")
def behind_proxy(tiny_model: Path, short_home: Path) -> Iterator[Server]:
    home = short_home / "proxy"
    home.mkdir()
    keys = ("--admin-key", "admin-key-1")
    with serving(home, "--model", str(tiny_model), "--dp", "1", "--set", "grpc.server=serve", *keys) as running:
        yield running


@pytest.fixture
def stub(behind_proxy: Server) -> Iterator[Any]:
    with grpc.insecure_channel(f"127.0.0.1:{behind_proxy.grpc_port}") as channel:
        yield sglang_scheduler_pb2_grpc.SglangSchedulerStub(channel)


def _status(call: Any) -> tuple[str, str]:
    with pytest.raises(grpc.RpcError) as refused:
        list(call) if hasattr(call, "__next__") else call()
    error: Any = refused.value
    return error.code().name, error.details()


def test_tokens_health_and_flush(stub: Any) -> None:
    assert stub.HealthCheck(sglang_scheduler_pb2.HealthCheckRequest(), timeout=20).healthy
    assert stub.GetModelInfo(sglang_scheduler_pb2.GetModelInfoRequest(), timeout=20).vocab_size > 0
    request = sglang_scheduler_pb2.GenerateRequest(request_id="one", stream=True)
    request.tokenized.input_ids.extend([5, 6, 7])
    request.sampling_params.max_new_tokens = 4
    request.sampling_params.ignore_eos = True
    *chunks, last = stub.Generate(request, timeout=20)
    tokens = [token for message in chunks for token in message.chunk.token_ids]
    assert list(last.complete.output_ids) == tokens
    assert len(tokens) == 4
    assert stub.FlushCache(common_pb2.FlushCacheRequest(timeout_s=10), timeout=20, metadata=ADMIN).success


def test_refusals_are_a_status_without_a_traceback(stub: Any) -> None:
    flush = common_pb2.FlushCacheRequest(timeout_s=float("nan"))
    said = [
        _status(lambda: stub.FlushCache(common_pb2.FlushCacheRequest(), timeout=20)),
        _status(lambda: stub.FlushCache(flush, timeout=20, metadata=ADMIN)),
        _status(lambda: stub.Embed(sglang_scheduler_pb2.EmbedRequest(), timeout=20)),
        _status(stub.SubscribeKvEvents(common_pb2.SubscribeKvEventsRequest(), timeout=20)),
        _status(stub.Generate(sglang_scheduler_pb2.GenerateRequest(), timeout=20)),
    ]
    assert [code for code, _ in said] == [
        "UNAUTHENTICATED", "INVALID_ARGUMENT", "UNIMPLEMENTED", "UNIMPLEMENTED", "INVALID_ARGUMENT",
    ]  # fmt: skip
    for _, text in said:
        assert text
        assert not any(word in text for word in ("Traceback", "pid", "/", "ray::"))
