"""Whole answers, put together from the parts that steps emit. For callers that want no stream."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from engine.request import FinishReason, Output, Request, RequestStats, TokenLogprobs


@dataclass(slots=True)
class Generation:
    """One request's answer. `finish` is None while it is under way."""

    request_id: str
    token_ids: list[int] = field(default_factory=list)
    #: one per token, when asked for
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    finish: FinishReason | None = None
    #: token id that ended it with `stop`, if one did
    matched_stop: int | None = None
    #: with finish == "error" or "abort": the reason in words
    message: str = ""
    stats: RequestStats | None = None


class Collector:
    """Takes Outputs in, keeps the answers in the order of the requests."""

    def __init__(self, requests: Iterable[Request]) -> None:
        """Raises ValueError when two requests share an id: their answers could not be told apart."""
        self.generations: list[Generation] = []
        self._open: dict[str, Generation] = {}
        for request in requests:
            if request.request_id in self._open:
                raise ValueError(f"two requests have the id {request.request_id!r}")
            self._open[request.request_id] = Generation(request.request_id)
            self.generations.append(self._open[request.request_id])

    @property
    def open_ids(self) -> tuple[str, ...]:
        """Requests whose end has not come yet."""
        return tuple(self._open)

    def take(self, outputs: list[Output]) -> None:
        """Parts of answers; those of requests that are not ours are left alone."""
        for output in outputs:
            generation = self._open.get(output.request_id)
            if generation is None:
                continue
            generation.token_ids += output.token_ids
            generation.logprobs += output.logprobs or ()
            generation.stats = output.stats or generation.stats
            if output.finish is not None:
                generation.finish, generation.message = output.finish, output.message
                generation.matched_stop = output.matched_stop
                del self._open[output.request_id]
