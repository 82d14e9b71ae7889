"""What happens to one flush, and what the flush then wants done: the words between `FlushMachine` and its shell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from actors.flush_run import Answer
from actors.log_records import FlushIntent, FlushOutcome
from actors.messages import RankRecord
from engine.flush import FlushVerdict

# ----------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class IntentStored:
    index: int


@dataclass(frozen=True, slots=True)
class OutcomeStored:
    """The floor that came with it, if any, is stored too."""


@dataclass(frozen=True, slots=True)
class NotStored:
    """The record of this state (intent or outcome) is not stored. is_final: and never will be; else nobody knows."""

    message: str
    is_final: bool = False


@dataclass(frozen=True, slots=True)
class FloorSettled:
    """A node's agent has answered, or its call has failed."""

    node_id: str
    #: pages of the node's host tier that the floor made void, and their bytes; None: not told
    host_pages: int | None = None
    host_bytes: int = 0


@dataclass(frozen=True, slots=True)
class HostFlushed:
    """A node's host tier has done what it was told."""

    node_id: str
    num_pages: int
    num_bytes: int


@dataclass(frozen=True, slots=True)
class HostFailed:
    """A node's host tier did not do it, or nobody knows."""

    node_id: str
    message: str


@dataclass(frozen=True, slots=True)
class NodeChanged:
    """A node was heard of: perhaps for the first time, perhaps with a higher floor on its page."""

    node_id: str


@dataclass(frozen=True, slots=True)
class RankAnswered:
    incarnation: str
    verdict: FlushVerdict


@dataclass(frozen=True, slots=True)
class RankFailed:
    """Its call brought no verdict. is_final: nothing better can follow."""

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
    #: for the first time, holding nothing: it will be told the newest epoch before it serves
    is_new: bool


@dataclass(frozen=True, slots=True)
class Superseded:
    """Another flush has begun to which this one gives way."""

    by: str


@dataclass(frozen=True, slots=True)
class SupersederEnded:
    """What ranks have not said about this flush by now they will not say in time."""


@dataclass(frozen=True, slots=True)
class CancelAsked:
    pass


@dataclass(frozen=True, slots=True)
class TimePassed:
    """`FlushMachine.wake_s` has come."""


Event: TypeAlias = (
    IntentStored
    | OutcomeStored
    | NotStored
    | FloorSettled
    | HostFlushed
    | HostFailed
    | NodeChanged
    | RankAnswered
    | RankFailed
    | RankGone
    | RankRegistered
    | Superseded
    | SupersederEnded
    | CancelAsked
    | TimePassed
)

# --------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class StoreIntent:
    """Answer with IntentStored or NotStored; after one that is not final either may still follow."""

    intent: FlushIntent


@dataclass(frozen=True, slots=True)
class StoreOutcome:
    """Answer with OutcomeStored or NotStored; after one that is not final either may still follow."""

    outcome: FlushOutcome


@dataclass(frozen=True, slots=True)
class RaiseFloor:
    """Have this floor, which is stored, put on the node's page; answer with FloorSettled."""

    node_id: str
    floor: int


@dataclass(frozen=True, slots=True)
class TellHost:
    """Have a node's host tier drop all its pages, or those older than an age; answer with HostFlushed or HostFailed."""

    node_id: str
    #: seconds; None: all pages
    older_than_s: float | None


@dataclass(frozen=True, slots=True)
class TellRank:
    """Send the flush to a rank; answer with RankAnswered or RankFailed, however late."""

    record: RankRecord
    #: until the rank's own deadline
    budget_s: float
    #: controller's time after which it must not begin
    valid_until_s: float


@dataclass(frozen=True, slots=True)
class CancelOnRank:
    """Have a rank end the flush if it has not begun there; answer with RankAnswered."""

    incarnation: str
    #: of the flush's intent
    index: int


@dataclass(frozen=True, slots=True)
class Withhold:
    """Give these nodes no lease: this flush counts on their being out of lease."""

    node_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Release:
    """They may have leases again; each will be told the floor."""

    node_ids: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Give:
    """The answer, now. is_remembered: a repeat of the flush id reads it; otherwise the id is free again."""

    answer: Answer
    is_remembered: bool


@dataclass(frozen=True, slots=True)
class Amend:
    """The answer as it is stored after all; a repeat of the id reads this one."""

    answer: Answer


@dataclass(frozen=True, slots=True)
class Forget:
    """The flush that was remembered in doubt has never begun, and never will: its id is free."""


@dataclass(frozen=True, slots=True)
class KeepLate:
    """Rows of verdicts that came after the answer."""

    rows: list[Answer]


Command: TypeAlias = (
    StoreIntent
    | StoreOutcome
    | RaiseFloor
    | TellHost
    | TellRank
    | CancelOnRank
    | Withhold
    | Release
    | Give
    | Amend
    | Forget
    | KeepLate
)
