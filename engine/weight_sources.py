"""The ways in which new weights come, each as named tensors: a directory, flat buckets. All others give tensors as is.

What a source yields may alias memory that others write (a file's mapping, a shared buffer, an object of a store):
whoever stages it copies it before anything is decided on it.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from configs.errors import Forbidden, WeightsRejected

NamedTensors: TypeAlias = Iterable[tuple[str, Tensor]]

INDEX_FILE = "model.safetensors.index.json"


def check_root(path: str, roots: Sequence[Path]) -> Path:
    """`path` with its links resolved, if it lies in one of the directories from which weights may be read.

    roots: as configured; none: every directory may be read. Raises Forbidden, WeightsRejected if it is no directory.
    """
    directory = Path(path).resolve()
    if roots and not any(directory.is_relative_to(root.resolve()) for root in roots):
        raise Forbidden(f"weights may not be read from {path}: it lies in no directory that is allowed")
    if not directory.is_dir():
        raise WeightsRejected(f"{path} is no directory", "payload")
    return directory


def read_directory(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """All tensors of a checkpoint, file by file, in CPU memory; they alias the files.

    Files: those of the index if there is one, else model.safetensors, else every *.safetensors.
    Raises WeightsRejected for a directory without weights, an index that does not fit its files, a broken file.
    """
    index = _read_index(directory)
    files = _files(directory) if index is None else [directory / name for name in sorted(set(index.values()))]
    promised = None if index is None else set(index)
    for file in files:
        for name, tensor in _read_file(file):
            if promised is not None:
                promised.discard(name)
            yield name, tensor
    if promised:
        name = min(promised)
        raise WeightsRejected(f"{INDEX_FILE} promises {name}, which is in no file", "payload", (name,))


@dataclass(frozen=True, slots=True)
class FlatTensor:
    """Where one tensor lies in a flat bucket."""

    name: str
    shape: tuple[int, ...]
    #: as torch calls it, with or without `torch.`
    dtype: str
    #: bytes of the bucket, from (inclusive) and to (exclusive)
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class FlatBucket:
    """Many tensors in one buffer, so that one message carries them; the shape of SGLang's flattened bucket."""

    #: uint8 [num_bytes]
    data: Tensor
    tensors: tuple[FlatTensor, ...]


def flatten(named_tensors: NamedTensors) -> FlatBucket:
    """Copy the tensors into one new buffer on their device. There must be at least one."""
    flat, tensors, start = [], [], 0
    for name, tensor in named_tensors:
        raw = tensor.detach().contiguous().view(-1).view(torch.uint8)
        dtype = str(tensor.dtype).removeprefix("torch.")
        tensors.append(FlatTensor(name, tuple(tensor.shape), dtype, start, start + len(raw)))
        start += len(raw)
        flat.append(raw)
    return FlatBucket(torch.cat(flat), tuple(tensors))


def unflatten(bucket: FlatBucket) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a bucket; they alias it. Raises WeightsRejected for metadata that do not fit the buffer."""
    data = bucket.data
    if data.dtype != torch.uint8 or data.ndim != 1:
        message = f"a flat bucket is one row of bytes, not {data.dtype} of shape {list(data.shape)}"
        raise WeightsRejected(message, "payload")
    for entry in bucket.tensors:
        dtype = dtype_called(entry.dtype, entry.name)
        if any(side < 0 for side in entry.shape):
            raise WeightsRejected(f"{entry.name} has the shape {list(entry.shape)}", "payload", (entry.name,))
        num_bytes = torch.Size(entry.shape).numel() * dtype.itemsize
        if not 0 <= entry.start <= entry.end <= len(data) or entry.end - entry.start != num_bytes:
            message = (
                f"{entry.name} is said to lie in bytes {entry.start} to {entry.end} of {len(data)}; "
                f"{entry.dtype} of shape {list(entry.shape)} takes {num_bytes}"
            )
            raise WeightsRejected(message, "payload", (entry.name,))
        raw = data[entry.start : entry.end]
        # A view in another dtype must begin at a multiple of its size.
        raw = raw if raw.storage_offset() % dtype.itemsize == 0 else raw.clone()
        yield entry.name, raw.view(dtype).view(entry.shape)


def dtype_called(text: str, name: str) -> torch.dtype:
    """The dtype that torch calls so, for the tensor `name`. Raises WeightsRejected."""
    dtype = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(dtype, torch.dtype):
        raise WeightsRejected(f"{name} is of dtype {text!r}, which torch does not know", "dtype", (name,))
    return dtype


def _read_index(directory: Path) -> dict[str, str] | None:
    """Name -> file name; None: there is no index."""
    file = directory / INDEX_FILE
    try:
        weight_map = json.loads(file.read_bytes())["weight_map"]
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise WeightsRejected(f"{file} cannot be used: {type(error).__name__}", "payload") from error
    names = weight_map.values() if isinstance(weight_map, dict) else [None]
    if not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise WeightsRejected(f"{file} names files that are not in its directory", "payload")
    return weight_map


def _files(directory: Path) -> list[Path]:
    whole = directory / "model.safetensors"
    files = [whole] if whole.is_file() else sorted(directory.glob("*.safetensors"))
    if not files:
        raise WeightsRejected(f"{directory} holds no *.safetensors", "payload")
    return files


def _read_file(file: Path) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(file, framework="pt", device="cpu") as opened:
            for name in opened.keys():  # noqa: SIM118  (no mapping: it cannot be iterated)
                yield name, opened.get_tensor(name)
    except (OSError, SafetensorError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise WeightsRejected(f"{file} cannot be read: {reason}", "payload") from error
