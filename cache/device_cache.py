"""The device tier of one rank: who owns which page, what may be matched, what a flush does. The scheduler's only door.

One thread uses it (the engine thread). No clock, no I/O. Every page is in exactly one state at any time: free, cached
(in the index, evictable), pinned (in the index, in use), private (of one hold), fenced (of holds a flush covered),
copying (of a copy to or from the host tier). Copies are holds of their own, so what protects a request's pages
protects a copy's: they are handed out to nobody before `close`, whatever is flushed, dropped or aborted meanwhile.
"""

from __future__ import annotations

from typing import Final, TypeAlias

import numpy as np
from numpy.typing import NDArray

from cache.chain_keys import node_keys
from cache.copies import orphaned_copies
from cache.fence import FencedSpan, carried_pages, fence_path, num_pinned_by, release_span
from cache.key_roots import KeyRoots
from cache.keys import KEY_BYTES, PageKeys
from cache.node_table import NO_NODE, NodeId
from cache.page_counts import Dropped, PageCounts, Swapped
from cache.page_hold import PageHold
from cache.pages import PAGE_ID_BYTES, PagePool
from cache.prefix_index import PrefixIndex
from cache.sanity import violations
from cache.scope import AgeScope, NamespaceScope, PrefixScope
from cache.types import TOKEN_BYTES, Epoch, Namespace, TokenBytes, TreeGeneration
from configs.errors import InvariantError

Scope: TypeAlias = NamespaceScope | PrefixScope | AgeScope

FIRST_EPOCH: Final = Epoch(0)


