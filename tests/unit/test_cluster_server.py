"""What the tests of real servers count as a leftover, and how they are kept out of runs without Ray."""

from __future__ import annotations

import subprocess
import sys
import uuid
from pathlib import Path

from tests.cluster.server import Server

ROOT = Path(__file__).parents[2]


def test_shared_memory_that_nobody_uses_is_a_leftover(tmp_path: Path) -> None:
    server = Server(tmp_path)
    path = Path("/dev/shm") / f"test-{uuid.uuid4().hex}"
    try:
        with path.open("wb") as file:
            file.write(b"x")
            file.flush()
            assert str(path) not in server.leftovers()
        assert str(path) in server.leftovers()
        assert str(path) not in Server(tmp_path).leftovers(), "it lay there before"
    finally:
        path.unlink()


def test_every_test_of_a_real_cluster_has_the_mark() -> None:
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "not cluster", "tests/cluster"]
    done = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    # 5: no test is left
    assert done.returncode == 5, done.stdout + done.stderr
