"""An Api replica without Serve: the real Starlette application over local ranks, and a client for it."""

from __future__ import annotations

import asyncio
import functools
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from starlette.applications import Starlette
from torch.profiler import profile

from actors.control_plane import ControlPlane
from actors.controller import ControllerActor
from configs.schema import ControlSettings
from deployments.admission import Admission
from deployments.auth import Keys
from deployments.control import ControllerClient
from deployments.core import ApiCore
from deployments.http.app import build_http_app
from deployments.http.door import Door
from deployments.model_card import read_model_card
from deployments.tokenizer import Tokenizer
from engine.grammar import GrammarBook
from engine.models import LoadedModel
from tests.unit.actors.fakes import rank_record
from tests.unit.actors.planes import World
from tests.unit.deployments.local_ranks import Handle, LocalFleet, LocalRank, PlainRecording

TIMEOUT_S = 30


@dataclass(frozen=True)
class Demo:
    """The tiny model: its directory, and what is loaded from it once."""

    directory: Path
    model: LoadedModel
    tokenizer: Tokenizer


@dataclass
class Server:
    app: Starlette
    client: httpx.AsyncClient
    core: ApiCore
    fleet: LocalFleet
    plane: ControlPlane

    @property
    def ranks(self) -> list[LocalRank]:
        return self.fleet.ranks

    async def idle(self) -> None:
        """Wait until no rank owns a page and no sequence is counted."""
        await until(lambda: not self.core.admission.num_inflight, "sequences are still counted")
        await until(lambda: all(rank.is_idle for rank in self.ranks if not rank.is_dead), "pages are still owned")

    async def post(self, path: str, body: dict[str, Any], **options: Any) -> httpx.Response:
        return await self.client.post(path, json=body, **options)


@asynccontextmanager
async def serving(
    demo: Demo,
    *,
    num_ranks: int = 1,
    keys: Keys | None = None,
    max_inflight: int = 64,
    max_body_bytes: int = 1 << 20,
    traces: Path | None = None,
    **control: Any,
) -> AsyncIterator[Server]:
    """A server for the length of the block; afterwards every engine thread has ended."""
    facts = demo.model.facts
    grammars = GrammarBook(demo.directory / "tokenizer.json", facts.vocab_size, facts.eos_token_ids)
    record = profile if num_ranks == 1 else PlainRecording
    ranks = [LocalRank(demo.model, rank, f"incarnation-{rank}", grammars, traces, record) for rank in range(num_ranks)]
    around = World()
    stack = AsyncExitStack()
    plane = await stack.enter_async_context(around.start(**control))
    for rank in ranks:
        await plane.register(rank_record(rank.rank, rank.incarnation), Handle(rank))
    fleet = LocalFleet(ranks)
    core = ApiCore(
        card=read_model_card(demo.directory, "tiny"),
        tokenizer=demo.tokenizer,
        fleet=fleet,
        controller=_client(plane, ControlSettings(**control)),
        admission=Admission(max_inflight),
    )
    door = Door(core, keys or Keys(), max_body_bytes, 3600.0, lambda: 1_700_000_000.0, time.monotonic)
    app = build_http_app(door, "0.test")
    transport = httpx.ASGITransport(app, raise_app_exceptions=True)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://api") as client:
            yield Server(app, client, core, fleet, plane)
    finally:
        await stack.aclose()
        around.close()
        for rank in ranks:
            rank.stop()


def _client(plane: ControlPlane, settings: ControlSettings) -> ControllerClient:
    """The real client, on the real actor class, without the process around it."""
    actor = ControllerActor.__new__(ControllerActor)
    actor._plane = plane
    return ControllerClient(Handle(actor), settings)


def scenario(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """A coroutine function as a test; it has 30 s to end."""

    @functools.wraps(test)
    def run(*args: Any, **kwargs: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **kwargs), TIMEOUT_S))

    return run


async def until(condition: Callable[[], bool] | Callable[[], Awaitable[bool]], what: str) -> None:
    """Let everything else run until `condition` holds; fails after 10 s."""
    deadline_s = time.monotonic() + 10
    while True:
        held = condition()
        if held if isinstance(held, bool) else await held:
            return
        assert time.monotonic() < deadline_s, what
        await asyncio.sleep(0.001)
