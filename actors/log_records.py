"""What the controller stores before it tells anybody, and the state that a reading of the whole log gives.

Every record has an index; an epoch and a term are the index of the record that made them, so neither is ever allotted
twice in a lineage (protocol.md section 4). Index 1 is the first: epoch 0 and term 0 mean "none yet".
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

from actors.flush_request import FlushRequest
from actors.messages import RankRecord


class TakeOver(msgspec.Struct, frozen=True, tag="take_over"):
    """A controller begins; its term is this record's index."""

    #: random id drawn with the first record of the log; a log that was lost begins another lineage
    lineage: str
    #: Ray's id of the controller actor: the same over restarts of one actor
    actor_id: str
    #: Ray's name of the cluster; ranks of an earlier cluster can be reached by nobody any more
    cluster: str


class RankJoined(msgspec.Struct, frozen=True, tag="rank_joined"):
    """An incarnation has registered. Stored so that a restarted controller misses none, frozen ones included."""

    rank: RankRecord


class RankLeft(msgspec.Struct, frozen=True, tag="rank_left"):
    """An incarnation's process is proven gone."""

    incarnation: str


class FlushIntent(msgspec.Struct, frozen=True, tag="flush_intent"):
    """A flush is going to be told to ranks. If it takes an epoch, the epoch is this record's index."""

    request: FlushRequest
    takes_epoch: bool
    #: incarnations registered when it began
    members: tuple[str, ...]
    #: wall time for people
    started_at: str


class FlushOutcome(msgspec.Struct, frozen=True, tag="flush_outcome"):
    """The answer of a flush, stored before it is given."""

    #: index of its intent
    intent: int
    #: lowest epoch that may be matched from now on; 0: as before
    floor: int
    answer: dict[str, Any]


Record = TakeOver | RankJoined | RankLeft | FlushIntent | FlushOutcome


class Entry(msgspec.Struct, frozen=True):
    """One record as it lies in the store, with who wrote it and when by the clock of the writer's machine."""

    #: random id of the writing process; with it a writer knows its own record again after an uncertain write
    writer: str
    boot_id: str
    boot_s: float
    record: Record


_decoder = msgspec.json.Decoder(Entry)
_encoder = msgspec.json.Encoder()


def encode_entry(entry: Entry) -> bytes:
    """One line of JSON: operators read the log with their eyes."""
    return _encoder.encode(entry)


def decode_entry(data: bytes) -> Entry:
    """Raises msgspec.DecodeError (ValidationError included) on what is no record of this version."""
    return _decoder.decode(data)


@dataclass(slots=True)
class EndedFlush:
    """A flush of the log with its answer, and when that was stored."""

    request: FlushRequest
    answer: dict[str, Any]
    boot_id: str
    boot_s: float


@dataclass(slots=True)
class LogState:
    """Everything the log says, folded record by record."""

    #: "" before the first record
    lineage: str = ""
    #: index of the newest take-over
    term: int = 0
    #: newest epoch allotted
    epoch: int = 0
    #: lowest epoch that may be matched; never falls
    floor: int = 0
    #: incarnations of this cluster that are not proven gone, in order of registration
    members: dict[str, RankRecord] = field(default_factory=dict)
    #: incarnations of this log that are gone; flushes that were cut short still name them
    past: dict[str, RankRecord] = field(default_factory=dict)
    #: index -> flush that was begun and has no outcome
    open_flushes: dict[int, FlushIntent] = field(default_factory=dict)
    #: flush id -> newest ended flush of that id
    ended: dict[str, EndedFlush] = field(default_factory=dict)
    #: how often the newest controller actor took over before: its restarts
    num_restarts: int = 0
    _actor_id: str = ""
    _cluster: str = ""

    def apply(self, index: int, entry: Entry) -> None:
        """Fold in the record with the next index."""
        match entry.record:
            case TakeOver() as take_over:
                self._take_over(index, take_over)
            case RankJoined(rank=rank):
                self.members[rank.incarnation] = rank
            case RankLeft(incarnation=incarnation):
                self._leave(incarnation)
            case FlushIntent() as intent:
                self.epoch = index if intent.takes_epoch else self.epoch
                self.open_flushes[index] = intent
            case FlushOutcome() as outcome:
                self._end(outcome, entry)

    def _take_over(self, index: int, record: TakeOver) -> None:
        self.lineage, self.term = record.lineage, index
        self.num_restarts = self.num_restarts + 1 if record.actor_id == self._actor_id else 0
        self._actor_id = record.actor_id
        if record.cluster != self._cluster:
            for incarnation in list(self.members):
                self._leave(incarnation)
            self._cluster = record.cluster

    def _leave(self, incarnation: str) -> None:
        record = self.members.pop(incarnation, None)
        if record is not None:
            self.past[incarnation] = record

    def _end(self, outcome: FlushOutcome, entry: Entry) -> None:
        self.floor = max(self.floor, outcome.floor)
        intent = self.open_flushes.pop(outcome.intent, None)
        if intent is not None:
            ended = EndedFlush(intent.request, outcome.answer, entry.boot_id, entry.boot_s)
            self.ended[intent.request.flush_id] = ended
