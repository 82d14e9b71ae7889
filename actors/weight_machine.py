"""One weight update from its request to its answer, as a machine: what happened comes in, what is to be done comes out.

    storing --IntentStored--> preparing --every vote is a yes--> deciding --DecisionStored--> committing --> ending
                                  |  a no, a loss, the time                 | nobody knows
                                  +--> ending (nothing has changed)         +--> in_doubt --> committing, or ending

    ending --OutcomeStored, or the time--> over

The order is that of protocol.md section 6: no rank commits without a decision in the log, and with one nothing goes
back. Until the decision is stored every rank may be told to abort; from the moment its storing was asked for, only if
the log itself says that it is not there. A rank that does not follow is named, and admits nothing (invariant 18).
No clock, no I/O: a shell carries the commands out and brings what came of them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal, Protocol, TypeAlias

from actors.messages import RankRecord
from actors.weight_events import (
    AbortOnRank,
    Amend,
    CancelAsked,
    Command,
    CommitOnRank,
    DecisionStored,
    Event,
    Give,
    IntentStored,
    NodeChanged,
    NotStored,
    OutcomeStored,
    PrepareRank,
    RaiseWeights,
    RankAnswered,
    RankFailed,
    RankGone,
    RankRegistered,
    StoreDecision,
    StoreIntent,
    StoreOutcome,
    TimePassed,
)
from actors.weight_plan import LATE_COMMIT_S, WeightPlan
from actors.weight_records import WeightDecision, WeightIntent, WeightOutcome
from actors.weight_run import WeightRun

State: TypeAlias = Literal["storing", "preparing", "deciding", "in_doubt", "committing", "ending", "over"]

#: a call that failed is made again after this long: an idle rank answers in 2 ms, a frozen one not at all
RETRY_S = 0.1

_LOG_SILENT = "the control log did not answer in time"


class NodeView(Protocol):
    """What the machine asks of the nodes; `NodeBook` answers."""

    def boot_s(self, node_id: str, now_s: float) -> float | None: ...


class WeightMachine:
    """One update. `handle` is the only method that changes it after `begin` or `resume`."""

    def __init__(self, plan: WeightPlan, run: WeightRun, nodes: NodeView) -> None:
        """run: without rows, or with those of an update that an earlier controller began."""
        self.plan = plan
        self.run = run
        self._nodes = nodes
        self.state: State = "storing"
        #: as it was asked to be stored, or found in the log
        self._decision: WeightDecision | None = None
        self._base_digest = ""
        #: until then commits are waited for
        self._commit_until_s = plan.commit_until_s
        #: they were told of the update, and are told of its end
        self._told: set[str] = set()
        #: as fixed, before the log has it
        self._answer: dict[str, Any] | None = None
        self._is_given = False
        #: the time of the last event: what could be decided until then has been
        self._looked_s = -math.inf

    # ------------------------------------------------------------------------------------------------------ beginning
    def begin(self, records: Iterable[RankRecord], now_s: float, decided_digest: str = "") -> list[Command]:
        """Begin with these ranks registered. decided_digest: of the weights decided last, "" if none ever were: then
        the ranks serve what they said when they registered."""
        self._looked_s = now_s
        run = self.run
        for record in records:
            run.expect(record, "excluded" if run.is_excluded(record) else "voter")
        if not run.incarnations("voter"):
            return self._give_up("no_ranks", "no rank is registered that could vote: nothing was changed", now_s)
        if run.request.is_partial:
            base_digest = decided_digest or run.registered_digest()
            if base_digest is None:
                message = "the ranks serve different weights: only a complete update can make them one"
                return self._give_up("conflict", message, now_s)
            self._base_digest = base_digest
        members, excluded = run.incarnations("voter"), run.incarnations("excluded")
        return [StoreIntent(WeightIntent(run.request, members, excluded, run.started_at))]

    def resume(self, index: int, decision: WeightDecision | None, now_s: float) -> list[Command]:
        """Take over an update from the log; the run has its rows. Without a decision it is aborted, with one carried
        forward."""
        self._looked_s = now_s
        self.run.index = index
        self._told = {record.incarnation for record in self.run.records}
        if decision is None:
            return self._abort("interrupted", "the controller that began this update has ended; nothing changed", now_s)
        self._decision = decision
        return self._start_commits(decision, now_s)

    # --------------------------------------------------------------------------------------------------------- events
    def handle(self, event: Event, now_s: float) -> list[Command]:
        """Take in what happened; what is to be done now, in order."""
        self._looked_s = now_s
        match event:
            case IntentStored(index):
                return self._intent_stored(index, now_s)
            case DecisionStored():
                return self._decision_stored(now_s)
            case OutcomeStored():
                return self._let_go() if self.state == "ending" else []
            case NotStored(message, is_final):
                return self._not_stored(message, is_final, now_s)
            case CancelAsked():
                return self._cancel(now_s)
            case RankRegistered(record, is_new):
                self._register(record, is_new)
            case RankAnswered(incarnation, answer):
                (self.run.ended if self.run.is_decided else self.run.voted)(incarnation, answer)
            case RankFailed(incarnation, message, is_final):
                self.run.failed(incarnation, message, is_final, now_s + RETRY_S)
            case RankGone(incarnation):
                self.run.gone(incarnation)
            case NodeChanged() | TimePassed():
                pass
        return self._proceed(now_s)

    @property
    def can_cancel(self) -> bool:
        """No decision has been asked for yet."""
        return self.state in ("storing", "preparing")

    @property
    def wake_s(self) -> float | None:
        """When `TimePassed` is due next; None: never again."""
        match self.state:
            case "over":
                return None
            case "storing" | "ending" | "deciding" | "in_doubt":
                return None if self._is_given else self.plan.answer_until_s
            case "preparing":
                instants = (self.plan.vote_until_s, self.run.next_call_s)
            case "committing":
                instants = (self._commit_until_s, self.run.next_call_s)
        return min((instant_s for instant_s in instants if instant_s > self._looked_s), default=self._looked_s)

    # ------------------------------------------------------------------------------------------------------ preparing
    def _intent_stored(self, index: int, now_s: float) -> list[Command]:
        self.run.index = index
        if self.state == "storing":
            self.state = "preparing"
            return self._proceed(now_s)
        # The caller knows that nobody was told; the log shall say so too.
        return [] if self._answer is None else [StoreOutcome(WeightOutcome(index, self._answer))]

    def _register(self, record: RankRecord, is_new: bool) -> None:
        run = self.run
        if not is_new or run.has(record.incarnation):
            if run.has(record.incarnation):
                run.expect(record, "voter")
        elif run.is_excluded(record):
            run.expect(record, "excluded")
        elif self.state in ("storing", "preparing"):
            run.expect(record, "voter")
        else:
            run.expect(record, "joined" if run.is_decided else "late")

    def _proceed(self, now_s: float) -> list[Command]:
        match self.state:
            case "preparing":
                return self._prepare(now_s)
            case "committing":
                return self._commit(now_s)
            case "over":
                return []
            case "storing" | "deciding" | "in_doubt" | "ending":
                return self._wait_for_log(now_s)

    def _prepare(self, now_s: float) -> list[Command]:
        """Ask for the votes; go on as soon as all are in, give up as soon as one cannot come."""
        run, plan = self.run, self.plan
        if not run.has_voters:
            return self._abort("no_ranks", "no rank is left that could vote: nothing was changed", now_s)
        objection = run.objection
        if objection is not None:
            return self._abort(None, objection, now_s)
        if not run.open_votes:
            self.state = "deciding"
            digest, version = run.agreed()
            self._decision = WeightDecision(run.index, digest, version, run.request.flush_cache)
            return [StoreDecision(self._decision)]
        if now_s >= plan.vote_until_s:
            names = ", ".join(str(record.rank) for record in run.open_votes)
            return self._abort(None, f"no vote of rank {names} in time", now_s)
        budgets = plan.vote_budget_s(now_s), plan.keep_budget_s(now_s)
        due = self._due(now_s)
        self._told.update(record.incarnation for record in due)
        return [PrepareRank(record, run.index, self._base_digest, *budgets) for record in due]

    def _due(self, now_s: float) -> list[RankRecord]:
        """Ranks that are called now: not before it is known what their clocks show."""
        due = [record for record in self.run.due(now_s) if self._nodes.boot_s(record.node_id, now_s) is not None]
        for record in due:
            self.run.called(record.incarnation)
        return due

    # ----------------------------------------------------------------------------------------------------- committing
    def _decision_stored(self, now_s: float) -> list[Command]:
        if self.state not in ("deciding", "in_doubt"):
            return []
        assert self._decision is not None
        if self._is_given:
            self._commit_until_s = now_s + LATE_COMMIT_S
        return self._start_commits(self._decision, now_s)

    def _start_commits(self, decision: WeightDecision, now_s: float) -> list[Command]:
        """It is decided: every node's page says so, and every rank that can be told."""
        run = self.run
        self.state = "committing"
        run.digest = decision.digest
        run.call_everybody_anew()
        floor = run.index if run.request.flush_cache else 0
        nodes = sorted({record.node_id for record in run.records})
        return [RaiseWeights(node_id, run.index, floor) for node_id in nodes] + self._proceed(now_s)

    def _commit(self, now_s: float) -> list[Command]:
        run = self.run
        assert self._decision is not None
        if not run.open_ends or now_s >= self._commit_until_s:
            self._answer = run.decided_answer(self._decision.version, now_s)
            return self._end()
        return [CommitOnRank(record, run.index) for record in self._due(now_s)]

    # -------------------------------------------------------------------------------------------------------- the end
    def _abort(self, status: str | None, message: str, now_s: float) -> list[Command]:
        """No decision was asked for, or the log says that there is none: nobody can have committed."""
        self._answer = self.run.undecided_answer(status, message, now_s)
        told = [record for record in self.run.living if record.incarnation in self._told]
        return [*(AbortOnRank(record, self.run.index) for record in told), *self._end()]

    def _cancel(self, now_s: float) -> list[Command]:
        if self.state == "storing":
            return self._give_up("cancelled", "cancelled before any rank was told", now_s)
        return self._abort("cancelled", "cancelled before it was decided", now_s) if self.can_cancel else []

    def _end(self) -> list[Command]:
        assert self._answer is not None
        self.state = "ending"
        return [StoreOutcome(WeightOutcome(self.run.index, self._answer))]

    def _not_stored(self, message: str, is_final: bool, now_s: float) -> list[Command]:
        match self.state:
            case "storing":
                return self._give_up("unavailable", f"{message}; no rank was told", now_s)
            case "deciding" | "in_doubt" if is_final:
                return self._abort("unavailable", f"{message}; nothing was changed", now_s)
            case "deciding":
                self.state = "in_doubt"
                return self._wait_for_log(now_s)
            case "ending":
                # What the answer says is true without its record: the decision is what counts.
                return self._let_go()
            case _:
                return []

    def _wait_for_log(self, now_s: float) -> list[Command]:
        """The log owes a word; the answer does not wait for it for ever."""
        if self._is_given or now_s < self.plan.answer_until_s:
            return []
        match self.state:
            case "storing":
                return self._give_up("unavailable", f"{_LOG_SILENT}; no rank was told", now_s)
            case "ending":
                return self._let_go()
            case _:
                message = f"{_LOG_SILENT}: nobody knows yet whether the update is decided; it will end in one version"
                self._is_given = True
                return [Give(self.run.undecided_answer("in_doubt", message, now_s), is_remembered=True)]

    def _let_go(self) -> list[Command]:
        assert self._answer is not None
        self.state = "over"
        if self._is_given:
            return [Amend(self._answer)]
        self._is_given = True
        return [Give(self._answer, is_remembered=True)]

    def _give_up(self, status: str, message: str, now_s: float) -> list[Command]:
        """Nobody was told: the same id may try again."""
        self._answer = self.run.undecided_answer(status, message, now_s)
        self.state, self._is_given = "over", True
        return [Give(self._answer, is_remembered=False)]
