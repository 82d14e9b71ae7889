"""The controller's work without its actor: which ranks exist, and every operation that concerns all of them.

What a restart must not lose lies in the control log and is stored before anybody is told (protocol.md section 4). All
answers to callers are plain dicts; ranks and Api processes, which have our code, get the classes of actors.messages.
"""

from __future__ import annotations

import asyncio
import os
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from actors.clock import Clock
from actors.control_log import ControlLog, Superseded
from actors.flush_desk import FlushDesk
from actors.flush_request import FlushLimits, flag, refusal, seconds, text
from actors.log_records import LogState, RankJoined, RankLeft
from actors.log_stores import LogStore
from actors.log_thread import LogThread
from actors.membership import MembershipBook
from actors.messages import MESSAGE_VERSION, Membership, RankRecord, Registered
from actors.metrics import ControlMetrics
from actors.ray_errors import Answered
from actors.roster import RankAnswer, Roster
from configs.errors import ControlUnavailable, InvalidField, RequestError, UnknownResource
from configs.schema import ControlSettings

_STORE_TIMEOUT_S = 10.0
#: what a start waits for signs of life; living ranks answer in milliseconds
_FIRST_HELLO_S = 1.0
_MAX_POLL_S = 60.0
_MAX_ASK_S = 60.0
_METRICS_PERIOD_S = 5.0


@dataclass(frozen=True, slots=True)
class Surroundings:
    """What the controller needs of the world; Ray in production, plain values in tests."""

    clock: Clock
    #: Ray's id of this actor, the same over its restarts
    actor_id: str
    #: Ray's name of this cluster
    cluster: str
    #: node of this process
    node_id: str
    #: actor handle of a registered rank, None if Ray knows none; blocks
    find_handle: Callable[[RankRecord], Any]


