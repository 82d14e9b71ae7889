"""What a caller reads of a remote call that failed."""

from __future__ import annotations

import asyncio

import pytest
from ray.exceptions import RayTaskError

from actors.ray_errors import CallFailed, outcome_of
from configs.errors import ControlUnavailable, InvariantError


def failure_of(cause: Exception) -> CallFailed:
    """The outcome of a remote method that raised `cause`."""

    async def call() -> None:
        raise RayTaskError("method", "Traceback: secret", cause)

    outcome = asyncio.run(outcome_of(call()))
    assert isinstance(outcome, CallFailed)
    assert outcome.kind == "error"
    return outcome


def test_an_error_made_to_be_told_is_told_in_one_line() -> None:
    assert failure_of(ControlUnavailable("the log is full\nmore")).message == "ControlUnavailable: the log is full"


@pytest.mark.parametrize(
    "cause",
    [FileNotFoundError(2, "No such file", "/srv/secret"), InvariantError("secret page 7"), ValueError()],
)
def test_of_any_other_only_the_type_is_told(cause: Exception) -> None:
    assert failure_of(cause).message == type(cause).__name__
