"""What happened, as the scheduler is told. Frozen; one event per engine step, never one per token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

from engine.batch import StepResult
from engine.control_words import ControlWords
from engine.copy_jobs import HostView
from engine.flush_gate import PendingFlush
from engine.host_calls import SubEpochs
from engine.request import Request


@dataclass(frozen=True, slots=True)
class RequestArrived:
    request: Request


@dataclass(frozen=True, slots=True)
class AbortRequested:
    """The client is gone, or somebody ends these requests. Unknown ids are ignored."""

    #: None: all of them
    request_ids: tuple[str, ...] | None
    reason: str = "aborted"


@dataclass(frozen=True, slots=True)
class FlushArrived:
    """The gate took a flush in. The scheduler looks at it in its next turn."""

    pending: PendingFlush


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """The inbox is drained, and these are the words read after it: decide what runs next."""

    words: ControlWords


@dataclass(frozen=True, slots=True)
class StepFinished:
    """The batch of the last `RunBatch` was computed."""

    result: StepResult


@dataclass(frozen=True, slots=True)
class StepFailed:
    """The batch of the last `RunBatch` was not computed, or not wholly; its KV is worthless."""

    message: str


@dataclass(frozen=True, slots=True)
class CheckDue:
    """It is time to look the cache over (`sanity_check`)."""


@dataclass(frozen=True, slots=True)
class TierAttached:
    """The host tier to use from now on; with no view there is none any more."""

    view: HostView | None
    lineage: str = ""
    sub_epochs: SubEpochs = ()


@dataclass(frozen=True, slots=True)
class CopyEnded:
    """A copy to or from the host tier touches no device page any more."""

    copy_id: int
    #: leading pages that were copied and, when loaded, verified
    num_pages: int
    #: why not all of them
    reason: str = ""
    #: the copier's time
    took_s: float = 0.0


@dataclass(frozen=True, slots=True)
class PagesCommitted:
    """What the tier made of pages written before."""

    #: outcome -> pages
    outcomes: Mapping[str, int]


Event: TypeAlias = (
    RequestArrived
    | AbortRequested
    | FlushArrived
    | TurnStarted
    | StepFinished
    | StepFailed
    | CheckDue
    | TierAttached
    | CopyEnded
    | PagesCommitted
)
