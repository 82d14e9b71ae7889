"""Which pages each policy copies, and what its sanity check allows."""

from __future__ import annotations

from dataclasses import replace

from cache.types import PageId
from cache.write_policy import (
    WRITE_POLICIES,
    Backing,
    CachedPage,
    WriteView,
    backing_violations,
    write_back,
    write_through,
    write_through_selective,
)

EMPTY = WriteView(chains=(), victims=(), num_free=100, low_watermark=10, num_startable=100)


def page(number: int, num_hits: int = 1, backing: Backing = "none", parent: int | None = None) -> CachedPage:
    return CachedPage(PageId(number), None if parent is None else PageId(parent), num_hits, backing)


def chain(*pages: CachedPage) -> WriteView:
    return replace(EMPTY, chains=[pages])


def test_write_through_copies_at_the_first_insert_parents_first():
    assert write_through(chain(page(3), page(1), page(2))).writes == (3, 1, 2)


def test_what_is_backed_or_moving_is_not_copied_again():
    view = chain(page(1, backing="landed"), page(2, backing="moving"), page(3))
    assert write_through(view).writes == (3,)


def test_selective_copies_at_the_second_hit_and_leaves_no_gap():
    assert write_through_selective(chain(page(1, 2), page(2, 2), page(3, 1))).writes == (1, 2)
    assert write_through_selective(chain(page(1, 1), page(2, 2))).writes == ()


def test_a_chain_is_cut_where_the_copies_that_may_start_end():
    view = replace(EMPTY, chains=[[page(1), page(2)], [page(1), page(3)]], num_startable=2)
    assert write_through(view).writes == (1, 2)
    assert write_through(replace(view, num_startable=0)).writes == ()
    assert write_through(replace(view, num_startable=9)).writes == (1, 2, 3)


def test_write_back_copies_victims_only_and_only_below_the_watermark():
    victims = [page(number, parent=number + 1) for number in range(5)]
    view = replace(EMPTY, chains=[[page(50)]], victims=victims)
    assert write_back(view).writes == ()
    assert write_back(replace(view, num_free=8)).writes == (0, 1)
    assert write_through(replace(view, chains=(), num_free=0)).writes == ()


def test_write_back_counts_what_can_be_evicted_without_waiting():
    victims = [page(0, backing="landed"), page(1, backing="moving"), page(2), page(3)]
    choice = write_back(replace(EMPTY, victims=victims, num_free=7))
    assert choice.writes == (2,)


def test_write_back_drops_only_when_the_device_is_nearly_empty_and_the_host_is_full():
    victims = [page(number) for number in range(5)]
    short = replace(EMPTY, victims=victims, num_free=1, num_startable=2)
    choice = write_back(short)
    assert (choice.writes, choice.drops) == ((0, 1), (2, 3, 4))
    assert write_back(replace(short, num_free=5)).drops == ()


def test_backed_children_of_unbacked_parents_are_normal_under_write_back_only():
    pages = [page(1), page(2, backing="landed", parent=1), page(3, backing="moving", parent=99)]
    assert backing_violations(pages, "write_back") == []
    for policy in ("write_through", "write_through_selective"):
        assert backing_violations(pages, policy) == ["page 2 is backed up (landed), its parent 1 is not"]
    sound = [page(1, backing="moving"), page(2, backing="moving", parent=1)]
    assert backing_violations(sound, "write_through") == []


def test_every_policy_of_the_configuration_is_there():
    assert list(WRITE_POLICIES) == ["write_through", "write_through_selective", "write_back"]
    assert all(policy(EMPTY).writes == () for policy in WRITE_POLICIES.values())
