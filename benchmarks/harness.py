"""What every benchmark here does the same: alternate the cases, repeat, print all runs and the medians, one JSON line.

Cases alternate (a b c a b c ...) so that a slow minute of the machine falls on all of them.
"""

from __future__ import annotations

import json
import os
import platform
import resource
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

#: one run of a case: figures by name, in the unit the name ends with
Figures = dict[str, float]
Case = Callable[[], Figures]


def alternate(cases: Mapping[str, Case], num_runs: int = 5) -> dict[str, dict[str, list[float]]]:
    """Run all cases `num_runs` times in turn. Returns case -> figure -> one value a run."""
    results: dict[str, dict[str, list[float]]] = {name: {} for name in cases}
    for _ in range(num_runs):
        for name, case in cases.items():
            for figure, value in case().items():
                results[name].setdefault(figure, []).append(value)
    return results


#: (beginning of the case's name, figure, its greatest median)
Target = tuple[str, str, float]


def report(title: str, results: Mapping[str, Mapping[str, list[float]]], targets: Sequence[Target] = ()) -> None:
    """Every run and its median as a table, the targets as met or missed, then one JSON line with all of it."""
    print(f"{title} ({describe_machine()})")
    for case, figures in results.items():
        for figure, values in figures.items():
            runs = " ".join(f"{value:10.3f}" for value in values)
            print(f"  {case + ' ' + figure:<58} median {median(values):10.3f}   runs {runs}")
    medians = {case: {name: median(runs) for name, runs in figures.items()} for case, figures in results.items()}
    for beginning, figure, limit in targets:
        for case in (case for case in medians if case.startswith(beginning)):
            reached = medians[case][figure]
            print(f"  {'met' if reached <= limit else 'MISSED'}: {case} {figure} {reached:.3f}, at most {limit:g}")
    print(json.dumps({"benchmark": title, "machine": describe_machine(), "commit": commit(), "medians": medians,
                      "runs": results}))  # fmt: skip


def time_us(operations: Mapping[str, Callable[[], object]], *, num_calls: int, num_rounds: int = 101) -> Figures:
    """Microseconds a call of each operation, median over rounds in which each is called `num_calls` times in a row.

    Keep num_calls so low that a round takes well under a millisecond: then most rounds lie between two switches to
    another process, and the median is that of an undisturbed machine.
    """
    rounds: dict[str, list[float]] = {name: [] for name in operations}
    for _ in range(num_rounds):
        for name, operation in operations.items():
            start = time.perf_counter()
            for _ in range(num_calls):
                operation()
            rounds[name].append((time.perf_counter() - start) / num_calls * 1e6)
    return {name: median(values) for name, values in rounds.items()}


def num_involuntary_switches() -> int:
    """How often the kernel gave this thread's core to another one: equal before and after means undisturbed."""
    return resource.getrusage(resource.RUSAGE_THREAD).ru_nivcsw


def describe_machine() -> str:
    return f"{os.cpu_count()} CPUs, {platform.machine()}, Python {platform.python_version()}"


def commit() -> str:
    """Short hash of the checkout, with a + when it has changes; "" outside of one."""
    try:
        found = subprocess.run(
            ["git", "describe", "--always", "--dirty=+", "--exclude=*"], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return ""
    return found.stdout.strip()
