"""A server that starts nothing but plain processes, in a process of its own; everything around it is real."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from threading import Event

SERVER = """
import os, subprocess, sys, time
from pathlib import Path
from configs.errors import ConfigError
from tidegate.janitor import Janitor
from tidegate.state_dir import StateDir

state = StateDir.create(Path(sys.argv[1]))
try:
    janitor = Janitor.start(state)
except ConfigError as error:
    print("refused", error.message, flush=True)
    sys.exit(2)
os.chdir(state.cwd)
sleeper = [sys.executable, "-I", "-S", "-c", "import signal; signal.pause()"]
deaf = [sys.executable, "-I", "-S", "-c",
        "import signal; [signal.signal(n, signal.SIG_IGN) for n in (1, 2, 15)]; signal.pause()"]
bare = {key: value for key, value in os.environ.items() if key != "TIDEGATE_RUN"}
marked = subprocess.Popen(deaf, cwd="/")
unmarked = subprocess.Popen(sleeper, env=bare)  # as a process whose title covers its environment
bystander = subprocess.Popen(sleeper, cwd=state.ray_temp, env=bare)  # as a reader of the logs
print("serving", marked.pid, unmarked.pid, bystander.pid, flush=True)
line = sys.stdin.readline()
janitor.leave(int(line))
"""


class FakeServer:
    """One of these per state directory; `close` ends what the test did not."""

    def __init__(self, root: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVER, str(root)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            # where Ray's folder goes when `root` is too long for its sockets
            env=os.environ | {"TMPDIR": str(root.parent)},
        )
        assert self.process.stdout is not None
        self.answer = self.process.stdout.readline().split()
        self.pids = [int(word) for word in self.answer[1:]] if self.answer[:1] == ["serving"] else []

    def close(self) -> None:
        for pid in [self.process.pid, *self.pids]:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            assert stream is not None
            stream.close()


def is_alive(pid: int) -> bool:
    """False for a zombie too: it runs nothing."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
    except (FileNotFoundError, ProcessLookupError):
        return False


def gone_within(pids: list[int], timeout_s: float) -> bool:
    """Wait for facts of other processes that send no event."""
    never, deadline_s = Event(), time.monotonic() + timeout_s
    while any(is_alive(pid) for pid in pids):
        if time.monotonic() > deadline_s:
            return False
        never.wait(0.01)
    return True
