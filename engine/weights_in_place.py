"""Loading over the live weights, bucket by bucket, for models of which no second set fits into memory.

What it gives up, beside a staged update: from the first bucket written until the last, the weights are `torn` and the
rank serves nothing; and a failure in between leaves them so, until a complete update has come. There is no going back
to the old weights, because they are gone. What it keeps: a bucket is checked as a whole before a byte of it is
written, the same names, shapes and dtypes are refused, and the digest at the end is that of any other way in.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from configs.errors import WeightsRejected
from engine.weight_digest import weight_checksum
from engine.weight_intake import Intake, StageOptions
from engine.weight_sources import NamedTensors
from engine.weights import LiveWeights


class InPlaceLoad:
    """One load. The engine computes nothing from the first `write` until `finish` has returned."""

    def __init__(self, live: LiveWeights, options: StageOptions | None = None) -> None:
        """Changes nothing yet. Raises WeightsTorn if a part shall be laid upon torn weights."""
        self._options = options or StageOptions()
        if self._options.is_partial:
            live.check_whole()
        self._live = live
        #: of what was written, in all buckets
        self._written: dict[str, str] = {}
        self._base_checksums: Mapping[str, str] = live.facts.checksums

    def write(self, bucket: NamedTensors) -> None:
        """Check a bucket, then write it into the live weights. Tensors that make one weight must come in one bucket.

        Raises WeightsRejected with nothing of this bucket written; what earlier buckets wrote stays, and so does the
        state `torn` that the first of them began.
        """
        with torch.inference_mode(mode=False), torch.no_grad():
            weights = self._checked(bucket)
            self._live.tear()
            for name, tensor in weights.items():
                self._live.names.tensor(name).data.copy_(tensor)
        self._written |= {name: weight_checksum(tensor) for name, tensor in weights.items()}

    def finish(self, version: str | None = None) -> None:
        """All has come: the weights are whole again, under the digest of what they are now.

        Raises WeightsRejected, and leaves them torn, if a complete load lacks weights.
        """
        missing = [] if self._options.is_partial else self._live.names.missing(self._written.keys())
        if missing:
            message = f"{', '.join(missing[:3])} did not come; the weights are a mixture"
            raise WeightsRejected(message, "missing_name", tuple(missing[:3]))
        self._live.heal({**self._base_checksums, **self._written}, version)

    def _checked(self, bucket: NamedTensors) -> dict[str, Tensor]:
        """A part of the weights, in memory of its own: as much as one bucket."""
        part = StageOptions(True, self._options.cast, self._options.check_finite, self._options.device)
        intake = Intake(self._live.names, part)
        for name, tensor in bucket:
            intake.add(name, tensor)
        weights = intake.finish()
        twice = sorted(weights.keys() & self._written.keys())
        if twice:
            raise WeightsRejected(f"{twice[0]} has come twice", "duplicate_name", (twice[0],))
        return weights
