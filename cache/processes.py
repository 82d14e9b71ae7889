"""What the cache asks about processes of this machine. The answers come from the caller (`actors/`), or from a test."""

from __future__ import annotations

from typing import NamedTuple, Protocol


class ProcessId(NamedTuple):
    """One process for ever: the kernel uses a pid again, never with the same start time."""

    pid: int
    #: field 22 of /proc/<pid>/stat, clock ticks since boot
    start_time: int


class Processes(Protocol):
    """Probe of the machine's processes. All ranks and the tier of a node share one pid namespace."""

    def own_id(self) -> ProcessId: ...

    def is_gone(self, process: ProcessId) -> bool:
        """True only with proof by the kernel that it has ended: no thread of it runs, no memory of it is mapped."""
        ...

    def kill(self, process: ProcessId) -> None:
        """SIGKILL to exactly this process; nothing if it is gone. Returns before it has ended."""
        ...
