"""Each rule of protocol.md that is taken away is missed within a few seeds, and by nothing else than its absence."""

from __future__ import annotations

import re

import pytest

from tests.simulation.mutations import ALL, Mutation
from tests.simulation.world import Result, run

#: within so many seeds, in the worst case; most are found by one of the first three
NUM_SEEDS = 60


@pytest.mark.parametrize("mutation", ALL, ids=lambda mutation: mutation.name)
def test_a_rule_that_is_taken_away_is_missed(mutation: Mutation) -> None:
    found = first_violation(mutation)
    assert found is not None, f"nobody misses the rule in {NUM_SEEDS} seeds: {mutation.name}"
    assert re.search(mutation.shows, found.violations[0]), found.violations[0]
    print(f"{mutation.name}: seed {found.seed}, {found.violations[0]}")
    sound = run(found.seed, **mutation.plan)
    assert not sound.violations, sound.report()


def first_violation(mutation: Mutation) -> Result | None:
    with mutation.applied():
        for seed in range(NUM_SEEDS):
            result = run(seed, **mutation.plan)
            if result.violations:
                return result
    return None
