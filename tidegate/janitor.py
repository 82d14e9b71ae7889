"""The server's side of `cleanup.py`: started before anything else, and left to it at the end."""

from __future__ import annotations

import contextlib
import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

from configs.errors import ConfigError
from tidegate import cleanup
from tidegate.state_dir import StateDir

#: in the environment of everything that the server starts
MARK_NAME = "TIDEGATE_RUN"

_PROGRAM = [sys.executable, "-I", "-S", str(Path(cleanup.__file__))]


class Janitor:
    """A running cleanup process, and the mark by which it knows what to end."""

    def __init__(self, process: subprocess.Popen[bytes], mark: str) -> None:
        self._process = process
        #: NAME=value
        self.mark = mark

    @classmethod
    def start(cls, state: StateDir, shared: Path = Path("/dev/shm")) -> Janitor:
        """Take the state directory for this process, and have someone who cleans up after it, in `shared` too.

        Waits up to 10 s for the cleanup of a server that has just been killed. From the return on, every child of
        this process carries the mark. Raises ConfigError when another living server has the state directory.
        """
        mark = f"{MARK_NAME}={secrets.token_hex(8)}"
        process = subprocess.Popen(
            [*_PROGRAM, "hold", str(state.root), str(state.ray_temp), mark, str(os.getpid()), str(shared)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            # a session of its own: Ctrl-C and a kill of the server's process group do not reach it
            start_new_session=True,
            cwd="/",
        )
        assert process.stdout is not None
        answer = process.stdout.readline().decode().split()
        process.stdout.close()
        if answer != [cleanup.READY]:
            process.wait()
            holder = f" (pid {answer[1]})" if len(answer) > 1 and answer[1] != "0" else ""
            raise ConfigError(f"another server{holder} runs on {state.root}; stop it, or choose another --state-dir")
        os.environ[MARK_NAME] = mark.partition("=")[2]
        return cls(process, mark)

    def leave(self, status: int) -> NoReturn:
        """End this process with `status`, as soon as everything that it started is gone; within 10 s in any case.

        The process is replaced by a small one that waits: Ray's own code in here would complain, and may end the
        process, when the cluster under it is killed. The life line to the cleanup process closes with the exec. The
        last word on it says that this is no crash, so that the cache in shared memory goes too.
        """
        sys.stdout.flush()
        sys.stderr.flush()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # somebody has killed the cleanup
            self._process.stdin.write(cleanup.LEFT)
            self._process.stdin.flush()
        os.execv(sys.executable, [*_PROGRAM, "wait", str(self._process.pid), str(status)])
