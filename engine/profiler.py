"""Traces of engine steps, by torch.profiler.

torch records the thread that starts it, so everything between start and stop happens on the engine's thread; writing a
trace, which may take seconds, happens on another. A profile that goes wrong never ends a step: it ends itself, with
the reason.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any, TypeAlias

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from engine.batch import Batch
from engine.profile_spec import TRACE_SUFFIX, Profiled, ProfileSpec, Stage, Trace

log = logging.getLogger(__name__)

NOT_RUNNING = "Profiling is not in progress. Call /start_profile first."
IN_PROGRESS = "Profiling is already in progress. Call /stop_profile first."

#: starts and stops a recording; `torch.profiler.profile`
Record: TypeAlias = Callable[..., Any]


@dataclass(slots=True)
class _Recording:
    """One trace that is being recorded."""

    stage: Stage
    session: Any
    num_steps: int = 0
    is_collecting: bool = True


class _Job:
    """One profile from its start to its last trace. Of `ended` any thread may know, all else is the engine thread's."""

    def __init__(
        self, spec: ProfileSpec, stem: str, folder: Path, activities: list[ProfilerActivity], max_steps: int
    ) -> None:
        self.spec = spec
        #: of the names of its traces
        self.stem = stem
        self.folder = folder
        self.activities = activities
        #: of each stage
        self.num_steps = min(spec.num_steps or max_steps, max_steps)
        self.stages_left: list[Stage] = ["prefill", "decode"] if spec.by_stage else [""]
        self.recording: _Recording | None = None
        #: traces that are being written
        self.written: list[Future[Trace]] = []
        self.failure = ""
        self.must_stop = False
        self.ended: Future[Profiled] = Future()

    def stage_of(self, batch: Batch) -> Stage:
        if not self.spec.by_stage:
            return ""
        return "decode" if int(batch.q_lens.max(initial=1)) == 1 else "prefill"


