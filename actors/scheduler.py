"""One rank as a Ray actor: an engine thread, and a loop that always answers.

Requests come in over the data plane and go into the engine's inbox; tokens leave once per step. Control calls never
wait for the engine thread: what they need of it is its last snapshot, and a flush's deadline is a timer of the loop.
"""

from __future__ import annotations

import asyncio
import logging
import os
import platform
import threading
from collections.abc import Awaitable, Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from actors.data_plane import DataPlane
from actors.end_proofs import pid_namespace
from actors.endpoints import TcpDoor, socket_path, sweep_dead_sockets
from actors.grammar_queue import GrammarQueue
from actors.host_link import HostLink
from actors.messages import MESSAGE_VERSION, AbortCommand, RankRecord, Registered
from actors.metrics import RankMetrics
from actors.pace import Pace
from actors.place import Place, place_in_ray
from actors.process_proof import start_time_of
from actors.rank_engine import BuildEngine, EngineHooks, RankEngine, load_engine
from actors.rank_flushes import RankFlushes
from actors.rank_host import find_node_agent, host_facts, host_link
from actors.rank_profiles import RankProfiles
from actors.rank_words import NodePage, RankWords, boot_ns
from cache.shared_words import fence_for
from configs.schema import Settings
from engine.events import AbortRequested
from engine.flush import FlushCommand, FlushVerdict
from engine.flush_gate import PendingFlush
from engine.profile_spec import ProfileSpec
from engine.request import Output

log = logging.getLogger(__name__)

_REPORT_PERIOD_S = 1.0
#: exit status after the engine thread has died
EXIT_ENGINE_DIED = 70
#: for the last words of a dying rank to reach its clients
_LAST_WORDS_MS = 200
#: for the step under way at a stop; the replica that asked for it waits 2 s, then ends the process
_LAST_STEP_S = 1.5


