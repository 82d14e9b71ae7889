"""A host tier that the ranks of a node share, and copies that take their time: they end when they end, also of a rank
that was frozen amid them, and never if it is killed."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from cache.write_policy import WritePolicy
from engine.copy_jobs import CopyJob, WriteJob
from engine.host_calls import HostSettings
from tests.fake_host import FakeCopier, FakeTier
from tests.simulation.virtual_loop import Process

_PAGE_BYTES = 10
#: of a copy
_DURATIONS_S = (0.001, 0.01, 0.1, 1.0)


def host_settings(policy: WritePolicy) -> HostSettings:
    return HostSettings("layout", "weights", _PAGE_BYTES, policy, "full", 9 * _PAGE_BYTES, 0.3, 0.6)


class SlowCopier(FakeCopier):
    """One rank's copies, each with its own end."""

    def __init__(self, tier: FakeTier, process: Process, chance: Random) -> None:
        super().__init__(tier)
        self._process = process
        self._chance = chance

    def start(self, jobs: Sequence[CopyJob]) -> None:
        super().start(jobs)
        for job in jobs:
            duration_s = self._chance.choice(_DURATIONS_S)
            self._process.loop.call_later(duration_s, self._end, job, context=self._process.context())

    def pages_read(self) -> set[int]:
        """Device pages that copies under way still read."""
        return {page for job in self.open if isinstance(job, WriteJob) for page in job.pages.tolist()}

    def _end(self, job: CopyJob) -> None:
        is_whole = self._chance.random() < 0.9
        index = next(index for index, other in enumerate(self.open) if other is job)
        self.end(index, 1000 if is_whole else self._chance.randint(0, 2))
