"""Who takes part in a `HostWorld`: ranks, readers that can be overtaken, pages and the chains they belong to."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from cache.arena import Arena, ArenaGeometry, PageView
from cache.control_page import ControlPage
from cache.host_reader import HostMatch, HostReader, MissReason, Verification
from cache.host_writer import HostWriter
from cache.keys import KEY_BYTES, KeyRoot, page_keys
from cache.page_checksum import PageEntry
from cache.shared_words import Words
from cache.slot_table import Holder
from cache.types import Epoch, Namespace

NUM_SLOTS, PAGE_BYTES = 6, 64
HALF = PAGE_BYTES // 2
GEOMETRY = ArenaGeometry(NUM_SLOTS, PAGE_BYTES)
CHAIN_PAGES = 3
NUM_CHAINS = 2
NAMESPACES = ("", "tenant")
MAX_RANKS = 3

#: namespace and number of a chain of pages
Chain = tuple[str, int]
Step = Callable[[], object]
#: what the writer does while a reader is between two loads
Overtaking = Literal["lease", "replace", "commit", "drop", "flush", "reclaim"]
FlipTarget = Literal["row", "page", "index"]


@functools.lru_cache(maxsize=4096)
def chain_keys(epoch: int, sub_epoch: int, namespace: str, chain: int) -> tuple[bytes, ...]:
    root = KeyRoot("cafe", "layout", "weights", Namespace(namespace), Epoch(epoch), sub_epoch).digest()
    tokens = np.array([chain, 7, 8], "<i4").tobytes()
    keys = page_keys(root, tokens, page_size=1)
    return tuple(keys[begin : begin + KEY_BYTES] for begin in range(0, len(keys), KEY_BYTES))


@dataclass(frozen=True)
class Version:
    """A page as it was handed to a commit. Each has its own bytes, so that any mix-up shows."""

    content: bytes
    epoch: int
    drop: int
    birth_ns: int


@dataclass
class Rank:
    """A rank's process. What it has half copied it may finish at any time until it is gone."""

    holder: Holder
    writer: HostWriter
    epoch: int
    is_frozen: bool = False
    #: pages whose copy has begun: slot, second half
    half_copied: list[tuple[int, bytes]] = field(default_factory=list)
    #: pages written and not yet handed to a commit
    contents: dict[PageEntry, Version] = field(default_factory=dict)

    def slots(self) -> set[int]:
        """What it may still write to, or believes to own."""
        return {slot for slot, _ in self.writer.held()} | {slot for slot, _ in self.half_copied}


class PausingWords:
    """Words as a reader loads them, with a pause before each load in which others go on."""

    def __init__(self, words: Words, pause: Step) -> None:
        self._words, self._pause = words, pause

    def take(self, *args: Any, **kwargs: Any) -> Any:
        self._pause()
        return self._words.take(*args, **kwargs)

    def item(self, index: int) -> int:
        self._pause()
        return self._words.item(index)


class OvertakenReader(HostReader):
    """Is overtaken by the writer between any two loads that the protocol orders."""

    def __init__(self, arena: Arena, page: ControlPage, verification: Verification, pause: Step) -> None:
        super().__init__(arena, page, verification)
        self._pause = pause
        self._states: Any = PausingWords(arena.slots, pause)
        self._lines: Any = PausingWords(arena.slots.reshape(-1, 8), pause)

    def load(self, match: HostMatch, index: int, target: PageView) -> MissReason | None:
        self._pause()
        return super().load(match, index, target)
