"""Which flush is pending, which ids are known: one at a time, and each id at most once. Pure.

A repeat of an id joins the pending flush or re-reads the first answer, for one hour; after that the id is free again:
a nightly job that calls itself "nightly" must not read yesterday's success (protocol.md, hole H29).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from actors.flush_request import FlushRequest
from actors.flush_run import Answer

REREAD_S = 3600.0
# 4096 answers of 8 ranks are about 8 MB; a caller that flushes more than once a second has no use for the oldest.
_MAX_ENDED = 4096


@dataclass(frozen=True, slots=True)
class Begin:
    """Nobody knows this id and no flush is pending: it has the slot now."""


@dataclass(frozen=True, slots=True)
class Join:
    """It is the pending flush."""


@dataclass(frozen=True, slots=True)
class Reread:
    """It has ended already."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class Refuse:
    """busy: another flush is pending. conflict: the id is known with other arguments."""

    reason: Literal["busy", "conflict"]
    other_id: str


Admission = Begin | Join | Reread | Refuse


@dataclass(slots=True)
class _Ended:
    request: FlushRequest
    answer: Answer
    ended_s: float
    late: list[dict[str, Any]] = field(default_factory=list)


class FlushBook:
    """The slot of the pending flush, and the answers of the last hour."""

    def __init__(self) -> None:
        #: at most one; never a queue
        self.pending: FlushRequest | None = None
        #: flush id -> its end, oldest first
        self._ended: dict[str, _Ended] = {}

    def admit(self, request: FlushRequest, now_s: float) -> Admission:
        """Decide what becomes of a flush that was asked for. Only `Begin` changes something: the slot is taken."""
        known = self._known(request.flush_id, now_s)
        if known is not None and not known.has_arguments_of(request):
            return Refuse("conflict", request.flush_id)
        if known is not None:
            return Join() if known is self.pending else Reread(self._ended[request.flush_id].answer)
        if self.pending is not None:
            return Refuse("busy", self.pending.flush_id)
        self.pending = request
        return Begin()

    def end(self, request: FlushRequest, answer: Answer, now_s: float) -> None:
        """The pending flush has its answer. Called again, it replaces the answer (a store that answered late)."""
        self._ended.pop(request.flush_id, None)
        self._ended[request.flush_id] = _Ended(request, answer, now_s)
        if self.pending is request:
            self.pending = None
        while len(self._ended) > _MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    def drop(self, request: FlushRequest) -> None:
        """The pending flush was never begun: nothing is remembered, the same id may try again."""
        if self.pending is request:
            self.pending = None

    def keep_late(self, flush_id: str, late: list[dict[str, Any]]) -> None:
        """Verdicts that came after the answer."""
        if flush_id in self._ended:
            self._ended[flush_id].late = late

    def read(self, flush_id: str) -> Answer | None:
        """The answer of an ended flush with its late verdicts, however old; None if it is not known."""
        ended = self._ended.get(flush_id)
        return None if ended is None else ended.answer | {"late": list(ended.late)}

    def _known(self, flush_id: str, now_s: float) -> FlushRequest | None:
        if self.pending is not None and self.pending.flush_id == flush_id:
            return self.pending
        ended = self._ended.get(flush_id)
        return ended.request if ended is not None and now_s - ended.ended_s < REREAD_S else None
