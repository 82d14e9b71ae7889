"""The in-process server behind a real port, for clients that are programs or threads of their own."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import uvicorn

from deployments.auth import Keys
from tests.unit.deployments.api_server import Demo, Server, serving, until


@asynccontextmanager
async def on_a_port(
    demo: Demo, keys: Keys | None = None, num_ranks: int = 2, traces: Path | None = None
) -> AsyncIterator[tuple[Server, str]]:
    """The HTTP door on a port of its own, and its address."""
    async with serving(demo, num_ranks=num_ranks, keys=keys, traces=traces) as server:
        config = uvicorn.Config(server.app, port=0, log_level="error", lifespan="off", timeout_graceful_shutdown=1)
        door = uvicorn.Server(config)
        listener = config.bind_socket()
        running = asyncio.create_task(door.serve(sockets=[listener]))
        try:
            yield server, f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            door.should_exit = True
            await running


@asynccontextmanager
async def traffic(server: Server) -> AsyncIterator[None]:
    """Requests that follow one another without an idle moment: a process takes longer to start than the tiny model
    to write a page."""
    body = {"text": "on and on", "sampling_params": {"max_new_tokens": 1000, "ignore_eos": True}}

    async def client() -> None:
        while True:
            await server.post("/generate", body)

    clients = [asyncio.create_task(client()) for _ in range(3)]
    await until(lambda: not server.ranks[0].is_idle, "the rank runs")
    try:
        yield
    finally:
        for task in clients:
            task.cancel()
        await asyncio.gather(*clients, return_exceptions=True)
        await server.idle()
