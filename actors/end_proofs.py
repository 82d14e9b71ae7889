"""Waiting for the proof that a rank's process has ended: its own node's kernel says so, here or through an agent."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path
from typing import Any, Protocol

from actors.messages import ProcessName, RankRecord
from actors.process_proof import ProcessProof
from actors.ray_errors import Answered, outcome_of

# An agent that does not answer is asked again this often; where the kernel has no pidfds /proc is looked at as often.
_RETRY_S = 0.5


class EndProof(Protocol):
    """Eye on one process."""

    async def until_gone(self) -> None:
        """Returns when the process is proven gone, and never otherwise."""
        ...

    def close(self) -> None:
        """Look no longer."""
        ...


class LocalEnd:
    """A process of this node, by its pidfd."""

    def __init__(self, proof: ProcessProof) -> None:
        self._proof = proof

    @classmethod
    def of(cls, name: ProcessName) -> LocalEnd | None:
        """None: no such process runs here (any more)."""
        proof = ProcessProof.open(name.pid, name.start_time)
        return None if proof is None else cls(proof)

    async def until_gone(self) -> None:
        pidfd = self._proof.fileno()
        if pidfd is None:
            while not self._proof.is_gone():
                await pause(_RETRY_S)
            return
        loop = asyncio.get_running_loop()
        ended = loop.create_future()
        loop.add_reader(pidfd, lambda: ended.done() or ended.set_result(None))
        try:
            await ended
        finally:
            loop.remove_reader(pidfd)

    def close(self) -> None:
        self._proof.close()


class Agents(Protocol):
    """Where an agent's handle is found; a restarted agent has the same one."""

    def agent(self, node_id: str) -> Any | None: ...


class AgentEnd:
    """A process of another node, by its agent's word."""

    def __init__(self, agents: Agents, record: RankRecord) -> None:
        self._agents = agents
        self._record = record

    async def until_gone(self) -> None:
        name = process_name(self._record)
        while True:
            handle = self._agents.agent(self._record.node_id)
            if handle is not None:
                match await outcome_of(handle.until_gone.remote(name)):
                    case Answered(True):
                        return
                    case Answered(_):  # the agent does not see this process: it can prove nothing
                        await asyncio.Event().wait()
            await pause(_RETRY_S)

    def close(self) -> None:
        """Nothing is held here; the agent's own eye goes with the process."""


def pid_namespace() -> str:
    """Of this process: pids of two namespaces have nothing to do with each other."""
    return os.readlink(Path("/proc/self/ns/pid"))


def process_name(record: RankRecord) -> ProcessName:
    return ProcessName(record.pid, record.start_time, record.pid_namespace)


async def pause(duration_s: float) -> None:
    """Let time pass on this loop."""
    await asyncio.wait({asyncio.get_running_loop().create_future()}, timeout=duration_s)
