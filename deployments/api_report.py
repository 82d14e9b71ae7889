"""What an Api replica counts, handed to Ray's metrics once a second; no request pays for it."""

from __future__ import annotations

import asyncio

from actors.fleet import Fleet
from actors.metrics import ApiMetrics
from deployments.admission import Admission
from deployments.core import ApiCounters

_PERIOD_S = 1.0


class ApiReport:
    """A timer of the running loop, until `stop`."""

    def __init__(self, counters: ApiCounters, admission: Admission, fleet: Fleet, metrics: ApiMetrics) -> None:
        self._counters = counters
        self._admission = admission
        self._fleet = fleet
        self._metrics = metrics
        self._timer: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Report now, and from now on."""
        counters, links = self._counters, self._fleet.counters
        self._metrics.report(
            self._admission.num_inflight,
            num_inflight_tokens=sum(load.num_tokens for load in self._fleet.loads().values()),
            num_sequences=counters.num_sequences,
            num_resent=counters.num_resent,
            num_stale=counters.num_stale,
            num_dropped_frames=links.num_dropped,
            num_lost_connections=links.num_lost,
            responses=counters.responses,
        )
        self._timer = asyncio.get_running_loop().call_later(_PERIOD_S, self.start)

    def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
