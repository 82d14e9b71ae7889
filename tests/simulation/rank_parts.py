"""The insides of a simulated rank: the engine of production driven without a thread, and witnesses of what it does.

KV is known by its origin: when the oldest admission was that computed it or anything it attends to, and the lowest
epoch among them. So stale KV is seen where it is read, whatever epochs, floors and leases say.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

from cache.device_cache import DeviceCache, Swapped
from cache.page_hold import PageHold
from cache.types import Epoch, Namespace, TokenBytes
from engine.batch import Batch
from engine.events import Event
from engine.loop import EngineLoop
from engine.plan import Row
from engine.sequence import Sequence
from tests.fakes import FakeRunner, PageContent
from tests.simulation.virtual_loop import Process, ProcessEnded

#: seconds for which an engine thread is kept from the processor in the middle of a turn
_PREEMPTIONS_S = (0.001, 0.02, 0.15, 0.6, 2.5)


class WitnessCache(DeviceCache):
    """The real cache; notes when each hold was opened, and tells of matches and swaps."""

    def __init__(self, num_pages: int, page_size: int, now: Callable[[], int]) -> None:
        super().__init__(num_pages, page_size)
        self._now = now
        #: instant of each open hold's admission
        self.admitted: dict[PageHold, int] = {}
        self.on_match: Callable[[PageHold], None] = lambda hold: None
        self.on_swap: Callable[[int], None] = lambda epoch: None

    def open(self, namespace: Namespace, tokens: TokenBytes, max_cached_tokens: int, now_s: float) -> PageHold:
        hold = super().open(namespace, tokens, max_cached_tokens, now_s)
        self.admitted[hold] = self._now()
        if hold.num_cached_tokens:
            self.on_match(hold)
        return hold

    def close(self, hold: PageHold) -> None:
        super().close(hold)
        self.admitted.pop(hold, None)  # copies are no admissions

    def swap(self, epoch: Epoch) -> Swapped:
        swapped = super().swap(epoch)
        self.on_swap(epoch)
        return swapped


class WitnessRunner(FakeRunner):
    """The fake model; keeps the origin of each slot and tells what every row reads."""

    def __init__(self, cache: WitnessCache, rows: Callable[[], tuple[Row, ...]]) -> None:
        super().__init__(cache.num_pages, cache.page_size)
        self._cache = cache
        self._rows_out = rows
        #: per slot: the oldest admission, and the lowest epoch, of anything it was computed from
        self._origins = np.zeros((cache.num_pages * cache.page_size, 2), dtype=np.int64)
        #: told of each row that reuses KV: whose it is, the oldest admission and the lowest epoch of what it reuses
        self.on_read: Callable[[Sequence, int, int], None] = lambda sequence, admitted, epoch: None
        self.admissions = lambda: [(hold.epoch, hold.generation) for hold in self._holds()]

    def page_content(self, page: int) -> PageContent:
        return (*super().page_content(page), self._origins[self._rows(page)].copy())

    def put_page(self, page: int, content: PageContent | None) -> None:
        super().put_page(page, None if content is None else content[:-1])
        if content is not None:
            self._origins[self._rows(page)] = content[-1]

    def pages_written(self, batch: Batch) -> set[int]:
        """Device pages that the step writes."""
        first_pages = (batch.kv_lens - batch.q_lens) // self._page_size
        return {
            page for first, table in zip(first_pages, batch.page_tables, strict=True) for page in table[first:].tolist()
        }

    def _holds(self) -> list[PageHold]:
        return [row.sequence.hold for row in self._rows_out() if row.sequence.hold is not None]

    def _compute(self, batch: Batch, slots: list[np.ndarray]) -> list[int]:
        totals = super()._compute(batch, slots)
        for row, hold, q_len, row_slots in zip(self._rows_out(), self._holds(), batch.q_lens, slots, strict=True):
            origin = (self._cache.admitted[hold], int(hold.epoch))
            reused = self._origins[row_slots[: hold.num_cached_tokens + hold.num_loaded_tokens]]
            if len(reused):
                admitted, epoch = reused.min(axis=0).tolist()
                self.on_read(row.sequence, admitted, epoch)
                origin = min(origin[0], admitted), min(origin[1], epoch)
            self._origins[row_slots[-q_len:]] = origin
        return totals


class ThreadlessEngine(EngineLoop):
    """The engine loop of production; its turns are callbacks of its rank's process, and a step takes its time.

    Between the two readings of a turn (inbox, words) the thread may lose the processor.
    """

    def __init__(self, process: Process, chance: Random, share_preempted: float, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._process = process
        self._chance = chance
        self._share_preempted = share_preempted
        self._is_running = False
        #: a turn is due, under way, or waits for the end of its step
        self._is_busy = False
        self._batch: Batch | None = None
        self.step_s = 0.002
        #: called after every turn and step; told of what the engine thread has died of
        self.after_turn: Callable[[], None] = lambda: None
        self.on_death: Callable[[Exception], None] = lambda error: None

    def calm(self) -> None:
        """From now on steps are short, and the thread has the processor when it wants it."""
        self.step_s, self._share_preempted = 0.002, 0.0

    def start(self) -> None:
        self._is_running = True
        self._wake(0.0)

    def post(self, event: Event) -> None:
        super().post(event)
        self._wake(self._chance.expovariate(2000))

    def lose_processor(self) -> None:
        """For the reading of words: others go on, for a while, in some turns."""
        if self._chance.random() < self._share_preempted:
            self._process.loop.preempt(self._chance.choice(_PREEMPTIONS_S))

    def _wake(self, after_s: float) -> None:
        if self._is_running and not self._is_busy:
            self._is_busy = True
            self._later(after_s, self._take_turn)

    def _run_step(self, batch: Batch) -> None:
        """Called by `turn`: the step begins now and ends later."""
        self._batch = batch

    def _take_turn(self) -> None:
        try:
            has_more = self.turn()
            self.after_turn()
        except ProcessEnded:
            return
        except Exception as error:
            self.on_death(error)
            return
        if self._batch is not None:
            self._later(self.step_s * self._chance.uniform(0.3, 3), self._end_step)
        else:
            self._is_busy = False
            if has_more:
                self._wake(0.001)

    def _end_step(self) -> None:
        batch, self._batch = self._batch, None
        assert batch is not None
        try:
            super()._run_step(batch)
            self.after_turn()
        except Exception as error:
            self.on_death(error)
            return
        self._later(0.0, self._take_turn)

    def _later(self, after_s: float, step: Callable[[], None]) -> None:
        self._process.loop.call_later(after_s, step, context=self._process.context())
