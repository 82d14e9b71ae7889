"""A rank's reading of its node's page, on real files."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

from actors.messages import PagePlace
from actors.node_processes import NodeProcesses
from actors.rank_words import NodePage, RankWords
from cache.control_page import FileIdentity
from cache.shared_file import FileMaker, FilePaths, OwnedFile
from cache.shared_words import fence_for
from configs.errors import ConfigError
from engine.control_words import ControlWords
from tests.unit.cache.node_files import FastClock

FENCE = fence_for(platform.machine())


def make_file(directory: Path, nonce: int, lineage: str = "lineage") -> OwnedFile:
    """The node's file, let go by its writer so that the same process may read it."""
    maker = FileMaker(FileIdentity(lineage), NodeProcesses(), FastClock(), FENCE, nonce)
    owned = maker.open(FilePaths(directory, "n"))
    owned.close()
    return owned


def replace_file(directory: Path, nonce: int, lineage: str = "lineage") -> OwnedFile:
    """As another process would: this one holds the name's lock as a reader."""
    aside = directory / str(nonce)
    aside.mkdir()
    owned = make_file(aside, nonce, lineage)
    owned.paths.data.rename(directory / owned.paths.data.name)
    return owned


def test_without_a_page_there_is_no_lease() -> None:
    words = RankWords(now_ns=lambda: 100)
    assert words.read() == ControlWords(lease_ok=False)
    assert words.nonce == 0


def test_lease_floor_and_epoch_as_they_are_on_the_page(tmp_path: Path) -> None:
    now_ns = 1000
    words = RankWords(now_ns=lambda: now_ns)
    owned = make_file(tmp_path, 5)
    page = NodePage(words, "lineage", PagePlace(str(tmp_path), "n", 5), FENCE)
    words.raise_epoch(3)
    assert words.nonce == 5
    assert words.read() == ControlWords(lease_ok=False, floor=0, epoch=3)
    owned.page.grant(1, 2, 0, 2000)
    assert words.read() == ControlWords(lease_ok=True, floor=2, epoch=3)
    assert words.read() is words.read()
    words.raise_epoch(1)
    owned.page.raise_floor(1, 9)
    assert words.read() == ControlWords(lease_ok=True, floor=9, epoch=3)
    now_ns = 2000
    assert words.read() == ControlWords(lease_ok=False, floor=9, epoch=3)
    page.close()


def test_a_retired_file_is_no_lease_and_its_floor_no_epoch(tmp_path: Path) -> None:
    words = RankWords(now_ns=lambda: 1000)
    owned = make_file(tmp_path, 5)
    page = NodePage(words, "lineage", PagePlace(str(tmp_path), "n", 5), FENCE)
    owned.page.grant(1, 2, 0, 2000)
    owned.page.retire()
    owned.paths.data.unlink()
    assert words.read() == ControlWords(lease_ok=False, floor=0, epoch=0)
    # the next file of the same lineage is found, and nothing else is touched while there is none
    page.look()
    assert words.nonce == 5
    newer = replace_file(tmp_path, 6)
    newer.page.grant(1, 4, 0, 2000)
    page.look()
    assert words.nonce == 6
    assert words.read() == ControlWords(lease_ok=True, floor=4, epoch=0)
    page.close()


def test_while_the_lease_runs_nobody_looks_for_another_file(tmp_path: Path) -> None:
    words = RankWords(now_ns=lambda: 1000)
    owned = make_file(tmp_path, 5)
    page = NodePage(words, "lineage", PagePlace(str(tmp_path), "n", 5), FENCE)
    owned.page.grant(1, 2, 0, 2000)
    replace_file(tmp_path, 6)
    page.look()
    assert words.nonce == 5
    page.close()


def test_a_file_of_another_lineage_is_not_read(tmp_path: Path) -> None:
    make_file(tmp_path, 5, "another")
    with pytest.raises(ConfigError, match="lineage"):
        NodePage(RankWords(), "lineage", PagePlace(str(tmp_path), "n", 5), FENCE)
    with pytest.raises(ConfigError, match="not there"):
        NodePage(RankWords(), "lineage", PagePlace(str(tmp_path), "m", 5), FENCE)
    words = RankWords(now_ns=lambda: 1000)
    owned = replace_file(tmp_path, 6)
    page = NodePage(words, "lineage", PagePlace(str(tmp_path), "n", 6), FENCE)
    owned.page.retire()
    replace_file(tmp_path, 7, "another")
    page.look()
    page.look()
    assert not words.read().lease_ok
    page.close()
