"""Making the actors that must outlive every rank: in one place, because one forgotten option kills them.

Code that runs in a Rank replica runs with placement-group capture: an actor created there without an explicit
scheduling strategy lands in that rank's bundle, dies with that rank and hangs in RESTARTING for ever. Whoever asks
first creates the actor, so this stays unseen until that rank dies.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.messages import NAMESPACE

# Serve's own controller takes 15,000; our calls are watches, long polls and flushes, a few per rank and Api replica.
_MAX_CONCURRENCY = 10_000


def get_or_create(actor_class: type, name: str, *args: Any, node_id: str | None = None) -> ActorHandle[Any]:
    """The detached actor `name` of namespace `tidegate`; created if absent, on `node_id` if given.

    Restarted by Ray for ever; a call that was in flight is never re-executed.
    """
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False) if node_id else "DEFAULT"
    remote_class: Any = ray.remote(actor_class)
    return remote_class.options(
        name=name,
        namespace=NAMESPACE,
        lifetime="detached",
        get_if_exists=True,
        max_restarts=-1,
        max_task_retries=0,
        num_cpus=0,
        max_concurrency=_MAX_CONCURRENCY,
        scheduling_strategy=strategy,
    ).remote(*args)


def find_actor(name: str) -> ActorHandle[Any] | None:
    """The actor of this name in namespace `tidegate`; None if Ray has none (any more). Blocks."""
    try:
        return ray.get_actor(name, namespace=NAMESPACE)
    except ValueError:
        return None


def is_there_any(pattern: str) -> bool:
    """Has Ray an actor in namespace `tidegate` whose name is like this, with `?` for any character? Blocks."""
    known: list[Any] = ray.util.list_named_actors(all_namespaces=True)
    return any(actor["namespace"] == NAMESPACE and fnmatchcase(actor["name"], pattern) for actor in known)
