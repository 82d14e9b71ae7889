"""The slots and bytes of a host tier, from a seed: the world of the property tests, with the order of things drawn.

Its readers are weaker than any machine: words of a slot's row may be older than the state word that was loaded before
them, as if the line had been read ahead. Only the checksum stands between such a row and a wrong page (hole H15).
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any, get_args

import numpy as np

from cache.arena import SLOT_WORDS
from tests.property.cache.host_actors import (
    CHAIN_PAGES,
    MAX_RANKS,
    NAMESPACES,
    NUM_CHAINS,
    Chain,
    OvertakenReader,
    Overtaking,
    Rank,
)
from tests.property.cache.host_world import HostWorld

NUM_STEPS = 60
_NUM_PAUSES = 10


class _ReadAhead:
    """Rows of the slot table of which the first words were loaded long before the others."""

    def __init__(self, words: Any, ahead: np.ndarray, chance: Random) -> None:
        self._words = words
        self._ahead = ahead.reshape(-1, 8)
        self._num_old = chance.randint(0, 8)

    def take(self, indices: Any, axis: int) -> Any:
        rows = self._words.take(indices, axis=axis)
        rows[:, : self._num_old] = self._ahead.take(indices, axis=axis)[:, : self._num_old]
        return rows


class HostStory:
    """One life of a node's host tier."""

    def __init__(self, seed: int) -> None:
        self._chance = Random(seed)
        self._world = HostWorld(self._chance.random() < 0.5, "full")
        self._world.overtaken_reader = self._weak_reader
        self.lines: list[str] = []

    def run(self) -> str | None:
        """What went wrong; None: nothing."""
        try:
            for _ in range(NUM_STEPS):
                self._step()
                self._world.check()
            self._world.end()
        except AssertionError as fault:
            return f"{fault} after {self.lines[-3:]}"
        return None

    def _weak_reader(self, arena: Any, page: Any, verification: Any, pause: Callable[[], object]) -> OvertakenReader:
        reader = OvertakenReader(arena, page, verification, pause)
        reader._lines = _ReadAhead(reader._lines, arena.slots[: len(arena.pages) * SLOT_WORDS].copy(), self._chance)
        return reader

    def _step(self) -> None:
        steps = {
            self._store: 6, self._read: 3, self._read_overtaken: 5, self._stop: 2, self._thaw: 2, self._declare: 2,
            self._kill: 1, self._flush: 2, self._tend: 2,
        }  # fmt: skip
        (step,) = self._chance.choices(list(steps), list(steps.values()))
        self.lines.append(step.__name__)
        step()

    def _rank(self) -> Rank:
        """One that is awake; if there is none, one wakes or starts."""
        world = self._world
        if not world.ranks:
            world.start_rank()
        rank = world.rank(self._chance.randrange(MAX_RANKS))
        if rank is None:
            rank = world.ranks[0]
            world.thaw(rank)
        return rank

    def _chain(self) -> Chain:
        return self._chance.choice(NAMESPACES), self._chance.randrange(NUM_CHAINS)

    def _store(self) -> None:
        rank = self._rank()
        self._world.write(rank, self._chain(), self._chance.randint(1, CHAIN_PAGES), self._chance.random() < 0.3)
        if self._chance.random() < 0.7:
            self._world.commit(rank, None)

    def _read(self) -> None:
        rank = self._rank()
        self._world.read([*self._world.keys(self._chain(), rank.epoch)], rank.epoch)

    def _read_overtaken(self) -> None:
        """Everything that others do comes at one instant, or half of it at another one."""
        chance, chain = self._chance, self._chain()
        what: Overtaking = chance.choice(("replace", "replace", "replace", *get_args(Overtaking)))
        first = chance.choice((0, 0, 1, chance.randrange(_NUM_PAUSES)))
        second = first if chance.random() < 0.7 else chance.randrange(first, _NUM_PAUSES)
        shares = [0.0] * first + [0.5] * (second - first) + [1.0] * (_NUM_PAUSES - second)
        self._world.read_overtaken(self._rank(), chain, self._rank(), what, shares)

    def _stop(self) -> None:
        self._rank().is_frozen = True

    def _thaw(self) -> None:
        for rank in self._world.ranks:
            self._world.thaw(rank)

    def _declare(self) -> None:
        """Ray calls ranks dead, frozen ones too."""
        for rank in self._world.ranks:
            if rank.is_frozen or self._chance.random() < 0.2:
                self._world.declare_dead(rank, None)

    def _kill(self) -> None:
        self._world.kill_rank(self._rank())
        self._world.start_rank()

    def _flush(self) -> None:
        self._world.now_ns += 1
        self._world.raise_floor(is_new_epoch=True)
        self._world.catch_up()

    def _tend(self) -> None:
        if self._chance.random() < 0.5:
            self._world.reclaim(self._chance.randint(1, 3), None)
        else:
            self._world.check_holders(None)


def run_host(seed: int) -> str | None:
    """One story from its seed; what went wrong in it."""
    return HostStory(seed).run()
