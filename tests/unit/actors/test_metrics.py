"""What a rank hands to Ray's metrics; the exporter itself is looked at in tests/cluster."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
from ray.util import metrics as ray_metrics

from actors.messages import HostReport
from actors.metrics import ApiMetrics, ControlMetrics, RankMetrics, TierMetrics
from engine.copy_jobs import HostCounters
from engine.flush import Blockers, FlushCommand, FlushVerdict
from engine.request import Output, RequestStats
from engine.snapshot import Counters, EngineSnapshot

Key = tuple[str, frozenset[tuple[str, str]]]


class Exported:
    """Every value handed to Ray, by metric and labels, in order."""

    def __init__(self) -> None:
        self.values: dict[Key, list[float]] = defaultdict(list)

    def of(self, name: str, **labels: str) -> list[float]:
        return self.values[name, frozenset(({"rank": "3"} | labels).items())]


@pytest.fixture
def exported(monkeypatch: pytest.MonkeyPatch) -> Exported:
    exported = Exported()

    def record(metric: Any, value: float, tags: dict[str, str] | None = None) -> None:
        tags = tags or {}
        assert set(tags) == set(metric.info["tag_keys"])
        exported.values[metric.info["name"], frozenset(tags.items())].append(value)

    monkeypatch.setattr(ray_metrics.Metric, "_record", record)
    return exported


def output(request_id: str, token_ids: list[int], *, finish: Any = None, first_token_s: float | None = None) -> Output:
    stats = None if first_token_s is None else RequestStats(4, 0, None, queue_s=0.01, first_token_s=first_token_s)
    return Output(request_id, 0, token_ids, finish=finish, stats=stats)


def test_the_first_token_is_observed_once_per_request(exported: Exported) -> None:
    metrics = RankMetrics(3)
    metrics.outputs([output("a", [1], first_token_s=0.2), output("b", [1], finish="stop", first_token_s=0.3)])
    metrics.outputs([output("a", [2])])
    metrics.outputs([output("a", [3], finish="length", first_token_s=0.2)])
    # ended in the queue: there was no first token
    metrics.outputs([output("c", [], finish="abort", first_token_s=0.0)])
    assert exported.of("tidegate_time_to_first_token_seconds") == [0.2, 0.3]
    assert exported.of("tidegate_queue_wait_seconds") == [0.01, 0.01]


def test_counters_carry_what_is_new_and_exist_from_the_first_report(exported: Exported) -> None:
    metrics = RankMetrics(3)
    metrics.report(EngineSnapshot(), 0)
    metrics.report(
        EngineSnapshot(counters=Counters(num_generated_tokens=7, num_finished_stop=1), num_evicted_pages=4), 0
    )
    metrics.report(
        EngineSnapshot(counters=Counters(num_generated_tokens=9, num_finished_stop=1), num_evicted_pages=4), 0
    )
    assert exported.of("tidegate_generated_tokens") == [0, 7, 2]
    assert exported.of("tidegate_evicted_pages") == [0, 4, 0]
    assert exported.of("tidegate_requests", outcome="stop") == [0, 1, 0]
    assert exported.of("tidegate_requests", outcome="abort") == [0, 0, 0]


def test_gauges_show_the_snapshot(exported: Exported) -> None:
    snapshot = EngineSnapshot(
        blockers=Blockers(running=2, half_prefilled=1), num_waiting=5, epoch=8, num_pages=10, num_free_pages=6,
        num_cached_pages=1, num_pinned_pages=2, num_private_pages=1,
    )  # fmt: skip
    RankMetrics(3).report(snapshot, 11)
    assert exported.of("tidegate_running_requests") == [3]
    assert exported.of("tidegate_queued_requests") == [5]
    assert exported.of("tidegate_rank_epoch") == [8]
    assert exported.of("tidegate_rank_dropped_frames") == [11]
    states = {state: exported.of("tidegate_kv_pages", state=state) for state in ("free", "cached", "pinned", "private")}
    assert states == {"free": [6], "cached": [1], "pinned": [2], "private": [1]}


def test_flushes_by_mode_and_verdict(exported: Exported) -> None:
    metrics = RankMetrics(3)
    command = FlushCommand("f", "wait", ("device",), epoch=4, term=1, budget_s=2.0)
    metrics.flush_ended(command, FlushVerdict("f", "timed_out", waited_ms=1500.0))
    assert exported.of("tidegate_rank_flushes", mode="wait", verdict="timed_out") == [1]
    assert exported.of("tidegate_rank_flush_wait_seconds", mode="wait") == [1.5]
    done = FlushVerdict("f", "flushed", freed_pages=3, freed_bytes=300)
    metrics.flush_ended(command, done)
    metrics.flush_ended(replace(command, dry_run=True), done)
    assert exported.of("tidegate_rank_flushes", mode="wait", verdict="dry_run") == [1]
    assert exported.of("tidegate_flush_freed_pages", tier="device") == [0, 3]
    assert exported.of("tidegate_flush_freed_bytes", tier="device") == [0, 300]


def test_epoch_floor_and_nodes_of_the_controller(exported: Exported) -> None:
    metrics = ControlMetrics()
    metrics.epoch(9)
    metrics.floor(7)
    metrics.nodes(2, 1)
    metrics.seconds_since_flush(1.5)
    shown = {
        (name, *labels): values for (name, labels), values in exported.values.items() if name != "tidegate_flushes"
    }
    assert shown == {
        ("tidegate_epoch",): [9],
        ("tidegate_floor",): [7],
        ("tidegate_nodes", ("state", "leased")): [2],
        ("tidegate_nodes", ("state", "unleased")): [1],
        ("tidegate_seconds_since_flush",): [1.5],
    }


def test_another_number_empties_the_old_gauges_and_counts_nothing_twice(exported: Exported) -> None:
    metrics = RankMetrics(3)
    metrics.report(EngineSnapshot(num_waiting=5, counters=Counters(num_generated_tokens=7)), 0)
    metrics.renumber(4)
    metrics.report(EngineSnapshot(num_waiting=6, counters=Counters(num_generated_tokens=8)), 0)
    assert exported.of("tidegate_queued_requests") == [5, 0]
    assert exported.of("tidegate_queued_requests", rank="4") == [6]
    assert exported.of("tidegate_generated_tokens", rank="4") == [1]


def test_an_api_replica_reports_what_is_new(exported: Exported) -> None:
    metrics = ApiMetrics()
    totals = {"num_resent": 0, "num_dropped_frames": 0, "num_lost_connections": 2}
    first, later = {("/generate", 200): 4}, {("/generate", 200): 9, ("/generate", 400): 1}
    metrics.report(2, num_inflight_tokens=300, num_sequences=4, num_stale=0, responses=first, **totals)
    metrics.report(0, num_inflight_tokens=0, num_sequences=9, num_stale=1, responses=later, **totals)
    assert exported.values["tidegate_api_sequences", frozenset({("attempt", "first")})] == [4, 5]
    assert exported.values["tidegate_stale_answers", frozenset()] == [0, 1]
    assert exported.values["tidegate_api_lost_connections", frozenset()] == [2, 0]
    assert exported.values["tidegate_api_inflight_sequences", frozenset()] == [2, 0]
    assert exported.values["tidegate_api_inflight_tokens", frozenset()] == [300, 0]
    good = frozenset({("route", "/generate"), ("status", "200")})
    assert exported.values["tidegate_http_responses", good] == [4, 5]


def test_a_dry_run_is_not_counted_as_a_flush(exported: Exported) -> None:
    answer = {"mode": "wait", "status": "flushed", "success": True, "took_ms": 5, "ranks": [{"status": "flushed"}]}
    answer["host_tiers"] = [{"node": "n", "status": "flushed", "freed_pages": 3, "freed_bytes": 300}]
    metrics = ControlMetrics()
    metrics.flush_ended(answer | {"dry_run": True})
    metrics.flush_ended(answer | {"dry_run": False})

    def counted(name: str, **labels: str) -> list[float]:
        return exported.values[name, frozenset(({"mode": "wait"} | labels).items())]

    for outcome in ("dry_run", "flushed"):
        assert counted("tidegate_flushes", outcome=outcome) == [1]
        assert counted("tidegate_flush_rank_verdicts", verdict=outcome) == [1]
        assert counted("tidegate_flush_host_verdicts", verdict=outcome) == [1]
    assert exported.values["tidegate_flush_freed_host_pages", frozenset({("node", "n")})] == [3]
    assert exported.values["tidegate_flush_freed_host_bytes", frozenset({("node", "n")})] == [300]


def test_the_host_tier_of_a_rank_by_reason_and_direction(exported: Exported) -> None:
    metrics = RankMetrics(3)
    first = HostCounters(num_found_pages=4, num_loaded_pages=3, loaded_bytes=30, load_s=0.5)
    first.misses["absent"] = 2
    metrics.report(EngineSnapshot(host=first), 0)
    second = first.copy()
    second.num_loaded_pages, second.load_s = 5, 0.75
    second.misses["reused"] += 1
    second.commits["committed"] += 7
    second.drops["no_slot"] += 1
    metrics.report(EngineSnapshot(host=second), 0)
    assert exported.of("tidegate_host_loaded_pages") == [3, 2]
    assert exported.of("tidegate_host_copied_bytes", direction="load") == [30, 0]
    assert exported.of("tidegate_host_copy_seconds", direction="load") == [0.5, 0.25]
    assert exported.of("tidegate_host_misses", reason="absent") == [2, 0]
    # there from the first report on, so that its first event is seen as one
    assert exported.of("tidegate_host_misses", reason="reused") == [0, 1]
    assert exported.of("tidegate_host_written_pages", outcome="committed") == [0, 7]
    assert exported.of("tidegate_host_dropped_pages", reason="no_slot") == [1]


def test_a_rank_without_a_host_tier_reports_none(exported: Exported) -> None:
    RankMetrics(3).report(EngineSnapshot(), 0)
    assert exported.of("tidegate_host_loaded_pages") == []


def test_a_nodes_host_tier_and_what_became_of_its_pages(exported: Exported) -> None:
    metrics = TierMetrics("node-0123456789")
    node = {"node": "node-0123456"}
    metrics.report(HostReport("ready", file_bytes=100, free=5, committed=3, valid=2, num_ranks=2), {"committed": 3})
    metrics.report(HostReport("ready", file_bytes=100, free=4, committed=4, valid=3), {"committed": 4, "evicted": 1})
    # another file: it counts from 0
    metrics.report(HostReport("ready"), {"committed": 1})
    values = {name: exported.values[name, frozenset((node | labels).items())] for name, labels in [
        ("tidegate_host_slots", {"state": "free"}),
        ("tidegate_host_valid_pages", {}),
        ("tidegate_host_tier_pages", {"event": "committed"}),
    ]}  # fmt: skip
    assert list(values.values()) == [[5, 4, 0], [2, 3, 0], [3, 1, 1]]
