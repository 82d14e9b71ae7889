"""Ending with the parent process, for servers that a tool like make has started."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Get SIGTERM when the parent ends, by SIGKILL too. From then on for the life of this process (Linux)."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
    if os.getppid() != parent:
        # it ended before the kernel knew
        os.kill(os.getpid(), signal.SIGTERM)
