"""The ranks' states as rows of SGLang's /v1/loads, for both doors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from configs.errors import InvalidField

#: sections that SGLang knows; those that have nothing to say here are left out of a row, as there
LOAD_SECTIONS = frozenset({"core", "memory", "spec", "lora", "disagg", "queues"})


@dataclass(frozen=True, slots=True)
class Loads:
    """What a caller is shown of the ranks."""

    rows: list[dict[str, Any]]
    #: all that are registered, shown or not
    num_ranks: int
    #: why a rank's load is missing; empty if every rank that is shown has answered
    message: str


def loads_of(status: Mapping[str, Any], sections: frozenset[str], dp_rank: str | None) -> Loads:
    """Rows of the controller's `status()`, silent ranks included. dp_rank: the one wanted, None: all.

    Raises InvalidField if ranks are registered and none of them has that number.
    """
    ranks: list[dict[str, Any]] = status.get("ranks") or []
    shown = [row for row in ranks if dp_rank is None or str(row["rank"]) == dp_rank]
    if ranks and not shown:
        raise InvalidField(f"dp_rank: there is no rank {str(dp_rank)[:20]!r}", "dp_rank")
    has_all = all("num_running" in row for row in shown) and bool(shown)
    message = "" if has_all else str(status.get("message") or "a rank does not answer")
    return Loads([_load_row(row, sections) for row in shown], len(ranks), message)


def _load_row(row: Mapping[str, Any], sections: frozenset[str]) -> dict[str, Any]:
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
