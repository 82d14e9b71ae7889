"""The file that the processes of a node share: made, taken over, mapped, retired, swept away.

`<directory>/tidegate-<name>.kv` holds the words and the pages, `.lock` beside it says who lives. A file appears under
its name only when it is whole, and loses its name only after its control page says so to everybody who maps it.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import mmap
import os
from collections.abc import Callable, Generator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

from cache.arena import Arena, ArenaGeometry, control_words
from cache.control_page import CONTROL_PAGE_BYTES, ControlPage, ControlPageWriter, FileIdentity
from cache.processes import Processes
from cache.shared_words import Fence
from cache.writer_lock import Clock, FileLock, lock_as_writer
from configs.errors import ConfigError

logger = logging.getLogger(__name__)

PREFIX = "tidegate-"
SUFFIXES = (".kv", ".new", ".lock")
#: bytes reserved so far, bytes of the whole file
Progress: TypeAlias = Callable[[int, int], None]

#: posix_fallocate writes zeros at about 1.3 GB/s: a slice takes 0.2 s, often enough to show progress
_RESERVE_SLICE_BYTES = 256 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class FilePaths:
    """Where a node's file of one deployment lies. Two deployments, or two nodes on one machine, have two names."""

    directory: Path
    name: str

    @property
    def stem(self) -> Path:
        """The path without an ending."""
        return self.directory / f"{PREFIX}{self.name}"

    @property
    def data(self) -> Path:
        return self.directory / f"{PREFIX}{self.name}.kv"

    @property
    def fresh(self) -> Path:
        """A file in the making; whoever holds the writer's lock may throw it away."""
        return self.directory / f"{PREFIX}{self.name}.new"

    @property
    def lock(self) -> Path:
        return self.directory / f"{PREFIX}{self.name}.lock"


class FileInUse(ConfigError):
    """Living processes use the file as it is, and it is not what was asked for. It can be made once they have left."""


class OwnedFile:
    """The file as its only writer has it: mapped whole and writable, under the writer's lock."""

    def __init__(self, paths: FilePaths, lock: FileLock, mapping: mmap.mmap, fence: Fence, was_adopted: bool) -> None:
        self.paths = paths
        self.mapping = mapping
        self.page = ControlPageWriter(control_words(mapping), fence)
        #: pages and leases of an earlier writer are in it; False: it is new and empty
        self.was_adopted = was_adopted
        self._lock = lock

    def arena(self) -> Arena:
        """Slot table, index and pages, all writable. Only of a file with a host tier."""
        geometry = ArenaGeometry.of_page(self.page)
        return Arena(self.mapping, self.mapping, geometry.data_offset, geometry)

    def close(self) -> None:
        """Leave the file for a later adoption and let the lock go. The mapping ends with the last view of it."""
        self._lock.release()

    def retire(self) -> None:
        """End the file: nobody matches in it any more, its name and its lock file are gone."""
        self.page.retire()
        self.paths.data.unlink(missing_ok=True)
        self._lock.remove()


class AttachedFile:
    """The file as a rank has it: words read-only, data writable in the slots it holds a lease of."""

    def __init__(self, lock: FileLock, words: mmap.mmap, data: mmap.mmap | None, fence: Fence) -> None:
        self.words = words
        #: None without a host tier
        self.data = data
        self.page = ControlPage(control_words(words), fence)
        self._lock = lock

    def arena(self) -> Arena:
        """Slot table and index read-only, pages writable. Only of a file with a host tier."""
        assert self.data is not None, "a file without a host tier has no arena"
        return Arena(self.words, self.data, 0, ArenaGeometry.of_page(self.page))

    def close(self) -> None:
        """Say that this process uses the file no longer. The mappings end with the last view of them."""
        self._lock.release()


