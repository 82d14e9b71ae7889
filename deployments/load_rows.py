"""One rank's state as a row of SGLang's /v1/loads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

#: sections that SGLang knows; those that have nothing to say here are left out of a row, as there
LOAD_SECTIONS = frozenset({"core", "memory", "spec", "lora", "disagg", "queues"})


def load_row(row: Mapping[str, Any], sections: frozenset[str]) -> dict[str, Any]:
    """row: one entry of the controller's `status()["ranks"]`, which is thin for a rank that did not answer."""
    load: dict[str, Any] = {
        "dp_rank": row.get("rank"),
        "incarnation": row.get("incarnation"),
        "status": row.get("status"),
    }
    if "num_running" not in row:
        return load
    if "core" in sections:
        load |= _core(row)
    if "memory" in sections:
        pool_bytes = row["num_pages"] * row["bytes_per_page"]
        load["memory"] = {"kv_cache_gb": pool_bytes / (1 << 30), "token_capacity": row["num_pages"] * row["page_size"]}
    if "queues" in sections:
        load["queues"] = {"waiting": row["num_waiting"]}
    return load


def _core(row: Mapping[str, Any]) -> dict[str, Any]:
    page_size, num_pages = row["page_size"], row["num_pages"]
    # Cached pages that nobody uses can be taken at any time; they count as free, as SGLang counts them.
    num_used = num_pages - row["num_free_pages"] - row["num_cached_pages"]
    counters = row["counters"]
    return {
        "num_running_reqs": row["num_running"],
        "num_waiting_reqs": row["num_waiting"],
        # An upper bound: prefixes are looked up at admission, never while a request waits.
        "num_waiting_uncached_tokens": row["num_waiting_tokens"],
        "num_total_reqs": row["num_running"] + row["num_waiting"],
        "num_used_tokens": num_used * page_size,
        "max_total_num_tokens": num_pages * page_size,
        "token_usage": num_used / num_pages,
        "gen_throughput": row["generated_tokens_per_s"],
        "cache_hit_rate": counters["num_cached_tokens"] / max(1, counters["num_admitted_tokens"]),
        "utilization": row["num_running"] / row["max_running"],
        "max_running_requests": row["max_running"],
        "epoch": row["epoch"],
    }
