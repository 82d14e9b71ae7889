"""The control log for an asyncio loop: one thread that blocks on the store, in the order of the calls."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from actors.control_log import ControlLog, TakenOver, Written
from actors.log_records import Record


class LogWriter(Protocol):
    """What the keeper of a log asks of it. The futures fail with Superseded or OSError, see ControlLog."""

    def take_over(self, actor_id: str, cluster: str, lease_s: float) -> asyncio.Future[TakenOver]: ...

    def append(self, record: Record) -> asyncio.Future[Written]:
        """Appends are carried out in the order of the calls, whether or not anybody waits for them."""
        ...

    def check(self) -> asyncio.Future[None]: ...

    def remove_below(self, index: int) -> asyncio.Future[None]: ...

    def close(self) -> None: ...


class LogThread:
    """Does everything to the log one after the other."""

    def __init__(self, log: ControlLog) -> None:
        self._log = log
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="control-log")

    def take_over(self, actor_id: str, cluster: str, lease_s: float) -> asyncio.Future[TakenOver]:
        return self._loop().run_in_executor(self._thread, self._log.take_over, actor_id, cluster, lease_s)

    def append(self, record: Record) -> asyncio.Future[Written]:
        appending = self._loop().run_in_executor(self._thread, self._log.append, record)
        self._thread.submit(self._log.prepare)  # behind this record, before the next one comes
        return appending

    def check(self) -> asyncio.Future[None]:
        return self._loop().run_in_executor(self._thread, self._log.check)

    def remove_below(self, index: int) -> asyncio.Future[None]:
        return self._loop().run_in_executor(self._thread, self._log.remove_below, index)

    def close(self) -> None:
        """Take nothing more; what was handed in is still done."""
        self._thread.submit(self._log.close)
        self._thread.shutdown(wait=False)

    def _loop(self) -> asyncio.AbstractEventLoop:
        return asyncio.get_running_loop()
