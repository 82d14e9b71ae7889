"""What other threads may know of the engine: an immutable picture, replaced as a whole in every turn.

The control loop reads it without a lock to name what is in a flush's way, to answer status calls, and for metrics.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from engine.copy_jobs import HostCounters
from engine.flush import Blockers
from engine.request import FinishReason


@dataclass(slots=True)
class Counters:
    """Things that only grow, since the engine started. Written by the scheduler."""

    num_steps: int = 0
    num_failed_steps: int = 0
    #: requests taken in, and ended by reason
    num_arrived: int = 0
    num_finished_stop: int = 0
    num_finished_length: int = 0
    num_finished_abort: int = 0
    num_finished_error: int = 0
    #: frames that named a request which was already here with the same or a newer attempt; dropped
    num_duplicates: int = 0
    num_admissions: int = 0
    #: tokens of the sequence at its admissions, and those of them whose KV was found in the cache
    num_admitted_tokens: int = 0
    num_cached_tokens: int = 0
    #: tokens computed in rows of prefill, tokens sampled
    num_prefill_tokens: int = 0
    num_generated_tokens: int = 0
    #: prefill rows that did not reach the end of their prompt
    num_chunks: int = 0
    num_retractions: int = 0
    #: admissions without a look into the cache, because the lease was over
    num_uncached_admissions: int = 0
    #: swaps because a floor was above the rank's epoch
    num_floor_swaps: int = 0
    num_violations: int = 0

    def count_finished(self, finish: FinishReason) -> None:
        name = f"num_finished_{finish}"
        setattr(self, name, getattr(self, name) + 1)


@dataclass(frozen=True, slots=True)
class EngineSnapshot:
    """The engine between two of its moves."""

    #: number of the last step that was planned
    step: int = 0
    #: a batch is with the model right now
    is_stepping: bool = False
    #: what is in the way of an idle instant
    blockers: Blockers = field(default_factory=Blockers)
    #: queued requests; they own no page
    num_waiting: int = 0
    #: their tokens; how many of them the cache holds is known at admission only
    num_waiting_tokens: int = 0
    epoch: int = 0
    generation: int = 0
    #: pages by state; they add up to num_pages
    num_pages: int = 0
    num_free_pages: int = 0
    num_cached_pages: int = 0
    num_pinned_pages: int = 0
    num_private_pages: int = 0
    num_fenced_pages: int = 0
    num_copying_pages: int = 0
    num_evicted_pages: int = 0
    lease_ok: bool = True
    #: the flush that waits for its instant, if one does
    pending_flush_id: str | None = None
    counters: Counters = field(default_factory=Counters)
    #: None: this engine has no host tier
    host: HostCounters | None = None

    @property
    def num_running(self) -> int:
        """Admitted sequences, half-prefilled ones included."""
        return self.blockers.running + self.blockers.half_prefilled

    @property
    def is_idle(self) -> bool:
        """Nothing runs and nothing is half-prefilled; copies in flight alone make no engine busy."""
        return self.num_running == 0
