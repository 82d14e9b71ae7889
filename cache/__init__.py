"""Prefix index, page pool, device cache. Knows neither Ray nor HTTP nor torch."""

from cache.device_cache import DeviceCache
from cache.page_counts import Dropped, PageCounts, Swapped
from cache.page_hold import PageHold
from cache.types import (
    DEFAULT_NAMESPACE,
    TOKEN_BYTES,
    Epoch,
    Namespace,
    PageId,
    TokenBytes,
    TreeGeneration,
)

__all__ = [
    "DEFAULT_NAMESPACE",
    "TOKEN_BYTES",
    "DeviceCache",
    "Dropped",
    "Epoch",
    "Namespace",
    "PageCounts",
    "PageHold",
    "PageId",
    "Swapped",
    "TokenBytes",
    "TreeGeneration",
]
