"""A host tier without bytes: pages of the fake model by key, and copies that end when and how the test says."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cache.keys import KEY_BYTES, PageKeys
from cache.types import Epoch
from engine.copy_jobs import CopyJob, HostFound, LoadJob, WriteJob
from engine.events import CopyEnded, Event
from engine.host_calls import TierPlace
from tests.fakes import FakeRunner, PageContent


def split_keys(keys: PageKeys) -> list[bytes]:
    return [keys[begin : begin + KEY_BYTES] for begin in range(0, len(keys), KEY_BYTES)]


@dataclass(frozen=True)
class StoredPage:
    content: PageContent
    epoch: int
    birth_s: float


@dataclass
class FakeTier:
    """A `HostView` and what is behind it."""

    number: int = 1
    pages: dict[bytes, StoredPage] = field(default_factory=dict)
    #: flushes of the tier alone
    drop: int = 0
    #: raised behind the ranks by a flush by age
    birth_floor_s: float = 0.0
    #: called before each look
    before_look: Callable[[], None] = lambda: None

    def drop_all(self) -> None:
        """A flush of the tier alone."""
        self.drop += 1
        self.pages.clear()

    def find(self, keys: PageKeys, epoch: Epoch, born_after_s: float) -> HostFound:
        self.before_look()
        found: list[bytes] = []
        for key in split_keys(keys):
            page = self.pages.get(key)
            if page is None or page.epoch != epoch or page.birth_s < born_after_s:
                break
            found.append(key)
        births = [self.pages[key].birth_s for key in found]
        matches: Any = tuple(found)
        cut = "" if len(found) * KEY_BYTES == len(keys) else "absent"
        return HostFound(matches, len(found), min(births, default=0.0), cut)

    def known(self, keys: PageKeys, epoch: Epoch) -> NDArray[np.bool_]:
        self.before_look()
        pages = [self.pages.get(key) for key in split_keys(keys)]
        return np.array([page is not None and page.birth_s >= self.birth_floor_s for page in pages], np.bool_)

    def boot_ns(self, engine_s: float) -> int:
        return int(engine_s * 1e9)


class FakeCopier:
    """Copies that stay under way until `end`."""

    def __init__(self, tier: FakeTier) -> None:
        self.tier = tier
        self.open: list[CopyJob] = []
        self.runner: FakeRunner
        self._post: Callable[[Event], None]

    def connect(self, post: Callable[[Event], None]) -> None:
        self._post = post

    def attach(self, number: int, place: TierPlace | None) -> None:
        """Tests post their own `TierAttached`."""

    def start(self, jobs: Sequence[CopyJob]) -> None:
        self.open += jobs

    def stop(self) -> bool:
        """There is no thread."""
        return True

    def scribble(self) -> None:
        """Loads under way may write into their targets at any time."""
        for job in self.open:
            if isinstance(job, LoadJob):
                for page in job.pages.tolist():
                    self.runner.put_page(page, None)

    def end(self, index: int, num_done: int) -> CopyJob:
        """The copy ends now, with its first `num_done` pages at most. Bytes are read and written at the last moment."""
        job = self.open.pop(index)
        is_void = isinstance(job, WriteJob) and job.drop != self.tier.drop
        is_current = job.tier == self.tier.number and not is_void
        num_done = min(num_done, len(job.pages)) if is_current else 0
        pages = job.pages[:num_done].tolist()
        if isinstance(job, LoadJob):
            num_done = self._load(job, pages)
        else:
            for key, page in zip(split_keys(job.keys), pages, strict=False):
                self.tier.pages[key] = StoredPage(self.runner.page_content(page), job.epoch, job.birth_ns / 1e9)
        reason = "" if num_done == len(job.pages) else "old_drop" if is_void else "no_slot"
        self._post(CopyEnded(job.copy_id, num_done, reason))
        return job

    def _load(self, job: LoadJob, pages: list[int]) -> int:
        keys: Any = job.found.matches
        for number, page in enumerate(pages):
            stored = self.tier.pages.get(keys[number])
            if stored is None:
                return number
            self.runner.put_page(page, stored.content)
        return len(pages)
