"""Who may write a node's shared file: a POSIX record lock on a separate file.

The kernel frees such a lock with its process, also after SIGKILL, and no forked child inherits it (hole H19: a child
kept an `flock` after its owner's death). Two facts of POSIX locks rule the code below. A process never conflicts with
itself, so a second lock of one file in one process is refused here. And closing *any* descriptor of the file frees
the process's locks on it, so each lock file is opened once per process and nobody else opens it.

Byte 0 is the writer's, exclusive. Byte 1 is shared by all who map the data, so that a start of another deployment
sees that a file is in use while its writer is being restarted.
"""

from __future__ import annotations

import fcntl
import os
import struct
from pathlib import Path
from typing import Protocol

from cache.processes import Processes, ProcessId
from configs.errors import ConfigError, InvariantError

#: a frozen writer of this deployment is killed after this long
PATIENCE_S = 1.0
#: a killed process frees its lock when the kernel has taken its memory apart; 24 GiB of mapping take well below this
DEATH_S = 10.0
_TRY_EVERY_S = 0.02

_WRITER_BYTE, _READER_BYTE = 0, 1
#: struct flock of 64-bit Linux: type, whence, start, len, pid
_FLOCK = struct.Struct("@hhqqi4x")
#: lock files this process has open; the kernel keeps its locks per process, hence so do we
_open_in_this_process: set[str] = set()
os.register_at_fork(after_in_child=_open_in_this_process.clear)


class Clock(Protocol):
    """Time as the lock needs it."""

    def now_s(self) -> float: ...

    def pause_s(self, duration_s: float) -> None: ...


class FileLock:
    """Descriptor of one lock file with the locks this process has on it. `release` frees them all."""

    def __init__(self, path: Path, fd: int) -> None:
        self.path = path
        self._fd = fd

    @classmethod
    def try_write(cls, path: Path) -> FileLock | None:
        """Become the writer if nobody is. None: another process is."""
        return cls._open_locked(path, fcntl.LOCK_EX, _WRITER_BYTE, 1)

    @classmethod
    def try_read(cls, path: Path) -> FileLock | None:
        """Mark the file as in use by this process. None: someone is about to remove it, or it is not there."""
        return cls._open_locked(path, fcntl.LOCK_SH, _READER_BYTE, 1, create=False)

    @classmethod
    def try_alone(cls, path: Path) -> FileLock | None:
        """Lock out writer and readers. None: a living process uses the file."""
        return cls._open_locked(path, fcntl.LOCK_EX, _WRITER_BYTE, 2)

    @classmethod
    def _open_locked(cls, path: Path, kind: int, start: int, length: int, create: bool = True) -> FileLock | None:
        if os.path.abspath(path) in _open_in_this_process:
            raise InvariantError(f"{path} is locked by this process already; closing it again would free that lock")
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC | (os.O_CREAT if create else 0)
        try:
            fd = os.open(path, flags, 0o600)
        except FileNotFoundError:
            return None
        if not _try_lock(fd, kind, start, length) or not _is_still(path, fd):
            os.close(fd)
            return None
        _open_in_this_process.add(os.path.abspath(path))
        return cls(path, fd)

    def has_readers(self) -> bool:
        """Do other processes map the data? For the writer, who is none of them."""
        answer = fcntl.fcntl(self._fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, _READER_BYTE, 1, 0))
        return _FLOCK.unpack(answer)[0] != fcntl.F_UNLCK

    def record(self, process: ProcessId, lineage: str) -> None:
        """Say who holds the writer's byte, for the one who finds it held for too long."""
        os.ftruncate(self._fd, 0)
        os.pwrite(self._fd, f"{process.pid} {process.start_time} {lineage}\n".encode(), 0)

    def release(self) -> None:
        """Free the locks. May be called again."""
        if self._fd >= 0:
            _open_in_this_process.discard(os.path.abspath(self.path))
            os.close(self._fd)
            self._fd = -1

    def remove(self) -> None:
        """Unlink the file while it is locked, then release. Who waits for it finds that it is another file now."""
        self.path.unlink(missing_ok=True)
        self.release()


def lock_as_writer(path: Path, lineage: str, processes: Processes, clock: Clock) -> FileLock:
    """Become the only writer, if need be by ending a frozen one of the same lineage.

    lineage: not empty, without spaces.
    Blocks for at most PATIENCE_S + DEATH_S. Raises ConfigError if the lock stays with a process of another lineage,
    with one that has not said who it is, or with one that outlives SIGKILL; then nothing was changed.
    """
    lock = _wait_for_lock(path, PATIENCE_S, clock)
    if lock is None:
        processes.kill(_killable_holder(path, lineage))
        lock = _wait_for_lock(path, DEATH_S, clock)
    if lock is None:
        raise ConfigError(f"the process that writes {path} was killed and still holds its lock after {DEATH_S:g} s")
    try:
        lock.record(processes.own_id(), lineage)
    except OSError:
        lock.release()
        raise
    return lock


def _wait_for_lock(path: Path, patience_s: float, clock: Clock) -> FileLock | None:
    """First try at once, last try at the end of the patience."""
    end_s = clock.now_s() + patience_s
    while (lock := FileLock.try_write(path)) is None and clock.now_s() < end_s:
        clock.pause_s(_TRY_EVERY_S)
    return lock


def _killable_holder(path: Path, lineage: str) -> ProcessId:
    """The process that holds the lock, if kernel and record agree on it and it is of our lineage; else ConfigError."""
    recorded, kernel_pid = _read_record(path), _holder_by_kernel(path)
    if recorded is None or recorded[0].pid != kernel_pid:
        raise ConfigError(f"{path} is locked by process {kernel_pid}, which has not recorded itself there; end it")
    process, holder_lineage = recorded
    if holder_lineage != lineage:
        raise ConfigError(
            f"{path} belongs to a running deployment of the same name (process {process.pid}); "
            "stop it, or give this one another name (configs: ray.deployment)"
        )
    return process


def _read_record(path: Path) -> tuple[ProcessId, str] | None:
    try:
        pid, start_time, lineage = path.read_text().split()
        return ProcessId(int(pid), int(start_time)), lineage
    except (OSError, ValueError):
        return None


def _holder_by_kernel(path: Path) -> int:
    """Pid of the writer as the kernel knows it; 0 if it lives in another pid namespace, -1 if there is none."""
    fd = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        answer = fcntl.fcntl(fd, fcntl.F_GETLK, _FLOCK.pack(fcntl.F_WRLCK, 0, _WRITER_BYTE, 1, 0))
    finally:
        os.close(fd)
    kind, _, _, _, pid = _FLOCK.unpack(answer)
    return -1 if kind == fcntl.F_UNLCK else pid


def _try_lock(fd: int, kind: int, start: int, length: int) -> bool:
    try:
        fcntl.lockf(fd, kind | fcntl.LOCK_NB, length, start)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _is_still(path: Path, fd: int) -> bool:
    """Is the locked file the one of this name? It is not if its owner removed it between our open and our lock."""
    try:
        return os.path.samestat(os.fstat(fd), path.stat())
    except FileNotFoundError:
        return False
