"""A node's host tier as its agent has it: the arena's file, its one writer, and the ranks that use it.

The layout of a page is known only when a rank has loaded its model, so the arena is a file of its own beside the
control page, made when the first rank claims it. Making it (reserving memory, adopting what a dead writer left) and
looking it over run in a thread: nothing here delays a lease or a floor, which are words of the control page's file.
"""

from __future__ import annotations

import asyncio
import logging
from collections import Counter
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any

from actors.audit_log import InThread
from actors.end_proofs import pause
from actors.host_messages import (
    HostCaller,
    HostClaim,
    HostDropped,
    HostPending,
    HostPlace,
    HostRefused,
)
from actors.host_opener import GIB, ArenaOpener, OpenArena, OpenFile
from actors.messages import HostReport, ProcessName
from cache.arena import ArenaGeometry
from cache.control_page import FileIdentity
from cache.host_tier import CommitOutcome, HostTier
from cache.page_checksum import PageEntry
from cache.processes import Processes, ProcessId
from cache.slot_owners import SlotLease, SlotRef
from cache.slot_table import NOBODY, Holder
from configs.errors import ConfigError
from configs.schema import HostTierSettings

log = logging.getLogger(__name__)

#: a claim waits this long for an arena in the making, then tells how far it is
_CLAIM_WAIT_S = 1.0
#: a flush of this tier waits this long for an agent that was just restarted to have its file again
_OPEN_WAIT_S = 1.0
#: void pages freed between two other calls: about 0.4 ms
_RECLAIM_PAGES = 64
_RECLAIM_PAUSE_S = 0.001
_MAX_TOLD_VIOLATIONS = 10
#: slots taken out of use between two other calls: about 10 ms of a tier of 100,000 slots
_ISOLATE_BATCH = 4


@dataclass(frozen=True, slots=True)
class StoreSurroundings:
    """Every way of the store out of its own loop."""

    directory: str
    #: name of the arena's file
    file_name: str
    open_file: OpenFile
    processes: Processes
    #: returns True when the process is proven gone
    until_gone: Callable[[ProcessName], Awaitable[bool]]
    in_thread: InThread
    #: of this process and of every rank that may use the tier
    pid_namespace: str
    #: a file has the arena's name
    has_file: Callable[[], bool]
    #: what that file holds is void and nobody owns it: retire it, so that nobody reads it any more
    discard_file: Callable[[], None]
    #: ranks use the arena (True), or the last of them has left in good order
    used: Callable[[bool], None]


