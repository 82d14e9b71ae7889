"""What a rank reads of its node's control page before each match, and how it comes by that page."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from actors.messages import PagePlace
from cache.control_page import CONTROL_PAGE_BYTES, RETIRED_FLOOR, ControlPage, FileIdentity
from cache.shared_file import AttachedFile, FilePaths, attach
from cache.shared_words import Fence, words_at
from configs.errors import ConfigError
from engine.control_words import ControlWords

log = logging.getLogger(__name__)


class NodeWordsSource(Protocol):
    """A control page, mapped from a file or, in tests, plain memory."""

    @property
    def page(self) -> ControlPage: ...


def boot_ns() -> int:
    """CLOCK_BOOTTIME of this machine, the clock in which leases end."""
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME)


class RankWords:
    """The words of one rank. `read` belongs to the engine thread, everything else to the control loop."""

    def __init__(self, now_ns: Callable[[], int] = boot_ns) -> None:
        self._now_ns = now_ns
        #: replaced as a whole; the engine thread takes it once per reading. None: no lease yet
        self._source: NodeWordsSource | None = None
        self._least_epoch = 0
        self._latest = ControlWords(lease_ok=False)

    def attach(self, source: NodeWordsSource) -> None:
        """Read from this page from now on."""
        self._source = source

    def raise_epoch(self, epoch: int) -> None:
        """The rank was told this epoch; it swaps to it before its next match."""
        self._least_epoch = max(self._least_epoch, epoch)

    @property
    def nonce(self) -> int:
        """Of the file it reads; 0: none yet."""
        return 0 if self._source is None else self._source.page.nonce

    @property
    def has_lease(self) -> bool:
        source = self._source
        return source is not None and not source.page.read().is_lease_over(self._now_ns())

    def read(self) -> ControlWords:
        """The words as they are now; 1.5 us. Valid for the turn in which they were read."""
        source = self._source
        if source is None:
            return self._latest
        words = source.page.read()
        lease_ok = not words.is_lease_over(self._now_ns())
        # The floor of a retired file is no epoch: it only ends the lease.
        floor = 0 if words.floor == RETIRED_FLOOR else words.floor
        latest = self._latest
        if latest.lease_ok != lease_ok or latest.floor != floor or latest.epoch != self._least_epoch:
            latest = self._latest = ControlWords(lease_ok, floor, self._least_epoch)
        return latest


class NodePage:
    """The node's file as this rank maps it; finds the new one when it was made anew."""

    def __init__(self, words: RankWords, lineage: str, place: PagePlace, fence: Fence) -> None:
        """Map the file. Raises ConfigError if it is not there, or holds another lineage."""
        self._words = words
        self._identity = FileIdentity(lineage)
        self._paths = FilePaths(Path(place.directory), place.name)
        self._fence = fence
        self._file = self._attach()
        if self._file is None:
            raise ConfigError(f"the node's control page is not there: {self._paths.data}")

    def look(self) -> None:
        """Once in a while: if the lease is over and another file has the name, read that one from now on."""
        if self._words.has_lease or self._nonce_on_disk() in (None, self._words.nonce):
            return
        try:
            self.close()
            self._file = self._attach()
        except ConfigError as error:
            log.warning("no control page: %s", error)

    def close(self) -> None:
        """Give the file back; the words read last stay readable, their lease runs out."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def _attach(self) -> AttachedFile | None:
        file = attach(self._paths, self._fence, self._identity)
        if file is not None:
            self._words.attach(file)
        return file

    def _nonce_on_disk(self) -> int | None:
        """Of the file that has the name now; None if there is none that can be read."""
        try:
            with self._paths.data.open("rb") as file:
                head = bytearray(file.read(CONTROL_PAGE_BYTES))
        except OSError:
            return None
        if len(head) < CONTROL_PAGE_BYTES:
            return None
        return ControlPage(words_at(head, 0, CONTROL_PAGE_BYTES // 8), self._fence).nonce
