"""Reading event streams strictly, and a client that can hang up in the middle, which httpx's transport cannot."""

from __future__ import annotations

import asyncio
import json
from typing import Any

from starlette.applications import Starlette


def sse_events(text: str) -> list[dict[str, Any]]:
    """The JSON objects of a whole stream; asserts `data: {json}` lines, an empty line after each, [DONE] last."""
    assert text.endswith("data: [DONE]\n\n"), text[-200:]
    blocks = text.split("\n\n")
    assert blocks[-1] == ""
    assert all(block.startswith("data: ") and "\n" not in block for block in blocks[:-1])
    return [json.loads(block.removeprefix("data: ")) for block in blocks[:-2]]


class HangingUp:
    """One request whose client leaves when `hang_up` is called."""

    def __init__(self, app: Starlette, path: str, body: dict[str, Any]) -> None:
        self._body = json.dumps(body).encode()
        self._is_read = False
        self._gone = asyncio.Event()
        self.chunks: list[bytes] = []
        self.status: int | None = None
        self.got_chunk = asyncio.Event()
        scope = {
            "type": "http", "method": "POST", "path": path, "raw_path": path.encode(), "query_string": b"",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1", "scheme": "http",
            "server": ("api", 80), "client": ("client", 1), "root_path": "",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
        }  # fmt: skip
        self.task = asyncio.create_task(app(scope, self._receive, self._send))

    def hang_up(self) -> None:
        self._gone.set()

    async def _receive(self) -> dict[str, Any]:
        if not self._is_read:
            self._is_read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._gone.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif message.get("body"):
            self.chunks.append(message["body"])
            self.got_chunk.set()
