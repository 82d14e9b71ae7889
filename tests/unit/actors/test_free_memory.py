"""Free memory: the machine's, or what a container's limit leaves."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.free_memory import free_memory_bytes

GIB = 1024**3


@pytest.mark.parametrize(
    ("limit", "used", "free"),
    [
        ("max", "5", 8 * GIB),
        (str(3 * GIB), str(GIB), 2 * GIB),
        (str(GIB), str(2 * GIB), 0),
        (str(90 * GIB), "0", 8 * GIB),
    ],
)
def test_a_limit_leaves_what_is_not_used_of_it(tmp_path: Path, limit: str, used: str, free: int) -> None:
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 1 kB\nMemAvailable:  {8 * GIB // 1024} kB\nHugePages: 0\n")
    (tmp_path / "memory.max").write_text(f"{limit}\n")
    (tmp_path / "memory.current").write_text(f"{used}\n")
    assert free_memory_bytes(meminfo, tmp_path) == free
    assert free_memory_bytes(meminfo, tmp_path / "none") == 8 * GIB


def test_this_machine_has_some() -> None:
    assert free_memory_bytes() > 0
