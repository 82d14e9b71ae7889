"""Entry point of the `tidegate` command.

Imports next to nothing by itself: from here on a signal ends the process without a stack trace, also while the rest is
being imported, and also one that a script's `&` has had ignored.
"""

from __future__ import annotations

import os
import signal
from types import FrameType


def main() -> None:
    """Run the command line and exit with its status (see tidegate.commands)."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)
    # after the handlers: this takes half a second
    from tidegate.commands import run

    run()


def _leave(number: int, frame: FrameType | None) -> None:
    os._exit(128 + number)


if __name__ == "__main__":
    main()
