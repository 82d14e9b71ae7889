"""What an Api replica hands to its metrics."""

from __future__ import annotations

from actors.metrics import ApiMetrics, ApiTotals
from deployments.api_report import ApiReport
from deployments.core import ApiCounters
from tests.unit.actors.ranks import rank_and_fleet, request, run


class Recorded(ApiMetrics):
    def __init__(self) -> None:
        self.reports: list[tuple[ApiTotals, int, int]] = []

    def report(self, totals: ApiTotals, num_inflight: int, num_inflight_tokens: int) -> None:
        self.reports.append((totals, num_inflight, num_inflight_tokens))


def test_totals_and_present_load_of_core_and_fleet() -> None:
    async def scenario() -> None:
        async with rank_and_fleet() as (rank, fleet):
            counters, metrics = ApiCounters(num_sequences=3, num_resent=1, num_stale=2), Recorded()
            fleet.counters.num_dropped = 4
            stream = fleet.generate(rank.incarnation, request(prompt=range(1, 11), num_tokens=900))
            await anext(stream)
            report = ApiReport(counters, fleet, metrics)
            report.start()
            report.stop()
            await stream.aclose()
            totals, num_inflight, num_tokens = metrics.reports[0]
            assert totals == ApiTotals(3, 1, 2, 4, 0)
            assert num_inflight == 1
            assert num_tokens >= 11

    run(scenario())
