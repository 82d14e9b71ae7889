"""Operators see Tidegate where they see Ray: the dashboard's API (with the token) and the Prometheus exporter."""

from __future__ import annotations

import json
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
    "tidegate_epoch",
)


def test_the_exporter_and_the_dashboard_show_us(server: Server, client: httpx.Client) -> None:
    body = {"text": "count me", "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
    assert client.post("/generate", json=body).status_code == 200
    assert client.post("/flush_cache?timeout=10").status_code == 200
    discovery = next(server.state_dir.rglob("prom_metrics_service_discovery.json"))
    targets = [target for group in json.loads(discovery.read_text()) for target in group["targets"]]

    def scraped() -> str:
        pages = (httpx.get(f"http://{target}/metrics", timeout=10) for target in targets)
        return "\n".join(page.text for page in pages if page.status_code == 200)

    until(lambda: all(name in scraped() for name in NAMES), 30, "every metric is exported")
    exports = server.exports()
    token = Path(exports["RAY_AUTH_TOKEN_PATH"]).read_text().strip()
    dashboard = f"http://127.0.0.1:{server.dashboard_port}"
    assert httpx.get(f"{dashboard}/api/v0/actors", timeout=10).status_code == 401
    actors = httpx.get(f"{dashboard}/api/v0/actors", headers={"authorization": f"Bearer {token}"}, timeout=10)
    assert actors.status_code == 200
    names = {row["name"] for row in actors.json()["data"]["result"]["result"] if row["state"] == "ALIVE"}
    assert "controller" in names
    assert sum(name.startswith("scheduler-") for name in names) == 2
