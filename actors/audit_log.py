"""Who asked for what, when, and what came of it: every flush and control call, refused ones too.

Append-only and bounded: blobs of JSON lines, numbered, the oldest removed. It decides nothing (that is the control
log's part), so an entry is written behind the answer, and entries that come together are written together.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, TypeAlias, TypeVar

from actors.log_stores import LogStore

log = logging.getLogger(__name__)

T = TypeVar("T")
#: runs a blocking call aside from the loop; `asyncio.to_thread`
InThread: TypeAlias = Callable[..., Awaitable[Any]]
Entry: TypeAlias = dict[str, Any]

#: 2048 blobs of at most 16 KiB (or one entry): 32 MiB at the most, about 2 MiB when calls come one by one
MAX_BLOBS = 2048
MAX_BLOB_BYTES = 16 * 1024
# Entries that cannot be written (disk full) are kept this long, the oldest are dropped and counted.
_MAX_PENDING = 1024


class AuditLog:
    """Lives on one asyncio loop."""

    def __init__(self, store: LogStore, in_thread: InThread) -> None:
        self._store = store
        self._in_thread = in_thread
        self._pending: deque[bytes] = deque()
        self._num_dropped = 0
        self._writing: asyncio.Task[None] | None = None
        #: index of the newest blob; None: not looked up yet
        self._newest: int | None = None

    def note(self, entry: Entry) -> None:
        """Have an entry written; never waits, never fails. entry: plain data, not changed later."""
        self._pending.append(json.dumps(entry, separators=(",", ":")).encode())
        if len(self._pending) > _MAX_PENDING:
            self._pending.popleft()
            self._num_dropped += 1
        if self._writing is None or self._writing.done():
            self._writing = asyncio.create_task(self._write_all(), name="audit")

    async def read(self, limit: int, wanted: Callable[[Entry], bool] = lambda entry: True) -> list[Entry]:
        """The newest `limit` entries that are wanted, newest first. Raises OSError if the store fails."""
        if self._writing is not None:
            await asyncio.wait({self._writing})
        return await self._in_thread(self._read, limit, wanted)

    async def close(self) -> None:
        """Wait for what is being written."""
        if self._writing is not None:
            await asyncio.wait({self._writing})

    async def _write_all(self) -> None:
        while self._pending:
            batch = self._next_batch()
            num_dropped = self._num_dropped
            head = [json.dumps({"call": "audit", "num_dropped": num_dropped}).encode()] if num_dropped else []
            try:
                await self._in_thread(self._write, b"\n".join(head + batch))
                self._num_dropped -= num_dropped
            except OSError as error:
                log.error("the audit log cannot be written: %s", error)
                self._pending.extendleft(reversed(batch))
                return

    def _next_batch(self) -> list[bytes]:
        batch = [self._pending.popleft()]
        size = len(batch[0])
        while self._pending and size + len(self._pending[0]) < MAX_BLOB_BYTES:
            size += len(self._pending[0]) + 1
            batch.append(self._pending.popleft())
        return batch

    def _write(self, blob: bytes) -> None:
        """In the thread. Another controller may write to the same store: each blob has its own index."""
        if self._newest is None:
            indices = self._store.indices()
            self._newest = indices[-1] if indices else 0
            for index in indices[:-MAX_BLOBS]:
                self._store.remove(index)
        self._newest += 1
        while not self._store.create(self._newest, blob):
            self._newest += 1
        self._store.remove(self._newest - MAX_BLOBS)

    def _read(self, limit: int, wanted: Callable[[Entry], bool]) -> list[Entry]:
        entries: list[Entry] = []
        for index in reversed(self._store.indices()):
            blob = self._store.read(index)
            lines = blob.splitlines() if blob is not None else []  # removed meanwhile
            entries += [entry for line in reversed(lines) if wanted(entry := json.loads(line))]
            if len(entries) >= limit:
                break
        return entries[:limit]
