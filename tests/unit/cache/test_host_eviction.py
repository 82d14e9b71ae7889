"""Which page goes first."""

from __future__ import annotations

import pytest

from cache.host_eviction import EvictionOrder, LruOrder, SlruOrder


def drain(order: EvictionOrder) -> list[int]:
    popped: list[int] = []
    while (slot := order.pop()) is not None:
        popped.append(slot)
    return popped


@pytest.mark.parametrize("order", [LruOrder(), SlruOrder()])
def test_an_order_holds_exactly_what_was_added(order: EvictionOrder):
    for slot in range(6):
        order.add(slot)
    order.discard(3)
    order.discard(99)
    order.touch(99)
    assert len(order) == 5
    assert 3 not in order
    assert 2 in order
    assert sorted(order) == [0, 1, 2, 4, 5]
    assert sorted(drain(order)) == [0, 1, 2, 4, 5]
    assert order.pop() is None


def test_lru_gives_up_what_was_used_longest_ago():
    order = LruOrder()
    for slot in range(4):
        order.add(slot)
    order.touch(0)
    assert drain(order) == [1, 2, 3, 0]


def test_slru_keeps_what_was_read_again_over_a_scan():
    order = SlruOrder(protected_share=0.5)
    for slot in range(4):
        order.add(slot)
    order.touch(0)
    order.touch(1)
    for slot in range(10, 16):
        order.add(slot)
    assert drain(order)[-2:] == [0, 1]


def test_slru_protects_a_share_only():
    order = SlruOrder(protected_share=0.5)
    for slot in range(4):
        order.add(slot)
    for slot in (0, 1, 2, 3):
        order.touch(slot)
    # 0 and 1 were pushed out of the protected half by 2 and 3
    assert drain(order) == [0, 1, 2, 3]
    order.add(1)
    order.touch(1)
    assert drain(order) == [1]
