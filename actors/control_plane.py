"""The controller's work without its actor: which ranks exist, and every operation that concerns all of them.

What a restart must not lose lies in the control log and is stored before anybody is told (protocol.md section 4). All
answers to callers are plain dicts; ranks, agents and Api processes, which have our code, get the classes of
actors.messages.
"""

from __future__ import annotations

import asyncio
import logging
import os
import secrets
from dataclasses import replace
from functools import partial
from typing import Any

from actors.audit_log import AuditLog
from actors.control_answers import all_answered, rank_row, request_ids_of, static_facts
from actors.control_log import Superseded
from actors.end_proofs import AgentEnd, EndProof, pause
from actors.flush_desk import FlushDesk
from actors.flush_request import FlushLimits, flag, refusal, seconds, text, whole_number
from actors.lease_book import LeaseBook
from actors.log_keeper import LogEvents, LogKeeper, Stored, Unstored
from actors.log_records import RankJoined, RankLeft
from actors.log_stores import LogStore
from actors.log_thread import LogWriter
from actors.membership import MembershipBook
from actors.messages import MESSAGE_VERSION, AbortCommand, LeaseAnswer, Membership, NodeRenewal, RankRecord, Registered
from actors.metrics import ControlMetrics
from actors.node_book import NodeBook
from actors.nodes import RENEWALS_PER_LEASE, Nodes
from actors.profile_desk import ProfileDesk
from actors.ray_errors import Answered, CallFailed, outcome_within
from actors.roster import Call, RankAnswer, Roster
from actors.surroundings import Surroundings
from configs.errors import ControlUnavailable, InvalidField, RankLost, RequestError, UnknownResource
from configs.schema import ControlSettings

log = logging.getLogger(__name__)

_STORE_TIMEOUT_S = 10.0
#: what a start waits for signs of life; living ranks answer in milliseconds
_FIRST_HELLO_S = 1.0
_MAX_POLL_S = 60.0
_MAX_ASK_S = 60.0
_MAX_AUDIT_ENTRIES = 1000
#: characters of what a door says of a call that it refused
_MAX_NOTED = 512
#: a node's first rank waits for its agent: a process that starts in 1 to 2 s
_NODE_TIMEOUT_S = 30.0
_HELLO_TIMEOUT_S = 1.0
#: of the controller that has begun the log
FIRST_TERM = 1
#: for answers to leave before the process of a superseded controller ends
_LAST_WORDS_S = 1.0


