"""`tidegate serve` as a real command in a process of its own, and the proof that nothing of it is left."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Event

import httpx

#: every process that the command starts inherits this variable, so a leftover is found wherever it hides
MARK = "TIDEGATE_TEST_MARK"
START_TIMEOUT_S = 120.0
STOP_TIMEOUT_S = 10.0


def free_port() -> int:
    """A TCP port of the loopback interface that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def until(condition: Callable[[], bool], timeout_s: float, what: str) -> None:
    """Wait for an observable fact of another process, with a deadline.

    For facts that send no event (a process table, a file that must vanish): looks again every 20 ms.
    Raises AssertionError naming `what` at the deadline.
    """
    never = Event()
    for _ in range(max(1, int(timeout_s / 0.02))):
        if condition():
            return
        never.wait(0.02)
    assert condition(), f"not within {timeout_s:g} s: {what}"


def orphaned_memory() -> set[str]:
    """Files of /dev/shm that no living process has open or mapped.

    Other programs of the machine come and go there as well; what they use is not ours to judge.
    """
    present = {str(path) for path in Path("/dev/shm").iterdir() if not path.is_dir()}
    for process in Path("/proc").iterdir():
        if present and process.name.isdigit():
            present -= _files_of(process)
    return present


def _files_of(process: Path) -> set[str]:
    """Paths that a process, given as its folder in /proc, has open or mapped; empty if it has ended."""
    gone = (FileNotFoundError, ProcessLookupError, PermissionError)
    files: set[str] = set()
    with suppress(*gone):
        files |= set(re.findall(r"/dev/shm/\S+", (process / "maps").read_text()))
        for descriptor in (process / "fd").iterdir():
            with suppress(*gone):
                files.add(os.readlink(descriptor))
    return files


def marked_processes(mark: str) -> dict[int, str]:
    """pid -> command line of all living processes that carry the mark, zombies left out."""
    found: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            if f"{MARK}={mark}".encode() not in (entry / "environ").read_bytes():
                continue
            if (entry / "stat").read_text().rpartition(")")[2].split()[0] == "Z":
                continue
            command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue
        found[int(entry.name)] = command
    return found


class Server:
    """One running `tidegate serve`.

    Everything it writes is below `home`; its ports are its own; `close()` proves that processes, socket files and
    shared memory are gone.
    """

    def __init__(self, home: Path, *arguments: str, cwd: Path | None = None, env: dict[str, str] | None = None) -> None:
        self.home = home
        self.state_dir = home / "state"
        self.mark = uuid.uuid4().hex
        self.port = free_port()
        self.grpc_port = free_port()
        self.dashboard_port = free_port()
        self.log_path = home / "serve.log"
        self.command = [
            str(Path(sys.executable).parent / "tidegate"), "serve",
            "--port", str(self.port), "--grpc-port", str(self.grpc_port),
            "--dashboard-port", str(self.dashboard_port), "--state-dir", str(self.state_dir),
            *arguments,
        ]  # fmt: skip
        base = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "VIRTUAL_ENV", "PYTHONPATH"))}
        self.env = base | {MARK: self.mark, "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"} | (env or {})
        self.cwd = cwd or home
        self.process: subprocess.Popen[bytes] | None = None
        self._orphans_before = orphaned_memory()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace") if self.log_path.exists() else ""

    def start(self, preexec: Callable[[], None] | None = None) -> None:
        """Start the command and return when it has said that it serves."""
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, cwd=self.cwd, env=self.env, stdin=subprocess.DEVNULL, stdout=log,
                stderr=subprocess.STDOUT, start_new_session=True, preexec_fn=preexec,
            )  # fmt: skip
        process = self.process
        until(lambda: process.poll() is not None or self.is_ready(), START_TIMEOUT_S, f"ready\n{self.log}")
        assert process.poll() is None, f"the command ended with {process.poll()}:\n{self.log}"

    def is_ready(self) -> bool:
        """True once the command has printed its welcome and /health answers 200."""
        if "Tidegate serves" not in self.log:
            return False
        try:
            return httpx.get(f"{self.url}/health", timeout=2).status_code == 200
        except httpx.TransportError:
            return False

    def exports(self) -> dict[str, str]:
        """The environment that the command prints for jobs."""
        return dict(re.findall(r"export (\w+)=(\S+)", self.log))

    def stop(self, signum: int = signal.SIGTERM) -> int:
        """End the command and prove that nothing of it is left. Returns its exit status."""
        process = self.process
        assert process is not None
        if process.poll() is None:
            os.kill(process.pid, signum)
        status = process.wait(timeout=STOP_TIMEOUT_S)
        until(
            lambda: not marked_processes(self.mark), STOP_TIMEOUT_S, f"no process left: {marked_processes(self.mark)}"
        )
        return status

    def leftovers(self) -> list[str]:
        """Processes, sockets and shared memory that outlived the command; memory that lay there before is not its."""
        left = [f"{pid}: {command}" for pid, command in marked_processes(self.mark).items()]
        left += [str(path) for path in self.state_dir.rglob("*") if path.is_socket()]
        left += sorted(orphaned_memory() - self._orphans_before)
        return left

    def close(self) -> None:
        """End whatever is left, by pid; for fixtures whose test failed half way."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait(timeout=STOP_TIMEOUT_S)
        for pid in marked_processes(self.mark):
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue


@contextmanager
def serving(home: Path, *arguments: str, **options: object) -> Iterator[Server]:
    """A server for the length of a block; the block's end proves that it leaves nothing."""
    server = Server(home, *arguments, **options)  # type: ignore[arg-type]
    try:
        server.start()
        yield server
        server.stop()
        assert server.leftovers() == []
    finally:
        server.close()
