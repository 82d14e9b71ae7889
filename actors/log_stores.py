"""Where the control log keeps its records: numbered blobs, each created once and never changed.

A store knows nothing of what a record says. Its one promise: of several that create the same index exactly one is
told True, and what it wrote is there after a crash. All calls block; the controller makes them in a thread.
"""

from __future__ import annotations

import os
import secrets
import shutil
from pathlib import Path
from typing import Protocol

from ray.experimental import internal_kv

from actors.ray_errors import gcs_failures_as_os_errors

#: files that a directory has ready: for the intent and the outcome of a flush
_NUM_DRAFTS = 2


class LogStore(Protocol):
    """A blob per index. Failures of the store are OSError; after one, the record may or may not be there."""

    def create(self, index: int, data: bytes) -> bool:
        """Create record `index` durably. False, and nothing changed, if it is there already."""
        ...

    def read(self, index: int) -> bytes | None:
        """The record's bytes; None if there is none."""
        ...

    def indices(self) -> list[int]:
        """All indices present, rising."""
        ...

    def remove(self, index: int) -> None:
        """Remove the record; nothing if there is none."""
        ...

    def prepare(self) -> None:
        """Do what can be done of the next two calls of `create` before they come."""
        ...

    def close(self) -> None:
        """Give back what was prepared."""
        ...


class MemoryStore:
    """Records in a dict: for tests, and to play a store that several controllers share."""

    def __init__(self) -> None:
        self._records: dict[int, bytes] = {}

    def create(self, index: int, data: bytes) -> bool:
        return self._records.setdefault(index, data) is data

    def read(self, index: int) -> bytes | None:
        return self._records.get(index)

    def indices(self) -> list[int]:
        return sorted(self._records)

    def remove(self, index: int) -> None:
        self._records.pop(index, None)

    def prepare(self) -> None:
        """Memory is ready."""

    def close(self) -> None:
        """Nothing was prepared."""


class DirectoryStore:
    """One file per record. The content is written under a name of its own and then linked to the record's name: the
    link fails if the name is taken, and no crash leaves half a record under it.

    A record outlives every process from its creation on. Only with `is_synced` it outlives the machine too: a sync
    costs 4 to 8 ms on an ordinary disk, and a log whose readers all live in the memory of one machine gains nothing by
    it (see `boot_directory`).
    """

    def __init__(self, directory: Path, *, is_synced: bool) -> None:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._directory = directory
        self._is_synced = is_synced
        #: empty files for the next records: making one takes 0.3 to 0.7 ms on ext4, writing and linking it 0.1
        self._drafts: list[_Draft] = []
        for leftover in directory.glob("*.new"):  # of a writer that was killed before its link
            leftover.unlink(missing_ok=True)

    def create(self, index: int, data: bytes) -> bool:
        draft = self._drafts.pop() if self._drafts else _Draft(self._directory)
        try:
            draft.write(data, self._is_synced)
            is_created = draft.link(self._path(index))
        except FileNotFoundError:  # another writer, just started, took the draft for a dead one's
            draft.discard()
            draft = _Draft(self._directory)
            draft.write(data, self._is_synced)
            is_created = draft.link(self._path(index))
        finally:
            draft.discard()
        if self._is_synced and is_created:
            _sync_directory(self._directory)
        return is_created

    def read(self, index: int) -> bytes | None:
        try:
            return self._path(index).read_bytes()
        except FileNotFoundError:
            return None

    def indices(self) -> list[int]:
        return sorted(int(path.stem) for path in self._directory.glob("*.json") if path.stem.isdigit())

    def remove(self, index: int) -> None:
        self._path(index).unlink(missing_ok=True)

    def prepare(self) -> None:
        while len(self._drafts) < _NUM_DRAFTS:
            self._drafts.append(_Draft(self._directory))

    def close(self) -> None:
        for draft in self._drafts:
            draft.discard()
        self._drafts.clear()

    def _path(self, index: int) -> Path:
        return self._directory / f"{index:012d}.json"


class _Draft:
    """A file under a name of its own, empty until it is written."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / f"{secrets.token_hex(8)}.new"
        self._descriptor = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)

    def write(self, data: bytes, is_synced: bool) -> None:
        left = memoryview(data)
        while left:
            left = left[os.write(self._descriptor, left) :]
        if is_synced:
            os.fsync(self._descriptor)

    def link(self, path: Path) -> bool:
        """Give it the name of a record, whole. False: that name is taken."""
        try:
            os.link(self._path, path)
        except FileExistsError:
            return False
        return True

    def discard(self) -> None:
        """Give up the draft's own name; twice is once."""
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1
            self._path.unlink(missing_ok=True)


def boot_directory(parent: Path, boot_id: str) -> Path:
    """The folder of a log that serves one machine from boot to boot; logs of earlier boots are removed.

    A machine that loses its power loses all KV, all ranks and perhaps the last records. A log that began again behind
    a lost tail would allot an epoch twice, so each boot begins a new one, with a new lineage (hole H9).
    """
    directory = parent / boot_id
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    for earlier in parent.iterdir():
        if earlier != directory:
            shutil.rmtree(earlier, ignore_errors=True)
    return directory


class GcsStore:
    """Records in the key-value store of Ray's GCS: shared by the whole cluster, as durable as the GCS is."""

    _NAMESPACE = b"tidegate"

    def __init__(self, deployment: str, purpose: str = "log") -> None:
        self._prefix = f"{deployment}/{purpose}/"

    def create(self, index: int, data: bytes) -> bool:
        with gcs_failures_as_os_errors():
            existed = internal_kv._internal_kv_put(self._key(index), data, False, namespace=self._NAMESPACE)
        # Ray repeats a put whose answer was lost; the second one then finds our own record
        return not existed or self.read(index) == data

    def read(self, index: int) -> bytes | None:
        with gcs_failures_as_os_errors():
            return internal_kv._internal_kv_get(self._key(index), namespace=self._NAMESPACE)

    def indices(self) -> list[int]:
        with gcs_failures_as_os_errors():
            keys = internal_kv._internal_kv_list(self._prefix, namespace=self._NAMESPACE)
        return sorted(int(key.decode().removeprefix(self._prefix)) for key in keys)

    def remove(self, index: int) -> None:
        with gcs_failures_as_os_errors():
            internal_kv._internal_kv_del(self._key(index), namespace=self._NAMESPACE)

    def prepare(self) -> None:
        """Nothing can be done before the record is known."""

    def close(self) -> None:
        """Nothing was prepared."""

    def _key(self, index: int) -> bytes:
        return f"{self._prefix}{index:012d}".encode()


def _sync_directory(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
