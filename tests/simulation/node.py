"""One machine: its clock, the file that its processes share, and the agent that writes it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

from actors.messages import ProcessName
from actors.node_agent import AgentSurroundings, NodeAgent
from cache.control_page import FileIdentity, NodeWords
from tests.fake_host import FakeTier
from tests.simulation.network import Handle, Network
from tests.simulation.virtual_loop import Process, VirtualLoop
from tests.unit.actors.nodes import MemoryFile

_NS = 1_000_000_000


class NodeTime:
    """CLOCK_BOOTTIME of one machine: another zero and a slightly other pace than those of the others."""

    def __init__(self, loop: VirtualLoop, boot_id: str, offset_s: float, rate: float) -> None:
        self.boot_id = boot_id
        self._loop = loop
        self._offset_s = offset_s
        self._rate = rate
        self._num_texts = 0

    def now_s(self) -> float:
        return self._offset_s + self._rate * self._loop.time()

    def now_ns(self) -> int:
        return int(self.now_s() * _NS)

    def wall_text(self) -> str:
        """No two are alike: with it the oracle knows flushes of one id apart."""
        self._num_texts += 1
        return f"{self._loop.time():.3f} {self.boot_id} {self._num_texts}"


class NodeFile(MemoryFile):
    """A node's file, with the lineage that it was made for."""

    def __init__(self, lineage: str, nonce: int) -> None:
        super().__init__(lineage, nonce)
        self.lineage = lineage

    def belongs_to(self, lineage: str) -> bool:
        return FileIdentity(lineage).difference(self.page) is None


class ProcessEnd:
    """What the kernel of a node tells of one of its processes."""

    def __init__(self, process: Process) -> None:
        self._process = process

    async def until_gone(self) -> None:
        await self._process.ended.wait()

    def close(self) -> None:
        """Nothing is held."""


class Node:
    """The machine outlives its agent, and the file does so too."""

    def __init__(
        self, node_id: str, network: Network, time: NodeTime, find_controller: Callable[[str], Handle | None]
    ) -> None:
        """find_controller: whom the name of the controller stands for on this node now."""
        self.node_id = node_id
        self.time = time
        #: of the process whose pid is the index
        self.processes: list[Process] = []
        self.file: NodeFile | None = None
        #: what the ranks of this node share of their KV, if they share it
        self.tier = FakeTier()
        self.agent: NodeAgent
        self.agent_process: Process
        self._network = network
        self._find_controller = find_controller
        self._num_files = 0
        self.start_agent()

    def begin_process(self, name: str) -> tuple[Process, int]:
        """A new process of this machine, and its pid."""
        process = Process(self._network.loop, name)
        self._network.attach(process, self.node_id)
        self.processes.append(process)
        return process, len(self.processes) - 1

    def find_process(self, name: ProcessName) -> ProcessEnd | None:
        process = self.processes[name.pid]
        return None if process.is_dead else ProcessEnd(process)

    def start_agent(self) -> None:
        """Begin a new agent; the one before has ended."""
        process, _ = self.begin_process(f"agent-{self.node_id}")
        handle = Handle(self._network, process, None)
        around = AgentSurroundings(
            clock=self.time, node_id=self.node_id, directory="/memory", file_name=self.node_id,
            open_file=self._open_file, find_controller=self._look_up_controller, own_handle=handle,
            find_process=self.find_process, pid_namespace="", in_thread=self._in_thread,
        )  # fmt: skip
        self.agent = handle.actor = NodeAgent(around)
        self.agent_process = process
        process.spawn(self.agent.run())

    def ensure_agent(self) -> None:
        """What the controller asks for: an agent, if there is none."""
        if self.agent_process.is_dead:
            self.start_agent()

    @property
    def nonce(self) -> int:
        """Of the file; 0: there is none."""
        return 0 if self.file is None else self.file.page.nonce

    def words(self) -> NodeWords | None:
        """What is on the page now; None: there is none."""
        return None if self.file is None else self.file.page.read()

    def _open_file(self, lineage: str) -> NodeFile:
        if self.file is None or self.file.page.read().is_retired or not self.file.belongs_to(lineage):
            self._num_files += 1
            self.file = NodeFile(lineage, nonce=1000 + self._num_files)
        return self.file

    async def _look_up_controller(self) -> Handle | None:
        await asyncio.sleep(self._network.delay_s())
        return self._find_controller(self.node_id)

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(self._network.delay_s())
        return work(*args)
