"""The RPCs of SglangScheduler, written once against the messages. `grpc_server` and `grpc_ingress` carry them.

Errors leave as TidegateError; `status_of` is the one table that makes a gRPC status of them, and no status text holds
a traceback, a pid or a path.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Protocol

import grpc
from google.protobuf.message import Message

from actors.flush_request import seconds
from configs.errors import InvalidField, NoRank, NotOffered, ServiceError
from deployments import facts
from deployments.auth import Access, Keys
from deployments.core import ApiCore
from deployments.errors import as_tidegate_error
from deployments.flush_surfaces import judge
from deployments.grpc_generate import body_of, chunk, complete
from deployments.load_rows import LOAD_SECTIONS, loads_of
from deployments.native_jobs import native_jobs
from deployments.protos import RPCS, common, scheduler
from deployments.sequences import Answer, collected
from deployments.tokenizer_archive import tokenizer_archive

log = logging.getLogger(__name__)

#: left of the caller's deadline for the answer to travel back
_WAY_BACK_S = 0.05
_TOKENIZER_CHUNK_BYTES = 64 * 1024


class DeadlinePassed(ServiceError):
    """The caller's own deadline came before the answer."""

    http_status = 504
    grpc_status = "DEADLINE_EXCEEDED"
    kind = "deadline_exceeded"
    retryable = True


class Call(Protocol):
    """What a handler may know of one call."""

    @property
    def metadata(self) -> Mapping[str, str]:
        """Names in lower case, binary values left out."""
        ...

    def time_remaining_s(self) -> float | None:
        """Until the caller's deadline; None if it set none, or if this server cannot know."""
        ...


def status_of(error: Exception) -> tuple[grpc.StatusCode, str]:
    """The status code and text that a caller is told."""
    told = as_tidegate_error(error)
    return grpc.StatusCode[told.grpc_status], told.message


Unary = Callable[[Any, Call], Awaitable[Message]]
Streaming = Callable[[Any, Call], AsyncGenerator[Message, None]]


