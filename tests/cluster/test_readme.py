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
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if not line.startswith("make ")]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 4
    assert any(line.startswith("make serve") for block in BLOCKS for line in block.splitlines())


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_readme_works(server: Server, command: str) -> None:
    bin_folder = f"{Path(sys.executable).parent}/"
    line = command.replace("http://127.0.0.1:8000", server.url).replace(".venv/bin/", bin_folder)
    env = server.env | {"TIDEGATE_URL": server.url}
    bash = ["bash", "-c", line]
    done = subprocess.run(bash, env=env, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip()
    assert '"error"' not in done.stdout
