"""Parts of the controller's plain answers about all ranks. Pure."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from actors.flush_request import text
from actors.messages import RankRecord
from actors.ray_errors import Answered
from actors.roster import RankAnswer, Roster
from configs.errors import InvalidField


def request_ids_of(request_id: object, everything: bool) -> list[str] | None:
    """The ids to abort; None: all. Raises InvalidField unless exactly one of the two was asked for."""
    if everything == (request_id is not None):
        raise InvalidField("give either request_id or all=true", "request_id")
    if everything:
        return None
    ids = request_id if isinstance(request_id, list | tuple) else [request_id]
    return [text(one, "request_id") for one in ids]


def all_answered(answers: list[RankAnswer], expired: Collection[str] = ()) -> dict[str, Any]:
    """Head of an answer about all ranks. expired: nodes out of lease, whose ranks are not waited for."""
    silent = [answer.record.rank for answer in answers if not _has_answered(answer)]
    due = [answer.record.rank for answer in answers if not _has_answered(answer) and not _is_on(answer, expired)]
    if not answers:
        return {"success": False, "status": "no_ranks", "message": "no rank is registered", "http_status": 503}
    if due or len(silent) == len(answers):
        message = f"no answer from rank {', '.join(map(str, silent))}"
        return {"success": False, "status": "unreachable", "message": message, "http_status": 503}
    return {"success": True, "status": "ok", "message": "", "http_status": 200}


def _has_answered(answer: RankAnswer) -> bool:
    return isinstance(answer.outcome, Answered)


def _is_on(answer: RankAnswer, node_ids: Collection[str]) -> bool:
    return answer.record.node_id in node_ids


def rank_row(answer: RankAnswer, roster: Roster, expired: Collection[str] = ()) -> dict[str, Any]:
    """What a rank said of itself, under what the controller knows of it. expired: nodes out of lease."""
    record = answer.record
    said = dict(answer.outcome.value or {}) if isinstance(answer.outcome, Answered) else {}
    is_known = roster.book.record(record.incarnation) is not None
    state = roster.book.state(record.incarnation) if is_known else "gone"
    if isinstance(answer.outcome, Answered):
        about = {"status": state, "message": ""}
    else:
        silent = "expired" if _is_on(answer, expired) else "unreachable"
        about = {"status": "gone" if state == "gone" else silent, "message": answer.outcome.message}
    known = {"rank": record.rank, "incarnation": record.incarnation, "node": record.node_id, "pid": record.pid}
    return said | known | about


def static_facts(record: RankRecord) -> dict[str, Any]:
    """What does not change while the rank lives. Nothing secret."""
    return {
        "rank": record.rank,
        "incarnation": record.incarnation,
        "node": record.node_id,
        "gpu_ids": list(record.gpu_ids),
        "actor_name": record.actor_name,
        "layout_digest": record.layout_digest,
        "weights_digest": record.weights_digest,
        "weight_version": record.weight_version,
        "page_size": record.page_size,
        "num_pages": record.num_pages,
        "bytes_per_page": record.bytes_per_page,
        "max_running": record.max_running,
        "max_len": record.max_len,
    }
