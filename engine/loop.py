"""The engine: scheduler and model in one thread, with an inbox in front.

One turn: drain the inbox, read the control words, let the scheduler decide, run the model, hand out what came of it.
With nothing to do the thread sleeps on an event; it never polls. Other threads post events, offer flushes and read
the snapshot, nothing else.

The snapshot is replaced before outputs and verdicts leave, so whoever acts on one finds the engine as it then was: a
flush right behind the last answer meets an idle engine.
"""

from __future__ import annotations

import logging
import math
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from threading import Event as Wakeup
from typing import Protocol, TypeAlias

from cache.host_reader import HostReader
from configs.errors import InvariantError
from engine.batch import Batch, StepResult
from engine.commands import CacheSuspect, Command, Emit, FlushEnded, RunBatch, StartCopies
from engine.control_words import ReadWords, read_always_valid
from engine.copy_jobs import CopyJob
from engine.events import (
    AbortRequested,
    CheckDue,
    Event,
    FlushArrived,
    RequestArrived,
    StepFailed,
    StepFinished,
    TierAttached,
    TurnStarted,
)
from engine.flush import FlushCommand, FlushKey, FlushVerdict
from engine.flush_gate import FlushGate, PendingFlush
from engine.generation import Collector, Generation
from engine.host_calls import TierPlace
from engine.host_view import MappedView
from engine.request import Output, Request
from engine.scheduler import Scheduler
from engine.snapshot import EngineSnapshot

logger = logging.getLogger(__name__)

#: periods that a due look over the cache waits for an idle instant: 100,000 pages take 30 ms, which would be seen as
#: a pause in running answers
CHECK_PATIENCE = 9
#: seconds, never going back; its zero does not matter
Clock: TypeAlias = Callable[[], float]
OnOutputs: TypeAlias = Callable[[list[Output]], None]
OnFlush: TypeAlias = Callable[[PendingFlush, FlushVerdict], None]


class Runner(Protocol):
    """What computes a step. Blocks until the tokens are known; any exception fails the step, not the engine."""

    def run(self, batch: Batch) -> StepResult: ...


class Copier(Protocol):
    """What copies pages to and from the host tier (engine/host_copier.py). Never blocks but in `stop`."""

    def connect(self, post: Callable[[Event], None]) -> None: ...

    def attach(self, number: int, place: TierPlace | None) -> None: ...

    def start(self, jobs: Sequence[CopyJob]) -> None: ...

    def stop(self) -> bool: ...


class StepObserver(Protocol):
    """Looks at steps on the engine's thread (engine/profiler.py). Must not raise."""

    def look(self) -> None:
        """Between two steps."""
        ...

    def step(self, batch: Batch) -> AbstractContextManager[None]: ...


def _ignore_outputs(outputs: list[Output]) -> None:
    """Nobody listens, as in `generate`."""


def _ignore_flush(pending: PendingFlush, verdict: FlushVerdict) -> None:
    """Who offered the flush waits for `pending.ended`."""


