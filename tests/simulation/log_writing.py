"""The control log's store that several controllers share, and how one of them reaches it: late, failing, in doubt."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from actors.clock import Clock
from actors.control_log import ControlLog, TakenOver, Written
from actors.log_records import Record
from actors.log_stores import MemoryStore
from tests.simulation.network import raise_in
from tests.simulation.virtual_loop import Process, ProcessEnded, VirtualLoop


@dataclass(frozen=True, slots=True)
class StoreFaults:
    """How bad the store is in one run."""

    typical_s: float
    share_slow: float
    slow_s: float
    #: of operations that fail, before or after they were carried out
    share_failing: float
    #: of operations in whose middle the writer's thread loses the processor
    share_preempted: float


class SharedStore(MemoryStore):
    """What lies in it outlives every controller."""

    def __init__(self, on_created: Callable[[int, bytes], None]) -> None:
        super().__init__()
        self._on_created = on_created
        #: every operation fails
        self.is_out = False
        #: the log was lost a moment ago, and no controller may begin yet
        self.is_lost = False
        #: ... or long ago
        self.was_lost = False

    def create(self, index: int, data: bytes) -> bool:
        is_created = super().create(index, data)
        if is_created:
            self._on_created(index, data)
        return is_created

    def wipe(self) -> None:
        """The log is lost."""
        self._records.clear()
        self.was_lost = True


class WritersView(MemoryStore):
    """The store as one controller reaches it."""

    def __init__(
        self, store: SharedStore, loop: VirtualLoop, is_cut_off: Callable[[], bool], chance: Random, faults: StoreFaults
    ) -> None:
        super().__init__()
        self._store = store
        self._loop = loop
        self._is_cut_off = is_cut_off
        self._chance = chance
        self.faults = faults

    def create(self, index: int, data: bytes) -> bool:
        return self._operate(lambda: self._store.create(index, data))

    def read(self, index: int) -> bytes | None:
        return self._operate(lambda: self._store.read(index))

    def indices(self) -> list[int]:
        return self._operate(self._store.indices)

    def remove(self, index: int) -> None:
        return self._operate(lambda: self._store.remove(index))

    def _operate(self, operation: Callable[[], Any]) -> Any:
        chance, faults = self._chance, self.faults
        if chance.random() < faults.share_preempted:
            self._loop.preempt(chance.choice((0.01, 0.3, 3.0)))
        if self._is_cut_off():
            raise OSError("the store is on the other side")
        is_failing = self._store.is_out or chance.random() < faults.share_failing
        if is_failing and chance.random() < 0.5:
            raise OSError("the store is out of reach")
        result = operation()
        if is_failing:
            raise OSError("the store's answer was lost")
        return result


class SlowLog:
    """The log's own thread: one operation after the other, each in its time. A `LogWriter`."""

    def __init__(
        self,
        store: SharedStore,
        clock: Clock,
        process: Process,
        is_cut_off: Callable[[], bool],
        chance: Random,
        faults: StoreFaults,
    ) -> None:
        self._view = WritersView(store, process.loop, is_cut_off, chance, faults)
        self._log = ControlLog(self._view, clock)
        self._process = process
        self._chance = chance
        self._faults = faults
        self._waiting: deque[tuple[Callable[[], Any], asyncio.Future[Any]]] = deque()
        self._is_busy = False

    def calm(self, faults: StoreFaults) -> None:
        """From now on the store is as good as this."""
        self._faults = self._view.faults = faults

    def take_over(self, actor_id: str, cluster: str, lease_s: float) -> asyncio.Future[TakenOver]:
        return self._ask(lambda: self._log.take_over(actor_id, cluster, lease_s))

    def append(self, record: Record) -> asyncio.Future[Written]:
        return self._ask(lambda: self._log.append(record))

    def check(self) -> asyncio.Future[None]:
        return self._ask(self._log.check)

    def remove_below(self, index: int) -> asyncio.Future[None]:
        return self._ask(lambda: self._log.remove_below(index))

    def close(self) -> None:
        """Nothing is kept open."""

    def _ask(self, operation: Callable[[], Any]) -> asyncio.Future[Any]:
        result: asyncio.Future[Any] = self._process.loop.create_future()
        self._waiting.append((operation, result))
        if not self._is_busy:
            self._is_busy = True
            self._later(self._begin)
        return result

    def _begin(self) -> None:
        operation, result = self._waiting.popleft()
        value: Any = None
        error: Exception | None = None
        try:
            value = operation()
        except ProcessEnded:
            return
        except Exception as failure:
            error = failure
        self._later(lambda: self._end(result, value, error))

    def _end(self, result: asyncio.Future[Any], value: Any, error: Exception | None) -> None:
        if error is None and not result.done():
            result.set_result(value)
        elif error is not None:
            raise_in(result, error)
        if self._waiting:
            self._later(self._begin)
        else:
            self._is_busy = False

    def _later(self, step: Callable[[], None]) -> None:
        chance, faults = self._chance, self._faults
        is_slow = chance.random() < faults.share_slow
        delay_s = chance.uniform(0, faults.slow_s) if is_slow else chance.expovariate(1 / faults.typical_s)
        self._process.loop.call_later(delay_s, step, context=self._process.context())
