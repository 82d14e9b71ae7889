"""What settings mean on a machine: devices, shapes that can never be, threads, memory, closed admin routes."""

from __future__ import annotations

import pytest

from configs.errors import ConfigError
from configs.load import settings_from_dict
from configs.resolve import GIB, Hardware, is_loopback, kv_memory_bytes, resolve
from configs.schema import Settings


def _hardware(cpus: float = 2, gpus: float = 0, cores: int = 2, nodes: int = 1, **custom: float) -> Hardware:
    return Hardware(cores, 8 * GIB, nodes, {"CPU": cpus, "GPU": gpus, **custom})


def _settings(**tree: object) -> Settings:
    return settings_from_dict(tree)


def test_auto_takes_the_gpus_when_there_are_any() -> None:
    resolved, notes = resolve(_settings(dp=2), _hardware(gpus=4))
    assert (resolved.device, resolved.rank_resources) == ("cuda", {"GPU": 1.0})
    assert resolved.settings.engine.device == "cuda"
    assert any("4 GPUs" in note for note in notes)


def test_auto_takes_the_cpu_when_there_is_none() -> None:
    resolved, _ = resolve(Settings(), _hardware())
    assert (resolved.device, resolved.rank_resources) == ("cpu", {"CPU": 1.0})


def test_a_cpu_rank_asks_for_the_resource_of_the_local_start() -> None:
    settings = _settings(dp=4, engine={"device": "cpu"}, ray={"cpu_rank_resource": "tidegate_rank"})
    resolved, _ = resolve(settings, _hardware(tidegate_rank=4))
    assert resolved.rank_resources == {"tidegate_rank": 1.0}


@pytest.mark.parametrize(
    ("settings", "hardware", "reason"),
    [
        (_settings(dp=4, engine={"device": "cuda"}), _hardware(gpus=2), r"dp is 4 .* 1 GPU, but the cluster has 2 GPU"),
        (_settings(dp=1, engine={"device": "cuda"}), _hardware(), r"cluster has 0 GPU.*set engine.device to cpu"),
        (_settings(dp=3, engine={"device": "auto"}), _hardware(gpus=2), r"dp is 3"),
        (_settings(dp=3, engine={"device": "cpu"}), _hardware(cpus=2), r"1 CPU, but the cluster has 2 CPU: lower dp"),
        (_settings(ray={"cpu_rank_resource": "slot"}), _hardware(), r"1 slot, but the cluster has 0 slot"),
    ],
)
def test_a_shape_that_can_never_be_is_refused(settings: Settings, hardware: Hardware, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(settings, hardware)


@pytest.mark.parametrize(
    ("dp", "cores", "nodes", "threads"), [(1, 2, 1, 1), (1, 8, 1, 7), (2, 8, 1, 3), (2, 8, 2, 7), (2, 2, 1, 1)]
)
def test_the_ranks_of_a_node_leave_one_core_free(dp: int, cores: int, nodes: int, threads: int) -> None:
    resolved, _ = resolve(_settings(dp=dp, engine={"device": "cpu"}), _hardware(cpus=dp, cores=cores, nodes=nodes))
    assert resolved.threads == resolved.settings.engine.threads == threads


def test_too_few_cores_are_noted_and_a_chosen_number_is_kept() -> None:
    tight, notes = resolve(_settings(dp=2, engine={"device": "cpu"}), _hardware(cores=2))
    assert tight.threads == 1
    assert any("share 2 cores" in note for note in notes)
    chosen, _ = resolve(_settings(engine={"device": "cpu", "threads": 5}), _hardware(cores=2))
    assert chosen.threads == 5


def test_kv_memory_of_a_cpu_rank_has_a_default_and_a_limit() -> None:
    assert kv_memory_bytes(Settings().engine, "cpu") == GIB // 4
    assert kv_memory_bytes(_settings(engine={"kv_memory_gb": 2}).engine, "cpu") == 2 * GIB
    resolve(_settings(dp=2, engine={"kv_memory_gb": 3}), _hardware())
    with pytest.raises(ConfigError, match=r"2 ranks of 4\.00 GiB KV need 8\.00 GiB on a node; 6\.40 GiB"):
        resolve(_settings(dp=2, engine={"kv_memory_gb": 4}), _hardware())


def test_a_gpu_rank_finds_its_own_memory() -> None:
    assert kv_memory_bytes(Settings().engine, "cuda") is None
    assert kv_memory_bytes(_settings(engine={"kv_memory_gb": 40}).engine, "cuda") == 40 * GIB
    # nothing of the node's memory is asked for
    resolve(_settings(engine={"kv_memory_gb": 40}), _hardware(gpus=1))


def test_pages_and_memory_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="both set"):
        resolve(_settings(engine={"num_pages": 64, "kv_memory_gb": 1}), _hardware())


