"""Carries flushes out: stores the intent, tells the ranks, collects, stores the outcome, answers on time.

What a flush means and when it succeeded is decided in `flush_run` and `flush_book`, which know neither clocks nor
actors; here is only what has to wait.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Mapping
from dataclasses import dataclass
from typing import Any

from actors.clock import Clock
from actors.control_log import Superseded
from actors.flush_book import Begin, FlushBook, Join, Refuse, Reread
from actors.flush_recovery import ask_what_became, interrupted_run
from actors.flush_request import FlushLimits, FlushRequest, parse_flush, refusal
from actors.flush_run import Answer, FlushRun, flush_answer
from actors.log_records import FlushIntent, FlushOutcome, LogState
from actors.log_thread import LogThread
from actors.messages import RankRecord
from actors.metrics import ControlMetrics
from actors.ray_errors import Answered, CallFailed, outcome_of
from actors.roster import Roster
from configs.errors import Conflict, RequestError
from engine.flush import ALREADY_IN_PROGRESS, FlushCommand

log = logging.getLogger(__name__)

# Nobody waits for the outcome of a flush that was cut short; a store that is slow at start may take its time.
_CLOSE_STORE_S = 10.0
# Of the answer's slack all but a tenth may be waited for: by the intent, then the verdicts, which leave the ranks at
# the deadline, then the outcome. Of what the intent has left over the verdicts may use a little more than half.
_WAIT_SHARE = 0.9
_COLLECT_SHARE = 0.55
#: of the budget, kept back for a verdict's way from rank to controller: 2 ms on an idle machine, 30 where all compute
_WAY_BACK_S = 0.02
_WAY_BACK_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class _Stored:
    index: int


@dataclass(frozen=True, slots=True)
class _NotStored:
    message: str


class FlushDesk:
    """All flushes of one controller; one at a time."""

    def __init__(
        self,
        roster: Roster,
        log_thread: LogThread,
        state: LogState,
        limits: FlushLimits,
        clock: Clock,
        metrics: ControlMetrics,
        answer_slack_s: float,
    ) -> None:
        """state: the log as it was taken over; epoch and floor are kept up to date here."""
        self._roster = roster
        self._log = log_thread
        self._state = state
        self._limits = limits
        self._clock = clock
        self._metrics = metrics
        self._slack_s = answer_slack_s
        self._book = FlushBook()
        self._run: FlushRun | None = None
        #: deadline of the current run by the clock, once its ranks are being told; None before
        self._telling_until_s: float | None = None
        self._settled = asyncio.Event()
        self._running: asyncio.Task[Answer] | None = None
        self._legs: set[asyncio.Task[None]] = set()
        self._flushed_s: float | None = None
        self._restore()

    # --- what callers see -------------------------------------------------------------------------------------------

    async def flush(self, arguments: Mapping[str, object], make_id: Any) -> Answer:
        """One flush, from its arguments to its answer; see actors.controller.ControllerActor.flush."""
        received_s = self._clock.now_s()
        try:
            request = parse_flush(arguments, self._limits, make_id)
        except RequestError as error:
            return refusal(error)
        match self._book.admit(request, received_s):
            case Reread(answer):
                return answer | {"replayed": True}
            case Refuse() as refused:
                return self._refused(request, refused)
            case Join():
                assert self._running is not None, "a flush is pending that nobody carries out"
                return await asyncio.shield(self._running) | {"replayed": True}
            case Begin():
                carrying = self._to_its_end(request, self._carry_out(request, received_s))
                self._running = asyncio.create_task(carrying, name=request.flush_id)
                # a caller that hangs up does not cancel its flush
                return await asyncio.shield(self._running)

    def read(self, flush_id: str) -> Answer | None:
        """The answer of an ended flush, late verdicts included; of the pending one, how far it is."""
        ended = self._book.read(flush_id)
        return ended if ended is not None else self._pending_as_plain(flush_id)

    def pending(self) -> dict[str, Any] | None:
        """The pending flush as plain data; None if there is none."""
        return None if self._book.pending is None else self._pending_as_plain(self._book.pending.flush_id)

    def seconds_since_flush(self) -> float | None:
        """Since the last success of a flush of everything in this controller's life."""
        return None if self._flushed_s is None else self._clock.now_s() - self._flushed_s

    # --- what happens to ranks meanwhile ----------------------------------------------------------------------------

    def registered(self, record: RankRecord) -> None:
        """An incarnation was added to the roster; it is going to be told the newest epoch."""
        run = self._run
        if run is None or run.has(record.incarnation):
            return
        if record.is_empty and run.is_begun:
            run.joined(record)
            return
        run.expect(record)
        if self._telling_until_s is not None:
            self._tell(run, record.incarnation, self._telling_until_s)

    def gone(self, record: RankRecord) -> None:
        """An incarnation's process is proven gone."""
        if self._run is not None:
            self._run.gone(record.incarnation)
            self._note_progress(self._run)

    # --- one flush --------------------------------------------------------------------------------------------------

    async def _carry_out(self, request: FlushRequest, received_s: float) -> Answer:
        deadline_s = received_s + request.budget_s(self._limits.step_grace_s)
        run = self._run = FlushRun(request, self._clock.wall_text(), received_s)
        run.takes_epoch = request.takes_epoch(self._limits)
        for record in self._roster.records():
            run.expect(record)
        return await self._from_intent_to_answer(run, deadline_s)

    async def _to_its_end(self, request: FlushRequest, carrying: Awaitable[Answer]) -> Answer:
        """The answer, even if a fault of ours cuts the flush short: no exception crosses a job's border, and what
        follows is not refused because of a flush that nobody carries out any more."""
        try:
            return await carrying
        except Exception:
            log.exception("flush %s was cut short", request.flush_id)
            return flush_answer(
                request, success=False, status="unavailable", message="the controller failed; its log says why",
                http_status=500, started_at=self._clock.wall_text(), untouched_tiers=self._untouched(request),
            )  # fmt: skip
        finally:
            self._run = self._telling_until_s = None
            self._book.drop(request)

    async def _from_intent_to_answer(self, run: FlushRun, deadline_s: float) -> Answer:
        if run.is_settled:
            return self._not_begun(run, "no_ranks", "no rank is registered: nothing was flushed")
        intent = FlushIntent(run.request, run.takes_epoch, tuple(run.waiting_for), run.started_at)
        until_s = deadline_s + _WAIT_SHARE * self._slack_s
        appending = self._log.append(intent)
        match await self._stored(appending, until_s):
            case _NotStored(message):
                answer = self._not_begun(run, "unavailable", f"{message}; no rank was told to flush")
                self._close_when_stored(appending, answer)
                return answer
            case _Stored(index):
                self._begin(run, index, deadline_s)
                begun_s = max(self._clock.now_s(), deadline_s)
                await self._until_settled(begun_s + _COLLECT_SHARE * (until_s - begun_s))
                return await self._end(run, index, until_s)

    def _begin(self, run: FlushRun, index: int, deadline_s: float) -> None:
        """The intent is stored: from here on ranks are told, those too that register meanwhile."""
        run.index = index
        if run.takes_epoch:
            run.epoch = self._state.epoch = index
            self._metrics.epoch(index)
        run.is_begun = True
        self._telling_until_s = deadline_s
        self._settled.clear()
        for incarnation in run.waiting_for:
            self._tell(run, incarnation, deadline_s)
        self._note_progress(run)

    def _tell(self, run: FlushRun, incarnation: str, deadline_s: float) -> None:
        leg = asyncio.create_task(self._leg(run, incarnation, deadline_s), name=f"flush-{incarnation}")
        self._legs.add(leg)
        leg.add_done_callback(self._legs.discard)

    async def _leg(self, run: FlushRun, incarnation: str, deadline_s: float) -> None:
        """Tell one rank and wait for its verdict, however late it comes."""
        is_final = not self._roster.can_prove(incarnation)
        handle = self._roster.handle(incarnation)
        if handle is None:
            run.failed(incarnation, "Ray knows no actor of this incarnation", is_final)
        else:
            command = self._command(run, _budget_of_a_rank(deadline_s - self._clock.now_s()))
            match await outcome_of(handle.flush.remote(command)):
                case Answered(verdict):
                    run.answered(incarnation, verdict)
                case CallFailed(kind, message):
                    run.failed(incarnation, message, is_final or kind == "error")
        self._note_progress(run)

    def _command(self, run: FlushRun, budget_s: float) -> FlushCommand:
        request = run.request
        return FlushCommand(
            flush_id=request.flush_id,
            mode=request.mode,
            tiers=request.tiers,
            epoch=run.epoch,
            term=self._state.term,
            budget_s=budget_s,
            timeout_s=request.timeout_s,
            scope=request.scope,
            dry_run=request.dry_run,
            index=run.index,
        )

    def _note_progress(self, run: FlushRun) -> None:
        if run is self._run and run.is_settled:
            self._settled.set()
        elif run.late:
            self._book.keep_late(run.request.flush_id, run.late)

    async def _until_settled(self, until_s: float) -> None:
        waiting = asyncio.ensure_future(self._settled.wait())
        await asyncio.wait({waiting}, timeout=max(0.0, until_s - self._clock.now_s()))
        waiting.cancel()

    async def _end(self, run: FlushRun, index: int, until_s: float, note: str = "") -> Answer:
        """Fix the answer, store it, and only then call it a success."""
        answer = run.close(self._clock.now_s(), self._untouched(run.request), note)
        floor = run.epoch if answer["floor_raised"] else 0
        if any(row["status"] == "flushed" for row in answer["ranks"]):
            self._roster.advance(run.epoch, 0)
        appending = self._log.append(FlushOutcome(index, floor, answer))
        told = answer
        match await self._stored(appending, until_s):
            case _Stored():
                self._raise_floor(floor)
            case _NotStored(message) if answer["success"]:
                told = answer | {
                    "success": False, "status": "unavailable", "http_status": 503, "floor_raised": False,
                    "message": f"every rank has flushed, but {message}",
                }  # fmt: skip
                self._book_when_stored(appending, run.request, answer, floor)
        self._book.end(run.request, told, self._clock.now_s())
        self._count(told)
        return told

    def _raise_floor(self, floor: int) -> None:
        self._state.floor = max(self._state.floor, floor)
        self._roster.advance(0, self._state.floor)

    async def _stored(self, appending: asyncio.Future[int], until_s: float) -> _Stored | _NotStored:
        """Wait for a record to be stored. The append goes on when the wait ends."""
        await asyncio.wait({appending}, timeout=max(0.0, until_s - self._clock.now_s()))
        if not appending.done():
            return _NotStored("the control log did not answer in time")
        try:
            return _Stored(appending.result())
        except Superseded as reason:
            return _NotStored(str(reason))
        except OSError as error:
            log.error("the control log cannot be written: %s", error)
            return _NotStored("the control log cannot be written")

    def _close_when_stored(self, appending: asyncio.Future[int], answer: Answer) -> None:
        """The intent may be stored yet: then its outcome says that nothing was done."""

        def close(done: asyncio.Future[int]) -> None:
            if done.exception() is None:
                _ignore_failure(self._log.append(FlushOutcome(done.result(), 0, answer)))

        appending.add_done_callback(close)

    def _book_when_stored(
        self, appending: asyncio.Future[int], request: FlushRequest, answer: Answer, floor: int
    ) -> None:
        """The outcome may be stored yet: then a repeat of the id reads the success."""

        def book(done: asyncio.Future[int]) -> None:
            if done.exception() is None:
                self._raise_floor(floor)
                self._book.end(request, answer, self._clock.now_s())

        appending.add_done_callback(book)

    def _not_begun(self, run: FlushRun, status: str, message: str) -> Answer:
        took_ms = (self._clock.now_s() - run.started_s) * 1000
        answer = flush_answer(
            run.request, success=False, status=status, message=message, http_status=503, started_at=run.started_at,
            took_ms=took_ms, ranks=run.not_told(f"It was not told: {message}"),
            untouched_tiers=self._untouched(run.request),
        )  # fmt: skip
        self._count(answer)
        return answer

    def _refused(self, request: FlushRequest, refused: Refuse) -> Answer:
        if refused.reason == "conflict":
            message = f"flush_id {request.flush_id!r} was used for a flush with other arguments"
            return refusal(Conflict(message, "flush_id"))
        answer = flush_answer(
            request, success=False, status="in_progress", message=ALREADY_IN_PROGRESS, http_status=409,
            started_at=self._clock.wall_text(), untouched_tiers=self._untouched(request),
        )  # fmt: skip
        self._count(answer)
        return answer | {"pending_flush_id": refused.other_id}

    def _untouched(self, request: FlushRequest) -> list[str]:
        return [tier for tier in self._limits.tiers if tier not in request.tiers]

    def _count(self, answer: Answer) -> None:
        self._metrics.flush_ended(answer)
        if answer["floor_raised"]:
            self._flushed_s = self._clock.now_s()

    def _pending_as_plain(self, flush_id: str) -> dict[str, Any] | None:
        run = self._run
        if run is None or run.request.flush_id != flush_id:
            return None
        request = run.request
        return {
            "flush_id": request.flush_id, "status": "pending", "mode": request.mode, "timeout_s": request.timeout_s,
            "caller": request.caller, "epoch": run.epoch, "started_at": run.started_at, "waiting_for": run.waiting_for,
        }  # fmt: skip

    # --- after a restart --------------------------------------------------------------------------------------------

    def _restore(self) -> None:
        """Answers of the log, readable again; those of another boot have no age and are never replayed."""
        for flush in self._state.ended.values():
            is_this_boot = flush.boot_id == self._clock.boot_id
            self._book.end(flush.request, flush.answer, flush.boot_s if is_this_boot else float("-inf"))

    def close_interrupted(self) -> None:
        """Begin to end the flushes that an earlier controller left open: each rank says what it did, or never will."""
        interrupted = sorted(self._state.open_flushes.items())
        self._state.open_flushes.clear()
        if interrupted:
            self._book.pending = interrupted[-1][1].request
            self._running = asyncio.create_task(self._close_all(interrupted), name="close-interrupted")

    async def _close_all(self, interrupted: list[tuple[int, FlushIntent]]) -> Answer:
        answer: Answer = {}
        for index, intent in interrupted:
            answer = await self._to_its_end(intent.request, self._close_one(index, intent))
        return answer

    async def _close_one(self, index: int, intent: FlushIntent) -> Answer:
        run = self._run = interrupted_run(index, intent, self._state.past, self._roster, self._clock.now_s())
        await ask_what_became(run, self._roster, self._state.term)
        until_s = self._clock.now_s() + _CLOSE_STORE_S
        return await self._end(run, index, until_s, "interrupted by a restart of the controller: ")


def _ignore_failure(future: Awaitable[int]) -> None:
    """Its failure is logged by nobody on purpose: the next append of a flush tells it."""
    asyncio.ensure_future(future).add_done_callback(lambda done: done.cancelled() or done.exception())


def _budget_of_a_rank(left_s: float) -> float:
    """What a rank may use of the time that is left: its verdict must still get here, on a machine that is busy."""
    return max(0.0, left_s - min(_WAY_BACK_S, _WAY_BACK_SHARE * left_s))
