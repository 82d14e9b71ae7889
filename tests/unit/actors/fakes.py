"""Rank actors of plain Python for tests of the control plane: same methods, same words, no Ray."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import ray.exceptions

from actors.clock import BootClock
from actors.flush_request import FlushLimits, FlushRequest, parse_flush
from actors.messages import AbortCommand, RankRecord, Registered
from actors.process_proof import start_time_of
from engine.flush import FlushCommand, FlushVerdict

NODE = "node-here"
LIMITS = FlushLimits(3600.0, 5.0, ("device",))


def make_request(flush_id: str = "f", **arguments: object) -> FlushRequest:
    """A checked flush."""
    return parse_flush(arguments | {"flush_id": flush_id}, LIMITS, make_id=lambda: "drawn")


def rank_record(rank: int, incarnation: str | None = None, **changes: Any) -> RankRecord:
    """A rank of this very process on the controller's node, so that its process proof is a real one."""
    pid = changes.get("pid", os.getpid())
    facts: dict[str, Any] = {
        "incarnation": incarnation or f"incarnation-{rank}",
        "rank": rank,
        "node_id": NODE,
        "pid": pid,
        "start_time": start_time_of(pid) or 0,
        "gpu_ids": (),
        "ipc_endpoint": f"ipc:///nowhere/{rank}",
        "tcp_endpoint": "",
        "actor_name": f"scheduler-{rank}-{incarnation}",
        "lineage": "",
        "epoch": 0,
        "layout_digest": "layout",
        "weights_digest": "weights",
        "weight_version": "default",
        "page_size": 16,
        "num_pages": 64,
        "bytes_per_page": 1024,
        "max_running": 8,
        "max_len": 512,
    }
    return RankRecord(**(facts | changes))


@dataclass(frozen=True)
class Remote:
    """`handle.method.remote(...)` of a coroutine function."""

    method: Callable[..., Awaitable[Any]]

    def remote(self, *args: Any) -> Awaitable[Any]:
        return self.method(*args)


class FakeRank:
    """A rank that answers as told: `behave` decides what becomes of a flush command."""

    def __init__(self, record: RankRecord) -> None:
        self.record = record
        self.commands: list[FlushCommand] = []
        self.closed: list[tuple[str, int, int]] = []
        self.aborted: list[AbortCommand] = []
        #: of the page it reads
        self.page_nonce = 0
        self.registered: Registered | None = None
        self.has_command = asyncio.Event()
        self.dies = asyncio.Event()
        self.behave: Callable[[FlushCommand], Awaitable[FlushVerdict]] = self.flushes

    def __getattr__(self, name: str) -> Remote:
        if name.startswith("do_"):
            raise AttributeError(name)
        return Remote(getattr(self, f"do_{name}"))

    async def flushes(self, command: FlushCommand) -> FlushVerdict:
        return FlushVerdict(command.flush_id, "flushed", epoch=command.epoch, freed_pages=3, freed_bytes=3072)

    async def do_hello(self) -> dict[str, Any]:
        return {
            "incarnation": self.record.incarnation,
            "rank": self.record.rank,
            "pid": self.record.pid,
            "page_nonce": self.page_nonce,
        }

    async def do_watch(self) -> None:
        await self.dies.wait()
        raise ray.exceptions.ActorDiedError()

    async def do_flush(self, command: FlushCommand) -> FlushVerdict:
        self.commands.append(command)
        self.has_command.set()
        return await self.behave(command)

    async def do_close_flush(self, flush_id: str, index: int, term: int) -> FlushVerdict:
        self.closed.append((flush_id, index, term))
        return FlushVerdict(flush_id, "flushed", epoch=7)

    async def do_abort(self, command: AbortCommand) -> dict[str, Any]:
        self.aborted.append(command)
        return {"num_aborted": 2}

    async def do_status(self) -> dict[str, Any]:
        return {"epoch": 0, "pages": {"free": 64}, "longest_step_s": 0.1}


class SetClock(BootClock):
    """A clock that the test moves."""

    def __init__(self, boot_id: str = "boot", now_s: float = 100.0) -> None:
        self.boot_id = boot_id
        self.time_s = now_s

    def now_s(self) -> float:
        return self.time_s
