"""The control log for an asyncio loop: one thread that blocks on the store, in the order of the calls."""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor

from actors.control_log import ControlLog
from actors.log_records import LogState, Record


class LogThread:
    """Appends records one after the other."""

    def __init__(self, log: ControlLog) -> None:
        self._log = log
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="control-log")

    async def take_over(self, actor_id: str, cluster: str) -> LogState:
        """Read the log and write this controller's own record; see ControlLog.take_over."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, self._log.take_over, actor_id, cluster)

    def append(self, record: Record) -> asyncio.Future[int]:
        """Store a record; the future holds its index. It is stored, or fails, whether or not anybody waits."""
        return asyncio.get_running_loop().run_in_executor(self._thread, self._log.append, record)

    def close(self) -> None:
        """Take no more records; what was handed in is still written."""
        self._thread.shutdown(wait=False)
