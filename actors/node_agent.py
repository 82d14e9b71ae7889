"""The agent of one node: it alone writes the node's control page, and it proves which of the node's processes ended.

It asks the controller for a lease five times in a lease time and writes what it gets, floors before the lease that
vouches for them. When it cannot, the lease on the page runs out and the ranks of the node go on uncached; nobody has
to be told (protocol.md section 4, hole H23).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, Protocol

from actors.audit_log import InThread
from actors.clock import Clock
from actors.end_proofs import EndProof, pause
from actors.host_messages import HostDropOrder, HostDropped
from actors.host_store import HostStore
from actors.messages import FloorAnswer, LeaseAnswer, NodeRenewal, PagePlace, ProcessName
from actors.ray_errors import Answered, outcome_within
from cache.control_page import ControlPageWriter
from configs.errors import ConfigError

log = logging.getLogger(__name__)

#: until the first answer says how long a lease is
_FIRST_PERIOD_S = 0.2
_CALL_TIMEOUT_S = 2.0
_NS = 1_000_000_000


class NodeFile(Protocol):
    """The node's file as its only writer has it."""

    @property
    def page(self) -> ControlPageWriter: ...

    def retire(self) -> None:
        """End the file: nobody matches under it any more, and its name is free."""
        ...

    def close(self) -> None:
        """Leave the file as it is for the next agent."""
        ...


@dataclass(frozen=True, slots=True)
class AgentSurroundings:
    """Every way of an agent out of its own loop. None of them may block it."""

    clock: Clock
    node_id: str
    directory: str
    #: name of the file; two deployments or nodes of one machine have two
    file_name: str
    #: make or adopt the file for a lineage; blocks, ConfigError if the name belongs to somebody else
    open_file: Callable[[str], NodeFile]
    #: the controller's handle, None if there is none now
    find_controller: Callable[[], Awaitable[Any]]
    #: this agent's own handle, for the controller
    own_handle: Any
    #: eye on a process of this node; None: it does not run (any more)
    find_process: Callable[[ProcessName], EndProof | None]
    #: pid namespace of this process
    pid_namespace: str
    in_thread: InThread
    #: None: the settings have no host tier
    host: HostStore | None = None


