"""A node's file over the lives of its writers: locks decide who lives, and no name is trusted."""

from __future__ import annotations

import os
import re
import signal
from dataclasses import replace
from pathlib import Path

import pytest

from actors.node_processes import NodeProcesses
from cache.control_page import FileIdentity
from cache.orphans import sweep
from cache.shared_file import FileInUse, FileMaker, FilePaths, attach
from cache.shared_words import fence_for
from cache.writer_lock import FileLock, lock_as_writer
from configs.errors import ConfigError, InvariantError
from tests.unit.cache.node_files import FastClock, HurriedClock, ToldProcesses, held_elsewhere

FENCE = fence_for("x86_64")
IDENTITY = FileIdentity("cafe", "layout", num_slots=16, page_bytes=100)


def maker(**changes) -> FileMaker:
    return replace(FileMaker(IDENTITY, ToldProcesses(), HurriedClock(), FENCE, nonce=1), **changes)


@pytest.fixture
def paths(tmp_path: Path) -> FilePaths:
    return FilePaths(tmp_path, "test-node")


def test_a_file_outlives_its_writer_and_is_adopted(paths: FilePaths):
    first = maker().open(paths)
    assert not first.was_adopted
    first.page.grant(term=1, floor=4, weights_floor=0, lease_end_ns=10)
    first.close()
    second = maker(nonce=2).open(paths)
    assert second.was_adopted
    assert second.page.read().floor == 4
    assert second.page.nonce == 1
    second.retire()
    assert list(paths.directory.iterdir()) == []


def test_space_is_reserved_at_once_and_progress_is_told(paths: FilePaths):
    told: list[tuple[int, int]] = []
    owned = maker(on_progress=lambda done, total: told.append((done, total))).open(paths)
    status = paths.data.stat()
    assert status.st_blocks * 512 >= status.st_size
    assert told == [(status.st_size, status.st_size)]
    owned.retire()


@pytest.mark.parametrize(
    "identity",
    [
        replace(IDENTITY, lineage="beef"),
        replace(IDENTITY, layout_digest="other"),
        replace(IDENTITY, num_slots=17),
    ],
)
def test_a_file_that_does_not_fit_is_retired_for_those_who_map_it(paths: FilePaths, identity: FileIdentity):
    maker().open(paths).close()
    reader = attach_copy(paths)
    owned = maker(identity=identity, nonce=2).open(paths)
    assert not owned.was_adopted
    assert reader.read().is_retired
    assert not owned.page.read().is_retired
    owned.retire()


@pytest.mark.parametrize(
    "identity", [replace(IDENTITY, layout_digest="other"), replace(IDENTITY, num_slots=17)], ids=["layout", "size"]
)
def test_a_file_that_others_of_the_lineage_use_is_not_retired_for_another_layout(
    paths: FilePaths, identity: FileIdentity
):
    first = maker().open(paths)
    page = first.page
    first.close()
    with held_elsewhere(paths.lock, "read"):
        with pytest.raises(FileInUse, match="other processes use it"):
            maker(identity=identity, nonce=2).open(paths)
        assert not page.read().is_retired
        again = maker(nonce=3).open(paths)
        assert again.was_adopted
        again.close()
    owned = maker(identity=identity, nonce=4).open(paths)
    assert page.read().is_retired
    owned.retire()


def attach_copy(paths: FilePaths):
    """The control page as another process would have it; this one has no lock on the file."""
    attached = attach(paths, FENCE)
    assert attached is not None
    attached.close()
    return attached.page


@pytest.mark.parametrize("size", [0, 100, 5000])
def test_a_truncated_file_is_made_anew(paths: FilePaths, size: int):
    maker().open(paths).close()
    os.truncate(paths.data, size)
    owned = maker(nonce=2).open(paths)
    assert not owned.was_adopted
    assert owned.page.nonce == 2
    owned.retire()


def test_a_file_that_does_not_fit_the_machine_is_refused_and_leaves_nothing(paths: FilePaths):
    huge = replace(IDENTITY, num_slots=2**30, page_bytes=2**30)
    with pytest.raises(ConfigError, match=r"host_tier\.size_gb"):
        maker(identity=huge).open(paths)
    with pytest.raises(ConfigError, match="memory has 4,096 free"):
        maker(free_memory_bytes=4096).open(paths)
    assert list(paths.directory.iterdir()) == []


def test_a_directory_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match="nowhere"):
        maker().open(FilePaths(tmp_path / "nowhere", "a"))


