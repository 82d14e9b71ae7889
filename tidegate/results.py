"""What the Python client answers: frozen values, each with the server's own object in `raw`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from actors.flush_run import is_good_verdict
from deployments.flush_surfaces import is_success

Json = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class VerdictRow:
    """What one rank, or one node's host tier, answered about one flush."""

    #: "rank 0", "host tier of <node>"
    name: str
    #: flushed, fenced, joined, gone, expired; else why not: timed_out, refused, busy, unreachable, ...
    status: str
    message: str
    #: a flush of this mode can succeed with this status
    is_good: bool
    incarnation: str
    epoch: int
    waited_ms: float
    freed_pages: int
    freed_bytes: int
    #: what kept it from flushing, counted by kind (running, waiting_with_pages, copies, ...)
    blockers: Mapping[str, int]
    raw: Json = field(repr=False)


@dataclass(frozen=True, slots=True)
class FlushResult:
    """The verdict of one flush over all ranks and tiers."""

    flush_id: str
    #: every rank and tier did what the mode asks, by the controller's word and by each row's
    success: bool
    #: flushed; else pending, timed_out, refused, busy, unreachable, superseded, cancelled, no_ranks, unavailable, ...
    status: str
    message: str
    epoch: int
    mode: str
    dry_run: bool
    #: the invalidation is irrevocable: who has not answered drops its old KV when it comes back
    floor_raised: bool
    superseded_by: str | None
    #: the answer of an earlier call with the same flush_id
    replayed: bool
    took_ms: float
    ranks: tuple[VerdictRow, ...]
    host_tiers: tuple[VerdictRow, ...]
    raw: Json = field(repr=False)

    @classmethod
    def of(cls, answer: Json) -> FlushResult:
        mode = str(answer.get("mode") or "")
        return cls(
            flush_id=str(answer.get("flush_id") or ""),
            success=is_success(answer),
            status=str(answer.get("status") or ""),
            message=str(answer.get("message") or ""),
            epoch=int(answer.get("epoch") or 0),
            mode=mode,
            dry_run=answer.get("dry_run") is True,
            floor_raised=answer.get("floor_raised") is True,
            superseded_by=answer.get("superseded_by"),
            replayed=answer.get("replayed") is True,
            took_ms=float(answer.get("took_ms") or 0.0),
            ranks=tuple(_row(f"rank {row.get('rank')}", row, mode) for row in answer.get("ranks") or ()),
            host_tiers=tuple(
                _row(f"host tier of {row.get('node')}", row, mode) for row in answer.get("host_tiers") or ()
            ),
            raw=answer,
        )


@dataclass(frozen=True, slots=True)
class CacheState:
    """Epoch, floor and the pages of every rank. `success` only if every known rank answered."""

    success: bool
    message: str
    epoch: int
    #: KV older than this epoch is served by nobody
    floor: int
    #: the flush that is under way, if one is
    pending_flush: Json | None
    #: per rank: rank, incarnation, status, epoch, num_pages, num_free_pages, num_cached_pages, ...
    ranks: tuple[Json, ...]
    raw: Json = field(repr=False)

    @classmethod
    def of(cls, answer: Json) -> CacheState:
        return cls(
            success=answer.get("success") is True,
            message=str(answer.get("message") or ""),
            epoch=int(answer.get("epoch") or 0),
            floor=int(answer.get("floor") or 0),
            pending_flush=answer.get("pending_flush"),
            ranks=tuple(answer.get("ranks") or ()),
            raw=answer,
        )


@dataclass(frozen=True, slots=True)
class ServerStatus:
    """What is served and by whom. `success` only if there are ranks and each of them serves."""

    success: bool
    model: str | None
    version: str | None
    weight_version: str | None
    context_length: int | None
    epoch: int | None
    ranks: tuple[Json, ...]
    raw: Json = field(repr=False)

    @classmethod
    def of(cls, info: Json, loads: Json) -> ServerStatus:
        """info: of /server_info. loads: of /v1/loads."""
        rows: tuple[Json, ...] = tuple(loads.get("loads") or ())
        return cls(
            success=bool(rows) and all(row.get("status") == "serving" for row in rows),
            model=info.get("served_model_name"),
            version=info.get("version"),
            weight_version=info.get("weight_version"),
            context_length=info.get("context_length"),
            epoch=loads.get("epoch"),
            ranks=rows,
            raw={"info": info, "loads": loads},
        )


