"""What GET /v1/cache says beyond the controller's own status: how full each tier is. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_STATES = ("free", "cached", "pinned", "private", "fenced")


def cache_report(status: Mapping[str, Any]) -> dict[str, Any]:
    """The controller's status with `occupancy`: a row for each tier, over all ranks that answered.

    {tier, num_pages, num_<state>_pages, bytes, cached_bytes, used}: `cached_bytes` is what a flush could free,
    `used` the share of pages that are not free. An answer without rows of ranks (a refusal) comes back as it is.
    """
    if "ranks" not in status:
        return dict(status)
    return {**status, "occupancy": [_device(status["ranks"])]}


def _device(rows: list[Mapping[str, Any]]) -> dict[str, Any]:
    known = [row for row in rows if "num_pages" in row]
    pages = {f"num_{state}_pages": sum(row[f"num_{state}_pages"] for row in known) for state in _STATES}
    num_pages = sum(row["num_pages"] for row in known)
    return {
        "tier": "device",
        "num_pages": num_pages,
        **pages,
        "bytes": sum(row["num_pages"] * row["bytes_per_page"] for row in known),
        "cached_bytes": sum(row["num_cached_pages"] * row["bytes_per_page"] for row in known),
        "used": round(1 - pages["num_free_pages"] / num_pages, 4) if num_pages else 0.0,
    }
