"""Which node has a lease for how long, as its giver counts. Pure.

A node whose lease is over serves uncached, by its own clock and without being told. The controller may count on that
only after the longest time that any lease it or an earlier controller has given can last (protocol.md section 4,
holes H23 and H27).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable

#: clocks of two machines run apart; CLOCK_BOOTTIME is slewed by at most 0.1 %
DRIFT = 1.01


class LeaseBook:
    """The leases of one controller."""

    def __init__(self, lease_s: float, longest_s: float, started_s: float) -> None:
        """longest_s: of any lease time in the log.  started_s: this controller's take-over was stored before."""
        self.lease_s = lease_s
        # An earlier controller may have checked the log right before our take-over, granted one lease time later, and
        # that lease runs for one more.
        self._earlier_over_s = started_s + 2 * max(lease_s, longest_s) * DRIFT
        self._checked_s = -math.inf
        #: node -> controller's time of its newest lease
        self._granted_s: dict[str, float] = {}
        #: node -> flushes that count on its being out of lease
        self._withheld: Counter[str] = Counter()
        self._is_forbidden = False

    def log_checked(self, begun_s: float) -> None:
        """At `begun_s` or later the log held no record of another controller."""
        self._checked_s = max(self._checked_s, begun_s)

    def forbid(self) -> None:
        """Another controller has taken over: no lease any more."""
        self._is_forbidden = True

    def withhold(self, node_ids: Iterable[str]) -> None:
        """A flush counts these nodes as out of lease; they stay so until its floor is stored. `release` ends it."""
        self._withheld.update(node_ids)

    def release(self, node_ids: Iterable[str]) -> None:
        self._withheld.subtract(node_ids)

    def why_not(self, node_id: str, now_s: float) -> str | None:
        """Why this node may not have a lease now; None: it may."""
        if self._is_forbidden:
            return "another controller has taken over"
        if now_s >= self._checked_s + self.lease_s:
            return "the control log has not been read for a lease time"
        if self._withheld[node_id] > 0:
            return "a flush that counts this node as out of lease is being stored"
        return None

    def grant(self, node_id: str, now_s: float) -> None:
        """The node is told at `now_s`, or later, that it has a lease which counts from before `now_s`."""
        assert self.why_not(node_id, now_s) is None, "a lease was granted that may not be"
        self._granted_s[node_id] = now_s

    @property
    def earlier_over_s(self) -> float:
        """From this time on no lease of an earlier controller runs."""
        return self._earlier_over_s

    def over_s(self, node_id: str) -> float:
        """From this time on no lease of the node runs, whoever gave it."""
        return max(self._granted_s.get(node_id, -math.inf) + self.lease_s * DRIFT, self._earlier_over_s)

    def is_over(self, node_id: str, now_s: float) -> bool:
        return now_s >= self.over_s(node_id)
