"""How full the tiers are, out of the controller's status."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from actors.messages import HostReport
from deployments.cache_report import cache_report

RANK: dict[str, Any] = {
    "rank": 0, "num_pages": 12, "num_free_pages": 4, "num_cached_pages": 3, "num_pinned_pages": 1,
    "num_private_pages": 1, "num_fenced_pages": 1, "num_copying_pages": 2, "bytes_per_page": 100,
}  # fmt: skip
SILENT: dict[str, Any] = {"rank": 1, "status": "unreachable"}
STATUS: dict[str, Any] = {"success": True, "tiers": ["device"], "ranks": [RANK, RANK, SILENT], "nodes": []}


def test_the_device_tier_is_the_sum_of_the_ranks_that_answer() -> None:
    (device,) = cache_report(STATUS)["occupancy"]
    assert device == {
        "tier": "device", "num_pages": 24, "num_free_pages": 8, "num_cached_pages": 6, "num_pinned_pages": 2,
        "num_private_pages": 2, "num_fenced_pages": 2, "num_copying_pages": 4, "bytes": 2400, "cached_bytes": 600,
        "used": 0.6667,
    }  # fmt: skip


def test_a_host_tiers_pages_are_all_accounted_for() -> None:
    report = HostReport("ready", num_slots=20, page_bytes=50, free=8, leased=3, committed=7, quarantined=2, valid=5)
    rows = [{"node": "a"} | asdict(report), {"node": "b"} | asdict(HostReport("none"))]
    _, host = cache_report(STATUS | {"tiers": ["device", "host"], "host_tiers": rows})["occupancy"]
    assert (host["tier"], host["num_cached_pages"], host["cached_bytes"], host["bytes"]) == ("host", 5, 250, 1000)
    assert (host["num_private_pages"], host["num_fenced_pages"], host["used"]) == (3, 4, 0.6)
    states = ("free", "cached", "pinned", "private", "fenced", "copying")
    assert sum(host[f"num_{state}_pages"] for state in states) == host["num_pages"]


def test_nobody_answers_and_a_refusal() -> None:
    (device,) = cache_report(STATUS | {"ranks": [SILENT]})["occupancy"]
    assert (device["num_pages"], device["used"]) == (0, 0.0)
    refusal = {"success": False, "status": "invalid", "http_status": 400}
    assert cache_report(refusal) == refusal
