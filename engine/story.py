"""What happened lately, for errors and logs: a bounded ring, one line per turn of a request's life, none per token."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

NUM_LINES = 1024


class StoryLine(NamedTuple):
    """One thing that happened to a request, or to the rank (`request_id` is empty)."""

    at_s: float
    request_id: str
    what: str

    def __str__(self) -> str:
        return f"{self.at_s:.6f} {self.request_id or 'rank'}: {self.what}"


class Story:
    """The last NUM_LINES lines of one scheduler."""

    def __init__(self) -> None:
        self._lines: deque[StoryLine] = deque(maxlen=NUM_LINES)

    def tell(self, at_s: float, request_id: str, what: str) -> None:
        self._lines.append(StoryLine(at_s, request_id, what))

    def of(self, request_id: str) -> list[StoryLine]:
        """The lines of one request and those of the whole rank, oldest first."""
        return [line for line in self._lines if line.request_id in ("", request_id)]

    def latest(self, num_lines: int = 40) -> tuple[str, ...]:
        """The newest lines as text, for an InvariantError."""
        return tuple(str(line) for line in list(self._lines)[-num_lines:])
