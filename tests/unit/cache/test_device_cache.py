"""DeviceCache as the scheduler sees it: admission, growth, publishing, ending. Flushes: test_flush.py."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest

from cache import DEFAULT_NAMESPACE, DeviceCache, Namespace, PageHold, TokenBytes
from configs.errors import InvariantError
from tests.unit.cache.tokens import run_of, tokens_of

NS = DEFAULT_NAMESPACE


@pytest.fixture
def cache() -> Iterator[DeviceCache]:
    cache = DeviceCache(num_pages=16, page_size=4)
    yield cache
    assert cache.sanity_check() == []


def prefill(cache: DeviceCache, tokens: TokenBytes, namespace: Namespace = NS) -> PageHold:
    """Admit, compute and publish all of `tokens`; the hold stays open."""
    hold = cache.open(namespace, tokens, len(tokens) // 4, now_s=0.0)
    assert cache.try_extend(hold, len(tokens) // 4)
    cache.publish(hold, tokens, len(tokens) // 4, now_s=0.0)
    return hold


def test_first_request_finds_nothing(cache: DeviceCache) -> None:
    hold = cache.open(NS, run_of(10), 9, now_s=0.0)
    assert hold.num_cached_tokens == 0
    assert hold.kv_epoch is None
    assert len(hold.page_table) == 0
    cache.close(hold)


def test_a_repeated_prompt_reuses_whole_pages_below_the_limit(cache: DeviceCache) -> None:
    first = prefill(cache, run_of(12))
    cache.close(first)
    again = cache.open(NS, run_of(12), 11, now_s=1.0)
    assert again.num_cached_tokens == 8
    assert again.kv_epoch == cache.epoch
    assert again.page_table.tolist() == first.page_table[:2].tolist()
    cache.close(again)


def test_partial_pages_are_never_published(cache: DeviceCache) -> None:
    cache.close(prefill(cache, run_of(7)))
    assert cache.counts().cached == 1


def test_a_prompt_that_parts_inside_an_edge_reuses_the_common_pages(cache: DeviceCache) -> None:
    cache.close(prefill(cache, run_of(16)))
    other = run_of(9) + tokens_of(99, 99, 99, 99)
    hold = cache.open(NS, other, 13, now_s=1.0)
    assert hold.num_cached_tokens == 8
    cache.close(hold)


def test_a_match_changes_nothing(cache: DeviceCache) -> None:
    cache.close(prefill(cache, run_of(16)))
    edges = list(cache.index.table.edges)
    cache.index.match(NS, run_of(10), 8 * 4)
    assert cache.index.table.edges == edges


def test_namespaces_never_meet(cache: DeviceCache) -> None:
    cache.close(prefill(cache, run_of(8), Namespace("a")))
    hold = cache.open(Namespace("b"), run_of(8), 8, now_s=1.0)
    assert hold.num_cached_tokens == 0
    cache.close(hold)


def test_extension_adds_private_pages_and_keeps_the_others(cache: DeviceCache) -> None:
    hold = cache.open(NS, run_of(5), 4, now_s=0.0)
    assert cache.try_extend(hold, 5)
    before = hold.page_table
    assert cache.try_extend(hold, 9)
    assert hold.page_table[:2].tolist() == before.tolist()
    assert hold.page_table.dtype == np.int32
    assert hold.num_tokens_capacity == 12
    assert cache.counts().private == 3
    cache.close(hold)
    assert cache.counts().free == 16


def test_a_page_table_handed_out_is_not_changed_by_growth(cache: DeviceCache) -> None:
    hold = cache.open(NS, run_of(5), 4, now_s=0.0)
    assert cache.try_extend(hold, 5)
    table = hold.page_table
    kept = table.tolist()
    assert cache.try_extend(hold, 30)
    assert table.tolist() == kept
    cache.close(hold)


def test_shortage_changes_nothing(cache: DeviceCache) -> None:
    cache.close(prefill(cache, run_of(16, first=100)))
    running = prefill(cache, run_of(40))
    counts = cache.counts()
    late = cache.open(NS, run_of(40, first=200), 39, now_s=1.0)
    assert not cache.try_extend(late, 28)
    assert cache.counts() == counts
    assert cache.try_extend(late, 24)
    cache.close(late)
    cache.close(running)


def test_eviction_takes_the_least_recently_used_leaf_first(cache: DeviceCache) -> None:
    old, new = run_of(16), run_of(16, first=100)
    cache.close(prefill(cache, old))
    cache.close(prefill(cache, new))
    cache.close(cache.open(NS, old, 16, now_s=2.0))  # used again, so `new` is the older one now
    hold = cache.open(NS, run_of(48, first=200), 0, now_s=3.0)
    assert cache.try_extend(hold, 48)
    assert cache.num_evicted_pages == 4
    assert cache.index.match(NS, old, 64)[1] == 64
    assert cache.index.match(NS, new, 64)[1] == 0
    cache.close(hold)


def test_eviction_trims_a_leaf_from_its_end(cache: DeviceCache) -> None:
    cache.close(prefill(cache, run_of(40)))
    hold = cache.open(NS, run_of(32, first=100), 0, now_s=1.0)
    assert cache.try_extend(hold, 32)
    assert cache.num_evicted_pages == 2
    assert cache.index.match(NS, run_of(40), 160)[1] == 32 * 4
    cache.close(hold)


def test_pinned_pages_are_not_evicted(cache: DeviceCache) -> None:
    running = prefill(cache, run_of(40))
    hold = cache.open(NS, run_of(40, first=100), 0, now_s=1.0)
    assert not cache.try_extend(hold, 28)
    assert cache.counts().pinned == 10
    cache.close(hold)
    cache.close(running)


def test_publishing_chunk_by_chunk_shares_the_growing_prefix(cache: DeviceCache) -> None:
    hold = cache.open(NS, run_of(20), 19, now_s=0.0)
    assert cache.try_extend(hold, 20)
    for computed, shared in ((6, 1), (12, 3), (20, 5)):
        cache.publish(hold, run_of(20), computed, now_s=0.0)
        assert cache.index.match(NS, run_of(20), 80)[1] == shared * 16
        assert cache.sanity_check() == []
    cache.close(hold)
    assert cache.counts().cached == 5


def test_pages_computed_twice_are_kept_once(cache: DeviceCache) -> None:
    twins = [cache.open(NS, run_of(12), 11, now_s=0.0) for _ in range(2)]
    for hold in twins:
        assert cache.try_extend(hold, 12)
    for hold in twins:
        cache.publish(hold, run_of(12), 12, now_s=1.0)
    assert cache.counts().pinned == 3
    assert cache.counts().free == 13
    assert twins[0].page_table.tolist() == twins[1].page_table.tolist()
    assert cache.num_duplicate_pages == 3
    for hold in twins:
        cache.close(hold)


def test_a_hold_pinned_inside_an_edge_publishes_after_the_edge_was_split(cache: DeviceCache) -> None:
    cache.close(prefill(cache, run_of(16)))
    forks = [run_of(8) + run_of(8, first=first) for first in (100, 200)]
    holds = [cache.open(NS, fork, 16, now_s=1.0) for fork in forks]
    for hold, fork in zip(holds, forks, strict=True):
        assert cache.try_extend(hold, 16)
        cache.publish(hold, fork, 16, now_s=1.0)
        assert cache.sanity_check() == []
    assert [cache.index.match(NS, tokens, 64)[1] for tokens in (*forks, run_of(16))] == [64, 64, 64]
    for hold in holds:
        cache.close(hold)


def test_a_disabled_cache_matches_and_publishes_nothing() -> None:
    cache = DeviceCache(8, 4, enabled=False)
    cache.close(prefill(cache, run_of(8)))
    assert cache.counts().free == 8


def test_a_closed_hold_is_of_no_use(cache: DeviceCache) -> None:
    hold = prefill(cache, run_of(8))
    cache.close(hold)
    for use in (
        lambda: cache.close(hold),
        lambda: cache.try_extend(hold, 100),
        lambda: cache.publish(hold, run_of(8), 8, 0.0),
    ):
        with pytest.raises(InvariantError, match="after its end"):
            use()


def test_publishing_what_has_no_pages_is_refused(cache: DeviceCache) -> None:
    hold = cache.open(NS, run_of(8), 7, now_s=0.0)
    with pytest.raises(InvariantError, match="8 tokens to publish"):
        cache.publish(hold, run_of(8), 8, now_s=0.0)
    cache.close(hold)


def test_counters_tell_lookups_and_hits(cache: DeviceCache) -> None:
    cache.close(prefill(cache, run_of(12)))
    cache.close(cache.open(NS, run_of(12), 11, now_s=1.0))
    assert (cache.num_lookup_tokens, cache.num_hit_tokens, cache.num_published_pages) == (24, 8, 3)
