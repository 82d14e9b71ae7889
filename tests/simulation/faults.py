"""Everything that goes wrong in a run, and how it is put right in the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from tests.simulation.draw import FAIR_STORE, FAIR_WEATHER, FAULTS
from tests.simulation.virtual_loop import Process

if TYPE_CHECKING:
    from tests.simulation.world import World

#: for how long things are frozen, cut off or out
_DURATIONS_S = (0.05, 0.3, 1.0, 2.5, 6.0)


class Faults:
    """Of one world. A fault begins at its instant and, if it has an end, ends by itself."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._chance = world.chance

    def begin(self) -> None:
        """Plan the faults of the run."""
        plan, chance = self._world.plan, self._chance
        weights = [FAULTS[name] for name in plan.faults]
        for _ in range(plan.num_faults):
            (name,) = chance.choices(plan.faults, weights)
            self._world.later(chance.uniform(0.5, plan.length_s), self._strike, name)

    def end(self) -> None:
        """Everything works from now on. What has died is started by whoever starts it in production."""
        world = self._world
        world.trace.tell("world", "all faults end")
        world.network.weather = FAIR_WEATHER
        world.network.cut_off.clear()
        world.behind.clear()
        world.store.is_out = False
        for controller in world.controllers:
            controller.calm(FAIR_STORE)
        for rank in world.ranks:
            rank.engine.calm()
        for process in self._processes():
            process.thaw()
        # two seconds before the end of the rest
        world.later(world.plan.rest_s - 2.5, world.callers.flush_last)

    def _processes(self) -> list[Process]:
        world = self._world
        agents = [process for node in world.nodes.values() for process in node.processes]
        return [*agents, *(rank.process for rank in world.ranks)]

    def _strike(self, name: str) -> None:
        if not self._world.is_over:
            strike: Callable[[], None] = getattr(self, f"_{name}")
            self._world.trace.count(f"fault {name}")
            strike()

    def _tell(self, what: str) -> None:
        self._world.trace.tell("fault", what)

    # ----------------------------------------------------------------------------------------------- stops and deaths
    def _freeze_rank(self) -> None:
        self._freeze(self._some([rank.process for rank in self._world.ranks]))

    def _freeze_agent(self) -> None:
        self._freeze(self._some([node.agent_process for node in self._world.nodes.values()]))

    def _freeze_controller(self) -> None:
        self._freeze(self._some([controller.process for controller in self._world.controllers]))

    def _freeze(self, process: Process | None) -> None:
        if process is not None and not process.is_frozen:
            duration_s = self._chance.choice(_DURATIONS_S)
            self._tell(f"freeze {process.name} for {duration_s} s")
            process.freeze()
            self._world.later(duration_s, process.thaw)

    def _kill_rank(self) -> None:
        self._kill(self._some([rank.process for rank in self._world.ranks]))

    def _kill_agent(self) -> None:
        self._kill(self._some([node.agent_process for node in self._world.nodes.values()]))

    def _kill_controller(self) -> None:
        self._kill(self._some([controller.process for controller in self._world.controllers]))

    def _kill(self, process: Process | None) -> None:
        if process is not None:
            self._tell(f"kill {process.name}")
            process.kill()

    def _some(self, processes: list[Process]) -> Process | None:
        living = [process for process in processes if not process.is_dead]
        return self._chance.choice(living) if living else None

    def _lose_machine(self) -> None:
        """Every process of a node dies at once; the controller's is spared, or the log's machine would be lost."""
        world = self._world
        controllers = {controller.process for controller in world.controllers}
        node = self._chance.choice(list(world.nodes.values()))
        self._tell(f"lose-machine {node.node_id}")
        node.tier.pages.clear()
        for process in list(node.processes):
            if process not in controllers:
                process.kill()

    # ------------------------------------------------------------------------------------------------- two controllers
    def _second_controller(self) -> None:
        """Ray believes that the controller has died, and starts it elsewhere. The first one lives on: beside it,
        frozen, or on a node that is cut off from the others and the log."""
        world, chance = self._world, self._chance
        if world.store.is_lost:
            return
        first = world.controllers[-1]
        node_id = chance.choice(list(world.nodes))
        duration_s = chance.choice(_DURATIONS_S)
        self._tell(f"second controller on {node_id}; the first is left behind for {duration_s} s")
        world.behind = {name for name in [*world.nodes, "outside"] if chance.random() < 0.5}
        match chance.choice(("beside", "frozen", "cut off")):
            case "frozen":
                self._freeze(first.process)
            case "cut off" if first.node.node_id != node_id:
                world.behind.add(first.node.node_id)
                self._cut(first.node.node_id, duration_s)
        world.later(duration_s, world.behind.clear)
        world.start_controller(node_id)

    def _lose_log(self) -> None:
        """The store is lost, and with it every controller; a new life begins while leases of the old one run."""
        world = self._world
        self._tell("lose-log")
        world.store.is_lost = True
        for controller in world.controllers:
            controller.process.kill()
        world.store.wipe()
        world.oracle.log_was_lost()
        world.later(self._chance.uniform(0.3, 1.5), self._begin_anew)

    def _begin_anew(self) -> None:
        world = self._world
        if world.store.is_lost:
            world.store.is_lost = False
            world.start_controller(world.controllers[-1].node.node_id)

    # ---------------------------------------------------------------------------------------------- network and store
    def _cut_off(self) -> None:
        self._cut(self._chance.choice(list(self._world.nodes)), self._chance.choice(_DURATIONS_S))

    def _cut(self, node_id: str, duration_s: float) -> None:
        network = self._world.network
        self._tell(f"cut-off {node_id} for {duration_s} s")
        network.cut_off.add(node_id)
        self._world.later(duration_s, network.cut_off.discard, node_id)

    def _hiccup(self) -> None:
        process = self._some(self._processes())
        if process is not None:
            self._tell(f"hiccup {process.name}")
            self._world.network.hiccup(process)

    def _store_out(self) -> None:
        store = self._world.store
        duration_s = self._chance.choice(_DURATIONS_S)
        self._tell(f"store-out for {duration_s} s")
        store.is_out = True
        self._world.later(duration_s, setattr, store, "is_out", False)

    def _failing_step(self) -> None:
        serving = [rank for rank in self._world.ranks if rank.is_serving]
        if serving:
            rank = self._chance.choice(serving)
            self._tell(f"failing-step {rank.incarnation}")
            self._world.clients.may_fail = True
            rank.runner.failure = RuntimeError("as ordered")
