"""The README's commands, run as they stand there against a real server."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cluster.server import Server

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
#: all but the start itself
COMMANDS = [block.splitlines() for block in BLOCKS if not block.startswith("make ")]


def test_there_are_commands() -> None:
    assert sum(map(len, COMMANDS)) >= 8
    assert any(line.startswith("make serve") for block in BLOCKS for line in block.splitlines())


@pytest.mark.parametrize("block", COMMANDS, ids=lambda block: block[0][:40])
def test_the_commands_of_the_readme_work_one_after_another(server: Server, block: list[str]) -> None:
    env = server.env | {"TIDEGATE_URL": server.url}
    for command in block:
        line = command.replace("http://127.0.0.1:8000", server.url).replace(
            ".venv/bin/", f"{Path(sys.executable).parent}/"
        )
        bash = ["bash", "-c", line]
        done = subprocess.run(bash, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert done.stdout.strip()
        assert '"error"' not in done.stdout, command