class SchedulerActor:
    """A plain class, wrapped where it is created (deployments/rank.py). All methods belong to the actor's loop.

    `start` loads and listens, `join` lets the engine run; between the two the wrapper registers the rank, so that
    nothing is matched before the controller's epoch is known.
    """

    def __init__(
        self,
        settings: Settings,
        rank: int,
        incarnation: str,
        *,
        build_engine: BuildEngine = load_engine,
        find_place: Callable[[], Place] = place_in_ray,
        end_process: Callable[[int], Any] = os._exit,
        find_tier: Callable[[str], Awaitable[Any]] = find_node_agent,
    ) -> None:
        """settings: settled for this machine (configs.resolve). rank: Serve's number, which may change later."""
        self._settings = settings
        self._rank = rank
        self._incarnation = incarnation
        self._build_engine = build_engine
        self._find_place = find_place
        self._end_process = end_process
        self._find_tier = find_tier
        #: None: no host tier, or not joined yet
        self._host: HostLink | None = None
        self._registered: Registered | None = None
        #: read by the engine thread in every turn
        self._words = RankWords()
        self._page: NodePage | None = None
        self._socket_path: Path | None = None
        self._is_stopping = False
        self._report_timer: asyncio.TimerHandle | None = None
        self._loop: asyncio.AbstractEventLoop
        self._engine: RankEngine
        self._flushes: RankFlushes
        self._plane: DataPlane
        self._grammars: GrammarQueue
        self._profiles: RankProfiles
        self._metrics: RankMetrics
        self._pace: Pace
        self._record: RankRecord
        self._thread: threading.Thread

    # --- life ---------------------------------------------------------------------------------------------------------

    async def start(self) -> RankRecord:
        """Load the model and listen; what to register the rank with. Requests wait until `join`.

        Raises ConfigError when the settings cannot work with this model or on this machine.
        """
        self._loop = asyncio.get_running_loop()
        place = self._find_place()
        hooks = EngineHooks(self._words.read, self._hand_over, self._flush_ended)
        self._engine = await asyncio.to_thread(self._build_engine, self._settings, hooks)
        self._flushes = RankFlushes(
            self._engine.loop, lambda: boot_ns() / 1e9, self._words.raise_epoch, self._flush_refused
        )
        self._metrics = RankMetrics(self._rank)
        self._pace = Pace(self._engine.loop.snapshot(), self._loop.time())
        self._grammars = GrammarQueue(self._engine.grammars, self._engine.loop.post)
        self._profiles = RankProfiles(self._engine.profiler, self._settings.profiling_root, self._settings.profiling)
        self._plane = DataPlane(self._incarnation, self._grammars.submit, self._abort)
        self._record = self._listen(place)
        return self._record

    async def join(self, registered: Registered) -> None:
        """Serve from now on, with nothing older than what the controller has answered.

        Raises ConfigError if the node's control page cannot be mapped, or the settings ask for a host tier that this
        rank can never have.
        """
        self._page = NodePage(self._words, registered.lineage, registered.page, fence_for(platform.machine()))
        self._words.raise_epoch(max(registered.epoch, registered.floor))
        self._registered = registered
        self._record = replace(self._record, page_nonce=self._words.nonce)
        self._engine.loop.see_term(registered.term)
        if self._settings.host_tier.is_on:
            attach, flushes = self._engine.loop.attach_tier, self._flushes
            link = host_link(self._record, registered, attach, self._find_tier, lambda: flushes.early_sub_epochs)
            await link.begin()
            self._host = link
        self._flushes.serve(registered.lineage)
        self._thread = threading.Thread(target=self._run_engine, name="engine", daemon=True)
        self._thread.start()
        self._report()

    async def stop(self) -> None:
        """Leave at once: connections close, so the Apis send requests without a token elsewhere. Twice is once.

        Returns when the engine thread has ended, or, if its step takes longer, after 1.5 s.
        """
        if self._is_stopping:
            return
        self._is_stopping = True
        self._grammars.close()
        if self._registered is None:
            await self._close()
            return
        self._engine.loop.stop()
        await self._close()
        await asyncio.to_thread(self._thread.join, _LAST_STEP_S)
        if self._thread.is_alive():
            log.warning("rank %d: the step under way did not end within %.1f s of the stop", self._rank, _LAST_STEP_S)
        elif self._host is not None and not self._engine.loop.is_copying:
            # the copier ended with the engine's thread: nothing is written to a slot any more
            await self._host.leave()
        if self._host is not None:
            self._host.close()

    # --- control: always answers --------------------------------------------------------------------------------------

    async def hello(self) -> dict[str, Any]:
        """Sign of life. `stalled_s`: for how long the step under way has not ended."""
        is_joined = self._registered is not None
        return {
            "incarnation": self._incarnation,
            "rank": self._rank,
            "pid": os.getpid(),
            "message_version": MESSAGE_VERSION,
            "lineage": self._registered.lineage if self._registered is not None else "",
            "is_serving": is_joined and not self._is_stopping,
            "page_nonce": self._words.nonce,
            "stalled_s": self._pace.stalled_s(self._engine.loop.snapshot(), self._loop.time()) if is_joined else 0.0,
        }

    async def watch(self) -> None:
        """Never returns: the call's failure tells the caller that this process has ended."""
        await asyncio.Event().wait()

    async def flush(self, command: FlushCommand) -> FlushVerdict:
        """Flush at the next instant that the mode allows, or say why not, at the latest when the budget is used up.

        A repeat of a flush joins the first or reads its verdict again; no flush is executed twice.
        """
        return await self._flushes.flush(command)

    async def close_flush(self, flush_id: str, index: int, term: int) -> FlushVerdict:
        """For a controller that took over, or whose caller cancels: what became of a flush.

        index: of its intent in the control log.  Ends it if it has not begun; if it never came it will not be taken in
        any more.
        """
        return await self._flushes.close((flush_id, index), term)

    async def abort(self, command: AbortCommand) -> dict[str, Any]:
        """End requests within one step. Answers {num_aborted}: those that were open here; 0 if it comes too late."""
        if self._flushes.is_late(command.valid_until_s) or not self._engine.loop.see_term(command.term):
            return {"num_aborted": 0, "message": "The command came too late, or from a superseded controller."}
        ids = command.request_ids
        num_aborted = self._plane.num_open(None if ids is None else list(ids))
        self._grammars.abort(AbortRequested(ids, command.reason))
        return {"num_aborted": num_aborted}

    async def renumber(self, rank: int) -> RankRecord:
        """Serve has given this rank another number; the record to register it with again."""
        self._rank = rank
        self._metrics.renumber(rank)
        registered = self._registered
        self._record = replace(
            self._record,
            rank=rank,
            lineage=registered.lineage if registered is not None else "",
            epoch=self._engine.loop.snapshot().epoch,
            page_nonce=self._words.nonce,
        )
        return self._record

    async def status(self) -> dict[str, Any]:
        """The engine as it last was: load, pages by state, epoch, totals since the start. Plain data."""
        snapshot = self._engine.loop.snapshot()
        return asdict(replace(snapshot, host=None)) | {
            "host": host_facts(snapshot, self._host),
            "is_serving": not self._is_stopping,
            "num_running": snapshot.num_running,
            "max_running": self._settings.engine.max_running,
            "page_size": self._engine.page_size,
            "bytes_per_page": self._engine.bytes_per_page,
            "max_len": self._engine.max_len,
            "generated_tokens_per_s": self._pace.tokens_per_s,
        }

    # --- profiles: see RankProfiles -----------------------------------------------------------------------------------

    async def start_profile(self, spec: ProfileSpec) -> dict[str, Any]:
        return await self._profiles.start(spec, self._rank)

    async def stop_profile(self, profile_id: str | None) -> dict[str, Any]:
        return await self._profiles.stop(profile_id)

    async def list_profiles(self) -> dict[str, Any]:
        return await self._profiles.traces()

    async def read_profile(self, name: str, offset: int) -> bytes | None:
        return await self._profiles.read(name, offset)

    # --- requests and tokens ------------------------------------------------------------------------------------------

    def _abort(self, request_ids: list[str], reason: str) -> None:
        self._grammars.abort(AbortRequested(tuple(request_ids), reason))

    def _hand_over(self, outputs: list[Output]) -> None:
        """Engine thread: one call into the loop per step, whatever the number of tokens."""
        self._call_loop(self._deliver, outputs)

    def _call_loop(self, function: Callable[..., None], *args: object) -> None:
        """Any thread. A step that outlives `stop` may find the loop closed; nobody waits for its outcome."""
        try:
            self._loop.call_soon_threadsafe(function, *args)
        except RuntimeError:
            if not self._is_stopping:
                raise

    def _deliver(self, outputs: list[Output]) -> None:
        if not self._is_stopping:
            self._plane.deliver(outputs)
            self._metrics.outputs(outputs)

    def _flush_ended(self, pending: PendingFlush, verdict: FlushVerdict) -> None:
        """Whichever thread ended it."""
        log.info("flush %s (%s): %s %s", verdict.flush_id, pending.command.mode, verdict.status, verdict.message)
        self._call_loop(self._metrics.flush_ended, pending.command, verdict)

    def _flush_refused(self, command: FlushCommand, verdict: FlushVerdict) -> None:
        self._metrics.flush_ended(command, verdict)

    def _report(self) -> None:
        if self._page is not None:
            self._page.look()
        snapshot = self._engine.loop.snapshot()
        self._pace.note(snapshot, self._loop.time())
        self._metrics.report(snapshot, self._plane.num_dropped_frames)
        self._report_timer = self._loop.call_later(_REPORT_PERIOD_S, self._report)

    # --- the engine thread --------------------------------------------------------------------------------------------

    def _run_engine(self) -> None:
        if self._settings.engine.device == "cpu":
            _leave_a_core_free()
        try:
            self._engine.loop.run()
        except BaseException:
            # The process edge: whatever it was, a rank without its engine must not look alive.
            log.critical("the engine thread has died", exc_info=True)
            if self._is_stopping:
                return  # its clients were let go, and whoever stopped it ends the process
            asyncio.run_coroutine_threadsafe(self._die(), self._loop)

    async def _die(self) -> None:
        """Tell every client, then end the process: the wrapper sees that and a new incarnation begins empty."""
        self._is_stopping = True
        self._plane.fail_all(f"rank {self._rank} has failed while it served this request")
        await self._close(_LAST_WORDS_MS)
        logging.shutdown()
        self._end_process(EXIT_ENGINE_DIED)

    # --- listening ----------------------------------------------------------------------------------------------------

    def _listen(self, place: Place) -> RankRecord:
        """Open the doors; what the rank says of itself."""
        state_dir = self._settings.resolved_state_dir
        sweep_dead_sockets(state_dir)
        self._socket_path = socket_path(state_dir, self._incarnation)
        ipc_endpoint = f"ipc://{self._socket_path}"
        self._plane.bind_ipc(ipc_endpoint)
        tcp_endpoint = tcp_key = ""
        if self._settings.ray.tcp:
            door = TcpDoor.on(place.host)
            tcp_endpoint, tcp_key = self._plane.bind_tcp(door), door.public_key.decode()
        engine, pid = self._engine, os.getpid()
        return RankRecord(
            incarnation=self._incarnation,
            rank=self._rank,
            node_id=place.node_id,
            pid=pid,
            start_time=start_time_of(pid) or 0,
            gpu_ids=place.gpu_ids,
            ipc_endpoint=ipc_endpoint,
            tcp_endpoint=tcp_endpoint,
            tcp_key=tcp_key,
            actor_name=place.actor_name,
            lineage="",
            epoch=0,
            layout_digest=engine.layout_digest,
            weights_digest=engine.weights_digest,
            weight_version="default",
            page_size=engine.page_size,
            num_pages=engine.num_pages,
            bytes_per_page=engine.bytes_per_page,
            max_running=self._settings.engine.max_running,
            max_len=engine.max_len,
            pid_namespace=pid_namespace(),
        )

    async def _close(self, linger_ms: int = 0) -> None:
        if self._report_timer is not None:
            self._report_timer.cancel()
        await self._plane.close(linger_ms)
        if self._page is not None:
            self._page.close()
        if self._socket_path is not None:
            self._socket_path.unlink(missing_ok=True)


def _leave_a_core_free() -> None:
    """Keep this thread, and those that torch makes for it, off the first core of the machine.

    All CPU ranks of a node together then use one core less than there are, so that control loops, the controller and
    the doors run at once. With every core in a prefill a deadline was answered 50 to 150 ms late on two cores
    (tests/cluster/test_flush_under_traffic.py), niceness or not: each hop waits for its turn.
    """
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(threading.get_native_id(), cores[1:])
