"""The host tier's whole protocol under random orders, crashes and faults: 0 stale, 0 wrong, 0 leaked.

Invariants of protocol.md: 3, 11, 12, 13, 14 and 16, each named where `HostWorld` checks it. 15 needs processes, 17
keys: `tests/unit/cache/test_shared_file.py`, `test_host_reader.py`, `test_keys.py`.
"""

from __future__ import annotations

import os
from typing import Literal, get_args

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from tests.property.cache.host_actors import (
    CHAIN_PAGES,
    MAX_RANKS,
    NAMESPACES,
    NUM_CHAINS,
    Chain,
    FlipTarget,
    Overtaking,
    Rank,
)
from tests.property.cache.host_world import HostWorld

RankEvent = Literal["start", "kill", "freeze", "thaw", "declare_dead", "reconcile", "give_back", "swap_first"]
Flush = Literal["floor", "new_epoch", "catch_up", "host", "age", "namespace"]

ranks = st.integers(0, MAX_RANKS - 1)
chains = st.tuples(st.sampled_from(NAMESPACES), st.integers(0, NUM_CHAINS - 1))
lengths = st.integers(1, CHAIN_PAGES)
#: share of an operation's stores after which the writer dies; None: it lives
deaths = st.one_of(st.none(), st.floats(0, 1))
overtakings = st.lists(st.floats(0, 1), min_size=10, max_size=10).map(sorted)


class HostTierMachine(RuleBasedStateMachine):
    """Chooses what happens; `HostWorld` does it and checks it."""

    @initialize(is_scan_resistant=st.booleans(), is_verified=st.booleans())
    def begin(self, is_scan_resistant: bool, is_verified: bool) -> None:
        self.world = HostWorld(is_scan_resistant, "full" if is_verified else "off")
        for index, namespace in enumerate(NAMESPACES):
            self.store(index, (namespace, index), 2, None)

    def rank(self, index: int) -> Rank:
        """A rank that is awake. If all are frozen one wakes, if all are dead one starts."""
        if not self.world.ranks:
            self.world.start_rank()
        rank = self.world.rank(index)
        if rank is None:
            rank = self.world.ranks[index % len(self.world.ranks)]
            self.world.thaw(rank)
        return rank

    @rule(index=ranks, num_slots=st.integers(1, 5), dies_at=deaths)
    def lease(self, index: int, num_slots: int, dies_at: float | None) -> None:
        self.world.lease(self.rank(index), num_slots, dies_at)

    @rule(index=ranks, chain=chains, num_pages=lengths, is_halfway=st.booleans())
    def write(self, index: int, chain: Chain, num_pages: int, is_halfway: bool) -> None:
        self.world.write(self.rank(index), chain, num_pages, is_halfway)

    @rule(index=ranks, dies_at=deaths)
    def commit(self, index: int, dies_at: float | None) -> None:
        self.world.commit(self.rank(index), dies_at)

    @rule(index=ranks, chain=chains, num_pages=lengths, dies_at=deaths)
    def store(self, index: int, chain: Chain, num_pages: int, dies_at: float | None) -> None:
        """The usual way of a page: leased, written, committed, read by another rank."""
        rank = self.rank(index)
        self.world.write(rank, chain, num_pages, is_halfway=False)
        self.world.commit(rank, dies_at)
        self.read(index + 1, chain, is_later=False)

    @rule(index=ranks, chain=chains, is_later=st.booleans())
    def read(self, index: int, chain: Chain, is_later: bool) -> None:
        rank = self.rank(index)
        if is_later:
            self.world.look_up(rank, chain)
        else:
            self.world.read([*self.world.keys(chain, rank.epoch)], rank.epoch)

    @precondition(lambda self: self.world.tickets)
    @rule()
    def load_later(self) -> None:
        self.world.load_later()

    @rule(index=ranks, other=ranks, chain=chains, what=st.sampled_from(get_args(Overtaking)), overtaken=overtakings)
    def read_overtaken(self, index: int, other: int, chain: Chain, what: Overtaking, overtaken: list[float]) -> None:
        self.world.read_overtaken(self.rank(index), chain, self.rank(other), what, overtaken)

    @rule(index=ranks, event=st.sampled_from(get_args(RankEvent)), dies_at=deaths)
    def live(self, index: int, event: RankEvent, dies_at: float | None) -> None:
        world = self.world
        match event:
            case "start":
                world.start_rank()
            case "kill":
                world.kill_rank(self.rank(index))
            case "freeze":
                self.rank(index).is_frozen = True
            case "thaw":
                for rank in world.ranks:
                    world.thaw(rank)
            case "declare_dead":
                for rank in world.ranks[index:]:
                    world.declare_dead(rank, dies_at)
            case "reconcile":
                world.reconcile(self.rank(index))
            case "give_back":
                world.give_back(self.rank(index))
            case "swap_first":
                world.swap_first(self.rank(index))

    @rule(kind=st.sampled_from(get_args(Flush)), number=st.integers(0, 3), dies_at=deaths)
    def flush(self, kind: Flush, number: int, dies_at: float | None) -> None:
        world = self.world
        world.now_ns += 1
        match kind:
            case "floor" | "new_epoch":
                world.raise_floor(kind == "new_epoch")
            case "catch_up":
                world.catch_up()
            case "host":
                world.drop_host(dies_at)
            case "age":
                world.drop_older(number)
            case "namespace":
                world.drop_namespace(NAMESPACES[number % 2])

    @rule(num_pages=st.integers(1, 3), is_reclaim=st.booleans(), dies_at=deaths)
    def tend(self, num_pages: int, is_reclaim: bool, dies_at: float | None) -> None:
        if is_reclaim:
            self.world.reclaim(num_pages, dies_at)
        else:
            self.world.check_holders(dies_at)

    @rule(again=deaths)
    def kill_writer(self, again: float | None) -> None:
        self.world.kill_writer(again=again)

    @rule(chain=chains, bit=st.integers(0, 2**16), where=st.sampled_from(get_args(FlipTarget)))
    def flip_a_bit(self, chain: Chain, bit: int, where: FlipTarget) -> None:
        self.world.flip_a_bit(chain, bit, where)

    @invariant()
    def sound(self) -> None:
        if hasattr(self, "world"):
            self.world.check()

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.end()


NUM_EXAMPLES = int(os.environ.get("TIDEGATE_HOST_EXAMPLES", "250"))
COMMON = {"deadline": None, "suppress_health_check": list(HealthCheck), "print_blob": True}


class TestHostTier(HostTierMachine.TestCase):
    """Some hundreds of lives of a node."""

    settings = settings(max_examples=NUM_EXAMPLES, stateful_step_count=30, **COMMON)


@pytest.mark.deep
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("part", range(10))
def test_twenty_thousand_lives(part: int) -> None:
    """In parts: Hypothesis remembers 0.2 MB of each example of a run."""
    run_state_machine_as_test(HostTierMachine, settings=settings(max_examples=2000, stateful_step_count=40, **COMMON))
