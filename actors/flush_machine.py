"""One flush from its request to its answer, as a machine: what happened comes in, what is to be done comes out.

    storing --IntentStored--> running --all answered, or the time is up--> ending --OutcomeStored--> over

The order is that of protocol.md section 6: the intent is stored before anybody is told; `fence`, `retract` and `abort`
raise the floor on a node before its ranks are told; the outcome is stored before it is called a success. No clock, no
I/O: the shell (`actors/flush_flight.py`) carries the commands out and brings what came of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, Protocol, TypeAlias

from actors.flush_events import (
    Amend,
    CancelAsked,
    CancelOnRank,
    Command,
    Event,
    FloorSettled,
    Forget,
    Give,
    HostFailed,
    HostFlushed,
    IntentStored,
    KeepLate,
    NodeChanged,
    NotStored,
    OutcomeStored,
    RaiseFloor,
    RankAnswered,
    RankFailed,
    RankGone,
    RankRegistered,
    Release,
    StoreIntent,
    StoreOutcome,
    Superseded,
    SupersederEnded,
    TellHost,
    TellRank,
    TimePassed,
    Withhold,
)
from actors.flush_hosts import HostNodes, HostRows
from actors.flush_plan import FlushPlan
from actors.flush_run import Answer, FlushRun, flush_answer
from actors.log_records import FlushIntent, FlushOutcome
from actors.messages import RankRecord

State: TypeAlias = Literal["storing", "running", "ending", "over"]

#: the ranks of a node are told at the latest this long after its agent was asked to raise the floor: a frozen agent
#: must not keep its ranks from flushing
FLOOR_PATIENCE_S = 0.25
#: where the controller knows that a flush is good without a rank's own word, the word is still waited for this long,
#: and a little longer for each rank told: an idle rank answers in 1 to 2 ms, one of many up to 1 ms later for each of
#: the others (benchmarks/flush_fanout_bench.py), and its row then says what it freed
OWN_ANSWER_S = 0.01
OWN_ANSWER_PER_RANK_S = 0.002
#: a rank that lives says in one call what became of a flush that is cancelled
CANCEL_S = 1.0

_TOLD_BY_THE_FLOOR = (
    "the control log was late: no rank was told to flush, but the floor has risen, and each rank drops what it has "
    "cached before it matches again"
)
_TOLD_BY_THE_RECORD = (
    "the control log was late: no host tier was told in time, but each drops what it holds before its next lease"
)


class NodeView(HostNodes, Protocol):
    """What the machine asks of the nodes; `NodeBook` answers."""

    def is_fenced(self, record: RankRecord, epoch: int) -> bool: ...
    def lease_over_s(self, node_id: str) -> float: ...
    def boot_s(self, node_id: str, now_s: float) -> float | None: ...


class FlushMachine:
    """One flush. `handle` is the only method that changes it after `begin` or `resume`."""

    def __init__(self, plan: FlushPlan, run: FlushRun, nodes: NodeView, untouched_tiers: Iterable[str]) -> None:
        """run: without rows. untouched_tiers: those that exist and are not flushed."""
        self.plan = plan
        self.run = run
        self._nodes = nodes
        #: host tiers of the nodes
        self._hosts = HostRows(plan, nodes)
        self._untouched = tuple(untouched_tiers)
        self.state: State = "storing"
        #: until then verdicts are waited for; known when ranks are told
        self._collect_until_s = math.inf
        self._told: set[str] = set()
        #: nodes whose agents have not answered the floor yet, and how long their ranks wait for that
        self._raising: set[str] = set()
        self._patience_until_s = -math.inf
        self._courtesy_until_s = -math.inf
        self._has_superseder_ended = False
        #: a cancelled flush waits no longer than this for what the ranks say of it
        self._cancel_until_s = math.inf
        #: they registered while the intent was being stored, empty; they will be told its epoch
        self._newcomers: list[RankRecord] = []
        #: as fixed by the run, before the log has said whether it is stored
        self._answer: Answer | None = None
        self._withheld: tuple[str, ...] = ()
        #: a repeat of the flush id reads its answer
        self._is_remembered = False
        #: its outcome was not stored, and a failure was handed to the log instead
        self._is_closed_again = False
        #: the time of the last event: what could be decided until then has been
        self._looked_s = -math.inf
        run.takes_epoch = plan.takes_epoch

    # ------------------------------------------------------------------------------------------------------ beginning
    def begin(self, records: Iterable[RankRecord], now_s: float) -> list[Command]:
        """Begin with these ranks registered."""
        self._looked_s = now_s
        for record in records:
            self.run.expect(record)
        if self.run.is_settled:
            return self._give_up("no_ranks", "no rank is registered: nothing was flushed", now_s)
        if not self.plan.is_stored:
            return self._start(self.run.index, now_s)
        run, plan = self.run, self.plan
        return [StoreIntent(FlushIntent(run.request, plan.takes_epoch, tuple(run.waiting_for), run.started_at))]

    def resume(self, index: int, now_s: float) -> list[Command]:
        """Go on with a flush whose intent an earlier controller stored; the run has its rows already."""
        self._looked_s = now_s
        return self._start(index, now_s)

    # --------------------------------------------------------------------------------------------------------- events
    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Take in what happened; what is to be done now, in order."""
        self._looked_s = now_s
        match event:
            case IntentStored(index):
                return self._intent_stored(index, now_s)
            case OutcomeStored():
                return self._outcome_stored()
            case NotStored(message, is_final):
                return self._not_stored(message, is_final, now_s)
            case CancelAsked():
                return self._cancel(now_s)
            case RankRegistered(record, is_new):
                self._register(record, is_new)
            case RankAnswered(incarnation, verdict):
                self.run.answered(incarnation, verdict)
            case RankFailed(incarnation, message, is_final):
                self.run.failed(incarnation, message, is_final)
            case RankGone(incarnation):
                self._newcomers = [record for record in self._newcomers if record.incarnation != incarnation]
                self.run.gone(incarnation)
            case FloorSettled(node_id, num_pages, num_bytes):
                self._raising.discard(node_id)
                if num_pages is not None:
                    self._hosts.floor_raised(node_id, num_pages, num_bytes)
            case HostFlushed(node_id, num_pages, num_bytes):
                self._hosts.answered(node_id, num_pages, num_bytes)
            case HostFailed(node_id, message):
                self._hosts.failed(node_id, message)
            case Superseded(by):
                self.run.superseded_by = by
            case SupersederEnded():
                self._has_superseder_ended = True
            case NodeChanged() | TimePassed():
                pass
        return self._proceed(now_s)

    @property
    def withheld(self) -> tuple[str, ...]:
        """Nodes that get no lease because this flush counts on it."""
        return self._withheld

    @property
    def _has_begun(self) -> bool:
        """Ranks were told, or could have been."""
        return self._collect_until_s < math.inf

    @property
    def can_cancel(self) -> bool:
        """It has not begun to be irrevocable, and is not over."""
        is_irrevocable = self.plan.acts_by_record or (self.plan.tells_hosts and self._has_begun)
        return self.state in ("storing", "running") and not is_irrevocable

    @property
    def can_give_way(self) -> bool:
        """Its ranks would answer a command that supersedes it."""
        return self.state in ("storing", "running")

    @property
    def wake_s(self) -> float | None:
        """When `TimePassed` is due next; None: never again."""
        match self.state:
            case "storing":
                return self.plan.answer_until_s
            case "ending":
                return self.plan.answer_until_s
            case "over":
                return None
            case "running":
                return min(instant_s for instant_s in self._instants() if instant_s > self._looked_s)

    def _instants(self) -> Iterable[float]:
        """When something may be decided without an event. One that has passed has been looked at."""
        yield math.inf
        yield self._collect_until_s
        yield self._patience_until_s
        yield self._courtesy_until_s
        yield self._cancel_until_s
        yield from map(self._nodes.lease_over_s, {record.node_id for record in self.run.open_records})
        yield from map(self._nodes.lease_over_s, self._hosts.open_nodes)

    # ------------------------------------------------------------------------------------------------------- running
    def _intent_stored(self, index: int, now_s: float) -> list[Command]:
        if self.state == "storing":
            return self._start(index, now_s)
        # The caller has its answer; the log shall say the same. A floor that came with the intent holds.
        assert self._answer is not None
        self.run.index = index
        if self.plan.raises_floor_first:
            self._answer = self._answer | {"floor_raised": True, "epoch": index, "message": _TOLD_BY_THE_FLOOR}
        elif self.plan.acts_by_record:
            self._answer = self._answer | {"message": _TOLD_BY_THE_RECORD}
        return [self._store_answer(self._answer)]

    def _start(self, index: int, now_s: float) -> list[Command]:
        """The intent is stored: from here on ranks are told, those too that register meanwhile."""
        run, plan = self.run, self.plan
        run.index = index
        self._collect_until_s = plan.collect_until_s(now_s)
        run.epoch = index if plan.takes_epoch else 0
        run.sub_epoch = index if plan.takes_sub_epoch else 0
        self.state = "running"
        for record in self._newcomers:
            if not run.has(record.incarnation):  # else it was answered before there was this epoch, and is told
                run.joined(record)
        commands: list[Command] = []
        if plan.raises_floor_first:
            run.is_floor_raised = True
            self._raising = {record.node_id for record in run.records}
            self._patience_until_s = now_s + min(FLOOR_PATIENCE_S, (plan.deadline_s - now_s) / 4)
            commands += [RaiseFloor(node_id, index) for node_id in sorted(self._raising)]
        return commands + self._proceed(now_s)

    def _tell_hosts(self) -> list[Command]:
        """Tell the host tiers that must do something themselves, also those that are heard of only now."""
        scope = self.plan.request.scope
        age_s = None if scope is None else scope.older_than_s
        nodes = self._hosts.look({record.node_id for record in self.run.records}, self.run.epoch)
        return [TellHost(node_id, age_s) for node_id in nodes]

    def _register(self, record: RankRecord, is_new: bool) -> None:
        run = self.run
        if not is_new or run.has(record.incarnation):
            run.expect(record)
        elif self.state == "running":
            run.joined(record)
        else:
            self._newcomers.append(record)

    def _proceed(self, now_s: float) -> list[Command]:
        """Tell who may be told, and end if there is nothing to wait for."""
        if self.run.is_closed:
            return self._after_close(now_s)
        if self.state != "running":
            return self._give_up_storing(now_s)
        commands = self._tell_hosts()
        if not self.run.is_cancelled and len(self._told) < len(self.run.records):
            commands += self._tell(now_s)
        if self._is_finished(now_s):
            commands += self._end(now_s)
        return commands

    def _tell(self, now_s: float) -> list[Command]:
        if not self.plan.tells_ranks:
            for incarnation in self.run.waiting_for:
                self.run.stand_in(incarnation, "flushed", "it reads no page that its node's host tier has dropped")
            return []
        due = [record for record in self.run.open_records if self._may_tell(record, now_s)]
        if due:
            self._told.update(record.incarnation for record in due)
            courtesy_s = OWN_ANSWER_S + OWN_ANSWER_PER_RANK_S * len(self._told)
            self._courtesy_until_s = max(self._courtesy_until_s, now_s + courtesy_s)
        budget_s = self.plan.rank_budget_s(now_s)
        return [TellRank(record, budget_s, self.plan.valid_until_s) for record in due]

    def _may_tell(self, record: RankRecord, now_s: float) -> bool:
        """Not twice, not before its node's floor, and not before it is known what its clock shows."""
        if record.incarnation in self._told or self._nodes.boot_s(record.node_id, now_s) is None:
            return False
        return record.node_id not in self._raising or now_s >= self._patience_until_s

    def _is_finished(self, now_s: float) -> bool:
        if now_s >= min(self._collect_until_s, self._cancel_until_s):
            return True
        if self.run.is_settled:
            return self._hosts.is_settled(now_s)
        if self._has_superseder_ended:
            return True
        if now_s < self._courtesy_until_s or self.run.is_cancelled:
            return False
        if self._raising and now_s < self._patience_until_s:
            return False
        are_all_good = all(self._stand_in(record, now_s) is not None for record in self.run.open_records)
        return are_all_good and self._hosts.is_settled(now_s)

    def _stand_in(self, record: RankRecord, now_s: float) -> tuple[Literal["fenced", "expired"], str] | None:
        """What is good about this rank without its own word."""
        if self.plan.counts_fenced and self._nodes.is_fenced(record, self.run.epoch):
            return "fenced", "the floor is on the page that it reads before each match"
        if now_s >= self._nodes.lease_over_s(record.node_id):
            # a flush without an epoch has a floor for this node alone (`LogState.floor_of`)
            return "expired", "its node is out of lease: it serves uncached until it has been told the floor"
        return None

    # ----------------------------------------------------------------------------------------------------- the answer
    def _end(self, now_s: float) -> list[Command]:
        """Fix the answer and have it stored."""
        run, plan = self.run, self.plan
        self._speak_for_the_silent(now_s)
        answer = self._answer = run.close(now_s, self._untouched, hosts=self._hosts)
        if not plan.is_stored:
            return self._give(answer)
        self.state = "ending"
        commands: list[Command] = []
        if not plan.raises_floor_first:
            rows = [*answer["ranks"], *answer["host_tiers"]]
            nodes = {row["node"] for row in rows if row["status"] == "expired"}
            self._withheld = tuple(sorted(nodes)) if answer["success"] else ()
            commands += [Withhold(self._withheld)] if self._withheld else []
        return [*commands, self._store_answer(answer)]

    def _store_answer(self, answer: Answer) -> Command:
        floor = answer["epoch"] if answer["floor_raised"] else 0
        return StoreOutcome(FlushOutcome(self.run.index, floor, answer))

    def _speak_for_the_silent(self, now_s: float) -> None:
        """Verdicts for the ranks that gave none, or, in mode fence, none that is as good as the floor."""
        run = self.run
        open_ones = set(run.waiting_for)
        for record, failure in run.unsatisfied():
            incarnation = record.incarnation
            is_open = incarnation in open_ones
            stand_in = self._stand_in(record, now_s)
            if stand_in is not None and (is_open or stand_in[0] == "fenced"):
                run.stand_in(incarnation, *stand_in)
            elif is_open and run.superseded_by is not None:
                run.stand_in(incarnation, "superseded", f"gave way to flush {run.superseded_by}")
            elif is_open and not failure and incarnation not in self._told:
                run.failed(incarnation, "its node has not been heard of since the controller began", is_final=False)

    def _outcome_stored(self) -> list[Command]:
        assert self._answer is not None
        commands = self._release()
        if self.state == "over":
            return [*commands, Amend(self._answer)] if self._is_remembered else commands
        floor = self.run.epoch if self._answer["floor_raised"] and not self.plan.raises_floor_first else 0
        nodes = sorted({record.node_id for record in self.run.records}) if floor else []
        # The ranks have swapped already; the floor holds for those that come back and for what is on its way.
        return [*commands, *self._give(self._answer), *(RaiseFloor(node_id, floor) for node_id in nodes)]

    def _release(self) -> list[Command]:
        """The log says what became of this flush: the nodes that it counted as out of lease may have one."""
        commands: list[Command] = [Release(self._withheld)] if self._withheld else []
        self._withheld = ()
        return commands

    def _not_stored(self, message: str, is_final: bool, now_s: float) -> list[Command]:
        commands: list[Command] = []
        match self.state:
            case "storing" if self.plan.acts_by_record and not is_final:
                return self._give_up_in_doubt(message, now_s)
            case "storing":
                return self._give_up("unavailable", f"{message}; no rank was told to flush", now_s)
            case "ending":
                commands = self._give(self._without_success(message))
        # While nobody knows whether the outcome is stored the next controller may read a success from it, so the nodes
        # that it counts as out of lease get none.
        return [*commands, *self._found_missing()] if is_final else commands

    def _found_missing(self) -> list[Command]:
        """The record in question is not in the log and never will be."""
        if not self.run.index:
            self._answer = None
            return [Forget()] if self._is_remembered else []
        assert self._answer is not None
        commands = self._release()
        if not self._is_closed_again:  # once: a flush left open is closed by the next controller
            self._is_closed_again = True
            self._answer = self._without_success("its outcome could not be stored")
            commands.append(self._store_answer(self._answer))
        return commands

    def _after_close(self, now_s: float) -> list[Command]:
        """Late verdicts, and the time at which the answer leaves although the log is silent."""
        if self.state == "ending" and now_s >= self.plan.answer_until_s:
            return self._give(self._without_success("the control log did not answer in time"))
        late = self.run.late
        return [KeepLate(late)] if self.state == "over" and late else []

    def _give_up_storing(self, now_s: float) -> list[Command]:
        if self.state != "storing" or now_s < self.plan.answer_until_s:
            return []
        return self._not_stored("the control log did not answer in time", is_final=False, now_s=now_s)

    def _without_success(self, message: str) -> Answer:
        """What may be said of a flush whose outcome is not stored."""
        assert self._answer is not None
        if not self._answer["success"]:
            return self._answer
        return self._answer | {
            "success": False, "status": "unavailable", "http_status": 503,
            "floor_raised": self.run.is_floor_raised, "message": f"every rank has flushed, but {message}",
        }  # fmt: skip

    def _give(self, answer: Answer) -> list[Command]:
        self.state = "over"
        self._is_remembered = self.plan.is_stored
        return [Give(answer, self._is_remembered)]

    def _give_up(self, status: str, message: str, now_s: float) -> list[Command]:
        """Nobody was told, and nothing has changed: the same id may try again."""
        rows = self.run.not_told("refused", f"It was not told: {message}")
        self._answer = self._unbegun(status, message, rows, now_s)
        self.state = "over"
        return [Give(self._answer, is_remembered=False)]

    def _give_up_in_doubt(self, message: str, now_s: float) -> list[Command]:
        """Nobody was told, but the intent acts if it is stored: the id is kept until that is known."""
        message = (
            f"{message}; no rank was told to flush, but the record may drop it all: ask again for what became of it"
        )
        rows = self.run.not_told("unreachable", f"It was not told: {message}")
        self._answer = self._unbegun("unavailable", message, rows, now_s)
        return self._give(self._answer)

    def _unbegun(self, status: str, message: str, rows: list[dict[str, Any]], now_s: float) -> Answer:
        run = self.run
        return flush_answer(
            run.request, success=False, status=status, message=message,
            http_status=409 if status == "cancelled" else 503, started_at=run.started_at,
            took_ms=(now_s - run.started_s) * 1000, ranks=rows, untouched_tiers=list(self._untouched),
        )  # fmt: skip

    # ------------------------------------------------------------------------------------------------------ cancelling
    def _cancel(self, now_s: float) -> list[Command]:
        if not self.can_cancel or self.run.is_cancelled:
            return []
        self.run.is_cancelled = True
        if self.state == "storing":
            return self._give_up("cancelled", "cancelled before any rank was told", now_s)
        commands: list[Command] = []
        self._cancel_until_s = now_s + CANCEL_S
        for record in self.run.open_records:
            if record.incarnation in self._told:
                commands.append(CancelOnRank(record.incarnation, self.run.index))
            else:
                self.run.stand_in(record.incarnation, "refused", "cancelled before it was told")
        return commands + self._proceed(now_s)
