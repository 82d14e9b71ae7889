"""Who removes a node's control page when its cluster ends: a small process beside the node's agent.

Run as a program, alone and with the standard library only: `python -I -S file_keeper.py RAYLET PAGE [ARENA ...]`, paths
without their ending. Ray ends the processes of a node by SIGTERM and, at once, SIGKILL to their groups, so no agent can
tidy up; and a detached actor has no driver that would do it. This process lives in a session of its own, waits for the
end of the node's raylet and then for the locks of the files: the kernel frees those with the last process that uses
them. A control page is of no use to anybody by then. Pages of KV are, unless the ranks had left in good order: a file
with KV stays for the next start (cache/shared_file.py), and is removed if the last line from the agent said `left`.

There is one for each raylet and page, however often the agent is restarted; the last agent's word counts.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

#: first line of the answer: it keeps the files / an earlier one of this raylet does
_READY, _BUSY = "ready", "busy"
#: what a new agent, or a rank's coming and going, tells the keeper in one datagram
IN_USE, LEFT = b"in use", b"left"


def start(paths: Sequence[Path]) -> str:
    """Have the files of `paths` (without ending; the first is the control page) removed at the end of this process's
    parent, the raylet. Where to `tell`. Blocks for the start of a small process."""
    raylet = os.getppid()
    process = subprocess.Popen(
        [sys.executable, "-I", "-S", __file__, str(raylet), *map(str, paths)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        # Ray kills process groups
        start_new_session=True,
        cwd="/",
    )
    assert process.stdout is not None
    answer = process.stdout.readline().decode().strip()
    process.stdout.close()
    if answer != _READY:
        process.wait()
    return _address(raylet, paths[0])


def tell(address: str, word: bytes) -> bool:
    """IN_USE: the KV in the arena is worth keeping after a crash. LEFT: all ranks have gone in good order. False: the
    keeper is gone."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        try:
            line.sendto(word, address)
        except OSError:
            return False
    return True


def _keep(raylet: int, paths: Sequence[Path]) -> None:
    """Wait for the raylet's end, then for everybody else's, then remove."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as line:
        try:
            pidfd = os.pidfd_open(raylet)
            line.bind(_address(raylet, paths[0]))
        except OSError:  # it has ended already; or another keeper has the address
            print(_BUSY, flush=True)
            return
        print(_READY, flush=True)
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        has_left = _wait(pidfd, line)
    _remove(paths[0])
    if has_left:
        for path in paths[1:]:
            _remove(path)


def _wait(pidfd: int, line: socket.socket) -> bool:
    """Until the raylet has ended. Had all ranks left?"""
    poll = select.poll()
    poll.register(pidfd, select.POLLIN)
    poll.register(line, select.POLLIN)
    has_left = False
    while True:
        ready = {descriptor for descriptor, _ in poll.poll()}
        if line.fileno() in ready:
            has_left = line.recv(64) == LEFT
        elif pidfd in ready:
            return has_left


def _remove(path: Path) -> None:
    """Unlink the file and its lock file when nobody has a lock on it any more, as cache/writer_lock.py takes them."""
    lock = path.with_name(f"{path.name}.lock")
    try:
        descriptor = os.open(lock, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.lockf(descriptor, fcntl.LOCK_EX, 2, 0)
        if os.path.samestat(os.fstat(descriptor), lock.stat()):
            for ending in ("kv", "new", "lock"):
                path.with_name(f"{path.name}.{ending}").unlink(missing_ok=True)
    except OSError:  # it went with another: a sweep, or the server's own cleanup
        return


def _address(raylet: int, page: Path) -> str:
    """Of this raylet's keeper, in the kernel's own name space of sockets: it goes with the process."""
    stat = Path(f"/proc/{raylet}/stat").read_text()
    start_time = stat.rpartition(")")[2].split()[19]
    name = hashlib.blake2b(os.fsencode(page), digest_size=8).hexdigest()  # a socket's name has 107 bytes
    return f"\0tidegate-keeper-{raylet}-{start_time}-{name}"


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    _keep(int(sys.argv[1]), [Path(path) for path in sys.argv[2:]])
