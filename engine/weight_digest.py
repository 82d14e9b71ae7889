"""Checksums of weights, one per weight, and the digest of a whole set of them.

The digest is a function of what is served and of nothing else: names, dtypes, shapes and bytes. So it does not matter
by which way weights came, in which order, or after which history; a rank that was restarted and loads the newest
checkpoint from disk has the digest of those that got the same weights by tensors (hole H33). With a checksum kept per
weight, a partial update costs one reading of the new bytes, not of the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from hashlib import blake2b

import torch
import xxhash
from torch import Tensor

#: bytes brought to the host at a time; 64 MiB keep the copy at full speed
_SLICE_BYTES = 64 * 2**20

#: name -> checksum of one weight, 32 hex digits
Checksums = Mapping[str, str]


def weight_checksum(tensor: Tensor) -> str:
    """xxh3-128 over dtype, shape and bytes; 32 hex digits. Reads the tensor once, about 10 GB/s from CPU memory."""
    digest = xxhash.xxh3_128(f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}\n".encode())
    raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
    for start in range(0, len(raw), _SLICE_BYTES):
        digest.update(raw[start : start + _SLICE_BYTES].cpu().numpy().data)
    return digest.hexdigest()


def digest_of(checksums: Checksums) -> str:
    """blake2b-128 over names and checksums in the order of names; 32 hex digits.

    Of all weights of a model it is the weights digest, of those an update brings its payload digest.
    """
    digest = blake2b(digest_size=16)
    for name in sorted(checksums):
        digest.update(f"{name} {checksums[name]}\n".encode())
    return digest.hexdigest()
