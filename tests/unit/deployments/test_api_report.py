"""What an Api replica hands to its metrics."""

from __future__ import annotations

from collections import Counter
from typing import Any

from actors.metrics import ApiMetrics
from deployments.admission import Admission
from deployments.api_report import ApiReport
from deployments.core import ApiCounters
from tests.unit.actors.ranks import rank_and_fleet, request, run


class Recorded(ApiMetrics):
    def __init__(self) -> None:
        self.reports: list[dict[str, Any]] = []

    def report(self, num_inflight: int, **totals: Any) -> None:
        self.reports.append({"num_inflight": num_inflight} | totals)


def test_totals_and_present_load_of_core_and_fleet() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            responses = Counter({("/generate", 200): 5})
            counters = ApiCounters(num_sequences=3, num_resent=1, num_stale=2, responses=responses)
            metrics = Recorded()
            fleet.counters.num_dropped = 4
            stream = fleet.generate(rank.incarnation, request(prompt=range(1, 11), num_tokens=900))
            await anext(stream)
            report = ApiReport(counters, Admission(8), fleet, metrics)
            report.start()
            report.stop()
            await stream.aclose()
            (reported,) = metrics.reports
            assert reported.pop("num_inflight_tokens") >= 11
            assert reported == {
                "num_inflight": 0,
                "num_sequences": 3,
                "num_resent": 1,
                "num_stale": 2,
                "num_dropped_frames": 4,
                "num_lost_connections": 0,
                "responses": responses,
            }

    run(scenario())
