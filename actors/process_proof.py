"""Proof that a process of this machine is gone: the kernel says so, not Ray and not a timer.

A pid alone names no process (the kernel uses it again); pid and start time do, until reboot. A pidfd that was opened
while both matched stays bound to that one process and becomes readable when it has ended.
"""

from __future__ import annotations

import os
import select
from pathlib import Path


def start_time_of(pid: int) -> int | None:
    """Field 22 of /proc/<pid>/stat (clock ticks since boot); None if there is no such process, or only its zombie."""
    stat = _stat(pid)
    return None if stat is None or _is_dead(pid, stat) else int(stat[19])


class ProcessProof:
    """Watches one process. `is_gone` never says yes of a process that may still run."""

    def __init__(self, pid: int, start_time: int, pidfd: int | None) -> None:
        self._pid = pid
        self._start_time = start_time
        self._pidfd = pidfd

    @classmethod
    def open(cls, pid: int, start_time: int) -> ProcessProof | None:
        """Watch the process that has this pid and this start time; None if it does not run here (any more)."""
        try:
            pidfd = os.pidfd_open(pid)
        except ProcessLookupError:
            return None
        except OSError:  # a kernel or sandbox without pidfds: /proc alone still proves an end
            pidfd = None
        # compared after the open: from here on the descriptor cannot name another process
        if start_time_of(pid) == start_time:
            return cls(pid, start_time, pidfd)
        if pidfd is not None:
            os.close(pidfd)
        return None

    def fileno(self) -> int | None:
        """Descriptor that becomes readable at the process's end; None where only `is_gone` can be asked."""
        return self._pidfd

    def is_gone(self) -> bool:
        """Has the process ended? A zombie has: it runs no code and maps no memory."""
        if self._pidfd is None:
            return start_time_of(self._pid) != self._start_time
        poll = select.poll()
        poll.register(self._pidfd, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Give the descriptor back. May be called again."""
        if self._pidfd is not None:
            os.close(self._pidfd)
            self._pidfd = None


def _stat(pid: int) -> list[str] | None:
    """Fields of /proc/<pid>/stat from the third on; the second, the command, may hold spaces and brackets."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None


def _is_dead(pid: int, stat: list[str]) -> bool:
    """A zombie whose threads have all ended; a main thread may end before the others."""
    if stat[0] not in ("Z", "X"):
        return False
    try:
        return len(os.listdir(f"/proc/{pid}/task")) <= 1
    except (FileNotFoundError, ProcessLookupError):
        return True
