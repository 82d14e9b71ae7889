"""What happens to one weight update, and what it then wants done: the words between `WeightMachine` and its shell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

from actors.messages import RankRecord
from actors.weight_records import WeightDecision, WeightIntent, WeightOutcome
from engine.weight_update import RankUpdate

# ----------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class IntentStored:
    index: int


@dataclass(frozen=True, slots=True)
class DecisionStored:
    """The weights floor, and with a flush the floor, hold from here on."""


@dataclass(frozen=True, slots=True)
class OutcomeStored:
    pass


@dataclass(frozen=True, slots=True)
class NotStored:
    """The record of this state is not stored. is_final: and never will be; else nobody knows."""

    message: str
    is_final: bool = False


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """A node was heard of, perhaps for the first time."""

    node_id: str


@dataclass(frozen=True, slots=True)
class RankAnswered:
    """A vote, or what became of a commit."""

    incarnation: str
    answer: RankUpdate


@dataclass(frozen=True, slots=True)
class RankFailed:
    """Its call brought no answer. is_final: no other call will."""

    incarnation: str
    message: str
    is_final: bool


@dataclass(frozen=True, slots=True)
class RankGone:
    incarnation: str


@dataclass(frozen=True, slots=True)
class RankRegistered:
    """An incarnation has registered, perhaps once more."""

    record: RankRecord
    is_new: bool


@dataclass(frozen=True, slots=True)
class CancelAsked:
    pass


@dataclass(frozen=True, slots=True)
class TimePassed:
    """`WeightMachine.wake_s` has come."""


Event: TypeAlias = (
    IntentStored
    | DecisionStored
    | OutcomeStored
    | NotStored
    | NodeChanged
    | RankAnswered
    | RankFailed
    | RankGone
    | RankRegistered
    | CancelAsked
    | TimePassed
)

# --------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class StoreIntent:
    """Answer with IntentStored or NotStored; after NotStored an IntentStored may still follow."""

    intent: WeightIntent


@dataclass(frozen=True, slots=True)
class StoreDecision:
    """Answer with DecisionStored or NotStored; after one that is not final either may still follow."""

    decision: WeightDecision


@dataclass(frozen=True, slots=True)
class StoreOutcome:
    """Answer with OutcomeStored or NotStored."""

    outcome: WeightOutcome


@dataclass(frozen=True, slots=True)
class PrepareRank:
    """Send the update, bytes included, to a rank; answer with RankAnswered or RankFailed, however late."""

    record: RankRecord
    index: int
    #: of the weights a part is laid upon; "": it is no part
    base_digest: str
    #: until its vote must leave, and how long it keeps what it staged
    vote_budget_s: float
    keep_budget_s: float


@dataclass(frozen=True, slots=True)
class RaiseWeights:
    """Have the node's page say that this update is decided. First the weights floor, then the floor: a rank that reads
    between the two commits and takes the epoch by itself; the other way round it would fill the new epoch with KV of
    old weights."""

    node_id: str
    weights_floor: int
    #: 0: as before
    floor: int


@dataclass(frozen=True, slots=True)
class CommitOnRank:
    """Tell a rank that it is decided; answer with RankAnswered or RankFailed."""

    record: RankRecord
    index: int


@dataclass(frozen=True, slots=True)
class AbortOnRank:
    """Tell a rank that it is not decided; nobody waits for the answer."""

    record: RankRecord
    index: int


@dataclass(frozen=True, slots=True)
class Give:
    """The answer, now. is_remembered: a repeat of the update id reads it; otherwise the id is free again."""

    answer: dict[str, Any]
    is_remembered: bool


@dataclass(frozen=True, slots=True)
class Amend:
    """The answer as it is after all; a repeat of the id reads this one."""

    answer: dict[str, Any]


Command: TypeAlias = (
    StoreIntent | StoreDecision | StoreOutcome | PrepareRank | RaiseWeights | CommitOnRank | AbortOnRank | Give | Amend
)
