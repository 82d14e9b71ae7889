"""New weights through shared memory of the node: the trainer writes a flat bucket into a file, a rank reads it.

What travels is a file's name and a table of plain numbers, nothing that is unpickled. The file is read, not mapped: if
the trainer cuts it off meanwhile, the update is refused; a mapping would end the process with SIGBUS.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from configs.errors import WeightsRejected
from engine.weight_sources import FlatTensor, dtype_called

SHARED_MEMORY = Path("/dev/shm")


def write_shared(name: str, data: Tensor, directory: Path = SHARED_MEMORY) -> None:
    """The trainer's end: `data`, a flat bucket's bytes on the CPU, under a name that is free. Who wrote it removes it.

    Raises FileExistsError.
    """
    descriptor = os.open(directory / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    with open(descriptor, "wb") as file:
        file.write(data.contiguous().numpy().data)


def read_shared(
    name: str, tensors: Sequence[FlatTensor], directory: Path = SHARED_MEMORY
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket, each in memory of its own. Raises WeightsRejected for a name that is no file of ours
    there, or a table that does not fit it."""
    if not name or Path(name).name != name:
        raise WeightsRejected(f"{name!r:.80} is no name of shared memory", "payload")
    try:
        descriptor = os.open(directory / name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except OSError as error:
        raise WeightsRejected(f"shared memory {name!r:.80} cannot be read: {error.strerror}", "payload") from error
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise WeightsRejected(f"shared memory {name!r:.80} belongs to another user", "payload")
        for entry in tensors:
            yield entry.name, _read(descriptor, entry)
    finally:
        os.close(descriptor)


def _read(descriptor: int, entry: FlatTensor) -> Tensor:
    dtype = dtype_called(entry.dtype, entry.name)
    num_bytes = torch.Size(entry.shape).numel() * dtype.itemsize if min(entry.shape, default=0) >= 0 else -1
    if entry.start < 0 or entry.end - entry.start != num_bytes:
        message = f"{entry.name}: bytes {entry.start} to {entry.end} are no {entry.dtype} of {list(entry.shape)}"
        raise WeightsRejected(message, "payload", (entry.name,))
    tensor = torch.empty(entry.shape, dtype=dtype)
    target = tensor.view(-1).view(torch.uint8).numpy().data
    done = 0
    while done < num_bytes:
        num_read = os.preadv(descriptor, [target[done:]], entry.start + done)
        if num_read == 0:
            raise WeightsRejected(f"{entry.name} ends behind the end of the file", "payload", (entry.name,))
        done += num_read
    return tensor
