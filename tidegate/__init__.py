"""The public face: `tidegate` on the command line, `from tidegate import Client, AsyncClient` in Python."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from tidegate.async_client import AsyncClient
    from tidegate.faults import FlushFailed, NoAnswer, StreamCut, Unreachable
    from tidegate.sync_client import Client

__all__ = ["AsyncClient", "Client", "FlushFailed", "NoAnswer", "StreamCut", "Unreachable"]

_HOMES = {
    "AsyncClient": "tidegate.async_client",
    "Client": "tidegate.sync_client",
    "FlushFailed": "tidegate.faults",
    "NoAnswer": "tidegate.faults",
    "StreamCut": "tidegate.faults",
    "Unreachable": "tidegate.faults",
}


def __getattr__(name: str) -> Any:
    """Loaded when first asked for: the command line must have its signal handlers before anything large is imported."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module 'tidegate' has no attribute {name!r}")
    return getattr(importlib.import_module(home), name)
