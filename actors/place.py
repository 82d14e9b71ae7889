"""Where in the cluster this process runs."""

from __future__ import annotations

from dataclasses import dataclass

import ray
import ray.util


@dataclass(frozen=True, slots=True)
class Place:
    """An actor's place."""

    node_id: str
    #: address under which other nodes reach this one
    host: str
    gpu_ids: tuple[str, ...]
    actor_name: str


def place_in_ray() -> Place:
    """The place of the actor that calls."""
    context = ray.get_runtime_context()
    return Place(
        node_id=context.get_node_id(),
        host=ray.util.get_node_ip_address(),
        gpu_ids=tuple(context.get_accelerator_ids().get("GPU", ())),
        actor_name=context.get_actor_name() or "",
    )
