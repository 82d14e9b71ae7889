"""Making or adopting a node's arena, in a thread: reserving memory takes a second for each 1.3 GB."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

from actors.audit_log import InThread
from actors.host_messages import HostPending, HostRefused
from cache.arena import Arena
from cache.control_page import ControlPageWriter, FileIdentity
from cache.host_eviction import EvictionOrder, LruOrder, SlruOrder
from cache.host_tier import HostTier
from cache.processes import Processes
from cache.shared_file import FileInUse
from cache.slot_table import Holder
from configs.errors import ConfigError
from configs.schema import HostTierSettings

log = logging.getLogger(__name__)

GIB = 1024**3
_ORDERS: dict[str, Callable[[], EvictionOrder]] = {"lru": LruOrder, "slru": SlruOrder}


class ArenaFile(Protocol):
    """The arena's file as its only writer has it."""

    @property
    def page(self) -> ControlPageWriter: ...

    @property
    def was_adopted(self) -> bool: ...

    def arena(self) -> Arena: ...

    def retire(self) -> None: ...

    def close(self) -> None: ...


#: (bytes reserved, bytes in all)
Progress: TypeAlias = Callable[[int, int], None]
#: own or make the file for an identity; blocks, ConfigError if it cannot be
OpenFile: TypeAlias = Callable[[FileIdentity, Progress], ArenaFile]


@dataclass(slots=True)
class OpenArena:
    """An arena that is there, and its one writer."""

    identity: FileIdentity
    file: ArenaFile
    tier: HostTier
    #: incarnation -> holder, of the ranks that have claimed it
    holders: dict[str, Holder] = field(default_factory=dict)


class ArenaOpener:
    """Opens one arena at a time. Lives on one asyncio loop."""

    def __init__(
        self, settings: HostTierSettings, open_file: OpenFile, processes: Processes, in_thread: InThread
    ) -> None:
        self._settings = settings
        self._open_file = open_file
        self._processes = processes
        self._in_thread = in_thread
        self._opening: asyncio.Task[None] | None = None
        #: bytes of the arena in the making: so far, in all
        self._progress = (0, 0)
        #: the arena asked for last, and why it could not be opened
        self._identity: FileIdentity | None = None
        self.failure: HostRefused | None = None

    @property
    def is_opening(self) -> bool:
        return self._opening is not None

    @property
    def pending(self) -> HostPending:
        """How far the arena is."""
        return HostPending(*self._progress)

    async def open(self, identity: FileIdentity, opened: Callable[[OpenArena], None], timeout_s: float) -> None:
        """Begin to open the arena unless one is being opened, and wait a while.

        opened: called on the loop when it is there; `failure_of` says why it is not.
        """
        if self._opening is None:
            self._identity, self.failure = identity, None
            self._opening = asyncio.create_task(self._open(identity, opened), name="open-arena")
        await asyncio.wait({self._opening}, timeout=timeout_s)

    def failure_of(self, identity: FileIdentity) -> HostRefused | None:
        """Why this arena could not be opened. None: it was another one that was tried last; ask again."""
        return self.failure if self._identity == identity else None

    def close(self) -> None:
        if self._opening is not None:
            self._opening.cancel()

    async def _open(self, identity: FileIdentity, opened: Callable[[OpenArena], None]) -> None:
        try:
            arena = await self._in_thread(self._open_blocking, identity)
        except ConfigError as error:
            log.error("no host tier: %s", error)
            self.failure = HostRefused(error.message, is_final=not isinstance(error, FileInUse))
        except OSError as error:
            log.exception("no host tier")
            self.failure = HostRefused(f"the arena cannot be opened: {error.strerror}", is_final=False)
        else:
            opened(arena)
        finally:
            self._opening = None

    def _open_blocking(self, identity: FileIdentity) -> OpenArena:
        """In a thread: nobody else knows the tier yet."""
        file = self._open_file(identity, self._note_progress)
        order = _ORDERS[self._settings.eviction]()
        max_leased = 4 * self._settings.lease_batch
        tier = HostTier(file.arena(), file.page, order, self._processes, max_leased)
        log.info("host tier %s: %s", "adopted" if file.was_adopted else "made", tier.counts())
        return OpenArena(identity, file, tier)

    def _note_progress(self, done: int, total: int) -> None:
        self._progress = (done, total)
        if total > GIB:
            log.info("reserving host memory: %d of %d MiB", done >> 20, total >> 20)
