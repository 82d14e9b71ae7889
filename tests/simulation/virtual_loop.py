"""An event loop in which time is a number and processes can be stopped between any two callbacks.

Nothing sleeps: when nothing is ready the clock jumps to the next timer. Every callback belongs to the process in whose
context it was scheduled. Callbacks of a stopped process (SIGSTOP) wait until it goes on, timers included; those of a
process that has ended never run. So a process can be frozen or killed at every await of production code, unchanged.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable, Coroutine
from contextvars import Context, ContextVar, copy_context
from typing import Any

#: two threads that lose the processor one inside the other: deeper ones keep it
_MAX_PREEMPTED = 2


class ProcessEnded(BaseException):
    """The process of the code that runs has been killed; whoever called that code catches this."""


class Process:
    """One operating system process: what runs in it, whether it runs, and when it was stopped."""

    def __init__(self, loop: VirtualLoop, name: str) -> None:
        self.loop = loop
        self.name = name
        self.is_frozen = False
        self.is_dead = False
        #: set when it has ended
        self.ended = asyncio.Event()
        #: of its last freeze, or of the present one; the beginning of time if there was none
        self.thawed_s = -1.0
        #: called when it ends, in order
        self.on_end: list[Callable[[], None]] = []
        self._parked: list[asyncio.Handle] = []
        self._context = copy_context()
        self._context.run(_PROCESS.set, self)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        """Run a coroutine in this process."""
        return self.loop.create_task(work, name=self.name, context=self.context())

    def context(self) -> Context:
        """For callbacks that are to belong to this process."""
        return self._context.copy()

    def park(self, handle: asyncio.Handle) -> None:
        self._parked.append(handle)

    def freeze(self) -> None:
        self.is_frozen = not self.is_dead

    def thaw(self) -> None:
        """Go on, with everything that has come due meanwhile."""
        if self.is_frozen:
            self.is_frozen = False
            self.thawed_s = self.loop.time()
            self.loop.resume(self._parked)
            self._parked = []

    def kill(self) -> None:
        """SIGKILL: nothing of it runs any more, not even a `finally`."""
        if not self.is_dead:
            self.is_dead, self.is_frozen = True, False
            self._parked.clear()
            self.ended.set()
            for tell in self.on_end:
                tell()

    def was_stopped_since(self, instant_s: float) -> bool:
        """Whether it was not running at some time after `instant_s`."""
        return self.is_frozen or self.is_dead or self.thawed_s >= instant_s


_PROCESS: ContextVar[Process | None] = ContextVar("process", default=None)


def current_process() -> Process | None:
    """Whose code runs now; None: the world's own."""
    return _PROCESS.get()


class _NoSelector:
    """`BaseEventLoop` closes one."""

    def close(self) -> None: ...


class VirtualLoop(asyncio.BaseEventLoop):
    """Runs callbacks in the order of their instants, and those of one instant in the order they were scheduled."""

    _ready: Any
    _stopping: bool

    def __init__(self, start_s: float = 1000.0) -> None:
        super().__init__()
        self._now_s = start_s
        self._selector = _NoSelector()
        self._num_preempted = 0
        #: instant, number in the order of scheduling, callback; a heap
        self._timers: list[tuple[float, int, asyncio.TimerHandle]] = []
        self._numbers = itertools.count()
        self.num_callbacks = 0
        #: all there were: one that is dropped in the middle would run its `finally` at any time
        self._tasks: list[asyncio.Task[Any]] = []
        self.set_task_factory(self._make_task)

    def time(self) -> float:
        return self._now_s

    def call_at(
        self, when: float, callback: Callable[..., object], *args: Any, context: Context | None = None
    ) -> asyncio.TimerHandle:
        handle = asyncio.TimerHandle(when, callback, args, self, context)
        heapq.heappush(self._timers, (when, next(self._numbers), handle))
        return handle

    def resume(self, handles: list[asyncio.Handle]) -> None:
        """Have these run next, in order."""
        self._ready.extend(handles)

    def preempt(self, duration_s: float) -> None:
        """The thread that runs now loses the processor for a while: all others go on, also those of its own process.

        To be called by code that is not part of a task. Raises ProcessEnded if its process was killed meanwhile.
        """
        process = current_process()
        assert process is not None, "only code of a process can lose the processor"
        if self._num_preempted >= _MAX_PREEMPTED:
            return
        until_s = self._now_s + duration_s
        # in the world's context: it must come though the process is stopped
        self.call_at(until_s, lambda: None, context=Context())
        self._num_preempted += 1
        while not self._stopping and (self._now_s < until_s or process.is_frozen):
            self._run_once()
        self._num_preempted -= 1
        if process.is_dead or self._stopping:
            raise ProcessEnded

    def _run_once(self) -> None:
        timers, ready = self._timers, self._ready
        if not ready:
            while timers and timers[0][2].cancelled():
                heapq.heappop(timers)
            assert timers, "nothing will ever happen any more"
            self._now_s = max(self._now_s, timers[0][0])
        while timers and timers[0][0] <= self._now_s:
            ready.append(heapq.heappop(timers)[2])
        for _ in range(len(ready)):
            if not ready or self._stopping:  # emptied by callbacks that ran inside another one
                return
            self._run(ready.popleft())

    def _run(self, handle: Any) -> None:
        if handle.cancelled():
            return
        process = handle._context.get(_PROCESS)
        if process is None or not (process.is_frozen or process.is_dead):
            self.num_callbacks += 1
            handle._run()
        elif process.is_frozen:
            process.park(handle)

    def _timer_handle_cancelled(self, handle: asyncio.TimerHandle) -> None:
        """It is dropped when it comes due."""

    def close(self) -> None:
        """End what was left in the middle, most of it because its process was killed."""
        for task in self._tasks:
            if not task.done():
                work: Any = task.get_coro()
                work.close()
        super().close()

    def _make_task(self, loop: asyncio.AbstractEventLoop, work: Any, **options: Any) -> asyncio.Task[Any]:
        task: Any = asyncio.Task(work, loop=loop, **options)
        task._log_destroy_pending = False
        self._tasks.append(task)
        return task

    def _write_to_self(self) -> None:
        """There is no other thread to wake it."""

    def _process_events(self, event_list: list[object]) -> None:
        """There are no sockets."""