def test_what_the_file_system_refuses_is_said_with_its_place(paths: FilePaths):
    target = paths.directory / "elsewhere"
    target.write_bytes(b"not ours")
    paths.data.symlink_to(target)
    for use in (lambda: maker().open(paths), lambda: attach(paths, FENCE)):
        paths.lock.touch()
        with pytest.raises(ConfigError, match=r"tidegate-test-node\.kv.*symbolic"):
            use()
    assert sweep(paths.directory, FENCE) == []
    assert target.read_bytes() == b"not ours"
    paths.data.unlink()
    paths.lock.unlink()
    paths.lock.symlink_to(target)
    with pytest.raises(ConfigError, match=r"tidegate-test-node\.lock.*symbolic"):
        attach(paths, FENCE)
    assert sweep(paths.directory, FENCE) == []


def test_a_reader_maps_words_read_only_and_data_writable(paths: FilePaths):
    maker().open(paths).close()
    assert attach(FilePaths(paths.directory, "another"), FENCE) is None
    attached = attach(paths, FENCE, IDENTITY)
    assert attached is not None
    assert attached.data is not None
    with pytest.raises(TypeError):
        attached.words[0] = 1
    attached.data[0] = 255
    attached.close()
    with pytest.raises(ConfigError, match="layout"):
        attach(paths, FENCE, replace(IDENTITY, layout_digest="other"))
    os.truncate(paths.data, 8192)
    with pytest.raises(ConfigError, match="8,192 bytes long"):
        attach(paths, FENCE)
    os.truncate(paths.data, 100)
    with pytest.raises(ConfigError, match="shorter"):
        attach(paths, FENCE)


def test_writer_and_reader_see_the_same_words_and_pages(paths: FilePaths):
    owned = maker().open(paths)
    mine = owned.arena()
    mine.slots[3], mine.index[5], mine.pages[15, 99] = 30, 50, 99
    owned.close()
    attached = attach(paths, FENCE, IDENTITY)
    assert attached is not None
    seen = attached.arena()
    assert (seen.slots[3], seen.index[5], seen.pages[15, 99]) == (30, 50, 99)
    seen.pages[0, 0] = 7
    assert mine.pages[0, 0] == 7
    with pytest.raises(ValueError, match="read-only"):
        seen.slots[3] = 1
    attached.close()


def test_huge_pages_are_asked_for_where_the_kernel_has_them(paths: FilePaths):
    owned = maker().open(paths)
    of_file = Path("/proc/self/smaps").read_text().split(str(paths.data))[1:]
    flags = [re.search(r"VmFlags:(.*)", mapping) for mapping in of_file]
    is_advised = any(found is not None and " hg" in found[1] for found in flags)
    assert is_advised == Path("/sys/kernel/mm/transparent_hugepage").exists()
    owned.retire()


def test_without_a_host_tier_the_file_is_the_control_page(paths: FilePaths):
    owned = maker(identity=FileIdentity("cafe")).open(paths)
    assert paths.data.stat().st_size == 4096
    owned.close()
    attached = attach(paths, FENCE)
    assert attached is not None
    assert attached.data is None
    attached.close()


def test_one_process_locks_a_file_once(paths: FilePaths):
    owned = maker().open(paths)
    with pytest.raises(InvariantError, match="already"):
        attach(paths, FENCE)
    owned.retire()


def test_invariant_15_a_frozen_writer_of_our_lineage_is_ended(paths: FilePaths):
    with held_elsewhere(paths.lock, "write", "cafe") as holder:
        holder.send_signal(signal.SIGSTOP)
        owned = maker(processes=NodeProcesses(), clock=FastClock()).open(paths)
        assert holder.wait(10) == -signal.SIGKILL
    owned.retire()


def test_a_living_deployment_of_another_lineage_keeps_its_file(paths: FilePaths):
    with held_elsewhere(paths.lock, "write", "beef") as holder:
        with pytest.raises(ConfigError, match=rf"process {holder.pid}.*ray\.deployment"):
            maker(processes=NodeProcesses()).open(paths)
        assert holder.poll() is None


def test_a_holder_that_did_not_say_who_it_is_is_not_killed(paths: FilePaths):
    processes = ToldProcesses()
    with held_elsewhere(paths.lock, "write") as holder:
        paths.lock.write_text(f"{os.getpid()} 1 cafe\n")
        with pytest.raises(ConfigError, match=f"process {holder.pid}"):
            lock_as_writer(paths.lock, "cafe", processes, HurriedClock())
    assert processes.killed == []


def test_a_lock_file_that_was_replaced_is_not_held(paths: FilePaths):
    lock = FileLock.try_write(paths.lock)
    assert lock is not None
    lock.remove()
    assert not paths.lock.exists()
    assert FileLock.try_read(paths.lock) is None
