"""Every call leaves its entry, in order, bounded."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest

from actors import audit_log
from actors.audit_log import AuditLog
from actors.log_stores import DirectoryStore, LogStore, MemoryStore
from tests.unit.actors.planes import run


@pytest.fixture(params=["memory", "directory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> LogStore:
    return MemoryStore() if request.param == "memory" else DirectoryStore(tmp_path / "audit", is_synced=True)


def test_entries_come_back_newest_first_also_after_a_restart(store: LogStore) -> None:
    async def scenario() -> None:
        log = AuditLog(store, asyncio.to_thread)
        for number in range(25):
            log.note({"call": "flush", "number": number})
        assert [entry["number"] for entry in await log.read(10)] == list(range(24, 14, -1))
        again = AuditLog(store, asyncio.to_thread)
        again.note({"call": "abort", "number": 25})
        entries = await again.read(100)
        assert [entry["number"] for entry in entries] == list(range(25, -1, -1))
        odd = await again.read(3, lambda entry: entry["number"] % 2 == 1)
        assert [entry["number"] for entry in odd] == [25, 23, 21]

    run(scenario())


def test_what_comes_together_is_written_together_and_no_blob_is_large(store: LogStore) -> None:
    async def scenario() -> None:
        log = AuditLog(store, asyncio.to_thread)
        for number in range(200):
            log.note({"number": number, "text": "x" * 400})
        await log.close()
        sizes = [len(store.read(index) or b"") for index in store.indices()]
        assert len(sizes) < 10
        assert max(sizes) <= audit_log.MAX_BLOB_BYTES
        assert len(await log.read(1000)) == 200

    run(scenario())


def test_bounded_on_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "MAX_BLOBS", 5)

    async def scenario() -> None:
        store = MemoryStore()
        log = AuditLog(store, asyncio.to_thread)
        for number in range(12):
            log.note({"number": number})
            await log.close()
        assert store.indices() == [8, 9, 10, 11, 12]
        # a store that was written with another bound is cut at the first entry
        monkeypatch.setattr(audit_log, "MAX_BLOBS", 2)
        again = AuditLog(store, asyncio.to_thread)
        again.note({"number": 12})
        await again.close()
        assert store.indices() == [12, 13]

    run(scenario())


def test_two_controllers_lose_nothing_of_each_other() -> None:
    async def scenario() -> None:
        store = MemoryStore()
        one, two = AuditLog(store, asyncio.to_thread), AuditLog(store, asyncio.to_thread)
        for number in range(10):
            one.note({"by": 1, "number": number})
            two.note({"by": 2, "number": number})
            await one.close()
            await two.close()
        entries = await one.read(100)
        assert sorted((entry["by"], entry["number"]) for entry in entries) == [
            (by, number) for by in (1, 2) for number in range(10)
        ]

    run(scenario())


def test_a_store_that_fails_loses_nothing_until_too_much_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit_log, "_MAX_PENDING", 8)

    class Failing(MemoryStore):
        fails = True

        def create(self, index: int, data: bytes) -> bool:
            if self.fails:
                raise OSError("disk full")
            return super().create(index, data)

    async def scenario() -> None:
        store = Failing()
        log = AuditLog(store, asyncio.to_thread)
        for number in range(10):
            log.note({"number": number})
            await log.close()
        store.fails = False
        log.note({"number": 10})
        entries: list[dict[str, Any]] = await log.read(100)
        assert [entry["number"] for entry in entries if "number" in entry] == list(range(10, 2, -1))
        assert [entry["num_dropped"] for entry in entries if "num_dropped" in entry] == [3]

    run(scenario())
