"""One flush over all ranks, from the controller's record to the answer: who owes a verdict, what they add up to. Pure.

Success is a statement about every incarnation that was registered at the start or before the return; no partial
success is one, and neither is a flush of no rank (protocol.md section 6).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from actors.flush_hosts import HostRows
from actors.flush_request import FlushRequest
from actors.messages import RankRecord
from engine.flush import GOOD_VERDICTS, FlushVerdict, Verdict

Answer = dict[str, Any]

#: status of a flush that did not succeed -> its HTTP code; the first that some rank has names the whole
_FAILURES = {
    "unreachable": 503,
    "timed_out": 504,
    "expired_command": 504,
    "superseded": 409,
    "busy": 409,
    "refused": 409,
    # only possible in a flush for which it does not suffice
    "fenced": 503,
}
#: verdicts of ranks that serve; a flush of none of these was no flush
LIVING_VERDICTS: frozenset[object] = frozenset({"flushed", "fenced", "joined"})


def is_good_verdict(status: object, mode: object) -> bool:
    """A flush of this mode can succeed with this verdict of a rank or tier; a fence suffices for mode fence alone."""
    return status in GOOD_VERDICTS and (status != "fenced" or mode == "fence")


@dataclass(slots=True)
class _Row:
    """What is known of one incarnation."""

    record: RankRecord
    verdict: FlushVerdict | None = None
    #: its process ended, before or after its verdict
    is_gone: bool = False
    #: why its call failed; final only if nothing better can follow
    failure: str = ""


class FlushRun:
    """The verdicts of one flush. `close` fixes the answer; what comes later is kept apart as late."""

    def __init__(self, request: FlushRequest, started_at: str, started_s: float) -> None:
        self.request = request
        self.started_at = started_at
        #: by the controller's clock
        self.started_s = started_s
        #: log index of the intent; 0 until it is stored. A dry run has none and gets a number below 0, its own
        self.index = 0
        #: epoch the ranks swap to; 0 until it is stored, and if the flush takes none
        self.epoch = 0
        #: of a scoped flush; 0 until it is stored, and without a scope
        self.sub_epoch = 0
        #: the floor is raised, or will be by every node that has a lease again
        self.is_floor_raised = False
        #: the flush allots an epoch; its success raises the floor
        self.takes_epoch = False
        #: the other flush to which this one gave way
        self.superseded_by: str | None = None
        self.is_cancelled = False
        self._rows: dict[str, _Row] = {}
        self._num_open = 0
        self._is_closed = False
        #: rows of verdicts that came after the answer
        self.late: list[dict[str, Any]] = []

    @property
    def records(self) -> list[RankRecord]:
        """Of every incarnation that has a row."""
        return [row.record for row in self._rows.values()]

    @property
    def open_records(self) -> list[RankRecord]:
        """Of the incarnations that still owe a verdict."""
        return [row.record for row in self._rows.values() if row.verdict is None] if self._num_open else []

    @property
    def waiting_for(self) -> list[str]:
        """Incarnations that still owe a verdict."""
        return [record.incarnation for record in self.open_records]

    @property
    def is_settled(self) -> bool:
        """Nobody owes a verdict any more."""
        return self._num_open == 0

    @property
    def is_closed(self) -> bool:
        """The answer is fixed."""
        return self._is_closed

    def has(self, incarnation: str) -> bool:
        return incarnation in self._rows

    def expect(self, record: RankRecord) -> None:
        """This incarnation owes a verdict. If it has its row already, only what it says of itself is renewed."""
        if self._is_closed:
            return
        row = self._rows.get(record.incarnation)
        if row is not None:
            row.record = record
            return
        self._rows[record.incarnation] = _Row(record)
        self._num_open += 1

    def joined(self, record: RankRecord) -> None:
        """It registered while the flush ran, empty, and was told the flush's epoch: it cannot hold older KV."""
        self.expect(record)
        self.answered(record.incarnation, self._verdict("joined", "registered during the flush, empty"))

    def answered(self, incarnation: str, verdict: FlushVerdict) -> None:
        """The rank's own verdict; after `close` it is kept as late."""
        row = self._rows.get(incarnation)
        if row is None:
            return
        if self._is_closed:
            self.late.append(_plain_row(row.record, verdict))
        elif row.verdict is None:
            self._settle(row, verdict)

    def failed(self, incarnation: str, message: str, is_final: bool) -> None:
        """The call brought no verdict. Unless final the row stays open: the proof that the process is gone, or a
        newer answer, may still come before the deadline."""
        row = self._rows.get(incarnation)
        if row is None or self._is_closed or row.verdict is not None:
            return
        row.failure = message
        if is_final:
            self._settle(row, self._verdict("unreachable", message))

    def gone(self, incarnation: str) -> None:
        """Its process is proven gone, and with it all KV it held."""
        row = self._rows.get(incarnation)
        if row is None or self._is_closed:
            return
        row.is_gone = True
        if row.verdict is None or row.verdict.status == "unreachable":
            self._settle(row, self._verdict("gone", "its process has ended"))

    def stand_in(self, incarnation: str, status: Verdict, message: str) -> None:
        """What the controller itself says of a rank that did not flush, or has not answered."""
        self._settle(self._rows[incarnation], self._verdict(status, message))

    def unsatisfied(self) -> list[tuple[RankRecord, str]]:
        """The ranks with no good verdict, each with why its call failed ("" if it did not)."""
        mode = self.request.mode
        return [(row.record, row.failure) for row in self._in_order() if not is_good_verdict(_status(row), mode)]

    def not_told(self, status: Literal["refused", "unreachable"], message: str) -> list[dict[str, Any]]:
        """The rows of a flush of which nobody was told. unreachable: its floor may rise all the same."""
        for row in self._rows.values():
            if row.verdict is None:
                self._settle(row, self._verdict(status, message))
        return self._plain_rows()

    def close(
        self, now_s: float, untouched_tiers: Iterable[str], note: str = "", hosts: HostRows | None = None
    ) -> Answer:
        """Fix the answer: who still owes a verdict is unreachable.

        note: put before the message of an answer that is no success.  hosts: what the host tiers did; they are closed
        with this.
        """
        for row in self._rows.values():
            if row.verdict is None:
                self._settle(row, self._verdict("unreachable", row.failure or "no answer by the deadline"))
        self._is_closed = True
        status, message, http_status = self._summary()
        if hosts is not None:
            hosts.close(status == "flushed", now_s)
            if status == "flushed" and hosts.complaint:
                status, message, http_status = "unreachable", hosts.complaint, 503
        success = status == "flushed"
        return flush_answer(
            self.request,
            success=success,
            status=status,
            message=message if success else note + message,
            http_status=http_status,
            epoch=self.epoch,
            sub_epoch=self.sub_epoch,
            floor_raised=self.is_floor_raised or (success and self.takes_epoch),
            superseded_by=self.superseded_by,
            started_at=self.started_at,
            took_ms=(now_s - self.started_s) * 1000,
            ranks=self._plain_rows(),
            untouched_tiers=list(untouched_tiers),
            host_tiers=None if hosts is None else hosts.plain(),
        )

    def _settle(self, row: _Row, verdict: FlushVerdict) -> None:
        self._num_open -= row.verdict is None
        row.verdict = verdict

    def _summary(self) -> tuple[str, str, int]:
        """Status, message and HTTP code of the whole."""
        bad = [row for row in self._in_order() if not is_good_verdict(_status(row), self.request.mode)]
        if bad and self.is_cancelled:
            return "cancelled", "cancelled before every rank had flushed", 409
        if bad:
            statuses = {row.verdict.status for row in bad if row.verdict is not None}
            worst = next(status for status in _FAILURES if status in statuses)
            return worst, self._complaint(bad), _FAILURES[worst]
        if not any(_status(row) in LIVING_VERDICTS and not row.is_gone for row in self._rows.values()):
            if any(_status(row) == "expired" for row in self._rows.values()):
                return "expired", "no rank can be reached: their nodes are out of lease and serve uncached", 503
            return "no_ranks", "no rank is left: nothing was flushed because nothing serves", 503
        return "flushed", "Dry run: nothing was flushed." if self.request.dry_run else "Cache flushed.", 200

    def _complaint(self, bad: list[_Row]) -> str:
        """The ranks' own words; exactly theirs if they all say the same."""
        messages = {row.verdict.message for row in bad if row.verdict is not None}
        if len(messages) == 1 and len(bad) == len(self._rows):
            return messages.pop()
        parts = [f"rank {row.record.rank}: {row.verdict.message}" for row in bad if row.verdict is not None]
        return f"{len(bad)} of {len(self._rows)} ranks not flushed: " + "; ".join(parts)

    def _plain_rows(self) -> list[dict[str, Any]]:
        return [_plain_row(row.record, row.verdict) for row in self._in_order() if row.verdict is not None]

    def _in_order(self) -> list[_Row]:
        return sorted(self._rows.values(), key=lambda row: row.record.rank)

    def _verdict(self, status: Verdict, message: str) -> FlushVerdict:
        epoch = self.epoch if status in ("joined", "fenced") else 0
        return FlushVerdict(self.request.flush_id, status, message, epoch=epoch)


