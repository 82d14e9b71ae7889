"""Words of a weight update on a rank: what it is told, what happens to it, what it wants done. Plain data.

One update is one record of the controller's log, and `index` is that record: the update's name between processes, the
epoch it brings if it flushes, and what the weights floor of the control page shows once it is decided.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from engine.flush import Blockers

#: what becomes of requests that run when the new weights come
InFlightMode: TypeAlias = Literal["wait", "drain", "retract", "abort", "keep"]
IN_FLIGHT_MODES: tuple[InFlightMode, ...] = ("wait", "drain", "retract", "abort", "keep")

#: what a rank says of one update.  `prepared` is its vote: it can commit, and will if it is decided
UpdateStatus: TypeAlias = Literal[
    "prepared", "refused", "timed_out", "aborted", "committed", "stale", "expired_command", "failed",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class PrepareCommand:
    """Stage new weights beside the live ones and say whether they can be committed."""

    update_id: str
    index: int
    #: of the controller that sends it; lower terms are refused
    term: int
    in_flight: InFlightMode = "retract"
    #: the commit empties the cache and takes `index` as its epoch
    flush_cache: bool = True
    #: label after the commit; None: as before
    version: str | None = None
    #: of the weights that a partial update is laid upon; "": it brings all weights, so any will do
    base_digest: str = ""
    #: record of the newest decided update that the sender knows
    decided_record: int = 0
    #: the update is decided already and this rank catches up: commit without a vote, if the digest is this one
    decided_digest: str = ""


@dataclass(frozen=True, slots=True)
class RankUpdate:
    """What this rank says of one update."""

    update_id: str
    index: int
    status: UpdateStatus
    message: str = ""
    #: `prepared`: of the model as it will be; otherwise of the model that is served
    digest: str = ""
    version: str = ""
    #: what was in the way of a vote
    blockers: Blockers = field(default_factory=Blockers)
    num_retracted: int = 0
    num_aborted: int = 0


# ------------------------------------------------------------------------------------------------------------- events


@dataclass(frozen=True, slots=True)
class PrepareTold:
    """Times are of the rank's own clock. `vote_until_s`: later it says no. `keep_until_s`: later it gives the staged
    weights up, though it voted for them."""

    command: PrepareCommand
    vote_until_s: float
    keep_until_s: float


@dataclass(frozen=True, slots=True)
class Staged:
    """The weights of this update lie ready."""

    index: int
    digest: str


@dataclass(frozen=True, slots=True)
class StagingFailed:
    index: int
    message: str


@dataclass(frozen=True, slots=True)
class CommitTold:
    """The controller says that it is decided; the word on the control page says the same."""

    update_id: str
    index: int
    term: int


@dataclass(frozen=True, slots=True)
class AbortTold:
    """It is not decided and never will be."""

    update_id: str
    index: int
    term: int


@dataclass(frozen=True, slots=True)
class Turn:
    """A step boundary, the inbox is drained, and these words were read after it. Before anything is matched."""

    #: record of the last decided update, as the control page says
    weights_floor: int
    #: the node's lease has not run out
    lease_ok: bool
    #: what runs now
    blockers: Blockers


@dataclass(frozen=True, slots=True)
class CommitDone:
    """`Commit` was carried out; the numbers are of requests that ran."""

    index: int
    num_retracted: int = 0
    num_aborted: int = 0


@dataclass(frozen=True, slots=True)
class CommitFailed:
    """`Commit` was not carried out, the old weights are whole."""

    index: int
    message: str


@dataclass(frozen=True, slots=True)
class TimePassed:
    """`WeightDesk.wake_s` has come: there must be a turn."""


@dataclass(frozen=True, slots=True)
class Registered:
    """The controller has said which weights are decided."""

    #: 0: none was ever updated
    record: int
    digest: str


Event: TypeAlias = (
    PrepareTold
    | Staged
    | StagingFailed
    | CommitTold
    | AbortTold
    | Turn
    | CommitDone
    | CommitFailed
    | TimePassed
    | Registered
)

# ----------------------------------------------------------------------------------------------------------- commands


@dataclass(frozen=True, slots=True)
class Stage:
    """Load and check beside the live weights, on another thread; answer with Staged or StagingFailed."""

    command: PrepareCommand


@dataclass(frozen=True, slots=True)
class Drop:
    """Free what is staged for this update, or end its staging; nothing has changed."""

    index: int


#: what is done with running requests at a commit; `keep`: they go on with their old KV
Fate: TypeAlias = Literal["none", "retract", "abort", "keep"]


@dataclass(frozen=True, slots=True)
class Commit:
    """Now, before anything is matched: deal with running requests, swap the weights and, if there is an epoch, the
    tree. Answer with CommitDone or CommitFailed before the next `Turn`."""

    index: int
    fate: Fate
    version: str | None
    #: what the tree swaps to, even if a floor has brought this epoch already; None: the cache stays
    epoch: int | None


@dataclass(frozen=True, slots=True)
class Answer:
    """To the controller: a vote, or what became of a commit or an abort."""

    answer: RankUpdate


Command: TypeAlias = Stage | Drop | Commit | Answer