class ControlPlane:
    """Lives on one asyncio loop. `start` first; then all methods may be called at once by anybody."""

    def __init__(
        self,
        log_writer: LogWriter,
        audit_store: LogStore,
        settings: ControlSettings,
        around: Surroundings,
        metrics: ControlMetrics,
    ) -> None:
        self._around = around
        self._settings = settings
        self._metrics = metrics
        events = LogEvents(self._log_checked, self._superseded)
        self._log = LogKeeper(log_writer, around.clock, events)
        self._audit = AuditLog(audit_store, around.in_thread)
        self._limits = FlushLimits(settings.max_timeout_s, settings.step_grace_s, tiers=around.tiers)
        self._leases: LeaseBook
        self._nodes: Nodes
        self._roster: Roster
        self._desk: FlushDesk
        #: profiles over all ranks
        self.profiles: ProfileDesk
        self._ticking: asyncio.Task[None]
        self._checking: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Take over the log, find the ranks it names again, and end what an earlier controller left open.

        Raises ConfigError if the log cannot be read, OSError if it cannot be written.
        """
        around, settings = self._around, self._settings
        checked_s = await self._log.take_over(around.actor_id, around.cluster, settings.lease_s)
        state = self._log.state
        self._leases = LeaseBook(settings.lease_s, state.longest_lease_s, around.clock.now_s())
        self._leases.log_checked(checked_s)
        if state.term == FIRST_TERM and await around.has_elders():
            await self._outlast_leases()
        nodes = NodeBook(self._leases, around.node_id, around.clock.boot_id, around.is_one_machine)
        self._nodes = Nodes(nodes, state, around.clock, around.ensure_agent, self._node_changed, self._check_soon)
        book = MembershipBook(state.term, state.epoch, state.promised)
        self._roster = Roster(book, self._prove, self._on_gone)
        slack_s = settings.answer_slack_s
        self._desk = FlushDesk(
            self._roster, self._nodes, self._log, around.clock, self._limits, slack_s, self._metrics, self._audit
        )
        self.profiles = ProfileDesk(self._roster, self._new_profile_id, self._desk.note)
        for record in list(state.members.values()):
            if not self._roster.restore(record, await around.find_handle(record)):
                self._on_gone(record)
        # Before this an Api would read that no rank takes requests, and refuse those of its clients.
        await self._roster.until_asked(_FIRST_HELLO_S)
        self._metrics.epoch(state.epoch)
        self._desk.end_interrupted()
        self._nodes.ensure(around.node_id)
        self._ticking = asyncio.create_task(self._tick(), name="tick")
        self._ticking.add_done_callback(self._tick_ended)

    # --- for ranks, agents and Api processes ------------------------------------------------------------------------

    async def register(self, record: RankRecord, handle: Any) -> Registered:
        """Add an incarnation, then say what it needs before its first match. May be repeated.

        Waits until the rank's node has its first lease. Raises InvalidField on another message version, RankLost if no
        such process runs on this node, ControlUnavailable if the node gets no lease or the registration cannot be
        stored.
        """
        if record.message_version != MESSAGE_VERSION:
            message = f"rank speaks message version {record.message_version}, the controller {MESSAGE_VERSION}"
            raise InvalidField(message, "message_version")
        is_known = self._roster.book.record(record.incarnation) is not None
        is_news = self._roster.admit(record, handle)
        self._desk.registered(record)
        page = await self._nodes.ready(record.node_id, _NODE_TIMEOUT_S)
        if page is None:
            self._take_back(record, is_known)
            raise ControlUnavailable(f"node {record.node_id} has no lease: {self._nodes.book.refusal(record.node_id)}")
        if not is_known:
            record = replace(record, page_nonce=page.nonce)
            self._roster.renew(record)
        if is_news:
            await self._store_member(record, is_known)
        self._roster.answered(record.incarnation)
        self._desk.registered(record)
        state = self._log.state
        floor = state.floor_of(record.node_id)
        return Registered(state.term, state.lineage, state.epoch, floor, page, tuple(state.sub_epochs))

    async def renew(self, renewal: NodeRenewal, handle: Any) -> LeaseAnswer:
        """A node's agent asks for a lease; see actors.node_agent."""
        return self._nodes.renew(renewal, handle)

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

    async def cancel_flush(self, flush_id: object, caller: object) -> dict[str, Any]:
        """See ControllerActor.cancel_flush."""
        try:
            return await self._desk.cancel(text(flush_id, "flush_id"), text(caller, "caller"))
        except RequestError as error:
            return refusal(error)

    async def note_refused(self, call: object, arguments: object, message: object, param: object) -> None:
        """See ControllerActor.note_refused."""
        shown = arguments if isinstance(arguments, dict) else {}
        answer = refusal(InvalidField(str(message)[:_MAX_NOTED], None if param is None else str(param)[:_MAX_NOTED]))
        self._desk.note_refused(str(call)[:_MAX_NOTED], shown, answer)

    async def abort(
        self, request_id: object, everything: object, timeout_s: object, reason: object, caller: object = "job"
    ) -> dict[str, Any]:
        """See ControllerActor.abort."""
        try:
            request_ids = request_ids_of(request_id, flag(everything, "all"))
            within_s = seconds(timeout_s, "timeout_s", _MAX_ASK_S)
            words = text(reason, "reason")
            who = text(caller, "caller")
        except RequestError as error:
            answer = refusal(error)
            self._desk.note("abort", "", {"request_id": repr(request_id)[:200]} | answer)
            return answer
        calls = partial(self._abort_on, request_ids, words, self._around.clock.now_s() + within_s)
        rows, head = self._summary(await self._roster.ask_all(calls, within_s))
        num_aborted = sum(row.get("num_aborted", 0) for row in rows)
        self._desk.note("abort", who, {"request_ids": request_ids and request_ids[:16]} | head)
        return head | {"num_aborted": num_aborted, "ranks": rows}

    async def status(self, timeout_s: object) -> dict[str, Any]:
        """See ControllerActor.status."""
        try:
            within_s = seconds(timeout_s, "timeout_s", _MAX_ASK_S)
        except RequestError as error:
            return refusal(error)
        answers = await self._roster.ask_all(lambda _, handle: handle.status.remote(), within_s)
        rows, head = self._summary(answers)
        node_ids = {self._around.node_id, *(answer.record.node_id for answer in answers)}
        about = {"nodes": self._nodes.rows(node_ids), "host_tiers": self._nodes.host_rows(node_ids)}
        return head | self._control_facts() | {"ranks": rows} | about

    async def audit(self, limit: object, flush_id: object) -> dict[str, Any]:
        """See ControllerActor.audit."""
        try:
            number = whole_number(limit, "limit", _MAX_AUDIT_ENTRIES)
            wanted_id = None if flush_id is None else text(flush_id, "flush_id")
        except RequestError as error:
            return refusal(error)
        self._desk.count_ended()
        try:
            entries = await self._audit.read(number, lambda entry: wanted_id in (None, entry.get("flush_id")))
        except OSError as error:
            log.error("the audit log cannot be read: %s", error)
            return refusal(ControlUnavailable("the audit log cannot be read"))
        return {"success": True, "status": "ok", "message": "", "http_status": 200, "entries": entries}

    async def info(self) -> dict[str, Any]:
        """See ControllerActor.info."""
        ranks = [static_facts(record) for record in self._roster.records()]
        limits = {"max_timeout_s": self._limits.max_timeout_s, "step_grace_s": self._limits.step_grace_s}
        return {"success": True, "status": "ok"} | self._control_facts() | {"limits": limits, "ranks": ranks}

    async def hello(self) -> dict[str, Any]:
        """See ControllerActor.hello."""
        return {
            "pid": os.getpid(),
            "message_version": MESSAGE_VERSION,
            "node": self._around.node_id,
            "lineage": self._log.state.lineage,
            "term": self._log.state.term,
            "controller_restarts": self._log.state.num_restarts,
        }

    async def close(self) -> None:
        """Stop watching and writing."""
        self._ticking.cancel()
        self._desk.close()
        self._roster.close()
        self._nodes.close()
        await self._audit.close()
        self._log.close()

    # --- inside -----------------------------------------------------------------------------------------------------

    def _abort_on(
        self, request_ids: list[str] | None, reason: str, until_s: float, record: RankRecord, handle: Any
    ) -> Call:
        now_s = self._around.clock.now_s()
        boot_s = self._nodes.book.boot_s(record.node_id, now_s)
        if boot_s is None:
            return CallFailed("unavailable", "its node has not been heard of since the controller began")
        ids = None if request_ids is None else tuple(request_ids)
        valid_until_s = boot_s + until_s + self._settings.answer_slack_s - now_s
        return handle.abort.remote(AbortCommand(ids, reason, self._log.state.term, valid_until_s))

    def _summary(self, answers: list[RankAnswer]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
        """The rows and the head of an answer about all ranks; a lost node does not make it a failure for ever."""
        now_s = self._around.clock.now_s()
        nodes = {answer.record.node_id for answer in answers}
        expired = {node_id for node_id in nodes if self._leases.is_over(node_id, now_s)}
        return [rank_row(answer, self._roster, expired) for answer in answers], all_answered(answers, expired)

    async def _store_member(self, record: RankRecord, is_known: bool) -> None:
        """Store what an incarnation says of itself. If that fails a new one is taken back and registers anew."""
        appending = self._log.append(RankJoined(record))
        await asyncio.wait({appending}, timeout=_STORE_TIMEOUT_S)
        stored = appending.result() if appending.done() else Unstored("the control log did not answer in time")
        if isinstance(stored, Stored):
            return
        self._take_back(record, is_known)
        raise ControlUnavailable(f"the registration of rank {record.rank} could not be stored: {stored.message}")

    def _take_back(self, record: RankRecord, is_known: bool) -> None:
        if not is_known:
            self._roster.forget(record.incarnation)

    def _prove(self, record: RankRecord) -> EndProof:
        if record.node_id != self._around.node_id:
            return AgentEnd(self._nodes, record)
        proof = self._around.find_process(record)
        if proof is None:
            raise RankLost(f"incarnation {record.incarnation}: no process {record.pid} runs on this node")
        return proof

    def _on_gone(self, record: RankRecord) -> None:
        self._desk.gone(record)
        # not stored: the next controller finds the process gone just as this one did
        self._log.append(RankLeft(record.incarnation))

    def _node_changed(self, node_id: str) -> None:
        self._desk.node_changed(node_id)

    def _log_checked(self, begun_s: float) -> None:
        self._leases.log_checked(begun_s)

    async def _outlast_leases(self) -> None:
        """The log was lost while ranks live: it names none of them, so a success would say nothing of those that still
        have a lease and do not register in time. Nothing is answered before no lease can run any more."""
        left_s = self._leases.earlier_over_s - self._around.clock.now_s()
        log.error("the control log was lost: this controller waits %.1f s for the end of all earlier leases", left_s)
        await pause(left_s)

    def _check_soon(self) -> None:
        """Somebody obeys a higher term: the log will say whose."""
        self._checking = asyncio.ensure_future(self._log.check())

    def _superseded(self, reason: Superseded) -> None:
        """Another controller decides from now on: grant nothing, and end."""
        log.error("this controller ends: %s", reason)
        self._leases.forbid()
        asyncio.get_running_loop().call_later(_LAST_WORDS_S, self._around.end_process)

    def _new_profile_id(self) -> str:
        """Sorts by time, and is like no other."""
        digits = "".join(char for char in self._around.clock.wall_text()[:19] if char.isdigit())
        return f"{digits}-{secrets.token_hex(3)}"

    def _control_facts(self) -> dict[str, Any]:
        state = self._log.state
        return {
            "lineage": state.lineage,
            "term": state.term,
            "epoch": state.epoch,
            "floor": state.floor,
            "tiers": list(self._limits.tiers),
            "pending_flush": self._desk.pending(),
            "controller_restarts": state.num_restarts,
        }

    async def _tick(self) -> None:
        """What is due without an event."""
        while True:
            await self._log.check()
            self._log.tidy()
            for node_id in sorted({record.node_id for record in self._roster.records()}):
                self._nodes.ensure(node_id)
            await self._learn_pages()
            self._report()
            await pause(self._settings.lease_s / RENEWALS_PER_LEASE)

    def _tick_ended(self, done: asyncio.Task[None]) -> None:
        """Without it no lease is given any more; a controller in that state must not look alive."""
        if not done.cancelled():
            log.critical("the controller ends: its timer has failed", exc_info=done.exception())
            self._around.end_process()

    async def _learn_pages(self) -> None:
        """Ask the ranks that are not known to read their node's present page which one they read."""
        strangers = [record for record in self._roster.settled_records() if self._reads_another_page(record)]
        asking = [asyncio.create_task(self._learn_page(record)) for record in strangers]
        if asking:
            await asyncio.wait(asking)

    def _reads_another_page(self, record: RankRecord) -> bool:
        page = self._nodes.book.page(record.node_id)
        return page is not None and page.nonce != record.page_nonce

    async def _learn_page(self, record: RankRecord) -> None:
        handle = self._roster.handle(record.incarnation)
        if handle is None:
            return
        # the tick goes on after this, and the log has to be read within a lease
        within_s = min(_HELLO_TIMEOUT_S, self._settings.lease_s / RENEWALS_PER_LEASE)
        hello = await outcome_within(handle.hello.remote(), within_s)
        if isinstance(hello, Answered) and hello.value["page_nonce"] not in (0, record.page_nonce):
            newest = replace(record, page_nonce=hello.value["page_nonce"])
            if self._roster.renew(newest):
                self._log.append(RankJoined(newest))

    def _report(self) -> None:
        """Metrics that change without an event."""
        num_serving = len(self._roster.book.view().members)
        self._metrics.ranks(num_serving, len(self._roster.records()) - num_serving)
        self._metrics.floor(self._log.state.floor)
        nodes = self._nodes.rows({record.node_id for record in self._roster.records()})
        num_leased = sum(node["has_lease"] for node in nodes)
        self._metrics.nodes(num_leased, len(nodes) - num_leased)
        since_s = self._desk.seconds_since_flush()
        if since_s is not None:
            self._metrics.seconds_since_flush(since_s)
