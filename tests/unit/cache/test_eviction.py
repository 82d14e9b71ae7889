"""EvictionQueue: exactly the least recently used first, whatever was pinned or had children in between."""

from __future__ import annotations

import numpy as np

from cache import DEFAULT_NAMESPACE, DeviceCache
from cache.eviction import EvictionQueue
from cache.node_table import NO_NODE, NodeId, NodeTable
from tests.unit.cache.tokens import tokens_of


def queue_of(num_nodes: int) -> tuple[EvictionQueue, NodeTable, list[NodeId]]:
    """Nodes used one after the other."""
    table = NodeTable()
    queue = EvictionQueue(table)
    nodes = [table.add(b"edge", b"page", ~0, 0, tick) for tick in range(num_nodes)]
    for node in nodes:
        queue.use(node)
    return queue, table, nodes


def pop_all(queue: EvictionQueue) -> list[NodeId]:
    popped: list[NodeId] = []
    while (node := queue.pop()) >= 0:
        popped.append(node)
    return popped


def test_the_node_unused_for_longest_comes_first() -> None:
    queue, _, (first, second, third) = queue_of(3)
    queue.use(first)
    assert [queue.pop() for _ in range(4)] == [second, third, first, NO_NODE]


def test_the_newest_may_be_used_again() -> None:
    queue, _, nodes = queue_of(3)
    queue.use(nodes[2])
    assert queue.nodes() == nodes
    assert pop_all(queue) == nodes


def test_nodes_in_use_and_inner_nodes_are_passed_over() -> None:
    queue, table, nodes = queue_of(3)
    table.owners[nodes[0]] = 1
    table.children[nodes[1]] = {b"edge": nodes[2]}
    assert pop_all(queue) == [nodes[2]]
    table.owners[nodes[0]] = 0
    queue.use(nodes[0])
    assert pop_all(queue) == [nodes[0]]


def test_one_that_becomes_a_leaf_when_its_turn_is_over_goes_next() -> None:
    queue, table, nodes = queue_of(3)
    table.children[nodes[0]] = {b"edge": nodes[1]}
    assert queue.pop() == nodes[1]
    table.children[nodes[0]] = {}
    queue.offer_first(nodes[0])
    assert pop_all(queue) == [nodes[0], nodes[2]]


def test_one_that_was_used_itself_keeps_its_place() -> None:
    queue, table, nodes = queue_of(3)
    queue.use(nodes[0])
    table.children[nodes[0]] = {b"edge": nodes[1]}
    assert queue.pop() == nodes[1]
    table.children[nodes[0]] = {}
    queue.offer_first(nodes[0])
    assert pop_all(queue) == [nodes[2], nodes[0]]


def test_discarding_any_of_them_leaves_the_others_in_order() -> None:
    for gone in range(4):
        queue, table, nodes = queue_of(4)
        queue.discard(nodes[gone])
        queue.discard(nodes[gone])
        table.release(nodes[gone])
        rest = [node for node in nodes if node != nodes[gone]]
        assert queue.nodes() == rest
        assert pop_all(queue) == rest


def test_the_cache_evicts_as_a_plain_list_of_uses_would() -> None:
    """Single-page prompts, used at random and some of them all the time."""
    rng = np.random.default_rng(0)
    cache = DeviceCache(16, 4)
    order: list[int] = []
    busy = {}
    for _ in range(600):
        number = int(rng.integers(0, 30))
        tokens = tokens_of(*[number] * 4)
        was_cached = number in order
        if not was_cached and len(order) == 16:
            if all(old in busy for old in order):
                cache.close(busy.pop(order[0]))
                order.append(order.pop(0))
            order.remove(next(old for old in order if old not in busy))
        hold = cache.open(DEFAULT_NAMESPACE, tokens, 4, now_s=0.0)
        assert (hold.num_cached_tokens == 4) == was_cached
        assert cache.try_extend(hold, 4)
        cache.publish(hold, tokens, 4, now_s=0.0)
        if was_cached:
            order.remove(number)
        order.append(number)
        if number in busy or rng.random() < 0.8:
            cache.close(hold)
        else:
            busy[number] = hold
        for old in [old for old in busy if rng.random() < 0.2]:
            cache.close(busy.pop(old))
            order.remove(old)
            order.append(old)
        assert cache.sanity_check() == []
