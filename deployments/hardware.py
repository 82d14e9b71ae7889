"""What there is to serve on, read once and handed on as plain data (`configs.resolve.Hardware`)."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import ray

from actors.free_memory import free_memory_bytes
from cache.orphans import dead_bytes
from configs.errors import ConfigError
from configs.resolve import Hardware

_GPUS = Path("/proc/driver/nvidia/gpus")
_CPU_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_MEMORY_LIMIT = Path("/sys/fs/cgroup/memory.max")
_MEMORY = Path("/proc/meminfo")


def this_node(resources: Mapping[str, float], visible_gpus: str | None, shared_dir: Path | None = None) -> Hardware:
    """This machine as a cluster of one node, before a Ray exists.

    resources: logical resources that the local start will add to CPU and GPU.
    visible_gpus: value of CUDA_VISIBLE_DEVICES, which Ray obeys too; None: all.
    shared_dir: where the node's shared files will lie; None: not asked.
    """
    num_cores = count_cores()
    found = {"CPU": float(num_cores), "GPU": float(count_gpus(visible_gpus)), **resources}
    shared = None if shared_dir is None else shared_bytes(shared_dir)
    return Hardware(num_cores, memory_bytes(), 1, found, shared)


def this_cluster() -> Hardware:
    """The Ray cluster that this process is connected to; cores and memory are those of its smallest living node."""
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cores = [int(node["CPU"]) for node in nodes if node.get("CPU")]
    memory = [int(node["memory"]) for node in nodes if node.get("memory")]
    smallest = min(memory, default=memory_bytes())
    return Hardware(min(cores, default=1), smallest, max(1, len(nodes)), ray.cluster_resources())


def count_cores() -> int:
    """Cores that this process may use: its affinity, and the quota of its control group rounded down, at least 1."""
    cores = len(os.sched_getaffinity(0))
    quota, _, period = _first_line(_CPU_QUOTA, "max 1").partition(" ")
    return cores if quota == "max" else max(1, min(cores, int(quota) // int(period)))


def count_gpus(visible: str | None) -> int:
    """NVIDIA GPUs of this machine that may be used. Asks the kernel, not CUDA: no context, no library, no second."""
    present = len(list(_GPUS.iterdir())) if _GPUS.is_dir() else 0
    return visible_of(present, visible)


def visible_of(present: int, visible: str | None) -> int:
    """How many of `present` GPUs CUDA_VISIBLE_DEVICES leaves. As CUDA reads it, a bad entry ends the list."""
    if visible is None:
        return present
    entries = [entry.strip() for entry in visible.split(",")]
    valid = next((i for i, entry in enumerate(entries) if not entry or entry.startswith("-")), len(entries))
    return min(present, valid)


def memory_bytes() -> int:
    """Memory of this machine, or of its control group where that is less."""
    facts = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
    total = int(facts["MemTotal"].split()[0]) * 1024
    limit = _first_line(_MEMORY_LIMIT, "max")
    return total if limit == "max" else min(total, int(limit))


def shared_bytes(directory: Path) -> int:
    """What a file system in memory can still give: its own limit, or the machine's free memory where that is less.

    Files of dead deployments count as free: the next start takes them over or removes them.
    """
    if not directory.is_dir():
        raise ConfigError(f"control.shared_dir: {directory} is not a directory")
    file_system = os.statvfs(directory)
    return min(file_system.f_bavail * file_system.f_frsize, free_memory_bytes()) + dead_bytes(directory)


def _first_line(path: Path, absent: str) -> str:
    return path.read_text().strip() if path.exists() else absent
