"""Which device pages are free. Knows ids only; the KV tensors are the engine's.

Page ids travel as contiguous native int32 bytes, like tokens: a slice is one memcpy and no object per page.
"""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from configs.errors import InvariantError

#: page ids as native int32 bytes, in order; 4 bytes a page
PageIds: TypeAlias = bytes

PAGE_ID_BYTES = 4

#: pages looked at beyond the ones asked for when carried pages lie ahead of the mark; doubles while none is found
_FIRST_WINDOW = 64


class PagePool:
    """The free pages of one rank: a stack of returned pages, and everything from a mark upwards.

    `restart` makes all pages free but the carried ones without looking at any other page: it moves the mark back to
    0 and remembers what to step over. That is what makes a flush independent of the number of cached tokens.
    """

    __slots__ = ("_carried", "_mark", "_num_carried_ahead", "_stack", "_top", "num_pages")

    def __init__(self, num_pages: int) -> None:
        self.num_pages = num_pages
        #: page ids given back since the last restart; valid up to _top (bytes)
        self._stack = memoryview(bytearray(num_pages * PAGE_ID_BYTES))
        self._top = 0
        #: pages from here on were never handed out since the last restart
        self._mark = 0
        #: True: the page had an owner at the last restart, so the mark steps over it
        self._carried: NDArray[np.bool_] = np.zeros(0, np.bool_)
        self._num_carried_ahead = 0

    @property
    def num_free(self) -> int:
        return self._top // PAGE_ID_BYTES + self.num_pages - self._mark - self._num_carried_ahead

    def take(self, num_pages: int) -> PageIds:
        """Hand out `num_pages` free pages; they are the caller's until given back.

        Raises InvariantError when fewer are free: the caller looks at `num_free` first. O(num_pages).
        """
        if num_pages > self.num_free:
            raise InvariantError(f"{num_pages} pages asked of a pool with {self.num_free} free")
        top = self._top
        size = num_pages * PAGE_ID_BYTES
        if size <= top:
            self._top = top - size
            return self._stack[top - size : top].tobytes()
        self._top = 0
        return self._stack[:top].tobytes() + self._take_fresh(num_pages - top // PAGE_ID_BYTES)

    def give(self, pages: PageIds) -> None:
        """Take back pages that `take` handed out. Nobody may read or write them any more. O(len)."""
        top = self._top + len(pages)
        if top > len(self._stack):
            raise InvariantError(f"more pages came back than the pool has ({self.num_pages})")
        self._stack[self._top : top] = pages
        self._top = top

    def restart(self, carried: PageIds) -> None:
        """Make every page free except `carried` (each once), which come back through `give` when their owners end.

        O(len(carried)), whatever the size of the pool: untouched memory of a fresh mask costs nothing.
        """
        self._top = 0
        self._mark = 0
        self._carried = np.zeros(self.num_pages if carried else 0, np.bool_)
        self._carried[np.frombuffer(carried, np.int32)] = True
        self._num_carried_ahead = len(carried) // PAGE_ID_BYTES

    def free_pages(self) -> NDArray[np.int32]:
        """All free page ids, for checks. O(num_pages)."""
        returned = np.frombuffer(self._stack[: self._top], np.int32)
        ahead = np.arange(self._mark, self.num_pages, dtype=np.int32)
        if self._num_carried_ahead:
            ahead = ahead[~self._carried[self._mark :]]
        return np.concatenate((returned, ahead))

    def _take_fresh(self, num_pages: int) -> PageIds:
        if self._num_carried_ahead:
            return self._take_between_carried(num_pages)
        start = self._mark
        self._mark = start + num_pages
        return np.arange(start, self._mark, dtype=np.int32).tobytes()

    def _take_between_carried(self, num_pages: int) -> PageIds:
        parts: list[PageIds] = []
        window = _FIRST_WINDOW
        while num_pages:
            ahead = self._carried[self._mark : self._mark + num_pages + window]
            found = np.flatnonzero(~ahead)[:num_pages]
            num_passed = int(found[-1]) + 1 if len(found) == num_pages else len(ahead)
            parts.append((found + self._mark).astype(np.int32).tobytes())
            self._mark += num_passed
            self._num_carried_ahead -= num_passed - len(found)
            num_pages -= len(found)
            window *= 2
        return b"".join(parts)