class Profiler:
    """One rank's profiles, one at a time. `step` and `look` belong to the engine's thread, all else to any."""

    def __init__(self, root: Path, device: torch.device, max_steps: int, record: Record = profile) -> None:
        """root: traces are written below it. max_steps: a profile that nobody stops ends after so many. record: makes
        a recording, as torch.profiler.profile does."""
        self._root = root
        self._device = device
        self._max_steps = max_steps
        self._record = record
        self._job: _Job | None = None
        #: guards `_job`
        self._lock = Lock()
        self._writer = ThreadPoolExecutor(1, "traces")
        self._is_warm = False
        #: wakes the engine's thread; set by whoever owns both
        self.wake: Callable[[], None] = lambda: None

    # --- any thread ---------------------------------------------------------------------------------------------------

    @property
    def running_id(self) -> str:
        """Id of the profile under way, "" if there is none."""
        job = self._job
        return "" if job is None else job.spec.profile_id

    def start(self, spec: ProfileSpec, rank_name: str) -> str:
        """Begin a profile with the next step, or the one it names; "" or why not. Blocks: seconds the first time.

        rank_name: part of the names of traces, since the ranks of a node share their root.
        """
        prefix = f"{spec.prefix}-" if spec.prefix else ""
        stem = f"{prefix}{spec.profile_id}-{rank_name}"
        try:
            folder = self._folder_of(spec, stem)
            activities, _ = self._activities(spec)
        except (ValueError, OSError) as error:
            return str(error)
        self._warm_up()
        with self._lock:
            if self._job is not None:
                return IN_PROGRESS
            self._job = _Job(spec, stem, folder, activities, self._max_steps)
        return ""

    def stop(self) -> Future[Profiled] | None:
        """End the profile under way; its future ends when the traces are written. None: there is none."""
        with self._lock:
            job = self._job
            if job is not None:
                job.must_stop = True
        if job is None:
            return None
        self.wake()
        return job.ended

    def close(self) -> None:
        """Wait for what is being written; what was not stopped is lost."""
        self._writer.shutdown()

    # --- the engine's thread ------------------------------------------------------------------------------------------

    def look(self) -> None:
        """Between two steps: end what was stopped meanwhile."""
        job = self._job
        if job is not None and job.must_stop:
            self._end(job)

    @contextmanager
    def step(self, batch: Batch) -> Iterator[None]:
        """Around one step; costs nothing while nothing is asked for."""
        job = self._job
        if job is None or job.ended.done():
            yield
            return
        self._begin_step(job, batch)
        recording = job.recording
        if recording is None or not recording.is_collecting:
            yield
            return
        stage = job.stage_of(batch) or "step"
        with record_function(f"{stage} {batch.step}: {len(batch.q_lens)} rows, {batch.num_tokens} tokens"):
            yield
        recording.num_steps += 1
        if recording.num_steps >= job.num_steps:
            self._end_recording(job)
            if not job.stages_left:
                self._end(job)

    def _begin_step(self, job: _Job, batch: Batch) -> None:
        """Record this step if it is one of those wanted."""
        spec, stage = job.spec, job.stage_of(batch)
        if spec.start_step is not None and batch.step < spec.start_step:
            return
        try:
            if job.recording is None and stage in job.stages_left:
                job.recording = _Recording(stage, self._new_session(job))
            elif job.recording is not None and (stage == job.recording.stage) != job.recording.is_collecting:
                job.recording.is_collecting = stage == job.recording.stage
                job.recording.session.toggle_collection_dynamic(job.recording.is_collecting, job.activities)
        except RuntimeError as error:
            self._fail(job, error)

    def _new_session(self, job: _Job) -> Any:
        spec = job.spec
        session = self._record(
            activities=job.activities,
            record_shapes=spec.record_shapes,
            with_stack=spec.with_stack,
            profile_memory="MEM" in spec.activities,
        )
        session.start()
        return session

    def _end_recording(self, job: _Job) -> None:
        """Stop what is being recorded and have it written."""
        recording, job.recording = job.recording, None
        if recording is None:
            return
        job.stages_left.remove(recording.stage)
        try:
            recording.session.stop()
        except RuntimeError as error:
            self._fail(job, error)
            return
        suffix = f"-{recording.stage}" if recording.stage else ""
        path = job.folder / f"{job.stem}{suffix}{TRACE_SUFFIX}"
        job.written.append(self._writer.submit(self._write, recording, path))

    def _fail(self, job: _Job, error: RuntimeError) -> None:
        log.error("profile %s failed: %s", job.spec.profile_id, error)
        job.failure = f"torch's profiler failed: {str(error).splitlines()[0][:200] if str(error) else 'no reason'}"
        job.recording = None
        job.must_stop = True

    def _end(self, job: _Job) -> None:
        """No further step is recorded; the rest happens on the writer's thread."""
        if job.ended.done() or job.ended.running():
            return
        job.ended.set_running_or_notify_cancel()
        self._end_recording(job)
        self._writer.submit(self._close_job, job)

    # --- the writer's thread ------------------------------------------------------------------------------------------

    def _write(self, recording: _Recording, path: Path) -> Trace:
        """A trace appears whole, or not at all."""
        unfinished = path.with_name(f".{path.name}")
        recording.session.export_chrome_trace(str(unfinished))
        unfinished.rename(path)
        name = str(path.relative_to(self._root.resolve()))
        return Trace(name, path.stat().st_size, recording.stage, recording.num_steps)

    def _close_job(self, job: _Job) -> None:
        traces: list[Trace] = []
        message, is_failed = job.failure or self._activities(job.spec)[1], bool(job.failure)
        for writing in job.written:
            try:
                traces.append(writing.result())
            except (OSError, RuntimeError) as error:
                log.error("a trace of profile %s was not written: %s", job.spec.profile_id, error)
                is_failed = True
                message = f"a trace could not be written: {getattr(error, 'strerror', None) or 'torch failed'}"
        if not traces and not message:
            message = "no step was recorded: the engine was idle, or the profile's first step has not come"
        with self._lock:
            self._job = None
        job.ended.set_result(Profiled(job.spec.profile_id, tuple(traces), message, is_failed))

    # --- before a start -----------------------------------------------------------------------------------------------

    def _folder_of(self, spec: ProfileSpec, stem: str) -> Path:
        """The folder of its traces, made if need be. Raises ValueError when it lies outside, or the id was used."""
        root = self._root.resolve()
        folder = (root / spec.folder).resolve()
        if not folder.is_relative_to(root):
            raise ValueError("output_dir must lie below the root of traces (configs: profiling.root)")
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(folder.glob(f"{stem}*{TRACE_SUFFIX}")):
            raise ValueError(f"profile_id {spec.profile_id!r} was used before; choose another")
        return folder

    def _activities(self, spec: ProfileSpec) -> tuple[list[ProfilerActivity], str]:
        """torch's names of what is recorded, and what of it this device has not. Raises ValueError if nothing is left.

        CPU is always among them: without it a trace names no step.
        """
        has_gpu = self._device.type != "cpu"
        missing = "GPU was asked for; this rank computes on the CPU" if "GPU" in spec.activities and not has_gpu else ""
        if missing and spec.activities == ("GPU",):
            raise ValueError(missing)
        wants_gpu = has_gpu and (not spec.activities or "GPU" in spec.activities)
        return [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if wants_gpu else [])], missing

    def _warm_up(self) -> None:
        """The first recording of a process imports 800 modules (4 s): not on the engine's thread."""
        with self._lock:
            if self._is_warm or self._job is not None:
                return
            session = self._record(activities=[ProfilerActivity.CPU])
            session.start()
            session.stop()
            self._is_warm = True
