"""`from tidegate import Client`: calls of one server that block until they are answered."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
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
from tidegate.transports import ActorTransport, HttpTransport

#: a generation is given up after this; streams are not, they say that they live
GENERATION_S = 600.0


class Client:
    """Calls of one server, over HTTP or through the controller's Ray actor.

    Every call returns a typed value whose `raw` is the server's own object, or raises one error of configs/errors.py:
    InvalidField and its kin for what was asked, Overloaded, NoRank, RankLost, ControlUnavailable for what the server
    cannot do now, Unreachable when nobody answers, FlushFailed for a flush that did not flush. May be shared by
    threads. Close it, or use it as a context manager.
    """

    def __init__(
        self, server: str | Any, key: str | None = None, *, transport: httpx.BaseTransport | None = None
    ) -> None:
        """server: address of the HTTP door, e.g. http://127.0.0.1:8000, or the actor handle
        `ray.get_actor("controller", namespace="tidegate")`, which takes control calls only.
        key: sent as bearer; control routes want the admin key. transport: another way to the server, for tests.
        """
        self._transport: HttpTransport | ActorTransport
        if isinstance(server, str):
            self._transport = HttpTransport(server, key, transport)
        else:
            self._transport = ActorTransport(server)

    def flush(
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
        """Flush every rank and tier; see ControllerActor.flush for the arguments. Waits for the answer.

        Raises FlushFailed, with the rows, unless every rank and tier did; check=False returns that result instead.
        """
        return self._transport.run(calls.flush(timeout_s, mode, tiers, scope, flush_id, dry_run, check))

    def flush_status(self, flush_id: str) -> FlushResult:
        """The answer of an earlier flush (`status` pending while it runs). Raises UnknownResource."""
        return self._transport.run(calls.flush_status(flush_id))

    def cancel_flush(self, flush_id: str) -> FlushResult:
        """End a flush that has not begun; its answer. Raises Conflict if it cannot be ended, UnknownResource."""
        return self._transport.run(calls.cancel_flush(flush_id))

    def cache(self) -> CacheState:
        """Epoch, floor, pending flush, and the pages of every rank. A silent rank is a row, not an exception."""
        return self._transport.run(calls.cache())

    def status(self) -> ServerStatus:
        """What is served and by whom. Only over HTTP."""
        return self._transport.run(calls.status())

    def audit(self, limit: int = 100, flush_id: str | None = None) -> tuple[AuditEntry, ...]:
        """The newest flushes and control calls, refused ones too, newest first."""
        return self._transport.run(calls.audit(limit, flush_id))

    def abort(self, request_id: str | None = None, *, all: bool = False) -> AbortResult:
        """End one request by its exact id, or all. Raises ControlUnavailable if a rank did not answer."""
        return self._transport.run(calls.abort(request_id, all))

    def start_profile(self, **options: Any) -> ProfileResult:
        """Record engine steps on every rank, or on none. options: of /start_profile, e.g. num_steps, profile_by_stage,
        output_dir, activities, with_stack. Raises Conflict if a profile is under way."""
        return self._transport.run(calls.start_profile(options))

    def stop_profile(self) -> ProfileResult:
        """End the profile under way and wait for its traces. Raises Conflict if there is none."""
        return self._transport.run(calls.stop_profile())

    def profiles(self) -> TraceList:
        """The traces of all nodes, newest first, and what is being recorded."""
        return self._transport.run(calls.profiles())

    def save_profile(self, name: str, file: Path) -> None:
        """Fetch a trace of `profiles` into `file`, which appears when it is whole. Only over HTTP.

        Raises UnknownResource; OSError if it cannot be written.
        """
        self._transport.save(calls.trace(name), file)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str | None = None,
        namespace: str | None = None,
        rank: int | None = None,
        timeout_s: float = GENERATION_S,
        **sampling: Any,
    ) -> Generation:
        """One sequence after `prompt`, a text or token ids. Only over HTTP.

        sampling: SGLang's `sampling_params`, e.g. max_new_tokens, temperature, sampling_seed, stop, json_schema.
        namespace: prefixes are shared only inside it. rank: only this one.
        """
        body = calls.generate_body(prompt, sampling, rid=request_id, extra_key=namespace, routed_dp_rank=rank)
        return self._transport.run(calls.generate(body, timeout_s))

    def stream_generate(
        self,
        prompt: str | Sequence[int],
        *,
        request_id: str | None = None,
        namespace: str | None = None,
        rank: int | None = None,
        **sampling: Any,
    ) -> Generator[Generation, None, None]:
        """The same in steps: each value holds all there is so far, the last one a `finish_reason`.

        Closing the iterator ends the request. Raises StreamCut if the stream ends before its answer.
        """
        body = calls.generate_body(prompt, sampling, rid=request_id, extra_key=namespace, routed_dp_rank=rank)
        return self._transport.events(calls.stream_generate(body))

    def chat(self, messages: str | Sequence[Json], *, timeout_s: float = GENERATION_S, **options: Any) -> ChatAnswer:
        """One chat completion. messages: OpenAI's list, or the text of one user message. Only over HTTP.

        options: fields of OpenAI's /v1/chat/completions, e.g. max_tokens, temperature, seed, response_format.
        """
        return self._transport.run(calls.chat(calls.chat_body(messages, options), timeout_s))

    def stream_chat(self, messages: str | Sequence[Json], **options: Any) -> Generator[str, None, None]:
        """The text of one chat completion, piece by piece. Closing the iterator ends the request."""
        return self._transport.events(calls.stream_chat(calls.chat_body(messages, options)))

    def close(self) -> None:
        self._transport.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
