"""The clock of the control plane: seconds since the machine's boot, suspended time included.

Comparable between processes of one machine and one boot, hence always shown together with the boot's id. No decision
uses a wall clock; the one time that people read is text.
"""

from __future__ import annotations

import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Protocol


class Clock(Protocol):
    """What the controller asks of time; tests give their own."""

    #: id of this boot of this machine
    boot_id: str

    def now_s(self) -> float: ...

    def wall_text(self) -> str: ...


class BootClock:
    """CLOCK_BOOTTIME of this machine."""

    def __init__(self) -> None:
        self.boot_id = Path("/proc/sys/kernel/random/boot_id").read_text().strip()

    def now_s(self) -> float:
        """Seconds since boot; never steps, also counts while the machine is suspended."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def wall_text(self) -> str:
        """Now as ISO 8601 in UTC: for people and logs, compared with nothing."""
        return datetime.now(UTC).isoformat(timespec="milliseconds")
