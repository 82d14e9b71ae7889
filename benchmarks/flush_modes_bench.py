"""200 flushes of each mode on a real server whose ranks are never idle.

    python -m benchmarks.flush_modes_bench [--ranks 2] [--flushes 200] [--every 0.4] [--modes wait drain ...]

`tidegate serve` with ranks of the small demo model; clients in a process of their own keep every rank's batch full and
half of each prompt is common to all, so that there is something to flush. Flushes go to `POST /v1/cache/flush`, one
after the other, `--every` seconds apart at the least. Windows of 40 flushes and calm ones without any alternate, and so
do the modes: `dip` is the median, over the windows of a mode, of the share of tokens per second that it lacks beside
the calm windows before and after it, and `cost` the same as milliseconds of full throughput for each flush.

`wait` needs an idle instant and never gets one: it shows what the others are for. `drain` holds new requests back until
the running ones have ended. `retract` and `abort` end at the next step boundary of each rank, `fence` waits for
nothing. `inside` is the controller's own count, `door` what it costs to read an answer again: HTTP, the Api under its
traffic, the controller and back. Lost is a request that ended neither whole nor as aborted; only the mode `abort` may
abort any.
Targets: fence, retract and abort always succeed and lose nothing; fence answers within 50 ms (99th of 100) and costs
less than 5 % of the throughput.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, field
from statistics import fmean, median

import httpx

from benchmarks.harness import commit, describe_machine
from benchmarks.serving import serving
from benchmarks.traffic import Totals, Traffic, traffic
from engine.flush import FLUSH_MODES, FlushMode

#: what a flush may take; a step grace makes that of retract, abort and fence 5 s
TIMEOUT_S: dict[FlushMode, float] = {"wait": 0.25, "drain": 10.0, "retract": 0.25, "abort": 0.25, "fence": 0.25}
FLUSHES_A_WINDOW = 40
CALM_S = 4.0
#: batch of a rank, and clients for each rank: always some that wait
MAX_RUNNING = 8
CLIENTS_A_RANK = 10


@dataclass
class Outcome:
    """Of all flushes of one mode."""

    took_ms: list[float] = field(default_factory=list)
    #: by the controller's own count, without the way through the door
    inside_ms: list[float] = field(default_factory=list)
    #: of reading the flush's answer again, through the same door, right behind it: HTTP, Api, controller and back
    door_ms: list[float] = field(default_factory=list)
    num_successes: int = 0
    dips: list[float] = field(default_factory=list)
    costs_ms: list[float] = field(default_factory=list)
    num_whole: int = 0
    num_aborted: int = 0
    num_lost: int = 0

    def row(self, mode: str) -> str:
        num_flushes = len(self.took_ms)
        all_times = (self.took_ms, self.inside_ms, self.door_ms)
        times = [_of_hundred(values, rank) for values in all_times for rank in (50, 99)]
        cells = [
            mode, num_flushes, f"{self.num_successes / num_flushes:.1%}", *(f"{time_ms:.1f}" for time_ms in times),
            f"{median(self.dips):.1%}", f"{median(self.costs_ms):.0f}", self.num_whole, self.num_aborted, self.num_lost,
        ]  # fmt: skip
        return f"| {' | '.join(map(str, cells))} |"


COLUMNS = (
    "mode", "flushes", "success", "p50 ms", "p99", "inside p50", "p99", "door p50", "p99", "dip", "cost ms", "whole",
    "aborted", "lost",
)  # fmt: skip
HEAD = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def _of_hundred(values: list[float], rank: int) -> float:
    """The value that `rank` of a hundred do not exceed."""
    return sorted(values)[max(0, -(-rank * len(values) // 100) - 1)]


def flush_window(
    client: httpx.Client, clients: Traffic, mode: FlushMode, num_flushes: int, every_s: float, outcome: Outcome
) -> float:
    """Flush so many times; tokens per second meanwhile."""
    begin = time.monotonic()
    before = clients.until(begin)
    for number in range(num_flushes):
        flush(client, mode, outcome)
        time.sleep(max(0.0, begin + (number + 1) * every_s - time.monotonic()))
    end = time.monotonic()
    _note_requests(outcome, before, clients.until(end))
    return clients.tokens_per_s(begin, end)


def flush(client: httpx.Client, mode: FlushMode, outcome: Outcome) -> None:
    begin = time.monotonic()
    response = client.post("/v1/cache/flush", json={"mode": mode, "timeout_s": TIMEOUT_S[mode]})
    outcome.took_ms.append((time.monotonic() - begin) * 1e3)
    answer = response.json()
    outcome.inside_ms.append(answer["took_ms"])
    outcome.num_successes += answer["success"]
    begin = time.monotonic()
    client.get(f"/v1/cache/flush/{answer['flush_id']}").raise_for_status()
    outcome.door_ms.append((time.monotonic() - begin) * 1e3)


def calm_window(clients: Traffic) -> float:
    """Tokens per second without flushes, beginning when what the last ones cost is over."""
    time.sleep(0.5)
    begin = time.monotonic()
    time.sleep(CALM_S)
    return clients.tokens_per_s(begin, begin + CALM_S)


def _note_requests(outcome: Outcome, before: Totals, after: Totals) -> None:
    outcome.num_whole += after.num_whole - before.num_whole
    outcome.num_aborted += after.num_aborted - before.num_aborted
    outcome.num_lost += after.num_lost - before.num_lost


def measure(url: str, num_ranks: int, num_flushes: int, every_s: float, modes: list[FlushMode]) -> None:
    outcomes: dict[FlushMode, Outcome] = {mode: Outcome() for mode in modes}
    num_windows = max(1, num_flushes // FLUSHES_A_WINDOW)
    with (
        httpx.Client(base_url=url, timeout=60) as client,
        traffic(url, CLIENTS_A_RANK * num_ranks, prompt_tokens=64, max_new_tokens=32) as clients,
    ):
        clients.until(time.monotonic() + 5)  # the batches are full
        calm = calm_window(clients)
        for _ in range(num_windows):
            for mode, outcome in outcomes.items():
                begin = time.monotonic()
                busy = flush_window(client, clients, mode, num_flushes // num_windows, every_s, outcome)
                length_s = time.monotonic() - begin
                before, calm = calm, calm_window(clients)
                outcome.dips.append(1 - busy / fmean([before, calm]))
                outcome.costs_ms.append(1e3 * outcome.dips[-1] * length_s / (num_flushes // num_windows))
        totals = clients.end()
    print(f"{num_ranks} ranks, {CLIENTS_A_RANK * num_ranks} clients ({describe_machine()})")
    print(HEAD)
    for mode, outcome in outcomes.items():
        print(outcome.row(mode))
    print(
        f"all requests: {totals.num_whole} whole, {totals.num_aborted} aborted, {totals.num_lost} lost {totals.losses}"
    )
    print(json.dumps({"benchmark": f"flush modes, {num_ranks} ranks", "machine": describe_machine(), "commit": commit(),
                      "outcomes": {mode: vars(outcome) for mode, outcome in outcomes.items()}}))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--flushes", type=int, default=200)
    parser.add_argument("--every", type=float, default=0.4, help="seconds")
    parser.add_argument("--modes", nargs="+", choices=FLUSH_MODES, default=list(FLUSH_MODES))
    arguments = parser.parse_args()
    settings = {"engine": {"device": "cpu", "max_running": MAX_RUNNING}}
    with serving(arguments.ranks, "small", settings) as url:
        measure(url, arguments.ranks, arguments.flushes, arguments.every, arguments.modes)


if __name__ == "__main__":
    main()
