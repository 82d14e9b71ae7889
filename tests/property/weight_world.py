"""A cluster for weight updates: the real machines of controller and ranks, a log, nodes with pages, and a post that
loses, doubles and reorders. Chance is drawn by whoever drives it."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

from actors import weight_events as events
from actors.messages import RankRecord
from actors.weight_machine import WeightMachine
from actors.weight_plan import WeightPlan
from actors.weight_records import WeightDecision, WeightIntent, WeightLogState, WeightRecord
from actors.weight_recovery import interrupted_rows
from actors.weight_request import parse_update
from actors.weight_run import WeightRun
from engine.flush import Blockers
from engine.weight_desk import WeightDesk
from engine.weight_update import (
    AbortTold,
    Answer,
    Command,
    Commit,
    CommitDone,
    CommitTold,
    Drop,
    Event,
    InFlightMode,
    PrepareCommand,
    PrepareTold,
    RankUpdate,
    Registered,
    Stage,
    Staged,
    StagingFailed,
    Turn,
)
from tests.unit.actors.fakes import rank_record

SLACK_S = 0.05
TIMEOUT_S = 8.0


def digest_of_record(record: int) -> str:
    """Every update of this world is complete, so its record says what is served after it."""
    return f"weights-{record}"


@dataclass
class Node:
    """A node's page and its link to the controller."""

    weights_floor: int = 0
    lease_ok: bool = True
    is_reachable: bool = True


@dataclass
class Rank:
    record: RankRecord
    desk: WeightDesk
    is_frozen: bool = False
    #: what was told it and not handled yet
    inbox: deque[Event] = field(default_factory=deque)
    #: updates that are being loaded
    staging: list[PrepareCommand] = field(default_factory=list)
    blockers: Blockers = field(default_factory=Blockers)
    #: updates it has voted for
    votes: set[int] = field(default_factory=set)


@dataclass(frozen=True)
class ToRank:
    """A message under way."""

    incarnation: str
    event: Event


@dataclass(frozen=True)
class FromRank:
    incarnation: str
    answer: RankUpdate
    #: of the controller it goes to
    term: int


Message: TypeAlias = ToRank | FromRank
Store: TypeAlias = events.StoreIntent | events.StoreDecision | events.StoreOutcome


