"""`make bench`: every benchmark with its defaults, each in a process of its own."""

from __future__ import annotations

import subprocess
import sys

MODULES = (
    "benchmarks.index_bench",
    "benchmarks.engine_bench",
    "benchmarks.host_tier_bench",
    "benchmarks.flush_fanout_bench",
    "benchmarks.flush_modes_bench",
)


def main() -> int:
    for module in MODULES:
        ended = subprocess.run([sys.executable, "-m", module], check=False)
        if ended.returncode:
            return ended.returncode
    return 0


if __name__ == "__main__":
    sys.exit(main())
