"""The promise under everything that can go wrong: no seed finds a violation of protocol.md.

Of its section 7 the oracle checks 1, 2, 4 to 10 and 19 in every run, beside G1 to G4 and G7, the truth of every
verdict, that each request ends once with the tokens foretold, and that after the last fault all is well again. To see
one run: `python -m tests.simulation <seed>`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter

import pytest

from engine.flush import FLUSH_MODES
from tests.simulation.draw import FAULTS
from tests.simulation.world import run

NUM_SEEDS = 210
NUM_PARTS = 6
NUM_DEEP_SEEDS = 12_000
NUM_DEEP_PARTS = 24

#: over all seeds of the short run each of these has happened
MUST_HAPPEN = (
    *(f"{mode} flushed" for mode in FLUSH_MODES),
    *(f"row {verdict}" for verdict in ("flushed", "fenced", "joined", "gone", "expired", "timed_out", "refused")),
    *(
        "row unreachable",
        "wait superseded",
        "wait cancelled",
        "fence in_progress",
        "promises",
        "scoped promises",
        "untouched without an epoch",
        "device flushed",
        "matches",
        "aborts",
    ),
    *("ended length", "ended abort", "ended error"),
    *(f"fault {name}" for name in FAULTS),
)
seen: Counter[str] = Counter()


def run_seeds(first: int, number: int) -> None:
    for seed in range(first, first + number):
        result = run(seed)
        assert not result.violations, result.report()
        seen.update(result.seen)


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_no_seed_finds_a_violation(part: int) -> None:
    number = NUM_SEEDS // NUM_PARTS
    run_seeds(part * number, number)


def test_all_of_it_has_happened() -> None:
    if not seen:  # run by itself
        run_seeds(0, NUM_SEEDS)
    assert [what for what in MUST_HAPPEN if not seen[what]] == []


@pytest.mark.parametrize("seed", range(3))
def test_sixty_four_ranks(seed: int) -> None:
    result = run(seed, num_ranks=64, num_nodes=8, num_requests=100, length_s=5.0)
    assert not result.violations, result.report()
    assert result.seen["promises"]


@pytest.mark.parametrize("seed", [3, 7])
def test_a_seed_replays_exactly(seed: int) -> None:
    first, second = run(seed), run(seed)
    assert (first.digest, first.num_callbacks, first.seen) == (second.digest, second.num_callbacks, second.seen)
    assert run(seed + 1).digest != first.digest


def test_a_seed_is_the_same_run_in_every_process() -> None:
    """Sets of strings come in another order in each process: nothing may depend on it."""
    command = [sys.executable, "-m", "tests.simulation", "201"]
    tellings = [
        subprocess.run(
            command, env=os.environ | {"PYTHONHASHSEED": str(number)}, capture_output=True, check=True
        ).stdout
        for number in (1, 2)
    ]
    assert tellings[0] == tellings[1]


@pytest.mark.deep
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("part", range(NUM_DEEP_PARTS))
def test_twelve_thousand_seeds(part: int) -> None:
    number = NUM_DEEP_SEEDS // NUM_DEEP_PARTS
    run_seeds(NUM_SEEDS + part * number, number)
