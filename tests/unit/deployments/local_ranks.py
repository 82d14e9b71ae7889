"""Ranks in this process: real engine loops on the tiny model, in the shape of the fleet, under a real control plane.

Only Ray and ZeroMQ are missing. What the Api sees is what it sees in production: tokens of a real model, real cache
hits, real verdicts.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import ray.exceptions
from torch.profiler import profile

from actors.messages import AbortCommand, Member, Membership
from actors.rank_flushes import RankFlushes
from actors.rank_profiles import RankProfiles
from actors.rank_words import boot_ns
from cache.device_cache import DeviceCache
from configs.errors import RankLost
from configs.schema import ProfilingSettings
from engine.events import AbortRequested, RequestArrived
from engine.flush import FlushCommand, FlushVerdict
from engine.grammar import GrammarBook
from engine.limits import SchedulerLimits
from engine.loop import EngineLoop
from engine.models import LoadedModel
from engine.profile_spec import ProfileSpec
from engine.profiler import Profiler, Record
from engine.request import Output, Request
from engine.runner import ModelRunner
from engine.scheduler import Scheduler

PAGE_SIZE = 16
NUM_PAGES = 256

Stream = asyncio.Queue["Output | RankLost"]


class PlainRecording:
    """Instead of torch's, which records one thread of a process and crashes with two: for ranks that share one."""

    def __init__(self, **options: Any) -> None:
        self._num_toggles = 0

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def toggle_collection_dynamic(self, enable: bool, activities: list[Any]) -> None:
        self._num_toggles += 1

    def export_chrome_trace(self, path: str) -> None:
        with gzip.open(path, "wt") as file:
            json.dump({"traceEvents": [{"name": f"{self._num_toggles} toggles"}]}, file)


