"""What the controller stores before it tells anybody, and the state that a reading of the whole log gives.

Every record has an index; an epoch and a term are the index of the record that made them, so neither is ever allotted
twice in a lineage (protocol.md section 4). Index 1 is the first: epoch 0 and term 0 mean "none yet".
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import msgspec

from actors.flush_request import FlushRequest
from actors.messages import RankRecord, SubEpoch
from cache.types import TOKEN_BYTES
from engine.flush import STEP_MODES, FlushScope


class TakeOver(msgspec.Struct, frozen=True, tag="take_over"):
    """A controller begins; its term is this record's index."""

    #: random id drawn with the first record of the log; a log that was lost begins another lineage
    lineage: str
    #: Ray's id of the controller actor: the same over restarts of one actor
    actor_id: str
    #: Ray's name of the cluster; ranks of an earlier cluster can be reached by nobody any more
    cluster: str
    #: this controller's lease time: a later one must know how long the leases of this one can last
    lease_s: float = 0.0


class RankJoined(msgspec.Struct, frozen=True, tag="rank_joined"):
    """An incarnation has registered. Stored so that a restarted controller misses none, frozen ones included."""

    rank: RankRecord


class RankLeft(msgspec.Struct, frozen=True, tag="rank_left"):
    """An incarnation's process is proven gone."""

    incarnation: str


class FlushIntent(msgspec.Struct, frozen=True, tag="flush_intent"):
    """A flush is going to be told to ranks. If it takes an epoch, the epoch is this record's index, and so is the
    sub-epoch of a scoped one. In the modes that raise the floor first this record raises it."""

    request: FlushRequest
    takes_epoch: bool
    #: incarnations registered when it began
    members: tuple[str, ...]
    #: wall time for people
    started_at: str


class FlushOutcome(msgspec.Struct, frozen=True, tag="flush_outcome"):
    """The answer of a flush, stored before it is given. The floor of `wait` and `drain` rises with it."""

    #: index of its intent
    intent: int
    #: lowest epoch that may be matched from now on; 0: as before
    floor: int
    answer: dict[str, Any]


@dataclass(slots=True)
class EndedFlush:
    """A flush of the log with its answer, and when that was stored."""

    request: FlushRequest
    answer: dict[str, Any]
    boot_id: str
    boot_s: float
    #: of its intent
    index: int = 0


@dataclass(frozen=True, slots=True)
class AgedFlush:
    """A flush of host tiers by age. A node that is not named has missed it, and drops all it has when it comes back."""

    index: int
    node_ids: frozenset[str]


