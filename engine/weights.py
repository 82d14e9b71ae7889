"""New weights beside the live ones: taken in, checked, and swapped in at a step boundary, or dropped without a trace.

    staging = Staging(live, options)         any thread; the engine serves on with the old weights
    staging.take(named_tensors)              as often as wanted; a misfit is refused here, before the rest is read
    staged = staging.finish()                all checks are done; `staged.digest` is what the rank votes with
    live.commit(staged, version)             engine thread, between two steps   (or: drop `staged`, nothing has changed)

**Why pointers are swapped.** A commit assigns `parameter.data`: a reference per weight, 3-6 us each, no byte moves,
and nothing in it can fail half way, because shapes, dtypes and devices were compared before. `copy_` would move the
whole model inside the step boundary (16 GB: 1 s at 16 GB/s) and an error in it would leave a mixture. Nothing holds
on to the old addresses: there are no captured graphs, and attention keeps only views of the KV pool. The price is
memory for a second set of weights from staging to commit. Who cannot pay it stages on the host
(`StageOptions.device`; the commit then copies host to device inside the step boundary), or loads in place
(engine/weights_in_place.py), which gives up that a failure leaves the old weights.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.errors import Conflict, WeightsTorn
from engine.weight_digest import digest_of, weight_checksum
from engine.weight_intake import Intake, StageOptions
from engine.weight_names import WeightNames
from engine.weight_sources import NamedTensors

#: `torn`: some weights are new and some old; nothing may be computed with them
WeightsState: TypeAlias = Literal["whole", "torn"]


@dataclass(frozen=True, slots=True)
class StagedWeights:
    """Checked weights that wait for a commit. Dropping it is the abort."""

    #: canonical name -> tensor, this object's own memory
    tensors: Mapping[str, Tensor]
    checksums: Mapping[str, str]
    #: of what came, whatever the way and the order
    payload_digest: str
    #: of the weights it was staged upon, and of the model after the commit
    base_digest: str
    digest: str
    num_bytes: int


@dataclass(frozen=True, slots=True)
class Replaced:
    """The old weights. They are freed when this is dropped, which may take milliseconds: not on the engine thread."""

    tensors: list[Tensor]
    num_bytes: int


@dataclass(frozen=True, slots=True)
class WeightFacts:
    """What is served, as one picture."""

    #: label for people and trainers; nothing is decided by it
    version: str
    state: WeightsState
    #: of all weights; "" while torn
    digest: str
    #: canonical name -> checksum, as recorded when the weights came
    checksums: Mapping[str, str]


class LiveWeights:
    """The weights that are served. Written by the engine thread between steps; `facts` may be read by any."""

    def __init__(self, module: PreTrainedModel, version: str = "default") -> None:
        """Before the model serves: its weights move into memory of their own, and each is read for its checksum.

        On a CPU transformers maps weights from the checkpoint's files; a trainer that writes its next checkpoint over
        that file would change, unseen, what is served.
        """
        self.names = WeightNames(module)
        checksums: dict[str, str] = {}
        for name in self.names.specs:
            live = self.names.tensor(name)
            if live.device.type == "cpu":
                live.data = live.data.clone()
            checksums[name] = weight_checksum(live)
        #: replaced as a whole
        self.facts = WeightFacts(version, "whole", digest_of(checksums), checksums)

    def measure(self) -> dict[str, str]:
        """Canonical name -> checksum, read anew from the memory that is served. Seconds for a large model; the weights
        must not change meanwhile."""
        return {name: weight_checksum(self.names.tensor(name)) for name in self.names.specs}

    def damaged(self) -> list[str]:
        """Names of weights that are not what they were when they came."""
        recorded = self.facts.checksums
        return [name for name, checksum in self.measure().items() if checksum != recorded[name]]

    def commit(self, staged: StagedWeights, version: str | None = None) -> Replaced:
        """Serve the staged weights from now on; between two steps. A complete set heals torn weights.

        version: None keeps the label. O(number of weights) if staged on the model's device.
        Raises, with nothing changed, if these are a part of the weights: Conflict, if another update came between;
        WeightsTorn, if the rest is torn.
        """
        if staged.tensors.keys() != self.facts.checksums.keys():
            self.check_whole()
            if staged.base_digest != self.facts.digest:
                raise Conflict("other weights were committed since these were staged; stage them again")
        old = [self._replace(name, tensor) for name, tensor in staged.tensors.items()]
        self._record({**self.facts.checksums, **staged.checksums}, staged.digest, version)
        return Replaced(old, staged.num_bytes)

    def check_whole(self) -> None:
        """Raises WeightsTorn if nothing may be computed with these weights."""
        if self.facts.state == "torn":
            raise WeightsTorn("a load in place has failed half way; only a complete update heals it")

    def tear(self) -> None:
        """The first byte of a load in place is about to be written."""
        self.facts = replace(self.facts, state="torn", digest="")

    def heal(self, checksums: Mapping[str, str], version: str | None) -> None:
        """A load in place has come to its end: these are the checksums of all weights."""
        self._record(dict(checksums), digest_of(checksums), version)

    def _replace(self, name: str, tensor: Tensor) -> Tensor:
        live = self.names.tensor(name)
        old = live.data
        if tensor.device == old.device:
            live.data = tensor
        else:
            live.data.copy_(tensor)
        return old

    def _record(self, checksums: dict[str, str], digest: str, version: str | None) -> None:
        version = self.facts.version if version is None else version
        self.facts = WeightFacts(version, "whole", digest, checksums)


class Staging:
    """One update on its way in. One thread; the engine serves on. Nothing outside it changes before `commit`."""

    def __init__(self, live: LiveWeights, options: StageOptions | None = None) -> None:
        """Raises WeightsTorn if a part of the weights shall be laid upon torn ones."""
        self._options = options or StageOptions()
        if self._options.is_partial:
            live.check_whole()
        self._base = live.facts
        self._intake = Intake(live.names, self._options)

    def take(self, named_tensors: NamedTensors) -> None:
        """Check and copy some of the new weights. Raises WeightsRejected; the whole update is then to be dropped."""
        # Whatever mode the caller is in, these tensors will be parameters.
        with torch.inference_mode(mode=False), torch.no_grad():
            for name, tensor in named_tensors:
                self._intake.add(name, tensor)

    def finish(self) -> StagedWeights:
        """All has come: the last checks and the digest. Raises WeightsRejected."""
        with torch.inference_mode(mode=False), torch.no_grad():
            tensors = self._intake.finish()
        checksums = {name: weight_checksum(tensor) for name, tensor in tensors.items()}
        return StagedWeights(
            tensors=tensors,
            checksums=checksums,
            payload_digest=digest_of(checksums),
            base_digest=self._base.digest,
            digest=digest_of({**self._base.checksums, **checksums}),
            num_bytes=sum(tensor.nbytes for tensor in tensors.values()),
        )


def stage(live: LiveWeights, named_tensors: NamedTensors, options: StageOptions | None = None) -> StagedWeights:
    """All of `Staging` in one call."""
    staging = Staging(live, options)
    staging.take(named_tensors)
    return staging.finish()
