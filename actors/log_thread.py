"""The control log for an asyncio loop: one thread that blocks on the store, in the order of the calls."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Protocol

from actors.control_log import ControlLog, TakenOver, Written
from actors.log_records import Record

#: what can be done ahead of the next records is done when none came for so long: intent and outcome of a flush lie a
#: few milliseconds apart, and between them the ranks need the processor
_QUIET_S = 0.05


class LogWriter(Protocol):
    """What the keeper of a log asks of it. The futures fail with Superseded or OSError, see ControlLog."""

    def take_over(self, actor_id: str, cluster: str, lease_s: float) -> asyncio.Future[TakenOver]: ...

    def append(self, record: Record) -> asyncio.Future[Written]:
        """Appends are carried out in the order of the calls, whether or not anybody waits for them."""
        ...

    def check(self) -> asyncio.Future[None]: ...

    def remove_below(self, index: int) -> asyncio.Future[None]: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Job:
    """One call of the log, and the loop that hears of its end."""

    call: Callable[..., Any]
    arguments: tuple[object, ...]
    ended: asyncio.Future[Any]

    def do(self) -> None:
        try:
            result, error = self.call(*self.arguments), None
        except Exception as failure:
            result, error = None, failure
        try:
            self.ended.get_loop().call_soon_threadsafe(self._tell, result, error)
        except RuntimeError:  # the loop is closed: what was to be stored is, and nobody waits
            return

    def _tell(self, result: Any, error: Exception | None) -> None:
        if self.ended.done():
            return
        if error is None:
            self.ended.set_result(result)
        else:
            self.ended.set_exception(error)


class LogThread:
    """Does everything to the log one after the other.

    A queue and a thread of its own instead of an executor: there and back costs 70 us instead of 130, twice a flush.
    """

    def __init__(self, log: ControlLog) -> None:
        self._log = log
        #: None: no more will come
        self._jobs: SimpleQueue[_Job | None] = SimpleQueue()
        # A daemon: a process that ends without `close` has told nobody of what is not stored yet.
        threading.Thread(target=self._run, name="control-log", daemon=True).start()

    def take_over(self, actor_id: str, cluster: str, lease_s: float) -> asyncio.Future[TakenOver]:
        return self._do(self._log.take_over, actor_id, cluster, lease_s)

    def append(self, record: Record) -> asyncio.Future[Written]:
        return self._do(self._log.append, record)

    def check(self) -> asyncio.Future[None]:
        return self._do(self._log.check)

    def remove_below(self, index: int) -> asyncio.Future[None]:
        return self._do(self._log.remove_below, index)

    def close(self) -> None:
        """Take nothing more; what was handed in is still done."""
        self._jobs.put(None)

    def _do(self, call: Callable[..., Any], *arguments: object) -> asyncio.Future[Any]:
        job = _Job(call, arguments, asyncio.get_running_loop().create_future())
        self._jobs.put(job)
        return job.ended

    # ---------------------------------------------------------------------------------------------- in the thread
    def _run(self) -> None:
        while (job := self._next_job()) is not None:
            job.do()
        self._log.close()

    def _next_job(self) -> _Job | None:
        try:
            return self._jobs.get(timeout=_QUIET_S)
        except Empty:
            self._log.prepare()
            return self._jobs.get()
