"""The controller as a Ray actor: one per cluster, `controller` in namespace `tidegate`, detached, restarted by Ray.

A thin shell: what it does is in actors/control_plane.py, which runs without Ray as well.
"""

from __future__ import annotations

import gc
from typing import Any

import ray

from actors.clock import BootClock
from actors.control_plane import ControlPlane, Surroundings
from actors.log_stores import DirectoryStore, GcsStore, LogStore
from actors.messages import NAMESPACE, Membership, RankRecord, Registered
from actors.metrics import ControlMetrics
from configs.schema import Settings


class ControllerActor:
    """A plain class, wrapped where it is created (actors/detached.py).

    What it offers to jobs takes plain values and answers plain dicts with `success`, `status`, `message`; a refused
    argument is such a dict too (`status: invalid`, `http_status: 400`, `param`), never an exception.
    """

    async def __init__(self, settings: Settings) -> None:
        context = ray.get_runtime_context()
        around = Surroundings(
            clock=BootClock(),
            actor_id=context.get_actor_id() or "",
            cluster=context.get_session_name(),
            node_id=context.get_node_id(),
            find_handle=_named_actor,
        )
        self._plane = ControlPlane(_store(settings), settings.control, around, ControlMetrics())
        await self._plane.start()
        # A pass of the garbage collector over all that Ray has loaded takes longer than an answer may be late.
        gc.collect()
        gc.freeze()

    async def register(self, record: RankRecord, handle: Any) -> Registered:
        """A rank's first call; see ControlPlane.register."""
        return await self._plane.register(record, handle)

    async def membership(self, known_version: int, timeout_s: float) -> Membership:
        """Long poll of an Api process; see ControlPlane.membership."""
        return await self._plane.membership(known_version, timeout_s)

    async def flush(
        self,
        timeout_s: Any = 0.0,
        mode: Any = "wait",
        tiers: Any = None,
        scope: Any = None,
        flush_id: Any = None,
        dry_run: Any = False,
        caller: Any = "job",
        **unknown: Any,
    ) -> dict[str, Any]:
        """Flush the cache of every rank; the answer comes by `timeout_s` plus 50 ms whatever the ranks do.

        timeout_s: seconds to wait for an idle instant, 0: now or refuse. mode: wait, drain, retract, abort, fence.
        tiers: names, None: all there are. scope: exactly one of namespace, adapter, prefix_tokens, older_than_s.
        flush_id: a repeat with the same arguments joins or re-reads the first one for an hour.
        unknown: names that are none of these; such a flush is refused.

        Answers {flush_id, success, status, message, http_status, epoch, mode, tiers, dry_run, floor_raised, replayed,
        started_at, took_ms, ranks: [{rank, incarnation, node, status, message, epoch, waited_ms, freed_pages,
        freed_bytes, copies_in_flight, blockers, num_aborted, num_retracted}], host_tiers, untouched_tiers}.
        `success` only if every incarnation registered at the start or before the return flushed, joined empty or is
        proven gone, and one lives. `status` then is `flushed`, else one of in_progress, timed_out, refused, busy,
        unreachable, expired_command, superseded, no_ranks, unavailable.
        """
        known = {
            "timeout_s": timeout_s, "mode": mode, "tiers": tiers, "scope": scope, "flush_id": flush_id,
            "dry_run": dry_run, "caller": caller,
        }  # fmt: skip
        return await self._plane.flush(**unknown, **known)

    async def flush_status(self, flush_id: Any) -> dict[str, Any]:
        """The answer of a flush by its id, with the verdicts that came after it under `late`; `status: pending` while
        it runs; `status: unknown`, `http_status: 404` if nobody remembers it."""
        return await self._plane.flush_status(flush_id)

    async def abort(
        self, request_id: Any = None, all: Any = False, timeout_s: Any = 5.0, reason: Any = "aborted by a control call"
    ) -> dict[str, Any]:
        """End one request (or a list) by its exact id, or all, on every rank.

        Answers {success, status, message, num_aborted, ranks}; `success` if every rank answered. Unknown ids are no
        error: a request that has ended already needs no abort.
        """
        return await self._plane.abort(request_id, all, timeout_s, reason)

    async def status(self, timeout_s: Any = 1.0) -> dict[str, Any]:
        """Epoch, floor, pending flush, and a row for each incarnation with what it says of itself."""
        return await self._plane.status(timeout_s)

    async def info(self) -> dict[str, Any]:
        """What does not change while a rank lives: model facts, sizes, limits. Nothing secret."""
        return await self._plane.info()

    async def hello(self) -> dict[str, Any]:
        """Sign of life: pid, message version, lineage, term, restarts."""
        return await self._plane.hello()


def _store(settings: Settings) -> LogStore:
    if settings.control.log == "gcs":
        return GcsStore(settings.ray.deployment)
    return DirectoryStore(settings.resolved_state_dir / "control-log" / settings.ray.deployment)


def _named_actor(record: RankRecord) -> Any:
    """The rank's actor; None if Ray has none of that name any more."""
    try:
        return ray.get_actor(record.actor_name, namespace=NAMESPACE)
    except ValueError:
        return None
