"""Socket files: whose they are, which of them are dead, and paths that Linux would cut."""

from __future__ import annotations

import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.endpoints import new_incarnation, socket_directory, socket_path, sweep_dead_sockets
from actors.process_proof import start_time_of
from configs.errors import ConfigError


@pytest.fixture
def state_dir() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="tg-") as folder:
        yield Path(folder)


def bound(path: Path) -> socket.socket:
    """A socket file at `path`; closing what is returned leaves the file, as a kill does."""
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(path))
    return server


def test_incarnations_differ_and_name_their_process(state_dir: Path) -> None:
    one, other = new_incarnation(), new_incarnation()
    assert one != other
    assert socket_path(state_dir, one).name == f"{one}-{os.getpid()}-{start_time_of(os.getpid())}.ipc"


def test_the_folder_is_closed_to_others(state_dir: Path) -> None:
    assert socket_directory(state_dir).stat().st_mode & 0o077 == 0


def test_a_path_too_long_for_a_socket_is_refused_with_the_way_out(state_dir: Path) -> None:
    deep = state_dir / ("d" * 100)
    with pytest.raises(ConfigError, match="choose a state_dir that is"):
        socket_path(deep, new_incarnation())


def test_only_the_dead_are_swept(state_dir: Path) -> None:
    folder = socket_directory(state_dir)
    pid, start_time = os.getpid(), start_time_of(os.getpid())
    of_the_dead = folder / "aaaaaaaaaaaa-999999999-1.ipc"
    of_a_reused_pid = folder / f"bbbbbbbbbbbb-{pid}-1.ipc"
    # bound and not yet listening: a rank of this moment
    of_the_living = folder / f"cccccccccccc-{pid}-{start_time}.ipc"
    # its process is not in our /proc, but somebody listens: a rank of another container
    listened_to = folder / "dddddddddddd-999999998-1.ipc"
    foreign = folder / "notes.txt"
    foreign.touch()
    servers = [bound(path) for path in (of_the_dead, of_a_reused_pid, of_the_living, listened_to)]
    servers[3].listen()
    for server in servers[:3]:
        server.close()
    assert sweep_dead_sockets(state_dir) == [of_the_dead, of_a_reused_pid]
    assert sorted(folder.iterdir()) == sorted([of_the_living, listened_to, foreign])
    servers[3].close()