class DeviceCache:
    """Pages and prefix index of one rank.

    Requests go open -> (try_extend | publish)* -> close. `swap` and the drops may come at any point in between: open
    holds survive them as fenced.
    """

    def __init__(self, num_pages: int, page_size: int, *, enabled: bool = True, epoch: Epoch = FIRST_EPOCH) -> None:
        if num_pages < 1 or page_size < 1:
            raise ValueError(f"num_pages={num_pages} and page_size={page_size} must be at least 1")
        self.num_pages = num_pages
        self.page_size = page_size
        #: False: nothing is matched, nothing is published
        self.enabled = enabled
        #: of everything in the index; only rises
        self.epoch = epoch
        self.generation = TreeGeneration(0)
        self.pool = PagePool(num_pages)
        self.index = PrefixIndex(page_size)
        #: indexes of earlier generations, owning no page, being taken apart by `reap`
        self.retired: list[PrefixIndex] = []
        #: open holds, in order of opening
        self.holds: dict[PageHold, None] = {}
        self._page_bytes = page_size * TOKEN_BYTES
        self._num_private = 0
        self._num_fenced = 0
        self._num_copying = 0
        # counters since start, for metrics
        self.num_lookup_tokens = 0
        self.num_hit_tokens = 0
        self.num_published_pages = 0
        #: pages computed twice because two requests had the same prefix at the same time
        self.num_duplicate_pages = 0
        self.num_evicted_pages = 0
        #: pages freed by swaps and drops
        self.num_dropped_pages = 0

    # ------------------------------------------------------------------------------------------------------ requests
    def open(self, namespace: Namespace, tokens: TokenBytes, max_cached_tokens: int, now_s: float) -> PageHold:
        """Admit a request: match the longest cached prefix of whole pages, at most `max_cached_tokens`, and pin it.

        Fixes the hold's epoch and tree generation. The hold covers the cached prefix only; extend it for more.
        """
        hold = PageHold(namespace, tokens[: self._page_bytes], self.epoch, self.generation, now_s, self.page_size)
        limit = min(len(tokens), max_cached_tokens * TOKEN_BYTES) // self._page_bytes * self._page_bytes
        if limit > 0 and self.enabled:
            node, end = self.index.match(namespace, tokens, limit)
            if end:
                self._share(hold, node, end)
        self.num_lookup_tokens += len(tokens) // TOKEN_BYTES
        self.num_hit_tokens += hold.num_cached_tokens
        self.holds[hold] = None
        return hold

    def try_extend(self, hold: PageHold, num_tokens: int) -> bool:
        """Give the hold private pages so that it covers `num_tokens`, evicting cached pages if need be.

        False: there are not enough free and evictable pages, and nothing has changed.
        """
        self._check_open(hold)
        num_missing = -(-num_tokens // self.page_size) - len(hold.page_table)
        if num_missing <= 0:
            return True
        if num_missing > self.pool.num_free and not self._try_free(num_missing):
            return False
        hold.replace_pages(hold.page_table.data, self.pool.take(num_missing))
        if hold.is_fenced:
            self._num_fenced += num_missing
        else:
            self._num_private += num_missing
        return True

    def publish(self, hold: PageHold, tokens: TokenBytes, num_tokens: int, now_s: float) -> None:
        """Offer the full pages among the first `num_tokens` tokens, whose KV is computed, to later requests.

        Does nothing for a fenced hold. Where the index got the same pages from another request meanwhile, the hold's
        page table changes to the index's and its own go back to the pool: no launched step may still use them.
        """
        self._check_open(hold)
        stop = num_tokens * TOKEN_BYTES // self._page_bytes * self._page_bytes
        start = hold.shared_bytes()
        if hold.is_fenced or not self.enabled or stop <= start:
            return
        if stop > min(len(tokens), len(hold.page_table) * self._page_bytes):
            raise InvariantError(f"{num_tokens} tokens to publish; {len(tokens) // TOKEN_BYTES} known, "
                                 f"{hold.num_tokens_capacity} have pages")  # fmt: skip
        first, last = hold.num_shared_pages, stop // self._page_bytes
        pages = hold.page_table[first:last].tobytes()
        node, known = self.index.insert(hold.namespace, hold.node, start, tokens, stop, pages, hold.birth_s)
        self._repin(hold, node)
        num_known = (known - start) // self._page_bytes
        if num_known:
            self.pool.give(pages[: num_known * PAGE_ID_BYTES])
            hold.replace_pages(self.index.path_pages(node, stop), hold.page_table[last:].data)
        hold.num_shared_pages = last
        hold.first_page = tokens[: self._page_bytes]
        self._num_private -= last - first
        self.num_published_pages += last - first - num_known
        self.num_duplicate_pages += num_known

    def close(self, hold: PageHold) -> None:
        """End the hold: its private pages are free, its shared ones unpinned (or free, if fenced and nobody else's)."""
        self._check_open(hold)
        del self.holds[hold]
        hold.is_closed = True
        num_private = hold.num_private_pages
        if num_private:
            self.pool.give(hold.private_pages())
        if hold.is_copy:
            self._num_copying -= num_private
            num_private = 0
        if hold.is_fenced:
            self._num_fenced -= num_private + self._release_span(hold)
        else:
            self._num_private -= num_private
            if hold.node >= 0:
                self.index.unpin(hold.node)

    # --------------------------------------------------------------------------------------------------------- flush
    def swap(self, epoch: Epoch) -> Swapped:
        """Flush: nothing cached so far is ever matched again. O(pinned pages), whatever is cached.

        The index is replaced by an empty one and the pool's marks are moved back; open holds go on as fenced. The old
        index is taken apart by `reap`. epoch: the new one, not below the old; equal when one tier alone is flushed.
        """
        if epoch < self.epoch:
            raise InvariantError(f"epoch {epoch} after {self.epoch}: epochs only rise")
        self._fence([hold for hold in self.holds if not hold.is_fenced])
        freed = self.index.num_pages
        spans = [hold.span for hold in self.holds if hold.span is not None]
        private = [hold.private_pages() for hold in self.holds]
        self.pool.restart(b"".join(carried_pages(spans) + private))
        self.retired.append(self.index)
        self.index = PrefixIndex(self.page_size)
        self.epoch = epoch
        self.generation = TreeGeneration(self.generation + 1)
        self.num_dropped_pages += freed
        return Swapped(freed, self._num_fenced + self._num_copying)

    def begin_anew(self) -> None:
        """After a violation: a pool and an index that know nothing of before, and no open hold but those of copies.

        Who had one finds it closed and must not use its pages any more; pages that a copy reads or writes stay the
        copy's. Nothing else of the old state is read, which may
        have one page in two hands or a page that does not exist. The epoch stays, the tree generation rises.
        """
        copies = orphaned_copies(list(self.holds), self.num_pages)
        for hold in self.holds:
            hold.is_closed = hold not in copies
        self.holds = dict.fromkeys(copies)
        self.num_dropped_pages += self.index.num_pages
        self.pool = PagePool(self.num_pages)
        self.pool.restart(b"".join(copy.private_pages() for copy in copies))
        self.index = PrefixIndex(self.page_size)
        self.retired.clear()
        self.generation = TreeGeneration(self.generation + 1)
        self._num_private = self._num_fenced = 0
        self._num_copying = sum(copy.num_private_pages for copy in copies)

    def drop_namespace(self, namespace: Namespace) -> Dropped:
        """Drop one namespace; its open holds go on as fenced. O(open holds + their pages)."""
        return self._drop(NamespaceScope(namespace))

    def drop_prefix(self, namespace: Namespace, first_page: TokenBytes) -> Dropped:
        """Drop everything of a namespace that shares the first page of `first_page` (all of it, if it is shorter)."""
        return self._drop(PrefixScope(namespace, first_page[: self._page_bytes]))

    def drop_older(self, birth_s: float) -> Dropped:
        """Drop every chain that may contain KV computed before `birth_s`.

        O(open holds + their pages), and about 1 ns for each different first page cached; so the other drops.
        """
        return self._drop(AgeScope(birth_s))

    def count_namespace(self, namespace: Namespace) -> Dropped:
        """What `drop_namespace` would do; changes nothing. So the other two."""
        return self._count_drop(NamespaceScope(namespace))

    def count_prefix(self, namespace: Namespace, first_page: TokenBytes) -> Dropped:
        return self._count_drop(PrefixScope(namespace, first_page[: self._page_bytes]))

    def count_older(self, birth_s: float) -> Dropped:
        return self._count_drop(AgeScope(birth_s))

    def reap(self, budget_nodes: int) -> bool:
        """Take apart what flushes left behind: at most `budget_nodes` nodes, about 0.6 us each. True: there is more.

        The engine loop calls it once a step. Nothing depends on it but memory: dropped pages are free at once.
        """
        budget = self._free_dropped(budget_nodes)
        while self.retired and budget > 0:
            budget = self.retired[-1].shrink(budget)
            if budget > 0:
                self.retired.pop()
        return budget <= 0

    # -------------------------------------------------------------------------------------------------------- counts
    def counts(self) -> PageCounts:
        """Pages by state. O(1)."""
        index = self.index
        free = self.pool.num_free + index.dropped.num_pages
        return PageCounts(
            free, index.num_evictable, index.num_pinned, self._num_private, self._num_fenced, self._num_copying
        )

    def sanity_check(self) -> list[str]:
        """Violations in words, empty when sound. Changes nothing. O(pages)."""
        return violations(self)

    # -------------------------------------------------------------------------------------------------------- copies
    def open_load(self, hold: PageHold, num_pages: int, birth_s: float) -> PageHold:
        """Take the hold's first `num_pages` private pages from it, for a copy that fills them. `end_load` ends it.

        birth_s: of the KV that will be in them. Until then the hold must not be extended, published or computed with.
        """
        self._check_open(hold)
        shared, pages = hold.num_shared_pages, hold.page_table
        copy = self._open_copy(hold.namespace, hold.first_page, birth_s)
        copy.replace_pages(pages[shared : shared + num_pages].data)
        hold.replace_pages(pages[:shared].data, pages[shared + num_pages :].data)
        hold.birth_s = min(hold.birth_s, birth_s)
        if hold.node >= 0:  # a stem is at most as old as any hold that pins it
            self.index.stems.lower_birth(self.index.stem_of(hold.node), birth_s)
        self._num_copying += num_pages
        if hold.is_fenced:
            self._num_fenced -= num_pages
        else:
            self._num_private -= num_pages
        return copy

    def end_load(self, hold: PageHold, copy: PageHold, num_loaded: int) -> None:
        """The copy has ended: its pages are the hold's again, the first `num_loaded` of them with valid KV."""
        self._check_open(hold)
        self._check_open(copy)
        shared, num_pages = hold.num_shared_pages, len(copy.page_table)
        hold.replace_pages(hold.page_table[:shared].data, copy.page_table.data, hold.page_table[shared:].data)
        hold.num_loaded_tokens = num_loaded * self.page_size
        self._num_copying -= num_pages
        if hold.is_fenced:
            self._num_fenced += num_pages
        else:
            self._num_private += num_pages
        del self.holds[copy]
        copy.is_closed = True

    def open_victim(self, max_pages: int, roots: KeyRoots) -> tuple[PageHold, PageKeys] | None:
        """Evict the tail of the coldest leaf for a copy, which owns its pages from now on; at most `max_pages`.

        Returns the copy's hold, to be closed when it has ended, and the keys of its pages. None: nothing to evict, or
        dropped pages wait to be freed, which is cheaper.
        """
        index = self.index
        node = NO_NODE if index.dropped else index.queue.pop()
        if node < 0:
            return None
        stem = index.stem_of(node)
        copy = self._open_copy(index.stems.spaces[stem].namespace, index.stems.first_pages[stem], index.birth_of(node))
        keys = node_keys(index, node, roots, self.epoch)
        copy.replace_pages(index.give_up(node, max_pages))
        num_pages = len(copy.page_table)
        self._num_copying += num_pages
        self.num_evicted_pages += num_pages
        return copy, keys[-num_pages * KEY_BYTES :]

    def give_back(self, copy: PageHold, is_kept: NDArray[np.bool_]) -> None:
        """A copy does not need some of its own pages: those where `is_kept` is False are free."""
        self._check_open(copy)
        pages = copy.page_table
        self.pool.give(pages[~is_kept].tobytes())
        self._num_copying -= len(pages) - int(is_kept.sum())
        copy.replace_pages(pages[is_kept].data)

    def open_backup(self, hold: PageHold, now_s: float) -> PageHold:
        """Pin the hold's shared pages for copies out of them; the copy's hold, to be closed when they have ended."""
        self._check_open(hold)
        copy = PageHold(hold.namespace, hold.first_page, self.epoch, self.generation, now_s, self.page_size)
        copy.is_copy = True
        copy.birth_s = self.index.birth_of(hold.node)
        self._share(copy, hold.node, hold.shared_bytes())
        self.holds[copy] = None
        return copy

    # ------------------------------------------------------------------------------------------------------- private
    def _open_copy(self, namespace: Namespace, first_page: TokenBytes, birth_s: float) -> PageHold:
        """The hold of a copy of pages that are in no index. It is as good as fenced: it publishes nothing."""
        copy = PageHold(namespace, first_page, self.epoch, self.generation, birth_s, self.page_size)
        copy.is_copy = copy.is_fenced = True
        self.holds[copy] = None
        return copy

    def _check_open(self, hold: PageHold) -> None:
        if hold not in self.holds:
            raise InvariantError("a page hold was used after its end" if hold.is_closed else "a foreign page hold")

    def _share(self, hold: PageHold, node: NodeId, end: int) -> None:
        self.index.pin(node)
        hold.node = node
        hold.num_shared_pages = end // self._page_bytes
        hold.num_cached_tokens = end // TOKEN_BYTES
        hold.replace_pages(self.index.path_pages(node, end))

    def _repin(self, hold: PageHold, node: NodeId) -> None:
        if node != hold.node:
            self.index.pin(node)
            if hold.node >= 0:
                self.index.unpin(hold.node)
            hold.node = node

    def _try_free(self, num_pages: int) -> bool:
        """Make the pool hold `num_pages` free pages: dropped ones first, then by eviction. False: impossible."""
        if num_pages > self.pool.num_free + self.index.dropped.num_pages + self.index.num_evictable:
            return False
        while self.index.dropped and num_pages > self.pool.num_free:
            self._free_dropped(num_pages - self.pool.num_free)
        num_missing = num_pages - self.pool.num_free
        if num_missing > 0:
            for pages in self.index.evict(num_missing):
                self.pool.give(pages)
            self.num_evicted_pages += num_missing
        return True

    def _free_dropped(self, budget: int) -> int:
        out: list[bytes] = []
        budget = self.index.dropped.release(budget, out)
        if out:
            self.pool.give(b"".join(out))
        return budget

    def _drop(self, scope: Scope) -> Dropped:
        num_fenced = self._fence([hold for hold in self.holds if self._is_covered(hold, scope)])
        freed = self.index.drop(scope.stems(self.index))
        self.num_dropped_pages += freed
        return Dropped(freed, num_fenced)

    def _count_drop(self, scope: Scope) -> Dropped:
        covered = [hold for hold in self.holds if self._is_covered(hold, scope)]
        pinned = num_pinned_by(self.index, [hold.node for hold in covered])
        num_private = sum(hold.num_private_pages for hold in covered if not hold.is_copy)
        return Dropped(self.index.stems.count(scope.stems(self.index)) - pinned, pinned + num_private)

    def _is_covered(self, hold: PageHold, scope: Scope) -> bool:
        return not hold.is_fenced and scope.covers(hold, self.index)

    def _fence(self, holds: list[PageHold]) -> int:
        """These holds go on with pages that are nobody else's any more. Returns the number of pages fenced."""
        spans: dict[NodeId, FencedSpan] = {}
        num_private = 0
        for hold in holds:
            hold.is_fenced = True
            num_private += 0 if hold.is_copy else hold.num_private_pages
            if hold.node >= 0:
                hold.span = fence_path(self.index, hold.node, spans)
                hold.node = NO_NODE
        num_fenced = num_private + sum(span.num_pages for span in spans.values())
        self._num_private -= num_private
        self._num_fenced += num_fenced
        return num_fenced

    def _release_span(self, hold: PageHold) -> int:
        pages = b"".join(release_span(hold.span))
        self.pool.give(pages)
        hold.span = None
        return len(pages) // PAGE_ID_BYTES
