"""Admission: a waiting request gets its pages, and its match, or it goes on waiting.

All pages of the tokens it has are taken at once, so a prefill in chunks never runs short half-way; what it will
generate is taken page by page later. One page per running request is left alone, or the newcomer would be retracted
before it has computed anything.

Who begins like a prompt that is being prefilled right now waits until that part is in the cache: after a flush all
requests with one system prompt would compute it side by side, as would the n answers to one prompt. That is no reason
for those behind it to wait.
"""

from __future__ import annotations

from collections.abc import Sequence as Listed
from typing import Literal, TypeAlias

from cache.device_cache import DeviceCache, PageCounts
from cache.page_hold import PageHold
from engine.sequence import Sequence

#: `no_room`: nobody behind it may take the pages it waits for. `soon_cached`: it needs nothing that others could take.
Refusal: TypeAlias = Literal["no_room", "soon_cached"]


class Admission:
    """Admits one request at a time. Keeps no state but the memory of what was in the way last time."""

    def __init__(self, cache: DeviceCache) -> None:
        self._cache = cache
        #: who found no room, beside how many, and the counts: the same question has the same answer without a match
        self._refused: tuple[Sequence, int, PageCounts] | None = None

    def try_admit(
        self, sequence: Sequence, running: Listed[Sequence], now_s: float, *, may_match: bool
    ) -> Refusal | None:
        """Match, pin and take pages for all tokens it has; if it is to wait, the reason, and nothing has changed.

        `may_match` False: the lease is over, nothing is looked up.
        """
        question = (sequence, len(running), self._cache.counts())
        if question == self._refused:
            return "no_room"
        # At least one token is computed, or there would be nothing to sample from.
        max_cached = sequence.num_tokens - 1 if may_match else 0
        hold = self._try_open(sequence, max_cached, running, now_s)
        if hold == "no_room" and max_cached and not running:
            # A match in the middle of a long edge pins the whole of it. Alone in the pool, do without the match.
            hold = self._try_open(sequence, 0, running, now_s)
        if hold == "no_room":
            self._refused = question
        if isinstance(hold, str):
            return hold
        sequence.admit(hold, now_s)
        return None

    def _try_open(
        self, sequence: Sequence, max_cached: int, running: Listed[Sequence], now_s: float
    ) -> PageHold | Refusal:
        cache, num_tokens = self._cache, sequence.num_tokens
        hold = cache.open(sequence.namespace, sequence.token_bytes(num_tokens), max_cached, now_s)
        num_wanted = -(-num_tokens // cache.page_size) - hold.num_cached_tokens // cache.page_size
        counts = cache.counts()
        has_room = counts.free + counts.cached - num_wanted >= len(running)
        next_cached = hold.num_cached_tokens + cache.page_size
        is_soon_cached = next_cached <= max_cached and self._is_being_computed(sequence, next_cached, running)
        if has_room and not is_soon_cached and cache.try_extend(hold, num_tokens):
            return hold
        cache.close(hold)
        return "soon_cached" if is_soon_cached else "no_room"

    def _is_being_computed(self, sequence: Sequence, num_tokens: int, running: Listed[Sequence]) -> bool:
        """Whether somebody's prefill is about to publish the first `num_tokens` tokens of the sequence."""
        return self._cache.enabled and any(
            other.hold is not None
            and not other.hold.is_fenced
            and other.namespace == sequence.namespace
            and other.num_remaining > 1
            and other.num_computed < num_tokens <= other.num_tokens
            and other.token_bytes(num_tokens) == sequence.token_bytes(num_tokens)
            for other in running
        )
