"""What a profile is asked to record, and what came of it. Plain values; they cross process borders."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

#: GPU: where the rank has one. MEM: allocations beside the operators
Activity = Literal["CPU", "GPU", "MEM"]
#: of a step: some prompt is in it, or every row decodes. "": the profile does not tell them apart
Stage = Literal["", "prefill", "decode"]
ACTIVITIES: tuple[Activity, ...] = ("CPU", "GPU", "MEM")

TRACE_SUFFIX = ".trace.json.gz"


@dataclass(frozen=True, slots=True)
class ProfileSpec:
    """One profile, the same for every rank."""

    #: names the traces; used once
    profile_id: str
    #: below the rank's root of traces; "" is the root itself
    folder: str = ""
    #: put before the id in names of traces
    prefix: str = ""
    #: number of the engine step with which it begins; None: with the next one
    start_step: int | None = None
    #: steps after which it ends by itself, of each stage; None: the most that is allowed
    num_steps: int | None = None
    #: empty: all that the device has, without MEM
    activities: tuple[Activity, ...] = ()
    with_stack: bool = True
    record_shapes: bool = True
    #: one trace of prefill steps and one of decode steps, recorded one after the other
    by_stage: bool = False


@dataclass(frozen=True, slots=True)
class Trace:
    """One file that was written."""

    #: path below the root
    name: str
    num_bytes: int
    stage: Stage = ""
    num_steps: int = 0


@dataclass(frozen=True, slots=True)
class Profiled:
    """The end of one profile."""

    profile_id: str
    traces: tuple[Trace, ...]
    #: what went wrong, or is missing; "" if nothing
    message: str = ""
    #: torch's profiler failed, or a trace could not be written
    is_failed: bool = False
