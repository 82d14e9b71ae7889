"""Every metric of Tidegate: name, unit, labels, in one file. They appear in Ray's dashboard and Prometheus exporter.

Ray puts `ray_` before a name and `_total` behind a counter's. A restarted process begins new series: queries sum over
`WorkerId`. Labels never carry ids of requests, flushes or incarnations.
"""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Iterable, Mapping
from dataclasses import fields
from typing import Any, get_args

from ray.util.metrics import Counter, Gauge, Histogram

from actors.messages import HostReport
from cache.host_reader import MissReason
from cache.host_tier import CommitOutcome
from engine.copy_jobs import HostCounters
from engine.flush import FlushCommand, FlushVerdict
from engine.request import Output
from engine.snapshot import Counters, EngineSnapshot

_WAIT_BOUNDARIES_S = [0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0]

_PAGE_STATES = ("free", "cached", "pinned", "private", "fenced", "copying")


class ControlMetrics:
    """What the controller reports."""

    def __init__(self) -> None:
        self._flushes = Counter(
            "tidegate_flushes", "Flushes answered by the controller, refused ones too.", tag_keys=("mode", "outcome")
        )
        self._wait = Histogram(
            "tidegate_flush_wait_seconds",
            "From the receipt of a flush to its answer.",
            boundaries=_WAIT_BOUNDARIES_S,
            tag_keys=("mode", "outcome"),
        )
        self._verdicts = Counter(
            "tidegate_flush_rank_verdicts", "Verdicts of single ranks about flushes.", tag_keys=("mode", "verdict")
        )
        self._host_verdicts = Counter(
            "tidegate_flush_host_verdicts", "What single host tiers did about flushes.", tag_keys=("mode", "verdict")
        )
        self._host_pages = Counter(
            "tidegate_flush_freed_host_pages", "Host pages that flushes have made void.", tag_keys=("node",)
        )
        self._host_bytes = Counter("tidegate_flush_freed_host_bytes", "Bytes of these pages.", tag_keys=("node",))
        self._epoch = Gauge("tidegate_epoch", "Newest epoch allotted by the controller.")
        self._floor = Gauge("tidegate_floor", "Lowest epoch whose KV may still be used.")
        self._nodes = Gauge("tidegate_nodes", "Nodes with ranks by what the controller grants.", tag_keys=("state",))
        self._since_flush = Gauge("tidegate_seconds_since_flush", "Since the last success of a flush of everything.")
        self._ranks = Gauge("tidegate_ranks", "Registered ranks by state.", tag_keys=("state",))

    def flush_ended(self, answer: Mapping[str, Any]) -> None:
        """One flush was answered; `answer` is what the caller got."""
        is_counted_only = answer["dry_run"] and answer["success"]
        tags = {"mode": answer["mode"], "outcome": "dry_run" if is_counted_only else answer["status"]}
        self._flushes.inc(1, tags)
        self._wait.observe(answer["took_ms"] / 1000, tags)
        for rows, verdicts in ((answer["ranks"], self._verdicts), (answer["host_tiers"], self._host_verdicts)):
            for row in rows:
                verdict = "dry_run" if answer["dry_run"] and row["status"] == "flushed" else row["status"]
                verdicts.inc(1, {"mode": answer["mode"], "verdict": verdict})
        for row in () if answer["dry_run"] else answer["host_tiers"]:
            self._host_pages._record(row["freed_pages"], tags={"node": row["node"]})
            self._host_bytes._record(row["freed_bytes"], tags={"node": row["node"]})

    def epoch(self, epoch: int) -> None:
        self._epoch.set(epoch)

    def floor(self, floor: int) -> None:
        self._floor.set(floor)

    def nodes(self, num_leased: int, num_unleased: int) -> None:
        """Ranks of a node without a lease serve uncached."""
        self._nodes.set(num_leased, {"state": "leased"})
        self._nodes.set(num_unleased, {"state": "unleased"})

    def seconds_since_flush(self, seconds: float) -> None:
        self._since_flush.set(seconds)

    def ranks(self, num_serving: int, num_lost: int) -> None:
        self._ranks.set(num_serving, {"state": "serving"})
        self._ranks.set(num_lost, {"state": "lost"})