@dataclass(frozen=True, slots=True)
class GrpcService:
    """One Api replica's gRPC side."""

    core: ApiCore
    keys: Keys
    #: of this software
    version: str
    #: largest `timeout_s` of a flush
    max_timeout_s: float

    async def unary(self, name: str, request: Message, call: Call) -> Message:
        """Answer one unary RPC. Raises a TidegateError; NotOffered for RPCs that this server does not have."""
        handlers: dict[str, tuple[Access, Unary]] = {
            "HealthCheck": ("open", self.health_check),
            "GetModelInfo": ("inference", self.get_model_info),
            "GetServerInfo": ("inference", self.get_server_info),
            "GetLoads": ("inference", self.get_loads),
            # as /abort_request: it ends requests of other clients
            "Abort": ("admin", self.abort),
            "FlushCache": ("admin", self.flush_cache),
            "StartProfile": ("admin", self.start_profile),
            "StopProfile": ("admin", self.stop_profile),
        }
        if name not in handlers:
            raise _not_offered(name)
        access, handler = handlers[name]
        self.keys.check(access, call.metadata)
        return await handler(request, call)

    async def stream(self, name: str, request: Message, call: Call) -> AsyncGenerator[Message, None]:
        """Answer one streaming RPC; as `unary`. Closing the generator ends what it does."""
        handlers: dict[str, Streaming] = {"Generate": self.generate, "GetTokenizer": self.get_tokenizer}
        if name not in handlers:
            raise _not_offered(name)
        self.keys.check("inference", call.metadata)
        async with aclosing(handlers[name](request, call)) as messages:
            async for message in messages:
                yield message

    async def health_check(self, request: scheduler.HealthCheckRequest, call: Call) -> Message:
        """Healthy if some rank takes requests. Costs no work of a rank."""
        num_ranks = len(self.core.fleet.members().members)
        message = f"{num_ranks} ranks serve" if num_ranks else "no rank is serving at the moment"
        return scheduler.HealthCheckResponse(healthy=num_ranks > 0, message=message)

    async def flush_cache(self, request: common.FlushCacheRequest, call: Call) -> Message:
        """Flush every rank, waiting `timeout_s` for an idle instant, at most until the caller's deadline.

        A refusal is an answer (`success: false` with the reason); only bad input, a missing right, a deadline or a
        controller that does not answer are a status.
        """
        controller, caller = self.core.controller, {"caller": "grpc:FlushCache"}
        try:
            asked_s = seconds(request.timeout_s, "timeout_s", self.max_timeout_s)
        except InvalidField as error:
            controller.note_refused("flush", caller | {"timeout_s": request.timeout_s}, error)
            raise
        remaining_s = call.time_remaining_s()
        budget_s = asked_s if remaining_s is None else min(asked_s, max(0.0, remaining_s - _WAY_BACK_S))
        answer = await controller.flush(caller | {"timeout_s": budget_s})
        outcome = judge(answer)
        if budget_s < asked_s and not outcome.success and answer.get("status") in ("timed_out", "refused"):
            raise DeadlinePassed(f"the call's deadline came before the flush: {outcome.message}")
        if outcome.http_status == InvalidField.http_status:
            raise InvalidField(outcome.message, answer.get("param"))
        return common.FlushCacheResponse(success=outcome.success, message=outcome.message)

    async def abort(self, request: scheduler.AbortRequest, call: Call) -> Message:
        """End one request by its exact id, on whatever rank it runs."""
        if not request.request_id:
            raise InvalidField("request_id is empty; name the request to end", "request_id")
        answer = await self.core.abort(request.request_id, "grpc:Abort")
        return scheduler.AbortResponse(success=answer.get("success") is True, message=str(answer.get("message") or ""))

    async def start_profile(self, request: common.StartProfileRequest, call: Call) -> Message:
        """Record steps on every rank, or on none. As of a flush, a refusal is an answer and bad input a status."""
        optional = ("output_dir", "start_step", "num_steps", "with_stack", "record_shapes")
        arguments: dict[str, Any] = {name: getattr(request, name) for name in optional if request.HasField(name)}
        arguments |= {"activities": list(request.activities), "profile_by_stage": request.profile_by_stage}
        return _profiled(await self.core.controller.start_profile(arguments, "grpc:StartProfile"))

    async def stop_profile(self, request: common.StopProfileRequest, call: Call) -> Message:
        """End the profile under way and wait until its traces are written."""
        return _profiled(await self.core.controller.stop_profile("grpc:StopProfile"))

    async def get_model_info(self, request: scheduler.GetModelInfoRequest, call: Call) -> Message:
        card, told = self.core.card, facts.model_info(self.core)
        same = ("model_path", "tokenizer_path", "served_model_name", "is_generation", "weight_version", "model_type",
                "architectures", "vocab_size", "eos_token_ids")  # fmt: skip
        return scheduler.GetModelInfoResponse(
            **{name: told[name] for name in same},
            max_context_length=self.core.max_len,
            max_req_input_len=self.core.max_len - 1,
            pad_token_id=card.pad_token_id or 0,
            bos_token_id=card.bos_token_id or 0,
        )

    async def get_server_info(self, request: scheduler.GetServerInfoRequest, call: Call) -> Message:
        told = await facts.server_info(self.core, self.version)
        response = scheduler.GetServerInfoResponse(
            active_requests=self.core.admission.num_inflight,
            sglang_version=self.version,
            server_type="grpc",
            max_total_num_tokens=told["max_total_num_tokens"],
        )
        ranks, control = told.pop("internal_states"), told.pop("control")
        response.server_args.update(told)
        # through JSON: a Struct takes plain JSON values only
        response.scheduler_info.update(json.loads(json.dumps({"ranks": ranks, "control": control})))
        return response

    async def get_loads(self, request: scheduler.GetLoadsRequest, call: Call) -> Message:
        """What every rank, or the one asked for, has to do now. UNAVAILABLE if one of them does not answer."""
        sections = frozenset(request.include) or frozenset({"core"})
        unknown = sorted(sections - LOAD_SECTIONS - {"all"})
        if unknown:
            raise InvalidField(f"include: there is no section {unknown[0][:40]!r}", "include")
        wanted = str(request.dp_rank) if request.HasField("dp_rank") else None
        shown = LOAD_SECTIONS if "all" in sections else sections | {"core"}
        loads = loads_of(await self.core.controller.status(), shown, wanted)
        if loads.message:
            raise NoRank(loads.message)
        return scheduler.GetLoadsResponse(
            timestamp=datetime.now(UTC).isoformat(),
            version=self.version,
            dp_rank_count=loads.num_ranks,
            loads=[_load(row) for row in loads.rows],
        )

    async def generate(self, request: scheduler.GenerateRequest, call: Call) -> AsyncGenerator[Message, None]:
        """Token ids in, token ids out: new ones as they come when `stream` is set, and each sequence's whole."""
        jobs, request_id = await native_jobs(self.core, body_of(request))
        pieces = self.core.stream(request_id, jobs)
        if not request.stream:
            for index, answer in enumerate(await collected(pieces, len(jobs))):
                yield complete(request_id, index, answer)
            return
        answers = [Answer() for _ in jobs]
        async with aclosing(pieces):
            async for piece in pieces:
                answer = answers[piece.index]
                answer.add(piece)
                if piece.token_ids:
                    yield chunk(request_id, piece, answer)
                if piece.finish is not None:
                    yield complete(request_id, piece.index, answer)

    async def get_tokenizer(self, request: common.GetTokenizerRequest, call: Call) -> AsyncGenerator[Message, None]:
        """The tokenizer's files as one zip, in chunks; the last one carries the digest of the whole."""
        archive, digest = await asyncio.to_thread(tokenizer_archive, self.core.tokenizer.directory)
        for begin in range(0, len(archive), _TOKENIZER_CHUNK_BYTES):
            data = archive[begin : begin + _TOKENIZER_CHUNK_BYTES]
            is_last = begin + len(data) == len(archive)
            yield common.GetTokenizerChunk(data=data, sha256=digest if is_last else "")


def _not_offered(name: str) -> NotOffered:
    known = f"{name} is not offered by this server" if name in RPCS else "there is no such call"
    return NotOffered(known)


def _profiled(answer: Mapping[str, Any]) -> Message:
    if answer.get("http_status") == InvalidField.http_status:
        raise InvalidField(str(answer.get("message")), answer.get("param"))
    return common.ProfileResponse(success=answer.get("success") is True, message=str(answer.get("message") or ""))


def _load(row: Mapping[str, Any]) -> scheduler.SchedulerLoad:
    names = ("dp_rank", "num_running_reqs", "num_waiting_reqs", "num_waiting_uncached_tokens", "num_total_reqs",
             "num_used_tokens", "max_total_num_tokens", "token_usage", "gen_throughput", "cache_hit_rate",
             "utilization", "max_running_requests")  # fmt: skip
    load = scheduler.SchedulerLoad(**{name: row[name] for name in names})
    if "memory" in row:
        load.memory.CopyFrom(scheduler.MemoryMetrics(**row["memory"]))
    if "queues" in row:
        load.queues.CopyFrom(scheduler.QueueMetrics(**row["queues"]))
    return load
