"""What the controller knows of each node: its control page, the floor on it, its lease, its clock. Pure."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any

from actors.lease_book import LeaseBook
from actors.messages import HostReport, NodeRenewal, PagePlace, RankRecord
from actors.node_clock import NodeClock


@dataclass(slots=True)
class _Node:
    page: PagePlace | None = None
    #: on that page, as the agent last said; the page may have a higher one
    floor: int = 0
    clock: NodeClock = field(default_factory=NodeClock)
    #: their time of the newest renewal, our time when it came
    sent_s: float = -math.inf
    heard_s: float = -math.inf
    #: why its last renewal got no lease; "" if it got one
    refusal: str = ""
    #: its host tier as its agent last said; None: it has none
    host: HostReport | None = None


class NodeBook:
    """Nodes by id; one is known from its first renewal on."""

    def __init__(self, leases: LeaseBook, own_node_id: str, own_boot_id: str, is_one_machine: bool) -> None:
        """own_node_id: where the controller runs; its clock is the controller's own.
        is_one_machine: the log is only this machine's, so nodes of others may not have a lease.
        """
        self.leases = leases
        self._own_node_id = own_node_id
        self._own_boot_id = own_boot_id
        self._is_one_machine = is_one_machine
        self._nodes: dict[str, _Node] = {}

    def renew(self, renewal: NodeRenewal, now_s: float) -> str | None:
        """Take in what an agent says and decide about its lease: None, it has one from now on; else why it has none."""
        node = self._nodes.setdefault(renewal.node_id, _Node())
        if renewal.sent_s < node.sent_s:
            return "a newer renewal came before this one"
        node.sent_s, node.heard_s = renewal.sent_s, now_s
        node.clock.heard(renewal.sent_s, now_s)
        is_same_file = node.page is not None and renewal.page is not None and node.page.nonce == renewal.page.nonce
        # a floor that was raised meanwhile may have been told before this renewal came
        node.floor = max(node.floor, renewal.floor) if is_same_file else renewal.floor
        node.page, node.host = renewal.page, renewal.host
        refusal = self._why_not(renewal, now_s)
        node.refusal = refusal or ""
        if refusal is None:
            self.leases.grant(renewal.node_id, now_s)
        return refusal

    def floor_raised(self, node_id: str, nonce: int, floor: int) -> None:
        """The agent says that this floor is on the page of this file."""
        node = self._nodes.get(node_id)
        if node is not None and node.page is not None and node.page.nonce == nonce:
            node.floor = max(node.floor, floor)

    def is_fenced(self, record: RankRecord, epoch: int) -> bool:
        """Whatever this rank has not matched yet it will match under `epoch` or a later one, or not at all."""
        node = self._nodes.get(record.node_id)
        if node is None or node.page is None:
            return False
        return node.page.nonce == record.page_nonce != 0 and node.floor >= epoch

    def lease_over_s(self, node_id: str) -> float:
        return self.leases.over_s(node_id)

    def floor_on(self, node_id: str) -> int:
        """The floor on a node's page, as last heard; the page may have a higher one."""
        node = self._nodes.get(node_id)
        return 0 if node is None else node.floor

    def host(self, node_id: str) -> HostReport | None:
        """The host tier of a node as last reported; None: it has none, or has not been heard of."""
        node = self._nodes.get(node_id)
        return None if node is None else node.host

    def host_nodes(self) -> list[str]:
        """Nodes that have a host tier, silent ones included; in order."""
        return sorted(id for id, node in self._nodes.items() if node.host)

    def host_row(self, node_id: str) -> dict[str, Any]:
        """A node's host tier as plain data."""
        return {"node": node_id} | asdict(self.host(node_id) or HostReport("unknown"))

    def page(self, node_id: str) -> PagePlace | None:
        """The control page of a node that has been heard of; None: it has none yet."""
        node = self._nodes.get(node_id)
        return None if node is None else node.page

    def boot_s(self, node_id: str, now_s: float) -> float | None:
        """What the node's CLOCK_BOOTTIME shows at least; None: nothing was heard of it since the controller began."""
        if node_id == self._own_node_id:
            return now_s
        node = self._nodes.get(node_id)
        return None if node is None else node.clock.reads_at_least(now_s)

    def silent_s(self, node_id: str, now_s: float) -> float:
        """Since its agent was last heard of; infinite if never."""
        node = self._nodes.get(node_id)
        return math.inf if node is None else now_s - node.heard_s

    def refusal(self, node_id: str) -> str:
        """Why the node's last renewal got no lease."""
        node = self._nodes.get(node_id)
        return "its agent has not been heard of" if node is None else node.refusal

    def row(self, node_id: str, now_s: float) -> dict[str, Any]:
        """A node as plain data."""
        node = self._nodes.get(node_id, _Node())
        return {
            "node": node_id,
            "floor": node.floor,
            "has_lease": not self.leases.is_over(node_id, now_s) and node.refusal == "" and node.page is not None,
            "silent_s": round(now_s - node.heard_s, 3) if node.page is not None else None,
            "message": self.refusal(node_id),
        }

    def _why_not(self, renewal: NodeRenewal, now_s: float) -> str | None:
        if self._is_one_machine and renewal.boot_id != self._own_boot_id:
            return "it is another machine than the controller's, whose log serves one machine (configs: control.log)"
        if renewal.page is None:
            return "it has no control page yet"
        return self.leases.why_not(renewal.node_id, now_s)
