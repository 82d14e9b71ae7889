"""How fast the engine goes, and whether it goes at all: two snapshots compared on a timer. Pure."""

from __future__ import annotations

from engine.snapshot import EngineSnapshot


class Pace:
    """Fed by `note` about once a second."""

    def __init__(self, snapshot: EngineSnapshot, now_s: float) -> None:
        self._last = snapshot
        self._last_s = now_s
        #: since when the step of the last look has been under way; as seen, so up to one period late
        self._step_since_s = now_s
        #: tokens sampled per second between the last two looks
        self.tokens_per_s = 0.0

    def note(self, snapshot: EngineSnapshot, now_s: float) -> None:
        """Look at the engine. now_s: seconds of a clock that never goes back."""
        passed_s = now_s - self._last_s
        if passed_s > 0:
            new = snapshot.counters.num_generated_tokens - self._last.counters.num_generated_tokens
            self.tokens_per_s = new / passed_s
        if not self._is_same_step(snapshot):
            self._step_since_s = now_s
        self._last, self._last_s = snapshot, now_s

    def stalled_s(self, snapshot: EngineSnapshot, now_s: float) -> float:
        """For how long one and the same step has been with the model; 0 while it is not known to be stuck."""
        return now_s - self._step_since_s if self._is_same_step(snapshot) else 0.0

    def _is_same_step(self, snapshot: EngineSnapshot) -> bool:
        return snapshot.is_stepping and self._last.is_stepping and snapshot.step == self._last.step
