"""The folder in which one local server keeps what it needs: the log, sockets, the demo model, Ray's own files.

<root>/server.lock   held by the cleanup process of the running server
<root>/cwd/          always empty: Ray workers put the folder in which Ray was started before site-packages
<root>/ray/          Ray's temporary folder (in the system's one when <root> is too long for a socket)
<root>/ipc/          sockets of the ranks              <root>/models/   the demo model
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path

from configs.errors import ConfigError

#: sun_path of Linux holds 108 bytes with its terminating zero
_MAX_SOCKET_PATH = 107
#: bytes that Ray adds to its temporary folder: "/session_<date>_<time>_<microseconds>_<pid>/sockets/dash_<module>"
_RAY_SOCKET_SUFFIX = 75
#: Ray never removes the logs of earlier runs; these many are kept
_KEPT_RAY_RUNS = 2


@dataclass(frozen=True, slots=True)
class StateDir:
    """Paths of one state directory, all absolute."""

    root: Path
    ray_temp: Path

    @property
    def cwd(self) -> Path:
        return self.root / "cwd"

    @property
    def logs(self) -> Path:
        """Where Ray writes the logs of every process of the running server."""
        return self.ray_temp / "session_latest" / "logs"

    @classmethod
    def create(cls, root: Path) -> StateDir:
        """The state directory at `root`, made when absent, readable by its owner only.

        Raises ConfigError when it cannot be written, is somebody else's, or its `cwd` holds files.
        """
        root = root.expanduser().resolve()
        state = cls(root, ray_temp_of(root))
        try:
            # Ray opens its own folder to everybody; the one above keeps them out.
            for folder in (state.root, state.cwd, state.ray_temp.parent, state.ray_temp):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                _must_be_ours(folder)
        except OSError as error:
            raise ConfigError(f"cannot use {error.filename} as state directory: {error.strerror}") from None
        foreign = sorted(entry.name for entry in state.cwd.iterdir())
        if foreign:
            raise ConfigError(
                f"{state.cwd} must be empty, it holds {foreign[0]}: Ray workers would import from it; remove it"
            )
        return state

    def drop_old_runs(self) -> None:
        """Remove the logs of all but the last runs. To be called while no server runs on this state directory."""
        runs = sorted(path for path in self.ray_temp.glob("session_*") if path.is_dir() and not path.is_symlink())
        for run in runs[:-_KEPT_RAY_RUNS]:
            shutil.rmtree(run, ignore_errors=True)


def ray_temp_of(root: Path) -> Path:
    """Ray's temporary folder for the state directory `root`, which is absolute."""
    inside = root / "ray"
    if len(os.fsencode(inside)) + _RAY_SOCKET_SUFFIX <= _MAX_SOCKET_PATH:
        return inside
    digest = hashlib.blake2b(os.fsencode(root), digest_size=4).hexdigest()
    return Path(tempfile.gettempdir()) / f"tidegate-{os.getuid()}-{digest}" / "ray"


def _must_be_ours(folder: Path) -> None:
    """A folder below /tmp may have been put there by somebody else, with us to write into it."""
    facts = folder.lstat()
    if not stat.S_ISDIR(facts.st_mode) or facts.st_uid != os.getuid():
        raise ConfigError(f"{folder} is not a folder of this user; remove it or choose another state_dir")