class ControlPlane:
    """Lives on one asyncio loop. `start` first; then all methods may be called at once by anybody."""

    def __init__(
        self, store: LogStore, settings: ControlSettings, around: Surroundings, metrics: ControlMetrics
    ) -> None:
        self._around = around
        self._settings = settings
        self._metrics = metrics
        self._log = LogThread(ControlLog(store, around.clock))
        self._limits = FlushLimits(settings.max_timeout_s, settings.step_grace_s, tiers=("device",))
        self._closed = asyncio.Event()
        self._state: LogState
        self._roster: Roster
        self._desk: FlushDesk
        self._reporting: asyncio.Task[None]

    async def start(self) -> None:
        """Take over the log, find the ranks it names again, and end what an earlier controller left open.

        Raises ConfigError if the log cannot be read, OSError if it cannot be written.
        """
        around = self._around
        state = self._state = await self._log.take_over(around.actor_id, around.cluster)
        self._roster = Roster(MembershipBook(state.term, state.epoch, state.floor), around.node_id, self._on_gone)
        self._desk = FlushDesk(
            self._roster, self._log, state, self._limits, around.clock, self._metrics, self._settings.answer_slack_s
        )
        for record in list(state.members.values()):
            handle = await asyncio.to_thread(around.find_handle, record)
            if not self._roster.restore(record, handle):
                self._on_gone(record)
        # Before this an Api would read that no rank takes requests, and refuse those of its clients.
        await self._roster.until_asked(_FIRST_HELLO_S)
        self._metrics.epoch(state.epoch)
        self._desk.close_interrupted()
        self._reporting = asyncio.create_task(self._report(), name="metrics")

    # --- for ranks and Api processes --------------------------------------------------------------------------------

    async def register(self, record: RankRecord, handle: Any) -> Registered:
        """Add an incarnation, then say what it needs before its first match. May be repeated.

        Raises InvalidField on another message version, RankLost if no such process runs on this node,
        ControlUnavailable if the registration cannot be stored.
        """
        if record.message_version != MESSAGE_VERSION:
            message = f"rank speaks message version {record.message_version}, the controller {MESSAGE_VERSION}"
            raise InvalidField(message, "message_version")
        was_known = self._roster.book.record(record.incarnation) is not None
        is_news = self._roster.admit(record, handle)
        self._desk.registered(record)
        if is_news:
            await self._store_member(record, was_known)
        state = self._state
        return Registered(term=state.term, lineage=state.lineage, epoch=state.epoch, floor=state.floor)

    async def membership(self, known_version: int, timeout_s: float) -> Membership:
        """The ranks that take requests: at once if `known_version` is not the present one, else at the next change,
        at the latest after `timeout_s`."""
        return await self._roster.changed(known_version, seconds(timeout_s, "timeout_s", _MAX_POLL_S))

    # --- for everybody, jobs included: plain data only --------------------------------------------------------------

    async def flush(self, **arguments: object) -> dict[str, Any]:
        """See ControllerActor.flush."""
        return await self._desk.flush(arguments, make_id=lambda: f"flush-{secrets.token_hex(8)}")

    async def flush_status(self, flush_id: object) -> dict[str, Any]:
        """See ControllerActor.flush_status."""
        try:
            known = self._desk.read(text(flush_id, "flush_id"))
        except RequestError as error:
            return refusal(error)
        return known or refusal(UnknownResource(f"no flush {flush_id!r} is known", "flush_id"))

    async def abort(self, request_id: object, everything: object, timeout_s: object, reason: object) -> dict[str, Any]:
        """See ControllerActor.abort."""
        try:
            request_ids = _request_ids(request_id, flag(everything, "all"))
            within_s = seconds(timeout_s, "timeout_s", _MAX_ASK_S)
            words = text(reason, "reason")
        except RequestError as error:
            return refusal(error)
        answers = await self._roster.ask_all("abort", request_ids, words, timeout_s=within_s)
        rows = [self._row(answer) for answer in answers]
        num_aborted = sum(row.get("num_aborted", 0) for row in rows)
        return _all_answered(answers) | {"num_aborted": num_aborted, "ranks": rows}

    async def status(self, timeout_s: object) -> dict[str, Any]:
        """See ControllerActor.status."""
        try:
            within_s = seconds(timeout_s, "timeout_s", _MAX_ASK_S)
        except RequestError as error:
            return refusal(error)
        answers = await self._roster.ask_all("status", timeout_s=within_s)
        return _all_answered(answers) | self._control_facts() | {"ranks": [self._row(answer) for answer in answers]}

    async def info(self) -> dict[str, Any]:
        """See ControllerActor.info."""
        ranks = [_static_facts(record) for record in self._roster.records()]
        limits = {"max_timeout_s": self._limits.max_timeout_s, "step_grace_s": self._limits.step_grace_s}
        return {"success": True, "status": "ok"} | self._control_facts() | {"limits": limits, "ranks": ranks}

    async def hello(self) -> dict[str, Any]:
        """See ControllerActor.hello."""
        return {
            "pid": os.getpid(),
            "message_version": MESSAGE_VERSION,
            "node": self._around.node_id,
            "lineage": self._state.lineage,
            "term": self._state.term,
            "controller_restarts": self._state.num_restarts,
        }

    async def close(self) -> None:
        """Stop watching and writing."""
        self._closed.set()
        self._reporting.cancel()
        self._roster.close()
        self._log.close()

    # --- inside -----------------------------------------------------------------------------------------------------

    async def _store_member(self, record: RankRecord, was_known: bool) -> None:
        """Store what an incarnation says of itself. If that fails a new one is taken back and registers anew."""
        appending = self._log.append(RankJoined(record))
        await asyncio.wait({appending}, timeout=_STORE_TIMEOUT_S)
        try:
            if appending.done():
                appending.result()
                return
            reason = "the control log did not answer in time"
        except (Superseded, OSError) as error:
            reason = str(error)
        if not was_known:
            self._roster.forget(record.incarnation)
        raise ControlUnavailable(f"the registration of rank {record.rank} could not be stored: {reason}")

    def _on_gone(self, record: RankRecord) -> None:
        self._desk.gone(record)
        self._state.past[record.incarnation] = record
        leaving = self._log.append(RankLeft(record.incarnation))
        # not stored: the next controller finds the process gone just as this one did
        leaving.add_done_callback(lambda done: done.exception())

    def _control_facts(self) -> dict[str, Any]:
        state = self._state
        return {
            "lineage": state.lineage,
            "term": state.term,
            "epoch": state.epoch,
            "floor": state.floor,
            "tiers": list(self._limits.tiers),
            "pending_flush": self._desk.pending(),
            "controller_restarts": state.num_restarts,
        }

    def _row(self, answer: RankAnswer) -> dict[str, Any]:
        """What a rank said of itself, under what the controller knows of it."""
        record = answer.record
        said = dict(answer.outcome.value or {}) if isinstance(answer.outcome, Answered) else {}
        known = record.incarnation in {present.incarnation for present in self._roster.records()}
        state = self._roster.book.state(record.incarnation) if known else "gone"
        if isinstance(answer.outcome, Answered):
            about = {"status": state, "message": ""}
        else:
            about = {"status": "gone" if state == "gone" else "unreachable", "message": answer.outcome.message}
        return said | {
            "rank": record.rank,
            "incarnation": record.incarnation,
            "node": record.node_id,
            "pid": record.pid,
        } | about  # fmt: skip

    async def _report(self) -> None:
        """Metrics that change without an event."""
        while not self._closed.is_set():
            records = self._roster.records()
            num_serving = len(self._roster.book.view().members)
            self._metrics.ranks(num_serving, len(records) - num_serving)
            since_s = self._desk.seconds_since_flush()
            if since_s is not None:
                self._metrics.seconds_since_flush(since_s)
            waiting = asyncio.ensure_future(self._closed.wait())
            await asyncio.wait({waiting}, timeout=_METRICS_PERIOD_S)
            waiting.cancel()


def _request_ids(request_id: object, everything: bool) -> list[str] | None:
    """The ids to abort; None: all. Raises InvalidField unless exactly one of the two was asked for."""
    if everything == (request_id is not None):
        raise InvalidField("give either request_id or all=true", "request_id")
    if everything:
        return None
    ids = request_id if isinstance(request_id, list | tuple) else [request_id]
    return [text(one, "request_id") for one in ids]


def _all_answered(answers: list[RankAnswer]) -> dict[str, Any]:
    """Head of an answer about all ranks."""
    silent = [answer.record.rank for answer in answers if not isinstance(answer.outcome, Answered)]
    if not answers:
        return {"success": False, "status": "no_ranks", "message": "no rank is registered", "http_status": 503}
    if silent:
        message = f"no answer from rank {', '.join(map(str, silent))}"
        return {"success": False, "status": "unreachable", "message": message, "http_status": 503}
    return {"success": True, "status": "ok", "message": "", "http_status": 200}


def _static_facts(record: RankRecord) -> dict[str, Any]:
    return {
        "rank": record.rank,
        "incarnation": record.incarnation,
        "node": record.node_id,
        "gpu_ids": list(record.gpu_ids),
        "actor_name": record.actor_name,
        "layout_digest": record.layout_digest,
        "weights_digest": record.weights_digest,
        "weight_version": record.weight_version,
        "page_size": record.page_size,
        "num_pages": record.num_pages,
        "bytes_per_page": record.bytes_per_page,
        "max_running": record.max_running,
        "max_len": record.max_len,
    }
