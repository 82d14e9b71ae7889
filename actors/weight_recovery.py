"""Taking over the updates that an earlier controller left open in the log. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from actors.messages import RankRecord
from actors.weight_records import WeightIntent
from actors.weight_run import Role, WeightRun


def interrupted_rows(
    run: WeightRun,
    intent: WeightIntent,
    here: Iterable[RankRecord],
    past: Mapping[str, RankRecord],
    *,
    is_decided: bool,
) -> None:
    """Give the run of an intent found in the log a row for each incarnation that it concerns.

    here: registered and not proven gone.  past: gone, by incarnation.  A rank of which the intent knows nothing came
    behind it: with a decision it must say that it follows, without one it has nothing to say.
    """
    for incarnation in (*intent.members, *intent.excluded):
        if incarnation in past:
            run.expect(past[incarnation], "excluded" if incarnation in intent.excluded else "voter")
            run.gone(incarnation)
    for record in here:
        role: Role = "late" if is_decided else "joined"
        if record.incarnation in intent.members:
            role = "voter"
        elif record.incarnation in intent.excluded:
            role = "excluded"
        run.expect(record, role)
