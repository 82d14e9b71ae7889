"""One sequence on its way to the client: what to generate, and the text of it piece by piece. No I/O."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass

from deployments.detokenize import TextStream
from deployments.logprobs import TextOffsets
from deployments.sampling_fields import MAX_SEQUENCES
from deployments.stop_strings import StopStrings
from engine.request import FinishReason, Output, RequestStats, SamplingParams, TokenLogprobs


@dataclass(frozen=True, slots=True)
class SequenceJob:
    """One sequence to generate. A body with several prompts, or n > 1, is several of these."""

    request_id: str
    #: prompt as int32 bytes, never empty
    tokens: bytes
    sampling: SamplingParams
    stops: tuple[str, ...] = ()
    #: show the stop string, or the text of the stop token, that ended the sequence
    keep_stop: bool = False
    skip_special_tokens: bool = True
    namespace: str = ""
    #: only this rank will do
    rank: int | None = None

    @property
    def num_prompt_tokens(self) -> int:
        return len(self.tokens) // 4


@dataclass(frozen=True, slots=True)
class Finish:
    """Why a sequence ended."""

    reason: FinishReason
    #: the stop token id or the stop string, if one ended it
    matched: int | str | None = None
    #: of an abort or an error, in words
    message: str = ""


@dataclass(frozen=True, slots=True)
class Piece:
    """What became known of one sequence since its last piece. The last one has `finish` set."""

    #: position of its SequenceJob in the list that was asked for
    index: int
    #: new text; empty while half a character or a possible stop string is held back
    text: str
    token_ids: list[int]
    #: one per token id, when asked for
    logprobs: list[TokenLogprobs] | None
    finish: Finish | None
    #: the newest facts; always there when `finish` is
    stats: RequestStats
    #: rank that serves it
    rank: int


class SequenceText:
    """Turns the outputs of one sequence into pieces: detokenises, watches for stop strings, cuts what lies beyond."""

    def __init__(self, job: SequenceJob, index: int, text: TextStream) -> None:
        self._job = job
        self._index = index
        self._text = text
        self._stop = StopStrings(job.stops, keep=job.keep_stop)
        #: tokens generated so far
        self.num_tokens = 0
        self._stats = RequestStats(job.num_prompt_tokens, 0, None)

    def take(self, output: Output, rank: int) -> Piece:
        """The next output of this sequence. After a piece with `finish` nothing more may be given."""
        self._stats = output.stats or self._stats
        shown, num_used = self._show(output)
        finish = None
        if self._stop.matched is not None:
            finish = Finish("stop", self._stop.matched)
        elif output.finish is not None:
            finish = Finish(output.finish, output.matched_stop, output.message)
        logprobs = None if output.logprobs is None else output.logprobs[:num_used]
        return Piece(self._index, shown, output.token_ids[:num_used], logprobs, finish, self._stats, rank)

    def _show(self, output: Output) -> tuple[str, int]:
        """Text that may be shown now, and how many of the tokens belong to the answer."""
        shown: list[str] = []
        last = len(output.token_ids) - 1
        for position, token_id in enumerate(output.token_ids):
            self.num_tokens += 1
            is_stop = output.matched_stop is not None and position == last
            text = "" if is_stop and not self._job.keep_stop else self._text.push((token_id,))
            # Stop strings count from min_new_tokens on, as stop tokens do.
            is_counted = self.num_tokens > self._job.sampling.min_new_tokens
            shown.append(self._stop.push(text) if is_counted else text)
            if self._stop.matched is not None:
                return "".join(shown), position + 1
        if output.finish is not None:
            shown.append(self._stop.push(self._text.finish()))
            shown.append(self._stop.finish())
        return "".join(shown), last + 1


class Answer:
    """One sequence's pieces put together."""

    __slots__ = ("finish", "logprobs", "offsets", "rank", "stats", "text", "token_ids")

    def __init__(self) -> None:
        self.text = ""
        #: of those of its tokens that were shown in chunks of a completion
        self.offsets = TextOffsets()
        #: one per token id; None when none were asked for
        self.logprobs: list[TokenLogprobs] | None = None
        self.token_ids: list[int] = []
        #: None until the last piece
        self.finish: Finish | None = None
        self.stats = RequestStats(0, 0, None)
        self.rank = -1

    def add(self, piece: Piece) -> None:
        self.text += piece.text
        self.token_ids.extend(piece.token_ids)
        if piece.logprobs is not None:
            self.logprobs = self.logprobs or []
            self.logprobs.extend(piece.logprobs)
        self.finish = piece.finish
        self.stats = piece.stats
        self.rank = piece.rank


async def collected(pieces: AsyncGenerator[Piece, None], count: int) -> list[Answer]:
    """The whole answers of `count` sequences; closes `pieces`."""
    answers = [Answer() for _ in range(count)]
    async with aclosing(pieces):
        async for piece in pieces:
            answers[piece.index].add(piece)
    return answers


def sequence_ids(request_id: str, count: int) -> list[str]:
    """Ids of a request's sequences: its own id when there is one, else `<id>#<n>`, which no caller may choose."""
    return [request_id] if count == 1 else [f"{request_id}#{index}" for index in range(count)]


def ids_of_request(request_id: str) -> list[str]:
    """Every id that a sequence of this request can have, whoever made them and wherever they run."""
    return [request_id, *sequence_ids(request_id, MAX_SEQUENCES)]
