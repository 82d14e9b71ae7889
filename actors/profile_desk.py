"""Profiles over all ranks: started everywhere or nowhere, stopped with a row for each, their traces found again."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from actors.control_answers import all_answered
from actors.flush_request import refusal, text
from actors.profile_request import parse_profile
from actors.ray_errors import Answered
from actors.roster import RankAnswer, Roster
from configs.errors import InvalidField, RequestError, UnknownResource

#: beside its steps a rank imports what torch's profiler needs, once
_START_S = 60.0
#: a trace of 1000 steps with stacks is some 100 MB of JSON
_STOP_S = 300.0
_LIST_S = 10.0
_READ_S = 30.0
#: what a rank says of a start or stop -> status and code of the whole; the first that some rank has names it
_FAILURES = {"refused": 400, "in_progress": 409, "failed": 500}

Note = Callable[[str, str, Mapping[str, Any]], None]


class ProfileDesk:
    """Lives on the controller's loop."""

    def __init__(self, roster: Roster, make_id: Callable[[], str], note: Note) -> None:
        """make_id: a new id, unlike every other. note: writes to the audit log."""
        self._roster = roster
        self._make_id = make_id
        self._note = note
        #: one start or stop at a time, so that no start is undone by another's
        self._turn = asyncio.Lock()

    async def start(self, arguments: object, caller: object = "job") -> dict[str, Any]:
        """See ControllerActor.start_profile."""
        try:
            who = text(caller, "caller")
            spec = parse_profile(arguments, self._make_id)
        except RequestError as error:
            return self._noted("start_profile", "", refusal(error))
        async with self._turn:
            answers = await self._roster.ask_all(lambda _, handle: handle.start_profile.remote(spec), _START_S)
            rows = [_row(answer, "started") for answer in answers]
            started = {row["incarnation"] for row in rows if row["status"] == "started"}
            answer = _summary(answers, rows, "started", "Start profiling.")
            if started and not answer["success"]:
                await self._undo(spec.profile_id, started)
                answer["message"] += " No rank profiles now."
        return self._noted("start_profile", who, answer | {"profile_id": spec.profile_id, "ranks": rows})

    async def stop(self, caller: object = "job") -> dict[str, Any]:
        """See ControllerActor.stop_profile."""
        try:
            who = text(caller, "caller")
        except RequestError as error:
            return refusal(error)
        async with self._turn:
            answers = await self._roster.ask_all(lambda _, handle: handle.stop_profile.remote(None), _STOP_S)
        rows = [_row(answer, "written") for answer in answers]
        running = [row for row in rows if row["status"] != "not_running"]
        if rows and not running:
            answer = {"success": False, "status": "not_running", "message": rows[0]["message"], "http_status": 409}
        else:
            # a rank that came after the start has nothing to stop
            kept = [answer for answer, row in zip(answers, rows, strict=True) if row["status"] != "not_running"]
            answer = _summary(kept, running, "written", "Stop profiling. The traces are written.")
        ids = sorted({row["profile_id"] for row in running if row.get("profile_id")})
        return self._noted("stop_profile", who, answer | {"profile_id": ids[0] if ids else "", "ranks": rows})

    async def traces(self) -> dict[str, Any]:
        """See ControllerActor.profiles."""
        answers = await self._roster.ask_all(lambda _, handle: handle.list_profiles.remote(), _LIST_S)
        running = {answer.record.rank: said["running_id"] for answer, said in _said(answers) if said["running_id"]}
        traces: dict[tuple[str, str], dict[str, Any]] = {}
        for answer, said in _said(answers):
            for trace in said["traces"]:
                # ranks of a node see each other's files
                where = {"node": answer.record.node_id, "incarnation": answer.record.incarnation}
                traces.setdefault((answer.record.node_id, trace["name"]), trace | where)
        newest_first = sorted(traces.values(), key=lambda trace: (-trace["modified_s"], trace["name"]))
        in_words = {str(rank): profile_id for rank, profile_id in sorted(running.items())}
        return all_answered(answers) | {"running": in_words, "traces": newest_first}

    async def read(self, incarnation: object, name: object, offset: object) -> dict[str, Any]:
        """See ControllerActor.read_profile."""
        try:
            of, path = text(incarnation, "incarnation"), text(name, "name")
            if isinstance(offset, bool) or not isinstance(offset, int) or offset < 0:
                raise InvalidField("offset must be a whole number, 0 or more", "offset")
        except RequestError as error:
            return refusal(error)
        answers = await self._ask({of}, lambda handle: handle.read_profile.remote(path, offset))
        said = [answer.outcome.value for answer in answers if isinstance(answer.outcome, Answered)]
        if answers and not said:
            return all_answered(answers)
        if not said or said[0] is None:
            return refusal(UnknownResource(f"there is no trace {path!r} of rank {of!r}", "name"))
        return all_answered(answers) | {"data": said[0]}

    async def _undo(self, profile_id: str, incarnations: set[str]) -> None:
        """Take back a start that did not reach every rank."""
        await self._ask(incarnations, lambda handle: handle.stop_profile.remote(profile_id))

    async def _ask(self, incarnations: set[str], call: Callable[[Any], Awaitable[Any]]) -> list[RankAnswer]:
        return await self._roster.ask_some(incarnations, lambda _, handle: call(handle), _READ_S)

    def _noted(self, call: str, caller: str, answer: dict[str, Any]) -> dict[str, Any]:
        shown = {key: answer.get(key) for key in ("profile_id", "success", "status", "message")}
        self._note(call, caller, {key: value for key, value in shown.items() if value is not None})
        return answer


def _said(answers: list[RankAnswer]) -> list[tuple[RankAnswer, dict[str, Any]]]:
    return [(answer, answer.outcome.value) for answer in answers if isinstance(answer.outcome, Answered)]


def _row(answer: RankAnswer, good: str) -> dict[str, Any]:
    record = answer.record
    head = {"rank": record.rank, "incarnation": record.incarnation, "node": record.node_id}
    if isinstance(answer.outcome, Answered):
        return head | answer.outcome.value
    return head | {"status": "unreachable", "message": answer.outcome.message}


def _summary(answers: list[RankAnswer], rows: list[dict[str, Any]], good: str, message: str) -> dict[str, Any]:
    """Success only if every rank did it."""
    reached = all_answered(answers)
    if not reached["success"]:
        return reached
    bad = [row for row in rows if row["status"] != good]
    if not bad:
        return {"success": True, "status": good, "message": message, "http_status": 200}
    worst = next(status for status in _FAILURES if any(row["status"] == status for row in bad))
    told = next(row["message"] for row in bad if row["status"] == worst)
    return {"success": False, "status": worst, "message": told, "http_status": _FAILURES[worst]}
