"""Memory that can still be taken on this machine, or in this container where that is less."""

from __future__ import annotations

from pathlib import Path

_MEMORY = Path("/proc/meminfo")
_GROUP = Path("/sys/fs/cgroup")


def free_memory_bytes(meminfo: Path = _MEMORY, group: Path = _GROUP) -> int:
    """What the kernel says is available; in a control group with a limit, at most what the limit leaves.

    group: folder of the control group (version 2); the page cache that it holds counts as used.
    """
    facts = dict(line.split(":", 1) for line in meminfo.read_text().splitlines())
    available = int(facts["MemAvailable"].split()[0]) * 1024
    limit, used = _number(group / "memory.max"), _number(group / "memory.current")
    return available if limit is None or used is None else min(available, max(0, limit - used))


def _number(path: Path) -> int | None:
    """None: there is no such file, or it says `max`."""
    try:
        text = path.read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None
