"""The cache's probe of this machine's processes, answered by the kernel (`actors.process_proof`)."""

from __future__ import annotations

import os
import signal

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
