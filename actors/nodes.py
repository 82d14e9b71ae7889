"""The agents of all nodes as the controller deals with them: leases out of renewals, floors on their pages."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterable
from typing import Any, TypeAlias

from actors.clock import Clock
from actors.host_messages import HostDropOrder, HostDropped
from actors.log_records import LogState
from actors.messages import MESSAGE_VERSION, FloorAnswer, LeaseAnswer, NodeRenewal, PagePlace
from actors.node_book import NodeBook
from actors.ray_errors import Answered, outcome_of
from configs.errors import InvalidField

log = logging.getLogger(__name__)

#: leases are renewed, and the log is checked, this often in a lease time
RENEWALS_PER_LEASE = 5
#: makes a node's agent if there is none; may fail, and is tried again
EnsureAgent: TypeAlias = Callable[[str], Awaitable[None]]


class Nodes:
    """Lives on one asyncio loop."""

    def __init__(
        self,
        book: NodeBook,
        state: LogState,
        clock: Clock,
        ensure_agent: EnsureAgent,
        changed: Callable[[str], None],
        outranked: Callable[[], None],
    ) -> None:
        """state: the log as it is stored.  changed: a node was heard of, or its floor has risen.
        outranked: a page obeys a higher term than ours.
        """
        self.book = book
        self._state = state
        self._clock = clock
        self._ensure_agent = ensure_agent
        self._tell_changed = changed
        self._tell_outranked = outranked
        self._agents: dict[str, Any] = {}
        self._making: dict[str, asyncio.Task[None]] = {}
        self._renewed = asyncio.Event()

    def renew(self, renewal: NodeRenewal, handle: Any) -> LeaseAnswer:
        """An agent asks for a lease. Raises InvalidField if it speaks another message version."""
        if renewal.message_version != MESSAGE_VERSION:
            message = f"agent speaks message version {renewal.message_version}, the controller {MESSAGE_VERSION}"
            raise InvalidField(message, "message_version")
        self._agents[renewal.node_id] = handle
        refusal = self.book.renew(renewal, self._clock.now_s())
        self._note(renewal.node_id)
        state = self._state
        lease_s = self.book.leases.lease_s
        return LeaseAnswer(
            state.lineage,
            state.term,
            state.floor_of(renewal.node_id),
            lease_s=lease_s if refusal is None else 0.0,
            period_s=lease_s / RENEWALS_PER_LEASE,
            message=refusal or "",
            host_drop=state.host_drop_of(renewal.node_id),
        )

    async def raise_floor(self, node_id: str, floor: int) -> FloorAnswer | None:
        """Have a stored floor put on a node's page. Returns when its agent has answered, None if its call has failed
        or it obeys a higher term."""
        handle = self._agents.get(node_id)
        if handle is None:
            return None
        outcome = await outcome_of(handle.raise_floor.remote(self._state.term, floor))
        if not isinstance(outcome, Answered):
            return None
        answer: FloorAnswer = outcome.value
        if answer.is_refused:
            self._tell_outranked()
            return None
        self.book.floor_raised(node_id, answer.nonce, answer.floor)
        self._note(node_id)
        return answer

    async def drop_host(
        self, node_id: str, index: int, older_than_s: float | None, valid_until_s: float
    ) -> HostDropped:
        """Have a node's host tier drop all its pages, or those older than an age, for the flush with this log index.

        Waits for a node that has not been heard of.  valid_until_s: of the controller's clock.
        """
        if not await self._until(lambda: self._is_heard(node_id), valid_until_s):
            return HostDropped(0, 0, "its node's agent has not been heard of")
        now_s = self._clock.now_s()
        boot_s = self.book.boot_s(node_id, now_s)
        assert boot_s is not None, "a node that was heard of has a clock"
        order = HostDropOrder(index, older_than_s, self._state.term, boot_s + valid_until_s - now_s)
        outcome = await outcome_of(self._agents[node_id].drop_host.remote(order))
        return outcome.value if isinstance(outcome, Answered) else HostDropped(0, 0, outcome.message)

    def host_rows(self, node_ids: Iterable[str]) -> list[dict[str, Any]]:
        """Host tiers as plain data; none of a node that has none."""
        return [self.book.host_row(node_id) for node_id in sorted(node_ids) if self.book.host(node_id) is not None]

    async def ready(self, node_id: str, timeout_s: float) -> PagePlace | None:
        """The page of a node that has a lease: at once, or when its agent has got one. None: not within the time."""
        self.ensure(node_id)
        has_lease = await self._until(lambda: self._has_lease(node_id), self._clock.now_s() + timeout_s)
        return self.book.page(node_id) if has_lease else None

    def ensure(self, node_id: str) -> None:
        """Begin to make the node's agent if it has not been heard of for a lease time."""
        is_silent = self.book.silent_s(node_id, self._clock.now_s()) > self.book.leases.lease_s
        if is_silent and node_id not in self._making:
            making = self._making[node_id] = asyncio.create_task(self._make(node_id), name=f"agent-{node_id}")
            making.add_done_callback(lambda done: self._making.pop(node_id, None))

    def agent(self, node_id: str) -> Any | None:
        """Handle of a node's agent; None if it has not been heard of."""
        return self._agents.get(node_id)

    def rows(self, node_ids: Iterable[str]) -> list[dict[str, Any]]:
        """Nodes as plain data."""
        now_s = self._clock.now_s()
        return [self.book.row(node_id, now_s) for node_id in sorted(node_ids)]

    def close(self) -> None:
        for making in self._making.values():
            making.cancel()

    def _is_heard(self, node_id: str) -> bool:
        return node_id in self._agents

    def _has_lease(self, node_id: str) -> bool:
        return self.book.page(node_id) is not None and not self.book.refusal(node_id)

    async def _until(self, holds: Callable[[], bool], until_s: float) -> bool:
        """Wait for what renewals can make true. False: it was not by then."""
        while not holds():
            left_s = until_s - self._clock.now_s()
            if left_s <= 0:
                return False
            waiting = asyncio.ensure_future(self._renewed.wait())
            await asyncio.wait({waiting}, timeout=left_s)
            waiting.cancel()
        return True

    def _note(self, node_id: str) -> None:
        self._renewed.set()
        self._renewed = asyncio.Event()
        self._tell_changed(node_id)

    async def _make(self, node_id: str) -> None:
        try:
            await self._ensure_agent(node_id)
        except OSError as error:
            log.warning("no agent could be made on node %s: %s", node_id, error)
