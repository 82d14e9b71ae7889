"""The host tiers of all nodes in one flush: who must be told, what they did, their rows of the answer. Pure.

A flush of all tiers, or one with a scope, needs no word of a host tier: the epoch and the sub-epoch are in the keys of
all pages that ranks look for after it, so nobody finds an older one. What a tier then does is give memory back. Told,
and waited for, is a tier that is flushed alone, and one whose pages are to go by their age.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Protocol

from actors.flush_plan import FlushPlan
from actors.messages import HostReport

_GOOD = frozenset({"flushed", "expired"})


class HostNodes(Protocol):
    """What is asked of the nodes; `NodeBook` answers."""

    def host(self, node_id: str) -> HostReport | None: ...
    def host_nodes(self, now_s: float) -> list[str]: ...
    def floor_on(self, node_id: str) -> int: ...


@dataclass(slots=True)
class _HostRow:
    is_told: bool = False
    status: str = ""
    message: str = ""
    freed_pages: int = 0
    freed_bytes: int = 0


class HostRows:
    """What each node's tier did about one flush. Empty if the flush leaves the host tier alone, or there is none."""

    def __init__(self, plan: FlushPlan, nodes: HostNodes) -> None:
        self._plan = plan
        self._nodes = nodes
        self._rows: dict[str, _HostRow] = {}

    def begin(self, node_ids: Iterable[str], now_s: float) -> list[str]:
        """node_ids: of the ranks that are flushed. The nodes whose tiers have to be told, in order."""
        if "host" not in self._plan.request.tiers:
            return []
        known = {node_id for node_id in node_ids if self._nodes.host(node_id) is not None}
        self._rows = {node_id: _HostRow() for node_id in sorted(known.union(self._nodes.host_nodes(now_s)))}
        for node_id, row in self._rows.items():
            report = self._nodes.host(node_id)
            # as last reported, at most one renewal ago; the tier's own word replaces it where it comes in time
            if report is not None and self._plan.request.scope is None:
                self.voided(node_id, report.valid, report.valid * report.page_bytes)
            row.is_told = self._plan.tells_hosts
        return [node_id for node_id, row in self._rows.items() if row.is_told]

    def voided(self, node_id: str, num_pages: int, num_bytes: int) -> None:
        """So many pages of this tier are found no more."""
        row = self._rows.get(node_id)
        if row is not None:
            row.freed_pages, row.freed_bytes = num_pages, num_bytes

    def answered(self, node_id: str, num_pages: int, num_bytes: int) -> None:
        """The tier has done what it was told."""
        self.voided(node_id, num_pages, num_bytes)
        self._settle(node_id, "flushed", "")

    def failed(self, node_id: str, message: str) -> None:
        """The tier did not do it, or nobody knows."""
        self._settle(node_id, "unreachable", message)

    @property
    def is_settled(self) -> bool:
        """No tier that was told owes its word."""
        return all(row.status for row in self._rows.values() if row.is_told)

    def close(self, epoch: int, are_ranks_flushed: bool) -> None:
        """Speak for those that were not told, and for those that did not answer."""
        for node_id, row in self._rows.items():
            if row.status:
                continue
            if row.is_told:
                row.status, row.message = "unreachable", "its node's agent did not answer by the deadline"
            elif are_ranks_flushed or (self._plan.takes_epoch and self._nodes.floor_on(node_id) >= epoch > 0):
                row.status = "flushed"
            else:
                row.status, row.message = "refused", "not every rank has flushed: this tier keeps what it holds"
                row.freed_pages = row.freed_bytes = 0

    @property
    def complaint(self) -> str:
        """What keeps the flush from being a success; "": nothing."""
        bad = [
            f"host tier of {node_id}: {row.message}" for node_id, row in self._rows.items() if row.status not in _GOOD
        ]
        return "; ".join(bad)

    def plain(self) -> list[dict[str, Any]]:
        """The rows as plain data."""
        return [
            {
                "node": node_id,
                "status": row.status,
                "message": row.message,
                "freed_pages": row.freed_pages,
                "freed_bytes": row.freed_bytes,
            }
            for node_id, row in self._rows.items()
        ]

    def _settle(self, node_id: str, status: str, message: str) -> None:
        row = self._rows.get(node_id)
        if row is not None and not row.status:
            row.status, row.message = status, message