#: verdicts after which a rank keeps what it has; one that is gone has nothing
_UNTOUCHED = frozenset({"timed_out", "refused", "busy", "expired_command", "superseded", "gone"})
_MAX_AGED = 32
# 4096 sub-epochs are about 0.6 MB of a checkpoint with pages of 16 tokens; keys of the host tier look theirs up by
# scope.
_MAX_SUB_EPOCHS = 4096
# 512 answers of 8 ranks are about 1 MB of a checkpoint; the controller's memory holds more of them.
_MAX_ENDED = 512


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
    #: highest floor of a flush that succeeded: no answer may use less any more
    promised: int = 0
    #: longest lease time that any controller of this lineage gave
    longest_lease_s: float = 0.0
    #: incarnations of this cluster that are not proven gone, in order of registration
    members: dict[str, RankRecord] = field(default_factory=dict)
    #: incarnation -> index of the record by which it joined
    joined_at: dict[str, int] = field(default_factory=dict)
    #: incarnations that are gone and that an open flush still names
    past: dict[str, RankRecord] = field(default_factory=dict)
    #: index -> flush that was begun and has no outcome
    open_flushes: dict[int, FlushIntent] = field(default_factory=dict)
    #: index of an open flush -> boot and boot time of its controller's machine when its intent was written
    open_since: dict[int, tuple[str, float]] = field(default_factory=dict)
    #: flush id -> newest ended flush of that id, oldest first, bounded
    ended: dict[str, EndedFlush] = field(default_factory=dict)
    #: of scoped flushes, oldest first, bounded; those not above the floor are no longer needed
    sub_epochs: list[SubEpoch] = field(default_factory=list)
    #: node -> lowest epoch that may be matched there, where that is more than elsewhere: it was out of lease while a
    #: flush that allots no epoch succeeded, and drops all it has when it comes back
    node_floors: dict[str, int] = field(default_factory=dict)
    #: index of the newest flush of the host tier alone: on every node what is older in that tier is void
    host_drop: int = 0
    #: successful flushes of host tiers by age, oldest first, bounded
    aged: list[AgedFlush] = field(default_factory=list)
    #: how often the newest controller actor took over before: its restarts
    num_restarts: int = 0
    #: of the newest take-over
    actor_id: str = ""
    cluster: str = ""

    def apply(self, index: int, entry: Entry) -> None:
        """Fold in the record with the next index."""
        match entry.record:
            case TakeOver() as take_over:
                self._take_over(index, take_over)
            case RankJoined(rank=rank):
                self.members[rank.incarnation] = rank
                self.joined_at.setdefault(rank.incarnation, index)
            case RankLeft(incarnation=incarnation):
                self._leave(incarnation)
            case FlushIntent() as intent:
                self._begin(index, intent)
                self.open_since[index] = (entry.boot_id, entry.boot_s)
            case FlushOutcome() as outcome:
                self._end(outcome, entry)
            case Checkpoint() | Probe():
                """It says what is folded in already, or nothing."""

    def floor_of(self, node_id: str) -> int:
        """Lowest epoch that ranks of this node may match."""
        return max(self.floor, self.node_floors.get(node_id, 0))

    def host_drop_of(self, node_id: str) -> int:
        """Index of the newest flush of host tiers of which this node's tier must not hold anything older: of that tier
        alone, or by age if the node has missed it. 0: none."""
        missed = (flush.index for flush in self.aged if node_id not in flush.node_ids)
        return max(self.host_drop, *missed, 0)

    def copy(self) -> LogState:
        """As it stands; later records change only one of the two. Records and answers themselves never change."""
        return replace(
            self,
            members=dict(self.members),
            joined_at=dict(self.joined_at),
            past=dict(self.past),
            open_flushes=dict(self.open_flushes),
            open_since=dict(self.open_since),
            ended=dict(self.ended),
            sub_epochs=list(self.sub_epochs),
            aged=list(self.aged),
            node_floors=dict(self.node_floors),
        )

    def _take_over(self, index: int, record: TakeOver) -> None:
        self.lineage, self.term = record.lineage, index
        self.longest_lease_s = max(self.longest_lease_s, record.lease_s)
        self.num_restarts = self.num_restarts + 1 if record.actor_id == self.actor_id else 0
        self.actor_id = record.actor_id
        if record.cluster != self.cluster:
            for incarnation in list(self.members):
                self._leave(incarnation)
            self.cluster = record.cluster

    def _leave(self, incarnation: str) -> None:
        record = self.members.pop(incarnation, None)
        self.joined_at.pop(incarnation, None)
        if record is not None and self.open_flushes:
            self.past[incarnation] = record

    def _begin(self, index: int, intent: FlushIntent) -> None:
        self.open_flushes[index] = intent
        if intent.takes_epoch:
            self.epoch = index
            if intent.request.mode in STEP_MODES:
                self._raise_floor(index)
        elif intent.request.drops_host_alone:
            self.host_drop = index
        elif intent.request.scope is not None:
            self._add_sub_epoch(intent.request.scope, index)

    def _end(self, outcome: FlushOutcome, entry: Entry) -> None:
        self._raise_floor(outcome.floor)
        self._settle_sub_epoch(outcome)
        if outcome.answer["success"]:
            self.promised = max(self.promised, outcome.floor)
        intent = self.open_flushes.pop(outcome.intent, None)
        self.open_since.pop(outcome.intent, None)
        if intent is not None:
            if not intent.takes_epoch:
                missed = {row["node"] for row in outcome.answer["ranks"] if row["status"] == "expired"}
                self.node_floors |= dict.fromkeys(sorted(missed), outcome.intent)
            if outcome.answer["success"] and intent.request.drops_host_by_age:
                self._add_aged(outcome)
            self._remember(EndedFlush(intent.request, outcome.answer, entry.boot_id, entry.boot_s, outcome.intent))
        if len(self.ended) > _MAX_ENDED:
            del self.ended[next(iter(self.ended))]
        if not self.open_flushes:
            self.past.clear()

    def _remember(self, flush: EndedFlush) -> None:
        """Of two with one id the newer one, whichever ended last."""
        known = self.ended.get(flush.request.flush_id)
        if known is None or known.index < flush.index:
            self.ended.pop(flush.request.flush_id, None)
            self.ended[flush.request.flush_id] = flush

    def _raise_floor(self, floor: int) -> None:
        self.floor = max(self.floor, floor)
        self.sub_epochs = [sub_epoch for sub_epoch in self.sub_epochs if sub_epoch.index > self.floor]
        self.aged = [flush for flush in self.aged if flush.index > self.floor]
        self.node_floors = {node: least for node, least in self.node_floors.items() if least > self.floor}

    def _add_aged(self, outcome: FlushOutcome) -> None:
        did = frozenset(row["node"] for row in outcome.answer["host_tiers"] if row["status"] == "flushed")
        self.aged.append(AgedFlush(outcome.intent, did))
        if len(self.aged) > _MAX_AGED:
            first, second, *rest = self.aged
            self.aged = [AgedFlush(second.index, first.node_ids & second.node_ids), *rest]

    def _add_sub_epoch(self, scope: FlushScope, index: int) -> None:
        """Kept from the intent on: a rank that registers meanwhile keeps to it. An age is no part of a key."""
        if scope.older_than_s is not None:
            return
        if scope.prefix_tokens is not None:
            page_size = max((rank.page_size for rank in self.members.values()), default=len(scope.prefix_tokens))
            scope = FlushScope(prefix_tokens=scope.prefix_tokens[: page_size * TOKEN_BYTES])
        if len(self.sub_epochs) >= _MAX_SUB_EPOCHS:
            # One that covers everything stands for the older half: more is dropped than was asked for, never less.
            older, younger = self.sub_epochs[: _MAX_SUB_EPOCHS // 2], self.sub_epochs[_MAX_SUB_EPOCHS // 2 :]
            self.sub_epochs = [SubEpoch(None, older[-1].index), *younger]
        self.sub_epochs = [*self.sub_epochs, SubEpoch(scope, index)]

    def _settle_sub_epoch(self, outcome: FlushOutcome) -> None:
        """One that some rank may have carried out stands for the earlier ones of its scope; else it goes, and they
        stay."""
        index = outcome.intent
        ended = next((sub_epoch for sub_epoch in self.sub_epochs if sub_epoch.index == index), None)
        if ended is None:
            return
        if all(row["status"] in _UNTOUCHED for row in outcome.answer["ranks"]):
            self.sub_epochs.remove(ended)
        else:
            self.sub_epochs = [one for one in self.sub_epochs if one.scope != ended.scope or one.index >= index]


class Probe(msgspec.Struct, frozen=True, tag="probe"):
    """Says nothing. Stored behind a record of which nobody knows whether it is there: afterwards it is known."""


class Checkpoint(msgspec.Struct, frozen=True, tag="checkpoint"):
    """Everything that the log said before this record. Older records may be removed some time after it."""

    state: LogState


Record = TakeOver | RankJoined | RankLeft | FlushIntent | FlushOutcome | Checkpoint | Probe


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


def encode_record(record: Record) -> bytes:
    """Two records say the same if and only if this is the same of both, stored or not."""
    return _encoder.encode(record)


def decode_entry(data: bytes) -> Entry:
    """Raises msgspec.DecodeError (ValidationError included) on what is no record of this version."""
    return _decoder.decode(data)
