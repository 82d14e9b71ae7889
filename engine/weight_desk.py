"""The rank's side of weight updates, as a machine: what happened comes in, what is to be done comes out.

    serving --PrepareTold--> staging --Staged--> staged --vote yes--> prepared --decided--> serving (new weights)
               any of them --a fault, an abort, a deadline--> serving (old weights)

**The decision** is the weights floor of the control page, read in each turn. It is the record of the last decided
update, and it says three things:
- equal to the record of the prepared update: that one is decided, and is committed in this turn, without a message;
- higher than it: another update came behind. Whether this one was decided before cannot be told from the word, so it
  is dropped; committing it because the floor is *not below* would serve weights that were never decided;
- above the record of the weights served, for whatever reason: nothing is admitted until they have been followed.

**In doubt.** A rank that voted yes and has not been told the end may be behind a decision. While its node has a lease
it serves on with the old weights: the floor it reads is then at most one lease old. Without a lease it admits nothing,
not even uncached, because nobody can tell it of a decision (hole H32). Its own deadline frees the staged weights, not
the doubt: should the decision turn up after all, the rank is stale and says so.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

from configs.errors import InvariantError
from engine.flush import Blockers
from engine.weight_policy import fate_of_running, holds_admission, may_vote
from engine.weight_update import (
    AbortTold,
    Answer,
    Command,
    Commit,
    CommitDone,
    CommitFailed,
    CommitTold,
    Drop,
    Event,
    PrepareCommand,
    PrepareTold,
    RankUpdate,
    Registered,
    Stage,
    Staged,
    StagingFailed,
    TimePassed,
    Turn,
    UpdateStatus,
)

#: what was answered about this many updates is said again to who asks again
NUM_REMEMBERED = 64

Phase: TypeAlias = Literal["staging", "staged", "prepared", "committing"]


@dataclass(slots=True)
class _Update:
    """The one update under way."""

    command: PrepareCommand
    vote_until_s: float
    keep_until_s: float
    phase: Phase = "staging"
    #: of the model as it will be
    digest: str = ""
    #: the controller itself has said that it is decided
    is_decided: bool = False

    @property
    def index(self) -> int:
        return self.command.index


class WeightDesk:
    """One rank's weights. `handle` is the only method that changes anything; it belongs to one thread."""

    def __init__(self, digest: str, version: str = "default", record: int = 0) -> None:
        """digest, version: of the weights that were loaded."""
        #: of the update that brought the weights served; 0: none
        self.record = record
        self.digest = digest
        self.version = version
        self._update: _Update | None = None
        #: the newest update this rank voted for and does not know the end of; 0: none
        self._in_doubt = 0
        self._floor = record
        self._lease_ok = True
        self._blockers = Blockers()
        self._term = 0
        self._answers: OrderedDict[int, RankUpdate] = OrderedDict()

    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Take in what happened; what is to be done now, in order. Never raises for what others do."""
        match event:
            case Turn():
                return self._turn(event, now_s)
            case PrepareTold():
                return self._prepare(event, now_s)
            case Staged(index, digest):
                return self._staged(index, digest)
            case StagingFailed(index, message):
                return self._staging_failed(index, message)
            case CommitTold():
                return self._commit_told(event)
            case AbortTold():
                return self._abort_told(event)
            case CommitDone():
                return self._committed(event)
            case CommitFailed(index, message):
                return self._commit_failed(index, message)
            case Registered(record, digest):
                return self._registered(record, digest)
            case TimePassed():
                # The turn behind it looks at the clock, after it has read whether there is a decision.
                return []

    # --------------------------------------------------------------------------------------------------------- views
    @property
    def may_admit(self) -> bool:
        """Whether a request may be admitted in this turn, by what the weights say. Running ones go on in any case."""
        if self.is_stale or (self._in_doubt > self.record and not self._lease_ok):
            return False
        update = self._update
        if update is None or update.phase == "staging":
            return True
        return not holds_admission(update.command.in_flight, has_voted=update.phase != "staged")

    @property
    def is_stale(self) -> bool:
        """Newer weights are decided than these."""
        return self._floor > self.record

    @property
    def phase(self) -> Phase | Literal["serving"]:
        return "serving" if self._update is None else self._update.phase

    @property
    def open_update_id(self) -> str | None:
        """Of the update under way."""
        return None if self._update is None else self._update.command.update_id

    @property
    def wake_s(self) -> float:
        """When `TimePassed` is due; infinity: not at all."""
        update = self._update
        if update is None or update.phase == "committing":
            return math.inf
        return update.keep_until_s if update.phase == "prepared" else update.vote_until_s

    # ---------------------------------------------------------------------------------------------------- preparing
    def _prepare(self, told: PrepareTold, now_s: float) -> list[Command]:
        command, update = told.command, self._update
        if refused := self._other_term(command.update_id, command.index, command.term):
            return refused
        if update is not None and update.index == command.index:
            # Told again: the answer to come is the answer, or it was given already.
            return [self._vote(update)] if update.phase == "prepared" else []
        known = self._answers.get(command.index)
        if known is not None and (known.status == "committed" or not command.decided_digest):
            return [Answer(known)]
        commands = self._floor_told(command.decided_record)
        refusal = self._refusal(told, now_s)
        if refusal is not None:
            return [*commands, self._end(command, *refusal)]
        if self._update is not None:
            # A newer update is begun only when the one before has its end, whatever this rank was told of it.
            commands += self._abandon(self._update, "aborted", "A newer update was begun.")
        self._in_doubt = 0
        self._update = _Update(command, told.vote_until_s, told.keep_until_s, is_decided=bool(command.decided_digest))
        return [*commands, Stage(command)]

    def _refusal(self, told: PrepareTold, now_s: float) -> tuple[UpdateStatus, str] | None:
        """What speaks against it before a byte is read."""
        command, update = told.command, self._update
        if now_s >= told.vote_until_s:
            return "expired_command", "Came too late."
        if update is not None and (update.is_decided or update.index > command.index):
            return "refused", f"Update {update.command.update_id} is under way and comes first."
        newest = self._floor if not command.decided_digest else self._floor - 1
        if command.index <= max(self.record, newest):
            return "refused", f"Its record {command.index} is older than the weights that are decided."
        if command.base_digest not in ("", self.digest):
            return "refused", "A part of the weights cannot be laid upon others than it was meant for."
        return None

    def _staged(self, index: int, digest: str) -> list[Command]:
        update = self._update
        if update is None or update.index != index or update.phase != "staging":
            return [Drop(index)]
        wanted = update.command.decided_digest
        if wanted not in ("", digest):
            message = "These are not the weights that were decided."
            return self._abandon(update, "refused", message)
        update.digest = digest
        update.phase = "prepared" if wanted else "staged"
        # Votes are given at a step boundary, when it is known who runs.
        return []

    def _staging_failed(self, index: int, message: str) -> list[Command]:
        update = self._update
        if update is None or update.index != index or update.phase != "staging":
            return []
        return self._abandon(update, "refused", message)

    def _vote_if_due(self, update: _Update) -> list[Command]:
        if update.phase != "staged" or not may_vote(update.command.in_flight, self._blockers):
            return []
        update.phase = "prepared"
        self._in_doubt = update.index
        return [self._vote(update)]

    def _vote(self, update: _Update) -> Answer:
        command = update.command
        row = self._row(command.update_id, command.index, "prepared", "")
        return Answer(replace(row, digest=update.digest, version=command.version or self.version))

    # -------------------------------------------------------------------------------------------------------- the end
    def _turn(self, turn: Turn, now_s: float) -> list[Command]:
        self._lease_ok, self._blockers = turn.lease_ok, turn.blockers
        commands = self._floor_told(turn.weights_floor)
        update = self._update
        if update is not None and update.phase == "prepared" and update.is_decided:
            return [*commands, self._commit(update)]
        commands += self._look_at_deadlines(now_s)
        if self._update is not None:
            commands += self._vote_if_due(self._update)
        return commands

    def _floor_told(self, floor: int) -> list[Command]:
        """This record is decided. What is prepared for it is committed in the next turn, what is older is dropped."""
        self._floor = max(self._floor, floor)
        if 0 < self._in_doubt < self._floor:
            self._in_doubt = 0
        update = self._update
        if update is None or update.index > self._floor or update.phase == "committing":
            return []
        if update.index == self._floor and (update.phase == "prepared" or update.command.decided_digest):
            update.is_decided = True
            return []
        return self._abandon(update, "stale", "Newer weights were decided meanwhile.")

    def _commit(self, update: _Update) -> Commit:
        command = update.command
        update.phase = "committing"
        fate = fate_of_running(command.in_flight, self._blockers)
        return Commit(update.index, fate, command.version, update.index if command.flush_cache else None)

    def _committed(self, done: CommitDone) -> list[Command]:
        update = self._committing(done.index)
        self.record, self.digest = update.index, update.digest
        self.version = update.command.version or self.version
        self._floor = max(self._floor, self.record)
        self._in_doubt, self._update = 0, None
        numbers = {"num_retracted": done.num_retracted, "num_aborted": done.num_aborted}
        return [self._end(update.command, "committed", "", **numbers)]

    def _commit_failed(self, index: int, message: str) -> list[Command]:
        update = self._committing(index)
        self._floor = max(self._floor, index)
        return self._abandon(update, "failed", message)

    def _committing(self, index: int) -> _Update:
        update = self._update
        if update is None or update.index != index or update.phase != "committing":
            raise InvariantError(f"the weights of record {index} were swapped, though nobody asked for it")
        return update

    def _commit_told(self, told: CommitTold) -> list[Command]:
        if refused := self._other_term(told.update_id, told.index, told.term):
            return refused
        # The word of a controller that holds the decision is worth as much as the one on the page.
        commands = self._floor_told(told.index)
        update = self._update
        if commands or (update is not None and update.index == told.index):
            # Dropped, and said so; or it will be committed, and answered then.
            return commands
        if not self.is_stale:
            return [Answer(self._answers.get(told.index) or self._row(told.update_id, told.index, "committed", ""))]
        message = "This rank does not hold these weights; it admits nothing until it has them."
        return [Answer(self._row(told.update_id, told.index, "stale", message))]

    def _abort_told(self, told: AbortTold) -> list[Command]:
        if refused := self._other_term(told.update_id, told.index, told.term):
            return refused
        if self._in_doubt == told.index:
            self._in_doubt = 0
        update = self._update
        if update is not None and update.index == told.index and update.phase != "committing":
            return self._abandon(update, "aborted", "The update was not decided.")
        known = self._answers.get(told.index)
        if known is not None and known.status != "timed_out":
            return [Answer(known)]
        # It may still be on its way here: remembered, so that it is not begun then.
        return [self._remember(self._row(told.update_id, told.index, "aborted", "The update was not decided."))]

    def _look_at_deadlines(self, now_s: float) -> list[Command]:
        update = self._update
        if update is None or now_s < self.wake_s:
            return []
        if update.phase == "prepared":
            return self._abandon(update, "timed_out", "No decision came; the staged weights are freed.")
        what = "The weights were not loaded" if update.phase == "staging" else "Running requests did not end"
        return self._abandon(update, "timed_out", f"{what} within the time of the update.")

    def _registered(self, record: int, digest: str) -> list[Command]:
        """Weights with the digest of the decided ones are the decided ones, wherever they came from (hole H33)."""
        commands = self._floor_told(record)
        if record > self.record and digest == self.digest:
            self.record = record
        return commands

    # --------------------------------------------------------------------------------------------------------- inside
    def _other_term(self, update_id: str, index: int, term: int) -> list[Command]:
        """The refusal of a command whose sender is superseded; not remembered."""
        if term >= self._term:
            self._term = term
            return []
        message = f"Term {term} is over; a controller of term {self._term} has taken over."
        return [Answer(self._row(update_id, index, "refused", message))]

    def _abandon(self, update: _Update, status: UpdateStatus, message: str) -> list[Command]:
        """The old weights stay. Whether this rank voted for the new ones is remembered apart."""
        self._update = None
        return [Drop(update.index), self._end(update.command, status, message)]

    def _end(self, command: PrepareCommand, status: UpdateStatus, message: str, **numbers: int) -> Answer:
        return self._remember(self._row(command.update_id, command.index, status, message, **numbers))

    def _row(self, update_id: str, index: int, status: UpdateStatus, message: str, **numbers: int) -> RankUpdate:
        row = RankUpdate(update_id, index, status, message, self.digest, self.version, self._blockers)
        return replace(row, **numbers) if numbers else row

    def _remember(self, row: RankUpdate) -> Answer:
        self._answers[row.index] = row
        while len(self._answers) > NUM_REMEMBERED:
            self._answers.popitem(last=False)
        return Answer(row)
