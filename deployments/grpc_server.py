"""The gRPC door of a local start: a grpc.aio server inside the Api replica, on loopback.

Against Serve's gRPC proxy it saves a hop per token, sees the caller's deadline, and listens on one address only.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from types import SimpleNamespace
from typing import Any

import grpc
import grpc.aio
from google.protobuf.message import Message

from configs.errors import ConfigError
from deployments.grpc_service import GrpcService, status_of
from deployments.protos import RPCS, add_SglangSchedulerServicer_to_server

log = logging.getLogger(__name__)


class GrpcServer:
    """Lives on the event loop of `start`."""

    def __init__(self, service: GrpcService, *, max_message_bytes: int, is_shared: bool = False) -> None:
        """is_shared: several Api replicas of a node listen on the same port; the kernel deals out the connections."""
        options = [
            ("grpc.so_reuseport", int(is_shared)),
            ("grpc.max_receive_message_length", max_message_bytes),
        ]
        self._server = grpc.aio.server(options=options)
        servicer = SimpleNamespace(**{name: _handler(service, name, is_stream) for name, is_stream in RPCS.items()})
        add_SglangSchedulerServicer_to_server(servicer, self._server)

    async def start(self, host: str, port: int) -> int:
        """Listen; returns the port, chosen by the kernel for 0. Raises ConfigError when it cannot be listened on."""
        address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        try:
            bound = self._server.add_insecure_port(address)
        except RuntimeError:
            raise ConfigError(f"gRPC cannot listen on {address}: is it taken? (configs: grpc.port)") from None
        await self._server.start()
        return bound

    async def stop(self, grace_s: float) -> None:
        """Refuse new calls, and end those that still run after `grace_s`."""
        await self._server.stop(grace_s)


class _Call:
    """`grpc_service.Call` of a grpc.aio context."""

    def __init__(self, context: grpc.aio.ServicerContext[Any, Any]) -> None:
        self._context = context

    @property
    def metadata(self) -> Mapping[str, str]:
        pairs = self._context.invocation_metadata() or ()
        return {key: value for key, value in pairs if isinstance(value, str)}

    def time_remaining_s(self) -> float | None:
        return self._context.time_remaining()


def _handler(service: GrpcService, name: str, is_stream: bool) -> Any:
    async def unary(request: Message, context: grpc.aio.ServicerContext[Any, Any]) -> Message:
        try:
            return await service.unary(name, request, _Call(context))
        except Exception as error:  # the edge of the process: the caller gets a sentence, the log the rest
            return await _abort(context, name, error)

    async def stream(request: Message, context: grpc.aio.ServicerContext[Any, Any]) -> AsyncGenerator[Message, None]:
        messages = service.stream(name, request, _Call(context))
        try:
            async for message in messages:
                yield message
        except Exception as error:  # as above
            await _abort(context, name, error)
        finally:
            # A caller that has gone cancels this generator; its request must not wait for the garbage collector.
            await messages.aclose()

    return stream if is_stream else unary


async def _abort(context: grpc.aio.ServicerContext[Any, Any], name: str, error: Exception) -> Any:
    code, text = status_of(error)
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        log.error("%s failed", name, exc_info=error)
    await context.abort(code, text)
