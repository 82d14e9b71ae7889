"""One weight update over all ranks: who owes a vote, who owes a commit, and what they add up to. Pure.

Success is a statement about every rank that was registered: it serves the new weights, or its process is gone, or it
came when the update was decided and admits nothing but the new weights; or the caller excluded it. A rank whose node
is out of lease is no success: it may be serving, uncached, and nobody has heard that it follows (hole H23).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeAlias

from actors.messages import RankRecord
from actors.weight_request import WeightRequest
from engine.weight_update import RankUpdate

#: `voter`: decides with the others.  `excluded`: named by the caller.  `late`: registered when the votes were in and
#: the decision was being stored.  `joined`: registered behind the decision, and was told of it
Role: TypeAlias = Literal["voter", "excluded", "late", "joined"]

#: status of an update that failed -> HTTP code; the first that some rank has names the whole
_FAILURES = {
    "refused": 400,
    "stale": 409,
    "failed": 500,
    "unreachable": 503,
    "timed_out": 504,
    "expired_command": 504,
    "aborted": 409,
}


@dataclass(slots=True)
class _Row:
    """What is known of one incarnation."""

    record: RankRecord
    role: Role
    vote: RankUpdate | None = None
    #: what it said of the commit
    end: RankUpdate | None = None
    is_gone: bool = False
    #: why its call failed; final if no other call can bring more
    failure: str = ""
    is_lost: bool = False
    #: the next call may be made then; infinity: one is under way or nothing is to be asked
    call_at_s: float = -math.inf


class WeightRun:
    """The rows of one update."""

    def __init__(self, request: WeightRequest, started_at: str, started_s: float) -> None:
        self.request = request
        self.started_at = started_at
        #: by the controller's clock
        self.started_s = started_s
        #: log index of the intent; 0 until it is stored
        self.index = 0
        #: digest of the decided weights; "" without a decision
        self.digest = ""
        self._rows: dict[str, _Row] = {}

    # ---------------------------------------------------------------------------------------------------- who is here
    @property
    def is_decided(self) -> bool:
        return self.digest != ""

    @property
    def records(self) -> list[RankRecord]:
        return [row.record for row in self._rows.values()]

    @property
    def living(self) -> list[RankRecord]:
        """Of the incarnations that are not proven gone."""
        return [row.record for row in self._rows.values() if not row.is_gone]

    def incarnations(self, role: Role) -> tuple[str, ...]:
        return tuple(row.record.incarnation for row in self._rows.values() if row.role == role)

    def has(self, incarnation: str) -> bool:
        return incarnation in self._rows

    def expect(self, record: RankRecord, role: Role) -> None:
        """Give this incarnation a row; if it has one, only what it says of itself is renewed, and it is called anew."""
        row = self._rows.get(record.incarnation)
        if row is None:
            self._rows[record.incarnation] = _Row(record, role)
        else:
            row.record, row.is_lost, row.call_at_s = record, False, -math.inf

    def is_excluded(self, record: RankRecord) -> bool:
        return str(record.rank) in self.request.exclude or record.incarnation in self.request.exclude

    # ------------------------------------------------------------------------------------------------- what they said
    def voted(self, incarnation: str, answer: RankUpdate) -> None:
        row = self._rows.get(incarnation)
        if row is not None and row.vote is None and answer.index == self.index:
            row.vote = answer

    def ended(self, incarnation: str, answer: RankUpdate) -> None:
        """What a rank says of the commit; a vote that is repeated says nothing."""
        row = self._rows.get(incarnation)
        if row is not None and row.end is None and answer.index == self.index and answer.status != "prepared":
            row.end = answer

    def failed(self, incarnation: str, message: str, is_final: bool, retry_at_s: float) -> None:
        row = self._rows.get(incarnation)
        if row is not None:
            row.failure, row.is_lost = message, row.is_lost or is_final
            row.call_at_s = math.inf if is_final else retry_at_s

    def gone(self, incarnation: str) -> None:
        """Its process is proven gone, and with it the weights it held."""
        row = self._rows.get(incarnation)
        if row is not None:
            row.is_gone = True

    # ------------------------------------------------------------------------------------------------ who owes what
    @property
    def open_votes(self) -> list[RankRecord]:
        return [row.record for row in self._rows.values() if _owes_vote(row)]

    @property
    def open_ends(self) -> list[RankRecord]:
        return [row.record for row in self._rows.values() if _owes_end(row)]

    def due(self, now_s: float) -> list[RankRecord]:
        """Ranks that owe an answer and may be called now."""
        owes = _owes_end if self.is_decided else _owes_vote
        return [row.record for row in self._rows.values() if owes(row) and not row.is_lost and now_s >= row.call_at_s]

    def called(self, incarnation: str) -> None:
        self._rows[incarnation].call_at_s = math.inf

    def call_everybody_anew(self) -> None:
        """The votes are in, the commits are asked for now."""
        for row in self._rows.values():
            row.call_at_s, row.is_lost, row.failure = -math.inf, False, ""

    @property
    def next_call_s(self) -> float:
        """When a call is due that is not due yet."""
        owes = _owes_end if self.is_decided else _owes_vote
        times = (row.call_at_s for row in self._rows.values() if owes(row) and row.call_at_s > -math.inf)
        return min(times, default=math.inf)

    @property
    def has_voters(self) -> bool:
        return any(row.role == "voter" and not row.is_gone for row in self._rows.values())

    @property
    def objection(self) -> str | None:
        """Why this update can never be decided, as soon as one rank makes it so; None: nothing does so far."""
        voters = [row for row in self._rows.values() if row.role == "voter" and not row.is_gone]
        bad = [row for row in voters if row.is_lost or (row.vote is not None and row.vote.status != "prepared")]
        if bad:
            return _complaint(bad, len(voters))
        digests = {row.vote.digest for row in voters if row.vote is not None}
        return None if len(digests) < 2 else "the ranks hold different weights after loading the same update"

    def agreed(self) -> tuple[str, str]:
        """Digest and label that everybody who had to has voted for."""
        votes = [row.vote for row in self._rows.values() if row.role == "voter" and not row.is_gone]
        return next((vote.digest, vote.version) for vote in votes if vote is not None)

    def registered_digest(self) -> str | None:
        """Of the weights with which all voters registered; None if they differ."""
        digests = {row.record.weights_digest for row in self._rows.values() if row.role == "voter"}
        return digests.pop() if len(digests) == 1 else None

    # ----------------------------------------------------------------------------------------------------- the answer
    def decided_answer(self, version: str, now_s: float) -> dict[str, Any]:
        """After the decision: success if everybody has followed; laggards are named."""
        rows = self._in_order()
        laggards = [row for row in rows if not _has_followed(row)]
        is_anybody_here = any(row.end is not None and row.end.status == "committed" for row in rows if not row.is_gone)
        if laggards:
            status, message, code = "laggards", _complaint(laggards, len(rows)), 503
            message = f"the update is decided and will not be taken back; not serving: {message}"
        elif not is_anybody_here:
            status, message, code = "no_ranks", "the update is decided, but no rank is left that serves it", 503
        else:
            status, message, code = "updated", "Weights updated.", 200
        facts = {"decided": True, "digest": self.digest, "version": version, "weights_record": self.index}
        facts["epoch"] = self.index if self.request.flush_cache else 0
        facts["laggards"] = [row.record.incarnation for row in laggards]
        return self._answer(status, message, code, now_s) | facts

    def undecided_answer(self, status: str | None, message: str, now_s: float) -> dict[str, Any]:
        """Without a decision: every rank serves what it served. status: None: as the ranks say."""
        statuses = {_status(row, is_decided=False) for row in self._rows.values() if row.role == "voter"}
        worst = next((name for name in _FAILURES if name in statuses), "refused")
        code = {"cancelled": 409, "conflict": 409}.get(status or "", 503) if status else _FAILURES[worst]
        return self._answer(status or worst, message, code, now_s)

    def _answer(self, status: str, message: str, http_status: int, now_s: float) -> dict[str, Any]:
        return weight_answer(
            self.request,
            success=status == "updated",
            status=status,
            message=message,
            http_status=http_status,
            started_at=self.started_at,
            took_ms=(now_s - self.started_s) * 1000,
            ranks=[_plain_row(row, self.is_decided) for row in self._in_order()],
        )

    def _in_order(self) -> list[_Row]:
        return sorted(self._rows.values(), key=lambda row: row.record.rank)


def weight_answer(
    request: WeightRequest,
    *,
    success: bool,
    status: str,
    message: str,
    http_status: int,
    started_at: str = "",
    took_ms: float = 0.0,
    ranks: list[dict[str, Any]] | None = None,
) -> dict[str, Any]:
    """The plain answer of one update: always the same keys, whatever became of it."""
    return {
        "update_id": request.update_id,
        "success": success,
        "status": status,
        "message": message,
        "http_status": http_status,
        "decided": False,
        "digest": "",
        "version": "",
        "weights_record": 0,
        "epoch": 0,
        "kind": request.kind,
        "in_flight": request.in_flight,
        "flush_cache": request.flush_cache,
        "replayed": False,
        "started_at": started_at,
        "took_ms": round(took_ms, 3),
        "ranks": ranks or [],
        "laggards": [],
    }


def _owes_vote(row: _Row) -> bool:
    return row.role == "voter" and row.vote is None and not row.is_gone


def _owes_end(row: _Row) -> bool:
    return row.role in ("voter", "late") and row.end is None and not row.is_gone


def _has_followed(row: _Row) -> bool:
    """After the decision: it serves the new weights, or none. One that came late may say that it has them not: it has
    read that they are decided, and admits nothing."""
    if row.is_gone or row.role in ("excluded", "joined"):
        return True
    good = ("committed", "stale") if row.role == "late" else ("committed",)
    return row.end is not None and row.end.status in good


def _status(row: _Row, *, is_decided: bool) -> str:
    if row.is_gone:
        return "gone"
    if row.role in ("excluded", "joined"):
        return row.role
    if is_decided:
        return "unreachable" if row.end is None else row.end.status
    if row.vote is None:
        return "unreachable" if row.failure else "timed_out"
    return "aborted" if row.vote.status == "prepared" else row.vote.status


def _message(row: _Row) -> str:
    answer = row.end or row.vote
    return (answer.message if answer is not None else "") or row.failure or "no answer in time"


def _complaint(rows: Iterable[_Row], num_ranks: int) -> str:
    """The ranks' own words; exactly theirs if all say the same."""
    rows = list(rows)
    messages = {_message(row) for row in rows}
    if len(messages) == 1 and len(rows) == num_ranks:
        return messages.pop()
    return "; ".join(f"rank {row.record.rank}: {_message(row)}" for row in rows)


def _plain_row(row: _Row, is_decided: bool) -> dict[str, Any]:
    """One rank as plain data."""
    answer = row.end if is_decided else row.vote
    plain = asdict(answer) if answer is not None else {"digest": "", "version": "", "blockers": {}}
    status = _status(row, is_decided=is_decided)
    is_good = row.is_gone or status in ("committed", "excluded", "joined", "aborted")
    return {
        "rank": row.record.rank,
        "incarnation": row.record.incarnation,
        "node": row.record.node_id,
        "status": status,
        "message": "" if is_good else _message(row),
        # a vote names the weights that would have come
        "digest": plain["digest"] if status != "aborted" else "",
        "version": plain["version"] if status != "aborted" else "",
        "num_retracted": plain.get("num_retracted", 0),
        "num_aborted": plain.get("num_aborted", 0),
        "blockers": plain["blockers"],
    }
