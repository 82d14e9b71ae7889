"""A rank's part of a profile: its profiler, and the folder its traces lie in."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from configs.resolve import GIB
from configs.schema import ProfilingSettings
from engine.profile_spec import TRACE_SUFFIX, Profiled, ProfileSpec

_MAX_LISTED = 1000
#: bytes of a trace per answer
CHUNK_BYTES = 4 * 1024 * 1024


class Profiler(Protocol):
    """What is needed of engine.profiler.Profiler, which knows torch."""

    wake: Callable[[], None]

    @property
    def running_id(self) -> str: ...

    def start(self, spec: ProfileSpec, rank_name: str) -> str: ...

    def stop(self) -> Future[Profiled] | None: ...


class RankProfiles:
    """Lives on the rank's loop. All answers are plain dicts."""

    def __init__(self, profiler: Profiler | None, root: Path, settings: ProfilingSettings) -> None:
        self._profiler = profiler
        self._root = root
        self._settings = settings

    async def start(self, spec: ProfileSpec, rank: int) -> dict[str, Any]:
        """{status: started | in_progress | refused, message}. Seconds the first time, beside the steps."""
        if self._profiler is None:
            return _said("refused", "this engine has no profiler")
        held = await asyncio.to_thread(self._held_bytes)
        if held > self._settings.max_gb * GIB:
            limit = f"{held / GIB:.1f} GiB of traces, {self._settings.max_gb:g} may be kept (profiling.max_gb)"
            return _said("refused", f"the root of traces holds {limit}; remove some")
        reason = await asyncio.to_thread(self._profiler.start, spec, f"rank{rank}")
        if not reason:
            return _said("started", "", profile_id=spec.profile_id)
        return _said("in_progress" if self._profiler.running_id else "refused", reason)

    async def stop(self, profile_id: str | None) -> dict[str, Any]:
        """{status: written | not_running, message, profile_id, traces}; waits for the traces. None: whichever runs."""
        running_id = "" if self._profiler is None else self._profiler.running_id
        ending = None if self._profiler is None or profile_id not in (None, running_id) else self._profiler.stop()
        if ending is None:
            return _said("not_running", "Profiling is not in progress. Call /start_profile first.", traces=[])
        ended = await asyncio.shield(asyncio.wrap_future(ending))
        traces = [
            {"name": trace.name, "bytes": trace.num_bytes, "stage": trace.stage, "num_steps": trace.num_steps}
            for trace in ended.traces
        ]
        status = "failed" if ended.is_failed else "written"
        return _said(status, ended.message, profile_id=ended.profile_id, traces=traces)

    async def traces(self) -> dict[str, Any]:
        """{running_id, traces: [{name, bytes, modified_s}]}, the newest 1000."""
        running_id = "" if self._profiler is None else self._profiler.running_id
        return {"running_id": running_id, "traces": await asyncio.to_thread(self._listed)}

    async def read(self, name: str, offset: int) -> bytes | None:
        """Up to 4 MiB of a trace from `offset`; b"" at its end, None if there is no such trace."""
        return await asyncio.to_thread(self._read, name, offset)

    def _read(self, name: str, offset: int) -> bytes | None:
        root = self._root.resolve()
        path = (root / name).resolve()
        if not path.is_relative_to(root) or not path.name.endswith(TRACE_SUFFIX) or path.name.startswith("."):
            return None
        try:
            with open(path, "rb") as file:
                file.seek(offset)
                return file.read(CHUNK_BYTES)
        except (OSError, ValueError):
            return None

    def _files(self) -> list[Path]:
        # a name that begins with a dot is being written
        return [path for path in self._root.rglob(f"*{TRACE_SUFFIX}") if not path.name.startswith(".")]

    def _listed(self) -> list[dict[str, Any]]:
        rows: list[dict[str, Any]] = []
        for path in self._files():
            try:
                facts = path.stat()
            except OSError:  # removed meanwhile
                continue
            name = str(path.relative_to(self._root))
            rows.append({"name": name, "bytes": facts.st_size, "modified_s": facts.st_mtime})
        return sorted(rows, key=lambda row: -row["modified_s"])[:_MAX_LISTED]

    def _held_bytes(self) -> int:
        return sum(row["bytes"] for row in self._listed())


def _said(status: str, message: str, **more: Any) -> dict[str, Any]:
    return {"status": status, "message": message} | more
