"""What a payload must be to become weights of the model that is served: every check, before anything changes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from configs.errors import WeightsRejected
from engine.weight_names import Target, WeightNames, WeightSpec

#: `exact`: the dtype that is served. `lossless`: also one whose every value the served dtype holds. `any`: rounds
CastRule: TypeAlias = Literal["exact", "lossless", "any"]

_WIDER: dict[torch.dtype, frozenset[torch.dtype]] = {
    torch.float16: frozenset({torch.float32, torch.float64}),
    torch.bfloat16: frozenset({torch.float32, torch.float64}),
    torch.float32: frozenset({torch.float64}),
}


@dataclass(frozen=True, slots=True)
class StageOptions:
    """What an update asks for."""

    #: only some of the weights come, the others stay; otherwise a missing one refuses the update
    is_partial: bool = False
    cast: CastRule = "lossless"
    #: refuse NaN and infinity
    check_finite: bool = False
    #: where the new weights wait; None: on the model's device. "cpu" spares device memory, the commit then copies
    device: str | None = None


class Intake:
    """Takes tensors in one by one, in memory of its own, and gives the weights they make."""

    def __init__(self, names: WeightNames, options: StageOptions) -> None:
        self._names = names
        self._options = options
        #: names as they came -> tensors, where several make a weight or one makes several
        self._fused: dict[str, Tensor] = {}
        #: names in the module -> tensors
        self._plain: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Check one tensor as far as it can be judged alone, and copy it. Raises WeightsRejected."""
        target = self._names.target(name)
        if target is None:
            if self._names.is_ignored(name):
                return
            raise WeightsRejected(f"{name} is no weight of this model", "unknown_name", (name,))
        if name in self._fused or (target.name in self._plain and not target.is_fused):
            raise WeightsRejected(f"{name} has come twice", "duplicate_name", (name,))
        spec = self._names.spec(target.name)
        self._check_dtype(name, tensor, spec)
        if not target.is_fused and tuple(tensor.shape) != spec.shape:
            message = f"{name} is {list(tensor.shape)}, the model has {list(spec.shape)}"
            raise WeightsRejected(message, "shape", (name,))
        self._keep(name, target, self._own(tensor, spec))

    def finish(self) -> dict[str, Tensor]:
        """Canonical name -> tensor on the device of staging. Raises WeightsRejected; call it once."""
        named = self._plain
        if self._fused:
            named |= {name: self._placed(tensor) for name, tensor in self._names.fuse(self._fused).items()}
            self._fused = {}
        weights = self._untied(named)
        missing = [] if self._options.is_partial else self._names.missing(weights.keys())
        if missing:
            more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
            message = f"{', '.join(missing[:3])}{more} did not come; a complete update brings every weight"
            raise WeightsRejected(message, "missing_name", tuple(missing[:3]))
        if not weights:
            raise WeightsRejected("no weights came", "payload")
        for name, tensor in weights.items():
            self._check_whole(name, tensor)
        return weights

    def _keep(self, name: str, target: Target, tensor: Tensor) -> None:
        if target.is_fused:
            self._fused[name] = tensor
        else:
            self._plain[target.name] = tensor

    def _own(self, tensor: Tensor, spec: WeightSpec) -> Tensor:
        """A copy in the served dtype: the caller's memory may be a file, or be written again."""
        device = self._options.device or self._names.device
        return torch.empty(tensor.shape, dtype=spec.dtype, device=device).copy_(tensor)

    def _placed(self, tensor: Tensor) -> Tensor:
        """What transformers has computed may be a view of more than itself, and lies on the model's device."""
        device = self._options.device or self._names.device
        return tensor.to(device).clone(memory_format=torch.contiguous_format)

    def _check_dtype(self, name: str, tensor: Tensor, spec: WeightSpec) -> None:
        given, served = tensor.dtype, spec.dtype
        cast = self._options.cast
        if given == served or (cast != "exact" and served in _WIDER.get(given, ())):
            return
        if cast == "any" and given.is_floating_point and served.is_floating_point:
            return
        message = f"{name} is {given}, the model is served in {served}, and a cast ({cast}) may not change a value"
        raise WeightsRejected(message.replace("torch.", ""), "dtype", (name,))

    def _untied(self, named: dict[str, Tensor]) -> dict[str, Tensor]:
        """One entry per storage. Tied weights may come under any of their names, or under all with the same bytes."""
        weights: dict[str, Tensor] = {}
        for name, tensor in named.items():
            canonical = self._names.canonical(name)
            known = weights.setdefault(canonical, tensor)
            # NaN is equal to itself here: bytes are compared
            if known is not tensor and not torch.equal(_raw(known), _raw(tensor)):
                message = f"{canonical} and {name} are one weight in this model, but came with different values"
                raise WeightsRejected(message, "tied", (canonical, name))
        return weights

    def _check_whole(self, name: str, tensor: Tensor) -> None:
        spec = self._names.spec(name)
        if (tuple(tensor.shape), tensor.dtype) != (spec.shape, spec.dtype):
            made, wanted = f"{list(tensor.shape)} of {tensor.dtype}", f"{list(spec.shape)} of {spec.dtype}"
            message = f"the tensors for {name} make {made}, not {wanted}"
            raise WeightsRejected(message, "fused", (name,))
        is_number = tensor.is_floating_point() and self._options.check_finite
        if is_number and not bool(torch.isfinite(tensor).all()):
            raise WeightsRejected(f"{name} holds NaN or infinity", "not_finite", (name,))


def _raw(tensor: Tensor) -> Tensor:
    return tensor.view(-1).view(torch.uint8)
