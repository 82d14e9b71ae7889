"""The instants of one weight update. Pure. Times are seconds of the controller's clock."""

from __future__ import annotations

from dataclasses import dataclass

from actors.weight_request import WeightRequest

# What is kept of the time for decision and commit: a commit waits for a step, and a long prefill step takes seconds.
_COMMIT_S = 5.0
_COMMIT_SHARE = 0.25
# Of the answer's slack all but a tenth may be waited for; of that a little more than half by the ranks' answers, the
# rest by the outcome's record.
_WAIT_SHARE = 0.9
_COLLECT_SHARE = 0.55
#: ranks keep what they voted for a little longer than the controller may need to decide and to tell them
_KEEP_GRACE_S = 5.0
#: of a budget, kept back for a vote's way to the controller
_WAY_BACK_S = 0.02
_WAY_BACK_SHARE = 0.1
#: a decision that was found after the answer had left: this long its commits are waited for
LATE_COMMIT_S = 5.0


@dataclass(frozen=True, slots=True)
class WeightPlan:
    request: WeightRequest
    #: votes that are not here by then did not come
    vote_until_s: float
    #: when the caller's time is used up
    deadline_s: float
    #: what the ranks say of the commit is waited for until then
    commit_until_s: float
    #: the answer leaves then, whether or not its record is stored
    answer_until_s: float

    @classmethod
    def of(cls, request: WeightRequest, received_s: float, slack_s: float) -> WeightPlan:
        """received_s: when the caller's request came.  slack_s: how long after the deadline the answer may leave."""
        deadline_s = received_s + request.timeout_s
        answer_until_s = deadline_s + _WAIT_SHARE * slack_s
        return cls(
            request,
            vote_until_s=deadline_s - min(_COMMIT_S, _COMMIT_SHARE * request.timeout_s),
            deadline_s=deadline_s,
            commit_until_s=deadline_s + _COLLECT_SHARE * (answer_until_s - deadline_s),
            answer_until_s=answer_until_s,
        )

    def vote_budget_s(self, now_s: float) -> float:
        """What a rank may use until its vote leaves."""
        left_s = self.vote_until_s - now_s
        return max(0.0, left_s - min(_WAY_BACK_S, _WAY_BACK_SHARE * left_s))

    def keep_budget_s(self, now_s: float) -> float:
        """How long a rank keeps what it has staged, and its hold on admission."""
        return max(0.0, self.answer_until_s - now_s) + _KEEP_GRACE_S
