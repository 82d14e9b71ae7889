"""Who is here: the requests of one rank, waiting or running, and every way one of them comes, goes and comes back."""

from __future__ import annotations

from bisect import insort
from itertools import islice
from operator import attrgetter

from cache.device_cache import DeviceCache
from cache.page_hold import PageHold
from engine.admission import Admission
from engine.flush import Blockers
from engine.host_desk import HostDesk
from engine.limits import SchedulerLimits, problem
from engine.request import FinishReason, Output, Request
from engine.sequence import Sequence
from engine.snapshot import Counters
from engine.story import Story
from engine.waiting_queue import WaitingQueue

#: waiting requests looked at for one that can begin, where those before it wait for a prefill that runs; each look is
#: a match of its prompt
LOOK_AHEAD = 8
_by_age = attrgetter("order")


class Roster:
    """Part of the scheduler, changed by it alone. A request ends exactly once, with an Output in `outputs`."""

    def __init__(
        self,
        cache: DeviceCache,
        limits: SchedulerLimits,
        counters: Counters,
        story: Story,
        host: HostDesk | None = None,
    ) -> None:
        self._cache = cache
        #: None: this engine has no host tier
        self._host = host
        self._limits = limits
        self._pool_tokens = cache.num_pages * cache.page_size
        self._eos_ids = frozenset(limits.eos_token_ids)
        self._admission = Admission(cache)
        self._counters = counters
        self._story = story
        #: all requests without an end; the newest attempt of each id
        self.live: dict[str, Sequence] = {}
        #: retracted ones first, then by arrival; they own no page
        self.waiting = WaitingQueue()
        #: admitted ones, oldest first
        self.running: list[Sequence] = []
        #: the node's lease as last read; without it nothing is matched and nothing published
        self.lease_ok = True
        #: parts of answers that are due; whoever sends them takes the list away
        self.outputs: list[Output] = []

    @property
    def is_full(self) -> bool:
        return len(self.running) >= self._limits.max_rows

    def blockers(self) -> Blockers:
        """What is in the way of an idle instant. O(running)."""
        num_half = sum(sequence.num_remaining > 1 for sequence in self.running)
        num_copies = 0 if self._host is None else self._host.num_in_flight
        return Blockers(len(self.running) - num_half, num_half, num_copies)

    def take_in(self, request: Request, now_s: float) -> None:
        """Queue it, or refuse what can never be served. A repeat of what is already here is dropped and counted."""
        reason = problem(request, self._limits, self._pool_tokens)
        max_total = self._limits.max_total_tokens(self._pool_tokens)
        sequence = Sequence(request, self._counters.num_arrived, now_s, max_total, self._eos_ids)
        self._counters.num_arrived += 1
        if reason is not None:
            self.finish(sequence, "error", reason, now_s)
            return
        self.live[request.request_id] = sequence
        self.waiting.push(sequence)

    def abort(self, sequence: Sequence, reason: str, now_s: float) -> None:
        """End it; no step with it may be out."""
        if sequence.hold is not None:
            self.leave(sequence, now_s, may_publish=True)
        else:
            self.waiting.remove(sequence)
        self.finish(sequence, "abort", reason, now_s)

    def try_admit_next(self, now_s: float) -> Sequence | None:
        """Move a waiting request to the running ones: a new match under the words of this turn. None: they must wait
        on, or nobody waits. The first one has the right of way, unless it waits for a prefill and for no page."""
        if self.is_full:
            return None
        for sequence in islice(self.waiting, LOOK_AHEAD):
            refusal = self._admission.try_admit(sequence, self.running, now_s, may_match=self.lease_ok)
            if refusal is None:
                return self._admitted(sequence, now_s)
            if refusal == "no_room":
                return None
        return None

    def _admitted(self, sequence: Sequence, now_s: float) -> Sequence:
        self.waiting.remove(sequence)
        if self._host is not None and self.lease_ok and sequence.hold is not None:
            self._host.used(sequence.hold, now_s, is_hit=True)
            self._host.begin_load(sequence, sequence.hold)
        insort(self.running, sequence, key=_by_age)
        counters = self._counters
        counters.num_admissions += 1
        counters.num_uncached_admissions += not self.lease_ok
        counters.num_admitted_tokens += sequence.num_tokens
        counters.num_cached_tokens += sequence.num_computed
        what = f"admitted at epoch {self._cache.epoch}, {sequence.num_computed} of {sequence.num_tokens} tokens cached"
        self._story.tell(now_s, sequence.request_id, what)
        return sequence

    def retract(self, sequence: Sequence, now_s: float, *, may_publish: bool) -> None:
        """Take the pages back, keep the tokens, queue it first; its next admission is a new one."""
        self.leave(sequence, now_s, may_publish=may_publish)
        sequence.num_retractions += 1
        self._counters.num_retractions += 1
        self.waiting.push_front(sequence)
        self._story.tell(now_s, sequence.request_id, f"retracted at {sequence.num_tokens} tokens")

    def leave(self, sequence: Sequence, now_s: float, *, may_publish: bool) -> None:
        """Give up the admission; what was computed stays in the cache if it may."""
        num_computed = sequence.num_computed
        if self._host is not None and sequence.load is not None:
            self._host.abandon(sequence)
        hold = sequence.leave()
        if may_publish:
            self.publish(sequence, hold, num_computed, now_s)
        # A cache that began anew has closed it already.
        if not hold.is_closed:
            self._cache.close(hold)
        self.running.remove(sequence)

    def publish(self, sequence: Sequence, hold: PageHold, num_computed: int, now_s: float) -> None:
        """Offer full pages to the cache, which refuses them itself if a flush has come between (taint)."""
        if self.lease_ok:
            self._cache.publish(hold, sequence.token_bytes(num_computed), num_computed, now_s)
            if self._host is not None:
                self._host.used(hold, now_s, is_hit=False)

    def finish(self, sequence: Sequence, finish: FinishReason, message: str, now_s: float) -> None:
        """Send an end without a token. The sequence owns no pages any more."""
        self.outputs.append(sequence.ended(finish, message))
        self.forget(sequence, finish, now_s)

    def forget(self, sequence: Sequence, finish: FinishReason, now_s: float) -> None:
        """Its end has been sent."""
        if self.live.get(sequence.request_id) is sequence:
            del self.live[sequence.request_id]
        self._counters.count_finished(finish)
        self._story.tell(now_s, sequence.request_id, f"ended: {finish} after {sequence.num_generated} tokens")

    def faults(self) -> list[str]:
        """What does not agree with the words above. O(live)."""
        faults: list[str] = []
        waiting = list(self.waiting)
        if any(sequence.hold is not None for sequence in waiting):
            faults.append("a waiting request owns pages")
        if any(sequence.hold is None for sequence in self.running):
            faults.append("a running request owns no pages")
        if self.running != sorted(self.running, key=_by_age):
            faults.append("running requests are not in order of age")
        if len(self.running) > self._limits.max_rows:
            faults.append(f"{len(self.running)} run, {self._limits.max_rows} may")
        if not set(self.live.values()) <= {*waiting, *self.running}:
            faults.append("a live request neither waits nor runs")
        num_holds = sum(not hold.is_copy for hold in self._cache.holds)
        if num_holds != len(self.running):
            faults.append(f"{num_holds} holds are open for {len(self.running)} running requests")
        faults += [
            f"{sequence.request_id} has KV of a token it does not have"
            for sequence in self.running
            if sequence.num_computed >= sequence.num_tokens
        ]
        return faults
