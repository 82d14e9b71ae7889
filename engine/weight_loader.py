"""A rank's staging of new weights on a thread of its own, and what is staged until its update ends.

The engine thread asks (`stage`, `commit`, `drop`: the commands of `WeightDesk`), the loader's thread reads, copies,
checks and frees. Only `commit` touches the live weights, and only the engine thread calls it.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from queue import SimpleQueue
from typing import TypeAlias

from configs.errors import Conflict, TidegateError
from engine.weight_intake import StageOptions
from engine.weight_sources import NamedTensors
from engine.weight_update import PrepareCommand, Staged, StagingFailed
from engine.weights import LiveWeights, Replaced, StagedWeights, Staging

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Payload:
    """New weights as they came: `open` is called once, on the loader's thread, and read to its end."""

    open: Callable[[], NamedTensors]
    options: StageOptions


@dataclass(slots=True)
class _Load:
    command: PrepareCommand
    payload: Payload
    is_dropped: bool = False


class _Close:
    """The last job."""


#: what is to be loaded, or is only to be freed
_Job: TypeAlias = _Load | Replaced | StagedWeights | _Close
OnEvent: TypeAlias = Callable[[Staged | StagingFailed], None]


class WeightLoader:
    """`close` it. `offer` may be called by any thread, the other methods belong to the engine thread."""

    def __init__(self, live: LiveWeights, on_event: OnEvent) -> None:
        """on_event is called by the loader's thread, once per `stage` that was not dropped; it must not block."""
        self._live = live
        self._on_event = on_event
        #: index of an update -> what came for it and is not asked for yet
        self._payloads: dict[int, Payload] = {}
        #: the one that was asked for last
        self._load: _Load | None = None
        #: index -> ready for its commit; entered by the loader's thread, taken out by the engine's
        self._staged: dict[int, StagedWeights] = {}
        self._lock = threading.Lock()
        self._jobs: SimpleQueue[_Job] = SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="weights", daemon=True)
        self._thread.start()

    def offer(self, index: int, payload: Payload) -> None:
        """Here is the payload of an update; called before the update itself is told. One of an older update that was
        never asked for is let go."""
        with self._lock:
            self._payloads = {index: payload}

    def stage(self, command: PrepareCommand) -> None:
        """Load the payload of this update; the end is an event."""
        with self._lock:
            payload = self._payloads.pop(command.index, None)
        if payload is None:
            self._on_event(StagingFailed(command.index, "The update was told without its weights."))
            return
        self._load = _Load(command, payload)
        self._jobs.put(self._load)

    def drop(self, index: int) -> None:
        """The update has ended otherwise: stop loading at the next tensor, free what is there."""
        load = self._load
        with self._lock:
            self._payloads.pop(index, None)
            if load is not None and load.command.index == index:
                load.is_dropped = True
            staged = self._staged.pop(index, None)
        if staged is not None:
            self._jobs.put(staged)

    def commit(self, index: int, version: str | None) -> None:
        """Serve these weights from now on; between two steps. The old ones are freed on the loader's thread.

        Raises Conflict or WeightsTorn with nothing changed.
        """
        with self._lock:
            staged = self._staged.pop(index, None)
        if staged is None:
            raise Conflict(f"no weights are staged for record {index}")
        self._jobs.put(self._live.commit(staged, version))

    def close(self) -> None:
        """Stop loading and end the thread; what is staged is let go."""
        if self._load is not None:
            self._load.is_dropped = True
        self._jobs.put(_Close())
        self._thread.join()
        self._staged.clear()

    def _run(self) -> None:
        while not isinstance(job := self._jobs.get(), _Close):
            if isinstance(job, _Load):
                self._stage(job)
            # the rest are weights that nobody needs any more; here they are freed
            del job

    def _stage(self, load: _Load) -> None:
        index = load.command.index
        try:
            staged = self._read(load)
        except TidegateError as error:
            failure = error.message
        except Exception as error:
            logger.exception("the weights of update %s cannot be loaded", load.command.update_id)
            failure = f"The weights cannot be loaded: {type(error).__name__}."
        else:
            if staged is not None and self._keep(load, staged):
                self._on_event(Staged(index, staged.digest))
            return
        if not load.is_dropped:
            self._on_event(StagingFailed(index, failure))

    def _keep(self, load: _Load, staged: StagedWeights) -> bool:
        """Unless it was dropped meanwhile."""
        with self._lock:
            if not load.is_dropped:
                self._staged[load.command.index] = staged
            return not load.is_dropped

    def _read(self, load: _Load) -> StagedWeights | None:
        """None: it was dropped meanwhile."""
        staging = Staging(self._live, load.payload.options)
        for name, tensor in load.payload.open():
            if load.is_dropped:
                return None
            staging.take([(name, tensor)])
        return staging.finish()
