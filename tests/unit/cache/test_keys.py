"""What a page's key stands for: everything that decides its bytes, and nothing else."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from cache.keys import KEY_BYTES, KeyRoot, page_keys
from cache.types import Epoch, Namespace

ROOT = KeyRoot("cafe", "layout", "weights", Namespace("tenant"), Epoch(3), 1, 2)


def tokens(*ids: int) -> bytes:
    return np.array(ids, "<i4").tobytes()


def split(keys: bytes) -> list[bytes]:
    return [keys[begin : begin + KEY_BYTES] for begin in range(0, len(keys), KEY_BYTES)]


def test_one_key_for_each_whole_page():
    assert len(split(page_keys(ROOT.digest(), tokens(*range(11)), page_size=4))) == 2
    assert page_keys(ROOT.digest(), tokens(1, 2, 3), page_size=4) == b""
    assert page_keys(ROOT.digest(), b"", page_size=4) == b""


def test_a_key_depends_on_all_tokens_before_its_end_and_on_none_after():
    root = ROOT.digest()
    base = split(page_keys(root, tokens(*range(12)), 4))
    first = split(page_keys(root, tokens(99, *range(1, 12)), 4))
    last = split(page_keys(root, tokens(*range(11), 99), 4))
    assert all(one != other for one, other in zip(base, first, strict=True))
    assert base[:2] == last[:2]
    assert base[2] != last[2]


def test_a_chain_goes_on_from_its_parent():
    root = ROOT.digest()
    whole = split(page_keys(root, tokens(*range(16)), 4))
    rest = split(page_keys(root, tokens(*range(8, 16)), 4, parent=whole[1]))
    assert rest == whole[2:]


@pytest.mark.parametrize(
    "other",
    [
        replace(ROOT, lineage="beef"),
        replace(ROOT, layout_digest="other"),
        replace(ROOT, weights_digest="other"),
        replace(ROOT, namespace=Namespace("")),
        replace(ROOT, epoch=Epoch(4)),
        replace(ROOT, namespace_sub_epoch=2),
        replace(ROOT, prefix_sub_epoch=1),
        replace(ROOT, namespace_sub_epoch=2, prefix_sub_epoch=1),
        replace(ROOT, layout_digest="layou", weights_digest="tweights"),
    ],
)
def test_invariant_17_keys_of_other_roots_never_meet(other: KeyRoot):
    mine = set(split(page_keys(ROOT.digest(), tokens(*range(32)), 4)))
    assert mine.isdisjoint(split(page_keys(other.digest(), tokens(*range(32)), 4)))


def test_keys_are_the_same_in_every_process():
    key = page_keys(ROOT.digest(), tokens(1, 2, 3, 4), 4)
    assert key.hex() == "a563bc4cd2c1903b33a1a8d37e96d42f"