class NodeAgent:
    """Lives on one asyncio loop. `run` renews until it is cancelled."""

    def __init__(self, around: AgentSurroundings) -> None:
        self._around = around
        self._file: NodeFile | None = None
        self._lineage = ""
        self._period_s = _FIRST_PERIOD_S
        self._controller: Any | None = None
        #: processes somebody waits for the end of
        self._ends: dict[ProcessName, asyncio.Task[None]] = {}
        #: why there is no lease; "" while there is one
        self.message = "no controller has answered yet"

    async def run(self) -> None:
        """Ask for a lease again and again."""
        while True:
            begun_s = self._around.clock.now_s()
            had_file = self._file is not None
            await self._renew()
            if self._file is None or had_file:  # a new file gets its lease at once
                await pause(max(0.0, begun_s + self._period_s - self._around.clock.now_s()))

    async def raise_floor(self, term: int, floor: int) -> FloorAnswer:
        """Put a stored floor on the page: no rank of this node matches anything older from the return on."""
        if self._file is None:
            return FloorAnswer(nonce=0, floor=0)
        page = self._file.page
        is_obeyed = page.raise_floor(term, floor)
        host = self._around.host
        voided = HostDropped(0, 0) if host is None or not is_obeyed else host.raise_floor(term, floor)
        return FloorAnswer(
            page.nonce, page.read().floor, is_refused=not is_obeyed,
            host_pages=voided.freed_pages, host_bytes=voided.freed_bytes,
        )  # fmt: skip

    async def drop_host(self, order: HostDropOrder) -> HostDropped:
        """Have the node's host tier drop pages, unless the order is late or of a superseded controller."""
        host, now_s = self._around.host, self._around.clock.now_s()
        if host is None:
            return HostDropped(0, 0)
        if self._file is None or not self._file.page.raise_floor(order.term, 0):
            return HostDropped(0, 0, "it obeys no controller yet, or a later one")
        if now_s >= order.valid_until_s:
            return HostDropped(0, 0, "the order came too late")
        if order.older_than_s is not None:
            return await self._drop_older(host, self._file, max(0, int((now_s - order.older_than_s) * _NS)))
        dropped = await host.drop_all(order.index)
        if not dropped.failure:
            self._file.page.raise_drop(order.index)
        return dropped

    async def _drop_older(self, host: HostStore, file: NodeFile, birth_floor_ns: int) -> HostDropped:
        dropped = await host.drop_older(birth_floor_ns)
        if not dropped.failure:
            # an arena that the next agent opens must keep to it, too
            file.page.raise_birth_floor(birth_floor_ns)
        return dropped

    async def until_gone(self, name: ProcessName) -> bool:
        """True when the process is proven gone; False at once if it cannot be seen from here."""
        if name.pid_namespace not in ("", self._around.pid_namespace):
            return False
        if name not in self._ends:
            proof = self._around.find_process(name)
            if proof is None:
                return True
            self._ends[name] = asyncio.create_task(self._wait_for_end(name, proof), name=f"end-of-{name.pid}")
        await asyncio.shield(self._ends[name])
        return True

    def facts(self) -> dict[str, Any]:
        """What the agent says of itself, as plain data."""
        words = None if self._file is None else self._file.page.read()
        return {
            "pid": os.getpid(),
            "node": self._around.node_id,
            "lineage": self._lineage,
            "floor": 0 if words is None else words.floor,
            "lease_left_s": 0.0 if words is None else words.lease_end_ns / _NS - self._around.clock.now_s(),
            "message": self.message,
        }

    def close(self) -> None:
        """Stop looking after processes and let the file go."""
        for end in self._ends.values():
            end.cancel()
        if self._around.host is not None:
            self._around.host.close()
        if self._file is not None:
            self._file.close()

    async def _wait_for_end(self, name: ProcessName, proof: EndProof) -> None:
        try:
            await proof.until_gone()
        finally:
            proof.close()
            self._ends.pop(name, None)

    async def _renew(self) -> None:
        renewal = self._renewal()
        controller = self._controller = self._controller or await self._around.find_controller()
        if controller is None:
            self.message = "there is no controller"
            return
        outcome = await outcome_within(controller.renew.remote(renewal, self._around.own_handle), _CALL_TIMEOUT_S)
        if isinstance(outcome, Answered):
            await self._obey(outcome.value, renewal.sent_s)
        else:
            self.message = f"the controller does not answer: {outcome.message}"
            self._controller = None  # another one may have its name

    def _renewal(self) -> NodeRenewal:
        around = self._around
        place, floor = None, 0
        if self._file is not None:
            page = self._file.page
            place, floor = PagePlace(around.directory, around.file_name, page.nonce), page.read().floor
        report = None if around.host is None else around.host.report()
        return NodeRenewal(around.node_id, around.clock.boot_id, around.clock.now_s(), place, floor, host=report)

    async def _obey(self, answer: LeaseAnswer, sent_s: float) -> None:
        self.message = answer.message
        self._period_s = answer.period_s
        if answer.lineage != self._lineage:
            await self._begin_lineage(answer.lineage)
        elif self._file is not None and answer.lease_s > 0:
            end_ns = int((sent_s + answer.lease_s) * _NS)
            if not self._keep_to(answer):
                self.message = f"its host tier has missed flush {answer.host_drop} and is being opened"
            elif not self._file.page.grant(answer.term, answer.floor, 0, end_ns):
                self.message = f"the page obeys a higher term than {answer.term}"
            elif self._around.host is not None:
                self._around.host.raise_floor(answer.term, answer.floor)

    def _keep_to(self, answer: LeaseAnswer) -> bool:
        """Carry out the flush of host tiers that this node has missed. False: not yet, and so it may have no lease."""
        host, file = self._around.host, self._file
        if host is None or file is None or not file.page.raise_floor(answer.term, 0):
            return True
        is_kept = host.raise_drop(answer.host_drop, file.page.read().drop)
        if is_kept:
            file.page.raise_drop(answer.host_drop)
        return is_kept

    async def _begin_lineage(self, lineage: str) -> None:
        """The first controller, or one that has lost its log: what is cached under another lineage is void."""
        if self._file is not None:
            log.warning("the controller begins lineage %s: the file of %s is retired", lineage, self._lineage)
            self._file.retire()
            self._file = None
        self._lineage = ""
        try:
            file = self._file = await self._around.in_thread(self._around.open_file, lineage)
            self._lineage = lineage
            if self._around.host is not None:
                words = file.page.read()
                self._around.host.begin_lineage(lineage)
                self._around.host.raise_floor(words.term, words.floor)
                self._around.host.raise_drop(words.drop, words.drop)
                self._around.host.raise_birth_floor(words.birth_floor_ns)
        except ConfigError as error:
            self.message = error.message
            log.error("no control page: %s", error)
