"""What to do about the pending flush in this turn, and whom it concerns. Functions of what they are given."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from engine.flush import STEP_MODES, Blockers, FlushCommand, FlushScope
from engine.flush_gate import NOW_GRACE_S, PendingFlush
from engine.sequence import Sequence

#: tiers a rank holds itself; a flush that names none of them has nothing to do here, unless it has a scope: then the
#: keys change under which the rank finds pages of the host tier
RANK_TIERS = frozenset({"device"})
#: how long before its deadline a flush goes past copies that are still under way
COPY_GRACE_S = NOW_GRACE_S

Choice: TypeAlias = Literal["over", "time_out", "refuse", "impossible", "wait", "execute"]


def choose(pending: PendingFlush, blockers: Blockers, now_s: float) -> Choice:
    """What becomes of a pending flush at this step boundary.

    One whose deadline has passed is never executed (the process was frozen, or a step was long). The gate took it in
    in time, so it has timed out, whoever is first to see it. `over`: somebody else has ended it.
    """
    if pending.claim.state != "pending":
        return "over"
    if now_s >= pending.deadline_s:
        return "time_out"
    if impossible(pending.command) is not None:
        return "impossible"
    if pending.command.mode in STEP_MODES or pending.command.dry_run:
        return "execute"
    if is_idle(blockers):
        return "wait" if blockers.copies_in_flight and now_s < copies_until_s(pending) else "execute"
    return "refuse" if pending.is_now_or_never else "wait"


def copies_until_s(pending: PendingFlush) -> float:
    """When a flush that waits for nothing but copies is done without them."""
    return -math.inf if pending.is_now_or_never else pending.deadline_s - COPY_GRACE_S


def is_idle(blockers: Blockers) -> bool:
    """No running and no half-prefilled request. A copy in flight carries its epoch and never makes a flush fail."""
    return not (blockers.running or blockers.half_prefilled)


def impossible(command: FlushCommand) -> str | None:
    """Why this rank cannot do what is asked, or None."""
    if not RANK_TIERS & set(command.tiers) and (command.scope is None or "host" not in command.tiers):
        return f"This rank holds no tier of {', '.join(command.tiers) or 'an empty list'}; it holds device."
    if command.scope is not None and command.scope.adapter is not None:
        return f"No adapter {command.scope.adapter!r} is served here; this rank serves no adapters."
    return None


def is_in_scope(sequence: Sequence, scope: FlushScope | None, page_size: int) -> bool:
    """Whether a running request may hold KV that the flush drops. Says yes when in doubt (age)."""
    if scope is None or scope.older_than_s is not None:
        return True
    if scope.prefix_tokens is not None:
        first_page = scope.prefix_tokens[: 4 * page_size]
        return sequence.request.tokens.startswith(first_page) or first_page.startswith(sequence.request.tokens)
    return scope.namespace == sequence.namespace
