"""PrefixIndex: shape of the tree after inserts, splits, growth and drops. What requests see: test_device_cache.py."""

from __future__ import annotations

import numpy as np
import pytest

from cache import DEFAULT_NAMESPACE, DeviceCache, Namespace, PageHold, TokenBytes
from configs.errors import InvariantError
from tests.unit.cache.tokens import run_of, tokens_of

NS = DEFAULT_NAMESPACE


def prefill(cache: DeviceCache, tokens: TokenBytes, namespace: Namespace = NS) -> PageHold:
    hold = cache.open(namespace, tokens, len(tokens) // 4, now_s=0.0)
    assert cache.try_extend(hold, len(tokens) // 4)
    cache.publish(hold, tokens, len(tokens) // 4, now_s=0.0)
    return hold


def num_edges(cache: DeviceCache) -> int:
    return len(cache.index.table)


def test_an_insert_splits_where_paths_part() -> None:
    cache = DeviceCache(16, 4)
    cache.close(prefill(cache, run_of(16)))
    cache.close(prefill(cache, run_of(8) + run_of(8, first=100)))
    assert sorted(len(edge) // 16 for edge in cache.index.table.edges) == [2, 2, 2]
    assert cache.sanity_check() == []


def test_turns_of_a_conversation_are_one_edge() -> None:
    cache = DeviceCache(32, 4)
    for length in (12, 40, 72, 128):
        cache.close(prefill(cache, run_of(length)))
    assert num_edges(cache) == 1
    assert cache.counts().cached == 32


def test_a_long_prompt_published_in_chunks_is_few_edges() -> None:
    cache = DeviceCache(8192, 16)
    tokens = np.arange(128 * 1024, dtype=np.int32).tobytes()
    hold = cache.open(NS, tokens, 0, now_s=0.0)
    assert cache.try_extend(hold, 128 * 1024)
    for computed in range(2048, 128 * 1024 + 1, 2048):
        cache.publish(hold, tokens, computed, now_s=0.0)
    cache.close(hold)
    assert num_edges(cache) <= 10
    assert cache.index.match(NS, tokens, len(tokens))[1] == len(tokens)
    assert cache.sanity_check() == []


def test_a_leaf_that_another_request_pins_does_not_grow() -> None:
    cache = DeviceCache(16, 4)
    short = prefill(cache, run_of(8))
    cache.close(prefill(cache, run_of(16)))
    assert num_edges(cache) == 2
    assert cache.counts().pinned == 2
    cache.close(short)


@pytest.mark.parametrize("num_common", [1, 2, 3, 5, 8, 13, 30])
@pytest.mark.parametrize("num_more", [0, 1, 7])
def test_the_end_of_a_match_is_found_on_the_page(num_common: int, num_more: int) -> None:
    cache = DeviceCache(64, 2)
    cache.close(prefill(cache, run_of(62)))
    query = run_of(2 * num_common + 1) + tokens_of(-1) * (2 * num_more)
    limit = len(query) // 8 * 8
    assert cache.index.match(NS, query, limit)[1] == 8 * num_common


def test_a_dropped_prompt_can_be_cached_anew_before_it_was_taken_apart() -> None:
    cache = DeviceCache(16, 4)
    for first in (0, 0, 100):
        cache.close(prefill(cache, run_of(8, first=first)))
    cache.drop_namespace(NS)
    cache.close(prefill(cache, run_of(12)))
    while cache.reap(1):
        assert cache.sanity_check() == []
    assert cache.index.match(NS, run_of(12), 48)[1] == 48
    assert cache.index.match(NS, run_of(8, first=100), 32)[1] == 0
    assert cache.counts().cached == 3


def test_namespaces_leave_nothing_behind() -> None:
    cache = DeviceCache(4, 4)
    for tenant in range(50):
        cache.close(prefill(cache, run_of(8), Namespace(f"tenant-{tenant}")))
    assert len(cache.index.spaces) == 2
    assert num_edges(cache) == 2


def test_publishing_other_tokens_than_those_matched_is_refused() -> None:
    cache = DeviceCache(16, 4)
    cache.close(prefill(cache, run_of(12)))
    hold = cache.open(NS, run_of(14), 8, now_s=1.0)
    assert cache.try_extend(hold, 16)
    with pytest.raises(InvariantError, match="not those under which"):
        cache.publish(hold, tokens_of(7, 7, 7, 7, 7, 7, 7, 7) + run_of(8, first=8), 16, now_s=1.0)
    cache.close(hold)
