"""A gRPC client as a stranger has it: a process of its own with the published messages and none of our code.

Run with `python -I -S`; reads one call per line of standard input, answers with one line each.
"""

from __future__ import annotations

import asyncio
import json
import sys
import sysconfig
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROGRAM = """
import json, sys
sys.path.append(sys.argv[1])
import grpc
from google.protobuf.json_format import MessageToDict, ParseDict
from smg_grpc_proto.generated import common_pb2, sglang_scheduler_pb2, sglang_scheduler_pb2_grpc
assert not {"deployments", "cache", "engine", "configs"} & set(sys.modules)
with grpc.insecure_channel(sys.argv[2]) as channel:
    stub = sglang_scheduler_pb2_grpc.SglangSchedulerStub(channel)
    for line in sys.stdin:
        call = json.loads(line)
        name = call["rpc"] + "Request"
        module = sglang_scheduler_pb2 if hasattr(sglang_scheduler_pb2, name) else common_pb2
        request = ParseDict(call["request"], getattr(module, name)())
        messages, code, details = [], "OK", ""
        try:
            answer = getattr(stub, call["rpc"])(request, timeout=call["timeout_s"], metadata=call["metadata"])
            for message in answer if hasattr(answer, "__next__") else [answer]:
                messages.append(MessageToDict(message, preserving_proto_field_name=True))
                if len(messages) == call["cancel_after"]:
                    answer.cancel()
        except grpc.RpcError as error:
            code, details = error.code().name, error.details()
        print(json.dumps({"code": code, "details": details, "messages": messages}), flush=True)
"""


@dataclass(frozen=True)
class Reply:
    """What came back: the status, and the messages as plain dicts (fields at their default value are left out)."""

    code: str
    details: str
    messages: list[dict[str, Any]]

    @property
    def message(self) -> dict[str, Any]:
        """The one message of an answered unary call."""
        assert self.code == "OK", f"{self.code}: {self.details}"
        assert len(self.messages) == 1
        return self.messages[0]


class Client:
    """Calls one after the other; two clients make calls at the same time."""

    def __init__(self, process: asyncio.subprocess.Process) -> None:
        self._process = process

    async def call(
        self,
        rpc: str,
        request: dict[str, Any] | None = None,
        *,
        timeout_s: float | None = 20.0,
        key: str | None = None,
        cancel_after: int | None = None,
    ) -> Reply:
        """cancel_after: hang up when so many messages have come."""
        metadata = [("authorization", f"Bearer {key}")] if key is not None else []
        call = {"rpc": rpc, "request": request or {}, "timeout_s": timeout_s, "metadata": metadata}
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(json.dumps(call | {"cancel_after": cancel_after}).encode() + b"\n")
        return Reply(**json.loads(await self._process.stdout.readline()))


@asynccontextmanager
async def grpc_client(address: str, cwd: Path) -> AsyncIterator[Client]:
    """A client process for the length of the block. cwd: any folder that holds none of our packages."""
    command = [sys.executable, "-I", "-S", "-c", PROGRAM, sysconfig.get_paths()["purelib"], address]
    process = await asyncio.create_subprocess_exec(
        *command, cwd=cwd, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE, limit=1 << 24
    )
    try:
        yield Client(process)
    finally:
        assert process.stdin is not None
        process.stdin.close()
        assert await process.wait() == 0
