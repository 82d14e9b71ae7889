"""What GET /v1/cache says beyond the controller's own status: how full each tier is. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_STATES = ("free", "cached", "pinned", "private", "fenced", "copying")


def cache_report(status: Mapping[str, Any]) -> dict[str, Any]:
    """The controller's status with `occupancy`: a row for each tier, over all ranks or nodes that answered.

    {tier, num_pages, num_<state>_pages, bytes, cached_bytes, used}: `cached_bytes` is what a flush could free,
    `used` the share of pages that are not free. Of a host tier, leased slots count as private, and as fenced those that
    nobody finds any more and that are not given back yet. An answer without rows of ranks (a refusal) comes back as
    it is.
    """
    if "ranks" not in status:
        return dict(status)
    devices = [_device(row) for row in status["ranks"] if "num_pages" in row]
    hosts = [_host(row) for row in status.get("host_tiers") or ()]
    rows = [_together("device", devices)] + ([_together("host", hosts)] if "host" in status["tiers"] else [])
    return {**status, "occupancy": rows}


def _device(row: Mapping[str, Any]) -> dict[str, int]:
    pages = {f"num_{state}_pages": row[f"num_{state}_pages"] for state in _STATES}
    return _with_bytes(row["num_pages"], pages, row["bytes_per_page"])


def _host(row: Mapping[str, Any]) -> dict[str, int]:
    pages = {
        "num_free_pages": row["free"],
        "num_cached_pages": row["valid"],
        "num_pinned_pages": 0,
        "num_private_pages": row["leased"],
        "num_fenced_pages": row["committed"] - row["valid"] + row["quarantined"],
        "num_copying_pages": 0,
    }
    return _with_bytes(row["num_slots"], pages, row["page_bytes"])


def _with_bytes(num_pages: int, pages: dict[str, int], page_bytes: int) -> dict[str, int]:
    sizes = {"bytes": num_pages * page_bytes, "cached_bytes": pages["num_cached_pages"] * page_bytes}
    return {"num_pages": num_pages} | pages | sizes


def _together(tier: str, parts: Sequence[Mapping[str, int]]) -> dict[str, Any]:
    names = ("num_pages", *(f"num_{state}_pages" for state in _STATES), "bytes", "cached_bytes")
    total = {name: sum(part[name] for part in parts) for name in names}
    used = 1 - total["num_free_pages"] / total["num_pages"] if total["num_pages"] else 0.0
    return {"tier": tier, **total, "used": round(used, 4)}
