"""The server's side of `cleanup.py`: start it before anything else, and wait for it at the end."""

from __future__ import annotations

import os
import secrets
import subprocess
import sys
from pathlib import Path

from configs.errors import ConfigError
from tidegate import cleanup
from tidegate.state_dir import StateDir

#: in the environment of everything that the server starts
MARK_NAME = "TIDEGATE_RUN"


class Janitor:
    """A running cleanup process, and the mark by which it knows what to end."""

    def __init__(self, process: subprocess.Popen[bytes], mark: str) -> None:
        self._process = process
        #: NAME=value
        self.mark = mark

    @classmethod
    def start(cls, state: StateDir) -> Janitor:
        """Take the state directory for this process, and have someone who cleans up after it.

        Waits up to 10 s for the cleanup of a server that has just been killed. From the return on, every child of
        this process carries the mark. Raises ConfigError when another living server has the state directory.
        """
        mark = f"{MARK_NAME}={secrets.token_hex(8)}"
        program = [sys.executable, "-I", "-S", str(Path(cleanup.__file__))]
        process = subprocess.Popen(
            [*program, str(state.root), str(state.ray_temp), mark, str(os.getpid())],
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

    def finish(self, timeout_s: float) -> bool:
        """Have everything ended now and wait for it; False if that took longer than `timeout_s`."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            return False
        return True
