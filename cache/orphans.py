"""Shared files whose deployment has died: removed, counted as free, or taken over warm.

Who is dead is asked of the kernel, by the locks beside the files, and never guessed from a name.
"""

from __future__ import annotations

import logging
from collections.abc import Collection
from pathlib import Path

from cache.arena import ArenaGeometry, control_words
from cache.control_page import ControlPage, ControlPageWriter, FileIdentity
from cache.shared_file import PREFIX, SUFFIXES, FilePaths, map_existing
from cache.shared_words import Fence
from cache.writer_lock import FileLock

logger = logging.getLogger(__name__)


def sweep(directory: Path, fence: Fence, keep: Collection[str] = (), keep_lineage: str | None = None) -> list[str]:
    """Remove what dead deployments left in `directory`. The names removed, sorted.

    A name is dead if neither a writer nor a reader has a lock on it; the kernel says so. `keep`: names not to touch,
    such as the caller's own.  `keep_lineage`: pages of KV of this lineage stay for `inherit`. Files of other users
    stay.
    """
    kept = None if keep_lineage is None else FileIdentity(keep_lineage)
    names = _names_in(directory) - set(keep)
    return [name for name in sorted(names) if _sweep_one(FilePaths(directory, name), fence, kept)]


def discard(paths: FilePaths, fence: Fence) -> None:
    """Retire the file of this name, so that whoever maps it stops using it, and free the name. For its only owner."""
    mapping = map_existing(paths.data)
    if mapping is not None:
        ControlPageWriter(control_words(mapping), fence).retire()
    paths.data.unlink(missing_ok=True)


def inherit(paths: FilePaths, identity: FileIdentity, fence: Fence, keep: Collection[str] = ()) -> str | None:
    """Give a dead deployment's file of exactly this identity the name of `paths`, if nothing has that name.

    Its old name; None if there is none. `keep`: names not to touch, such as those that this process has locked. For
    the only process that may use the name; `FileMaker.open` then adopts it.
    """
    if paths.data.exists():
        return None
    for name in sorted(_names_in(paths.directory) - set(keep)):
        old = FilePaths(paths.directory, name)
        try:
            if _rename_if_dead(old, paths, identity, fence):
                return name
        except OSError as error:  # another user's, or no plain file
            logger.info("%s is left alone: %s", old.data, error)
    return None


def _rename_if_dead(old: FilePaths, new: FilePaths, identity: FileIdentity, fence: Fence) -> bool:
    lock = FileLock.try_alone(old.lock) if old.data.exists() else None
    if lock is None:
        return False
    try:
        if _why_unusable(old.data, identity, fence) is not None:
            return False
        old.data.rename(new.data)
        lock.remove()
        return True
    finally:
        lock.release()


def dead_bytes(directory: Path) -> int:
    """Bytes of the files in `directory` that belong to dead deployments: the next start takes them over or removes
    them. Changes nothing."""
    num_bytes = 0
    for name in _names_in(directory):
        paths = FilePaths(directory, name)
        try:
            lock = FileLock.try_alone(paths.lock) if paths.lock.exists() and paths.data.exists() else None
            num_bytes += paths.data.stat().st_size if lock is not None else 0
        except OSError:  # another user's, or gone meanwhile
            continue
        if lock is not None:
            lock.release()
    return num_bytes


def _names_in(directory: Path) -> set[str]:
    ours = (path for path in directory.glob(f"{PREFIX}*") if path.suffix in SUFFIXES)
    return {path.stem.removeprefix(PREFIX) for path in ours}


def _why_unusable(path: Path, identity: FileIdentity, fence: Fence) -> str | None:
    """What keeps `identity` from adopting the file of a dead deployment; None: nothing."""
    mapping = map_existing(path)
    if mapping is None:
        return "it is too short"
    page = ControlPage(control_words(mapping), fence)
    if page.read().is_retired:
        return "it was retired"
    if len(mapping) != ArenaGeometry(identity.num_slots, identity.page_bytes).file_bytes:
        return f"it is {len(mapping):,} bytes long"
    return identity.difference(page)


def _is_kept(page: ControlPage, kept: FileIdentity | None) -> bool:
    """Holds KV of the lineage of `kept`, whatever its layout."""
    return kept is not None and page.num_slots > 0 and not page.read().is_retired and kept.has_lineage_of(page)


def _sweep_one(paths: FilePaths, fence: Fence, kept: FileIdentity | None) -> bool:
    try:
        lock = FileLock.try_alone(paths.lock)
    except OSError as error:
        logger.info("%s is left alone: %s", paths.data, error)
        return False
    if lock is None:
        return False
    try:
        mapping = map_existing(paths.data)
        if mapping is not None:
            page = ControlPageWriter(control_words(mapping), fence)
            if _is_kept(page, kept):
                lock.release()
                return False
            page.retire()
        for path in (paths.data, paths.fresh):
            path.unlink(missing_ok=True)
    except OSError as error:
        logger.info("%s is left alone: %s", paths.data, error)
        lock.release()
        return False
    lock.remove()
    return True
