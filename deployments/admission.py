"""How much one Api replica takes in at once. Over the limit a request is refused, never queued unseen."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from configs.errors import InvalidField, Overloaded


class Admission:
    """Counts sequences in flight. Used from one event loop only."""

    def __init__(self, max_inflight: int) -> None:
        self.max_inflight = max_inflight
        #: sequences between admission and the end of their stream
        self.num_inflight = 0

    def check(self, num_sequences: int) -> None:
        """Raise Overloaded if so many more do not fit now, InvalidField if they never will. Changes nothing.

        Asked before a prompt is tokenised, so that an overloaded server does not work for requests it refuses.
        """
        if num_sequences > self.max_inflight:
            raise InvalidField(
                f"the request asks for {num_sequences} sequences; this server takes {self.max_inflight} at once "
                "(configs: api.max_inflight)",
                "n",
            )
        if self.num_inflight + num_sequences > self.max_inflight:
            raise Overloaded(
                f"{self.num_inflight} of {self.max_inflight} sequences are in flight (configs: api.max_inflight); "
                "try again in a second"
            )

    @contextmanager
    def hold(self, num_sequences: int) -> Iterator[None]:
        """Count `num_sequences` in until the block ends. Raises as `check` does."""
        self.check(num_sequences)
        self.num_inflight += num_sequences
        try:
            yield
        finally:
            self.num_inflight -= num_sequences
