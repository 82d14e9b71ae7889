"""A node's agent as a Ray actor: `host-tier-<node>`, one per node, detached, restarted by Ray.

A thin shell around actors/node_agent.py and actors/host_store.py. It is made by the controller, on its node and outside
of every rank's placement group, and outlives them all.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Sequence
from typing import Any

import ray

from actors.clock import BootClock
from actors.detached import find_actor
from actors.end_proofs import LocalEnd, pause, pid_namespace
from actors.host_messages import HostCaller, HostClaim, HostDropOrder, HostDropped, HostPending, HostPlace, HostRefused
from actors.host_store import HostStore, StoreSurroundings
from actors.messages import FloorAnswer, ProcessName
from actors.metrics import TierMetrics
from actors.node_agent import AgentSurroundings, NodeAgent
from actors.node_files import NodeFiles
from actors.node_processes import NodeProcesses
from cache.host_tier import CommitOutcome
from cache.page_checksum import PageEntry
from cache.slot_owners import SlotLease, SlotRef
from configs.schema import Settings

log = logging.getLogger(__name__)

#: exit status when the agent can go on no longer; Ray starts it again
_EXIT_FAILED = 73
_REPORT_PERIOD_S = 1.0


class NodeAgentActor:
    """A plain class, wrapped where it is created (actors/controller.py)."""

    async def __init__(self, settings: Settings, node_id: str, controller_name: str) -> None:
        files, clock, namespace = NodeFiles(settings, node_id), BootClock(), pid_namespace()
        self._host = HostStore(
            settings.host_tier,
            StoreSurroundings(
                directory=str(files.arena.directory),
                file_name=files.arena.name,
                open_file=files.open_arena,
                processes=NodeProcesses(),
                until_gone=lambda name: self._agent.until_gone(name),
                in_thread=asyncio.to_thread,
                pid_namespace=namespace,
                has_file=files.has_arena,
                discard_file=files.discard_arena,
                used=files.used,
            ),
        )
        around = AgentSurroundings(
            clock=clock,
            node_id=node_id,
            directory=str(files.page.directory),
            file_name=files.page.name,
            open_file=files.open_page,
            find_controller=lambda: asyncio.to_thread(find_actor, controller_name),
            own_handle=ray.get_runtime_context().current_actor,
            find_process=LocalEnd.of,
            pid_namespace=namespace,
            in_thread=asyncio.to_thread,
            host=self._host if settings.host_tier.is_on else None,
        )
        self._agent = NodeAgent(around)
        self._metrics = TierMetrics(node_id)
        self._running = asyncio.create_task(self._agent.run(), name="renew")
        self._running.add_done_callback(_must_not_end)
        self._tending = [asyncio.create_task(self._host.run_checks()), asyncio.create_task(self._report())]
        for tending in self._tending:
            tending.add_done_callback(_must_not_end)

    async def raise_floor(self, term: int, floor: int) -> FloorAnswer:
        """See NodeAgent.raise_floor."""
        return await self._agent.raise_floor(term, floor)

    async def until_gone(self, name: ProcessName) -> bool:
        """See NodeAgent.until_gone."""
        return await self._agent.until_gone(name)

    async def hello(self) -> dict[str, Any]:
        """Sign of life: pid, node, lineage, floor and lease on the page."""
        return self._agent.facts()

    # --- the host tier, for ranks of this node: see HostStore ---------------------------------------------------------

    async def claim_host(self, claim: HostClaim) -> HostPlace | HostPending | HostRefused:
        """See HostStore.claim."""
        return await self._host.claim(claim)

    async def lease_slots(self, caller: HostCaller, num_slots: int) -> SlotLease | None:
        """See HostStore.lease."""
        return await self._host.lease(caller, num_slots)

    async def commit_pages(self, caller: HostCaller, entries: Sequence[PageEntry]) -> list[CommitOutcome] | None:
        """See HostStore.commit."""
        return await self._host.commit(caller, entries)

    async def reconcile_slots(self, caller: HostCaller, held: Sequence[SlotRef]) -> list[SlotRef] | None:
        """See HostStore.reconcile."""
        return await self._host.reconcile(caller, held)

    async def tell_host(
        self, caller: HostCaller, returned: Sequence[SlotRef], touched: Sequence[SlotRef], corrupt: Sequence[SlotRef]
    ) -> bool:
        """See HostStore.tell."""
        return await self._host.tell(caller, returned, touched, corrupt)

    async def leave_host(self, incarnation: str) -> bool:
        """See HostStore.leave."""
        return await self._host.leave(incarnation)

    # --- the host tier, for the controller ----------------------------------------------------------------------------

    async def drop_host(self, order: HostDropOrder) -> HostDropped:
        """See NodeAgent.drop_host."""
        return await self._agent.drop_host(order)

    async def _report(self) -> None:
        while True:
            report = self._host.report()
            if report is None:
                return
            self._metrics.report(report, self._host.events)
            await pause(_REPORT_PERIOD_S)


def _must_not_end(done: asyncio.Task[None]) -> None:
    """An agent that renews no more must not look alive: its node would stay uncached for ever."""
    if done.cancelled() or (done.exception() is None and done.get_name() != "renew"):
        return  # switched off by the settings
    log.critical("the agent ends: it can go on no longer", exc_info=done.exception())
    logging.shutdown()
    os._exit(_EXIT_FAILED)
