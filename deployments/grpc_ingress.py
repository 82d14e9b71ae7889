"""The gRPC door of a cluster: Serve's proxy calls a method of the ingress class by the RPC's name.

Every RPC of the service is a method here: for one that is missing Serve answers INTERNAL with a traceback, a pid and
an address. Serve's context does not show the caller's deadline; it arrives as a cancellation.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, replace
from typing import Any

import grpc
from google.protobuf.message import Message
from google.protobuf.message_factory import GetMessageClass
from ray.serve.grpc_util import RayServegRPCContext

from deployments.auth import Keys
from deployments.grpc_service import GrpcService, status_of
from deployments.protos import RPCS, SERVICE

log = logging.getLogger(__name__)


class StreamFailed(Exception):
    """Ends a stream for Serve; what the caller is told stands in the call's context."""


class GrpcIngress:
    """Base of the ingress class. Its subclass sets `grpc_service` before the first call."""

    grpc_service: GrpcService


def keys_behind_proxy(keys: Keys) -> Keys:
    """Serve's gRPC proxy listens on every interface whatever `api.host` says: admin RPCs need an admin key there."""
    return replace(keys, host="::")


@dataclass(frozen=True, slots=True)
class _Call:
    """`grpc_service.Call` of Serve's context."""

    context: RayServegRPCContext

    @property
    def metadata(self) -> Mapping[str, str]:
        return {key: value for key, value in self.context.invocation_metadata() if isinstance(value, str)}

    def time_remaining_s(self) -> float | None:
        return None


def _unary(name: str) -> Any:
    empty = GetMessageClass(SERVICE.methods_by_name[name].output_type)

    async def method(self: GrpcIngress, request: Message, grpc_context: RayServegRPCContext) -> Message:
        try:
            return await self.grpc_service.unary(name, request, _Call(grpc_context))
        except Exception as error:  # the edge of the process: the caller gets a sentence, the log the rest
            _set_status(grpc_context, name, error)
            return empty()

    return method


def _stream(name: str) -> Any:
    async def method(
        self: GrpcIngress, request: Message, grpc_context: RayServegRPCContext
    ) -> AsyncGenerator[Message, None]:
        try:
            async with aclosing(self.grpc_service.stream(name, request, _Call(grpc_context))) as messages:
                async for message in messages:
                    yield message
        except Exception as error:  # as above
            _set_status(grpc_context, name, error)
            # A stream that just ends arrives as OK; of what is raised, Serve sends the status that was set.
            raise StreamFailed(name) from None

    return method


def _set_status(context: RayServegRPCContext, name: str, error: Exception) -> None:
    """Put the error's status into the context; an empty answer returned after this arrives as that status alone."""
    code, text = status_of(error)
    if code in (grpc.StatusCode.INTERNAL, grpc.StatusCode.UNKNOWN):
        log.error("%s failed", name, exc_info=error)
    context.set_code(code)
    context.set_details(text)


for _name, _is_stream in RPCS.items():
    setattr(GrpcIngress, _name, _stream(_name) if _is_stream else _unary(_name))
