"""The last one out: a small process that ends what a server started, however the server itself ended.

Run as a program, alone and with the standard library only:
`python -I -S cleanup.py hold ROOT RAY_TEMP MARK OWNER SHARED`.
Its standard input is a pipe from the server (OWNER): the kernel closes it when the server ends, by SIGKILL too. Then
every process that the server started is killed; sockets that nobody listens on are removed from the state directory
(ROOT) and from Ray's temporary folder (RAY_TEMP), files of dead writers from the memory that they shared (SHARED). As
long as it runs it holds the lock of the state directory, so the next server there waits for the end of this.

Ray's processes end by themselves when their driver does, but some only after half a minute, and a stopped (SIGSTOP)
worker, a job's process and files never.

`cleanup.py wait PID STATUS` is what the server becomes at its end: it waits for the cleanup and exits with STATUS.
"""

from __future__ import annotations

import errno
import fcntl
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Collection
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

#: first word of the answer on standard output: the lock is held / a living server (its pid follows) has it
READY = "ready"
BUSY = "busy"
#: last word of a server that ends by its own will: nothing of it need stay for the next one
LEFT = b"left"
#: processes that fork while they are being killed are hunted for this long
_HUNT_S = 6.0
#: the cleanup needs less than _HUNT_S and some file operations
_WAIT_S = 9
#: size of a control page
_PAGE_BYTES = 4096
#: how long an earlier server's cleanup is waited for; it needs less than _HUNT_S
_LOCK_WAIT_S = 10


