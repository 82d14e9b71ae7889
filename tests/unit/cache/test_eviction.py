"""EvictionQueue: oldest use first, put right lazily, and rid of entries of dropped nodes."""

from __future__ import annotations

import pytest

from cache import eviction
from cache.eviction import EvictionQueue
from cache.node_table import NO_NODE, NodeId, NodeTable


def leaf(table: NodeTable, used: int) -> NodeId:
    return table.add(b"edge", b"page", ~0, 0, used)


def queue_of(*used: int) -> tuple[EvictionQueue, NodeTable, list[NodeId]]:
    table = NodeTable()
    queue = EvictionQueue(table)
    nodes = [leaf(table, tick) for tick in used]
    for node in nodes:
        queue.offer(node)
    return queue, table, nodes


def test_the_node_unused_for_longest_comes_first() -> None:
    queue, _, nodes = queue_of(30, 10, 20)
    assert [queue.pop() for _ in range(4)] == [nodes[1], nodes[2], nodes[0], NO_NODE]


def test_a_use_after_the_offer_counts() -> None:
    queue, table, nodes = queue_of(10, 20)
    table.used[nodes[0]] = 30
    assert [queue.pop(), queue.pop()] == [nodes[1], nodes[0]]


def test_a_node_has_one_entry() -> None:
    queue, _, nodes = queue_of(10)
    queue.offer(nodes[0])
    assert len(queue) == 1


def test_nodes_in_use_and_inner_nodes_are_passed_over() -> None:
    queue, table, nodes = queue_of(10, 20, 30)
    table.owners[nodes[0]] = 1
    table.children[nodes[1]] = {b"edge": nodes[2]}
    assert [queue.pop(), queue.pop()] == [nodes[2], NO_NODE]
    table.owners[nodes[0]] = 0
    queue.offer(nodes[0])
    assert queue.pop() == nodes[0]


def test_the_row_of_a_dropped_node_is_used_again_only_after_its_entry_is_gone() -> None:
    queue, table, nodes = queue_of(10, 20)
    queue.note_dead()
    table.release(nodes[0])
    assert leaf(table, 5) not in nodes
    assert queue.pop() == nodes[1]
    assert leaf(table, 5) == nodes[0]


def test_entries_of_dropped_nodes_are_compacted_away_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "_TOLERATED_DEAD", 4)
    queue, table, nodes = queue_of(*range(1, 41))
    assert queue.compact(10) == 10, "nothing to do yet"
    for node in nodes[::2] + nodes[1::8]:
        queue.note_dead()
        table.release(node)
    while queue.compact(7) < 7:
        assert len(queue.nodes()) == len(set(queue.nodes()))
    alive = [node for node in nodes if table.edges[node]]
    assert sorted(queue.nodes()) == alive
    assert [queue.pop() for _ in alive] == alive


def test_the_oldest_is_found_while_a_compaction_is_under_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eviction, "_TOLERATED_DEAD", 4)
    queue, table, nodes = queue_of(*range(1, 21))
    for node in nodes[5:17]:
        queue.note_dead()
        table.release(node)
    queue.compact(6)
    assert [queue.pop() for _ in range(9)] == [*nodes[:5], *nodes[17:], NO_NODE]
