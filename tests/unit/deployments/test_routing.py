"""Rank choice: longest known prefix, bounded load, and a memory that forgets with the cache it mirrors."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.messages import Member, Membership
from configs.errors import InvalidField, NoRank
from deployments.routing import MAX_CHAIN_BLOCKS, Candidate, PrefixMemory, Router, block_chain, choose

PAGE = 16


def tokens(*ids: int) -> bytes:
    """Four tokens for each id: four ids are a page."""
    return np.repeat(np.asarray(ids, dtype="<i4"), 4).tobytes()


def members(count: int, epoch: int = 0, floor: int = 0) -> Membership:
    ranks = tuple(Member(rank, f"i{rank}", "n", "", "", 512, PAGE) for rank in range(count))
    return Membership(version=1, epoch=epoch, floor=floor, members=ranks)


def place(router: Router, membership: Membership, prompt: bytes, namespace: str = "") -> str:
    with router.placed(membership, prompt, namespace) as member:
        return member.incarnation


candidates = st.lists(
    st.builds(
        Candidate,
        incarnation=st.uuids().map(str),
        num_running=st.integers(0, 50),
        num_known_blocks=st.integers(0, 20),
        num_sent=st.integers(0, 100),
    ),
    min_size=1,
    max_size=8,
)


@given(candidates)
def test_the_choice_has_the_longest_prefix_of_those_within_a_quarter_above_the_mean(
    all_of_them: list[Candidate],
) -> None:
    chosen = next(one for one in all_of_them if one.incarnation == choose(all_of_them))
    mean = (sum(one.num_running for one in all_of_them) + 1) / len(all_of_them)
    assert chosen.num_running + 1 < 1.25 * mean + 1
    better = [one for one in all_of_them if one.num_known_blocks > chosen.num_known_blocks]
    assert all(one.num_running + 1 > 1.25 * mean for one in better)


def test_a_known_prefix_goes_where_it_is_cached() -> None:
    router, two = Router(), members(2)
    prompt = tokens(*range(8))
    first = place(router, two, prompt)
    place(router, two, tokens(9, 9, 9, 9))
    assert place(router, two, prompt + tokens(50, 51, 52, 53)) == first


def test_unknown_prompts_take_turns() -> None:
    router, two = Router(), members(2)
    places = [place(router, two, tokens(i, i, i, i)) for i in range(6)]
    assert places.count("i0") == places.count("i1") == 3


def test_load_goes_before_a_cached_prefix() -> None:
    router, two = Router(), members(2)
    prompt = tokens(*range(8))
    with ExitStack() as stack:
        placed = [stack.enter_context(router.placed(two, prompt, "")).incarnation for _ in range(20)]
    assert 8 <= placed.count("i0") <= 12
    assert router.num_running("i0") == router.num_running("i1") == 0


def test_a_flush_and_a_new_incarnation_forget() -> None:
    router, two = Router(), members(2)
    prompt = tokens(*range(8))
    first = place(router, two, prompt)
    other = {"i0": "i1", "i1": "i0"}[first]
    flushed = replace(two, epoch=1)
    assert place(router, flushed, prompt) == other
    place(router, replace(flushed, members=flushed.members[:1]), prompt)
    assert set(router._memories) == {"i0"}


def test_namespaces_do_not_meet() -> None:
    assert block_chain(tokens(*range(8)), PAGE, "a") != block_chain(tokens(*range(8)), PAGE, "b")


def test_small_pages_are_hashed_in_blocks_and_long_prompts_up_to_a_bound() -> None:
    assert block_chain(tokens(*range(8)), 1, "") == block_chain(tokens(*range(8)), PAGE, "")
    assert len(block_chain(bytes(4 * PAGE * 5000), PAGE, "")) == MAX_CHAIN_BLOCKS


def test_a_chain_is_one_hash_per_whole_page_and_depends_on_all_before() -> None:
    chain = block_chain(tokens(*range(11)), PAGE, "")
    assert len(chain) == 2
    assert block_chain(tokens(99, *range(1, 8)), PAGE, "")[1] != chain[1]
    assert block_chain(tokens(*range(8), 70, 71, 72, 73), PAGE, "")[:2] == chain


@given(st.lists(st.integers(0, 30), min_size=1, max_size=40))
def test_the_memory_stays_bounded_and_keeps_parents_before_leaves(prompts: list[int]) -> None:
    memory = PrefixMemory(max_blocks=8)
    for prompt in prompts:
        chain = [prompt * 100 + depth for depth in range(5)]
        memory.remember(chain)
        assert len(memory) <= 8
        assert memory.num_known(chain) == 5
    for prompt in set(prompts):
        known = [prompt * 100 + depth in memory._hashes for depth in range(5)]
        assert known == sorted(known, reverse=True)


def test_a_wanted_rank_is_taken_or_named_as_missing() -> None:
    router, two = Router(), members(2)
    with router.placed(two, tokens(1), "", rank=1) as member:
        assert member.rank == 1
    with pytest.raises(InvalidField, match="serving ranks: 0, 1"), router.placed(two, tokens(1), "", rank=7):
        pass


def test_nobody_left_is_an_error_of_the_service() -> None:
    with pytest.raises(NoRank), Router().placed(members(0), tokens(1), ""):
        pass
    with pytest.raises(NoRank), Router().placed(members(1), tokens(1), "", avoid=frozenset({"i0"})):
        pass
