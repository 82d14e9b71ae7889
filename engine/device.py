"""What differs between devices, in one place. Everything else asks `torch.get_device_module`."""

from __future__ import annotations

from types import ModuleType

import torch

from configs.errors import ConfigError


def resolve_device(name: str) -> torch.device:
    """The device called `name` ("cpu", "cuda", "cuda:1", ...); "auto": the accelerator if there is one, else the CPU.

    Raises ConfigError when this machine has no such device.
    """
    if name == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ConfigError(f"device {name!r} is unknown to torch (engine.device: auto, cpu or cuda)") from error
    if not _is_present(device):
        raise ConfigError(f"device {name!r} is not available on this machine (engine.device: auto or cpu)")
    return device


def empty_device_cache(device_module: ModuleType | None = None) -> bool:
    """Give the memory that torch's allocator holds unused back to the device.

    device_module: as `torch.get_device_module()` returns it, which is also the default.
    Returns whether the device had such a cache to empty. Tensors that are alive, our KV pool and the model's weights
    among them, are never touched: an allocator's cache holds only blocks that no tensor owns.
    """
    module = torch.get_device_module() if device_module is None else device_module
    empty_cache = getattr(module, "empty_cache", None)
    is_available = getattr(module, "is_available", None)
    if empty_cache is None or (is_available is not None and not is_available()):
        return False
    empty_cache()
    return True


def _is_present(device: torch.device) -> bool:
    if device.type == "cpu":
        return True
    try:
        module = torch.get_device_module(device)
    except RuntimeError:
        return False
    return bool(module.is_available()) and (device.index or 0) < module.device_count()
