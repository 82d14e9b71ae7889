"""What a server started is gone after it, however it ended: real processes, real signals, real sockets."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.unit.cache.node_files import held_elsewhere
from tests.unit.tidegate.fakes import FakeServer, gone_within, is_alive
from tidegate.cleanup import sweep_pages, sweep_sockets


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    running = FakeServer(tmp_path / "state")
    assert len(running.pids) == 3, running.answer
    yield running
    running.close()


def _end(server: FakeServer, how: str) -> int:
    if how == "leave":
        assert server.process.stdin is not None
        server.process.stdin.write("7\n")
        server.process.stdin.flush()
    else:
        server.process.kill()
    return server.process.wait(timeout=10)


@pytest.mark.parametrize("how", ["leave", "SIGKILL"])
def test_the_children_go_with_the_server(server: FakeServer, how: str) -> None:
    marked, unmarked, bystander = server.pids
    os.kill(marked, signal.SIGSTOP)
    status = _end(server, how)
    assert status == (7 if how == "leave" else -signal.SIGKILL)
    if how == "leave":
        assert not is_alive(marked)
        assert not is_alive(unmarked)
    assert gone_within([marked, unmarked], 8)
    assert is_alive(bystander)


def test_a_second_server_is_refused_and_the_first_goes_on(server: FakeServer, tmp_path: Path) -> None:
    second = FakeServer(tmp_path / "state")
    try:
        assert second.answer[0] == "refused"
        assert f"(pid {server.process.pid})" in " ".join(second.answer)
        assert all(is_alive(pid) for pid in server.pids)
    finally:
        second.close()


def test_the_next_server_waits_for_the_end_of_a_killed_one(server: FakeServer, tmp_path: Path) -> None:
    marked, unmarked, _ = server.pids
    server.process.kill()
    second = FakeServer(tmp_path / "state")
    try:
        assert second.answer[0] == "serving"
        assert not is_alive(marked)
        assert not is_alive(unmarked)
    finally:
        second.close()


def test_servers_with_other_state_directories_do_not_meet(server: FakeServer, tmp_path: Path) -> None:
    second = FakeServer(tmp_path / "other")
    try:
        assert second.answer[0] == "serving"
        _end(server, "leave")
        assert all(is_alive(pid) for pid in second.pids)
    finally:
        second.close()


def test_only_sockets_that_nobody_listens_on_are_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX) as live, socket.socket(socket.AF_UNIX) as dead:
        monkeypatch.chdir(tmp_path)  # a relative name: the whole path may be too long for a socket
        live.bind("live.ipc")
        live.listen()
        dead.bind("dead.ipc")
        dead.listen()
        dead.close()
        Path("file").touch()
        assert [path.name for path in sweep_sockets(Path())] == ["dead.ipc"]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "live.ipc"]


def test_only_control_pages_that_nobody_uses_are_removed(tmp_path: Path) -> None:
    def make(name: str, size: int) -> Path:
        (tmp_path / f"tidegate-{name}.kv").write_bytes(bytes(size))
        lock = tmp_path / f"tidegate-{name}.lock"
        lock.touch()
        return lock

    written, read = make("written", 4096), make("read", 4096)
    make("dead", 4096)
    make("arena", 8192).write_text("77 1 lineage\n")
    make("another", 8192).write_text("78 1 lineage\n")
    (tmp_path / "another.lock").touch()
    with held_elsewhere(written, "write"), held_elsewhere(read, "read"):
        removed = sweep_pages(tmp_path)
    assert sorted(path.name for path in removed) == ["tidegate-dead.kv", "tidegate-dead.lock"]
    assert len(list(tmp_path.iterdir())) == 9
    assert len(sweep_pages(tmp_path)) == 4
    # after an end in good order nobody will take it over; a crashed server's waits for its next start
    removed = sweep_pages(tmp_path, kv_of=[77])
    assert sorted(path.name for path in removed) == ["tidegate-arena.kv", "tidegate-arena.lock"]
