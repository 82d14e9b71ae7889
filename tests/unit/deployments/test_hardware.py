"""The machine as plain data."""

from __future__ import annotations

import os

import pytest

from deployments.hardware import count_cores, memory_bytes, this_node, visible_of


def test_this_node_is_what_it_is() -> None:
    hardware = this_node({"slot": 3.0}, visible_gpus="")
    assert hardware.num_nodes == 1
    assert 1 <= hardware.num_cores <= len(os.sched_getaffinity(0))
    assert hardware.num_cores == count_cores()
    assert hardware.resources == {"CPU": float(hardware.num_cores), "GPU": 0.0, "slot": 3.0}
    assert hardware.memory_bytes == memory_bytes() > 1 << 28


@pytest.mark.parametrize(
    ("visible", "expected"),
    [(None, 4), ("", 0), ("0", 1), ("0,2", 2), ("1,-1,2", 1), ("-1", 0), ("0,1,2,3,4,5", 4), ("GPU-1a, GPU-2b", 2)],
)
def test_cuda_visible_devices_is_obeyed(visible: str | None, expected: int) -> None:
    assert visible_of(4, visible) == expected
