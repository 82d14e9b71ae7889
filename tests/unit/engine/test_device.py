"""Devices by name, and emptying the allocator's cache."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch

from configs.errors import ConfigError
from engine.device import empty_device_cache, resolve_device


def device_module(**attributes: object) -> ModuleType:
    module = ModuleType("device_module")
    module.__dict__.update(attributes)
    return module


def test_the_cpu_is_always_there() -> None:
    assert resolve_device("cpu") == torch.device("cpu")
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    assert resolve_device("auto") == (accelerator or torch.device("cpu"))


@pytest.mark.parametrize("name", ["", "abacus", "cuda:99", "cpu:x", "meta"])
def test_unknown_or_absent_devices(name: str) -> None:
    with pytest.raises(ConfigError, match=r"engine\.device"):
        resolve_device(name)


def test_a_device_without_a_cache_has_none_to_empty() -> None:
    assert empty_device_cache(torch.cpu) is False
    assert empty_device_cache(device_module()) is False


def test_a_device_that_is_absent_is_not_touched() -> None:
    calls: list[str] = []
    module = device_module(is_available=lambda: False, empty_cache=lambda: calls.append("empty_cache"))

    assert empty_device_cache(module) is False
    assert calls == []


def test_a_device_with_a_cache_is_emptied_once() -> None:
    calls: list[str] = []
    module = device_module(is_available=lambda: True, empty_cache=lambda: calls.append("empty_cache"))

    assert empty_device_cache(module) is True
    assert calls == ["empty_cache"]


def test_the_default_is_this_machines_device() -> None:
    module = torch.get_device_module()
    has_cache = hasattr(module, "empty_cache") and module.is_available()

    assert empty_device_cache() is has_cache