@dataclass(frozen=True, slots=True)
class FileMaker:
    """What a writer brings along to own a file. `open` is the one thing it does."""

    identity: FileIdentity
    processes: Processes
    clock: Clock
    fence: Fence
    #: random, 0 <= nonce < 2**63; marks the file if one has to be made
    nonce: int
    #: memory this machine or container has left; None: only the file system is asked
    free_memory_bytes: int | None = None
    on_progress: Progress | None = None

    def open(self, paths: FilePaths) -> OwnedFile:
        """Own the node's file: adopt the one that is there if it is of our lineage and layout, else make it anew.

        A file that does not fit is retired first, but not if it is of our lineage and others use it: FileInUse. Blocks
        while space is reserved (about 1.3 GB/s) and while an old writer is being ended. Raises ConfigError,
        leaving no file of ours behind, if the name belongs to a living deployment, the directory cannot be written, or
        the size does not fit.
        """
        with _faults_of(paths.directory):
            lock = lock_as_writer(paths.lock, self.identity.lineage, self.processes, self.clock)
        try:
            with _faults_of(paths.directory):
                mapping = self._adopt(paths, lock)
                was_adopted = mapping is not None
                if mapping is None:
                    mapping = self._make(paths)
        except BaseException:
            if paths.data.exists():
                lock.release()
            else:
                lock.remove()
            raise
        if self._geometry.num_slots:
            _advise_huge_pages(mapping, self._geometry.data_offset)
        return OwnedFile(paths, lock, mapping, self.fence, was_adopted)

    def _adopt(self, paths: FilePaths, lock: FileLock) -> mmap.mmap | None:
        mapping = map_existing(paths.data)
        if mapping is None:
            paths.data.unlink(missing_ok=True)
            return None
        page = ControlPageWriter(control_words(mapping), self.fence)
        reason = self.identity.difference(page)
        if reason is None and page.read().is_retired:
            reason = "it was retired"
        if reason is None and len(mapping) != self._geometry.file_bytes:
            reason = f"it is {len(mapping):,} bytes long, not {self._geometry.file_bytes:,}"
        if reason is None:
            return mapping
        if self.identity.has_lineage_of(page) and not page.read().is_retired and lock.has_readers():
            raise FileInUse(f"{paths.data} cannot be used: {reason}; other processes use it")
        logger.warning("%s is discarded: %s", paths.data, reason)
        page.retire()
        paths.data.unlink()
        return None

    def _make(self, paths: FilePaths) -> mmap.mmap:
        size = self._geometry.file_bytes
        paths.fresh.unlink(missing_ok=True)
        self._check_room(paths.directory, size)
        fd = os.open(paths.fresh, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            self._reserve(fd, size)
            mapping = mmap.mmap(fd, size)
            ControlPageWriter(control_words(mapping), self.fence).initialise(self.identity, self.nonce)
            paths.fresh.rename(paths.data)
        except BaseException:
            paths.fresh.unlink(missing_ok=True)
            raise
        finally:
            os.close(fd)
        return mapping

    @property
    def _geometry(self) -> ArenaGeometry:
        return ArenaGeometry(self.identity.num_slots, self.identity.page_bytes)

    def _check_room(self, directory: Path, size: int) -> None:
        file_system = os.statvfs(directory)
        rooms = {f"{directory} has": file_system.f_bavail * file_system.f_frsize}
        if self.free_memory_bytes is not None:
            rooms["this machine's memory has"] = self.free_memory_bytes
        for where, free_bytes in rooms.items():
            if size > free_bytes:
                raise _does_not_fit(size, f"{where} {free_bytes:,} free")

    def _reserve(self, fd: int, size: int) -> None:
        """Take the memory now: a hole that cannot be filled later would end its writer with SIGBUS."""
        try:
            for begin in range(0, size, _RESERVE_SLICE_BYTES):
                length = min(_RESERVE_SLICE_BYTES, size - begin)
                os.posix_fallocate(fd, begin, length)
                if self.on_progress is not None:
                    self.on_progress(begin + length, size)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.ENOMEM):
                raise _does_not_fit(size, os.strerror(error.errno)) from error
            raise


def attach(paths: FilePaths, fence: Fence, identity: FileIdentity | None = None) -> AttachedFile | None:
    """Map the node's file as a reader. None: there is none (yet), or it is being removed; try again later.

    identity: what the file must hold; None takes it as it is. Raises ConfigError if it holds something else. A process
    attaches a file once: who finds it retired closes it and attaches anew.
    """
    with _faults_of(paths.directory):
        lock = FileLock.try_read(paths.lock)
    if lock is None:
        return None
    try:
        with _faults_of(paths.directory):
            attached = _attach_locked(paths.data, lock, fence, identity)
    except BaseException:
        lock.release()
        raise
    if attached is None:
        lock.release()
    return attached


def _attach_locked(path: Path, lock: FileLock, fence: Fence, identity: FileIdentity | None) -> AttachedFile | None:
    fd = _open_existing(path)
    if fd is None:
        return None
    try:
        words = _map(fd, mmap.ACCESS_READ)
        if words is None:
            raise ConfigError(f"{path} cannot be used: it is shorter than a control page")
        page = ControlPage(control_words(words), fence)
        geometry = ArenaGeometry.of_page(page)
        reason = None if identity is None else identity.difference(page)
        if reason is None and len(words) != geometry.file_bytes:
            reason = f"it is {len(words):,} bytes long, but its control page says {geometry.file_bytes:,}"
        if reason is not None:
            raise ConfigError(f"{path} cannot be used: {reason}")
        # the same descriptor: under this name there may be another file by now
        data = mmap.mmap(fd, geometry.data_bytes, offset=geometry.data_offset) if geometry.num_slots else None
        if data is not None:
            _advise_huge_pages(data, 0)
        return AttachedFile(lock, words, data, fence)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _faults_of(directory: Path) -> Generator[None, None, None]:
    """What the file system refuses, as an error that says where."""
    try:
        yield
    except OSError as error:
        name = error.filename or directory
        raise ConfigError(f"cannot use {name} for the node's shared file: {error.strerror}") from error


def map_existing(path: Path) -> mmap.mmap | None:
    """The whole file, writable; None if there is none, or if it is too short to have a control page."""
    fd = _open_existing(path)
    if fd is None:
        return None
    try:
        return _map(fd, mmap.ACCESS_WRITE)
    finally:
        os.close(fd)


def _open_existing(path: Path) -> int | None:
    try:
        return os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return None


def _map(fd: int, access: int) -> mmap.mmap | None:
    size = os.fstat(fd).st_size
    return mmap.mmap(fd, size, access=access) if size >= CONTROL_PAGE_BYTES else None


def _advise_huge_pages(mapping: mmap.mmap, begin: int) -> None:
    """Fewer TLB misses in copies, where the kernel gives tmpfs huge pages (shmem_enabled `advise`); else nothing."""
    with contextlib.suppress(OSError):
        mapping.madvise(mmap.MADV_HUGEPAGE, begin)


def _does_not_fit(size: int, why: str) -> ConfigError:
    return ConfigError(
        f"the node's shared file takes {size:,} bytes: {why}. Lower configs: host_tier.size_gb, or give the machine "
        "(container: --shm-size) more"
    )
