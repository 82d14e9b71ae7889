"""Swaps and scoped drops: what may not be matched, published or handed out, and when pages come back."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from cache import DEFAULT_NAMESPACE, DeviceCache, Dropped, Epoch, Namespace, PageHold, Swapped, TokenBytes
from configs.errors import InvariantError
from tests.unit.cache.tokens import run_of, tokens_of

NS = DEFAULT_NAMESPACE


@pytest.fixture
def cache() -> Iterator[DeviceCache]:
    cache = DeviceCache(num_pages=16, page_size=4)
    yield cache
    assert cache.sanity_check() == []


def prefill(
    cache: DeviceCache, tokens: TokenBytes, namespace: Namespace = NS, *, publish: bool = True, now_s: float = 0.0
) -> PageHold:
    hold = cache.open(namespace, tokens, len(tokens) // 4, now_s)
    assert cache.try_extend(hold, len(tokens) // 4)
    if publish:
        cache.publish(hold, tokens, len(tokens) // 4, now_s)
    return hold


def take_all_free(cache: DeviceCache) -> PageHold:
    """A request that is given every page that can be had."""
    hold = cache.open(NS, b"", 0, now_s=9.0)
    num_pages = cache.counts().free + cache.counts().cached
    assert cache.try_extend(hold, num_pages * cache.page_size)
    return hold


def cached_tokens(cache: DeviceCache, tokens: TokenBytes, namespace: Namespace = NS) -> int:
    return cache.index.match(namespace, tokens, len(tokens) // 16 * 16)[1] // 4


def test_after_a_swap_nothing_is_found(cache: DeviceCache) -> None:
    cache.close(prefill(cache, run_of(12)))
    assert cache.swap(Epoch(3)) == Swapped(freed_pages=3, carried_pages=0)
    assert (cache.epoch, cache.generation) == (3, 1)
    assert cached_tokens(cache, run_of(12)) == 0
    assert cache.counts().free == 16


@pytest.mark.parametrize("publish", [False, True])
def test_pages_of_a_running_request_are_never_handed_out_again_after_a_flush(cache: DeviceCache, publish: bool) -> None:
    running = prefill(cache, run_of(20), publish=publish)
    cache.close(prefill(cache, run_of(12, first=100)))
    cache.swap(Epoch(1))
    rest = take_all_free(cache)
    assert set(rest.page_table.tolist()) == set(range(16)) - set(running.page_table.tolist())
    cache.close(running)
    more = take_all_free(cache)
    assert sorted(more.page_table.tolist()) == sorted(running.page_table.tolist())
    cache.close(rest)
    cache.close(more)


def test_shared_pages_come_back_exactly_when_the_last_owner_closes(cache: DeviceCache) -> None:
    owners = [prefill(cache, run_of(8) + run_of(4, first=first)) for first in (100, 200)]
    assert cache.swap(Epoch(1)) == Swapped(freed_pages=0, carried_pages=4)
    assert cache.counts().fenced == 4
    cache.close(owners[0])
    assert cache.counts().fenced == 3
    assert cache.sanity_check() == []
    cache.close(owners[1])
    assert cache.counts().free == 16


def test_two_owners_of_one_branch_count_once_for_what_is_above_it(cache: DeviceCache) -> None:
    cache.close(prefill(cache, run_of(4) + run_of(4, first=50)))
    branch = run_of(4) + run_of(4, first=100)
    owners = [prefill(cache, branch), prefill(cache, branch)]
    cache.swap(Epoch(1))
    for owner, num_fenced in zip(owners, (2, 0), strict=True):
        cache.close(owner)
        assert cache.counts().fenced == num_fenced
    assert cache.counts().free == 16


def test_a_hold_survives_two_swaps(cache: DeviceCache) -> None:
    running = prefill(cache, run_of(8))
    cache.swap(Epoch(1))
    second = prefill(cache, run_of(8))
    cache.swap(Epoch(2))
    rest = take_all_free(cache)
    owned = [*running.page_table.tolist(), *second.page_table.tolist(), *rest.page_table.tolist()]
    assert sorted(owned) == list(range(16))
    for hold in (running, second, rest):
        cache.close(hold)
    assert cache.counts().free == 16


def test_what_a_fenced_request_computes_is_not_published(cache: DeviceCache) -> None:
    running = prefill(cache, run_of(8))
    cache.swap(Epoch(1))
    assert cache.try_extend(running, 16)
    cache.publish(running, run_of(16), 16, now_s=1.0)
    assert cached_tokens(cache, run_of(16)) == 0
    assert cache.counts().fenced == 4
    cache.close(running)


def test_a_request_that_had_matched_nothing_is_fenced_too(cache: DeviceCache) -> None:
    waiting = cache.open(NS, run_of(8), 7, now_s=0.0)
    cache.swap(Epoch(1))
    assert cache.try_extend(waiting, 8)
    cache.publish(waiting, run_of(8), 8, now_s=1.0)
    assert cached_tokens(cache, run_of(8)) == 0
    cache.close(waiting)


def test_a_fenced_request_keeps_its_pages_and_its_epoch(cache: DeviceCache) -> None:
    cache.close(prefill(cache, run_of(8)))
    running = cache.open(NS, run_of(12), 11, now_s=1.0)
    table = running.page_table.tolist()
    cache.swap(Epoch(5))
    assert running.page_table.tolist() == table
    assert (running.epoch, running.kv_epoch, running.is_fenced) == (0, 0, True)
    cache.close(running)


def test_a_swap_of_the_device_tier_alone_keeps_the_epoch(cache: DeviceCache) -> None:
    cache.close(prefill(cache, run_of(8)))
    cache.swap(cache.epoch)
    assert (cache.epoch, cache.generation) == (0, 1)
    assert cached_tokens(cache, run_of(8)) == 0


def test_epochs_never_fall(cache: DeviceCache) -> None:
    cache.swap(Epoch(4))
    with pytest.raises(InvariantError, match="only rise"):
        cache.swap(Epoch(3))


def test_old_indexes_are_taken_apart_in_slices(cache: DeviceCache) -> None:
    for first in range(4):
        cache.close(prefill(cache, run_of(4, first=100 * first)))
    cache.swap(Epoch(1))
    num_slices = 1
    while cache.reap(2):
        num_slices += 1
    assert num_slices > 4
    assert cache.retired == []


def test_a_swap_does_not_look_at_cached_pages() -> None:
    """Invariant 20: the same steps whatever is cached. Memory that a swap would touch is taken away before it."""
    cache = DeviceCache(num_pages=64, page_size=4)
    for first in range(8):
        cache.close(prefill(cache, run_of(16, first=1000 * first)))
    for column in (cache.index.table.edges, cache.index.table.pages, cache.index.table.children):
        column.clear()
    assert cache.swap(Epoch(1)) == Swapped(freed_pages=32, carried_pages=0)


class CountingList(list[int]):
    """A list that counts how often it was read."""

    num_reads = 0

    def __getitem__(self, index: object) -> int:  # type: ignore[override]
        self.num_reads += 1
        return super().__getitem__(index)  # type: ignore[call-overload, no-any-return]


def _reads_of_a_swap(depth: int) -> int:
    """Links followed by a swap with one open hold whose path has `depth` nodes."""
    cache = DeviceCache(num_pages=4 * depth, page_size=4)
    trunk = run_of(4 * depth)
    cache.close(prefill(cache, trunk))
    for page in range(1, depth):  # a branch at every page cuts the trunk there
        cache.close(prefill(cache, trunk[: 16 * page] + tokens_of(*[100_000 + page] * 4)))
    running = cache.open(NS, trunk, 4 * depth, now_s=1.0)
    assert running.num_cached_tokens == 4 * depth
    links = cache.index.table.parents = CountingList(cache.index.table.parents)
    cache.swap(Epoch(1))
    cache.close(running)
    return links.num_reads


def test_a_swap_follows_the_pinned_path_once() -> None:
    """Invariant 20, with holds: twice the path, twice the steps."""
    assert _reads_of_a_swap(64) < 2.5 * _reads_of_a_swap(32)
    assert _reads_of_a_swap(64) >= 64


def test_a_retired_index_goes_in_slices_its_vacancies_too(cache: DeviceCache) -> None:
    for first in range(0, 1600, 100):
        cache.close(prefill(cache, run_of(4, first=first)))
    table, stems = cache.index.table, cache.index.stems
    cache.drop_older(1.0)
    while cache.reap(8):
        assert cache.index.table is table
    num_vacancies = len(table._vacant) + len(stems._vacant)
    assert num_vacancies >= 16
    cache.swap(Epoch(1))
    while cache.reap(2):
        now = len(table._vacant) + len(stems._vacant)
        assert num_vacancies - now <= 2
        num_vacancies = now


def test_a_dropped_namespace_is_gone_and_the_others_stay(cache: DeviceCache) -> None:
    mine, other = Namespace("mine"), Namespace("other")
    for namespace in (mine, other):
        cache.close(prefill(cache, run_of(8), namespace))
    assert cache.count_namespace(mine) == Dropped(freed_pages=2, fenced_pages=0)
    assert cache.drop_namespace(mine) == Dropped(freed_pages=2, fenced_pages=0)
    assert cached_tokens(cache, run_of(8), mine) == 0
    assert cached_tokens(cache, run_of(8), other) == 8
    assert cache.counts().free == 14


def test_a_drop_fences_the_requests_it_covers_and_no_others(cache: DeviceCache) -> None:
    mine, other = Namespace("mine"), Namespace("other")
    running = [prefill(cache, run_of(8), namespace) for namespace in (mine, other)]
    assert cache.drop_namespace(mine) == Dropped(freed_pages=0, fenced_pages=2)
    assert [hold.is_fenced for hold in running] == [True, False]
    for hold in running:
        assert cache.try_extend(hold, 12)
        cache.publish(hold, run_of(12), 12, now_s=1.0)
    assert cached_tokens(cache, run_of(12), mine) == 0
    assert cached_tokens(cache, run_of(12), other) == 12
    for hold in running:
        cache.close(hold)


def test_pages_of_a_drop_are_free_before_they_are_taken_apart(cache: DeviceCache) -> None:
    running = prefill(cache, run_of(8))
    cache.close(prefill(cache, run_of(8) + run_of(24, first=50)))
    cache.drop_namespace(NS)
    assert cache.counts().free == 14
    rest = take_all_free(cache)
    assert set(rest.page_table.tolist()) == set(range(16)) - set(running.page_table.tolist())
    assert cache.num_evicted_pages == 0
    cache.close(rest)
    cache.close(running)


def test_a_dropped_prefix_takes_all_that_shares_its_first_page(cache: DeviceCache) -> None:
    forks = [run_of(4) + run_of(4, first=first) for first in (100, 200)]
    for tokens in (*forks, run_of(8, first=300)):
        cache.close(prefill(cache, tokens))
    assert cache.drop_prefix(NS, forks[0]) == Dropped(freed_pages=3, fenced_pages=0)
    assert [cached_tokens(cache, tokens) for tokens in (*forks, run_of(8, first=300))] == [0, 0, 8]


def test_a_prefix_shorter_than_a_page_takes_all_that_begins_with_it(cache: DeviceCache) -> None:
    for tokens in (run_of(4), tokens_of(0, 1, 9, 9), run_of(4, first=7)):
        cache.close(prefill(cache, tokens))
    assert cache.drop_prefix(NS, tokens_of(0, 1)).freed_pages == 2
    assert cached_tokens(cache, run_of(4, first=7)) == 4


def test_a_request_whose_first_page_is_not_full_yet_is_covered_by_a_prefix_it_may_reach(cache: DeviceCache) -> None:
    running = cache.open(NS, tokens_of(0, 1), 1, now_s=0.0)
    assert cache.try_extend(running, 4)
    cache.drop_prefix(NS, run_of(4))
    cache.publish(running, run_of(4), 4, now_s=1.0)
    assert cached_tokens(cache, run_of(4)) == 0
    cache.close(running)


def test_a_request_whose_first_page_became_known_is_covered_by_no_other(cache: DeviceCache) -> None:
    running = cache.open(NS, tokens_of(0, 1), 1, now_s=0.0)
    assert cache.try_extend(running, 4)
    cache.publish(running, run_of(4), 4, now_s=1.0)
    assert cache.drop_prefix(NS, tokens_of(0, 1, 9, 9)) == Dropped(freed_pages=0, fenced_pages=0)
    assert not running.is_fenced
    assert cached_tokens(cache, run_of(4)) == 4
    cache.close(running)


def test_a_chain_is_as_old_as_the_request_that_computed_its_oldest_page(cache: DeviceCache) -> None:
    slow = cache.open(NS, run_of(8), 7, now_s=1.0)
    assert cache.try_extend(slow, 8)
    cache.close(prefill(cache, run_of(8, first=100), now_s=5.0))
    cache.publish(slow, run_of(8), 8, now_s=6.0)
    cache.close(slow)
    assert cache.count_older(3.0) == Dropped(freed_pages=2, fenced_pages=0)
    assert cache.drop_older(3.0) == Dropped(freed_pages=2, fenced_pages=0)
    assert cached_tokens(cache, run_of(8)) == 0
    assert cached_tokens(cache, run_of(8, first=100)) == 8


def test_old_pages_that_join_a_young_chain_make_it_old(cache: DeviceCache) -> None:
    slow = cache.open(NS, run_of(12), 11, now_s=1.0)
    assert cache.try_extend(slow, 12)
    cache.close(prefill(cache, run_of(4), now_s=5.0))
    cache.publish(slow, run_of(12), 12, now_s=6.0)
    assert cache.drop_older(3.0) == Dropped(freed_pages=0, fenced_pages=3)
    assert cached_tokens(cache, run_of(12)) == 0
    cache.close(slow)


def test_a_young_request_on_an_old_chain_is_fenced_with_it(cache: DeviceCache) -> None:
    cache.close(prefill(cache, run_of(8), now_s=1.0))
    young = cache.open(NS, run_of(12), 11, now_s=5.0)
    assert cache.try_extend(young, 12)
    assert cache.drop_older(3.0) == Dropped(freed_pages=0, fenced_pages=3)
    cache.publish(young, run_of(12), 12, now_s=6.0)
    assert cached_tokens(cache, run_of(12)) == 0
    cache.close(young)


def test_a_swap_after_a_drop_that_was_not_taken_apart_frees_its_pages_once(cache: DeviceCache) -> None:
    cache.close(prefill(cache, run_of(16)))
    cache.drop_namespace(NS)
    cache.swap(Epoch(1))
    assert cache.counts().free == 16
    while cache.reap(1):
        assert cache.sanity_check() == []
    assert cache.counts().free == 16
