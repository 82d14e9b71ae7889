"""Weights through shared memory: what comes, and what is refused instead of read."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import WeightsRejected
from engine.weight_shm import read_shared, write_shared
from engine.weight_sources import FlatBucket, flatten
from tests.unit.engine.weight_models import same_bytes

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7, dtype=torch.int8), "c": torch.ones(3).bfloat16()}


@pytest.fixture
def bucket(tmp_path: Path) -> FlatBucket:
    bucket = flatten(TENSORS.items())
    write_shared("weights", bucket.data, tmp_path)
    return bucket


def test_what_was_written_is_read(tmp_path: Path, bucket: FlatBucket) -> None:
    assert same_bytes(dict(read_shared("weights", bucket.tensors, tmp_path)), TENSORS)
    assert (tmp_path / "weights").stat().st_mode & 0o777 == 0o600


def test_names_are_not_reused_and_lead_nowhere_else(tmp_path: Path, bucket: FlatBucket) -> None:
    with pytest.raises(FileExistsError):
        write_shared("weights", bucket.data, tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "weights")
    (tmp_path / "below").mkdir()
    for name in ("", "../weights", "below/weights", "gone", "link", "/dev/null"):
        with pytest.raises(WeightsRejected):
            next(read_shared(name, bucket.tensors, tmp_path))


@pytest.mark.parametrize("change", [{"end": 25}, {"start": -1, "end": 23}, {"shape": (2, -3)}, {"dtype": "float16"}])
def test_a_table_that_does_not_fit(tmp_path: Path, bucket: FlatBucket, change: dict[str, object]) -> None:
    bad = [replace(bucket.tensors[0], **change)]
    with pytest.raises(WeightsRejected, match="a: bytes"):
        list(read_shared("weights", bad, tmp_path))


def test_a_file_that_is_cut_off_meanwhile_is_no_end_of_the_process(tmp_path: Path, bucket: FlatBucket) -> None:
    reading = read_shared("weights", bucket.tensors, tmp_path)
    next(reading)
    os.truncate(tmp_path / "weights", 10)
    with pytest.raises(WeightsRejected, match="behind the end"):
        list(reading)
