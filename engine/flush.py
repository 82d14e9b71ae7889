"""Words of the flush protocol on a rank: the command, the verdict, the atomic claim. Plain data and one lock.

A pending flush goes `pending -> claimed` (engine thread, which then swaps and answers) or `-> expired` (control loop,
at the deadline), atomically; only the winner answers (protocol.md section 6, hole H8).
"""

from __future__ import annotations

import math
import threading
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

#: flush id and log index of its intent: what makes a flush the same one
FlushKey: TypeAlias = tuple[str, int]

FlushMode = Literal["wait", "drain", "retract", "abort", "fence"]
FLUSH_MODES: tuple[FlushMode, ...] = ("wait", "drain", "retract", "abort", "fence")
#: modes that end within one engine step, busy or not; their budget is at least the grace for one step
STEP_MODES: frozenset[FlushMode] = frozenset({"retract", "abort", "fence"})

#: what one incarnation (or host tier) answers about one flush; protocol.md section 6
Verdict = Literal[
    "flushed", "fenced", "joined", "gone", "expired",
    "timed_out", "refused", "busy", "expired_command", "superseded", "unreachable",
]  # fmt: skip
#: verdicts with which a flush can still succeed (`fenced` only in mode fence)
GOOD_VERDICTS: frozenset[str] = frozenset({"flushed", "fenced", "joined", "gone", "expired"})

ALREADY_IN_PROGRESS = "Another flush_cache is already in progress."
TIMED_OUT_WAITING = "Timed out waiting for idle state."


@dataclass(frozen=True, slots=True)
class FlushScope:
    """Part of the cache a flush is limited to. Exactly one field is set; may drop more than asked, never less."""

    namespace: str | None = None
    adapter: str | None = None
    #: int32 bytes; the flush drops everything whose first page equals this prefix's first page
    prefix_tokens: bytes | None = None
    older_than_s: float | None = None


@dataclass(frozen=True, slots=True)
class FlushCommand:
    """One flush as a rank gets it. `budget_s` is what is left when it is sent; it shrinks hop by hop."""

    flush_id: str
    mode: FlushMode
    tiers: tuple[str, ...]
    #: the epoch the rank swaps to
    epoch: int
    #: of the controller that sends it; lower terms are refused
    term: int
    budget_s: float
    #: what the caller asked for: 0 means now or refuse
    timeout_s: float = 0.0
    scope: FlushScope | None = None
    dry_run: bool = False
    #: of the intent in the control log; 0 for a flush that no log knows. The id is the caller's and may come again
    #: with another intent, a day later; id and index together are one flush
    index: int = 0
    #: CLOCK_BOOTTIME of the rank's machine in seconds: past it the command is not begun, however long it lay in a
    #: buffer or the rank was frozen (hole H25); never later than what is left of the budget
    valid_until_s: float = math.inf
    #: random id of the sender's log: epochs and terms of two lineages have nothing to do with each other
    lineage: str = ""
    #: of a scoped flush: what replaces the scope's part in the keys of pages computed from now on; 0: no scope
    sub_epoch: int = 0

    @property
    def key(self) -> FlushKey:
        return self.flush_id, self.index


@dataclass(frozen=True, slots=True)
class Blockers:
    """What was in the way of an idle instant."""

    running: int = 0
    half_prefilled: int = 0
    copies_in_flight: int = 0

    @property
    def any(self) -> bool:
        return bool(self.running or self.half_prefilled or self.copies_in_flight)


@dataclass(frozen=True, slots=True)
class FlushVerdict:
    """What this rank did about one flush."""

    flush_id: str
    status: Verdict
    message: str = ""
    #: the rank's epoch after this
    epoch: int = 0
    waited_ms: float = 0.0
    freed_pages: int = 0
    freed_bytes: int = 0
    copies_in_flight: int = 0
    blockers: Blockers = field(default_factory=Blockers)
    #: requests aborted / retracted by this flush
    num_aborted: int = 0
    num_retracted: int = 0


class Claim:
    """The one decision who ends a pending flush. Any thread may call; exactly one call returns True."""

    __slots__ = ("_lock", "_state")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._state: Literal["pending", "claimed", "expired"] = "pending"

    @property
    def state(self) -> Literal["pending", "claimed", "expired"]:
        return self._state

    def try_claim(self) -> bool:
        """Engine thread: I am going to swap and answer."""
        return self._move("claimed")

    def try_expire(self) -> bool:
        """Control loop: the deadline has passed (or the caller cancelled), I am going to answer."""
        return self._move("expired")

    def _move(self, to: Literal["claimed", "expired"]) -> bool:
        with self._lock:
            if self._state != "pending":
                return False
            self._state = to
            return True
