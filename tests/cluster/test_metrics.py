"""Operators see Tidegate where they see Ray: the dashboard's API (with the token) and the Prometheus exporter."""

from __future__ import annotations

import json
import re
from pathlib import Path

import httpx

from tests.cluster.server import Server, until

NAMES = (
    "tidegate_requests_total",
    "tidegate_generated_tokens_total",
    "tidegate_time_to_first_token_seconds",
    "tidegate_running_requests",
    "tidegate_queued_requests",
    "tidegate_kv_pages",
    "tidegate_cached_tokens_total",
    "tidegate_evicted_pages_total",
    "tidegate_flushes_total",
    "tidegate_flush_wait_seconds",
    "tidegate_flush_rank_verdicts_total",
    "tidegate_flush_freed_pages_total",
    "tidegate_flush_freed_bytes_total",
    "tidegate_seconds_since_flush",
    "tidegate_epoch",
    "tidegate_floor",
    "tidegate_nodes",
    "tidegate_stale_answers_total",
)


def test_the_exporter_and_the_dashboard_show_us(server: Server, client: httpx.Client) -> None:
    body = {"text": "count me", "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    assert client.post("/generate", json=body).status_code == 200
    assert client.post("/generate", json=body | {"text": "a prompt of more than one page " * 4}).status_code == 200
    flushed = client.post("/v1/cache/flush", json={"mode": "fence"})
    assert flushed.status_code == 200, flushed.text
    freed = sum(row["freed_pages"] for row in flushed.json()["ranks"])
    discovery = next(server.state_dir.rglob("prom_metrics_service_discovery.json"))
    targets = [target for group in json.loads(discovery.read_text()) for target in group["targets"]]

    def scraped() -> str:
        pages = (httpx.get(f"http://{target}/metrics", timeout=10) for target in targets)
        return "\n".join(page.text for page in pages if page.status_code == 200)

    until(lambda: all(name in scraped() for name in NAMES), 30, "every metric is exported")

    def of(name: str) -> float:
        return sum(float(value) for value in re.findall(rf"^ray_{name}\{{.*\}} (\S+)$", scraped(), re.MULTILINE))

    # what a rank frees beside a fence's answer is counted all the same
    until(lambda: of("tidegate_flush_freed_pages_total") >= max(1, freed), 30, "freed pages are counted")
    assert of("tidegate_flush_freed_bytes_total") > of("tidegate_flush_freed_pages_total")
    page = client.get("/v1/cache").json()
    until(lambda: of("tidegate_floor") == page["floor"] == flushed.json()["epoch"], 30, "the floor is shown")
    assert of("tidegate_stale_answers_total") == 0
    exports = server.exports()
    token = Path(exports["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    dashboard = f"http://127.0.0.1:{server.dashboard_port}"
    assert httpx.get(f"{dashboard}/api/v0/actors", timeout=10).status_code == 401
    actors = httpx.get(f"{dashboard}/api/v0/actors", headers={"authorization": f"Bearer {token}"}, timeout=10)
    assert actors.status_code == 200
    names = {row["name"] for row in actors.json()["data"]["result"]["result"] if row["state"] == "ALIVE"}
    assert "controller" in names
    assert sum(name.startswith("scheduler-") for name in names) == 2
