"""What an update does to requests, and when a rank may vote. Functions of what they are given."""

from __future__ import annotations

from engine.flush import Blockers
from engine.weight_update import Fate, InFlightMode

#: modes that put no running request off its way, and so have to find an idle instant for the commit
_IDLE_MODES = frozenset({"wait", "drain"})


def is_idle(blockers: Blockers) -> bool:
    """Nothing runs. A copy in flight carries the key that its page was computed under, so it may land later."""
    return not (blockers.running or blockers.half_prefilled)


def may_vote(mode: InFlightMode, blockers: Blockers) -> bool:
    """With staged weights: whether a commit at the next step boundary could keep to the mode."""
    return mode not in _IDLE_MODES or is_idle(blockers)


def holds_admission(mode: InFlightMode, *, has_voted: bool) -> bool:
    """With staged weights: nobody is admitted. `drain` from the staging on; `wait` from its idle instant, which is its
    vote, so that the instant lasts until the decision."""
    return mode == "drain" or (mode == "wait" and has_voted)


def fate_of_running(mode: InFlightMode, blockers: Blockers) -> Fate:
    """At the commit. Under `wait` and `drain` nobody runs; should somebody, he is not ended and meets no mixture."""
    if is_idle(blockers):
        return "none"
    match mode:
        case "abort" | "keep":
            return mode
        case "wait" | "drain" | "retract":
            return "retract"
