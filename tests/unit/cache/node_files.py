"""Parts of the shared-file tests: a clock that does not wait, processes that are only told, another process's lock."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cache.processes import ProcessId

_HOLD_WRITER_LOCK = """
import sys
from pathlib import Path
from actors.node_processes import NodeProcesses
from cache.writer_lock import FileLock
path, kind, lineage = Path(sys.argv[1]), sys.argv[2], sys.argv[3]
lock = FileLock.try_write(path) if kind == "write" else FileLock.try_read(path)
assert lock is not None
if lineage:
    lock.record(NodeProcesses().own_id(), lineage)
print("held", flush=True)
sys.stdin.read()
"""


class FastClock:
    """Real time, ten times as fast: the lock's patience is a tenth, and the kernel's answers are real."""

    def now_s(self) -> float:
        return 10 * time.monotonic()

    def pause_s(self, duration_s: float) -> None:
        threading.Event().wait(duration_s / 10)


class HurriedClock:
    """Every pause takes its time at once."""

    def __init__(self) -> None:
        self.time_s = 0.0

    def now_s(self) -> float:
        return self.time_s

    def pause_s(self, duration_s: float) -> None:
        self.time_s += duration_s


class ToldProcesses:
    """Processes as a test says they are."""

    def __init__(self) -> None:
        self.own = ProcessId(1, 1)
        self.gone: set[ProcessId] = set()
        self.killed: list[ProcessId] = []

    def own_id(self) -> ProcessId:
        return self.own

    def is_gone(self, process: ProcessId) -> bool:
        return process in self.gone

    def kill(self, process: ProcessId) -> None:
        self.killed.append(process)


@contextmanager
def held_elsewhere(path: Path, kind: str, lineage: str = "") -> Iterator[subprocess.Popen[str]]:
    """Another process that has the lock until the block ends, or until it is killed."""
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD_WRITER_LOCK, str(path), kind, lineage],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.stdin.close()
        process.stdout.close()
        process.wait(10)
