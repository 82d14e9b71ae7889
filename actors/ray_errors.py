"""The one module that knows Ray's exceptions: every remote call ends in a value, good or bad.

`ActorDiedError` and `ActorUnavailableError` say what Ray believes of an actor. Neither proves that its process has
ended (a node cut off looks dead), so both mean no more than "no answer".
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, Literal, TypeVar

import ray.exceptions

from configs.errors import TidegateError

T = TypeVar("T")

log = logging.getLogger(__name__)

#: died: Ray will never reach this actor again. unavailable: perhaps later; the call may or may not have been executed.
#: late: no answer within the time. error: the method raised.
FailureKind = Literal["died", "unavailable", "late", "error"]


@dataclass(frozen=True, slots=True)
class Answered(Generic[T]):
    """The call's result."""

    value: T


@dataclass(frozen=True, slots=True)
class CallFailed:
    """Why there is no result. `message` is one line, without a traceback, pid or path."""

    kind: FailureKind
    message: str


async def outcome_of(call: Awaitable[T]) -> Answered[T] | CallFailed:
    """Wait for one remote call. Raises nothing but CancelledError."""
    try:
        return Answered(await call)
    except ray.exceptions.RayError as error:
        return _failure(error)


def outcome_now(call: Any, timeout_s: float) -> Answered[Any] | CallFailed:
    """Block for one remote call (an object reference) at most `timeout_s`. For programs without an event loop."""
    try:
        return Answered(ray.get(call, timeout=timeout_s))
    except ray.exceptions.GetTimeoutError:
        return CallFailed("late", f"no answer within {timeout_s:g} s")
    except ray.exceptions.RayError as error:
        return _failure(error)


def _failure(error: ray.exceptions.RayError) -> CallFailed:
    match error:
        case ray.exceptions.ActorDiedError():
            return CallFailed("died", "Ray reports that the actor has died")
        case ray.exceptions.ActorUnavailableError():
            return CallFailed("unavailable", "Ray cannot reach the actor")
        case ray.exceptions.RayTaskError():
            log.warning("a remote method has failed: %s", error)
            return CallFailed("error", _one_line(error.cause))
        case _:
            return CallFailed("unavailable", type(error).__name__)


async def outcome_within(call: Awaitable[T], timeout_s: float) -> Answered[T] | CallFailed:
    """Wait for one remote call at most `timeout_s`; the call itself goes on, its late result is dropped."""
    task = asyncio.ensure_future(outcome_of(call))
    done, _ = await asyncio.wait({task}, timeout=max(0.0, timeout_s))
    if done:
        return task.result()
    task.cancel()
    return CallFailed("late", f"no answer within {timeout_s:g} s")


@contextmanager
def gcs_failures_as_os_errors() -> Iterator[None]:
    """Failures of Ray's key-value store, as the store of the control log raises them."""
    try:
        yield
    except ray.exceptions.RayError as error:
        raise OSError(f"Ray's key-value store: {type(error).__name__}") from error


def _one_line(cause: Any) -> str:
    """What a remote method raised, as a caller may read it: its type, and the first line of an error made to be told.

    Others hold whatever was in their way: paths, addresses, values.
    """
    name = type(cause).__name__
    lines = cause.message.strip().splitlines() if isinstance(cause, TidegateError) else []
    return f"{name}: {lines[0][:200]}" if lines else name
