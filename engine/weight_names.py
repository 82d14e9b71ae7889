"""Which weights a model has, and what the names in a checkpoint mean for it.

A checkpoint's names are not always the module's: transformers renames some at load and fuses or splits others (the
experts of a mixture become one tensor). The mapping is transformers' own, applied here by its own functions, so a
payload is understood exactly as `from_pretrained` would understand it. Those functions are no public interface of
transformers; they have been the same from 5.17 to 5.23, and tests/unit/engine/test_weight_names.py holds them to it.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Set
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig

from configs.errors import WeightsRejected
from engine.quiet_loading import without_progress_bars


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """What one weight of the served model looks like; an update never changes it."""

    shape: tuple[int, ...]
    dtype: torch.dtype


@dataclass(frozen=True, slots=True)
class Target:
    """Where a tensor of a payload belongs."""

    #: of the weight; of the first of them where several tensors make one weight, or one tensor makes several
    name: str
    #: transformers computes the weight from this tensor and perhaps others
    is_fused: bool


class WeightNames:
    """The names of one model's weights. Made once, before it serves; reads the model, never changes it."""

    def __init__(self, module: PreTrainedModel) -> None:
        #: name in the module -> parameter or persistent buffer; tied ones under each of their names
        self._tensors: dict[str, Tensor] = {
            name: tensor for name, tensor in module.state_dict(keep_vars=True).items() if isinstance(tensor, Tensor)
        }
        #: name -> the first name of the same storage; tied weights are one weight
        self._canonical = _canonical_names(self._tensors)
        self.specs = {
            name: WeightSpec(tuple(tensor.shape), tensor.dtype)
            for name, tensor in self._tensors.items()
            if self._canonical[name] == name
        }
        self._skeleton = _skeleton_of(module)
        #: of the model; new weights go there
        self.device = module.device
        conversions = get_model_conversion_mapping(self._skeleton)
        self._renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
        self._converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]

    def tensor(self, name: str) -> Tensor:
        """The live parameter or buffer of this canonical name."""
        return self._tensors[name]

    def canonical(self, name: str) -> str:
        """The one name under which a weight counts; of tied weights the first in the module."""
        return self._canonical[name]

    def spec(self, name: str) -> WeightSpec:
        return self.specs[self._canonical[name]]

    def target(self, source: str) -> Target | None:
        """What `source`, a name as in a checkpoint or as in the module, stands for. None: nothing of this model."""
        prefix = self._skeleton.base_model_prefix
        name, pattern = rename_source_key(source, self._renamings, self._converters, prefix, self._tensors)
        if name not in self._tensors and source in self._tensors:
            name, pattern = rename_source_key(source, [], [], prefix, self._tensors)
        return Target(name, pattern is not None) if name in self._tensors else None

    def is_ignored(self, source: str) -> bool:
        """transformers drops this name at load without a word: nothing that a forward reads."""
        report: Any = SimpleNamespace(missing_keys=set(), unexpected_keys={source})
        self._skeleton._adjust_missing_and_unexpected_keys(report)
        return not report.unexpected_keys

    def missing(self, given: Set[str]) -> list[str]:
        """Canonical names of weights that are not in `given`, in order; without those a checkpoint may leave out."""
        report: Any = SimpleNamespace(missing_keys=self.specs.keys() - given, unexpected_keys=set())
        self._skeleton._adjust_missing_and_unexpected_keys(report)
        return sorted(report.missing_keys)

    def fuse(self, sources: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Let transformers make weights of tensors whose target is fused. Names of the result are the module's.

        Raises WeightsRejected if they do not make whole weights.
        """
        model = copy.deepcopy(self._skeleton)
        config = LoadStateDictConfig(
            device_map={"": self.device},
            dtype=model.dtype,
            weight_mapping=cast("Any", get_model_conversion_mapping(model)),
        )
        with without_progress_bars():
            report, _ = convert_and_load_state_dict_in_model(model, dict(sources), config)
        for name, stored, wanted in sorted(report.mismatched_keys, key=str):
            message = f"the tensors for {name} make {list(stored)}, the model has {list(wanted)}"
            raise WeightsRejected(message, "fused", (name,))
        for name in sorted(report.conversion_errors):
            raise WeightsRejected(f"the tensors given for {name} cannot be put together", "fused", (name,))
        # A weight that got no tensor is still on the meta device.
        return {name: tensor.data for name, tensor in model.state_dict(keep_vars=True).items() if not tensor.is_meta}


def _canonical_names(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    first_of: dict[int, str] = {}
    return {name: first_of.setdefault(id(tensor), name) for name, tensor in tensors.items()}


def _skeleton_of(module: PreTrainedModel) -> PreTrainedModel:
    """The same modules, config and ties without a byte of weights."""
    twins: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        twin = torch.empty_like(tensor, device="meta")
        is_parameter = isinstance(tensor, torch.nn.Parameter)
        twins[id(tensor)] = torch.nn.Parameter(twin, requires_grad=False) if is_parameter else twin
    return copy.deepcopy(module, twins)