class LocalRank:
    """One engine loop in a thread, with the methods that the controller calls on a rank."""

    def __init__(
        self,
        model: LoadedModel,
        rank: int,
        incarnation: str,
        grammars: GrammarBook | None = None,
        traces: Path | None = None,
        record: Record = profile,
    ) -> None:
        facts = model.facts
        self.rank = rank
        self.incarnation = incarnation
        self.max_len = facts.max_len
        runner = ModelRunner(model, NUM_PAGES, PAGE_SIZE, grammars=grammars)
        limits = SchedulerLimits(
            max_running=32,
            max_step_tokens=512,
            max_len=facts.max_len,
            eos_token_ids=facts.eos_token_ids,
            bytes_per_page=runner.bytes_per_page,
            vocab_size=facts.vocab_size,
        )
        profiler = None if traces is None else Profiler(traces, model.device, 1000, record)
        self.profiles = RankProfiles(profiler, traces or Path(), ProfilingSettings())
        self.engine = EngineLoop(
            Scheduler(DeviceCache(NUM_PAGES, PAGE_SIZE), limits),
            runner,
            on_outputs=self._on_outputs,
            observer=profiler,
        )
        if profiler is not None:
            profiler.wake = self.engine.wake
        self._flushes = RankFlushes(
            self.engine, lambda: boot_ns() / 1e9, told_epoch=lambda _: None, refused=lambda *_: None
        )
        self._flushes.serve()
        self._loop = asyncio.get_running_loop()
        self._streams: dict[str, Stream] = {}
        self._dead = asyncio.Event()
        #: set to make the rank die as soon as this many outputs were handed out
        self.dies_after: int | None = None
        self.num_outputs = 0
        #: it lives, but does not say how it is
        self.is_mute = False
        self.requests: list[Request] = []
        self._thread = threading.Thread(target=self.engine.run, name=f"engine-{rank}")
        self._thread.start()

    def member(self) -> Member:
        return Member(self.rank, self.incarnation, "here", "", "", self.max_len, PAGE_SIZE)

    @property
    def is_dead(self) -> bool:
        return self._dead.is_set()

    @property
    def is_idle(self) -> bool:
        """Nothing runs, nothing waits, and no page has an owner."""
        picture = self.engine.snapshot()
        return (
            picture.is_idle and not picture.num_waiting and not (picture.num_private_pages + picture.num_pinned_pages)
        )

    def die(self) -> None:
        """As SIGKILL looks from the Api: every stream ends with RankLost, nothing more comes."""
        self._dead.set()
        for stream in self._streams.values():
            stream.put_nowait(RankLost(f"rank {self.rank} is lost"))
        self._streams.clear()

    def stop(self) -> None:
        self.engine.stop()
        self._thread.join(timeout=10)
        assert not self._thread.is_alive()

    async def generate(self, request: Request) -> AsyncGenerator[Output, None]:
        if self.is_dead:
            raise RankLost(f"rank {self.rank} is lost")
        self.requests.append(request)
        stream = self._streams[request.request_id] = Stream()
        self.engine.post(RequestArrived(request))
        try:
            while True:
                item = await stream.get()
                if isinstance(item, RankLost):
                    raise item
                yield item
                if item.finish is not None:
                    return
        finally:
            if self._streams.pop(request.request_id, None) is not None:
                self.engine.post(AbortRequested((request.request_id,)))

    def _on_outputs(self, outputs: list[Output]) -> None:
        self._loop.call_soon_threadsafe(self._hand_out, outputs)

    def _hand_out(self, outputs: list[Output]) -> None:
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            if self.dies_after is not None and self.num_outputs >= self.dies_after:
                self.die()
                return
            self.num_outputs += 1
            stream.put_nowait(output)

    # --- what the controller calls, through `Handle` ----------------------------------------------------------------

    async def watch(self) -> None:
        await self._dead.wait()
        raise RankLost("the rank has died")

    async def flush(self, command: FlushCommand) -> FlushVerdict:
        return await self._flushes.flush(command)

    async def close_flush(self, flush_id: str, index: int, term: int) -> FlushVerdict:
        return await self._flushes.close((flush_id, index), term)

    async def abort(self, command: AbortCommand) -> dict[str, Any]:
        live = list(self._streams)
        wanted = live if command.request_ids is None else [one for one in command.request_ids if one in self._streams]
        self.engine.post(AbortRequested(command.request_ids, command.reason))
        return {"num_aborted": len(wanted)}

    async def start_profile(self, spec: ProfileSpec) -> dict[str, Any]:
        if self.is_mute:
            raise ray.exceptions.ActorUnavailableError("mute", None)
        return await self.profiles.start(spec, self.rank)

    async def stop_profile(self, profile_id: str | None) -> dict[str, Any]:
        return await self.profiles.stop(profile_id)

    async def list_profiles(self) -> dict[str, Any]:
        return await self.profiles.traces()

    async def read_profile(self, name: str, offset: int) -> bytes | None:
        return await self.profiles.read(name, offset)

    async def status(self) -> dict[str, Any]:
        if self.is_mute:
            raise ray.exceptions.ActorUnavailableError("mute", None)
        picture = self.engine.snapshot()
        return asdict(picture) | {
            "num_running": picture.num_running,
            "max_running": 32,
            "page_size": PAGE_SIZE,
            "bytes_per_page": 4096,
            "generated_tokens_per_s": 0.0,
        }


@dataclass(frozen=True)
class Remote:
    """`handle.method.remote(...)` of a coroutine function."""

    method: Callable[..., Awaitable[Any]]

    def remote(self, *args: Any, **kwargs: Any) -> Awaitable[Any]:
        return self.method(*args, **kwargs)


class Handle:
    """An object of this process as callers of a Ray actor see one."""

    def __init__(self, target: Any) -> None:
        self._target = target

    def __getattr__(self, name: str) -> Remote:
        return Remote(getattr(self._target, name))


class LocalFleet:
    """The fleet's shape over `LocalRank`s."""

    def __init__(self, ranks: list[LocalRank]) -> None:
        self.ranks = ranks
        self.version = 1
        self.epoch = 0
        self.floor = 0

    def members(self) -> Membership:
        living = tuple(rank.member() for rank in self.ranks if not rank.is_dead)
        return Membership(self.version, self.epoch, self.floor, living)

    def generate(self, incarnation: str, request: Request) -> AsyncGenerator[Output, None]:
        rank = next(rank for rank in self.ranks if rank.incarnation == incarnation)
        return rank.generate(request)
