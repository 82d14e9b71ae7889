"""Where a rank listens: one socket file per incarnation below the state directory, and a tcp port with a key.

A socket file outlives a process that was killed. Its name says whose it is (incarnation, pid, start time of the
process), so a later start removes what is dead and nothing else.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path

import zmq

from actors.process_proof import start_time_of
from configs.errors import ConfigError

log = logging.getLogger(__name__)

#: sun_path of Linux holds 108 bytes with its terminating zero
_MAX_PATH_BYTES = 107
_FILE_NAME = re.compile(r"(?P<incarnation>[0-9a-f]{12})-(?P<pid>\d+)-(?P<start_time>\d+)\.ipc")


def new_incarnation() -> str:
    """Random id of one rank process."""
    return secrets.token_hex(6)


@dataclass(frozen=True, slots=True)
class TcpDoor:
    """A tcp listener for Apis on other nodes. `public_key` goes to them through Ray only and is what lets them in."""

    host: str
    public_key: bytes
    secret_key: bytes

    @classmethod
    def on(cls, host: str) -> TcpDoor:
        """A door with a fresh CURVE key pair."""
        public_key, secret_key = zmq.curve_keypair()
        return cls(host, public_key, secret_key)


def socket_directory(state_dir: Path) -> Path:
    """The folder of socket files, readable by its owner only; made if absent."""
    directory = state_dir / "ipc"
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return directory


def socket_path(state_dir: Path, incarnation: str) -> Path:
    """The socket file of this process. Raises ConfigError when the state directory's path is too long for a socket."""
    pid = os.getpid()
    path = socket_directory(state_dir) / f"{incarnation}-{pid}-{start_time_of(pid)}.ipc"
    length = len(os.fsencode(path))
    if length > _MAX_PATH_BYTES:
        raise ConfigError(
            f"the path of a socket would have {length} bytes, Linux takes {_MAX_PATH_BYTES}: {path}; "
            f"choose a state_dir that is {length - _MAX_PATH_BYTES} bytes shorter"
        )
    return path


def sweep_dead_sockets(state_dir: Path) -> list[Path]:
    """Remove the socket files of dead incarnations; returns what was removed. Files of other names are left alone.

    Dead means both: nobody listens, and no process of that pid and start time lives. Either alone can lie: a process
    between bind() and listen() refuses connections, and a process of another container is not in our /proc.
    """
    removed: list[Path] = []
    for path in sorted(socket_directory(state_dir).iterdir()):
        match = _FILE_NAME.fullmatch(path.name)
        if match is None or start_time_of(int(match["pid"])) == int(match["start_time"]) or _is_listened_to(path):
            continue
        path.unlink(missing_ok=True)
        removed.append(path)
    if removed:
        log.info("removed %d socket files of dead ranks", len(removed))
    return removed


def _is_listened_to(path: Path) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        result = probe.connect_ex(os.fspath(path))
    # EAGAIN: the backlog of a frozen process is full; it may wake.
    return result not in (errno.ECONNREFUSED, errno.ENOENT)