class HostStore:
    """Lives on one asyncio loop. Calls of ranks are carried out one at a time, in the order in which they came."""

    def __init__(self, settings: HostTierSettings, around: StoreSurroundings) -> None:
        self._settings = settings
        self._around = around
        self._lineage = ""
        self._term = 0
        self._floor = 0
        self._birth_floor_ns = 0
        #: log index of the newest flush of host tiers that we were told of: no arena is used before it keeps to it
        self._drop = 0
        #: of the newest one that was carried out, if only because there was nothing; pages that it made void
        self._kept_drop = self._num_dropped = 0
        self._open: OpenArena | None = None
        self._opener = ArenaOpener(settings, around.open_file, around.processes, around.in_thread)
        #: whoever has it is alone with the tier: a call of a rank, or a look over everything in a thread
        self._alone = asyncio.Lock()
        self._opened = asyncio.Event()
        self._tasks: set[asyncio.Task[None]] = set()
        self._reclaiming: asyncio.Task[None] | None = None

    # ---------------------------------------------------------------------------------------------- words of the node
    def begin_lineage(self, lineage: str) -> None:
        """The controller's log from now on: an arena of another one is void."""
        if self._open is not None:
            self._open.file.retire()
            self._open = None
        self._lineage = lineage
        self._term = self._floor = self._birth_floor_ns = self._drop = self._kept_drop = self._num_dropped = 0
        self._opened.clear()

    def raise_floor(self, term: int, floor: int) -> HostDropped:
        """No page of an epoch below `floor` is committed or found from the return on. O(1)."""
        is_news = floor > self._floor
        self._term, self._floor = max(term, self._term), max(floor, self._floor)
        opened = self._open
        if opened is None or not is_news:
            return HostDropped(0, 0)
        num_before = opened.tier.num_valid
        opened.file.page.raise_floor(term, floor)
        self._reclaim()
        num_pages = num_before - opened.tier.num_valid
        return HostDropped(num_pages, num_pages * opened.identity.page_bytes)

    def raise_drop(self, drop: int, known_drop: int) -> bool:
        """A flush of host tiers with this log index must not have missed this one: all that is older goes.

        known_drop: what the node has kept to before, as its control page says.  False: not yet, ask again; an arena is
        being opened.
        """
        self._kept_drop = max(self._kept_drop, known_drop)
        self._drop = max(self._drop, drop, known_drop)
        if drop <= self._kept_drop:
            return True
        if self._open is not None:
            self._keep_to_drop(self._open.tier)
            self._reclaim()
            return True
        if self._opener.is_opening:
            return False
        if self._around.has_file():
            # ranks may have mapped it under an earlier agent; nothing in it is young enough
            self._around.discard_file()
        self._kept_drop = self._drop
        return True

    def raise_birth_floor(self, birth_floor_ns: int) -> None:
        """No page of a chain begun before this (CLOCK_BOOTTIME) is found in an arena that is open, or will be. O(1)."""
        self._birth_floor_ns = max(self._birth_floor_ns, birth_floor_ns)
        if self._open is not None:
            self._open.file.page.raise_birth_floor(self._birth_floor_ns)
            self._reclaim()

    # ------------------------------------------------------------------------------------------------- calls of ranks
    async def claim(self, claim: HostClaim) -> HostPlace | HostPending | HostRefused:
        """A rank wants to use the tier: where it is, how far it is, or why it will not be."""
        if not self._settings.is_on:
            return HostRefused("there is no host tier (configs: host_tier.size_gb)", is_final=True)
        if claim.process.pid_namespace != self._around.pid_namespace:
            # that it has ended could not be proven here, and its slots never be given to another
            return HostRefused("the rank's process cannot be seen from its node's agent", is_final=True)
        if claim.lineage != self._lineage:
            return HostRefused("the node has not heard of the rank's controller yet", is_final=False)
        try:
            geometry = ArenaGeometry.fitting(int(self._settings.size_gb * GIB), claim.page_bytes)
        except ConfigError as error:
            return HostRefused(error.message, is_final=True)
        identity = FileIdentity(claim.lineage, claim.layout_digest, geometry.num_slots, claim.page_bytes)
        if self._open is not None and self._open.identity != identity:
            refusal = self._make_way(identity)
            if refusal is not None:
                return refusal
        if self._open is None:
            await self._opener.open(identity, self._take, _CLAIM_WAIT_S)
        if self._open is not None and self._open.identity == identity:
            return self._admit(claim, self._open)
        return self._opener.failure_of(identity) or self._opener.pending

    async def lease(self, caller: HostCaller, num_slots: int) -> SlotLease | None:
        """See HostTier.lease. None, here and below: the caller has not claimed this file; it claims again."""
        async with self._alone:
            found = self._find(caller)
            return None if found is None else found[0].lease(found[1], num_slots)

    async def commit(self, caller: HostCaller, entries: Sequence[PageEntry]) -> list[CommitOutcome] | None:
        """See HostTier.commit."""
        async with self._alone:
            found = self._find(caller)
            return None if found is None else found[0].commit(found[1], entries)

    async def reconcile(self, caller: HostCaller, held: Sequence[SlotRef]) -> list[SlotRef] | None:
        """See HostTier.reconcile."""
        async with self._alone:
            found = self._find(caller)
            return None if found is None else found[0].reconcile(found[1], held)

    async def tell(
        self, caller: HostCaller, returned: Sequence[SlotRef], touched: Sequence[SlotRef], corrupt: Sequence[SlotRef]
    ) -> bool:
        """Slots given back, pages that were read, pages that were found corrupt. False: it has not claimed this file.

        Hashes each page reported as corrupt: about 30 us per MB.
        """
        async with self._alone:
            found = self._find(caller)
            if found is None:
                return False
            tier, holder = found
            tier.release(holder, returned)
            tier.touch(touched)
            for ref in corrupt:
                if tier.report_corrupt(ref):
                    log.error("the page in slot %d is not what was committed: out of use", ref.slot)
            return True

    async def leave(self, incarnation: str) -> bool:
        """A rank stops in good order: it writes nothing any more. True, also if it had claimed nothing."""
        async with self._alone:
            opened = self._open
            holder = None if opened is None else opened.holders.pop(incarnation, None)
            if opened is not None and holder is not None:
                opened.tier.reconcile(holder, ())
                if not opened.holders:
                    self._around.used(False)
        return True

    # --------------------------------------------------------------------------------------------------------- flushes
    async def drop_all(self, drop: int) -> HostDropped:
        """Flush this tier alone: all pages of a lower drop number go. drop: log index of the flush, which the node may
        have been told with its lease already."""
        # an arena that is made, or taken over, later must not have missed it
        self._drop = max(self._drop, drop)
        opened = await self._settled()
        if opened is None:
            failure = self._why_closed()
            self._kept_drop = self._kept_drop if failure else self._drop
            return HostDropped(0, 0, failure)
        async with self._alone:
            self._keep_to_drop(opened.tier)
            num_pages = self._num_dropped
        self._reclaim()
        return HostDropped(num_pages, num_pages * opened.identity.page_bytes)

    async def drop_older(self, birth_floor_ns: int) -> HostDropped:
        """Pages of chains begun before this instant (CLOCK_BOOTTIME) are found no more from the return on."""
        self.raise_birth_floor(birth_floor_ns)
        if await self._settled() is None:
            return HostDropped(0, 0, self._why_closed())
        return HostDropped(0, 0)

    # -------------------------------------------------------------------------------------------------------- upkeep
    async def run_checks(self) -> None:
        """Look the tier over on a timer, quarantine what is wrong, say it. Returns at once if that is switched off."""
        while self._settings.sanity_check_s > 0:
            await pause(self._settings.sanity_check_s)
            async with self._alone:
                if self._open is None:
                    continue
                tier = self._open.tier
                tier.check_holders()
                # the thread only looks: reports and floors read the tier meanwhile
                violations = await self._around.in_thread(tier.violations)
                for begin in range(0, len(violations), _ISOLATE_BATCH):
                    tier.isolate(violations[begin : begin + _ISOLATE_BATCH])
                    await pause(0)
            for violation in violations[:_MAX_TOLD_VIOLATIONS]:
                log.error("host tier: %s", violation.text)

    def report(self) -> HostReport | None:
        """The tier in numbers; None: the settings have none."""
        if not self._settings.is_on:
            return None
        opened = self._open
        if opened is None:
            pending, failure = self._opener.pending, self._opener.failure
            status = "reserving" if self._opener.is_opening else "failed" if failure else "none"
            message = "" if failure is None else failure.message
            return HostReport(status, message, file_bytes=pending.total_bytes, reserved_bytes=pending.reserved_bytes)
        counts, identity = opened.tier.counts(), opened.identity
        file_bytes = ArenaGeometry(identity.num_slots, identity.page_bytes).file_bytes
        return HostReport(
            "ready", "", identity.num_slots, identity.page_bytes, file_bytes, file_bytes, *counts,
            valid=opened.tier.num_valid, num_ranks=len(opened.holders),
        )  # fmt: skip

    @property
    def events(self) -> Counter[str]:
        """Pages by what became of them; only rise while the file is the same."""
        return Counter() if self._open is None else self._open.tier.events

    def close(self) -> None:
        """Leave the file for the next agent."""
        self._opener.close()
        for task in list(self._tasks):
            task.cancel()
        if self._open is not None:
            self._open.file.close()

    # -------------------------------------------------------------------------------------------------------- inside
    def _find(self, caller: HostCaller) -> tuple[HostTier, Holder] | None:
        opened = self._open
        if opened is None or opened.file.page.nonce != caller.nonce:
            return None
        holder = opened.holders.get(caller.incarnation)
        return None if holder is None else (opened.tier, holder)

    def _admit(self, claim: HostClaim, opened: OpenArena) -> HostPlace:
        name = claim.process
        if claim.incarnation not in opened.holders:
            holder = Holder.of(claim.incarnation, ProcessId(name.pid, name.start_time))
            opened.holders[claim.incarnation] = holder
            self._watch(name, opened, claim.incarnation, holder)
            self._around.used(True)
        around, num_slots = self._around, opened.identity.num_slots
        return HostPlace(around.directory, around.file_name, opened.file.page.nonce, num_slots)

    def _make_way(self, identity: FileIdentity) -> HostRefused | None:
        """An arena of another layout goes if nobody uses it."""
        opened = self._open
        assert opened is not None
        if opened.holders:
            reason = identity.difference(opened.file.page) or "it is another one"
            ranks = f"{len(opened.holders)} rank(s) of this node use it"
            return HostRefused(f"the node's host tier cannot be used by this rank: {reason}; {ranks}", is_final=False)
        opened.file.retire()
        self._open = None
        self._opened.clear()
        return None

    def _take(self, opened: OpenArena) -> None:
        """The arena is there: it is used from now on."""
        identity, file, tier = opened.identity, opened.file, opened.tier
        if identity.lineage != self._lineage:
            file.retire()
            return
        # what was raised while it was being made; nobody has committed yet
        file.page.raise_floor(self._term, self._floor)
        file.page.raise_birth_floor(self._birth_floor_ns)
        self._keep_to_drop(tier)
        self._open = opened
        for holder in [*tier.owners.leased, *tier.owners.quarantined]:
            if holder != NOBODY:
                self._watch(ProcessName(*holder.process), opened, "", holder)
        self._opened.set()
        self._reclaim()

    def _keep_to_drop(self, tier: HostTier) -> None:
        num_pages = tier.drop_below(self._drop)
        if self._drop > self._kept_drop:
            self._kept_drop, self._num_dropped = self._drop, num_pages

    def _watch(self, name: ProcessName, opened: OpenArena, incarnation: str, holder: Holder) -> None:
        self._start(self._until_left(name, opened, incarnation, holder), f"holder-{name.pid}")

    async def _until_left(self, name: ProcessName, opened: OpenArena, incarnation: str, holder: Holder) -> None:
        """Free what a rank held when its process is proven gone."""
        if not await self._around.until_gone(name):
            return
        async with self._alone:
            opened.holders.pop(incarnation, None)
            if opened is self._open:
                opened.tier.holder_left(holder)

    async def _settled(self) -> OpenArena | None:
        """The open arena; waits a moment for one that a restarted agent has not opened again yet."""
        if self._open is None and self._why_closed():
            await asyncio.wait({self._start(self._until_opened(), "opened")}, timeout=_OPEN_WAIT_S)
        return self._open

    async def _until_opened(self) -> None:
        await self._opened.wait()

    def _why_closed(self) -> str:
        """A flush of a tier that is not open: "" if there is nothing to flush."""
        exists = self._opener.is_opening or self._around.has_file()
        return "the node's host tier is not open yet" if exists else ""

    def _reclaim(self) -> None:
        """Begin to free, between other work, the pages that a flush has made void."""
        if self._open is not None and (self._reclaiming is None or self._reclaiming.done()):
            self._reclaiming = self._start(self._reclaim_all(), "reclaim")

    async def _reclaim_all(self) -> None:
        more = True
        while more and self._open is not None:
            await pause(_RECLAIM_PAUSE_S)
            async with self._alone:
                more = self._open is not None and self._open.tier.reclaim(_RECLAIM_PAGES)

    def _start(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        task = asyncio.create_task(work, name=name)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task
