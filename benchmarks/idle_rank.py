"""A rank without an engine, for benchmarks of the control plane: a real actor, a real process, flushes at once."""

from __future__ import annotations

import asyncio
import os
import platform
from typing import Any

import ray

from actors.messages import RankRecord, Registered
from actors.process_proof import start_time_of
from actors.rank_words import NodePage, RankWords
from cache.shared_words import fence_for
from engine.flush import FlushCommand, FlushVerdict


class IdleRank:
    """What the controller asks of a rank; a plain class, wrapped where it is created."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self._incarnation = f"idle-{rank}-{os.getpid()}"
        self._words = RankWords()
        self._page: NodePage | None = None

    async def join(self, controller: Any) -> Registered:
        """Register, and read the node's control page from now on, as a rank with an engine does."""
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

    async def pid(self) -> int:
        return os.getpid()

    async def hello(self) -> dict[str, Any]:
        return {"incarnation": self._incarnation, "rank": self._rank, "page_nonce": self._words.nonce}

    async def watch(self) -> None:
        await asyncio.Event().wait()

    async def flush(self, command: FlushCommand) -> FlushVerdict:
        return FlushVerdict(command.flush_id, "flushed", epoch=command.epoch, freed_pages=1, freed_bytes=64)

    async def close_flush(self, flush_id: str, index: int, term: int) -> FlushVerdict:
        return FlushVerdict(flush_id, "expired_command", "the command never came")

    async def status(self) -> dict[str, Any]:
        return {"rank": self._rank}
