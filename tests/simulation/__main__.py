"""`python -m tests.simulation 42` runs seed 42 and tells its story; `100-200` runs these and names those that fail."""

from __future__ import annotations

import sys

from tests.simulation.world import run


def main(argument: str) -> int:
    first, _, last = argument.partition("-")
    num_failed = 0
    for seed in range(int(first), int(last or first) + 1):
        result = run(seed)
        num_failed += bool(result.violations)
        if result.violations and last:
            print(f"seed {seed}: {result.violations[0]}", flush=True)
        elif not last:
            print(result.story)
            print(
                f"seed {seed}, {result.num_callbacks} callbacks, digest {result.digest}: {result.violations or 'sound'}"
            )
    return num_failed


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1]), 1))
