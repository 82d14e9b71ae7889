"""Settings that depend on the machine, settled once: `resolve(settings, hardware) -> (Resolved, notes)`.

Pure: it reads no file, no environment and no clock, so what a configuration means can be tested for machines that
nobody here owns. Who looks at the machine is `deployments/hardware.py`.
"""

from __future__ import annotations

import ipaddress
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from configs.errors import ConfigError
from configs.schema import EngineSettings, HostTierSettings, Settings

GIB = 1024**3
#: KV memory of a CPU rank when the settings name none: enough for the demo model, harmless on a laptop
CPU_KV_MEMORY_GB = 0.25
#: share of a node's memory that the KV pools of its CPU ranks may take together; the rest is weights, Ray, the system
CPU_KV_MEMORY_SHARE = 0.8


@dataclass(frozen=True, slots=True)
class Hardware:
    """What there is to serve on, as plain data."""

    #: CPU cores of one node that this process may use
    num_cores: int
    #: memory of one node, in bytes
    memory_bytes: int
    #: nodes of the cluster
    num_nodes: int
    #: logical resources of the whole cluster by Ray's names: CPU, GPU, and custom ones
    resources: Mapping[str, float]
    #: bytes of shared memory that a node can still give (control.shared_dir); None: not known here
    shared_bytes: int | None = None


@dataclass(frozen=True, slots=True)
class Resolved:
    """Settings with nothing left open that the machine decides, and what follows from them."""

    settings: Settings
    device: Literal["cpu", "cuda"]
    #: logical resources that one rank asks Ray for
    rank_resources: dict[str, float]
    #: torch threads of one rank
    threads: int
    #: admin routes answer nobody: the server listens beyond loopback and no admin key is set
    admin_is_closed: bool


def resolve(settings: Settings, hardware: Hardware) -> tuple[Resolved, tuple[str, ...]]:
    """What `settings` mean on `hardware`, and a sentence for every choice made for the caller.

    Raises ConfigError for a shape that this cluster can never satisfy: such a server would wait for ever.
    """
    notes: list[str] = []
    device = _device(settings, hardware, notes)
    rank_resources = rank_resources_of(settings, device)
    _check_shape(settings, hardware, rank_resources, device)
    threads = _threads(settings, hardware, device, notes)
    _check_kv_memory(settings, hardware, device)
    host_tier = _host_tier(settings, hardware, notes)
    admin_is_closed = settings.api.admin_key is None and not is_loopback(settings.api.host)
    if admin_is_closed:
        notes.append(f"admin routes are closed: {settings.api.host} is not loopback and api.admin_key is not set")
    if settings.grpc.server == "serve":
        notes.append(_proxy_note(settings))
    engine = settings.engine.model_copy(update={"device": device, "threads": threads})
    settled = settings.model_copy(
        update={"engine": engine, "host_tier": host_tier, "state_dir": settings.resolved_state_dir}
    )
    return Resolved(settled, device, rank_resources, threads, admin_is_closed), tuple(notes)


def is_loopback(host: str) -> bool:
    """True if nobody outside this machine can reach, or speaks from, `host`.

    A name other than localhost does not count: it may resolve to anything.
    """
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _proxy_note(settings: Settings) -> str:
    """Serve's gRPC proxy takes a port and no host."""
    users = "holders of a key" if settings.api.api_key is not None else "everybody"
    admin = "with the admin key" if settings.api.admin_key is not None else "closed, api.admin_key is not set"
    return f"gRPC listens on every interface: inference for {users}, admin calls {admin}"


def _device(settings: Settings, hardware: Hardware, notes: list[str]) -> Literal["cpu", "cuda"]:
    if settings.engine.device != "auto":
        return settings.engine.device
    num_gpus = int(hardware.resources.get("GPU", 0))
    device: Literal["cpu", "cuda"] = "cuda" if num_gpus > 0 else "cpu"
    notes.append(f"engine.device is {device}: the cluster has {num_gpus} GPUs")
    return device


def rank_resources_of(settings: Settings, device: Literal["cpu", "cuda"]) -> dict[str, float]:
    """Logical resources, by Ray's names, that one rank on `device` asks for."""
    if device == "cuda":
        return {"GPU": 1.0}
    return {settings.ray.cpu_rank_resource or "CPU": 1.0}


