"""Seeded walks through the weight world: mostly forward, with one fault in every few moves."""

from __future__ import annotations

from collections import Counter

import numpy as np

from engine.flush import Blockers
from engine.weight_update import IN_FLIGHT_MODES
from tests.property.weight_world import World

NODES = ("node-0", "node-1", "node-2")
#: moves and how often each is made, in parts of all moves that are possible
_MOVES = {
    "deliver": 30, "turn": 30, "load": 12, "store": 16, "begin": 14, "wait": 6, "clear_up": 4, "restart": 6,
    "grant": 5, "wake": 5, "register": 2, "lose": 3, "double": 3, "misfit": 1, "vague_store": 2, "freeze": 2,
    "kill": 1, "crash": 1, "cut_off": 1, "run_out": 3, "traffic": 4,
}  # fmt: skip


class Walk:
    """One seed."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.world = World(len(NODES))
        self.num_registered = 0
        self.moves: Counter[str] = Counter()
        for _ in range(int(self.rng.integers(1, 4))):
            self.register()

    def run(self, num_moves: int) -> None:
        for _ in range(num_moves):
            names = self._possible()
            shares = np.array([_MOVES[name] for name in names], dtype=float)
            name = names[int(self.rng.choice(len(names), p=shares / shares.sum()))]
            self.moves[name] += 1
            getattr(self, name)()
            self.check()

    def check(self) -> None:
        """What was called undecided is not decided, and no rank has what was never decided."""
        world = self.world
        for index, answer in world.answers[-2:]:
            if index and answer["status"] != "in_doubt":
                assert answer["decided"] == (index in world.decided)
        for rank in world.ranks.values():
            assert rank.desk.record in {0, *world.decided}

    def heal(self) -> None:
        """Everything comes back; all end on one version, or say that they are stale."""
        world = self.world
        if not world.has_controller:
            self.restart()
        for node_id in NODES:
            world.grant(node_id)
        for rank in world.ranks.values():
            rank.is_frozen, rank.blockers = False, Blockers()
        for _ in range(12):
            while world.limbo is not None or world.stores:
                self.clear_up() if world.limbo is not None else world.store_next("stored")
            while world.post:
                world.deliver(world.post.pop(0))
            for incarnation in world.ranks:
                world.turn(incarnation)
                while world.ranks[incarnation].staging:
                    world.finish_staging(incarnation, is_good=True)
                world.turn(incarnation)
            world.pass_time(3.0)
        for node_id in NODES:
            world.grant(node_id)
        for incarnation, rank in world.ranks.items():
            world.turn(incarnation)
            assert rank.desk.record == world.state.record or (rank.desk.is_stale and not rank.desk.may_admit)
        assert world.is_free
        self.check()

    # --------------------------------------------------------------------------------------------------------- moves
    def _possible(self) -> list[str]:
        world = self.world
        nodes = world.nodes.values()
        moving = self._moving()
        can = {
            "deliver": world.post, "lose": world.post, "double": world.post, "turn": moving,
            "load": self._loading(), "misfit": self._loading(), "store": world.stores,
            "vague_store": world.stores and world.limbo is None, "begin": world.is_free and world.ranks,
            "wait": world.machine is not None, "clear_up": world.limbo is not None,
            "restart": not world.has_controller, "crash": world.has_controller, "freeze": moving,
            "wake": len(moving) < len(world.ranks), "kill": len(world.ranks) > 1,
            "register": world.has_controller and len(world.ranks) < 5,
            "grant": world.has_controller and not all(node.is_reachable and node.lease_ok for node in nodes),
            "cut_off": any(node.is_reachable for node in nodes), "traffic": world.ranks,
            "run_out": any(node.lease_ok and not node.is_reachable for node in nodes),
        }  # fmt: skip
        return [name for name in _MOVES if can[name]]

    def _one_of(self, names: list[str]) -> str:
        return names[int(self.rng.integers(len(names)))]

    def _moving(self) -> list[str]:
        return [name for name, rank in self.world.ranks.items() if not rank.is_frozen]

    def _loading(self) -> list[str]:
        return [name for name, rank in self.world.ranks.items() if rank.staging and not rank.is_frozen]

    def _letter(self) -> int:
        return int(self.rng.integers(len(self.world.post)))

    def begin(self) -> None:
        names = list(self.world.ranks)
        excluded = [self._one_of(names)] if len(names) > 1 and self.rng.random() < 0.15 else []
        self.world.begin(IN_FLIGHT_MODES[int(self.rng.integers(len(IN_FLIGHT_MODES)))], excluded)

    def deliver(self) -> None:
        self.world.deliver(self.world.post.pop(self._letter()))

    def double(self) -> None:
        self.world.deliver(self.world.post[self._letter()])

    def lose(self) -> None:
        self.world.lose(self.world.post.pop(self._letter()))

    def turn(self) -> None:
        self.world.turn(self._one_of(self._moving()))

    def load(self) -> None:
        self.world.finish_staging(self._one_of(self._loading()), is_good=True)

    def misfit(self) -> None:
        self.world.finish_staging(self._one_of(self._loading()), is_good=False)

    def store(self) -> None:
        self.world.store_next("stored")

    def vague_store(self) -> None:
        self.world.store_next(self._one_of(["lost", "unknown, there", "unknown, not there"]))

    def clear_up(self) -> None:
        self.world.clear_up()

    def wait(self) -> None:
        self.world.pass_time(float(self.rng.choice([0.05, 0.5, 3.0, 9.0], p=[0.5, 0.3, 0.15, 0.05])))

    def crash(self) -> None:
        self.world.crash_controller()

    def restart(self) -> None:
        self.world.restart_controller()

    def register(self) -> None:
        self.num_registered += 1
        self.world.register(self.num_registered, self._one_of(list(NODES)))

    def kill(self) -> None:
        self.world.kill(self._one_of(list(self.world.ranks)))

    def freeze(self) -> None:
        self.world.ranks[self._one_of(self._moving())].is_frozen = True

    def wake(self) -> None:
        asleep = [name for name, rank in self.world.ranks.items() if rank.is_frozen]
        self.world.ranks[self._one_of(asleep)].is_frozen = False

    def traffic(self) -> None:
        self.world.ranks[self._one_of(list(self.world.ranks))].blockers = Blockers(running=int(self.rng.integers(3)))

    def grant(self) -> None:
        nodes = self.world.nodes
        waiting = [name for name in NODES if not (nodes[name].is_reachable and nodes[name].lease_ok)]
        self.world.grant(self._one_of(waiting))

    def cut_off(self) -> None:
        self.world.cut_off(self._one_of([name for name in NODES if self.world.nodes[name].is_reachable]))

    def run_out(self) -> None:
        nodes = self.world.nodes
        cut_off = [name for name in NODES if nodes[name].lease_ok and not nodes[name].is_reachable]
        self.world.run_out(self._one_of(cut_off))
