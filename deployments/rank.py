"""The Rank deployment: a small replica that owns one scheduler actor and shares its fate.

The actor has the GPU and the engine; this process makes it, registers it, watches it, and ends when it ends. Then
Serve makes a new replica with a new incarnation (2 s against 30 s for a failing health check). The other way round
Ray ends the actor when its owner, this process, has gone.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Mapping
from typing import Any

import ray
from ray import serve
from ray.serve import Deployment
from ray.serve.schema import ReplicaRank
from ray.util.placement_group import get_current_placement_group
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from actors.controller import ensure_controller
from actors.endpoints import new_incarnation
from actors.messages import NAMESPACE, RankRecord, Registered
from actors.ray_errors import Answered, CallFailed, outcome_of, outcome_within
from actors.scheduler import SchedulerActor
from configs.errors import ConfigError, RankLost
from configs.resolve import rank_resources_of
from configs.schema import Settings

log = logging.getLogger(__name__)

#: health checks only catch hangs: a death is noticed by the watch, within milliseconds
_HEALTH_PERIOD_S = 2.0
#: a step that takes longer hangs: the longest real ones (a full chunk on a slow CPU) take seconds
_MAX_STEP_S = 120.0
_LEAVE_TIMEOUT_S = 2.0
#: between two tries to register with a controller that restarts, which takes it 1.3 s
_RETRY_S = 0.5
#: exit status when the scheduler has ended; Serve replaces the replica whatever it is
_EXIT_SCHEDULER_ENDED = 71


class Rank:
    """One replica. It serves no request itself: Apis talk to its scheduler over the data plane."""

    async def __init__(self, settings: Settings) -> None:
        """settings: settled by configs.resolve. Raises ConfigError when they cannot work with this model or machine."""
        self._rank = serve.get_replica_context().rank.rank
        self._is_leaving = False
        self._controller = ensure_controller(settings)
        self._scheduler = _new_scheduler(settings, self._rank, new_incarnation())
        record = await self._scheduler.start.remote()
        self._watching = asyncio.create_task(self._end_with_scheduler(), name="watch-scheduler")
        self._registered = await self._register(record)
        await self._scheduler.join.remote(self._registered)
        log.info("rank %d serves as incarnation %s", record.rank, record.incarnation)

    async def reconfigure(self, user_config: Any, rank: ReplicaRank) -> None:
        """Called by Serve after the start, and when it gives this replica another number.

        A replica that starts while a dead one is still being removed gets a number beyond the last, and its own later.
        """
        if rank.rank != self._rank:
            self._rank = rank.rank
            await self._register(await self._scheduler.renumber.remote(rank.rank))

    async def check_health(self) -> None:
        """Called by Serve; raises when the scheduler hangs. Registers again with a controller that was restarted, and
        ends this process when the controller has lost its log."""
        hello = await self._scheduler.hello.remote()
        if hello["stalled_s"] > _MAX_STEP_S:
            raise RuntimeError(f"rank {self._rank}: one engine step has taken {hello['stalled_s']:.0f} s")
        about = await outcome_within(self._controller.hello.remote(), _HEALTH_PERIOD_S)
        if isinstance(about, Answered):
            await self._follow_controller(about.value)

    async def _follow_controller(self, hello: Mapping[str, Any]) -> None:
        """What the controller says of itself against what it said when this rank registered."""
        if hello["lineage"] != self._registered.lineage:
            # It does not know this rank and its epochs mean nothing here: only an empty rank may join it.
            _end_process("the controller begins a new lineage")
        if hello["term"] == self._registered.term:
            return
        # It may have found no actor of this rank's name. Without an answer the next check tries again.
        record = await self._scheduler.renumber.remote(self._rank)
        again = await outcome_within(self._controller.register.remote(record, self._scheduler), _HEALTH_PERIOD_S)
        if isinstance(again, Answered):
            self._registered = again.value

    async def __del__(self) -> None:
        """Called by Serve once, at a graceful stop."""
        self._is_leaving = True
        await outcome_within(self._scheduler.stop.remote(), _LEAVE_TIMEOUT_S)
        ray.kill(self._scheduler)

    async def _register(self, record: RankRecord) -> Registered:
        """Waits for a controller that restarts. Raises RankLost when it refuses or will never come back."""
        while True:
            match await outcome_of(self._controller.register.remote(record, self._scheduler)):
                case Answered(registered):
                    return registered
                case CallFailed("error" | "died", message):
                    raise RankLost(f"rank {record.rank} could not be registered: {message}")
                case CallFailed(_, message):
                    log.warning("rank %d is not registered yet: %s", record.rank, message)
            await asyncio.wait({self._watching}, timeout=_RETRY_S)

    async def _end_with_scheduler(self) -> None:
        """`watch` never returns while the scheduler lives."""
        outcome = await outcome_of(self._scheduler.watch.remote())
        if not self._is_leaving:
            _end_process(f"its scheduler has ended: {outcome}")


def rank_deployment(settings: Settings) -> Deployment:
    """The deployment to bind with `settings`, which configs.resolve has settled. Raises ConfigError if it has not."""
    options: dict[str, Any] = {
        "name": "rank",
        "num_replicas": settings.dp,
        "ray_actor_options": {"num_cpus": 0},
        # The bundle is the scheduler's; the replica itself asks for nothing.
        "placement_group_bundles": [_resources(settings)],
        "placement_group_strategy": "STRICT_PACK",
        "health_check_period_s": _HEALTH_PERIOD_S,
        "health_check_timeout_s": settings.ray.health_timeout_s,
        # It has no requests of its own to wait for.
        "graceful_shutdown_wait_loop_s": 0.1,
        "graceful_shutdown_timeout_s": _LEAVE_TIMEOUT_S + 1,
    }
    deployment: Any = serve.deployment(Rank)
    return deployment.options(**options)


def _resources(settings: Settings) -> dict[str, float]:
    device = settings.engine.device
    if device == "auto":
        raise ConfigError("engine.device is auto: it must be settled before ranks are placed (configs.resolve)")
    return rank_resources_of(settings, device)


def _new_scheduler(settings: Settings, rank: int, incarnation: str) -> Any:
    """The scheduler actor, in this replica's own bundle and owned by this process."""
    resources = _resources(settings)
    group = get_current_placement_group()
    assert group is not None, "Serve places every rank in a group of its own"
    remote_class: Any = ray.remote(SchedulerActor)
    return remote_class.options(
        name=f"scheduler-{rank}-{incarnation}",
        namespace=NAMESPACE,
        num_cpus=resources.pop("CPU", 0),
        num_gpus=resources.pop("GPU", 0),
        resources=resources,
        max_restarts=0,
        max_task_retries=0,
        # Nothing that the actor might ever make is drawn into this bundle: it would die with this rank.
        scheduling_strategy=PlacementGroupSchedulingStrategy(
            group, placement_group_bundle_index=0, placement_group_capture_child_tasks=False
        ),
    ).remote(settings, rank, incarnation)


def _end_process(reason: str) -> None:
    """Serve replaces a replica whose process has gone at once; one that reports itself ill, after three checks."""
    log.error("this rank ends: %s", reason)
    logging.shutdown()
    os._exit(_EXIT_SCHEDULER_ENDED)