def _check_shape(settings: Settings, hardware: Hardware, rank: Mapping[str, float], device: str) -> None:
    for name, each in rank.items():
        has = hardware.resources.get(name, 0.0)
        if has >= each * settings.dp:
            continue
        way_out = "lower dp, or set engine.device to cpu" if device == "cuda" else "lower dp, or add nodes"
        raise ConfigError(
            f"dp is {settings.dp} and each rank needs {each:g} {name}, but the cluster has {has:g} {name}: {way_out}"
        )


def _threads(settings: Settings, hardware: Hardware, device: str, notes: list[str]) -> int:
    """All ranks of a node together leave one core free: with every core in torch a deadline is up to 180 ms late."""
    if settings.engine.threads is not None:
        return settings.engine.threads
    ranks_per_node = math.ceil(settings.dp / hardware.num_nodes)
    threads = max(1, (hardware.num_cores - 1) // ranks_per_node)
    if device == "cpu" and threads * ranks_per_node > max(1, hardware.num_cores - 1):
        notes.append(
            f"{ranks_per_node} ranks share {hardware.num_cores} cores: with every core computing, a flush deadline "
            "inside a long step may be answered late"
        )
    return threads


def kv_memory_bytes(engine: EngineSettings, device: str) -> int | None:
    """KV memory of one rank; None: its share of what the weights leave on its GPU. device: a type, `cpu` or another."""
    if engine.kv_memory_gb is not None:
        return int(engine.kv_memory_gb * GIB)
    return int(CPU_KV_MEMORY_GB * GIB) if device == "cpu" else None


def _host_tier(settings: Settings, hardware: Hardware, notes: list[str]) -> HostTierSettings:
    """The host tier with its size fixed; off if there is none."""
    tier = settings.host_tier
    if tier.size_gb > 0 and tier.memory_share is not None:
        raise ConfigError(
            "host_tier.size_gb and host_tier.memory_share are both set; they say the same thing: keep one"
        )
    if tier.low_watermark > tier.high_watermark:
        raise ConfigError(
            f"host_tier.low_watermark is {tier.low_watermark:g}, above host_tier.high_watermark, "
            f"{tier.high_watermark:g}; it must not be"
        )
    if tier.is_on and not settings.engine.prefix_cache:
        raise ConfigError("host_tier needs engine.prefix_cache: a page that is not indexed is never found again")
    where, free = settings.control.shared_dir, hardware.shared_bytes
    if tier.memory_share is not None:
        if free is None:
            raise ConfigError("host_tier.memory_share: it is not known how much is free; set host_tier.size_gb")
        tier = tier.model_copy(update={"size_gb": tier.memory_share * free / GIB, "memory_share": None})
        notes.append(f"host_tier.size_gb is {tier.size_gb:.2f}: {where} has {free / GIB:.2f} GiB free")
    if free is not None and tier.size_gb * GIB > free:
        raise ConfigError(
            f"host_tier.size_gb is {tier.size_gb:g}, but {where} has {free / GIB:.2f} GiB free: lower it, or give the "
            "machine (container: --shm-size) more"
        )
    return tier


def _check_kv_memory(settings: Settings, hardware: Hardware, device: str) -> None:
    engine = settings.engine
    if engine.num_pages is not None and engine.kv_memory_gb is not None:
        raise ConfigError("engine.num_pages and engine.kv_memory_gb are both set; they say the same thing: keep one")
    each = kv_memory_bytes(engine, device)
    if engine.num_pages is not None or device != "cpu" or each is None:
        return
    ranks_per_node = math.ceil(settings.dp / hardware.num_nodes)
    limit = int(hardware.memory_bytes * CPU_KV_MEMORY_SHARE)
    if each * ranks_per_node > limit:
        raise ConfigError(
            f"{ranks_per_node} ranks of {each / GIB:.2f} GiB KV need {each * ranks_per_node / GIB:.2f} GiB on a node; "
            f"{limit / GIB:.2f} GiB is the most it can give: lower engine.kv_memory_gb or dp"
        )
