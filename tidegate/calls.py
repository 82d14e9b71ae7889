"""What the Python client can ask, as data: the HTTP requests or the controller's method, and how to read the answer.

`Client` and `AsyncClient` differ only in how they wait; everything that is to be known of a call is here.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from urllib.parse import quote, urlencode

from configs.errors import InvalidField
from tidegate.answers import must_succeed
from tidegate.faults import FlushFailed
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

T = TypeVar("T")

#: beyond a control call's own timeout: the server's answer comes by its deadline, however the ranks are
GRACE_S = 15.0
#: ranks import torch's profiler the first time, and write what may be hundreds of MB
PROFILE_START_S, PROFILE_STOP_S = 130.0, 310.0


@dataclass(frozen=True, slots=True)
class Ask:
    """One HTTP request."""

    method: str
    path: str
    body: Json | None = None
    #: a refusal that has this field is an answer to read, not an error to raise
    answers_with: str = "-"


@dataclass(frozen=True, slots=True)
class Call(Generic[T]):
    """One call: over HTTP, or to the controller where it has a method for it."""

    asks: tuple[Ask, ...]
    #: seconds until it is given up
    timeout_s: float
    #: takes one answer per request
    read: Callable[..., T]
    #: name and keyword arguments of the controller's method
    method: tuple[str, Json] | None = None


@dataclass(frozen=True, slots=True)
class Streamed(Generic[T]):
    """One call whose answer comes in events. `read` answers None for an event that shows nothing."""

    ask: Ask
    read: Callable[[Json], T | None]


def flush(
    timeout_s: float,
    mode: str,
    tiers: Sequence[str] | None,
    scope: Json | None,
    flush_id: str | None,
    dry_run: bool,
    check: bool,
) -> Call[FlushResult]:
    if not 0 <= timeout_s < float("inf"):
        raise InvalidField(f"timeout_s must be a number of seconds and not below 0, got {timeout_s}", "timeout_s")
    body = {"timeout_s": timeout_s, "mode": mode, "tiers": None if tiers is None else list(tiers), "scope": scope,
            "flush_id": flush_id, "dry_run": dry_run}  # fmt: skip
    given = _given(body)

    def read(answer: Json) -> FlushResult:
        result = FlushResult.of(answer)
        if check and not result.success:
            raise FlushFailed.of(result)
        return result

    ask = Ask("POST", "/v1/cache/flush", given, "ranks")
    return Call((ask,), timeout_s + GRACE_S, read, ("flush", given | {"caller": "python client"}))


def flush_status(flush_id: str) -> Call[FlushResult]:
    ask = Ask("GET", _one_flush(flush_id), answers_with="flush_id")
    return Call((ask,), GRACE_S, FlushResult.of, ("flush_status", {"flush_id": flush_id}))


def cancel_flush(flush_id: str) -> Call[FlushResult]:
    def read(answer: Json) -> FlushResult:
        return FlushResult.of(must_succeed(answer)["flush"])

    arguments = {"flush_id": flush_id, "caller": "python client"}
    return Call((Ask("DELETE", _one_flush(flush_id)),), GRACE_S, read, ("cancel_flush", arguments))


def cache() -> Call[CacheState]:
    return Call((Ask("GET", "/v1/cache", answers_with="ranks"),), GRACE_S, CacheState.of, ("status", {}))


def status() -> Call[ServerStatus]:
    loads = Ask("GET", "/v1/loads?include=all", answers_with="loads")
    return Call((Ask("GET", "/server_info"), loads), GRACE_S, ServerStatus.of)


def audit(limit: int, flush_id: str | None) -> Call[tuple[AuditEntry, ...]]:
    def read(answer: Json) -> tuple[AuditEntry, ...]:
        return tuple(map(AuditEntry.of, must_succeed(answer)["entries"]))

    given = _given({"limit": limit, "flush_id": flush_id})
    return Call((Ask("GET", "/v1/cache/audit?" + urlencode(given)),), GRACE_S, read, ("audit", given))


def abort(request_id: str | None, everything: bool) -> Call[AbortResult]:
    if everything == (request_id is not None):
        raise InvalidField("give either request_id or all=True", "request_id")
    body = {"abort_all": True} if everything else {"rid": request_id}
    method = ("abort", {"request_id": request_id, "all": everything, "caller": "python client"})
    return Call(
        (Ask("POST", "/abort_request", body),), GRACE_S, lambda answer: AbortResult.of(must_succeed(answer)), method
    )


def start_profile(options: Json) -> Call[ProfileResult]:
    given = _given(options)

    def read(answer: Json) -> ProfileResult:
        return ProfileResult.of(must_succeed(answer))

    method = ("start_profile", {"arguments": given, "caller": "python client"})
    return Call((Ask("POST", "/v1/profiles/start", given),), PROFILE_START_S, read, method)


def stop_profile() -> Call[ProfileResult]:
    def read(answer: Json) -> ProfileResult:
        return ProfileResult.of(must_succeed(answer))

    method = ("stop_profile", {"caller": "python client"})
    return Call((Ask("POST", "/v1/profiles/stop"),), PROFILE_STOP_S, read, method)


def profiles() -> Call[TraceList]:
    def read(answer: Json) -> TraceList:
        return TraceList.of(must_succeed(answer))

    return Call((Ask("GET", "/v1/profiles"),), GRACE_S, read, ("profiles", {}))


def trace(name: str) -> Ask:
    return Ask("GET", f"/v1/profiles/{quote(name)}")


def generate(body: Json, timeout_s: float) -> Call[Generation]:
    return Call((Ask("POST", "/generate", body),), timeout_s, Generation.of)


def stream_generate(body: Json) -> Streamed[Generation]:
    return Streamed(Ask("POST", "/generate", {**body, "stream": True}), Generation.of)


def generate_body(prompt: str | Sequence[int], sampling: Mapping[str, Any], **more: Any) -> dict[str, Any]:
    """Body of /generate for one prompt. sampling: SGLang's `sampling_params`; those that are None are left out."""
    which = {"text": prompt} if isinstance(prompt, str) else {"input_ids": list(prompt)}
    given = _given(sampling)
    if given.get("n", 1) != 1:
        raise InvalidField("sampling_params.n: one call is one sequence here; call again for another", "n")
    return which | {"sampling_params": given} | _given(more)


def chat(body: Json, timeout_s: float) -> Call[ChatAnswer]:
    return Call((Ask("POST", "/v1/chat/completions", body),), timeout_s, ChatAnswer.of)


def stream_chat(body: Json) -> Streamed[str]:
    def read(event: Json) -> str | None:
        choices = event.get("choices") or ()
        return choices[0]["delta"].get("content") or None if choices else None

    return Streamed(Ask("POST", "/v1/chat/completions", {**body, "stream": True}), read)


def chat_body(messages: str | Sequence[Json], options: Json) -> dict[str, Any]:
    """Body of /v1/chat/completions. messages: OpenAI's list, or the text of one user message."""
    turns = [{"role": "user", "content": messages}] if isinstance(messages, str) else list(messages)
    return {"messages": turns} | _given(options)


def _given(fields: Json) -> dict[str, Any]:
    return {name: value for name, value in fields.items() if value is not None}


def _one_flush(flush_id: str) -> str:
    if not flush_id:
        raise InvalidField("flush_id is empty", "flush_id")
    return f"/v1/cache/flush/{quote(flush_id, safe='')}"
