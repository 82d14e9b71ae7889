"""INT, TERM and HUP of a server, from its first second to its last."""

from __future__ import annotations

import os
import select
import signal
from collections.abc import Callable
from types import FrameType
from typing import NoReturn

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopSignals:
    """Turns the first signal into an event while the server serves, and any other one into an immediate end.

    While Ray is being started or stopped there is no safe point at which the main thread could go on, so a signal
    then ends the process on the spot; what it started ends with it (`cleanup.py`).
    """

    def __init__(self, leave: Callable[[int], NoReturn]) -> None:
        """leave: ends the process with the given status; called in the main thread."""
        self._leave = leave
        self._reader, self._writer = os.pipe()
        self._may_wait = False

    def install(self) -> None:
        """Take the signals over. To be called again after `ray.init`, which takes SIGTERM.

        Explicitly for all of them: a command that a script starts with `&` inherits an ignored SIGINT.
        """
        for number in _SIGNALS:
            signal.signal(number, self._handle)

    def wait(self, timeout_s: float | None = None) -> bool:
        """True as soon as an end was asked for; False after `timeout_s`."""
        self._may_wait = True
        readable, _, _ = select.select([self._reader], [], [], timeout_s)
        self._may_wait = False
        return bool(readable)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._may_wait:
            self._leave(128 + number)
        self._may_wait = False
        # A pipe, not an Event: its lock may be held by the very code that this handler interrupts.
        os.write(self._writer, b".")
