"""Which weights computed which tokens of an answer."""

from __future__ import annotations

from typing import NamedTuple


class VersionSpan(NamedTuple):
    """Output tokens [start, end) came of weights with this label."""

    version: str
    start: int
    end: int


class VersionSpans:
    """Of one request, written as its tokens come. Spans are contiguous from 0, neighbours differ, and the last one ends
    at the number of output tokens; a request that ended before its first token has one empty span."""

    __slots__ = ("_ends", "_versions")

    def __init__(self, version: str) -> None:
        """version: of the weights at its first admission."""
        self._versions = [version]
        self._ends = [0]

    def add_token(self, version: str) -> None:
        """One more output token was sampled, under these weights."""
        if version == self._versions[-1]:
            self._ends[-1] += 1
        elif self._ends[-1] == 0:
            # Nothing came of the weights it was admitted under.
            self._versions[-1], self._ends[-1] = version, 1
        else:
            self._versions.append(version)
            self._ends.append(self._ends[-1] + 1)

    @property
    def spans(self) -> tuple[VersionSpan, ...]:
        starts = [0, *self._ends]
        return tuple(
            VersionSpan(version, start, end)
            for version, start, end in zip(self._versions, starts, self._ends, strict=False)
        )

    @property
    def latest(self) -> str:
        """Of the newest token."""
        return self._versions[-1]
