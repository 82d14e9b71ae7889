"""`from tidegate import AsyncClient`: calls of one server, to be awaited. What each does is told at `Client`."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from tidegate import calls
from tidegate.results import (
    AbortResult,
    AuditEntry,
    CacheState,
    ChatAnswer,
    FlushResult,
    Generation,
    Json,
    ProfileResult,
    ServerStatus,
    TraceList,
)
from tidegate.sync_client import GENERATION_S
from tidegate.transports import AsyncActorTransport, AsyncHttpTransport


class AsyncClient:
    """`Client` for one event loop: the same calls, results and errors. Close it, or use it with `async with`."""

    def __init__(
        self, server: str | Any, key: str | None = None, *, transport: httpx.AsyncBaseTransport | None = None
    ) -> None:
        """See Client. server: address of the HTTP door, or the handle of the controller's actor."""
        self._transport: AsyncHttpTransport | AsyncActorTransport
        if isinstance(server, str):
            self._transport = AsyncHttpTransport(server, key, transport)
        else:
            self._transport = AsyncActorTransport(server)

    async def flush(
        self,
        *,
        timeout_s: float = 0.0,
        mode: str = "wait",
        tiers: Sequence[str] | None = None,
        scope: Mapping[str, Any] | None = None,
        flush_id: str | None = None,
        dry_run: bool = False,
        check: bool = True,
    ) -> FlushResult:
        """See Client.flush."""
        return await self._transport.run(calls.flush(timeout_s, mode, tiers, scope, flush_id, dry_run, check))

    async def flush_status(self, flush_id: str) -> FlushResult:
        """See Client.flush_status."""
        return await self._transport.run(calls.flush_status(flush_id))

    async def cancel_flush(self, flush_id: str) -> FlushResult:
        """See Client.cancel_flush."""
        return await self._transport.run(calls.cancel_flush(flush_id))

    async def cache(self) -> CacheState:
        """See Client.cache."""
        return await self._transport.run(calls.cache())

    async def status(self) -> ServerStatus:
        """See Client.status."""
        return await self._transport.run(calls.status())

    async def audit(self, limit: int = 100, flush_id: str | None = None) -> tuple[AuditEntry, ...]:
        """See Client.audit."""
        return await self._transport.run(calls.audit(limit, flush_id))

    async def abort(self, request_id: str | None = None, *, all: bool = False) -> AbortResult:
        """See Client.abort."""
        return await self._transport.run(calls.abort(request_id, all))

    async def start_profile(self, **options: Any) -> ProfileResult:
        """See Client.start_profile."""
        return await self._transport.run(calls.start_profile(options))

    async def stop_profile(self) -> ProfileResult:
        """See Client.stop_profile."""
        return await self._transport.run(calls.stop_profile())

    async def profiles(self) -> TraceList:
        """See Client.profiles."""
        return await self._transport.run(calls.profiles())

    async def save_profile(self, name: str, file: Path) -> None:
        """See Client.save_profile."""
        await self._transport.save(calls.trace(name), file)

    async def generate(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str | None = None,
        namespace: str | None = None,
        rank: int | None = None,
        timeout_s: float = GENERATION_S,
        **sampling: Any,
    ) -> Generation:
        """See Client.generate."""
        body = calls.generate_body(prompt, sampling, rid=request_id, extra_key=namespace, routed_dp_rank=rank)
        return await self._transport.run(calls.generate(body, timeout_s))

    def stream_generate(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str | None = None,
        namespace: str | None = None,
        rank: int | None = None,
        **sampling: Any,
    ) -> AsyncGenerator[Generation, None]:
        """See Client.stream_generate."""
        body = calls.generate_body(prompt, sampling, rid=request_id, extra_key=namespace, routed_dp_rank=rank)
        return self._transport.events(calls.stream_generate(body))

    async def chat(
        self, messages: str | Sequence[Json], *, timeout_s: float = GENERATION_S, **options: Any
    ) -> ChatAnswer:
        """See Client.chat."""
        return await self._transport.run(calls.chat(calls.chat_body(messages, options), timeout_s))

    def stream_chat(self, messages: str | Sequence[Json], **options: Any) -> AsyncGenerator[str, None]:
        """See Client.stream_chat."""
        return self._transport.events(calls.stream_chat(calls.chat_body(messages, options)))

    async def close(self) -> None:
        await self._transport.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()
