"""What one flush means before it begins: its epoch, its order, which verdicts suffice, its instants. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from actors.flush_request import FlushLimits, FlushRequest
from engine.flush import STEP_MODES

# Of the answer's slack all but a tenth may be waited for: by the intent, then the verdicts, which leave the ranks at
# the deadline, then the outcome. Of what the intent has left over the verdicts may use a little more than half.
_WAIT_SHARE = 0.9
_COLLECT_SHARE = 0.55
#: of the budget, kept back for a verdict's way from rank to controller: 2 ms on an idle machine, 30 where all compute
_WAY_BACK_S = 0.02
_WAY_BACK_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class FlushPlan:
    """Protocol.md section 6 for one request. Times are seconds of the controller's clock."""

    request: FlushRequest
    #: all tiers and no scope: it allots an epoch. Everything else is confined to what each rank answers itself
    takes_epoch: bool
    #: when the caller's budget is used up
    deadline_s: float
    #: the answer leaves then, whether or not its record is stored
    answer_until_s: float
    #: until then a rank may begin with the command
    valid_until_s: float

    @classmethod
    def of(cls, request: FlushRequest, limits: FlushLimits, received_s: float, slack_s: float) -> FlushPlan:
        """received_s: when the caller's request came.  slack_s: how long after the deadline the answer may leave."""
        deadline_s = received_s + request.budget_s(limits.step_grace_s)
        return cls(
            request,
            request.takes_epoch(limits),
            deadline_s,
            answer_until_s=deadline_s + _WAIT_SHARE * slack_s,
            valid_until_s=deadline_s + slack_s,
        )

    def collect_until_s(self, begun_s: float) -> float:
        """Ranks that have not answered until then are given up. begun_s: when they were told."""
        from_s = max(begun_s, self.deadline_s)
        return from_s + _COLLECT_SHARE * max(0.0, self.answer_until_s - from_s)

    def rank_budget_s(self, now_s: float) -> float:
        """What a rank may use of the time that is left: its verdict must still get here, on a machine that is busy."""
        left_s = self.deadline_s - now_s
        return max(0.0, left_s - min(_WAY_BACK_S, _WAY_BACK_SHARE * left_s))

    @property
    def raises_floor_first(self) -> bool:
        """Irrevocable from its record on. `wait` and `drain` raise the floor last: a rank that times out is untouched
        and works on with its tier (hole H3)."""
        return self.takes_epoch and self.request.mode in STEP_MODES

    @property
    def acts_by_record(self) -> bool:
        """Its record alone has every node drop what it names, with its next lease at the latest."""
        return self.raises_floor_first or self.request.drops_host_alone

    @property
    def counts_fenced(self) -> bool:
        """A floor on the page that a rank reads suffices without its answer."""
        return self.takes_epoch and self.request.mode == "fence"

    @property
    def is_stored(self) -> bool:
        """A dry run changes nothing, so nothing has to be kept of it."""
        return not self.request.dry_run

    @property
    def tells_ranks(self) -> bool:
        """A flush of the host tier alone is no business of ranks: they read its drop number before they use a page."""
        return "device" in self.request.tiers

    @property
    def tells_hosts(self) -> bool:
        """The host tiers must do something themselves: drop all they have, or what is older than an age."""
        return self.request.drops_host_alone or self.request.drops_host_by_age

    @property
    def takes_sub_epoch(self) -> bool:
        return self.request.scope is not None and self.is_stored
