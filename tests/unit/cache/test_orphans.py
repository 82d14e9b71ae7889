"""Files of dead deployments: the kernel says who is dead; what fits is taken over, the rest goes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cache.control_page import FileIdentity
from cache.orphans import dead_bytes, inherit, sweep
from cache.shared_file import FileMaker, FilePaths, attach
from cache.shared_words import fence_for
from tests.unit.cache.node_files import HurriedClock, ToldProcesses, held_elsewhere

FENCE = fence_for("x86_64")
IDENTITY = FileIdentity("cafe", "layout", num_slots=16, page_bytes=100)


def make(directory: Path, name: str, identity: FileIdentity = IDENTITY) -> int:
    """A file that its writer has left. Its size."""
    paths = FilePaths(directory, name)
    FileMaker(identity, ToldProcesses(), HurriedClock(), FENCE, nonce=len(name)).open(paths).close()
    return paths.data.stat().st_size


def attach_copy(paths: FilePaths):
    """The control page as another process would have it; this one has no lock on the file."""
    attached = attach(paths, FENCE)
    assert attached is not None
    attached.close()
    return attached.page


def test_sweep_removes_the_dead_and_only_the_dead(tmp_path: Path):
    directory = tmp_path
    for name in ("dead", "kept", "written", "read"):
        make(directory, name)
    (directory / "tidegate-half.new").write_bytes(b"x")
    (directory / "tidegate-notes.txt").write_text("not ours")
    dead = attach_copy(FilePaths(directory, "dead"))
    with (
        held_elsewhere(FilePaths(directory, "written").lock, "write"),
        held_elsewhere(FilePaths(directory, "read").lock, "read"),
    ):
        assert sweep(directory, FENCE, keep={"kept"}) == ["dead", "half"]
    assert dead.read().is_retired
    assert sweep(directory, FENCE) == ["kept", "read", "written"]
    assert [path.name for path in directory.iterdir()] == ["tidegate-notes.txt"]


def test_sweep_leaves_the_kv_of_its_own_lineage_to_who_may_inherit_it(tmp_path: Path):
    make(tmp_path, "ours")
    make(tmp_path, "another", replace(IDENTITY, lineage="beef"))
    make(tmp_path, "page", FileIdentity("cafe"))
    assert sweep(tmp_path, FENCE, keep_lineage="cafe") == ["another", "page"]
    assert sweep(tmp_path, FENCE) == ["ours"]


def test_a_dead_file_that_fits_is_taken_over_under_a_new_name(tmp_path: Path):
    make(tmp_path, "old")
    nonce = attach_copy(FilePaths(tmp_path, "old")).nonce
    new = FilePaths(tmp_path, "new")
    assert inherit(new, IDENTITY, FENCE) == "old"
    owned = FileMaker(IDENTITY, ToldProcesses(), HurriedClock(), FENCE, nonce=99).open(new)
    assert owned.was_adopted
    assert owned.page.nonce == nonce
    owned.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tidegate-new.kv", "tidegate-new.lock"]
    # a name that is taken inherits nothing
    make(tmp_path, "older")
    assert inherit(new, IDENTITY, FENCE) is None


@pytest.mark.parametrize(
    "identity",
    [
        replace(IDENTITY, lineage="beef"),
        replace(IDENTITY, layout_digest="other"),
        replace(IDENTITY, num_slots=17),
        FileIdentity("cafe"),
    ],
)
def test_a_dead_file_of_another_kind_is_not_taken_over(tmp_path: Path, identity: FileIdentity):
    make(tmp_path, "old", identity)
    assert inherit(FilePaths(tmp_path, "new"), IDENTITY, FENCE) is None


def test_a_file_in_use_is_neither_taken_over_nor_counted(tmp_path: Path):
    size = make(tmp_path, "used")
    paths = FilePaths(tmp_path, "used")
    with held_elsewhere(paths.lock, "read"):
        assert inherit(FilePaths(tmp_path, "new"), IDENTITY, FENCE) is None
        assert dead_bytes(tmp_path) == 0
    assert dead_bytes(tmp_path) == size
    assert inherit(FilePaths(tmp_path, "new"), IDENTITY, FENCE, keep=["used"]) is None


def test_a_truncated_or_retired_file_is_not_taken_over(tmp_path: Path):
    make(tmp_path, "cut")
    paths = FilePaths(tmp_path, "cut")
    paths.data.write_bytes(paths.data.read_bytes()[:5000])
    assert inherit(FilePaths(tmp_path, "new"), IDENTITY, FENCE) is None
    paths.data.write_bytes(b"x")
    assert inherit(FilePaths(tmp_path, "new"), IDENTITY, FENCE) is None
    owned = FileMaker(IDENTITY, ToldProcesses(), HurriedClock(), FENCE, nonce=5).open(FilePaths(tmp_path, "retired"))
    owned.page.retire()
    owned.close()
    assert inherit(FilePaths(tmp_path, "new"), IDENTITY, FENCE) is None