class TierMetrics:
    """What a node's agent reports of its host tier."""

    def __init__(self, node_id: str) -> None:
        self._node = {"node": node_id[:12]}
        self._seen: Counts[str] = Counts()
        self._slots = Gauge(
            "tidegate_host_slots", "Slots of the node's host tier by state.", tag_keys=("node", "state")
        )
        self._bytes = Gauge("tidegate_host_bytes", "Size of the node's arena.", tag_keys=("node",))
        self._valid = Gauge(
            "tidegate_host_valid_pages", "Committed pages that a reader may still find.", tag_keys=("node",)
        )
        self._ranks = Gauge("tidegate_host_ranks", "Ranks that use the node's host tier.", tag_keys=("node",))
        self._pages = Counter(
            "tidegate_host_tier_pages", "Pages and slots by what became of them.", tag_keys=("node", "event")
        )

    def report(self, report: HostReport, events: Mapping[str, int]) -> None:
        """Bring everything up to this. events: totals since the file was opened; fewer than before: it is another."""
        for state in ("free", "leased", "committed", "quarantined"):
            self._slots.set(getattr(report, state), self._node | {"state": state})
        self._bytes.set(report.file_bytes, self._node)
        self._valid.set(report.valid, self._node)
        self._ranks.set(report.num_ranks, self._node)
        if any(events.get(name, 0) < seen for name, seen in self._seen.items()):
            self._seen.clear()
        for event, total in list(events.items()):
            self._pages._record(total - self._seen[event], tags=self._node | {"event": event})
            self._seen[event] = total


class ApiMetrics:
    """What one Api replica reports."""

    def __init__(self) -> None:
        self._inflight = Gauge("tidegate_api_inflight_sequences", "From admission to the end of the stream.")
        self._sequences = Counter(
            "tidegate_api_sequences", "Sequences sent to ranks, by attempt.", tag_keys=("attempt",)
        )
        self._stale = Counter(
            "tidegate_stale_answers", "Answers stopped because they rested on KV below a known floor; never one."
        )
        self._tokens = Gauge("tidegate_api_inflight_tokens", "Tokens of these, prompts and outputs so far.")
        self._dropped = Counter("tidegate_api_dropped_frames", "Frames of another incarnation or attempt.")
        self._lost = Counter("tidegate_api_lost_connections", "Connections to ranks that broke.")
        self._responses = Counter("tidegate_http_responses", "HTTP responses begun.", tag_keys=("route", "status"))
        self._seen: dict[tuple[str, ...], int] = {}

    def report(
        self,
        num_inflight: int,
        *,
        num_inflight_tokens: int,
        num_sequences: int,
        num_resent: int,
        num_stale: int,
        num_dropped_frames: int,
        num_lost_connections: int,
        responses: Mapping[tuple[str, int], int],
    ) -> None:
        """Bring everything up to these totals; called on a timer. responses: (route, status) -> number."""
        self._inflight.set(num_inflight)
        self._add(self._sequences, num_sequences, attempt="first")
        self._add(self._sequences, num_resent, attempt="again")
        self._add(self._stale, num_stale)
        self._tokens.set(num_inflight_tokens)
        self._add(self._dropped, num_dropped_frames)
        self._add(self._lost, num_lost_connections)
        for (route, status), number in responses.items():
            self._add(self._responses, number, route=route, status=str(status))

    def _add(self, counter: Counter, total: int, **labels: str) -> None:
        series = (counter.info["name"], *labels.values())
        # As in RankMetrics: a series that begins with its first event hides that event from rate().
        counter._record(total - self._seen.get(series, 0), tags=labels)
        self._seen[series] = total


