"""The host tiers of all nodes in one flush: who must be told, what they did, their rows of the answer. Pure.

A flush of all tiers, or one with a scope, needs no word of a host tier: the epoch and the sub-epoch are in the keys of
all pages that ranks look for after it, so nobody finds an older one. Told, and waited for, is a tier that is flushed
alone, and one whose pages are to go by their age; waited for is also the floor of the modes that raise it first. A
node out of lease reads nothing, and with its next lease it is told what it missed (`LeaseAnswer`).
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
    def host_nodes(self) -> list[str]: ...
    def floor_on(self, node_id: str) -> int: ...
    def lease_over_s(self, node_id: str) -> float: ...


@dataclass(slots=True)
class _HostRow:
    status: str = ""
    message: str = ""
    freed_pages: int = 0
    freed_bytes: int = 0
    #: why it has not done what it was told
    failure: str = ""
    #: its agent has answered that the floor is on its page
    has_floor: bool = False


class HostRows:
    """What each node's tier did about one flush. Empty if the flush leaves the host tier alone, or there is none."""

    def __init__(self, plan: FlushPlan, nodes: HostNodes) -> None:
        self._plan = plan
        self._nodes = nodes
        self._rows: dict[str, _HostRow] = {}
        self._epoch = 0

    def look(self, node_ids: Iterable[str], epoch: int) -> list[str]:
        """The nodes whose tiers have to be told and were not yet, in order.

        node_ids: of the ranks that are flushed; to be told even if a controller that has just begun has heard of none
        of them.  epoch: that the flush allots, 0 for none.
        """
        if "host" not in self._plan.request.tiers:
            return []
        self._epoch = epoch
        tells = self._plan.tells_hosts
        known = {node_id for node_id in node_ids if tells or self._nodes.host(node_id) is not None}
        new = sorted(known.union(self._nodes.host_nodes()) - self._rows.keys())
        for node_id in new:
            self._rows[node_id] = self._new_row(node_id)
        return new if tells else []

    def floor_raised(self, node_id: str, num_pages: int, num_bytes: int) -> None:
        """The floor is on this node's page; so many pages of its tier are found no more."""
        row = self._rows.get(node_id)
        if row is not None:
            row.has_floor, row.freed_pages, row.freed_bytes = True, num_pages, num_bytes

    def answered(self, node_id: str, num_pages: int, num_bytes: int) -> None:
        """The tier has done what it was told."""
        row = self._rows.get(node_id)
        if row is not None:
            row.status, row.freed_pages, row.freed_bytes = "flushed", num_pages, num_bytes

    def failed(self, node_id: str, message: str) -> None:
        """The tier did not do it, or nobody knows."""
        row = self._rows.get(node_id)
        if row is not None and not row.status:
            row.failure = message

    def is_settled(self, now_s: float) -> bool:
        """No tier owes its word."""
        return all(self._is_over(node_id, now_s) for node_id in self.open_nodes)

    @property
    def open_nodes(self) -> list[str]:
        """Nodes whose tiers owe their word; they may do so no longer than they have a lease."""
        if self._plan.tells_hosts:
            return [node_id for node_id, row in self._rows.items() if not row.status and not row.failure]
        if self._plan.raises_floor_first:
            return [node_id for node_id, row in self._rows.items() if not self._has_floor(node_id, row)]
        return []

    def close(self, are_ranks_flushed: bool, now_s: float) -> None:
        """Speak for those that were not told, and for those that did not answer."""
        for node_id, row in self._rows.items():
            if not row.status:
                row.status, row.message = self._end_of(node_id, row, are_ranks_flushed, now_s)
                if row.status != "flushed":
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
            for node_id, row in sorted(self._rows.items())
        ]

    def _new_row(self, node_id: str) -> _HostRow:
        report = self._nodes.host(node_id)
        if report is None or self._plan.request.scope is not None:
            return _HostRow()
        # as last reported, at most one renewal ago; the tier's own word replaces it where it comes in time
        return _HostRow(freed_pages=report.valid, freed_bytes=report.valid * report.page_bytes)

    def _end_of(self, node_id: str, row: _HostRow, are_ranks_flushed: bool, now_s: float) -> tuple[str, str]:
        """Status and message of a tier that has said nothing."""
        if self._has_floor(node_id, row):
            return "flushed", ""
        owes_word = self._plan.tells_hosts or self._plan.raises_floor_first
        if not owes_word and not are_ranks_flushed:
            return "refused", "not every rank has flushed: this tier keeps what it holds"
        if not self._plan.request.dry_run and self._is_over(node_id, now_s):
            return "expired", "its node is out of lease: nothing of this tier is read until it has been told"
        if owes_word:
            return "unreachable", row.failure or "its node's agent did not answer by the deadline"
        return "flushed", ""

    def _has_floor(self, node_id: str, row: _HostRow) -> bool:
        return row.has_floor or self._nodes.floor_on(node_id) >= self._epoch > 0

    def _is_over(self, node_id: str, now_s: float) -> bool:
        return now_s >= self._nodes.lease_over_s(node_id)
