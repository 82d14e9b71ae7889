"""Weight updates under losses, freezes, crashes and partitions: invariant 18, in every order that chance finds.

No rank commits without a stored decision; with one, no rank serves the old version after its next match; without one,
every rank serves the old version.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from actors import weight_events as events
from engine.flush import Blockers
from engine.weight_desk import WeightDesk
from engine.weight_update import IN_FLIGHT_MODES, InFlightMode
from tests.property.weight_walk import Walk
from tests.property.weight_world import World

NODES = ("node-0", "node-1")
NUM_SEEDS, NUM_MOVES = 100, 250
node_ids = st.sampled_from(NODES)
places = st.integers(0, 10**6)


class WeightTransaction(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.world = World(len(NODES))
        self.num_registered = 0

    # ------------------------------------------------------------------------------------------------------- picking
    def pick(self, place: int) -> str:
        """An incarnation."""
        names = sorted(self.world.ranks)
        return names[place % len(names)]

    def moving(self) -> list[str]:
        return [name for name, rank in sorted(self.world.ranks.items()) if not rank.is_frozen]

    # ------------------------------------------------------------------------------------------------------- updates
    @initialize(number=st.integers(1, 3))
    def some_ranks(self, number: int) -> None:
        for place in range(number):
            self.register(NODES[place % 2])

    @precondition(lambda self: self.world.is_free)
    @rule(mode=st.sampled_from(IN_FLIGHT_MODES), excluded=st.lists(places, max_size=1))
    def begin(self, mode: InFlightMode, excluded: list[int]) -> None:
        names = [self.pick(place) for place in excluded if self.world.ranks]
        self.world.begin(mode, names)

    @rule(num_rounds=st.integers(1, 4))
    def go_on(self, num_rounds: int) -> None:
        """Nothing goes wrong for a while: without it no update would ever come to its commits."""
        for _ in range(num_rounds):
            if self.world.stores:
                self.world.store_next("stored")
            letters, self.world.post = self.world.post, []
            for letter in letters:
                self.world.deliver(letter)
            self.turns()

    @rule()
    def go_on_and_begin(self) -> None:
        self.go_on(3)
        if self.world.is_free:
            self.begin("retract", [])

    @precondition(lambda self: self.world.stores)
    @rule(fate=st.sampled_from(["stored"] * 4 + ["lost", "unknown, there", "unknown, not there"]))
    def store(self, fate: str) -> None:
        if fate.startswith("unknown") and self.world.limbo is not None:
            fate = "stored"
        self.world.store_next(fate)

    @precondition(lambda self: self.world.limbo is not None)
    @rule()
    def clear_up(self) -> None:
        self.world.clear_up()

    @precondition(lambda self: self.world.machine is not None)
    @rule(seconds=st.sampled_from([0.05, 0.05, 0.5, 0.5, 3.0, 9.0]))
    def wait(self, seconds: float) -> None:
        self.world.pass_time(seconds)

    # ---------------------------------------------------------------------------------------------------- the post
    @precondition(lambda self: self.world.post)
    @rule(place=places)
    def deliver(self, place: int) -> None:
        self.world.deliver(self.world.post.pop(place % len(self.world.post)))

    @precondition(lambda self: self.world.post)
    @rule()
    def deliver_all(self) -> None:
        letters, self.world.post = self.world.post, []
        for letter in letters:
            self.world.deliver(letter)

    @precondition(lambda self: self.world.post)
    @rule(place=places)
    def deliver_twice(self, place: int) -> None:
        self.world.deliver(self.world.post[place % len(self.world.post)])

    @precondition(lambda self: self.world.post)
    @rule(place=places)
    def lose(self, place: int) -> None:
        self.world.lose(self.world.post.pop(place % len(self.world.post)))

    # ------------------------------------------------------------------------------------------------------- ranks
    @rule()
    def turns(self) -> None:
        """Every rank that can, loads what it was told and takes its turn."""
        for name in self.moving():
            self.world.turn(name)
            while self.world.ranks[name].staging:
                self.world.finish_staging(name, is_good=True)
            self.world.turn(name)

    @precondition(lambda self: self.moving())
    @rule(place=places)
    def turn(self, place: int) -> None:
        names = self.moving()
        self.world.turn(names[place % len(names)])

    @precondition(lambda self: any(rank.staging for rank in self.world.ranks.values()))
    @rule(is_good=st.sampled_from([True, True, True, False]))
    def finish_staging(self, is_good: bool) -> None:
        name = next(name for name, rank in sorted(self.world.ranks.items()) if rank.staging)
        self.world.finish_staging(name, is_good)

    @precondition(lambda self: self.world.ranks)
    @rule(place=places, num_running=st.integers(0, 2))
    def traffic(self, place: int, num_running: int) -> None:
        self.world.ranks[self.pick(place)].blockers = Blockers(running=num_running)

    @precondition(lambda self: self.world.ranks)
    @rule(place=places)
    def freeze_or_wake(self, place: int) -> None:
        rank = self.world.ranks[self.pick(place)]
        rank.is_frozen = not rank.is_frozen

    @precondition(lambda self: len(self.world.ranks) > 1)
    @rule(place=places)
    def kill(self, place: int) -> None:
        self.world.kill(self.pick(place))

    @precondition(lambda self: len(self.world.ranks) < 4 and self.world.has_controller)
    @rule(node_id=node_ids)
    def register(self, node_id: str) -> None:
        self.num_registered += 1
        self.world.register(self.num_registered, node_id)

    # ------------------------------------------------------------------------------------------------------- nodes
    @rule(node_id=node_ids)
    def cut_off(self, node_id: str) -> None:
        self.world.cut_off(node_id)

    @precondition(lambda self: any(not node.is_reachable for node in self.world.nodes.values()))
    @rule()
    def leases_run_out(self) -> None:
        for node_id, node in self.world.nodes.items():
            if not node.is_reachable:
                self.world.run_out(node_id)

    @precondition(lambda self: self.world.has_controller)
    @rule(node_id=node_ids)
    def grant(self, node_id: str) -> None:
        self.world.grant(node_id)

    # -------------------------------------------------------------------------------------------------- controllers
    @precondition(lambda self: self.world.has_controller)
    @rule()
    def crash_controller(self) -> None:
        self.world.crash_controller()

    @precondition(lambda self: not self.world.has_controller)
    @rule()
    def restart_controller(self) -> None:
        self.world.restart_controller()

    # --------------------------------------------------------------------------------------------------- invariants
    @invariant()
    def what_was_called_undecided_is_not_decided(self) -> None:
        for index, answer in self.world.answers:
            if index and not answer["decided"] and answer["status"] != "in_doubt":
                assert index not in self.world.decided
            if answer["decided"]:
                assert index in self.world.decided

    @invariant()
    def no_rank_has_what_was_never_decided(self) -> None:
        for rank in self.world.ranks.values():
            assert rank.desk.record in {0, *self.world.decided}

    def teardown(self) -> None:
        """Everything heals: all end on the version that the log says, or say that they are stale."""
        world = self.world
        if not world.has_controller:
            world.restart_controller()
        for node_id in NODES:
            world.grant(node_id)
        for rank in world.ranks.values():
            rank.is_frozen, rank.blockers = False, Blockers()
        for _ in range(12):
            while world.limbo is not None or world.stores:
                if world.limbo is not None:
                    world.clear_up()
                else:
                    world.store_next("stored")
            letters, world.post = world.post, []
            for letter in letters:
                world.deliver(letter)
            self.turns()
            world.pass_time(3.0)
        for node_id in NODES:
            world.grant(node_id)
        self.turns()
        assert world.is_free
        for rank in world.ranks.values():
            assert rank.desk.record == world.state.record or not rank.desk.may_admit
            assert rank.desk.record == world.state.record or rank.desk.is_stale


WeightTransaction.TestCase.settings = settings(
    max_examples=60,
    stateful_step_count=50,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
)
TestWeightTransaction = WeightTransaction.TestCase


# ---------------------------------------------------------------------------------------------------- seeded walks
def test_seeded_walks() -> None:
    """Longer than the machine above takes them; a failure names its seed."""
    seen: Counter[str] = Counter()
    for seed in range(NUM_SEEDS):
        walk = Walk(seed)
        try:
            walk.run(NUM_MOVES)
            walk.heal()
        except AssertionError as error:
            raise AssertionError(f"seed {seed}: {error}") from error
        seen.update(answer["status"] for _, answer in walk.world.answers)
        seen["commits"] += walk.world.num_commits
    # walks that never come so far test nothing
    assert min(seen[name] for name in ("updated", "laggards", "interrupted", "timed_out", "refused", "in_doubt")) > 0
    assert seen["commits"] > NUM_SEEDS


# ---------------------------------------------------------------------------- schedules that chance seldom finds
class Directed:
    """A world driven by hand."""

    def __init__(self, num_ranks: int = 2) -> None:
        self.world = World(3)
        for number in range(num_ranks):
            self.world.register(number, f"node-{number}")

    def begin(self, *exclude: str) -> None:
        self.world.begin("retract", list(exclude))
        self.world.store_next("stored")

    def deliver(self) -> None:
        letters, self.world.post = self.world.post, []
        for letter in letters:
            self.world.deliver(letter)

    def turn(self, *numbers: int) -> None:
        for number in numbers:
            name = f"rank-{number}"
            self.world.turn(name)
            while self.world.ranks[name].staging:
                self.world.finish_staging(name, is_good=True)
            self.world.turn(name)

    def until_decision(self) -> None:
        """All have voted, the decision is to be stored."""
        self.begin()
        self.deliver()
        self.turn(*range(len(self.world.ranks)))
        self.deliver()
        assert isinstance(self.world.stores[0], events.StoreDecision)

    def rank(self, number: int) -> WeightDesk:
        return self.world.ranks[f"rank-{number}"].desk

    @property
    def last(self) -> dict[str, Any]:
        return self.world.answers[-1][1]


def test_the_world_gets_somewhere() -> None:
    """Two updates without a fault, so that the rules above test something."""
    directed = Directed(3)
    world = directed.world
    for number in (1, 2):
        directed.until_decision()
        world.store_next("stored")
        directed.deliver()
        directed.turn(0, 1, 2)
        directed.deliver()
        world.store_next("stored")
        assert directed.last["success"]
        assert world.num_commits == 3 * number
    assert {rank.desk.record for rank in world.ranks.values()} == {world.state.record}


def test_a_rank_that_slept_through_an_aborted_and_a_decided_update() -> None:
    """It voted for the first, which was given up; the floor of the second is not the decision of the first."""
    directed = Directed()
    world = directed.world
    directed.begin()
    directed.deliver()
    directed.turn(0)
    world.ranks["rank-1"].inbox.clear()
    world.pass_time(7.0)
    world.post.clear()
    world.store_next("stored")
    assert directed.last["status"] == "timed_out"

    directed.begin("0")
    directed.deliver()
    directed.turn(1)
    directed.deliver()
    world.store_next("stored")
    directed.deliver()
    directed.turn(1)
    directed.deliver()
    assert directed.rank(1).record == world.state.record > 0
    directed.turn(0)
    assert (directed.rank(0).record, directed.rank(0).may_admit) == (0, False)


def test_in_doubt_and_out_of_lease_nothing_is_admitted_whatever_the_deadline() -> None:
    directed = Directed()
    world = directed.world
    directed.until_decision()
    world.cut_off("node-0")
    world.run_out("node-0")
    world.store_next("stored")
    directed.turn(0)
    assert not directed.rank(0).may_admit
    world.pass_time(60.0)
    directed.turn(0)
    assert not directed.rank(0).may_admit
    directed.deliver()
    directed.turn(1)
    directed.deliver()
    world.grant("node-0")
    directed.turn(0)
    assert (directed.rank(0).is_stale, directed.rank(1).record) == (True, world.state.record)


def test_a_decision_of_which_nobody_heard_is_carried_forward_by_the_next_controller() -> None:
    directed = Directed()
    world = directed.world
    directed.until_decision()
    world.store_next("unknown, there")
    world.pass_time(10.0)
    assert [answer["status"] for _, answer in world.answers] == ["in_doubt"]
    world.crash_controller()
    directed.turn(0, 1)
    assert world.num_commits == 0
    world.restart_controller()
    directed.deliver()
    directed.turn(0, 1)
    directed.deliver()
    assert world.num_commits == 2
    world.store_next("stored")
    assert (directed.last["success"], directed.last["decided"]) == (True, True)


def test_a_controller_that_dies_before_the_decision_leaves_the_old_weights() -> None:
    directed = Directed()
    world = directed.world
    directed.until_decision()
    world.crash_controller()
    world.restart_controller()
    directed.deliver()
    directed.turn(0, 1)
    world.store_next("stored")
    assert directed.last["status"] == "interrupted"
    assert [directed.rank(number).record for number in (0, 1)] == [0, 0]
    assert all(directed.rank(number).may_admit for number in (0, 1))


def test_no_success_before_a_rank_that_came_late_has_read_the_decision() -> None:
    """It was told the old weights when it registered, and its node cannot be told the floor."""
    directed = Directed()
    world = directed.world
    directed.until_decision()
    world.register(2, "node-2")
    world.cut_off("node-2")
    world.store_next("stored")
    held = [letter for letter in world.post if letter.incarnation == "rank-2"]
    world.post = [letter for letter in world.post if letter.incarnation != "rank-2"]
    directed.deliver()
    directed.turn(0, 1)
    directed.deliver()
    assert not world.answers
    world.post = held
    directed.deliver()
    directed.turn(2)
    directed.deliver()
    world.store_next("stored")
    assert directed.last["success"]
    assert directed.rank(2).is_stale


def test_an_update_behind_a_decided_one_does_not_free_a_laggard_from_it() -> None:
    """It voted, never heard of the decision, and is asked to prepare the next one."""
    directed = Directed()
    world = directed.world
    directed.until_decision()
    world.cut_off("node-0")
    world.store_next("stored")
    world.post = [letter for letter in world.post if letter.incarnation != "rank-0"]
    directed.deliver()
    directed.turn(1)
    directed.deliver()
    world.pass_time(10.0)
    world.post.clear()
    world.store_next("stored")
    assert directed.last["laggards"] == ["rank-0"]

    directed.begin()
    directed.deliver()
    world.run_out("node-0")
    world.turn("rank-0")
    assert directed.rank(0).record == world.state.record or not directed.rank(0).may_admit
