"""A node's agent of production around a control page in plain memory: no Ray, no file."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import numpy as np
import ray.exceptions

from actors.clock import BootClock, Clock
from actors.end_proofs import EndProof, LocalEnd
from actors.host_store import HostStore
from actors.messages import ProcessName
from actors.node_agent import AgentSurroundings, NodeAgent
from cache.control_page import NUM_CONTROL_WORDS, ControlPageWriter, FileIdentity
from tests.unit.actors.fakes import Remote


class MemoryFile:
    """A control page that is not in a file."""

    def __init__(self, lineage: str, nonce: int) -> None:
        self.page = ControlPageWriter(np.zeros(NUM_CONTROL_WORDS, np.uint64), lambda: None)
        self.page.initialise(FileIdentity(lineage), nonce)

    def retire(self) -> None:
        self.page.retire()

    def close(self) -> None:
        """Memory needs none."""


class FakeNode:
    """One node: an agent that can be killed, frozen and cut off, and the page that outlives it."""

    def __init__(
        self,
        node_id: str,
        controller: Callable[[], Any],
        clock: Clock | None = None,
        host: HostStore | None = None,
    ) -> None:
        """controller: the handle that the agent finds now; None: there is none.  host: its host tier, if it has one."""
        self.node_id = node_id
        self.host = host
        self.clock = clock or BootClock()
        self.file: MemoryFile | None = None
        self.agent: NodeAgent
        self.find_process: Callable[[ProcessName], EndProof | None] = LocalEnd.of
        self._controller = controller
        self._nonce = 1000
        #: cleared: calls of the agent wait, and it renews nothing
        self._thawed = asyncio.Event()
        self._thawed.set()
        self._running: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Start the agent's process, again after `kill`."""
        around = AgentSurroundings(
            clock=self.clock, node_id=self.node_id, directory="/memory", file_name=self.node_id,
            open_file=self._open_file, find_controller=self._find_controller, own_handle=self,
            find_process=lambda name: self.find_process(name), pid_namespace="here", in_thread=asyncio.to_thread,
            host=self.host,
        )  # fmt: skip
        self.agent = NodeAgent(around)
        self._running = asyncio.create_task(self.agent.run(), name=f"agent-of-{self.node_id}")

    def kill(self) -> None:
        """The process ends; its page stays as it is."""
        assert self._running is not None
        self._running.cancel()
        self._running = None
        self.agent.close()

    def close(self) -> None:
        if self._running is not None:
            self.kill()

    def freeze(self) -> None:
        self._thawed.clear()

    def thaw(self) -> None:
        self._thawed.set()

    @property
    def floor(self) -> int:
        assert self.file is not None
        return self.file.page.read().floor

    @property
    def lease_left_s(self) -> float:
        assert self.file is not None
        return self.file.page.read().lease_end_ns / 1e9 - self.clock.now_s()

    @property
    def raise_floor(self) -> Remote:
        return Remote(self._call(lambda: self.agent.raise_floor))

    @property
    def until_gone(self) -> Remote:
        return Remote(self._call(lambda: self.agent.until_gone))

    @property
    def drop_host(self) -> Remote:
        return Remote(self._call(lambda: self.agent.drop_host))

    def _call(self, method: Callable[[], Callable[..., Awaitable[Any]]]) -> Callable[..., Awaitable[Any]]:
        async def call(*args: Any) -> Any:
            if self._running is None:
                raise ray.exceptions.ActorUnavailableError("the agent is gone", None)
            await self._thawed.wait()
            return await method()(*args)

        return call

    def _open_file(self, lineage: str) -> MemoryFile:
        if self.file is None or self.file.page.read().is_retired:
            self._nonce += 1
            self.file = MemoryFile(lineage, self._nonce)
        return self.file

    async def _find_controller(self) -> Any:
        return None if self._controller() is None else _Controller(self)

    async def renew(self, *args: Any) -> Any:
        """The agent's call of whoever is the controller now."""
        await self._thawed.wait()
        controller = self._controller()
        if controller is None:
            raise ray.exceptions.ActorUnavailableError("there is no controller", None)
        return await controller.renew(*args)


class _Controller:
    """The controller as one node reaches it."""

    def __init__(self, node: FakeNode) -> None:
        self.renew = Remote(node.renew)
