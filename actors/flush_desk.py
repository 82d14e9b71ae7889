"""All flushes of one controller: which one may begin, which are under way, what became of those that ended.

What a flush means and when it succeeded is decided in `flush_machine` and `flush_run`; here they begin, and here their
answers are kept, counted and written to the audit log.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from actors.audit_log import AuditLog
from actors.clock import Clock
from actors.flush_book import Begin, FlushBook, Join, Refuse, Reread
from actors.flush_events import (
    CancelAsked,
    Event,
    NodeChanged,
    RankGone,
    RankRegistered,
    Superseded,
    SupersederEnded,
)
from actors.flush_flight import FlushFlight, FlushTools
from actors.flush_machine import FlushMachine
from actors.flush_plan import FlushPlan
from actors.flush_recovery import ask_what_became, interrupted_rows
from actors.flush_request import FlushLimits, FlushRequest, parse_flush, refusal
from actors.flush_run import Answer, FlushRun, flush_answer
from actors.log_keeper import LogKeeper, Stored, Unstored
from actors.log_records import FlushIntent, FlushOutcome
from actors.messages import RankRecord
from actors.metrics import ControlMetrics
from actors.nodes import Nodes
from actors.roster import Roster
from configs.errors import Conflict, RequestError, UnknownResource
from engine.flush import ALREADY_IN_PROGRESS

log = logging.getLogger(__name__)

#: keys of a flush's answer that its audit entry has, beside a short row for each rank
_AUDITED = (
    "flush_id", "success", "status", "message", "mode", "tiers", "dry_run", "epoch", "sub_epoch", "floor_raised",
    "superseded_by", "replayed", "took_ms",
)  # fmt: skip
_MAX_SHOWN = 200
# Work on this loop right behind an answer holds the answer up: Ray's own thread has still to send it.
_COUNT_AFTER_S = 0.02


class FlushDesk:
    """Lives on one asyncio loop."""

    def __init__(
        self,
        roster: Roster,
        nodes: Nodes,
        log: LogKeeper,
        clock: Clock,
        limits: FlushLimits,
        answer_slack_s: float,
        metrics: ControlMetrics,
        audit: AuditLog,
    ) -> None:
        """log: taken over; what it says of earlier flushes is readable here at once."""
        self._roster = roster
        self._nodes = nodes
        self._log = log
        self._clock = clock
        self._limits = limits
        self._slack_s = answer_slack_s
        self._metrics = metrics
        self._audit = audit
        self._tools = FlushTools(roster, nodes, log, clock)
        self._book = FlushBook()
        #: what carries flushes out, each until it has its answer, in order; of one id are only those of a restart
        self._flights: dict[FlushFlight, None] = {}
        #: flush id -> the flush that gives way to it
        self._yielding: dict[str, str] = {}
        #: flush id, index -> end of a flush that an earlier controller began and that is closed by asking the ranks
        self._closing: dict[tuple[str, int], asyncio.Task[Answer]] = {}
        self._flushed_s: float | None = None
        self._num_dry_runs = 0
        #: answered, but not yet counted
        self._uncounted: deque[tuple[FlushRequest, Answer]] = deque()
        self._restore()

    # --- what callers see -------------------------------------------------------------------------------------------

    async def flush(self, arguments: Mapping[str, object], make_id: Callable[[], str]) -> Answer:
        """One flush, from its arguments to its answer; see actors.controller.ControllerActor.flush."""
        received_s = self._clock.now_s()
        try:
            request = parse_flush(arguments, self._present_limits(), make_id)
        except RequestError as error:
            answer = refusal(error)
            self.note_refused("flush", arguments, answer)
            return answer
        match self._book.admit(request, received_s, self._may_yield):
            case Reread(answer):
                return self._replayed(request, answer)
            case Refuse() as refused:
                return self._refused(request, refused)
            case Join():
                return self._replayed(request, await self._joined(request, received_s))
            case Begin(superseding):
                return await asyncio.shield(self._begin(request, received_s, superseding))

    async def cancel(self, flush_id: str, caller: str) -> Answer:
        """End a flush that has not begun; see actors.controller.ControllerActor.cancel_flush."""
        flight = self._flight_of(flush_id)
        if flight is None and self.read(flush_id) is None:
            answer = refusal(UnknownResource(f"no flush {flush_id!r} is known", "flush_id"))
        elif flight is None or not flight.machine.can_cancel:
            is_closed = flight is None and self._closing_of(flush_id) is None
            has = "has ended" if is_closed else "has begun and cannot be taken back"
            answer = refusal(Conflict(f"flush {flush_id!r} {has}", "flush_id"))
        else:
            flight.handle(CancelAsked())
            ended = await asyncio.shield(flight.answered)
            success = ended["status"] == "cancelled"
            answer = {
                "success": success, "status": "cancelled" if success else "conflict", "flush": ended,
                "http_status": 200 if success else 409,
                "message": "" if success else f"flush {flush_id!r} ended before it could be cancelled",
            }  # fmt: skip
        entry = {"flush_id": flush_id} | {key: answer[key] for key in ("success", "status", "message")}
        self.note("cancel_flush", caller, entry)
        return answer

    def read(self, flush_id: str) -> Answer | None:
        """The answer of an ended flush, late verdicts included; of one under way, how far it is."""
        ended = self._book.read(flush_id)
        return ended if ended is not None else self._under_way(flush_id)

    def pending(self) -> dict[str, Any] | None:
        """The pending flush as plain data; None if there is none."""
        return None if self._book.pending is None else self._under_way(self._book.pending.flush_id)

    def seconds_since_flush(self) -> float | None:
        """Since the last success of a flush of everything; None: there was none since the machine started."""
        self.count_ended()
        return None if self._flushed_s is None else self._clock.now_s() - self._flushed_s

    def note(self, call: str, caller: str, facts: Mapping[str, Any]) -> None:
        """Have a control call written to the audit log, behind the flushes that were answered before it."""
        self.count_ended()
        self._write_down(call, caller, facts)

    def note_refused(self, call: str, arguments: Mapping[str, object], answer: Mapping[str, Any]) -> None:
        """Have a call with bad arguments written to the audit log, as far as they can be shown."""
        shown = {str(name)[:_MAX_SHOWN]: repr(value)[:_MAX_SHOWN] for name, value in list(arguments.items())[:16]}
        caller = arguments.get("caller")
        self.note(call, caller[:_MAX_SHOWN] if isinstance(caller, str) else "", {"arguments": shown} | dict(answer))

    # --- what happens meanwhile -------------------------------------------------------------------------------------

    def registered(self, record: RankRecord) -> None:
        """An incarnation was added to the roster, or has registered again."""
        self._tell_all(RankRegistered(record, is_new=self._roster.book.is_joining(record.incarnation)))

    def gone(self, record: RankRecord) -> None:
        """An incarnation's process is proven gone."""
        self._tell_all(RankGone(record.incarnation))

    def node_changed(self, node_id: str) -> None:
        """A node was heard of, or its floor has risen."""
        self._tell_all(NodeChanged(node_id))

    def close(self) -> None:
        """Carry nothing on."""
        self.count_ended()
        for flight in self._flights:
            flight.close()
        for closing in self._closing.values():
            closing.cancel()

    # --- what the flights tell --------------------------------------------------------------------------------------

    def begun(self, flight: FlushFlight) -> None:
        """Its ranks are being told: whoever gives way to it has nothing more to hope for."""
        self._metrics.epoch(self._log.state.epoch)
        yielding = self._flight_of(self._yielding.get(flight.request.flush_id, ""))
        if yielding is not None:
            yielding.handle(Superseded(flight.request.flush_id))

    def given(self, flight: FlushFlight, answer: Answer, is_remembered: bool) -> None:
        flush_id = flight.request.flush_id
        self._flights.pop(flight, None)
        if is_remembered:
            self._book.end(flight.request, answer, self._clock.now_s())
        else:
            self._book.drop(flight.request)
        self._advance(answer)
        # Ray's counters take 20 us each and the audit log its time: the caller's answer goes first.
        self._uncounted.append((flight.request, answer))
        asyncio.get_running_loop().call_later(_COUNT_AFTER_S, self.count_ended)
        yielding = self._flight_of(self._yielding.pop(flush_id, ""))
        if yielding is not None and yielding.machine.run.superseded_by == flush_id:
            yielding.handle(SupersederEnded())

    def cut_short(self, flight: FlushFlight) -> Answer:
        machine = flight.machine
        answer = self._failed(flight.request, machine.run.is_floor_raised) | {"epoch": machine.run.epoch}
        if machine.run.index > 0:
            floor = machine.run.epoch if machine.run.is_floor_raised else 0
            closing = self._log.append(FlushOutcome(machine.run.index, floor, answer))
            closing.add_done_callback(lambda done: self._cut_short_stored(machine.withheld, done))
        return answer

    def _cut_short_stored(self, withheld: tuple[str, ...], done: asyncio.Future[Stored | Unstored]) -> None:
        """Now no success can come into the log any more that counts on these nodes."""
        if not done.cancelled() and done.exception() is None and isinstance(done.result(), Stored):
            self._nodes.book.leases.release(withheld)

    def amended(self, flight: FlushFlight, answer: Answer) -> None:
        self._book.end(flight.request, answer, self._clock.now_s())
        self._advance(answer)

    def forgotten(self, flight: FlushFlight) -> None:
        self._book.forget(flight.request)

    def late(self, flight: FlushFlight, rows: list[Answer]) -> None:
        self._book.keep_late(flight.request.flush_id, rows)

    # --- inside -----------------------------------------------------------------------------------------------------

    def _begin(self, request: FlushRequest, received_s: float, superseding: str | None) -> asyncio.Future[Answer]:
        plan = FlushPlan.of(request, self._limits, received_s, self._slack_s)
        run = FlushRun(request, self._clock.wall_text(), received_s)
        if request.dry_run:
            self._num_dry_runs += 1
            run.index = -((self._log.state.term << 32) + self._num_dry_runs)
        flight = self._flight(plan, run)
        if superseding is not None:
            self._yielding[request.flush_id] = superseding
        flight.begin()
        return flight.answered

    def _flight(self, plan: FlushPlan, run: FlushRun) -> FlushFlight:
        machine = FlushMachine(plan, run, self._nodes.book, self._untouched(plan.request))
        flight = FlushFlight(machine, self._tools, self)
        self._flights[flight] = None
        return flight

    def _flight_of(self, flush_id: str) -> FlushFlight | None:
        return next((flight for flight in reversed(self._flights) if flight.request.flush_id == flush_id), None)

    def _closing_of(self, flush_id: str) -> asyncio.Task[Answer] | None:
        """The newest of this id: it is the one that has the id."""
        index = max((index for known_id, index in self._closing if known_id == flush_id), default=0)
        return self._closing.get((flush_id, index))

    def _failed(self, request: FlushRequest, floor_raised: bool = False) -> Answer:
        return flush_answer(
            request, success=False, status="unavailable", message="the controller failed; its log says why",
            http_status=500, floor_raised=floor_raised, started_at=self._clock.wall_text(),
            untouched_tiers=self._untouched(request),
        )  # fmt: skip

    def _may_yield(self, flush_id: str) -> bool:
        flight = self._flight_of(flush_id)
        return flight is not None and flight.machine.can_give_way

    async def _joined(self, request: FlushRequest, received_s: float) -> Answer:
        """The answer of the flush that is under way. Closing one of an earlier controller may take longer than this
        caller waits."""
        flight = self._flight_of(request.flush_id)
        ending = flight.answered if flight is not None else self._closing_of(request.flush_id)
        assert ending is not None, "a flush that is under way has somebody who ends it"
        plan = FlushPlan.of(request, self._limits, received_s, self._slack_s)
        await asyncio.wait({ending}, timeout=plan.answer_until_s - received_s)
        return ending.result() if ending.done() else self._unknown_yet(request)

    def _unknown_yet(self, request: FlushRequest) -> Answer:
        message = "an earlier controller began this flush, and its ranks are being asked what became of it; ask again"
        return flush_answer(
            request, success=False, status="unavailable", message=message, http_status=503,
            started_at=self._clock.wall_text(), untouched_tiers=self._untouched(request),
        )  # fmt: skip

    def _replayed(self, request: FlushRequest, answer: Answer) -> Answer:
        self.count_ended()
        replayed = answer | {"replayed": True}
        self._note_flush(request, replayed)
        return replayed

    def _refused(self, request: FlushRequest, refused: Refuse) -> Answer:
        if refused.reason == "conflict":
            message = f"flush_id {request.flush_id!r} was used for a flush with other arguments"
            answer = refusal(Conflict(message, "flush_id"))
            self.note("flush", request.caller, {"flush_id": request.flush_id} | answer)
            return answer
        answer = flush_answer(
            request, success=False, status="in_progress", message=ALREADY_IN_PROGRESS, http_status=409,
            started_at=self._clock.wall_text(), untouched_tiers=self._untouched(request),
        )  # fmt: skip
        self.count_ended()
        self._count(request, answer)
        return answer | {"pending_flush_id": refused.other_id}

    def _tell_all(self, event: Event) -> None:
        for flight in list(self._flights):
            flight.handle(event)

    def _advance(self, answer: Answer) -> None:
        """Routers hear of the newest epoch that some rank has, and of the floor once every rank keeps to it."""
        has_swapped = any(row["status"] in ("flushed", "fenced") for row in answer["ranks"])
        self._roster.advance(answer["epoch"] if has_swapped else 0, self._log.state.promised)

    def count_ended(self) -> None:
        """Have every flush that was answered in the metrics and the audit log."""
        while self._uncounted:
            self._count(*self._uncounted.popleft())

    def _present_limits(self) -> FlushLimits:
        return replace(self._limits, max_len=max((record.max_len for record in self._roster.records()), default=None))

    def _untouched(self, request: FlushRequest) -> list[str]:
        return [tier for tier in self._limits.tiers if tier not in request.tiers]

    def _count(self, request: FlushRequest, answer: Answer) -> None:
        self._metrics.flush_ended(answer)
        self._note_flush(request, answer)
        if answer["success"] and answer["floor_raised"]:
            self._flushed_s = self._clock.now_s()

    def _note_flush(self, request: FlushRequest, answer: Answer) -> None:
        rows = [[row["rank"], row["incarnation"], row["status"]] for row in answer["ranks"]]
        facts = {key: answer[key] for key in _AUDITED} | {"timeout_s": request.timeout_s, "scope": _shown(request)}
        self._write_down("flush", request.caller, facts | {"ranks": rows})

    def _write_down(self, call: str, caller: str, facts: Mapping[str, Any]) -> None:
        self._audit.note({"call": call, "at": self._clock.wall_text(), "caller": caller} | dict(facts))

    def _under_way(self, flush_id: str) -> dict[str, Any] | None:
        flight = self._flight_of(flush_id)
        if flight is None:
            return None if self._closing_of(flush_id) is None else {"flush_id": flush_id, "status": "pending"}
        request, run = flight.request, flight.machine.run
        return {
            "flush_id": flush_id, "status": "pending", "mode": request.mode, "timeout_s": request.timeout_s,
            "caller": request.caller, "epoch": run.epoch, "floor_raised": run.is_floor_raised,
            "started_at": run.started_at, "superseded_by": run.superseded_by, "waiting_for": run.waiting_for,
        }  # fmt: skip

    # --- after a restart --------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Answers of the log, readable again; those of another boot have no age and are never replayed."""
        for flush in self._log.state.ended.values():
            is_this_boot = flush.boot_id == self._clock.boot_id
            self._book.end(flush.request, flush.answer, flush.boot_s if is_this_boot else float("-inf"))
            if is_this_boot and flush.answer["success"] and flush.answer["floor_raised"]:
                self._flushed_s = max(self._flushed_s or flush.boot_s, flush.boot_s)

    def end_interrupted(self) -> None:
        """Begin to end the flushes that an earlier controller left open.

        One whose floor is raised is finished: it cannot be taken back. Of the others each rank says what it did, or
        never will.
        """
        for index, intent in sorted(self._log.state.open_flushes.items()):
            self._book.take(intent.request)
            plan = self._plan_again(index, intent)
            run = FlushRun(intent.request, intent.started_at, self._clock.now_s())
            run.epoch = index if plan.takes_epoch else 0
            interrupted_rows(run, index, intent, self._log.state, self._roster)
            if plan.raises_floor_first:
                self._flight(plan, run).resume(index)
                continue
            run.sub_epoch = index if plan.takes_sub_epoch else 0
            run.takes_epoch = plan.takes_epoch
            closing = asyncio.create_task(self._close_one(index, intent, run), name=f"close-{intent.request.flush_id}")
            self._closing[intent.request.flush_id, index] = closing

    def _plan_again(self, index: int, intent: FlushIntent) -> FlushPlan:
        """Of a flush that is finished now. Answers are waited for as long as at first; but who ends or takes back
        requests does it by the deadline of its caller, if the clock that it began by is still the same."""
        plan = FlushPlan.of(intent.request, self._limits, self._clock.now_s(), self._slack_s)
        boot_id, begun_s = self._log.state.open_since.get(index, ("", 0.0))
        if intent.request.mode == "fence" or boot_id != self._clock.boot_id:
            return plan
        first = FlushPlan.of(intent.request, self._limits, begun_s, self._slack_s)
        return replace(plan, deadline_s=first.deadline_s, valid_until_s=first.valid_until_s)

    async def _close_one(self, index: int, intent: FlushIntent, run: FlushRun) -> Answer:
        """The answer, even if a fault of ours cuts it short: what follows is not refused because of it."""
        try:
            return await self._ask_and_store(index, intent, run)
        except Exception:
            log.exception("flush %s could not be closed", intent.request.flush_id)
            return self._failed(intent.request)
        finally:
            self._closing.pop((intent.request.flush_id, index), None)
            self._book.drop(intent.request)

    async def _ask_and_store(self, index: int, intent: FlushIntent, run: FlushRun) -> Answer:
        run.index = index
        await ask_what_became(run, self._roster, self._log.state.term)
        note = "interrupted by a restart of the controller: "
        answer = run.close(self._clock.now_s(), self._untouched(intent.request), note)
        floor = run.epoch if answer["floor_raised"] else 0
        stored = await self._log.append(FlushOutcome(index, floor, answer))
        if not isinstance(stored, Stored):
            return answer | {"success": False, "status": "unavailable", "message": stored.message, "http_status": 503}
        self._book.end(intent.request, answer, self._clock.now_s())
        self._advance(answer)
        self._count(intent.request, answer)
        return answer


def _shown(request: FlushRequest) -> str | None:
    """A scope in few words."""
    return None if request.scope is None else repr(request.scope)[:_MAX_SHOWN]