class World:
    def __init__(self, num_nodes: int = 2) -> None:
        self.now_s = 100.0
        self.nodes = {f"node-{number}": Node() for number in range(num_nodes)}
        #: living processes
        self.ranks: dict[str, Rank] = {}
        self.past: dict[str, RankRecord] = {}
        self.post: list[Message] = []
        self.log: list[WeightRecord | str] = []
        self.state = WeightLogState()
        self.machine: WeightMachine | None = None
        self.stores: deque[Store] = deque()
        #: a record whose storing got no answer, and whether it is in the log
        self.limbo: tuple[Store, bool] | None = None
        self.has_controller = True
        self.term = self._append("take-over")
        self.num_updates = 0
        self.answers: list[tuple[int, dict[str, Any]]] = []
        self.num_commits = 0

    # ------------------------------------------------------------------------------------------------------ the log
    def _append(self, record: WeightRecord | str) -> int:
        self.log.append(record)
        index = len(self.log)
        if not isinstance(record, str):
            self.state.apply(index, record)
        return index

    @property
    def decided(self) -> dict[int, WeightDecision]:
        """Every decision that is stored, whoever knows of it."""
        return {record.intent: record for record in self.log if isinstance(record, WeightDecision)}

    def store_next(self, fate: str) -> None:
        """fate: stored; lost for certain; or unknown, in which case it lies there or does not."""
        store = self.stores.popleft()
        if fate == "stored":
            self._tell_stored(store, self._append(_record_of(store)))
        elif fate == "lost":
            self._tell(events.NotStored("the disk is full", is_final=True))
        else:
            is_there = fate == "unknown, there"
            if is_there:
                self._append(_record_of(store))
            self.limbo = (store, is_there)
            self._tell(events.NotStored("the store hangs"))

    def clear_up(self) -> None:
        """The log answers at last."""
        assert self.limbo is not None
        (store, is_there), self.limbo = self.limbo, None
        if is_there:
            index = max(place for place, record in enumerate(self.log, 1) if record == _record_of(store))
            self._tell_stored(store, index)
        else:
            self._tell(events.NotStored("another record lies there", is_final=True))

    def _tell_stored(self, store: Store, index: int) -> None:
        match store:
            case events.StoreIntent():
                self._tell(events.IntentStored(index))
            case events.StoreDecision():
                self._tell(events.DecisionStored())
            case events.StoreOutcome():
                self._tell(events.OutcomeStored())

    # ------------------------------------------------------------------------------------------------ the controller
    def boot_s(self, node_id: str, now_s: float) -> float | None:
        return now_s

    def begin(self, in_flight: InFlightMode, exclude: list[str]) -> None:
        self.num_updates += 1
        arguments = {"update_id": f"u{self.num_updates}", "timeout_s": TIMEOUT_S, "in_flight": in_flight}
        request = parse_update(arguments | {"exclude": exclude}, 60.0, lambda: "drawn")
        self.machine = WeightMachine(
            WeightPlan.of(request, self.now_s, SLACK_S), WeightRun(request, "then", self.now_s), self
        )
        self._carry_out(self.machine.begin([rank.record for rank in self.ranks.values()], self.now_s))

    def _tell(self, event: events.Event) -> None:
        if self.machine is not None:
            self._carry_out(self.machine.handle(event, self.now_s))

    def _carry_out(self, commands: list[events.Command]) -> None:
        for command in commands:
            match command:
                case events.StoreIntent() | events.StoreDecision() | events.StoreOutcome():
                    self.stores.append(command)
                case events.RaiseWeights(node_id, floor, _):
                    self._raise(self.nodes[node_id], floor)
                case events.Give(answer) | events.Amend(answer):
                    self._answered(answer)
                case _:
                    self._send(command)

    def _send(self, command: events.PrepareRank | events.CommitOnRank | events.AbortOnRank) -> None:
        assert self.machine is not None
        update_id, index = self.machine.run.request.update_id, command.index
        event: Event
        if isinstance(command, events.PrepareRank):
            told = PrepareCommand(
                update_id, index, self.term, self.machine.run.request.in_flight, decided_record=self.state.record
            )
            event = PrepareTold(told, self.now_s + command.vote_budget_s, self.now_s + command.keep_budget_s)
        elif isinstance(command, events.CommitOnRank):
            event = CommitTold(update_id, index, self.term)
        else:
            event = AbortTold(update_id, index, self.term)
        self.post.append(ToRank(command.record.incarnation, event))

    def _answered(self, answer: dict[str, Any]) -> None:
        assert self.machine is not None
        self.answers.append((self.machine.run.index, answer))
        if answer["success"]:
            self._check_success(answer)

    def _check_success(self, answer: dict[str, Any]) -> None:
        """Invariant 18 and G6: whoever is registered serves the new weights or nothing."""
        record = answer["weights_record"]
        assert record in self.decided
        excluded = {row["incarnation"] for row in answer["ranks"] if row["status"] == "excluded"}
        for incarnation, rank in self.ranks.items():
            if incarnation not in excluded:
                assert rank.desk.record >= record or rank.desk.is_stale, f"{incarnation} may serve old weights"

    def crash_controller(self) -> None:
        """Records under way are in the log or not; which, was drawn when they went into limbo."""
        self.has_controller, self.machine, self.limbo = False, None, None
        self.stores.clear()

    def restart_controller(self) -> None:
        self.has_controller = True
        self.term = self._append("take-over")
        for index, intent in list(self.state.open.items()):
            self._resume(index, intent)

    def _resume(self, index: int, intent: WeightIntent) -> None:
        run = WeightRun(intent.request, "then", self.now_s)
        decision = self.state.decided.get(index)
        here = [rank.record for rank in self.ranks.values()]
        interrupted_rows(run, intent, here, self.past, is_decided=decision is not None)
        self.machine = WeightMachine(WeightPlan.of(intent.request, self.now_s, SLACK_S), run, self)
        self._carry_out(self.machine.resume(index, decision, self.now_s))

    def pass_time(self, seconds: float) -> None:
        self.now_s += seconds
        machine = self.machine
        while machine is not None and machine.wake_s is not None and machine.wake_s <= self.now_s:
            self._tell(events.TimePassed())

    @property
    def is_free(self) -> bool:
        """Another update may begin."""
        machine = self.machine
        return (
            self.has_controller and (machine is None or machine.state == "over") and not self.stores and not self.limbo
        )

    # ------------------------------------------------------------------------------------------------------ the nodes
    def _raise(self, node: Node, floor: int) -> None:
        if node.is_reachable:
            node.weights_floor = max(node.weights_floor, floor)

    def cut_off(self, node_id: str) -> None:
        self.nodes[node_id].is_reachable = False

    def run_out(self, node_id: str) -> None:
        """The lease of a node that is cut off is over."""
        self.nodes[node_id].lease_ok = False

    def grant(self, node_id: str) -> None:
        """A lease vouches for what the log says."""
        node = self.nodes[node_id]
        node.is_reachable = True
        self._raise(node, self.state.record)
        node.lease_ok = True

    # ------------------------------------------------------------------------------------------------------ the ranks
    def register(self, number: int, node_id: str) -> None:
        """The member is added first, then it is told what is decided; it serves nothing before."""
        incarnation = f"rank-{number}"
        record = replace(rank_record(number, incarnation), node_id=node_id)
        rank = self.ranks[incarnation] = Rank(record, WeightDesk(digest_of_record(0)))
        self._tell(events.RankRegistered(record, True))
        rank.desk.handle(Registered(self.state.record, digest_of_record(self.state.record)), self.now_s)
        self.grant(node_id)

    def kill(self, incarnation: str) -> None:
        self.past[incarnation] = self.ranks.pop(incarnation).record
        self._tell(events.RankGone(incarnation))

    def deliver(self, message: Message) -> None:
        match message:
            case ToRank(incarnation, event):
                if incarnation in self.ranks:
                    self.ranks[incarnation].inbox.append(event)
            case FromRank(incarnation, answer, term):
                if term == self.term and self.has_controller:
                    self._tell(events.RankAnswered(incarnation, answer))

    def lose(self, message: Message) -> None:
        """The caller's call fails, or, if the controller that called is gone, nobody minds."""
        if self.has_controller and (isinstance(message, ToRank) or message.term == self.term):
            self._tell(events.RankFailed(message.incarnation, "the call was lost", False))

    def finish_staging(self, incarnation: str, is_good: bool) -> None:
        rank = self.ranks[incarnation]
        command = rank.staging.pop(0)
        event = Staged(command.index, digest_of_record(command.index))
        rank.inbox.append(event if is_good else StagingFailed(command.index, "one tensor does not fit"))

    def turn(self, incarnation: str) -> None:
        """Drain the inbox, read the words, then decide, as the engine does."""
        rank = self.ranks[incarnation]
        node = self.nodes[rank.record.node_id]
        while rank.inbox:
            self._of_rank(rank, rank.desk.handle(rank.inbox.popleft(), self.now_s))
        self._of_rank(rank, rank.desk.handle(Turn(node.weights_floor, node.lease_ok, rank.blockers), self.now_s))
        self._check_turn(rank, node)

    def _check_turn(self, rank: Rank, node: Node) -> None:
        """Invariant 18 on one rank, with what it could know."""
        desk = rank.desk
        assert desk.digest == digest_of_record(desk.record)
        assert desk.record == 0 or desk.record in self.decided, "committed without a decision"
        if not desk.may_admit:
            return
        assert desk.record >= node.weights_floor, "admits under weights that its page says are old"
        if not node.lease_ok:
            followed = all(index <= desk.record for index in rank.votes & self.decided.keys())
            assert followed, "out of lease it admits under weights that it voted away"

    def _of_rank(self, rank: Rank, commands: list[Command]) -> None:
        for command in commands:
            match command:
                case Stage(told):
                    rank.staging.append(told)
                case Drop(index):
                    rank.staging = [told for told in rank.staging if told.index != index]
                case Commit(index):
                    assert index in self.decided, "told to commit without a decision"
                    self.num_commits += 1
                    self._of_rank(rank, rank.desk.handle(CommitDone(index), self.now_s))
                case Answer(answer):
                    if answer.status == "prepared":
                        rank.votes.add(answer.index)
                    self.post.append(FromRank(rank.record.incarnation, answer, self.term))


def _record_of(store: Store) -> WeightRecord:
    match store:
        case events.StoreIntent(record) | events.StoreDecision(record) | events.StoreOutcome(record):
            return record
