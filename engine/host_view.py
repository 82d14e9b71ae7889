"""What the engine thread sees of its node's host tier: the mapped index, read without asking anybody."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from cache.host_reader import HostReader
from cache.keys import PageKeys
from cache.types import Epoch
from engine.copy_jobs import HostFound


class MappedView:
    """A `HostView` of an attached file. Used by the engine thread alone; the copier has a reader of its own."""

    def __init__(self, number: int, reader: HostReader, boot_offset_ns: int) -> None:
        """boot_offset_ns: CLOCK_BOOTTIME minus the engine's clock, taken when the engine was made.

        Should the machine sleep after that, births come out earlier than they were: pages seem older, never younger.
        """
        self.number = number
        self._reader = reader
        self._boot_offset_ns = boot_offset_ns

    @property
    def drop(self) -> int:
        return self._reader.drop

    def find(self, keys: PageKeys, epoch: Epoch, born_after_s: float) -> HostFound:
        floor_ns = 0 if born_after_s == -math.inf else self.boot_ns(born_after_s)
        match = self._reader.look_up(keys, epoch, floor_ns)
        if not match.num_pages:
            return HostFound(cut=match.cut or "")
        birth_s = (match.birth_ns - self._boot_offset_ns) / 1e9
        return HostFound((match,), match.num_pages, birth_s, match.cut or "")

    def known(self, keys: PageKeys, epoch: Epoch) -> NDArray[np.bool_]:
        return self._reader.known(keys, epoch)

    def boot_ns(self, engine_s: float) -> int:
        return max(0, int(engine_s * 1e9) + self._boot_offset_ns)
