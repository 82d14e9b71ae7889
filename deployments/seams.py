"""What the Api needs of the rest of the system, as two small protocols.

`actors.fleet.Fleet` and `deployments.control.ControllerClient` are the real ones; tests put a real engine loop in this
process behind the same shape.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from typing import Any, Protocol

from actors.messages import Membership
from configs.errors import RequestError
from engine.request import Output, Request


class Fleet(Protocol):
    """The ranks, seen from an Api replica."""

    def members(self) -> Membership:
        """The newest membership this process knows; never waits."""
        ...

    def generate(self, incarnation: str, request: Request) -> AsyncGenerator[Output, None]:
        """Send `request` to that incarnation and yield what it answers, the last output with `finish` set.

        Raises RankLost when the incarnation ends first, Conflict when the id is open there. Closing the iterator
        before its end aborts the request on the rank at once.
        """
        ...


class Controller(Protocol):
    """The controller's calls, each under a deadline.

    Answers are the plain dicts of `actors.controller`, refusals included (`success: false` with `http_status`).
    Raises ControlUnavailable when nobody answers in time, ServiceError when the controller failed.
    """

    async def flush(self, arguments: Mapping[str, object]) -> dict[str, Any]:
        """arguments: as the caller wrote them; the controller checks them, for every door alike."""
        ...

    async def flush_status(self, flush_id: str) -> dict[str, Any]: ...

    async def cancel_flush(self, flush_id: str, caller: str) -> dict[str, Any]: ...

    async def audit(self, limit: int, flush_id: str | None) -> dict[str, Any]: ...

    def note_refused(self, call: str, arguments: Mapping[str, object], error: RequestError) -> None:
        """Have the audit log say that a door has refused this call. Never waits, never fails."""
        ...

    async def abort(self, request_ids: Sequence[str] | None, caller: str) -> dict[str, Any]:
        """request_ids: None for all requests.  caller: for the audit log."""
        ...

    async def start_profile(self, arguments: Mapping[str, object], caller: str) -> dict[str, Any]:
        """arguments: as the caller wrote them; the controller checks them."""
        ...

    async def stop_profile(self, caller: str) -> dict[str, Any]: ...

    async def profiles(self) -> dict[str, Any]: ...

    async def read_profile(self, incarnation: str, name: str, offset: int) -> dict[str, Any]: ...

    async def status(self) -> dict[str, Any]: ...

    async def info(self) -> dict[str, Any]: ...