class EngineLoop:
    """Drives one scheduler. `turn`, `run` and `generate` belong to one thread; every other method to any."""

    def __init__(
        self,
        scheduler: Scheduler,
        runner: Runner,
        *,
        clock: Clock = time.monotonic,
        read_words: ReadWords = read_always_valid,
        on_outputs: OnOutputs = _ignore_outputs,
        on_flush: OnFlush = _ignore_flush,
        sanity_check_s: float = 0.0,
        copier: Copier | None = None,
        observer: StepObserver | None = None,
    ) -> None:
        """`on_outputs` is called by the engine thread, at most once before and once after a step, and must not block.
        `on_flush` is called once per flush taken in, by the thread that ended it. `sanity_check_s`: seconds between
        two looks over the cache while the engine is awake, 0 for none. `copier`: with a scheduler that was made for a
        host tier; it is this loop's from now on. `observer`: sees every step.
        """
        self._scheduler = scheduler
        self._runner = runner
        self._clock = clock
        self._read_words = read_words
        self._on_outputs = on_outputs
        self._sanity_check_s = sanity_check_s
        self._next_check_s = clock() + sanity_check_s if sanity_check_s else math.inf
        #: events for the next turn; appended to by any thread, emptied by the engine's
        self._inbox: deque[Event] = deque()
        self._wakeup = Wakeup()
        self._is_stopping = False
        self._snapshot = scheduler.snapshot()
        self._gate = FlushGate(on_flush)
        self._copier = copier
        #: the copier did not end with `close`: it may still write to a slot of the host tier
        self.is_copying = False
        self._observer = observer
        self._num_tiers = 0
        #: CLOCK_BOOTTIME minus our clock, now: in which births of pages are told to other processes
        self._boot_offset_ns = time.clock_gettime_ns(time.CLOCK_BOOTTIME) - int(clock() * 1e9)
        if copier is not None:
            copier.connect(self.post)

    # -------------------------------------------------------------------------------------------------- any thread
    def post(self, event: Event) -> None:
        """Put an event into the inbox and wake the engine. Flushes go through `offer_flush`."""
        self._inbox.append(event)
        self._wakeup.set()

    def wake(self) -> None:
        """Have a turn made soon, also if there is nothing to do."""
        self._wakeup.set()

    def stop(self) -> None:
        """`run` returns after the turn it is in. May be called twice."""
        self._is_stopping = True
        self._wakeup.set()

    def attach_tier(self, place: TierPlace | None) -> None:
        """Use this host tier from the next turn on; None: it is lost. Copies of before end, undone if need be.

        One caller at a time. Raises InvariantError if the engine was made without one.
        """
        if self._copier is None:
            raise InvariantError("a host tier for an engine that was made without one")
        self._num_tiers += 1
        self._copier.attach(self._num_tiers, place)
        if place is None:
            self.post(TierAttached(None))
            return
        view = MappedView(self._num_tiers, HostReader(place.arena, place.page), self._boot_offset_ns)
        self.post(TierAttached(view, place.lineage, place.sub_epochs))

    def close(self) -> None:
        """End the copier, if there is one. `run` does so itself; for engines driven by `generate` or `turn`."""
        if self._copier is not None:
            self.is_copying = not self._copier.stop()

    def snapshot(self) -> EngineSnapshot:
        """The engine as it was between two of its moves, not older than the step it is in."""
        return self._snapshot

    def offer_flush(self, command: FlushCommand, valid_until_s: float = math.inf) -> PendingFlush | FlushVerdict:
        """Take a flush in, or answer at once: busy, refused, late, or known already.

        Whoever gets a `PendingFlush` waits for `ended` until `deadline_s` of this loop's clock and then calls
        `expire_flush`. `valid_until_s`: end of the command in this loop's clock.
        """
        offered = self._gate.offer(command, self._clock(), self._snapshot, valid_until_s)
        if isinstance(offered, FlushVerdict):
            return offered
        self.post(FlushArrived(offered))
        return self._gate.refuse_if_busy(offered, self._clock(), self._snapshot) or offered

    def expire_flush(self, pending: PendingFlush) -> FlushVerdict | None:
        """Its deadline has passed: end it now, whatever step runs. None: the engine won, `pending.ended` tells."""
        return self._gate.expire(pending, self._clock(), self._snapshot)

    def withdraw_flush(self, key: FlushKey) -> PendingFlush | FlushVerdict:
        """What became of a flush; one that has not begun never will. A `PendingFlush`: begun, `ended` will tell."""
        return self._gate.withdraw(key, self._clock(), self._snapshot)

    def end_unstarted_flush(self, pending: PendingFlush) -> FlushVerdict | None:
        """Before the first turn there is nothing to flush: it is done. None: it has ended already."""
        return self._gate.end_unstarted(pending, self._clock())

    def now_s(self) -> float:
        """By the clock in which deadlines of flushes are meant."""
        return self._clock()

    def open_flush(self, key: FlushKey) -> PendingFlush | None:
        """A flush that was taken in and has no verdict yet."""
        return self._gate.open_flush(key)

    def flush_verdict(self, key: FlushKey) -> FlushVerdict | None:
        """What was answered about one of the last flushes."""
        return self._gate.verdict_of(key)

    def see_term(self, term: int) -> bool:
        """A controller of this term has spoken; flushes of lower terms are refused from now on. False: so is it."""
        return self._gate.see_term(term)

    # ------------------------------------------------------------------------------------------------ engine thread
    def run(self) -> None:
        """Serve until `stop`, asleep while there is nothing to do. What is left then ends with `abort`.

        Raises InvariantError when a promise of ours is broken; the rank is rebuilt by whoever runs this.
        """
        reason = "The engine has failed."
        try:
            while not self._is_stopping:
                if not self.turn():
                    self._sleep()
            self.post(AbortRequested(None, "The engine stops."))
            self._carry_out(self._drain())
            reason = "The engine has stopped."
        finally:
            self._gate.close(reason, self._clock(), self._snapshot)
            self.close()

    def turn(self) -> bool:
        """Do what is to be done next, at most one step. False: nothing is left to do until the next event."""
        if self._observer is not None:
            self._observer.look()
        commands = self._drain()
        # After the last request of this turn was taken from the inbox: protocol.md, invariant 6.
        words = self._read_words()
        commands += self._scheduler.handle(TurnStarted(words), self._clock())
        batch = self._carry_out(commands)
        if batch is not None:
            pending = self._gate.pending
            if pending is not None:
                self._gate.refuse_if_busy(pending, self._clock(), self._snapshot)
            self._run_step(batch)
        self._check_when_due()
        return self._scheduler.has_work or bool(self._inbox)

    def generate(self, requests: Iterable[Request]) -> list[Generation]:
        """Serve these to their ends on the calling thread; answers in the order of the requests. Not beside `run`.

        Raises ValueError when two of them share an id.
        """
        requests = list(requests)
        collector = Collector(requests)
        outer, self._on_outputs = self._on_outputs, collector.take
        try:
            for request in requests:
                self.post(RequestArrived(request))
            while collector.open_ids:
                if self.turn() or not collector.open_ids:
                    continue
                if not self._scheduler.num_copies_in_flight:
                    raise InvariantError(f"requests {collector.open_ids[:3]} never ended")
                self._sleep()
        finally:
            self._on_outputs = outer
            if collector.open_ids:
                self.post(AbortRequested(collector.open_ids))
        return collector.generations

    def _sleep(self) -> None:
        """Until something is posted, or the scheduler wants a turn anyway."""
        wakes_at_s = self._scheduler.wakes_at_s
        self._wakeup.wait(None if wakes_at_s == math.inf else max(0.0, wakes_at_s - self._clock()))
        self._wakeup.clear()

    def _drain(self) -> list[Command]:
        """What the posted events want; those that arrive meanwhile wait for the next turn."""
        commands: list[Command] = []
        now_s = self._clock()
        for _ in range(len(self._inbox)):
            commands += self._scheduler.handle(self._inbox.popleft(), now_s)
        return commands

    def _run_step(self, batch: Batch) -> None:
        event: Event
        try:
            with nullcontext() if self._observer is None else self._observer.step(batch):
                event = StepFinished(self._runner.run(batch))
        except InvariantError:
            raise
        except Exception as error:
            logger.exception("step %d failed", batch.step)
            event = StepFailed(f"The model failed in this step: {type(error).__name__}.")
        except BaseException:
            # Ctrl-C in `generate`: the step is void, the engine stays usable.
            self._carry_out(self._scheduler.handle(StepFailed("The step was interrupted."), self._clock()))
            raise
        self._carry_out(self._scheduler.handle(event, self._clock()))

    def _carry_out(self, commands: list[Command]) -> Batch | None:
        """Publish the picture, then let outputs and verdicts go; the batch to run, if there is one."""
        self._snapshot = self._scheduler.snapshot()
        outputs: list[Output] = []
        ended: list[FlushEnded] = []
        batch: Batch | None = None
        for command in commands:
            match command:
                case Emit():
                    outputs += command.outputs
                case RunBatch():
                    batch = command.batch
                case FlushEnded():
                    ended.append(command)
                case StartCopies():
                    assert self._copier is not None, "copies are ordered once a tier is attached"
                    self._copier.start(command.jobs)
                case CacheSuspect():
                    logger.error("cache emptied, it had violations: %s", "; ".join(command.violations[:5]))
        if outputs:
            self._on_outputs(outputs)
        for command in ended:
            self._gate.end(command.pending, command.verdict)
        return batch

    def _check_when_due(self) -> None:
        """Look the cache over at an idle instant after the timer, or amid work when none has come for long."""
        now_s = self._clock()
        patience_s = 0.0 if self._snapshot.is_idle else CHECK_PATIENCE * self._sanity_check_s
        if now_s >= self._next_check_s + patience_s:
            self._next_check_s = now_s + self._sanity_check_s
            self._carry_out(self._scheduler.handle(CheckDue(), now_s))
