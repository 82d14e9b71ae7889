"""What each door says about a flush. One place, so that no door can call a partial success a success.

The controller's own `success` is not believed blindly: every row is looked at once more. A wrong 200 here is a stale
answer later.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from actors.flush_run import LIVING_VERDICTS, is_good_verdict

#: SGLang's text on success, unchanged since its first version
FLUSHED_TEXT = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)
FAILED_TEXT = "Flush cache failed.\n"


@dataclass(frozen=True, slots=True)
class FlushOutcome:
    """One answer of the controller, judged."""

    success: bool
    #: the truthful code, for /v1/cache/flush and gRPC
    http_status: int
    #: what /flush_cache answers: 200 or 400
    native_status: int
    native_text: str
    #: the reason; empty on success
    message: str


def judge(answer: Mapping[str, Any]) -> FlushOutcome:
    """The controller's answer as every door tells it: a success only if each row is one and somebody lives."""
    if is_success(answer):
        return FlushOutcome(True, 200, 200, FLUSHED_TEXT, "")
    message = str(answer.get("message") or "")
    text = message + "\n" if message else FAILED_TEXT
    return FlushOutcome(False, _failure_status(answer), 400, text, message or FAILED_TEXT.strip())


def is_success(answer: Mapping[str, Any]) -> bool:
    """True only if the controller says so and no row of a rank or tier says otherwise."""
    ranks = [row.get("status") for row in answer.get("ranks") or ()]
    tiers = [row.get("status") for row in answer.get("host_tiers") or ()]
    return (
        answer.get("success") is True
        and all(is_good_verdict(status, answer.get("mode")) for status in (*ranks, *tiers))
        and any(status in LIVING_VERDICTS for status in ranks)
    )


def control_status(answer: Mapping[str, Any]) -> int:
    """The code of any other control answer: of a cancelled flush, the cache's state, the audit log."""
    return 200 if answer.get("success") is True else _failure_status(answer)


def _failure_status(answer: Mapping[str, Any]) -> int:
    """The controller's code if it is one of a failure; an answer that contradicts itself is our fault."""
    status = answer.get("http_status")
    return status if isinstance(status, int) and 400 <= status < 600 else 503
