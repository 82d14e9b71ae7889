"""Pause and continue of one rank, as a machine: what is held, what becomes of running requests, when it ends by itself.

    running --PauseTold(mode)--> paused --ContinueTold, or the watchdog--> running

`abort` ends running requests, `retract` puts them back into the queue (tokens stay, KV goes), `in_place` lets them
stand still with their KV. In every mode nobody is admitted and no step is run, and nothing else stops: flushes, weight
updates, copies, metrics and aborts go on. A pause has an end of its own: whoever asked for it may die.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

PauseMode: TypeAlias = Literal["abort", "retract", "in_place"]
PAUSE_MODES: tuple[PauseMode, ...] = ("abort", "retract", "in_place")

# A pause that is there already becomes a stronger one if that is asked for; a weaker one cannot bring back what went.
_STRENGTH: dict[PauseMode, int] = {"in_place": 0, "retract": 1, "abort": 2}


@dataclass(frozen=True, slots=True)
class PauseTold:
    mode: PauseMode
    #: of the controller that sends it; lower terms are refused
    term: int
    #: the command is not begun later than this, by the rank's clock: a rank that was frozen must not pause long after
    valid_until_s: float = math.inf
    #: the pause ends by itself after so many seconds, counted from now at each repeat; infinity: never
    watchdog_s: float = math.inf


@dataclass(frozen=True, slots=True)
class ContinueTold:
    term: int
    valid_until_s: float = math.inf


@dataclass(frozen=True, slots=True)
class TurnStarted:
    """A step boundary: the only instant at which running requests are touched."""

    num_running: int


@dataclass(frozen=True, slots=True)
class TimePassed:
    """`PauseDesk.wake_s` has come."""


Event: TypeAlias = PauseTold | ContinueTold | TurnStarted | TimePassed


@dataclass(frozen=True, slots=True)
class RemoveRunning:
    """End (`abort`) or put back (`retract`) every running request, now."""

    how: Literal["abort", "retract"]


@dataclass(frozen=True, slots=True)
class Continued:
    """Admission and steps go on; by the watchdog if nobody has asked for it."""

    by_watchdog: bool
    paused_s: float


@dataclass(frozen=True, slots=True)
class PauseAnswer:
    """To the controller: from now on it holds; given at a step boundary, so no step of before is still running."""

    status: Literal["paused", "running", "refused", "expired_command"]
    message: str = ""
    mode: PauseMode | None = None
    #: what this pause has done so far
    num_aborted: int = 0
    num_retracted: int = 0
    #: running requests that stand still
    num_held: int = 0
    #: until the watchdog; None: it has none
    remaining_s: float | None = None


Command: TypeAlias = RemoveRunning | Continued | PauseAnswer


class PauseDesk:
    """One rank's pause. `handle` is the only method that changes it; it belongs to one thread."""

    def __init__(self) -> None:
        self.mode: PauseMode | None = None
        self._since_s = 0.0
        self._until_s = math.inf
        self._term = 0
        #: pauses that are told and not answered: they are at the next step boundary
        self._num_unanswered = 0
        self._removal: Literal["abort", "retract"] | None = None
        self._counts = {"abort": 0, "retract": 0}

    @property
    def is_paused(self) -> bool:
        """Nobody is admitted and no step is run."""
        return self.mode is not None

    @property
    def wake_s(self) -> float:
        """When `TimePassed` is due; infinity: not at all."""
        return self._until_s

    @property
    def has_work(self) -> bool:
        """A turn is due although nothing is run."""
        return self._num_unanswered > 0

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Take in what happened; what is to be done now, in order. A pause and its repeats are answered in the next
        turn, everything else at once."""
        match event:
            case PauseTold():
                return self._refused(event, now_s) or self._pause(event, now_s)
            case ContinueTold():
                return self._refused(event, now_s) or [*self._continue(now_s), self._answer(0, now_s)]
            case TurnStarted(num_running):
                return self._turn(num_running, now_s)
            case TimePassed():
                return self._continue(now_s, by_watchdog=True) if now_s >= self._until_s else []

    def _refused(self, told: PauseTold | ContinueTold, now_s: float) -> list[Command]:
        """Why a command is not obeyed; nothing: it is."""
        if told.term < self._term:
            message = f"Term {told.term} is over; a controller of term {self._term} has taken over."
            return [PauseAnswer("refused", message, self.mode)]
        self._term = told.term
        return [PauseAnswer("expired_command", "Came too late.", self.mode)] if now_s >= told.valid_until_s else []

    def _pause(self, told: PauseTold, now_s: float) -> list[Command]:
        if self.mode is None:
            self._since_s, self._counts = now_s, {"abort": 0, "retract": 0}
        if self.mode is None or _STRENGTH[told.mode] > _STRENGTH[self.mode]:
            self.mode = told.mode
            self._removal = None if told.mode == "in_place" else told.mode
        self._until_s = now_s + told.watchdog_s
        self._num_unanswered += 1
        return []

    def _turn(self, num_running: int, now_s: float) -> list[Command]:
        commands: list[Command] = []
        if self.is_paused and now_s >= self._until_s:
            commands += self._continue(now_s, by_watchdog=True)
        removal, self._removal = self._removal, None
        if self.is_paused and removal is not None:
            if num_running:
                commands.append(RemoveRunning(removal))
            self._counts[removal] += num_running
            num_running = 0
        answers, self._num_unanswered = self._num_unanswered, 0
        return [*commands, *(self._answer(num_running, now_s) for _ in range(answers))]

    def _continue(self, now_s: float, *, by_watchdog: bool = False) -> list[Command]:
        """Ends a pause; without one there is nothing to do, which is no error: a repeat of what was asked for."""
        if self.mode is None:
            return []
        self.mode, self._removal, self._until_s = None, None, math.inf
        return [Continued(by_watchdog, now_s - self._since_s)]

    def _answer(self, num_running: int, now_s: float) -> PauseAnswer:
        if self.mode is None:
            return PauseAnswer("running")
        remaining_s = None if self._until_s == math.inf else self._until_s - now_s
        aborted, retracted = self._counts["abort"], self._counts["retract"]
        return PauseAnswer("paused", "", self.mode, aborted, retracted, num_running, remaining_s)
