"""A whole cluster in one thread, drawn from a seed: nodes, ranks, controllers, clients, and all that goes wrong."""

from __future__ import annotations

import gc
import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import Context
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from actors.log_stores import MemoryStore
from configs.schema import ControlSettings
from tests.simulation.clients import Callers, Clients
from tests.simulation.controller import Controller, ControllerTools
from tests.simulation.draw import FAIR_STORE, Plan
from tests.simulation.faults import Faults
from tests.simulation.log_writing import SharedStore
from tests.simulation.network import Handle, Network
from tests.simulation.node import Node, NodeTime
from tests.simulation.oracle import Oracle
from tests.simulation.rank import Rank, RankTools
from tests.simulation.trace import Trace
from tests.simulation.virtual_loop import Process, VirtualLoop

_START_S = 1000.0
#: of a rank's process, from its end to the start of the next one; of a controller's
_RANK_RESTART_S = 1.0
_CONTROLLER_RESTART_S = 0.7


@dataclass(frozen=True, slots=True)
class Result:
    """What became of one run."""

    seed: int
    violations: list[str]
    story: str
    digest: str
    seen: Counter[str]
    num_callbacks: int

    def report(self) -> str:
        """For a failing test: enough to run it again, and what happened."""
        return f"seed {self.seed}: {'; '.join(self.violations)}\n{self.story}\nseed {self.seed} (see SEEDS.md)"


