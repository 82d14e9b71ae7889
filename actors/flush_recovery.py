"""Ending a flush that an earlier controller began: every rank says what it did, and promises not to do it any more.

Closing is a command with the new term: a rank that still waits for its idle instant gives the flush up, one that never
heard of it will not take it from a message that was under way (protocol.md section 6, hole H28).
"""

from __future__ import annotations

import asyncio

from actors.flush_run import FlushRun
from actors.log_records import FlushIntent, LogState
from actors.ray_errors import Answered, CallFailed, outcome_within
from actors.roster import Roster

# A rank that lives closes a flush in one call; nothing in it waits.
_ASK_TIMEOUT_S = 2.0


def interrupted_rows(run: FlushRun, index: int, intent: FlushIntent, state: LogState, roster: Roster) -> None:
    """Give the run of an intent found in the log, as record `index`, a row for each incarnation that it concerns."""
    for incarnation in intent.members:
        if incarnation in state.past:
            run.expect(state.past[incarnation])
            run.gone(incarnation)
    for record in roster.records():
        # Its record is written right before it is told the newest epoch, so behind the intent it was told this one.
        is_newer = record.is_empty and state.joined_at.get(record.incarnation, 0) > index
        (run.joined if is_newer else run.expect)(record)


async def ask_what_became(run: FlushRun, roster: Roster, term: int) -> None:
    """Collect the verdicts of all that owe one; returns within two seconds."""
    asking = [asyncio.create_task(_close(run, incarnation, roster, term)) for incarnation in run.waiting_for]
    if asking:
        await asyncio.wait(asking)


async def _close(run: FlushRun, incarnation: str, roster: Roster, term: int) -> None:
    handle = roster.handle(incarnation)
    if handle is None:
        return run.failed(incarnation, "Ray knows no actor of this incarnation", is_final=True)
    closing = handle.close_flush.remote(run.request.flush_id, run.index, term)
    match await outcome_within(closing, _ASK_TIMEOUT_S):
        case Answered(verdict):
            run.answered(incarnation, verdict)
        case CallFailed(_, message):
            run.failed(incarnation, message, is_final=True)
