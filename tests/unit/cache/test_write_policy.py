"""When each policy copies, what is remembered of it in the index, and what its sanity check says."""

from __future__ import annotations

import pytest

from cache import DEFAULT_NAMESPACE, DeviceCache, PageHold, TokenBytes
from cache.write_policy import (
    WRITE_MOMENTS,
    Watermarks,
    backed_stop,
    backing_violations,
    forget_backed,
    mark_backed,
    mark_lost,
)
from tests.unit.cache.tokens import run_of, tokens_of

PAGE = 16


def published(cache: DeviceCache, tokens: TokenBytes) -> PageHold:
    """Open, fill and publish; the hold stays open."""
    hold = cache.open(DEFAULT_NAMESPACE, tokens, len(tokens) // 4, now_s=0.0)
    assert cache.try_extend(hold, len(tokens) // 4)
    cache.publish(hold, tokens, len(tokens) // 4, now_s=0.0)
    return hold


def violations(cache: DeviceCache) -> list[str]:
    return list(backing_violations(cache.index, "write_through"))


def test_each_policy_has_its_own_moments() -> None:
    moments = {name: (m.at_publish, m.at_hit, m.at_eviction) for name, m in WRITE_MOMENTS.items()}
    assert moments == {
        "write_through": (True, True, False),
        "write_through_selective": (False, True, False),
        "write_back": (False, False, True),
    }


def test_watermarks_evict_up_to_the_high_one_and_count_what_is_leaving() -> None:
    marks = Watermarks.of_shares(0.1, 0.25, 100)
    assert marks == Watermarks(10, 25)
    assert marks.num_to_evict(num_free=10, num_leaving=0) == 0
    assert marks.num_to_evict(num_free=4, num_leaving=0) == 21
    assert marks.num_to_evict(num_free=4, num_leaving=5) == 16
    assert marks.num_to_evict(num_free=4, num_leaving=6) == 0


def test_a_whole_path_is_backed_up_to_a_position_and_a_split_keeps_it_so() -> None:
    cache = DeviceCache(32, 4)
    hold = published(cache, run_of(20))
    assert backed_stop(cache.index, hold.node) == 0
    mark_backed(cache.index, hold.node, 3 * PAGE)
    assert backed_stop(cache.index, hold.node) == 3 * PAGE
    other = published(cache, run_of(8) + tokens_of(90, 91, 92, 93))
    assert backed_stop(cache.index, hold.node) == 3 * PAGE
    assert backed_stop(cache.index, other.node) == 2 * PAGE
    assert violations(cache) == []
    mark_backed(cache.index, other.node, 3 * PAGE)
    assert backed_stop(cache.index, other.node) == 3 * PAGE


def test_a_stop_above_the_node_backs_only_what_lies_before_it() -> None:
    cache = DeviceCache(32, 4)
    first = published(cache, run_of(16))
    other = published(cache, run_of(8) + tokens_of(*range(50, 58)))
    mark_backed(cache.index, other.node, 1 * PAGE)
    assert backed_stop(cache.index, other.node) == PAGE
    assert backed_stop(cache.index, first.node) == PAGE
    assert violations(cache) == []


def test_a_lost_page_takes_what_lies_below_it_along() -> None:
    cache = DeviceCache(32, 4)
    first = published(cache, run_of(16))
    other = published(cache, run_of(8) + tokens_of(*range(50, 58)))
    for hold in (first, other):
        mark_backed(cache.index, hold.node, 4 * PAGE)
    mark_lost(cache.index, other.node, PAGE)
    assert backed_stop(cache.index, first.node) == PAGE
    assert backed_stop(cache.index, other.node) == PAGE
    assert violations(cache) == []


def test_a_backed_child_under_an_unbacked_parent_is_an_error_where_parents_go_first() -> None:
    cache = DeviceCache(32, 4)
    first = published(cache, run_of(16))
    published(cache, run_of(8) + tokens_of(*range(50, 58)))
    cache.index.table.backed[first.node] = 1
    assert len(violations(cache)) == 1
    assert list(backing_violations(cache.index, "write_back")) == []
    forget_backed(cache.index)
    assert violations(cache) == []


@pytest.mark.parametrize("num_pages", [1, 2])
def test_eviction_takes_the_mark_of_what_it_trims(num_pages: int) -> None:
    cache = DeviceCache(4, 4)
    hold = published(cache, run_of(16))
    mark_backed(cache.index, hold.node, 4 * PAGE)
    node = hold.node
    cache.close(hold)
    taker = cache.open(DEFAULT_NAMESPACE, tokens_of(*range(70, 74)), 0, now_s=1.0)
    assert cache.try_extend(taker, 4 * num_pages)
    assert backed_stop(cache.index, node) == (4 - num_pages) * PAGE
    assert violations(cache) == []
