"""What the scheduler wants done. Frozen; whoever drives it carries them out in this order."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from engine.batch import Batch
from engine.copy_jobs import CopyJob
from engine.flush import FlushVerdict
from engine.flush_gate import PendingFlush
from engine.request import Output


@dataclass(frozen=True, slots=True)
class RunBatch:
    """Compute this; answer with `StepFinished` or `StepFailed`."""

    batch: Batch


@dataclass(frozen=True, slots=True)
class Emit:
    """Send these to whoever asked, in this order."""

    outputs: list[Output]


@dataclass(frozen=True, slots=True)
class FlushEnded:
    """The scheduler won this flush's claim and this is its verdict."""

    pending: PendingFlush
    verdict: FlushVerdict


@dataclass(frozen=True, slots=True)
class CacheSuspect:
    """`sanity_check` found these violations; the cache was emptied, the rank goes on."""

    violations: list[str]


@dataclass(frozen=True, slots=True)
class StartCopies:
    """Begin these, in this order; answer each with `CopyEnded`."""

    jobs: list[CopyJob]


Command: TypeAlias = RunBatch | Emit | FlushEnded | CacheSuspect | StartCopies
