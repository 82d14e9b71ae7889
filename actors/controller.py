"""The controller as a Ray actor: one per cluster, `controller` in namespace `tidegate`, detached, restarted by Ray.

A thin shell: what it does is in actors/control_plane.py, which runs without Ray as well.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
from typing import Any

import ray
from ray.actor import ActorHandle

from actors.apart import apart
from actors.clock import BootClock, Clock
from actors.control_log import ControlLog
from actors.control_plane import ControlPlane
from actors.detached import find_actor, get_or_create, is_there_any
from actors.end_proofs import LocalEnd, process_name
from actors.log_stores import DirectoryStore, GcsStore, LogStore, boot_directory
from actors.log_thread import LogThread
from actors.messages import (
    CONTROLLER_NAME,
    LeaseAnswer,
    Membership,
    NodeRenewal,
    RankRecord,
    Registered,
    node_agent_name,
)
from actors.metrics import ControlMetrics
from actors.node_agent_actor import NodeAgentActor
from actors.ray_errors import gcs_failures_as_os_errors
from actors.surroundings import Surroundings
from configs.schema import Settings

#: exit status of a controller that was superseded, or can go on no longer
_EXIT_SUPERSEDED = 72


def ensure_controller(settings: Settings) -> ActorHandle[Any]:
    """The controller of this cluster, made by whoever comes first."""
    return get_or_create(ControllerActor, CONTROLLER_NAME, settings)


class ControllerActor:
    """A plain class, wrapped where it is created.

    What it offers to jobs takes plain values and answers plain dicts with `success`, `status`, `message`; a refused
    argument is such a dict too (`status: invalid`, `http_status: 400`, `param`), never an exception.
    """

    async def __init__(self, settings: Settings) -> None:
        context = ray.get_runtime_context()
        name, clock = context.get_actor_name() or CONTROLLER_NAME, BootClock()

        def make_agent(node_id: str) -> None:
            with gcs_failures_as_os_errors():
                agent_name = node_agent_name(name, node_id)
                get_or_create(NodeAgentActor, agent_name, settings, node_id, name, node_id=node_id)

        around = Surroundings(
            clock=clock,
            actor_id=context.get_actor_id() or "",
            cluster=context.get_session_name(),
            node_id=context.get_node_id(),
            find_handle=lambda record: asyncio.to_thread(find_actor, record.actor_name),
            find_process=lambda record: LocalEnd.of(process_name(record)),
            ensure_agent=lambda node_id: asyncio.to_thread(make_agent, node_id),
            has_elders=lambda: asyncio.to_thread(is_there_any, node_agent_name(name, "?" * 12)),
            in_thread=asyncio.to_thread,
            end_process=_end_process,
            is_one_machine=settings.control.log == "directory",
            tiers=("device", "host") if settings.host_tier.is_on else ("device",),
        )
        writer = LogThread(ControlLog(_log_store(settings, clock), clock))
        audit = _audit_store(settings)
        self._plane = ControlPlane(writer, audit, settings.control, around, ControlMetrics())
        await self._plane.start()
        # A pass of the garbage collector over all that Ray has loaded takes longer than an answer may be late.
        gc.collect()
        gc.freeze()

    async def register(self, record: RankRecord, handle: Any) -> Registered:
        """A rank's first call; see ControlPlane.register."""
        return await apart(self._plane.register(record, handle))

    async def renew(self, renewal: NodeRenewal, handle: Any) -> LeaseAnswer:
        """A node's agent asks for a lease; see ControlPlane.renew."""
        return await self._plane.renew(renewal, handle)

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

        timeout_s: seconds to wait for an idle instant, 0: now or refuse. For retract, abort and fence a value below
        the step grace (5 s) counts as that; a fence answers as soon as the floor is on every node's page.
        mode: wait, drain, retract, abort, fence. tiers: names, None: all there are.
        scope: exactly one of namespace, prefix_tokens, older_than_s.
        flush_id: a repeat with the same arguments joins or re-reads the first one for an hour.
        unknown: names that are none of these; such a flush is refused.

        Answers {flush_id, success, status, message, http_status, epoch, sub_epoch, mode, tiers, dry_run, floor_raised,
        superseded_by, replayed, started_at, took_ms, ranks: [{rank, incarnation, node, status, message, epoch,
        waited_ms, freed_pages, freed_bytes, copies_in_flight, blockers, num_aborted, num_retracted}], host_tiers,
        untouched_tiers}. `success` only if every incarnation registered at the start or before the return flushed, is
        fenced (mode fence), joined empty, is proven gone or out of lease (`expired`), and one lives. `status` then is
        `flushed`, else one of in_progress, timed_out, refused, busy, unreachable, expired, expired_command,
        superseded, cancelled, no_ranks, unavailable. `floor_raised`: the invalidation is irrevocable, and reaches who
        has not answered when it comes back.
        """
        known = {
            "timeout_s": timeout_s, "mode": mode, "tiers": tiers, "scope": scope, "flush_id": flush_id,
            "dry_run": dry_run, "caller": caller,
        }  # fmt: skip
        return await apart(self._plane.flush(**unknown, **known))

    async def flush_status(self, flush_id: Any) -> dict[str, Any]:
        """The answer of a flush by its id, with the verdicts that came after it under `late`; `status: pending` while
        it runs; `status: unknown`, `http_status: 404` if nobody remembers it."""
        return await self._plane.flush_status(flush_id)

    async def cancel_flush(self, flush_id: Any, caller: Any = "job") -> dict[str, Any]:
        """End a pending flush that has not begun: one in mode wait or drain, or with a scope. Ranks that have flushed
        stay so.

        Answers {success, status: cancelled, flush: its whole answer}; `status: conflict`, `http_status: 409` if it has
        ended or its floor is raised; `status: unknown`, 404 if nobody knows it.
        """
        return await apart(self._plane.cancel_flush(flush_id, caller))

    async def note_refused(self, call: Any, arguments: Any, message: Any, param: Any = None) -> None:
        """A door has refused a control call before it came here (a body that is no JSON, a field of the wrong type):
        the audit log shows it like those that are refused here."""
        await self._plane.note_refused(call, arguments, message, param)

    async def abort(
        self,
        request_id: Any = None,
        all: Any = False,
        timeout_s: Any = 5.0,
        reason: Any = "aborted by a control call",
        caller: Any = "job",
    ) -> dict[str, Any]:
        """End one request (or a list) by its exact id, or all, on every rank.

        Answers {success, status, message, num_aborted, ranks}; `success` if every rank answered. Unknown ids are no
        error: a request that has ended already needs no abort.
        """
        return await apart(self._plane.abort(request_id, all, timeout_s, reason, caller))

    async def status(self, timeout_s: Any = 1.0) -> dict[str, Any]:
        """Epoch, floor, pending flush, a row for each incarnation with what it says of itself, and one for each node:
        {node, floor, has_lease, silent_s, message}; under `host_tiers` one for each host tier: {node, status (none,
        reserving, ready, failed), message, num_slots, page_bytes, file_bytes, reserved_bytes, free, leased, committed,
        quarantined, valid, num_ranks}, as of its last renewal."""
        return await self._plane.status(timeout_s)

    async def audit(self, limit: Any = 100, flush_id: Any = None) -> dict[str, Any]:
        """The newest flushes and control calls, refused ones too, newest first; all of them or those of one flush.

        Answers {success, status, message, entries: [{call, at, caller, ...}]}; a flush's entry holds its arguments,
        its answer without details, and [rank, incarnation, verdict] for each rank.
        """
        return await self._plane.audit(limit, flush_id)

    async def start_profile(self, arguments: Any = None, caller: Any = "job") -> dict[str, Any]:
        """Record engine steps on every rank, or on none.

        arguments: a dict of output_dir (below the ranks' root of traces), start_step, num_steps, activities (of CPU,
        GPU and MEM), with_stack, record_shapes, profile_by_stage, profile_id, profile_prefix.
        Answers {success, status: started, message, profile_id, ranks: [{rank, incarnation, node, status, message}]};
        `in_progress`, `http_status: 409` if one is under way on some rank, `refused`, 400 if a rank cannot.
        """
        return await self._plane.profiles.start({} if arguments is None else arguments, caller)

    async def stop_profile(self, caller: Any = "job") -> dict[str, Any]:
        """End the profile under way; waits until its traces are written.

        Answers {success, status: written, message, profile_id, ranks: [{rank, ..., status, traces: [{name, bytes,
        stage, num_steps}]}]}; `status: not_running`, `http_status: 409` if no rank profiles.
        """
        return await self._plane.profiles.stop(caller)

    async def profiles(self) -> dict[str, Any]:
        """{success, running: {rank: profile id}, traces: [{name, bytes, modified_s, node, incarnation}]}, newest
        first. incarnation: of a rank that can read it."""
        return await self._plane.profiles.traces()

    async def read_profile(self, incarnation: Any, name: Any, offset: Any = 0) -> dict[str, Any]:
        """{success, data}: up to 4 MiB of a trace from `offset`, b"" at its end. `status: unknown`, 404."""
        return await self._plane.profiles.read(incarnation, name, offset)

    async def info(self) -> dict[str, Any]:
        """What does not change while a rank lives: model facts, sizes, limits. Nothing secret."""
        return await self._plane.info()

    async def hello(self) -> dict[str, Any]:
        """Sign of life: pid, message version, lineage, term, restarts."""
        return await self._plane.hello()


def _log_store(settings: Settings, clock: Clock) -> LogStore:
    if settings.control.log == "gcs":
        return GcsStore(settings.ray.deployment)
    parent = settings.resolved_state_dir / "control-log" / settings.ray.deployment
    return DirectoryStore(boot_directory(parent, clock.boot_id), is_synced=False)


def _audit_store(settings: Settings) -> LogStore:
    if settings.control.log == "gcs":
        return GcsStore(settings.ray.deployment, "audit")
    return DirectoryStore(settings.resolved_state_dir / "audit" / settings.ray.deployment, is_synced=True)


def _end_process() -> None:
    """Ray starts a controller anew if this one was still its own."""
    logging.shutdown()
    os._exit(_EXIT_SUPERSEDED)
