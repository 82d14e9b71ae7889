"""The scheduler's side of the host tier: what is loaded at an admission, what is written and when, what is on its way.

Part of the scheduler and, like it, a machine: no clock, no threads, no bytes. Copies are ordered with `StartCopies` and
end with `CopyEnded`, in any order, late, or with failure; until then their pages belong to them, whatever is flushed,
aborted, retracted or evicted meanwhile (hole H13). A copy that never ends costs its pages and nothing else.

With the lease over, or no tier attached, nothing is looked up and nothing is written.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from cache.chain_keys import key_before, path_keys
from cache.device_cache import DeviceCache
from cache.key_roots import KeyRoots
from cache.keys import KEY_BYTES, PageKeys, page_keys
from cache.page_hold import PageHold
from cache.types import TOKEN_BYTES, Epoch, Namespace
from cache.write_policy import (
    WRITE_MOMENTS,
    Watermarks,
    backed_stop,
    backing_violations,
    forget_backed,
    mark_backed,
    mark_lost,
)
from engine.copy_jobs import CopyJob, HostCounters, HostFound, HostView, LoadJob, WriteJob
from engine.flush import FlushCommand, FlushScope
from engine.host_calls import HostSettings, SubEpochs
from engine.sequence import Sequence

#: pages of a chain asked for at once: the first look is cheap when nothing is there, the next ones double
_FIRST_LOOK = 32
#: pages evicted ahead in one turn: about 0.5 ms with their keys
_MAX_AHEAD_PAGES = 256
#: pages of one write; larger runs are cut, so that the first pages come back soon
_MAX_WRITE_PAGES = 64


@dataclass(slots=True, eq=False)
class _OpenCopy:
    """A copy under way."""

    job: CopyJob
    #: owns the pages
    hold: PageHold
    num_pages: int
    #: load: who waits for it; None once it has left, and for writes
    sequence: Sequence | None = None
    #: write-through: position in token bytes of each page in its sequence
    positions: list[int] | None = None


class HostDesk:
    """One rank's use of the tier. Changed by the scheduler only."""

    def __init__(self, cache: DeviceCache, settings: HostSettings) -> None:
        self._cache = cache
        self._settings = settings
        self._moments = WRITE_MOMENTS[settings.write_policy]
        self._marks = Watermarks.of_shares(settings.low_watermark, settings.high_watermark, cache.num_pages)
        self._epoch = cache.epoch
        self._roots = KeyRoots("", settings.layout_digest, settings.weights_digest)
        self._view: HostView | None = None
        self._open: dict[int, _OpenCopy] = {}
        self._num_copies = 0
        #: no page from before is loaded or written: the newest flush by age
        self._born_after_s = -math.inf
        #: pages of all copies under way; of these, pages that are free once their copy has ended
        self.num_in_flight = 0
        self._num_leaving = 0
        #: `DeviceCache.num_evicted_pages` when it was last looked at
        self._num_evicted_seen = 0
        self.counters = HostCounters()
        #: jobs to be started; whoever drives the scheduler takes the list away
        self.jobs: list[CopyJob] = []

    # ------------------------------------------------------------------------------------------------- the tier itself
    def attach(self, view: HostView | None, lineage: str, sub_epochs: SubEpochs) -> None:
        """Use this tier from now on; None: there is none any more. Copies of before go on to their ends."""
        self._view = view
        if view is None:
            return
        forget_backed(self._cache.index)
        if self._roots.begin_lineage(lineage):
            self._cache.index.table.keys[:] = [b""] * len(self._cache.index.table.keys)
        for scope, sub_epoch in sub_epochs:
            # what was recorded before the epoch began is part of it, and was forgotten with it
            if sub_epoch > self._epoch:
                self._raise_sub_epoch(scope, sub_epoch)

    def swapped(self, epoch: Epoch) -> None:
        """All tiers were flushed: scoped flushes of before are part of that."""
        if epoch > self._epoch:
            self._roots.forget_until(epoch)
            self._epoch = epoch

    def flushed(self, command: FlushCommand, now_s: float) -> None:
        """A flush was carried out on the device: from now on no host page that it covers is found either."""
        scope = command.scope
        if scope is None:
            self.swapped(self._cache.epoch)
        if scope is None or "host" not in command.tiers:
            return
        if scope.older_than_s is not None:
            self._born_after_s = max(self._born_after_s, now_s - scope.older_than_s)
        elif command.sub_epoch:
            self._raise_sub_epoch(scope, command.sub_epoch)

    # ------------------------------------------------------------------------------------------------------------ loads
    def begin_load(self, sequence: Sequence, hold: PageHold) -> None:
        """Order what the tier has of the sequence behind the pages that the hold shares, if it has anything.

        The sequence computes nothing until `ended` says so; its pages are taken already.
        """
        view, cache = self._view, self._cache
        max_pages = (sequence.num_tokens - 1) // cache.page_size - hold.num_shared_pages
        room = self._settings.max_inflight_pages - self.num_in_flight
        if view is None or max_pages <= 0 or room <= 0 or not cache.enabled:
            return
        found = self._find(view, sequence, hold, min(max_pages, room))
        self.counters.num_lookups += 1
        self.counters.num_found_pages += found.num_pages
        if found.cut:
            self.counters.misses[found.cut] += 1
        if not found.num_pages:
            return
        copy = cache.open_load(hold, found.num_pages, found.birth_s)
        job = LoadJob(self._next_id(), view.number, found, copy.page_table)
        self._begin(_OpenCopy(job, copy, found.num_pages, sequence))
        sequence.load = job.copy_id

    def abandon(self, sequence: Sequence) -> None:
        """The sequence leaves while its load is under way: the copy alone owns the pages until it has ended."""
        assert sequence.load is not None, f"{sequence.request_id} waits for no load"
        # after a violation there may be none
        if sequence.load in self._open:
            self._open[sequence.load].sequence = None
        sequence.load = None

    # ----------------------------------------------------------------------------------------------------------- writes
    def used(self, hold: PageHold, now_s: float, *, is_hit: bool) -> None:
        """The hold's shared pages were published or hit: copy what the policy wants of them, parents first."""
        is_wanted = self._moments.at_hit if is_hit else self._moments.at_publish
        if not is_wanted or hold.is_fenced or not hold.num_shared_pages or self._view is None:
            return
        stop = hold.shared_bytes()
        begin = min(backed_stop(self._cache.index, hold.node), stop)
        if begin < stop:
            self._back_up(self._view, hold, begin, stop, now_s)

    def run_ahead(self) -> None:
        """`write_back`: below the low watermark let the coldest pages leave the device, through a copy."""
        self._count_hasty_evictions()
        if not self._moments.at_eviction or self._view is None:
            return
        num_wanted = self._marks.num_to_evict(self._cache.counts().free, self._num_leaving)
        num_wanted = min(num_wanted, _MAX_AHEAD_PAGES, self._settings.max_inflight_pages - self.num_in_flight)
        victims: list[tuple[PageHold, PageKeys]] = []
        while num_wanted > 0 and (victim := self._cache.open_victim(min(num_wanted, _MAX_WRITE_PAGES), self._roots)):
            victims.append(victim)
            num_wanted -= len(victim[0].page_table)
        self._write_victims(self._view, victims)
        self._num_evicted_seen = self._cache.num_evicted_pages

    # -------------------------------------------------------------------------------------------------------------- end
    def ended(self, copy_id: int, num_done: int, reason: str, took_s: float, *, lease_ok: bool) -> Sequence | None:
        """A copy has ended with its first `num_done` pages. The sequence that waited for it, with them loaded."""
        copy = self._open.pop(copy_id, None)
        if copy is None:
            return None
        self.num_in_flight -= copy.num_pages
        if isinstance(copy.job, LoadJob):
            return self._load_ended(copy, num_done, reason, took_s, lease_ok=lease_ok)
        self._write_ended(copy, copy.job, num_done, reason, took_s)
        return None

    def begin_anew(self) -> None:
        """After a violation, behind `DeviceCache.begin_anew`: counts are taken again, copies go on to their ends.

        Nobody waits for them any more: all requests are retracted.
        """
        for copy in self._open.values():
            copy.sequence = None
        self.num_in_flight = sum(copy.num_pages for copy in self._open.values())
        self._num_leaving = sum(
            copy.num_pages for copy in self._open.values() if copy.positions is None and isinstance(copy.job, WriteJob)
        )

    def faults(self, running: Iterable[Sequence]) -> list[str]:
        """What does not agree with the words above, and with the write policy. O(nodes + running)."""
        faults = list(backing_violations(self._cache.index, self._settings.write_policy))
        if any(copy.hold.is_closed for copy in self._open.values()):
            faults.append("a copy is under way and owns no pages")
        if self.num_in_flight != sum(copy.num_pages for copy in self._open.values()):
            faults.append(f"{self.num_in_flight} pages counted in flight")
        waited_for = {copy_id: copy.sequence for copy_id, copy in self._open.items() if copy.sequence is not None}
        if waited_for != {sequence.load: sequence for sequence in running if sequence.load is not None}:
            faults.append("a request waits for a load that is not under way for it")
        num_holds = sum(hold.is_copy for hold in self._cache.holds)
        if num_holds != len(self._open):
            faults.append(f"{num_holds} holds of {len(self._open)} copies")
        return faults

    # --------------------------------------------------------------------------------------------------------- private
    def _next_id(self) -> int:
        self._num_copies += 1
        return self._num_copies

    def _begin(self, copy: _OpenCopy) -> None:
        self._open[copy.job.copy_id] = copy
        self.num_in_flight += copy.num_pages
        self.jobs.append(copy.job)

    def _raise_sub_epoch(self, scope: FlushScope | None, sub_epoch: int) -> None:
        """Keys in scope change, and the device keeps no page in scope under the old ones."""
        cache, roots = self._cache, self._roots
        if scope is None or scope.adapter is not None:
            if roots.raise_sub_epoch(None, sub_epoch):
                cache.swap(cache.epoch)
        elif scope.prefix_tokens is not None:
            first_page = scope.prefix_tokens[: cache.page_size * TOKEN_BYTES]
            if roots.raise_sub_epoch(first_page, sub_epoch):
                for namespace in sorted({*cache.index.spaces, *(hold.namespace for hold in cache.holds)}):
                    cache.drop_prefix(namespace, first_page)
        elif scope.namespace is not None:
            namespace = Namespace(scope.namespace)
            if roots.raise_sub_epoch(namespace, sub_epoch):
                cache.drop_namespace(namespace)

    def _find(self, view: HostView, sequence: Sequence, hold: PageHold, max_pages: int) -> HostFound:
        """Ask for the chain behind the hold's shared pages, in growing parts: most chains end early or not at all."""
        found = HostFound()
        num_asked = 0
        for keys in self._continuation(sequence, hold, max_pages):
            num_asked += len(keys) // KEY_BYTES
            part = view.find(keys, hold.epoch, self._born_after_s)
            if part.num_pages:
                birth_s = min(part.birth_s, found.birth_s) if found.num_pages else part.birth_s
                found = HostFound(found.matches + part.matches, found.num_pages + part.num_pages, birth_s)
            if found.num_pages < num_asked:
                return HostFound(found.matches, found.num_pages, found.birth_s, part.cut)
        return found

    def _continuation(self, sequence: Sequence, hold: PageHold, max_pages: int) -> Iterator[PageKeys]:
        """Keys of up to `max_pages` pages behind the hold's shared ones, in growing parts, hashed when asked for."""
        cache = self._cache
        page_bytes = cache.page_size * TOKEN_BYTES
        tokens = sequence.token_bytes(sequence.num_tokens)
        root = self._roots.root(hold.namespace, tokens[:page_bytes], hold.epoch)
        begin, num_pages, parent = hold.shared_bytes(), _FIRST_LOOK, None
        if begin:
            parent = key_before(cache.index, hold.node, begin, self._roots, cache.epoch)
        while max_pages > 0:
            num_pages = min(num_pages, max_pages)
            end = begin + num_pages * page_bytes
            keys = page_keys(root, tokens[begin:end], cache.page_size, parent)
            yield keys
            begin, parent = end, keys[-KEY_BYTES:]
            max_pages -= num_pages
            num_pages *= 2

    def _back_up(self, view: HostView, hold: PageHold, begin: int, stop: int, now_s: float) -> None:
        """Order copies of the hold's pages from `begin` to `stop`, all but those that the tier has."""
        cache = self._cache
        page_bytes = cache.page_size * TOKEN_BYTES
        first, last = begin // page_bytes, stop // page_bytes
        last = min(last, first + self._settings.max_inflight_pages - self.num_in_flight)
        if last * page_bytes < stop:
            self.counters.drops["in_flight_cap"] += stop // page_bytes - max(first, last)
        if last <= first or cache.index.birth_of(hold.node) < self._born_after_s:
            return
        keys = path_keys(cache.index, hold.node, stop, self._roots, cache.epoch)[first * KEY_BYTES : last * KEY_BYTES]
        is_wanted = ~view.known(keys, cache.epoch)
        self.counters.num_known_pages += len(is_wanted) - int(is_wanted.sum())
        mark_backed(cache.index, hold.node, last * page_bytes)
        if not is_wanted.any():
            return
        copy = cache.open_backup(hold, now_s)
        positions = ((np.flatnonzero(is_wanted) + first) * page_bytes).tolist()
        pages = hold.page_table[first:last][is_wanted]
        self._write(view, copy, _chosen(keys, is_wanted), pages, positions)

    def _write_victims(self, view: HostView, victims: list[tuple[PageHold, PageKeys]]) -> None:
        """Order copies of pages that have left the index; asks for all of them at once what the tier has."""
        if not victims:
            return
        is_known = view.known(b"".join(keys for _, keys in victims), self._cache.epoch)
        begin = 0
        for copy, keys in victims:
            end = begin + len(keys) // KEY_BYTES
            self._write_victim(view, copy, keys, ~is_known[begin:end])
            begin = end

    def _write_victim(self, view: HostView, copy: PageHold, keys: PageKeys, is_wanted: NDArray[np.bool_]) -> None:
        """Order the copy of one leaf's pages; those that need none are free at once."""
        cache = self._cache
        self.counters.num_known_pages += len(is_wanted) - int(is_wanted.sum())
        if copy.birth_s < self._born_after_s or not is_wanted.any():
            cache.close(copy)
            return
        cache.give_back(copy, is_wanted)
        self._num_leaving += len(copy.page_table)
        self._write(view, copy, _chosen(keys, is_wanted), copy.page_table, None)

    def _write(
        self, view: HostView, copy: PageHold, keys: PageKeys, pages: NDArray[np.int32], positions: list[int] | None
    ) -> None:
        birth_ns = view.boot_ns(copy.birth_s)
        job = WriteJob(self._next_id(), view.number, keys, pages, copy.epoch, birth_ns, view.drop)
        self._begin(_OpenCopy(job, copy, len(pages), None, positions))

    def _load_ended(
        self, copy: _OpenCopy, num_done: int, reason: str, took_s: float, *, lease_ok: bool
    ) -> Sequence | None:
        counters, cache = self.counters, self._cache
        counters.load_s += took_s
        counters.num_loaded_pages += num_done
        counters.loaded_bytes += num_done * self._settings.page_bytes
        if num_done < copy.num_pages:
            counters.misses[reason] += 1
        sequence = copy.sequence
        if sequence is None or sequence.hold is None:
            cache.close(copy.hold)
            return None
        # With the lease over, what was verified under the old words may be void by words that were not read.
        num_loaded = num_done if lease_ok else 0
        cache.end_load(sequence.hold, copy.hold, num_loaded)
        sequence.take_loaded(num_loaded * cache.page_size)
        return sequence

    def _write_ended(self, copy: _OpenCopy, job: WriteJob, num_done: int, reason: str, took_s: float) -> None:
        counters, hold = self.counters, copy.hold
        counters.write_s += took_s
        counters.num_written_pages += num_done
        counters.written_bytes += num_done * self._settings.page_bytes
        if num_done < copy.num_pages:
            counters.drops[reason] += copy.num_pages - num_done
        if copy.positions is None:
            self._num_leaving -= copy.num_pages
        elif num_done < copy.num_pages and not hold.is_fenced:
            mark_lost(self._cache.index, hold.node, copy.positions[num_done])
        self._cache.close(hold)

    def _count_hasty_evictions(self) -> None:
        """Pages that had to leave at once, with no time for a copy, since the last look."""
        if self._moments.at_eviction and self._view is not None:
            hasty = self._cache.num_evicted_pages - self._num_evicted_seen
            if hasty:
                self.counters.drops["no_time"] += hasty
        self._num_evicted_seen = self._cache.num_evicted_pages


def _chosen(keys: PageKeys, is_wanted: NDArray[np.bool_]) -> PageKeys:
    return np.frombuffer(keys, np.uint8).reshape(-1, KEY_BYTES)[is_wanted].tobytes()
