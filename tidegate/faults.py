"""What the Python client raises beyond the errors of configs/errors.py."""

from __future__ import annotations

from configs.errors import ServiceError
from tidegate.client import NoAnswer, Unreachable
from tidegate.results import FlushResult

__all__ = ["FlushFailed", "NoAnswer", "StreamCut", "Unreachable"]


class StreamCut(ServiceError):
    """A stream ended before its answer did; what came until then was yielded."""

    retryable = True


class FlushFailed(ServiceError):
    """A flush that did not flush every rank and tier. Old KV may be served until `result.floor_raised` is true.

    `result` has a row for every rank; `retryable` says whether the same call may succeed later.
    """

    def __init__(self, message: str, result: FlushResult) -> None:
        Exception.__init__(self, message, result)
        self.message = message
        self.result = result

    @classmethod
    def of(cls, result: FlushResult) -> FlushFailed:
        """With the controller's message and the rank of every row that is in the way."""
        rows = [row for row in (*result.ranks, *result.host_tiers) if not row.is_good]
        told = "; ".join(f"{row.name} is {row.status}" for row in rows)
        head = f"flush {result.flush_id} {result.status}: {result.message}"
        return cls(f"{head} ({told})" if told else head, result)
