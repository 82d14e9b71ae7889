"""What another machine's clock says at least, from the messages it sent. Pure.

A command must not be carried out after its time, however long it lay in a buffer of a frozen process. A duration
cannot age there; an instant of the receiver's own clock can (protocol.md, hole H25).
"""

from __future__ import annotations

# CLOCK_BOOTTIME is slewed by at most 500 ppm on either machine.
_MAX_DRIFT = 1e-3


class NodeClock:
    """CLOCK_BOOTTIME of one node, bounded from below: an instant named by it is never too late for the receiver."""

    def __init__(self) -> None:
        #: their time in a message, our time when it came
        self._heard: tuple[float, float] | None = None

    def heard(self, sent_s: float, now_s: float) -> None:
        """A message that left at `sent_s` of their clock has come at `now_s` of ours."""
        known_s = self.reads_at_least(now_s)
        if known_s is None or sent_s > known_s:
            self._heard = (sent_s, now_s)

    def reads_at_least(self, now_s: float) -> float | None:
        """Seconds that their clock shows at `now_s` or has passed; None before the first message."""
        if self._heard is None:
            return None
        sent_s, heard_s = self._heard
        return sent_s + (now_s - heard_s) * (1 - _MAX_DRIFT)
