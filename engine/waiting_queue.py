"""Requests that wait for an admission: retracted ones first, then by arrival. None of them owns a page."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator

from engine.sequence import Sequence


class WaitingQueue:
    """First in, first out, with a way back to the front. Every operation is O(1)."""

    def __init__(self) -> None:
        self._by_id: OrderedDict[str, Sequence] = OrderedDict()
        #: tokens of all that wait, prompts and what retracted ones have generated
        self.num_tokens = 0

    def __len__(self) -> int:
        return len(self._by_id)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._by_id.values())

    def push(self, sequence: Sequence) -> None:
        self._by_id[sequence.request_id] = sequence
        self.num_tokens += sequence.num_tokens

    def push_front(self, sequence: Sequence) -> None:
        """Retracted ones. Youngest is retracted first, so the oldest ends up in front."""
        self._by_id[sequence.request_id] = sequence
        self._by_id.move_to_end(sequence.request_id, last=False)
        self.num_tokens += sequence.num_tokens

    @property
    def head(self) -> Sequence | None:
        return next(iter(self._by_id.values()), None)

    def remove(self, sequence: Sequence) -> None:
        del self._by_id[sequence.request_id]
        self.num_tokens -= sequence.num_tokens
