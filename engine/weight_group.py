"""New weights over a torch.distributed group: the trainer is its rank 0 and broadcasts, tensor by tensor.

The group is apart from any other of this process. It is joined in the way trainers join theirs (a TCP store under the
group's name, then a group without a parent), so that SGLang's clients need no change. Every call here blocks and has an
end: none belongs to the engine thread or to an event loop.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d

from configs.errors import Conflict, ControlUnavailable, InvalidField, NotOffered, UnknownResource, WeightsRejected
from engine.weight_sources import FlatBucket, FlatTensor, NamedTensors, dtype_called

#: trainers' rank in every group
TRAINER = 0
_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class GroupSettings:
    """One process's place in a group."""

    name: str
    master_address: str
    master_port: int
    #: of this process; 0 is the trainer
    rank: int
    world_size: int
    backend: Literal["gloo", "nccl"] = "gloo"
    #: of joining, and of every single broadcast
    timeout_s: float = 60.0

    def check(self) -> None:
        """Raises InvalidField, NotOffered for a backend that this torch was built without."""
        if not self.name:
            raise InvalidField("group_name must not be empty", "group_name")
        if not 0 < self.master_port <= _MAX_PORT:
            raise InvalidField(f"master_port must be between 1 and {_MAX_PORT}, got {self.master_port}", "master_port")
        if self.world_size < 2 or not 0 <= self.rank < self.world_size:
            message = f"rank {self.rank} of {self.world_size}: a group has a trainer, rank 0, and at least one rank"
            raise InvalidField(message, "rank_offset")
        is_here = dist.is_nccl_available() if self.backend == "nccl" else dist.is_gloo_available()
        if not is_here:
            raise NotOffered(f"this installation of torch has no {self.backend}", "backend")


class WeightGroups:
    """The groups of one process, by name. One thread at a time."""

    def __init__(self) -> None:
        self._groups: dict[str, Any] = {}

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._groups)

    def join(self, settings: GroupSettings) -> None:
        """Wait until all members are there. Raises Conflict for a name that is in use, ControlUnavailable if they do
        not all come in time."""
        settings.check()
        name = settings.name
        if name in self._groups:
            raise Conflict(f"group {name} is there already; destroy_weights_update_group ends it", "group_name")
        try:
            self._groups[name] = _new_group(settings)
        except (RuntimeError, ValueError, OSError) as error:
            message = f"group {name} did not come together within {settings.timeout_s:g} s: {type(error).__name__}"
            raise ControlUnavailable(message) from error

    def leave(self, name: str) -> None:
        """Raises UnknownResource for a group that is not there."""
        group = self._group(name)
        del self._groups[name]
        dist.destroy_process_group(group)

    def receive(self, name: str, tensors: Sequence[FlatTensor], device: torch.device) -> Iterator[tuple[str, Tensor]]:
        """Tensors of these names, shapes and dtypes, in this order, as the trainer broadcasts them; in new memory.

        Raises WeightsRejected if one does not come in time; the group is then of no use any more, and left.
        """
        for entry in tensors:
            tensor = torch.empty(entry.shape, dtype=dtype_called(entry.dtype, entry.name), device=device)
            self._receive_into(name, tensor, entry.name)
            yield entry.name, tensor

    def receive_bucket(self, name: str, tensors: Sequence[FlatTensor], device: torch.device) -> FlatBucket:
        """All of them in one broadcast, flat. Fails as `receive` does."""
        data = torch.empty(max((entry.end for entry in tensors), default=0), dtype=torch.uint8, device=device)
        self._receive_into(name, data, "a flat bucket")
        return FlatBucket(data, tuple(tensors))

    def send(self, name: str, named_tensors: NamedTensors) -> None:
        """The trainer's end of `receive`."""
        group = self._group(name)
        for _, tensor in named_tensors:
            dist.broadcast(tensor.detach().contiguous(), group=group, group_src=TRAINER)

    def close(self) -> None:
        """Leave all."""
        for name in self.names:
            self.leave(name)

    def _receive_into(self, name: str, tensor: Tensor, what: str) -> None:
        group = self._group(name)
        try:
            dist.broadcast(tensor, group=group, group_src=TRAINER)
        except RuntimeError as error:
            self.leave(name)
            message = f"{what} did not come over group {name}, which is ended: {type(error).__name__}"
            raise WeightsRejected(message, "payload") from error

    def _group(self, name: str) -> Any:
        group = self._groups.get(name)
        if group is None:
            raise UnknownResource(f"there is no group {name!r:.80}; init_weights_update_group makes one", "group_name")
        return group


def _new_group(settings: GroupSettings) -> Any:
    """torch has no public call for a group that is no part of the default one."""
    c10d: Any = distributed_c10d
    timeout = timedelta(seconds=settings.timeout_s)
    url = f"tcp://{settings.master_address}:{settings.master_port}"
    store, rank, world_size = next(c10d.rendezvous(url, settings.rank, settings.world_size, timeout=timeout))
    store.set_timeout(timeout)
    named_store = c10d.PrefixStore(settings.name, store)
    group, _ = c10d._new_process_group_helper(
        world_size,
        rank,
        [],
        settings.backend,
        named_store,
        group_name=settings.name,
        timeout=timeout,
    )
    c10d._world.pg_group_ranks[group] = {member: member for member in range(world_size)}
    return group