def flush_answer(
    request: FlushRequest,
    *,
    success: bool,
    status: str,
    message: str,
    http_status: int,
    epoch: int = 0,
    sub_epoch: int = 0,
    floor_raised: bool = False,
    superseded_by: str | None = None,
    started_at: str = "",
    took_ms: float = 0.0,
    ranks: list[dict[str, Any]] | None = None,
    untouched_tiers: list[str] | None = None,
    host_tiers: list[dict[str, Any]] | None = None,
) -> Answer:
    """The plain answer of one flush: always the same keys, whatever became of it."""
    return {
        "flush_id": request.flush_id,
        "success": success,
        "status": status,
        "message": message,
        "http_status": http_status,
        "epoch": epoch,
        "sub_epoch": sub_epoch,
        "mode": request.mode,
        "tiers": list(request.tiers),
        "dry_run": request.dry_run,
        "floor_raised": floor_raised,
        "superseded_by": superseded_by,
        "replayed": False,
        "started_at": started_at,
        "took_ms": round(took_ms, 3),
        "ranks": ranks or [],
        "host_tiers": host_tiers or [],
        "untouched_tiers": untouched_tiers or [],
    }


def _status(row: _Row) -> str:
    return row.verdict.status if row.verdict is not None else "unreachable"


def _plain_row(record: RankRecord, verdict: FlushVerdict) -> dict[str, Any]:
    """One rank's verdict as plain data."""
    # a fifteenth of the time of dataclasses.asdict, which copies every value: 32 rows are made before the answer leaves
    plain = msgspec.to_builtins(verdict)
    del plain["flush_id"]
    return {"rank": record.rank, "incarnation": record.incarnation, "node": record.node_id} | plain
