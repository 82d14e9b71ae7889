"""What the control log keeps of weight updates, and what a reading of it says.

Three records: the intent before any rank is told, the decision before any rank commits, the outcome before the answer.
The decision is the whole transaction: an intent without one is aborted by whoever reads the log next, one with it is
carried forward (hole H32). The name of an update between processes is the index of its intent.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import msgspec

from actors.weight_request import WeightRequest

# Answers of 8 ranks are about 2 kB each in a checkpoint; the controller's memory holds more of them.
_MAX_ENDED = 128


class WeightIntent(msgspec.Struct, frozen=True, tag="weight_intent"):
    """An update is going to be told to ranks. Nothing of it holds before its decision."""

    request: WeightRequest
    #: incarnations that have to vote
    members: tuple[str, ...]
    #: incarnations that the caller excluded
    excluded: tuple[str, ...]
    #: wall time for people
    started_at: str


class WeightDecision(msgspec.Struct, frozen=True, tag="weight_decision"):
    """Every rank that had to vote has voted for these weights. From here on there is only forward."""

    #: index of its intent: the weights floor, and the epoch if it flushes
    intent: int
    #: of the weights from now on
    digest: str
    version: str
    #: the cache is flushed with it: epoch and floor rise to `intent`
    flushes: bool


class WeightOutcome(msgspec.Struct, frozen=True, tag="weight_outcome"):
    """The answer of an update."""

    #: index of its intent
    intent: int
    answer: dict[str, Any]


WeightRecord: TypeAlias = WeightIntent | WeightDecision | WeightOutcome


@dataclass(slots=True)
class EndedUpdate:
    request: WeightRequest
    answer: dict[str, Any]


@dataclass(slots=True)
class WeightLogState:
    """Everything the log says of weights, folded record by record."""

    #: of the last decided update; 0: none was ever decided
    record: int = 0
    #: of the weights it brought; "" before the first
    digest: str = ""
    #: "": as the ranks were started
    version: str = ""
    #: the requests since the last complete one, decided, oldest first: what a new rank must load to catch up
    since_complete: list[WeightRequest] = field(default_factory=list)
    #: index -> update that has no outcome
    open: dict[int, WeightIntent] = field(default_factory=dict)
    #: index of an open update -> its decision
    decided: dict[int, WeightDecision] = field(default_factory=dict)
    #: update id -> newest ended update of that id, oldest first, bounded
    ended: dict[str, EndedUpdate] = field(default_factory=dict)

    def apply(self, index: int, record: WeightRecord) -> int:
        """Fold in the record with this index. Returns the epoch and floor that hold with it, 0: none."""
        match record:
            case WeightIntent():
                self.open[index] = record
            case WeightDecision():
                return self._decide(record)
            case WeightOutcome():
                self._end(record)
        return 0

    def copy(self) -> WeightLogState:
        """As it stands; later records change only one of the two."""
        return replace(
            self,
            since_complete=list(self.since_complete),
            open=dict(self.open),
            decided=dict(self.decided),
            ended=dict(self.ended),
        )

    def _decide(self, decision: WeightDecision) -> int:
        intent = self.open.get(decision.intent)
        if intent is not None:
            self.decided[decision.intent] = decision
            earlier = self.since_complete if intent.request.is_partial else []
            self.since_complete = [*earlier, intent.request]
        self.record = max(self.record, decision.intent)
        self.digest, self.version = decision.digest, decision.version
        return decision.intent if decision.flushes else 0

    def _end(self, outcome: WeightOutcome) -> None:
        self.decided.pop(outcome.intent, None)
        intent = self.open.pop(outcome.intent, None)
        if intent is None:
            return
        self.ended.pop(intent.request.update_id, None)
        self.ended[intent.request.update_id] = EndedUpdate(intent.request, outcome.answer)
        if len(self.ended) > _MAX_ENDED:
            del self.ended[next(iter(self.ended))]
