"""Admission: a waiting request gets its pages, and its match, or it goes on waiting.

All pages of the tokens it has are taken at once, so a prefill in chunks never runs short half-way; what it will
generate is taken page by page later. One page per running request is left alone, or the newcomer would be retracted
before it has computed anything.
"""

from __future__ import annotations

from cache.device_cache import DeviceCache, PageCounts
from cache.page_hold import PageHold
from engine.sequence import Sequence


class Admission:
    """Admits from the front of the queue. Keeps no state but the memory of what was in the way last time."""

    def __init__(self, cache: DeviceCache) -> None:
        self._cache = cache
        #: who did not fit, beside how many, under which counts: the same question gets the same answer without a match
        self._refused: tuple[Sequence, int, PageCounts] | None = None

    def try_admit(self, sequence: Sequence, num_running: int, now_s: float, *, may_match: bool) -> bool:
        """Match, pin and take pages for all tokens it has; False and nothing changed if they are not to be had.

        `may_match` False: the lease is over, nothing is looked up.
        """
        question = (sequence, num_running, self._cache.counts())
        if question == self._refused:
            return False
        # At least one token is computed, or there would be nothing to sample from.
        max_cached = sequence.num_tokens - 1 if may_match else 0
        hold = self._try_open(sequence, max_cached, num_running, now_s)
        if hold is None and max_cached and not num_running:
            # A match in the middle of a long edge pins the whole of it. Alone in the pool, do without the match.
            hold = self._try_open(sequence, 0, num_running, now_s)
        if hold is None:
            self._refused = question
            return False
        sequence.admit(hold, now_s)
        return True

    def _try_open(self, sequence: Sequence, max_cached: int, num_running: int, now_s: float) -> PageHold | None:
        cache, num_tokens = self._cache, sequence.num_tokens
        hold = cache.open(sequence.namespace, sequence.token_bytes(num_tokens), max_cached, now_s)
        num_wanted = -(-num_tokens // cache.page_size) - hold.num_cached_tokens // cache.page_size
        counts = cache.counts()
        if counts.free + counts.cached - num_wanted >= num_running and cache.try_extend(hold, num_tokens):
            return hold
        cache.close(hold)
        return None
