"""A node's files go with its cluster: real processes, real locks, the kernel's own word on who has ended."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors import file_keeper
from tests.cluster.server import until
from tests.unit.cache.node_files import held_elsewhere

RAYLET = """
import subprocess, sys
agents = [subprocess.Popen([sys.executable, "-c", sys.argv[1], *sys.argv[2:]]) for _ in range(2)]
print(*(agent.pid for agent in agents), flush=True)
sys.stdin.read()
for agent in agents:
    agent.kill()
    agent.wait()
"""
AGENT = """
import signal, sys
from pathlib import Path
from actors import file_keeper
address = file_keeper.start([Path(path) for path in sys.argv[1:3]])
Path(sys.argv[3]).write_text(address)
signal.pause()
"""


class FakeRaylet:
    """A process whose two children start the keeper, as two agents in a row do."""

    def __init__(self, folder: Path) -> None:
        self.stems = [folder / "tidegate-n", folder / "tidegate-n-arena"]
        for stem in self.stems:
            stem.with_name(f"{stem.name}.kv").write_bytes(b"x")
            stem.with_name(f"{stem.name}.lock").touch()
        self._address_file = folder / "address"
        self.process = subprocess.Popen(
            [sys.executable, "-c", RAYLET, AGENT, *map(str, self.stems), str(self._address_file)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        until(lambda: self.address != "", 10, "a keeper")

    @property
    def address(self) -> str:
        return self._address_file.read_text() if self._address_file.exists() else ""

    def end(self) -> None:
        if self.process.poll() is None:
            self.process.communicate(timeout=10)


@pytest.fixture
def raylet(tmp_path: Path) -> Iterator[FakeRaylet]:
    running = FakeRaylet(tmp_path)
    yield running
    running.end()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("tidegate-*"))


ARENA = ["tidegate-n-arena.kv", "tidegate-n-arena.lock"]
ALL = sorted(["tidegate-n.kv", "tidegate-n.lock", *ARENA])


def test_the_page_goes_with_the_raylet_and_what_may_hold_kv_stays(raylet: FakeRaylet, tmp_path: Path) -> None:
    assert file_keeper.tell(raylet.address, file_keeper.LEFT)
    assert file_keeper.tell(raylet.address, file_keeper.IN_USE)
    assert names(tmp_path) == ALL
    raylet.end()
    until(lambda: names(tmp_path) == ARENA, 5, "the arena alone")
    assert not file_keeper.tell(raylet.address, file_keeper.LEFT)


def test_the_arena_goes_too_when_all_ranks_had_left(raylet: FakeRaylet, tmp_path: Path) -> None:
    assert file_keeper.tell(raylet.address, file_keeper.LEFT)
    raylet.end()
    until(lambda: names(tmp_path) == [], 5, "no file")


def test_a_file_goes_only_when_its_last_user_has_gone(raylet: FakeRaylet, tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "tidegate-n.lock", "read"):
        raylet.end()
        assert names(tmp_path) == ALL
    until(lambda: names(tmp_path) == ARENA, 5, "the arena alone")
