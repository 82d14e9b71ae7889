"""Carrying a flush out on the device cache: all of it, or a scope of it; or only counting what would go."""

from __future__ import annotations

from cache.device_cache import DeviceCache, Dropped
from cache.types import Epoch, Namespace
from engine.flush import FlushCommand


def invalidate(cache: DeviceCache, command: FlushCommand, now_s: float) -> None:
    """Make what the command names unreachable, O(pinned); pages of running requests stay theirs, fenced.

    Without a scope the tree is swapped and the epoch raised to the command's; not again if a floor has brought that
    epoch or a later one, because what is in the tree since then is newer than the flush. A flush of part of the tiers
    takes no epoch and only advances the tree generation. A scope may drop more than asked, never less; a prefix is
    dropped in every namespace.
    """
    scope = command.scope
    if scope is None:
        if not 0 < command.epoch <= cache.epoch:
            cache.swap(Epoch(max(cache.epoch, command.epoch)))
    elif scope.prefix_tokens is not None:
        for namespace in _namespaces(cache):
            cache.drop_prefix(namespace, scope.prefix_tokens)
    elif scope.older_than_s is not None:
        cache.drop_older(now_s - scope.older_than_s)
    else:
        cache.drop_namespace(Namespace(scope.namespace or ""))


def count_invalidated(cache: DeviceCache, command: FlushCommand, now_s: float) -> Dropped:
    """What `invalidate` would free and fence now. Changes nothing."""
    scope = command.scope
    if scope is None:
        counts = cache.counts()
        return Dropped(counts.cached, counts.pinned + counts.private)
    if scope.prefix_tokens is not None:
        parts = [cache.count_prefix(namespace, scope.prefix_tokens) for namespace in _namespaces(cache)]
        return Dropped(sum(part.freed_pages for part in parts), sum(part.fenced_pages for part in parts))
    if scope.older_than_s is not None:
        return cache.count_older(now_s - scope.older_than_s)
    return cache.count_namespace(Namespace(scope.namespace or ""))


def _namespaces(cache: DeviceCache) -> list[Namespace]:
    """Every namespace that has pages here, cached or only held; in a stated order."""
    return sorted({*cache.index.spaces, *(hold.namespace for hold in cache.holds)})
