"""A rank without an engine: a real actor in a real process, with the controller's side of a rank's methods."""

from __future__ import annotations

import asyncio
import os
import platform
import signal
from typing import Any

import ray

from actors.messages import AbortCommand, RankRecord, Registered
from actors.process_proof import start_time_of
from actors.rank_words import NodePage, RankWords, boot_ns
from cache.shared_words import fence_for
from engine.control_words import ControlWords
from engine.flush import FlushCommand, FlushVerdict


class FakeRank:
    """Flushes at once, unless told to stall until `release` or to kill itself when the command comes."""

    def __init__(self, rank: int, incarnation: str) -> None:
        self._rank = rank
        self._incarnation = incarnation
        self._stalls = False
        self._dies = False
        self._released = asyncio.Event()
        self._verdicts: dict[str, FlushVerdict] = {}
        self._words = RankWords()
        self._page: NodePage | None = None

    async def join(self, controller: Any) -> Registered:
        """Register with the controller."""
        context = ray.get_runtime_context()
        pid = os.getpid()
        record = RankRecord(
            incarnation=self._incarnation, rank=self._rank, node_id=context.get_node_id(), pid=pid,
            start_time=start_time_of(pid) or 0, gpu_ids=(), ipc_endpoint="", tcp_endpoint="",
            actor_name=context.get_actor_name() or "", lineage="", epoch=0, layout_digest="", weights_digest="",
            weight_version="default", page_size=16, num_pages=8, bytes_per_page=64, max_running=4, max_len=128,
        )  # fmt: skip
        registered: Registered = await controller.register.remote(record, context.current_actor)
        self._page = NodePage(self._words, registered.lineage, registered.page, fence_for(platform.machine()))
        return registered

    async def prepare(self, stalls: bool = False, dies: bool = False) -> None:
        """What becomes of the next flush."""
        self._stalls, self._dies = stalls, dies
        self._released.clear()

    async def release(self) -> None:
        self._released.set()

    async def hello(self) -> dict[str, Any]:
        return {
            "incarnation": self._incarnation,
            "rank": self._rank,
            "pid": os.getpid(),
            "page_nonce": self._words.nonce,
        }

    async def words(self) -> ControlWords:
        """What it reads on its node's page now."""
        return self._words.read()

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def flush(self, command: FlushCommand) -> FlushVerdict:
        if self._dies:
            os.kill(os.getpid(), signal.SIGKILL)
        if self._stalls:
            await self._released.wait()
        if boot_ns() / 1e9 >= command.valid_until_s:
            verdict = FlushVerdict(command.flush_id, "expired_command", "Came too late.")
            return self._verdicts.setdefault(command.flush_id, verdict)
        verdict = FlushVerdict(command.flush_id, "flushed", epoch=command.epoch, freed_pages=1, freed_bytes=64)
        return self._verdicts.setdefault(command.flush_id, verdict)

    async def close_flush(self, flush_id: str, index: int, term: int) -> FlushVerdict:
        late = FlushVerdict(flush_id, "expired_command", "the command never came")
        return self._verdicts.setdefault(flush_id, late)

    async def abort(self, command: AbortCommand) -> dict[str, Any]:
        return {"num_aborted": 0 if command.request_ids is None else len(command.request_ids)}

    async def status(self) -> dict[str, Any]:
        return {"flush_ids": list(self._verdicts), "statuses": [v.status for v in self._verdicts.values()]}
