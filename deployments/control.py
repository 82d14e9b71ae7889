"""The controller's Ray handle as plain asynchronous calls, each with an end of its own."""

from __future__ import annotations

import asyncio
import reprlib
from collections.abc import Awaitable, Mapping, Sequence
from typing import Any, TypeVar

from actors.messages import Membership
from actors.ray_errors import Answered, CallFailed, outcome_within
from configs.errors import ControlUnavailable, RequestError, ServiceError
from configs.schema import ControlSettings
from engine.flush import STEP_MODES

T = TypeVar("T")

#: beyond the controller's own deadline: the way there and back on a busy machine
_WAY_S = 5.0
#: for calls that ask every rank, each under a deadline of the controller's
_ASK_S = 2.0
#: of actors.profile_desk: a start waits for its turn and may have to be undone
_PROFILE_START_S, _PROFILE_STOP_S, _PROFILE_READ_S = 120.0, 300.0, 30.0
#: 32 MiB of entries are read in 0.4 s on an idle machine
_AUDIT_S = 10.0


class ControllerClient:
    """Calls of one Api replica. `handle`: actor handle of the controller; it survives the controller's restarts."""

    def __init__(self, handle: Any, settings: ControlSettings) -> None:
        self._handle = handle
        self._settings = settings
        self._noting: set[asyncio.Task[object]] = set()

    async def membership(self, known_version: int, timeout_s: float) -> Membership:
        """See ControllerActor.membership; a long poll."""
        return await _answer(self._handle.membership.remote(known_version, timeout_s), timeout_s + _WAY_S)

    async def flush(self, arguments: Mapping[str, object]) -> dict[str, Any]:
        """See ControllerActor.flush. Waits for the flush's own deadline and a little more."""
        return await _answer(self._handle.flush.remote(**arguments), self._budget_s(arguments) + _WAY_S)

    async def flush_status(self, flush_id: str) -> dict[str, Any]:
        return await _answer(self._handle.flush_status.remote(flush_id), _WAY_S)

    async def cancel_flush(self, flush_id: str, caller: str) -> dict[str, Any]:
        """See ControllerActor.cancel_flush. Ranks that do not answer take a second of it."""
        return await _answer(self._handle.cancel_flush.remote(flush_id, caller), _ASK_S + _WAY_S)

    async def audit(self, limit: int, flush_id: str | None) -> dict[str, Any]:
        """See ControllerActor.audit. It reads files, as many as there are when an id is rare."""
        return await _answer(self._handle.audit.remote(limit, flush_id), _AUDIT_S + _WAY_S)

    def note_refused(self, call: str, arguments: Mapping[str, object], error: RequestError) -> None:
        """See ControllerActor.note_refused. Never waits, never fails: a controller that is away misses it."""
        shown = {name[:64]: _shown(value) for name, value in list(arguments.items())[:16]}
        telling = self._handle.note_refused.remote(call, shown, error.message, error.param)
        task = asyncio.create_task(outcome_within(telling, _WAY_S))
        self._noting.add(task)
        task.add_done_callback(self._noting.discard)

    async def abort(self, request_ids: Sequence[str] | None, caller: str) -> dict[str, Any]:
        """See ControllerActor.abort. None: all requests."""
        ids = None if request_ids is None else list(request_ids)
        asking = self._handle.abort.remote(ids, request_ids is None, _ASK_S, caller=caller)
        return await _answer(asking, _ASK_S + _WAY_S)

    async def start_profile(self, arguments: Mapping[str, object], caller: str) -> dict[str, Any]:
        """See ControllerActor.start_profile. Ranks import torch's profiler the first time, which takes seconds."""
        return await _answer(self._handle.start_profile.remote(dict(arguments), caller), _PROFILE_START_S + _WAY_S)

    async def stop_profile(self, caller: str) -> dict[str, Any]:
        """See ControllerActor.stop_profile. Waits for traces to be written."""
        return await _answer(self._handle.stop_profile.remote(caller), _PROFILE_STOP_S + _WAY_S)

    async def profiles(self) -> dict[str, Any]:
        return await _answer(self._handle.profiles.remote(), _PROFILE_READ_S + _WAY_S)

    async def read_profile(self, incarnation: str, name: str, offset: int) -> dict[str, Any]:
        return await _answer(self._handle.read_profile.remote(incarnation, name, offset), _PROFILE_READ_S + _WAY_S)

    async def status(self) -> dict[str, Any]:
        return await _answer(self._handle.status.remote(_ASK_S), _ASK_S + _WAY_S)

    async def info(self) -> dict[str, Any]:
        return await _answer(self._handle.info.remote(), _WAY_S)

    def _budget_s(self, arguments: Mapping[str, object]) -> float:
        """Until the controller answers. A timeout that is none is refused there at once, so any wait will do."""
        timeout_s = arguments.get("timeout_s")
        is_number = isinstance(timeout_s, int | float) and 0 <= timeout_s <= self._settings.max_timeout_s
        budget_s = float(timeout_s) if isinstance(timeout_s, int | float) and is_number else 0.0
        mode = arguments.get("mode")
        if isinstance(mode, str) and mode in STEP_MODES:
            budget_s = max(budget_s, self._settings.step_grace_s)
        return budget_s + self._settings.answer_slack_s


def _shown(value: object) -> object:
    """A value of a body as the log may show it: it may be the whole body, and of any type."""
    if isinstance(value, str):
        return value[:200]
    return value if isinstance(value, bool | int | float | None) else reprlib.repr(value)


async def _answer(call: Awaitable[T], timeout_s: float) -> T:
    match await outcome_within(call, timeout_s):
        case Answered(answer):
            return answer
        case CallFailed("error", message):
            raise ServiceError(f"the controller failed: {message}")
        case CallFailed(_, message):
            raise ControlUnavailable(f"the controller does not answer: {message}")