def hold(root: Path, ray_temp: Path, mark: str, owner: int, shared: Path) -> int:
    """Hold the lock while `owner` lives, then clean up. Exit status 1: the lock is another living server's.

    shared: where the processes of a node share their files (configs: control.shared_dir).
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    descriptor = os.open(root / "server.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    if not _take(descriptor):
        sys.stdout.write(f"{BUSY} {_owner_of(descriptor)}\n")
        return 1
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{owner} {_start_time_of(owner)}".encode(), 0)
    family = Family(mark, owner, os.getsid(owner), int(_start_time_of(owner)), root / "cwd", ray_temp)
    sys.stdout.write(f"{READY}\n")
    sys.stdout.flush()
    has_left = sys.stdin.buffer.read() == LEFT
    family.end(_HUNT_S)
    for folder in {root, ray_temp}:
        sweep_sockets(folder)
    if shared.is_dir():
        sweep_pages(shared, kv_of=family.seen if has_left else ())
    return 0


def wait(cleanup: int, status: int) -> int:
    """Wait for the child `cleanup`; `status` if it ends in time, else 1."""
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(_WAIT_S)
    try:
        os.waitpid(cleanup, 0)
        return status
    except (TimeoutError, ChildProcessError):
        return 1
    finally:
        signal.alarm(0)


@dataclass(frozen=True, slots=True)
class Family:
    """How to know a process that a server started: by the mark in its environment, or by where it lives.

    The mark alone is not enough: a process that writes its title (`ray::...`) may write over its environment.
    """

    #: NAME=value
    mark: str
    #: pid, session id and start time of the server, which is not a member itself
    server: int
    session: int
    born: int
    #: the server's own empty folder; nobody else works there
    cwd: Path
    #: Ray puts the folders of jobs below its sessions in here
    ray_temp: Path
    #: every member that `end` has found
    seen: set[int] = field(default_factory=set)

    def members(self) -> list[int]:
        """Pids of all living ones, the server and this process left out."""
        numbers = (int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit())
        return [pid for pid in numbers if pid not in (os.getpid(), self.server) and self.has(pid)]

    def has(self, pid: int) -> bool:
        process = Path(f"/proc/{pid}")
        try:
            if self.mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                return True
            # The second test is for Ray's own processes, which stay in the server's session; a shell is older or in
            # another one, and what a user reads in the logs' folder is no reason either.
            return self._is_home(Path(os.readlink(process / "cwd"))) and self._is_younger_relative(pid)
        except OSError:  # ended meanwhile, or another user's
            return False

    def end(self, hunt_s: float) -> list[int]:
        """SIGKILL every member, until none is left or `hunt_s` is over; returns the pids left."""
        deadline = time.monotonic() + hunt_s
        while (pids := self.members()) and time.monotonic() < deadline:
            self.seen.update(pids)
            self._kill_and_wait(pids, deadline)
        return pids

    def _is_home(self, cwd: Path) -> bool:
        return cwd == self.cwd or (cwd.is_relative_to(self.ray_temp) and "runtime_resources" in cwd.parts)

    def _is_younger_relative(self, pid: int) -> bool:
        start_time = _start_time_of(pid)
        return os.getsid(pid) == self.session and bool(start_time) and int(start_time) >= self.born

    def _kill_and_wait(self, pids: list[int], deadline: float) -> None:
        with ExitStack() as stack:
            poll = select.poll()
            pending: set[int] = set()
            for pid in pids:
                try:
                    pidfd = os.pidfd_open(pid)
                    stack.callback(os.close, pidfd)
                    # Asked again after the open: from here on the descriptor cannot come to mean another process.
                    if not self.has(pid):
                        continue
                    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
                except ProcessLookupError:
                    continue
                poll.register(pidfd, select.POLLIN)
                pending.add(pidfd)
            while pending and (left_ms := (deadline - time.monotonic()) * 1000) > 0:
                for pidfd, _ in poll.poll(left_ms):
                    poll.unregister(pidfd)
                    pending.discard(pidfd)


def sweep_sockets(folder: Path) -> list[Path]:
    """Remove the sockets below `folder` on which nobody listens; returns what was removed."""
    dead = [path for path in folder.rglob("*") if path.is_socket() and _is_dead(path)]
    for path in dead:
        path.unlink(missing_ok=True)
    return dead


def sweep_pages(folder: Path, kv_of: Collection[int] = ()) -> list[Path]:
    """Remove the control pages in `folder` that no living process writes or reads; returns what was removed.

    kv_of: pids of writers whose files that hold KV pages go as well. After a crash those stay: the next server takes
    them over, warm (cache/orphans.py).
    """
    removed: list[Path] = []
    for lock in folder.glob("tidegate-*.lock"):
        page = lock.with_suffix(".kv")
        try:
            holds_kv = page.exists() and page.stat().st_size > _PAGE_BYTES
            if (holds_kv and _writer_of(lock) not in kv_of) or not _is_unlocked(lock):
                continue
        except OSError:  # another user's, or gone meanwhile
            continue
        for path in (page, lock):
            path.unlink(missing_ok=True)
            removed.append(path)
    return removed


def _writer_of(lock: Path) -> int:
    """Pid that the last writer has recorded in its lock file (cache/writer_lock.py); 0 if there is none."""
    pid = lock.read_text().partition(" ")[0]
    return int(pid) if pid.isdigit() else 0


def _is_unlocked(lock: Path) -> bool:
    """Neither the writer's byte nor the readers' is locked by a living process; see cache/writer_lock.py."""
    descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 2, 0)
    except (BlockingIOError, PermissionError):
        return False
    finally:
        os.close(descriptor)
    return True


def _take(descriptor: int) -> bool:
    """Get the lock, waiting for an earlier server's cleanup if that server is already dead."""
    try:
        # A POSIX record lock: it goes with the process and no child inherits it.
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        if _owner_of(descriptor):
            return False
    signal.signal(signal.SIGALRM, _too_long)
    signal.alarm(_LOCK_WAIT_S)
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX)
        return True
    except TimeoutError:
        return False
    finally:
        signal.alarm(0)


def _too_long(signum: int, frame: object) -> None:
    raise TimeoutError


def _owner_of(descriptor: int) -> int:
    """Pid of the living server that the lock file names; 0 if it is dead or names none."""
    pid, _, start_time = os.pread(descriptor, 64, 0).decode().partition(" ")
    return int(pid) if start_time and _start_time_of(int(pid)) == start_time else 0


def _start_time_of(pid: int) -> str:
    """With the pid, what names a process for ever (field 22 of /proc/<pid>/stat); empty if there is none."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return ""
    return "" if fields[0] in ("Z", "X") else fields[19]


def _is_dead(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        return probe.connect_ex(os.fspath(path)) == errno.ECONNREFUSED


if __name__ == "__main__":
    if sys.argv[1] == "wait":
        sys.exit(wait(int(sys.argv[2]), int(sys.argv[3])))
    sys.exit(hold(Path(sys.argv[2]), Path(sys.argv[3]), sys.argv[4], int(sys.argv[5]), Path(sys.argv[6])))