@dataclass(frozen=True, slots=True)
class AbortResult:
    """How many requests an abort ended. 0 is no fault: a request that has ended needs no abort."""

    num_aborted: int
    message: str
    raw: Json = field(repr=False)

    @classmethod
    def of(cls, answer: Json) -> AbortResult:
        return cls(int(answer.get("num_aborted") or 0), str(answer.get("message") or ""), answer)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """One control call: what, when (ISO 8601), by whom; `raw` has its arguments and what came of it."""

    call: str
    at: str
    caller: str
    raw: Json = field(repr=False)

    @classmethod
    def of(cls, entry: Json) -> AuditEntry:
        return cls(str(entry.get("call")), str(entry.get("at")), str(entry.get("caller") or ""), entry)


@dataclass(frozen=True, slots=True)
class ProfileResult:
    """A profile that has begun or ended, or what there is of profiles."""

    profile_id: str
    message: str
    #: per rank: rank, incarnation, node, status, message; after a stop also traces: name, bytes, stage, num_steps
    ranks: tuple[Json, ...]
    raw: Json = field(repr=False)

    @classmethod
    def of(cls, answer: Json) -> ProfileResult:
        return cls(str(answer.get("profile_id") or ""), str(answer.get("message") or ""), _rows(answer), answer)


@dataclass(frozen=True, slots=True)
class TraceList:
    """Traces of all nodes, newest first, and what is being recorded."""

    #: rank -> id of the profile under way there
    running: Mapping[str, str]
    #: name, bytes, modified_s (seconds since 1970), node, incarnation
    traces: tuple[Json, ...]
    raw: Json = field(repr=False)

    @classmethod
    def of(cls, answer: Json) -> TraceList:
        return cls(dict(answer.get("running") or {}), tuple(answer.get("traces") or ()), answer)


@dataclass(frozen=True, slots=True)
class Generation:
    """One sequence of /generate, whole, or as far as a stream has come (then `finish_reason` is None)."""

    text: str
    token_ids: tuple[int, ...]
    #: stop, length, abort
    finish_reason: str | None
    #: the stop string or token id that ended it
    matched: str | int | None
    request_id: str
    prompt_tokens: int
    completion_tokens: int
    #: of the prompt, taken from the cache
    cached_tokens: int
    #: epoch of the oldest KV that was reused; None if none was
    kv_epoch: int | None
    weight_version: str | None
    rank: int | None
    raw: Json = field(repr=False)

    @classmethod
    def of(cls, answer: Json) -> Generation:
        meta = answer["meta_info"]
        finish = meta.get("finish_reason") or {}
        return cls(
            text=answer.get("text") or "",
            token_ids=tuple(answer.get("output_ids") or ()),
            finish_reason=finish.get("type"),
            matched=finish.get("matched"),
            request_id=meta["id"],
            prompt_tokens=meta["prompt_tokens"],
            completion_tokens=meta["completion_tokens"],
            cached_tokens=meta["cached_tokens"],
            kv_epoch=meta.get("kv_epoch"),
            weight_version=meta.get("weight_version"),
            rank=meta.get("dp_rank"),
            raw=answer,
        )


@dataclass(frozen=True, slots=True)
class ChatAnswer:
    """The first choice of one chat completion; further choices are in `raw`."""

    content: str
    finish_reason: str | None
    request_id: str
    model: str
    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    raw: Json = field(repr=False)

    @classmethod
    def of(cls, answer: Json) -> ChatAnswer:
        choice, usage = answer["choices"][0], answer.get("usage") or {}
        return cls(
            content=choice["message"].get("content") or "",
            finish_reason=choice.get("finish_reason"),
            request_id=answer["id"],
            model=answer["model"],
            prompt_tokens=usage.get("prompt_tokens", 0),
            completion_tokens=usage.get("completion_tokens", 0),
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0),
            raw=answer,
        )


def _rows(answer: Json) -> tuple[Json, ...]:
    return tuple(answer.get("ranks") or ())


def _row(name: str, row: Json, mode: str) -> VerdictRow:
    return VerdictRow(
        name=name,
        status=str(row.get("status")),
        message=str(row.get("message") or ""),
        is_good=is_good_verdict(row.get("status"), mode),
        incarnation=str(row.get("incarnation") or ""),
        epoch=int(row.get("epoch") or 0),
        waited_ms=float(row.get("waited_ms") or 0.0),
        freed_pages=int(row.get("freed_pages") or 0),
        freed_bytes=int(row.get("freed_bytes") or 0),
        blockers={kind: number for kind, number in (row.get("blockers") or {}).items() if number},
        raw=row,
    )
