"""What the cache asks of the machine under its shared file: the processes that run there, and time."""

from __future__ import annotations

import os
import signal
import threading
import time

from actors.process_proof import ProcessProof, start_time_of
from cache.processes import ProcessId


class NodeProcesses:
    """Implements `cache.processes.Processes` for the processes of this pid namespace."""

    def own_id(self) -> ProcessId:
        start_time = start_time_of(os.getpid())
        assert start_time is not None, "a running process has a start time"
        return ProcessId(os.getpid(), start_time)

    def is_gone(self, process: ProcessId) -> bool:
        proof = ProcessProof.open(*process)
        if proof is None:
            return True
        try:
            return proof.is_gone()
        finally:
            proof.close()

    def kill(self, process: ProcessId) -> None:
        """SIGKILL through the descriptor that proved who it is, so that a pid used again is never hit."""
        proof = ProcessProof.open(*process)
        if proof is None:
            return
        try:
            pidfd = proof.fileno()
            if pidfd is None:
                os.kill(process.pid, signal.SIGKILL)
            else:
                signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        except ProcessLookupError:
            return
        finally:
            proof.close()


class NodeClock:
    """Implements `cache.writer_lock.Clock`. Its pauses block: own a file in a thread, not on an event loop."""

    def now_s(self) -> float:
        """CLOCK_BOOTTIME."""
        return time.clock_gettime(time.CLOCK_BOOTTIME)

    def pause_s(self, duration_s: float) -> None:
        threading.Event().wait(duration_s)
