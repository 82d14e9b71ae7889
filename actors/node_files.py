"""The files of one node and deployment as its agent owns them: the control page, and the host tier's arena beside it.

What opens them blocks, and belongs in a thread.
"""

from __future__ import annotations

import logging
import platform
import secrets
from collections.abc import Callable
from pathlib import Path

from actors import file_keeper
from actors.free_memory import free_memory_bytes
from actors.node_processes import NodeClock, NodeProcesses
from cache.control_page import FileIdentity
from cache.orphans import discard, inherit, sweep
from cache.shared_file import FileMaker, FilePaths, OwnedFile
from cache.shared_words import fence_for
from configs.schema import Settings

log = logging.getLogger(__name__)


class NodeFiles:
    """Names and owners of the files. One of these per agent process."""

    def __init__(self, settings: Settings, node_id: str) -> None:
        directory, name = settings.control.shared_dir, f"{settings.ray.deployment}-{node_id[:12]}"
        self.page = FilePaths(directory, name)
        self.arena = FilePaths(directory, f"{name}-arena")
        self._has_tier = settings.host_tier.is_on
        self._fence = fence_for(platform.machine())
        #: address of the process that removes the files at the cluster's end; "": none yet
        self._keeper = ""

    def open_page(self, lineage: str) -> OwnedFile:
        """Own the control page's file of this lineage, after the files of dead deployments were removed."""
        if not self._keeper:
            self._keeper = file_keeper.start([self.page.stem, self.arena.stem])
        self._sweep(keep_lineage=lineage if self._has_tier else None)
        return self._own(self.page, FileIdentity(lineage), None)

    def open_arena(self, identity: FileIdentity, on_progress: Callable[[int, int], None]) -> OwnedFile:
        """Own the arena: this node's, or one that a dead node of the same lineage and layout has left, or a new one."""
        heir_of = inherit(self.arena, identity, self._fence, keep=self._own_names)
        if heir_of is not None:
            log.info("the host tier of %s is taken over", heir_of)
        else:
            self._sweep(keep_lineage=None)  # their memory may be needed
        return self._own(self.arena, identity, on_progress)

    def has_arena(self) -> bool:
        """A file has the arena's name."""
        return self.arena.data.exists()

    def discard_arena(self) -> None:
        """Retire the arena that an earlier agent has left, and free its name. Not while this process owns it."""
        discard(self.arena, self._fence)

    def used(self, is_used: bool) -> None:
        """Pages of KV are worth keeping for the next start, or all ranks have left in good order."""
        if self._keeper and not file_keeper.tell(self._keeper, file_keeper.IN_USE if is_used else file_keeper.LEFT):
            log.warning("nobody will remove %s at the end of this cluster", self.page.data)

    @property
    def _own_names(self) -> list[str]:
        return [self.page.name, self.arena.name]

    def _sweep(self, keep_lineage: str | None) -> None:
        removed = sweep(Path(self.page.directory), self._fence, keep=self._own_names, keep_lineage=keep_lineage)
        if removed:
            log.info("removed the shared files of dead deployments: %s", ", ".join(removed))

    def _own(
        self, paths: FilePaths, identity: FileIdentity, on_progress: Callable[[int, int], None] | None
    ) -> OwnedFile:
        nonce = secrets.randbits(62) + 1
        return FileMaker(
            identity,
            NodeProcesses(),
            NodeClock(),
            self._fence,
            nonce=nonce,
            free_memory_bytes=free_memory_bytes(),
            on_progress=on_progress,
        ).open(paths)