class RankMetrics:
    """What one rank reports. Counters come from the engine's snapshots, so no step pays for them."""

    def __init__(self, rank: int) -> None:
        self._rank = {"rank": str(rank)}
        self._seen = Counters()
        self._num_evicted = 0
        #: requests whose first token was observed and which have not ended
        self._begun: set[str] = set()
        self._requests = _counter("tidegate_requests", "Requests that have ended.", "outcome")
        self._steps = _counter("tidegate_steps", "Engine steps.", "outcome")
        self._prompt_tokens = _counter("tidegate_prompt_tokens", "Tokens of requests at their admissions.")
        self._cached_tokens = _counter("tidegate_cached_tokens", "Those of them whose KV was in the cache.")
        self._prefill_tokens = _counter("tidegate_prefill_tokens", "Tokens computed in prefill rows.")
        self._generated_tokens = _counter("tidegate_generated_tokens", "Tokens sampled.")
        self._retractions = _counter("tidegate_retractions", "Running requests that gave way to others.")
        self._evicted_pages = _counter("tidegate_evicted_pages", "KV pages evicted from the device cache.")
        self._violations = _counter("tidegate_cache_violations", "Violations found by the cache's own check.")
        self._first_token = _histogram("tidegate_time_to_first_token_seconds", "Arrival at the rank to first token.")
        self._queue_wait = _histogram("tidegate_queue_wait_seconds", "Arrival at the rank to first admission.")
        self._flushes = _counter("tidegate_rank_flushes", "Flushes that ended on this rank.", "mode", "verdict")
        self._flush_wait = _histogram("tidegate_rank_flush_wait_seconds", "Arrival of a flush to its verdict.", "mode")
        self._freed_pages = _counter("tidegate_flush_freed_pages", "Device pages that flushes have freed.", "tier")
        self._freed_bytes = _counter("tidegate_flush_freed_bytes", "Bytes of these pages.", "tier")
        self._running = _gauge("tidegate_running_requests", "Admitted requests, half-prefilled ones included.")
        self._queued = _gauge("tidegate_queued_requests", "Requests that wait for admission.")
        self._pages = _gauge("tidegate_kv_pages", "KV pages of the device pool by state.", "state")
        self._epoch = _gauge("tidegate_rank_epoch", "Epoch of the KV that this rank matches.")
        self._dropped = _gauge("tidegate_rank_dropped_frames", "Frames refused since the rank's start.")
        self._host_seen = HostCounters()
        self._host_found = _counter("tidegate_host_found_pages", "Pages that admissions found in the host tier.")
        self._host_hits = _counter("tidegate_host_loaded_pages", "Pages loaded from the host tier and verified.")
        self._host_misses = _counter(
            "tidegate_host_misses", "Chains cut short, by the reason of the page at the cut.", "reason"
        )
        self._host_bytes = _counter(
            "tidegate_host_copied_bytes", "Bytes copied from and to the host tier.", "direction"
        )
        self._host_copy_s = _counter("tidegate_host_copy_seconds", "Time that the copier spent on them.", "direction")
        self._host_writes = _counter(
            "tidegate_host_written_pages", "Pages written, by what the tier made of them.", "outcome"
        )
        self._host_drops = _counter(
            "tidegate_host_dropped_pages", "Pages that were to be written and were not.", "reason"
        )

    def renumber(self, rank: int) -> None:
        """Serve has given the rank another number. Ray goes on showing what was last set under the old one: nothing."""
        for gauge in (self._running, self._queued):
            gauge.set(0, self._rank)
        for state in _PAGE_STATES:
            self._pages.set(0, self._rank | {"state": state})
        self._rank = {"rank": str(rank)}

    def outputs(self, outputs: Iterable[Output]) -> None:
        """Look at one step's outputs for first tokens; O(outputs), and no call into Ray for all but first ones."""
        for output in outputs:
            if output.stats is None:
                continue
            if output.token_ids and output.request_id not in self._begun:
                self._begun.add(output.request_id)
                self._first_token.observe(output.stats.first_token_s, self._rank)
                self._queue_wait.observe(output.stats.queue_s, self._rank)
            if output.finish is not None:
                self._begun.discard(output.request_id)

    def flush_ended(self, command: FlushCommand, verdict: FlushVerdict) -> None:
        """One flush has its verdict on this rank. A dry run that went well is not counted as a flush."""
        is_dry = command.dry_run and verdict.status == "flushed"
        outcome = "dry_run" if is_dry else verdict.status
        self._flushes.inc(1, self._rank | {"mode": command.mode, "verdict": outcome})
        self._flush_wait.observe(verdict.waited_ms / 1000, self._rank | {"mode": command.mode})
        if not is_dry:
            self._add(self._freed_pages, verdict.freed_pages, tier="device")
            self._add(self._freed_bytes, verdict.freed_bytes, tier="device")

    def report(self, snapshot: EngineSnapshot, num_dropped_frames: int) -> None:
        """Bring everything up to `snapshot`; called on a timer."""
        new = self._growth(snapshot.counters)
        for reason in ("stop", "length", "abort", "error"):
            self._add(self._requests, new[f"num_finished_{reason}"], outcome=reason)
        self._add(self._steps, new["num_steps"], outcome="ok")
        self._add(self._steps, new["num_failed_steps"], outcome="failed")
        self._add(self._prompt_tokens, new["num_admitted_tokens"])
        self._add(self._cached_tokens, new["num_cached_tokens"])
        self._add(self._prefill_tokens, new["num_prefill_tokens"])
        self._add(self._generated_tokens, new["num_generated_tokens"])
        self._add(self._retractions, new["num_retractions"])
        self._add(self._violations, new["num_violations"])
        self._add(self._evicted_pages, snapshot.num_evicted_pages - self._num_evicted)
        self._num_evicted = snapshot.num_evicted_pages
        self._running.set(snapshot.num_running, self._rank)
        self._queued.set(snapshot.num_waiting, self._rank)
        self._epoch.set(snapshot.epoch, self._rank)
        self._dropped.set(num_dropped_frames, self._rank)
        for state in _PAGE_STATES:
            self._pages.set(getattr(snapshot, f"num_{state}_pages"), self._rank | {"state": state})
        if snapshot.host is not None:
            self._report_host(snapshot.host)

    def _report_host(self, now: HostCounters) -> None:
        """now: replaced as a whole by the engine, never changed."""
        seen, self._host_seen = self._host_seen, now
        self._add(self._host_found, now.num_found_pages - seen.num_found_pages)
        self._add(self._host_hits, now.num_loaded_pages - seen.num_loaded_pages)
        self._add(self._host_bytes, now.loaded_bytes - seen.loaded_bytes, direction="load")
        self._add(self._host_bytes, now.written_bytes - seen.written_bytes, direction="write")
        self._add(self._host_copy_s, now.load_s - seen.load_s, direction="load")
        self._add(self._host_copy_s, now.write_s - seen.write_s, direction="write")
        # what may come, and what came: a series is there before its first event
        for reason in {*get_args(MissReason), *now.misses}:
            self._add(self._host_misses, now.misses[reason] - seen.misses[reason], reason=reason)
        for outcome in {*get_args(CommitOutcome), *now.commits}:
            self._add(self._host_writes, now.commits[outcome] - seen.commits[outcome], outcome=outcome)
        for reason in now.drops:
            self._add(self._host_drops, now.drops[reason] - seen.drops[reason], reason=reason)

    def _growth(self, now: Counters) -> dict[str, int]:
        names = [field.name for field in fields(Counters)]
        grown = {name: getattr(now, name) - getattr(self._seen, name) for name in names}
        self._seen = now
        return grown

    def _add(self, counter: Counter, amount: float, **labels: str) -> None:
        # `inc` refuses 0, but a series that begins with its first event hides that event from rate() and increase().
        counter._record(amount, tags=self._rank | labels)


def _counter(name: str, description: str, *labels: str) -> Counter:
    return Counter(name, description, tag_keys=("rank", *labels))


def _gauge(name: str, description: str, *labels: str) -> Gauge:
    return Gauge(name, description, tag_keys=("rank", *labels))


def _histogram(name: str, description: str, *labels: str) -> Histogram:
    return Histogram(name, description, boundaries=_WAIT_BOUNDARIES_S, tag_keys=("rank", *labels))
