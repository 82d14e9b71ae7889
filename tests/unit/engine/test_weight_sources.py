"""Directories and flat buckets: what they give, and what is refused with its reason."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from configs.errors import Forbidden, WeightsRejected
from engine.weight_sources import (
    INDEX_FILE,
    FlatBucket,
    check_root,
    flatten,
    read_directory,
    unflatten,
)
from tests.unit.engine.weight_models import same_bytes, write_tensors

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor(7, dtype=torch.int8), "c": torch.ones(3).bfloat16()}


def test_a_bucket_gives_back_what_went_in_at_any_alignment() -> None:
    bucket = flatten([("b", TENSORS["b"]), ("a", TENSORS["a"]), ("c", TENSORS["c"])])
    assert bucket.data.shape == (1 + 24 + 6,)
    assert same_bytes(dict(unflatten(bucket)), TENSORS)


@pytest.mark.parametrize(
    "change",
    [
        {"end": 25},
        {"start": -1},
        {"start": 8, "end": 4},
        {"shape": (7,)},
        {"shape": (-2, -3)},
        {"dtype": "float64"},
        {"dtype": "nn"},
        {"start": 24, "end": 48},
    ],
)
def test_metadata_that_do_not_fit_the_buffer(change: dict[str, object]) -> None:
    bucket = flatten([("a", TENSORS["a"])])
    bad = FlatBucket(bucket.data, (replace(bucket.tensors[0], **change),))
    with pytest.raises(WeightsRejected, match="a "):
        list(unflatten(bad))


def test_a_bucket_is_one_row_of_bytes() -> None:
    with pytest.raises(WeightsRejected, match="one row of bytes"):
        list(unflatten(FlatBucket(torch.zeros(4), ())))


def test_any_safetensors_of_a_directory_without_an_index(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"a": TENSORS["a"]}, "one.safetensors")
    write_tensors(tmp_path, {"c": TENSORS["c"]}, "two.safetensors")
    assert sorted(name for name, _ in read_directory(tmp_path)) == ["a", "c"]


def test_model_safetensors_has_the_right_of_way(tmp_path: Path) -> None:
    write_tensors(tmp_path, {"a": TENSORS["a"]})
    write_tensors(tmp_path, {"c": TENSORS["c"]}, "optimizer.safetensors")
    assert [name for name, _ in read_directory(tmp_path)] == ["a"]


@pytest.mark.parametrize(
    ("index", "reason"),
    [
        ({"weight_map": {"a": "model.safetensors", "z": "model.safetensors"}}, "promises z"),
        ({"weight_map": {"a": "gone.safetensors"}}, "cannot be read"),
        ({"weight_map": {"a": "../model.safetensors"}}, "not in its directory"),
        ({"weight_map": {"a": 7}}, "not in its directory"),
        ({"weight_map": []}, "not in its directory"),
        ({}, "cannot be used"),
        ([], "cannot be used"),
    ],
)
def test_an_index_that_does_not_fit(tmp_path: Path, index: object, reason: str) -> None:
    write_tensors(tmp_path, {"a": TENSORS["a"]})
    (tmp_path / INDEX_FILE).write_text(json.dumps(index))
    with pytest.raises(WeightsRejected, match=reason):
        list(read_directory(tmp_path))


def test_directories_without_weights(tmp_path: Path) -> None:
    with pytest.raises(WeightsRejected, match="holds no"):
        list(read_directory(tmp_path))
    (tmp_path / "model.safetensors").write_bytes(b"no tensors")
    with pytest.raises(WeightsRejected, match="cannot be read"):
        list(read_directory(tmp_path))


def test_only_the_configured_roots_are_read(tmp_path: Path) -> None:
    allowed, outside = tmp_path / "allowed", tmp_path / "outside"
    (allowed / "v1").mkdir(parents=True)
    outside.mkdir()
    (allowed / "link").symlink_to(outside)

    assert check_root(str(allowed / "v1"), [allowed]) == (allowed / "v1").resolve()
    assert check_root(str(outside), []) == outside.resolve()
    for path in (outside, allowed / "link", allowed / ".." / "outside", tmp_path / "allowed-too"):
        with pytest.raises(Forbidden):
            check_root(str(path), [allowed])
    with pytest.raises(WeightsRejected, match="no directory"):
        check_root(str(allowed / "v2"), [allowed])