@pytest.mark.parametrize(
    ("api", "closed"),
    [
        ({}, False),
        ({"host": "0.0.0.0"}, True),
        ({"host": "0.0.0.0", "admin_key": "k"}, False),
        ({"host": "::1"}, False),
    ],
)
def test_admin_routes_close_beyond_loopback_without_a_key(api: dict[str, str], closed: bool) -> None:
    resolved, notes = resolve(_settings(api=api), _hardware())
    assert resolved.admin_is_closed is closed
    assert any("admin routes are closed" in note for note in notes) is closed


def test_what_serves_grpc_proxy_opens_is_noted() -> None:
    _, own = resolve(_settings(api={"api_key": "k"}), _hardware())
    assert not any("gRPC" in note for note in own)
    _, bare = resolve(_settings(grpc={"server": "serve"}), _hardware())
    assert (
        "gRPC listens on every interface: inference for everybody, admin calls closed, api.admin_key is not set" in bare
    )
    _, keys = resolve(_settings(grpc={"server": "serve"}, api={"api_key": "a", "admin_key": "b"}), _hardware())
    assert any("inference for holders of a key, admin calls with the admin key" in note for note in keys)


@pytest.mark.parametrize(("host", "expected"), [("127.0.0.1", True), ("127.9.9.9", True), ("::1", True),
                                                ("localhost", True), ("0.0.0.0", False), ("::", False),
                                                ("node-7", False), ("10.0.0.1", False), ("", False)])  # fmt: skip
def test_loopback(host: str, expected: bool) -> None:
    assert is_loopback(host) is expected


def test_resolving_changes_nothing_that_was_given() -> None:
    settings = _settings(dp=2, engine={"device": "cpu"})
    before = settings.model_dump()
    resolve(settings, _hardware())
    assert settings.model_dump() == before


SHARED = Hardware(2, 8 * GIB, 1, {"CPU": 2.0}, shared_bytes=4 * GIB)


def test_the_host_tier_is_off_unless_it_has_a_size() -> None:
    resolved, _ = resolve(Settings(), SHARED)
    assert not resolved.settings.host_tier.is_on


def test_a_share_of_the_free_memory_becomes_a_size() -> None:
    resolved, notes = resolve(_settings(host_tier={"memory_share": 0.25}), SHARED)
    assert resolved.settings.host_tier.size_gb == 1.0
    assert any("4.00 GiB free" in note for note in notes)


@pytest.mark.parametrize(
    ("tier", "hardware", "reason"),
    [
        ({"size_gb": 5}, SHARED, r"size_gb is 5, but /dev/shm has 4.00 GiB free.*--shm-size"),
        ({"size_gb": 1, "memory_share": 0.5}, SHARED, r"both set"),
        ({"memory_share": 0.5}, _hardware(), r"set host_tier.size_gb"),
        ({"size_gb": 1, "low_watermark": 0.5}, SHARED, r"low_watermark is 0.5, above"),
    ],
)
def test_a_host_tier_that_cannot_be_is_refused(tier: dict[str, object], hardware: Hardware, reason: str) -> None:
    with pytest.raises(ConfigError, match=reason):
        resolve(_settings(host_tier=tier), hardware)


def test_a_host_tier_needs_the_prefix_cache() -> None:
    with pytest.raises(ConfigError, match="prefix_cache"):
        resolve(_settings(host_tier={"size_gb": 1}, engine={"prefix_cache": False}), SHARED)
