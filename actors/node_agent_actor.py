"""A node's agent as a Ray actor: `host-tier-<node>`, one per node, detached, restarted by Ray.

A thin shell around actors/node_agent.py. It is made by the controller, on its node and outside of every rank's
placement group, and outlives them all.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import secrets
import threading
from pathlib import Path
from typing import Any

import ray

from actors import file_keeper
from actors.clock import BootClock
from actors.detached import find_actor
from actors.end_proofs import LocalEnd, pid_namespace
from actors.messages import FloorAnswer, ProcessName
from actors.node_agent import AgentSurroundings, NodeAgent
from actors.node_processes import NodeProcesses
from cache.control_page import FileIdentity
from cache.orphans import sweep
from cache.shared_file import FileMaker, FilePaths, OwnedFile
from cache.shared_words import fence_for
from configs.schema import Settings

log = logging.getLogger(__name__)

#: exit status when the agent can go on no longer; Ray starts it again
_EXIT_FAILED = 73


class NodeAgentActor:
    """A plain class, wrapped where it is created (actors/controller.py)."""

    async def __init__(self, settings: Settings, node_id: str, controller_name: str) -> None:
        paths = node_file(settings, node_id)
        around = AgentSurroundings(
            clock=BootClock(),
            node_id=node_id,
            directory=str(paths.directory),
            file_name=paths.name,
            open_file=lambda lineage: self._open_file(paths, lineage),
            find_controller=lambda: asyncio.to_thread(find_actor, controller_name),
            own_handle=ray.get_runtime_context().current_actor,
            find_process=LocalEnd.of,
            pid_namespace=pid_namespace(),
            in_thread=asyncio.to_thread,
        )
        #: address of the process that removes the files at the cluster's end; "": none yet
        self._keeper = ""
        self._agent = NodeAgent(around)
        self._running = asyncio.create_task(self._agent.run(), name="renew")
        self._running.add_done_callback(_must_not_end)

    def _open_file(self, paths: FilePaths, lineage: str) -> OwnedFile:
        """In a thread of its own."""
        if not self._keeper:
            self._keeper = file_keeper.start([paths.stem])
        return _open_file(paths, lineage)

    async def raise_floor(self, term: int, floor: int) -> FloorAnswer:
        """See NodeAgent.raise_floor."""
        return await self._agent.raise_floor(term, floor)

    async def until_gone(self, name: ProcessName) -> bool:
        """See NodeAgent.until_gone."""
        return await self._agent.until_gone(name)

    async def hello(self) -> dict[str, Any]:
        """Sign of life: pid, node, lineage, floor and lease on the page."""
        return self._agent.facts()


class _LockClock:
    """Time as the writer's lock needs it; only used aside from the loop."""

    def __init__(self) -> None:
        self._clock = BootClock()
        self._never = threading.Event()

    def now_s(self) -> float:
        return self._clock.now_s()

    def pause_s(self, duration_s: float) -> None:
        self._never.wait(duration_s)


def node_file(settings: Settings, node_id: str) -> FilePaths:
    """Where a node's shared file lies."""
    return FilePaths(settings.control.shared_dir, f"{settings.ray.deployment}-{node_id[:12]}")


def _open_file(paths: FilePaths, lineage: str) -> OwnedFile:
    fence = fence_for(platform.machine())
    removed = sweep(Path(paths.directory), fence, keep=[paths.name])
    if removed:
        log.info("removed the shared files of dead deployments: %s", ", ".join(removed))
    maker = FileMaker(FileIdentity(lineage), NodeProcesses(), _LockClock(), fence, nonce=secrets.randbits(62) + 1)
    return maker.open(paths)


def _must_not_end(done: asyncio.Task[None]) -> None:
    """An agent that renews no more must not look alive: its node would stay uncached for ever."""
    if not done.cancelled():
        log.critical("the agent ends: it can renew no longer", exc_info=done.exception())
        logging.shutdown()
        os._exit(_EXIT_FAILED)
