"""Token sequences for the cache's tests."""

from __future__ import annotations

import struct

from cache.types import TokenBytes


def tokens_of(*values: int) -> TokenBytes:
    return struct.pack(f"<{len(values)}i", *values)


def run_of(length: int, first: int = 0) -> TokenBytes:
    """`length` tokens counting up from `first`."""
    return tokens_of(*range(first, first + length))
