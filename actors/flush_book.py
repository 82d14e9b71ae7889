"""Which flush is pending, which ids are known: one at a time, and each id at most once. Pure.

A repeat of an id joins the flush under way or re-reads the first answer, for one hour; after that the id is free
again: a nightly job that calls itself "nightly" must not read yesterday's success (protocol.md, hole H29).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

from actors.flush_request import FlushRequest
from actors.flush_run import Answer
from engine.flush_gate import gives_way

REREAD_S = 3600.0
# 4096 answers of 8 ranks are about 8 MB; a caller that flushes more than once a second has no use for the oldest.
_MAX_ENDED = 4096


@dataclass(frozen=True, slots=True)
class Begin:
    """Nobody knows this id, and it has the slot now."""

    #: the flush that gives way to it as soon as it has begun
    superseding: str | None = None


@dataclass(frozen=True, slots=True)
class Join:
    """It is under way."""


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
    """The slot of the pending flush, those that give way, and the answers of the last hour."""

    def __init__(self) -> None:
        #: flush id -> a flush that has no answer yet. The last one has the slot; those before it give way to it, or
        #: are left over from an earlier controller
        self._live: dict[str, FlushRequest] = {}
        #: left over from an earlier controller, of one id with a newer one: what becomes of them nobody asks
        self._outlived: list[FlushRequest] = []
        #: flush id -> its end, oldest first
        self._ended: dict[str, _Ended] = {}

    @property
    def pending(self) -> FlushRequest | None:
        """The flush that has the slot."""
        return next(reversed(self._live.values()), None)

    def admit(
        self, request: FlushRequest, now_s: float, may_yield: Callable[[str], bool] = lambda flush_id: False
    ) -> Admission:
        """Decide what becomes of a flush that was asked for. Only `Begin` changes something: the slot is taken.

        may_yield: can the flush of this id still give way? It does so if it is a `wait` and the newcomer needs no idle
        instant and drops at least as much.
        """
        known = self._known(request.flush_id, now_s)
        if known is not None and not known.has_arguments_of(request):
            return Refuse("conflict", request.flush_id)
        if known is not None:
            is_live = request.flush_id in self._live
            return Join() if is_live else Reread(self._ended[request.flush_id].answer)
        rival = self.pending
        if rival is not None and not (gives_way(rival, request) and may_yield(rival.flush_id)):
            return Refuse("busy", rival.flush_id)
        self._live[request.flush_id] = request
        return Begin(None if rival is None else rival.flush_id)

    def take(self, request: FlushRequest) -> None:
        """A flush that an earlier controller began has the slot until it has ended. Two can have one id, if the intent
        of the first was thought lost and its caller has tried again: the newer one answers for the id."""
        older = self._live.pop(request.flush_id, None)
        if older is not None:
            self._outlived.append(older)
        self._live[request.flush_id] = request

    def end(self, request: FlushRequest, answer: Answer, now_s: float) -> None:
        """A flush has its answer. Called again, it replaces the answer (a store that answered late)."""
        if any(other is request for other in self._outlived):
            return
        self._ended.pop(request.flush_id, None)
        self._ended[request.flush_id] = _Ended(request, answer, now_s)
        self.drop(request)
        while len(self._ended) > _MAX_ENDED:
            del self._ended[next(iter(self._ended))]

    def drop(self, request: FlushRequest) -> None:
        """A flush is over and nothing of it is remembered: the same id may try again."""
        if self._live.get(request.flush_id) is request:
            del self._live[request.flush_id]

    def forget(self, request: FlushRequest) -> None:
        """Of this flush, which has ended, nothing is remembered any more."""
        ended = self._ended.get(request.flush_id)
        if ended is not None and ended.request is request:
            del self._ended[request.flush_id]

    def keep_late(self, flush_id: str, late: list[dict[str, Any]]) -> None:
        """Verdicts that came after the answer."""
        if flush_id in self._ended:
            self._ended[flush_id].late = late

    def read(self, flush_id: str) -> Answer | None:
        """The answer of an ended flush with its late verdicts, however old; None if it is not known."""
        ended = self._ended.get(flush_id)
        return None if ended is None else ended.answer | {"late": list(ended.late)}

    def _known(self, flush_id: str, now_s: float) -> FlushRequest | None:
        live = self._live.get(flush_id)
        if live is not None:
            return live
        ended = self._ended.get(flush_id)
        return ended.request if ended is not None and now_s - ended.ended_s < REREAD_S else None
