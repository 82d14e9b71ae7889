"""PagePool: every page is handed out once, and a restart frees all but the carried ones."""

from __future__ import annotations

import numpy as np
import pytest

from cache.pages import PageIds, PagePool
from configs.errors import InvariantError


def ids(pages: PageIds) -> list[int]:
    return np.frombuffer(pages, np.int32).tolist()


def pages_of(*page_ids: int) -> PageIds:
    return np.array(page_ids, np.int32).tobytes()


def test_all_pages_are_free_at_first() -> None:
    pool = PagePool(5)
    assert pool.num_free == 5
    assert sorted(ids(pool.take(5))) == [0, 1, 2, 3, 4]
    assert pool.num_free == 0


def test_pages_given_back_are_handed_out_again() -> None:
    pool = PagePool(5)
    taken = ids(pool.take(4))
    pool.give(pages_of(*taken[1:3]))
    assert sorted(ids(pool.take(3))) == sorted([*taken[1:3], 4])


def test_more_than_is_free_is_refused() -> None:
    pool = PagePool(2)
    pool.take(1)
    with pytest.raises(InvariantError, match="2 pages asked of a pool with 1 free"):
        pool.take(2)


def test_more_than_was_taken_is_not_taken_back() -> None:
    pool = PagePool(2)
    with pytest.raises(InvariantError, match="more pages came back"):
        pool.give(pages_of(0, 1, 1))


@pytest.mark.parametrize("carried", [(), (0,), (7,), (2, 3, 6), tuple(range(0, 200, 3)), tuple(range(150))])
@pytest.mark.parametrize("chunk", [1, 3, 50])
def test_a_restart_hands_out_everything_but_the_carried_pages(carried: tuple[int, ...], chunk: int) -> None:
    pool = PagePool(200)
    pool.give(pool.take(120))
    pool.restart(pages_of(*carried))
    assert pool.num_free == 200 - len(carried)
    taken: list[int] = []
    while pool.num_free:
        taken += ids(pool.take(min(chunk, pool.num_free)))
        assert len(pool.free_pages()) == pool.num_free
    assert sorted([*taken, *carried]) == list(range(200))


def test_carried_pages_come_back_when_their_owner_gives_them() -> None:
    pool = PagePool(6)
    pool.take(6)
    pool.restart(pages_of(1, 4))
    pool.give(pages_of(4))
    assert sorted(pool.free_pages().tolist()) == [0, 2, 3, 4, 5]
    assert sorted(ids(pool.take(5))) == [0, 2, 3, 4, 5]
