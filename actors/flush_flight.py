"""Carries one flush out: does what `FlushMachine` wants, and brings back what came of it.

No task waits here. Each command is started, its end is the next event, and one timer stands for the next instant at
which the machine may decide by itself.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Protocol

from actors.clock import Clock
from actors.end_proofs import pause
from actors.flush_events import (
    Amend,
    CancelOnRank,
    Command,
    Event,
    FloorSettled,
    Forget,
    Give,
    HostFailed,
    HostFlushed,
    IntentStored,
    KeepLate,
    NotStored,
    OutcomeStored,
    RaiseFloor,
    RankAnswered,
    RankFailed,
    RankRegistered,
    Release,
    StoreIntent,
    StoreOutcome,
    TellHost,
    TellRank,
    TimePassed,
    Withhold,
)
from actors.flush_machine import FlushMachine
from actors.flush_run import Answer
from actors.log_keeper import LogKeeper, Stored, Unstored
from actors.log_records import Record
from actors.nodes import Nodes
from actors.ray_errors import Answered, CallFailed, outcome_of
from actors.roster import Roster
from engine.flush import FlushCommand

log = logging.getLogger(__name__)

#: what nobody waits for begins when the answer has left this process
_BEHIND_ANSWER_S = 0.005


class FlushEnds(Protocol):
    """What the flights tell the desk."""

    def given(self, flight: FlushFlight, answer: Answer, is_remembered: bool) -> None: ...
    def amended(self, flight: FlushFlight, answer: Answer) -> None: ...
    def forgotten(self, flight: FlushFlight) -> None: ...
    def late(self, flight: FlushFlight, rows: list[Answer]) -> None: ...
    def begun(self, flight: FlushFlight) -> None:
        """Ranks are being told."""
        ...

    def cut_short(self, flight: FlushFlight) -> Answer:
        """A fault of ours has ended it; what its caller is told."""
        ...


@dataclass(frozen=True, slots=True)
class FlushTools:
    """What every flight uses."""

    roster: Roster
    nodes: Nodes
    log: LogKeeper
    clock: Clock


class FlushFlight:
    """One flush on its way, on one asyncio loop."""

    def __init__(self, machine: FlushMachine, tools: FlushTools, ends: FlushEnds) -> None:
        self.machine = machine
        self.request = machine.run.request
        self._tools = tools
        self._ends = ends
        #: done when the flush has its answer
        self.answered: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._legs: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        #: when the timer goes off
        self._wake_s: float | None = None
        self._is_cut_short = False

    def begin(self) -> None:
        """Begin with the ranks that are registered now."""
        self._do(lambda now_s: self.machine.begin(self._tools.roster.settled_records(), now_s))
        for record in self._tools.roster.joining_records():
            self.handle(RankRegistered(record, is_new=True))

    def resume(self, index: int) -> None:
        """Go on where an earlier controller stopped."""
        self._do(lambda now_s: self.machine.resume(index, now_s))

    def handle(self, event: Event) -> None:
        """Something has happened that concerns this flush."""
        self._do(lambda now_s: self.machine.handle(event, now_s))

    def close(self) -> None:
        """Drop everything; nobody is told anything any more."""
        self._set_timer(None)
        for leg in self._legs:
            leg.cancel()

    def _now_s(self) -> float:
        return self._tools.clock.now_s()

    def _do(self, step: Callable[[float], list[Command]]) -> None:
        """Let the machine take a step and carry out what it wants. A fault of ours ends this flush with an answer, so
        that no exception crosses a job's border and those that follow are not refused because of it."""
        if self._is_cut_short:
            return
        try:
            was_running = self.machine.state == "running"
            for command in step(self._now_s()):
                self._start(command)
            self._set_timer(self.machine.wake_s)
            if self.machine.state == "running" and not was_running:
                self._ends.begun(self)
        except Exception:
            log.exception("flush %s was cut short", self.request.flush_id)
            self._is_cut_short = True
            self._set_timer(None)
            answer = self._ends.cut_short(self)
            if not self.answered.done():
                self._ends.given(self, answer, is_remembered=False)
                self.answered.set_result(answer)

    def _start(self, command: Command) -> None:
        tools = self._tools
        match command:
            case TellRank():
                self._leg(self._tell(command))
            case StoreIntent(intent):
                self._store(intent, IntentStored)
            case StoreOutcome(outcome):
                self._store(outcome, lambda index: OutcomeStored())
            case RaiseFloor(node_id, floor):
                self._leg(self._raise(node_id, floor))
            case TellHost(node_id, older_than_s):
                self._leg(self._drop_host(node_id, older_than_s))
            case CancelOnRank(incarnation, index):
                self._leg(self._cancel(incarnation, index))
            case Withhold(node_ids):
                tools.nodes.book.leases.withhold(node_ids)
            case Release(node_ids):
                tools.nodes.book.leases.release(node_ids)
            case Give(answer, is_remembered):
                self._ends.given(self, answer, is_remembered)
                if not self.answered.done():
                    self.answered.set_result(answer)
            case Amend(answer):
                self._ends.amended(self, answer)
            case Forget():
                self._ends.forgotten(self)
            case KeepLate(rows):
                self._ends.late(self, rows)

    # ----------------------------------------------------------------------------------------------------- the effects
    def _leg(self, work: Coroutine[Any, Any, None]) -> None:
        leg = asyncio.create_task(work, name=f"flush-{self.request.flush_id}")
        self._legs.add(leg)
        leg.add_done_callback(self._legs.discard)

    def _store(self, record: Record, stored: Callable[[int], Event]) -> None:
        def ended(done: asyncio.Future[Stored | Unstored]) -> None:
            if not done.cancelled():
                self._do(lambda now_s: self.machine.handle(event_of(done), now_s))

        def event_of(done: asyncio.Future[Stored | Unstored]) -> Event:
            match done.result():
                case Stored(index):
                    return stored(index)
                case Unstored(message, fate):
                    if fate is not None:
                        fate.add_done_callback(settled)
                    return NotStored(message, is_final=fate is None)

        def settled(fate: asyncio.Future[int | None]) -> None:
            if not fate.cancelled():
                index = fate.result()
                self.handle(NotStored("it is not in the log", is_final=True) if index is None else stored(index))

        self._tools.log.append(record).add_done_callback(ended)

    async def _tell(self, order: TellRank) -> None:
        """Tell one rank and wait for its verdict, however late it comes."""
        incarnation = order.record.incarnation
        handle = self._tools.roster.handle(incarnation)
        if handle is None:
            return self._failed(incarnation, "Ray knows no actor of this incarnation", is_final=False)
        match await outcome_of(handle.flush.remote(self._command(order))):
            case Answered(verdict):
                self.handle(RankAnswered(incarnation, verdict))
            case CallFailed(kind, message):
                self._failed(incarnation, message, is_final=kind == "error")

    def _failed(self, incarnation: str, message: str, *, is_final: bool) -> None:
        self.handle(RankFailed(incarnation, message, is_final))

    async def _raise(self, node_id: str, floor: int) -> None:
        if self.answered.done():  # the ranks have swapped already, and a call costs 0.3 ms of this loop
            await pause(_BEHIND_ANSWER_S)
        answer = await self._tools.nodes.raise_floor(node_id, floor)
        if answer is None:
            self.handle(FloorSettled(node_id))
        else:
            self.handle(FloorSettled(node_id, answer.host_pages, answer.host_bytes))

    async def _drop_host(self, node_id: str, older_than_s: float | None) -> None:
        machine = self.machine
        until_s = machine.plan.valid_until_s
        dropped = await self._tools.nodes.drop_host(node_id, machine.run.index, older_than_s, until_s)
        if dropped.failure:
            self.handle(HostFailed(node_id, dropped.failure))
        else:
            self.handle(HostFlushed(node_id, dropped.freed_pages, dropped.freed_bytes))

    async def _cancel(self, incarnation: str, index: int) -> None:
        handle = self._tools.roster.handle(incarnation)
        if handle is None:
            return
        call = handle.close_flush.remote(self.request.flush_id, index, self._tools.log.state.term)
        match await outcome_of(call):
            case Answered(verdict):
                self.handle(RankAnswered(incarnation, verdict))
            case CallFailed(_, message):
                self._failed(incarnation, message, is_final=False)

    def _command(self, order: TellRank) -> FlushCommand:
        request, run, nodes = self.request, self.machine.run, self._tools.nodes.book
        now_s = self._now_s()
        boot_s = nodes.boot_s(order.record.node_id, now_s)
        assert boot_s is not None, "a rank is told only when its node's clock is known"
        return FlushCommand(
            flush_id=request.flush_id,
            mode=request.mode,
            tiers=request.tiers,
            epoch=run.epoch,
            term=self._tools.log.state.term,
            budget_s=order.budget_s,
            timeout_s=request.timeout_s,
            scope=request.scope,
            dry_run=request.dry_run,
            index=run.index,
            valid_until_s=boot_s + order.valid_until_s - now_s,
            lineage=self._tools.log.state.lineage,
            sub_epoch=run.sub_epoch,
        )

    def _set_timer(self, wake_s: float | None) -> None:
        if wake_s is not None and wake_s == self._wake_s:  # most events change nothing about it
            return
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._wake_s = wake_s
        if wake_s is not None:
            delay_s = max(0.0, wake_s - self._now_s())
            self._timer = asyncio.get_running_loop().call_later(delay_s, self._wake)

    def _wake(self) -> None:
        self._wake_s = None
        self.handle(TimePassed())
