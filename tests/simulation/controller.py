"""One controller's process around the control plane of production."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from random import Random
from typing import Any, Protocol

from actors.control_plane import ControlPlane
from actors.end_proofs import EndProof, process_name
from actors.log_stores import MemoryStore
from actors.messages import LeaseAnswer, Membership, NodeRenewal, RankRecord, Registered
from actors.metrics import ControlMetrics
from actors.surroundings import Surroundings
from configs.schema import ControlSettings
from tests.simulation.log_writing import SharedStore, SlowLog, StoreFaults
from tests.simulation.network import Handle, Network
from tests.simulation.node import Node


class FlushWitness(Protocol):
    """Who is told of every answer; the oracle."""

    def answered(self, controller: Controller, arguments: Mapping[str, Any], begun_s: float, answer: Any) -> None: ...
    def failed(self, who: str, error: BaseException) -> None: ...


@dataclass(frozen=True, slots=True)
class ControllerTools:
    """What every controller of a world uses."""

    network: Network
    chance: Random
    witness: FlushWitness
    store: SharedStore
    store_faults: StoreFaults
    audit: MemoryStore
    settings: ControlSettings
    nodes: Mapping[str, Node]
    find_rank: Callable[[str], Handle | None]
    tiers: tuple[str, ...]


class SilentMetrics(ControlMetrics):
    """Ray's counters cost more than all the rest of a run."""

    def __init__(self) -> None:
        """None are made."""

    def __getattribute__(self, name: str) -> Any:
        return _count_nothing


def _count_nothing(*facts: object) -> None:
    """Whatever it was."""


class Controller:
    """Takes over when it starts; ends its process if that fails, as Ray's actor does, or when it is superseded."""

    def __init__(self, tools: ControllerTools, node: Node, name: str) -> None:
        self.node = node
        self.name = name
        self._ready = asyncio.Event()
        self._tools = tools
        self.process, _ = node.begin_process(name)
        self.handle = Handle(tools.network, self.process, self)
        around = Surroundings(
            clock=node.time, actor_id="controller", cluster="cluster", node_id=node.node_id,
            find_handle=self._find_rank, find_process=self._find_process, ensure_agent=self._ensure_agent,
            in_thread=self._in_thread, end_process=self.process.kill, is_one_machine=False,
            tiers=tools.tiers, has_elders=self._has_elders,
        )  # fmt: skip
        self._writer = SlowLog(tools.store, node.time, self.process, self._is_cut_off, tools.chance, tools.store_faults)
        self.plane = ControlPlane(self._writer, tools.audit, tools.settings, around, SilentMetrics())
        self.process.spawn(self._start())

    @property
    def is_ready(self) -> bool:
        """It has taken over and answers."""
        return self._ready.is_set()

    def calm(self, faults: StoreFaults) -> None:
        """From now on its store is as good as this."""
        self._writer.calm(faults)

    async def _start(self) -> None:
        try:
            await self.plane.start()
        except OSError:
            self.process.kill()
        except Exception as error:
            self._tools.witness.failed(self.name, error)
        else:
            self._ready.set()

    async def register(self, record: RankRecord, handle: Any) -> Registered:
        await self._ready.wait()
        return await self.plane.register(record, handle)

    async def renew(self, renewal: NodeRenewal, handle: Any) -> LeaseAnswer:
        await self._ready.wait()
        return await self.plane.renew(renewal, handle)

    async def membership(self, known_version: int, timeout_s: float) -> Membership:
        await self._ready.wait()
        return await self.plane.membership(known_version, timeout_s)

    async def hello(self) -> dict[str, Any]:
        await self._ready.wait()
        return await self.plane.hello()

    async def flush(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """What a door asks for; the oracle sees the answer leave."""
        await self._ready.wait()
        begun_s = self.process.loop.time()
        answer = await self.plane.flush(**arguments)
        self._tools.witness.answered(self, arguments, begun_s, answer)
        return answer

    async def cancel_flush(self, flush_id: str) -> dict[str, Any]:
        await self._ready.wait()
        return await self.plane.cancel_flush(flush_id, "caller")

    async def abort(self) -> dict[str, Any]:
        await self._ready.wait()
        return await self.plane.abort(None, True, 2.0, "as ordered")

    def _is_cut_off(self) -> bool:
        return self.node.node_id in self._tools.network.cut_off

    async def _find_rank(self, record: RankRecord) -> Handle | None:
        await asyncio.sleep(self._tools.network.delay_s())
        return self._tools.find_rank(record.incarnation)

    async def _has_elders(self) -> bool:
        await asyncio.sleep(self._tools.network.delay_s())
        return self._tools.store.was_lost

    def _find_process(self, record: RankRecord) -> EndProof | None:
        return self.node.find_process(process_name(record))

    async def _ensure_agent(self, node_id: str) -> None:
        await asyncio.sleep(self._tools.network.delay_s())
        node = self._tools.nodes[node_id]
        if node_id in self._tools.network.cut_off:
            raise OSError("the node is out of reach")
        node.ensure_agent()

    async def _in_thread(self, work: Callable[..., Any], *args: Any) -> Any:
        await asyncio.sleep(self._tools.network.delay_s())
        return work(*args)