class World:
    """One run. `run` may be called once."""

    def __init__(self, seed: int, **changes: Any) -> None:
        """changes: fields of the plan that are not drawn but given."""
        self.seed = seed
        self.chance = Random(seed)
        self.plan = replace(Plan.draw(self.chance), **changes)
        self.loop = VirtualLoop(_START_S)
        self.trace = Trace(self.loop.time)
        self.settings = ControlSettings(lease_s=self.plan.lease_s, step_grace_s=self.plan.step_grace_s)
        self.network = Network(self.loop, self.chance, self.plan.weather)
        self.oracle = Oracle(self.trace, self.settings, self.loop, lambda: self.ranks)
        self.store = SharedStore(self.oracle.stored)
        self.audit = MemoryStore()
        self.ranks: list[Rank] = []
        self.controllers: list[Controller] = []
        #: nodes that still see an earlier controller under its name
        self.behind: set[str] = set()
        self.nodes: dict[str, Node] = {}
        self.clients = Clients(self.network, self.chance, self.oracle, self.trace)
        self.oracle.on_promise = self.clients.probe
        outside = Process(self.loop, "callers")
        self.network.attach(outside, "outside")
        self.callers = Callers(outside, self.chance, self.trace, lambda: self.find_controller("outside"))
        self.is_over = False

    def run(self) -> Result:
        """Everything: the start, the faults, the rest after them, and a last look."""
        with _faults_of_production(self.oracle):
            try:
                self._begin()
                self.later(self.plan.length_s, self._end_faults)
                self.later(self.plan.length_s + self.plan.rest_s, self._last_look)
                self.loop.run_forever()
            finally:
                self.loop.close()
        return Result(
            self.seed, self.oracle.violations, self.trace.story(), self.trace.digest, self.trace.seen,
            self.loop.num_callbacks,
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ who lives
    def find_controller(self, node_id: str) -> Handle | None:
        """Whom the controller's name stands for on this node; None: nobody that lives."""
        living = [controller for controller in self.controllers if not controller.process.is_dead]
        if not living:
            return None
        return living[0 if node_id in self.behind else -1].handle

    def start_controller(self, node_id: str) -> None:
        """Ray starts the controller there, whether or not another one lives."""
        faults = FAIR_STORE if self.is_over else self.plan.store_faults
        tools = ControllerTools(
            self.network, self.chance, self.oracle, self.store, faults, self.audit, self.settings, self.nodes,
            self._find_rank, ("device",) if self.plan.host_policy is None else ("device", "host"),
        )  # fmt: skip
        controller = Controller(tools, self.nodes[node_id], f"controller-{len(self.controllers) + 1}")
        self.controllers.append(controller)
        self.trace.tell(controller.name, f"starts on {node_id}")
        controller.process.on_end.append(lambda: self._controller_ended(controller))

    def start_rank(self, number: int, node_id: str) -> None:
        """A new incarnation of a rank number."""
        plan = self.plan
        tools = RankTools(
            self.network, self.chance, self.oracle, self.find_controller, plan.share_preempted, plan.host_policy
        )
        rank = Rank(tools, self.nodes[node_id], number, f"rank-{number}.{len(self.ranks)}")
        rank.engine.step_s = self.plan.step_s
        if self.is_over:
            rank.engine.calm()
        self.ranks.append(rank)
        self.clients.meet(rank)
        rank.process.on_end.append(lambda: self._rank_ended(rank, number))

    def later(self, after_s: float, step: Any, *args: Any) -> None:
        """Do something that no process does."""
        self.loop.call_later(after_s, step, *args, context=Context())

    def _find_rank(self, incarnation: str) -> Handle | None:
        rank = next(rank for rank in self.ranks if rank.incarnation == incarnation)
        return None if rank.process.is_dead else rank.handle

    def _controller_ended(self, controller: Controller) -> None:
        self.trace.tell(controller.name, "ends")
        if controller is self.controllers[-1]:
            self.later(_CONTROLLER_RESTART_S, self._restart_controller, controller)

    def _restart_controller(self, ended: Controller) -> None:
        if ended is self.controllers[-1] and not self.store.is_lost:
            self.start_controller(ended.node.node_id)

    def _rank_ended(self, rank: Rank, number: int) -> None:
        self.trace.tell(rank.incarnation, "ends")
        self.later(_RANK_RESTART_S, self.start_rank, number, rank.node.node_id)

    # ------------------------------------------------------------------------------------------------------- the run
    def _begin(self) -> None:
        plan, chance = self.plan, self.chance
        for number in range(plan.num_nodes):
            node_id = f"node-{number}"
            rate = 1.0 if number == 0 else 1 + chance.uniform(-5e-4, 5e-4)
            time = NodeTime(self.loop, f"boot-{number}", chance.uniform(0, 1000), rate)
            self.nodes[node_id] = Node(node_id, self.network, time, self.find_controller)
        self.start_controller("node-0")
        for number in range(plan.num_ranks):
            self.later(chance.uniform(0, 0.5), self.start_rank, number, f"node-{number % plan.num_nodes}")
        self._plan_traffic()
        Faults(self).begin()

    def _plan_traffic(self) -> None:
        plan, chance = self.plan, self.chance
        self.clients.may_abort = "abort" in plan.modes or plan.num_aborts > 0
        for _ in range(plan.num_requests):
            self.later(chance.uniform(0.3, plan.length_s), self.clients.ask)
        for _ in range(plan.num_aborts):
            self.later(chance.uniform(0.6, plan.length_s), self.callers.abort)
        for number in range(plan.num_flushes):
            arguments = plan.flush(chance, number)
            self.later(chance.uniform(0.6, plan.length_s), self.callers.flush, arguments)

    def _end_faults(self) -> None:
        self.is_over = True
        Faults(self).end()

    def _last_look(self) -> None:
        """After a long rest everything is as it should be, and a flush of everything has succeeded."""
        self.loop.stop()
        require = self.oracle.require
        for asked in self.clients.asked.values():
            name, ends = asked.request.request_id, asked.ends
            require(len(ends) == 1, f"{name} on {asked.rank.incarnation} has ended {len(ends)} times: {ends}")
        for rank in self.ranks:
            if not rank.process.is_dead:
                self._look_at(rank)
        controller = self.controllers[-1]
        if not controller.is_ready:
            return require(False, f"{controller.name} has not started")
        require(controller.plane._desk.pending() is None, "a flush is pending for ever")
        require(not controller.plane._desk._flights, "a flush is under way for ever")
        answer = self.callers.answers.get("last")
        require(answer is not None and answer[0]["success"], f"the last flush did not succeed: {answer}")

    def _look_at(self, rank: Rank) -> None:
        require, name, counts = self.oracle.require, rank.incarnation, rank.cache.counts()
        require(rank.is_serving, f"{name} has not registered")
        require(rank.words.has_lease, f"{name} has no lease: {rank.node.agent.message}")
        require(counts.free + counts.cached == rank.cache.num_pages, f"{name} has not got its pages back: {counts}")
        host = rank.engine.snapshot().host
        self.trace.count("loaded pages", host.num_loaded_pages if host is not None else 0)
        self.trace.count("written pages", host.num_written_pages if host is not None else 0)
        require(not rank.engine._gate._live, f"{name} still has a flush in its gate")
        faults = rank.cache.sanity_check()
        require(not faults, f"{name}: {faults}")


@contextmanager
def _faults_of_production(oracle: Oracle) -> Iterator[None]:
    """An exception that production code logs and survives is a fault all the same."""

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info and record.exc_info[1] is not None and "as ordered" not in str(record.exc_info[1]):
                oracle.failed(record.name, record.exc_info[1])

    listener = Listener(logging.ERROR)
    loggers = [logging.getLogger(name) for name in ("actors", "engine", "asyncio")]
    before = [(logger.level, logger.propagate) for logger in loggers]
    for logger in loggers:
        logger.addHandler(listener)
        logger.setLevel(logging.ERROR)
        logger.propagate = False
    try:
        yield
    finally:
        for logger, (level, propagate) in zip(loggers, before, strict=True):
            logger.removeHandler(listener)
            logger.setLevel(level)
            logger.propagate = propagate


def run(seed: int, **changes: Any) -> Result:
    """One world from its seed, and from what is given of its plan."""
    gc.disable()  # a sixth of the time; a world is small
    try:
        return World(seed, **changes).run()
    finally:
        gc.enable()
