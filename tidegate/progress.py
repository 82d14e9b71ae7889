"""What a start shows while it waits: a line with a spinner on a terminal, plain lines anywhere else."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.status import Status


class Progress:
    """Steps of a start, one after the other. `update` may be called from any thread."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._status: Status | None = None

    @contextmanager
    def step(self, what: str) -> Iterator[None]:
        """Show `what` for as long as the block runs, and then how long that was."""
        begun_s = time.monotonic()
        if self._console.is_terminal:
            with self._console.status(what) as status:
                self._status = status
                yield
            self._status = None
        else:
            self._print(f"{what} ...")
            yield
        self._print(f"{what}: {time.monotonic() - begun_s:.1f} s")

    def update(self, text: str) -> None:
        """Say more about the running step; on anything but a terminal, nothing."""
        status = self._status
        if status is not None:
            status.update(text)

    def note(self, text: str) -> None:
        """A line that stays."""
        self._print(text)

    def abandon(self) -> None:
        """Leave the terminal as it was, in the middle of a step. The last call."""
        if self._console.is_terminal:
            self._console.show_cursor()
            self._console.file.write("\n")
            self._console.file.flush()

    def _print(self, text: str) -> None:
        self._console.print(text, soft_wrap=True, highlight=False, markup=False)
