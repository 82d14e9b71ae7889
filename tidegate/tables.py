"""What the commands print: answers of the server as text for people."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, TypeAlias

from rich.console import Group
from rich.table import Table
from rich.text import Text

Shown: TypeAlias = Group

#: columns of free text; a cut id is no id, so all others stay whole
_FOLDED = (
    "state",
    "verdict",
    "in the way",
    "found",
    "what to do",
    "lease",
    "caller",
    "asked for",
    "outcome",
    "verdicts",
)


def one_line(answer: Mapping[str, Any]) -> str:
    """The answer as one line of JSON, for scripts."""
    return json.dumps(answer, separators=(",", ":"))


def flush(answer: Mapping[str, Any]) -> Shown:
    """A flush's verdict: one line for the whole, one row per rank and host tier; verdicts that came late after them."""
    table = _table("rank", "incarnation", "verdict", "waited", "freed pages", "freed", "in the way")
    for row in answer.get("ranks") or ():
        table.add_row(*_rank_verdict(row, str(row.get("rank"))))
    for row in answer.get("host_tiers") or ():
        freed = (str(row.get("freed_pages", 0)), _size(row.get("freed_bytes", 0)))
        table.add_row("host", str(row.get("node"))[:12], _verdict(row), "", *freed, "")
    for row in answer.get("late") or ():
        table.add_row(*_rank_verdict(row, f"{row.get('rank')}, late"))
    facts = ("mode", "epoch", "took_ms", "flush_id", "dry_run", "replayed", "superseded_by")
    return Group(_headline(answer, facts), *_if_rows(table))


def cancelled(answer: Mapping[str, Any]) -> Shown:
    """What became of the cancelling, and of the flush."""
    ended = answer.get("flush")
    return Group(_headline(answer, ()), *([flush(ended)] if ended else []))


def cache(answer: Mapping[str, Any]) -> Shown:
    """How full each tier is, the pages of every rank, and the lease of every node."""
    tiers = _table("tier", "pages", "free", "cached", "in use", "fenced", "used", "a flush frees")
    for row in answer.get("occupancy") or ():
        share = f"{100 * row.get('used', 0.0):.0f} %"
        tiers.add_row(str(row.get("tier")), *_pages(row), share, _size(row.get("cached_bytes", 0)))
    ranks = _table("rank", "incarnation", "state", "epoch", "pages", "free", "cached", "in use", "fenced")
    for row in answer.get("ranks") or ():
        known = (str(row.get("rank")), str(row.get("incarnation")), _verdict(row), str(row.get("epoch", "")))
        ranks.add_row(*known, *_pages(row))
    nodes = _table("node", "floor", "lease", "heard")
    for row in answer.get("nodes") or ():
        lease = "yes" if row.get("has_lease") else f"no: {row.get('message') or 'over'}"
        heard = "never" if row.get("silent_s") is None else f"{row['silent_s']:.1f} s ago"
        nodes.add_row(str(row.get("node")), str(row.get("floor")), lease, heard)
    lines = [_headline(answer, ("epoch", "floor", "lineage", "controller_restarts"))]
    pending = answer.get("pending_flush")
    if pending:
        lines.append(Text(f"a flush is pending: {one_line(pending)}"))
    return Group(*lines, *_if_rows(tiers), *_if_rows(ranks), *_if_rows(nodes))


def audit(answer: Mapping[str, Any]) -> Shown:
    """Flushes and control calls, the newest first."""
    table = _table("at", "caller", "call", "asked for", "outcome", "took", "flush id", "verdicts")
    for entry in answer.get("entries") or ():
        took = f"{entry['took_ms']:.1f} ms" if "took_ms" in entry else ""
        table.add_row(
            str(entry.get("at", ""))[:19], str(entry.get("caller", "")), str(entry.get("call")), _asked(entry),
            _verdict(entry), took, str(entry.get("flush_id", "")), _tally(entry.get("ranks") or ()),
        )  # fmt: skip
    return Group(_headline(answer, ()), *_if_rows(table))


def status(answer: Mapping[str, Any]) -> Shown:
    """What is served, and the load of every rank."""
    table = _table(
        "rank", "incarnation", "state", "running", "waiting", "tokens in use", "of", "tokens/s", "cache hits"
    )
    for row in answer.get("ranks") or ():
        table.add_row(
            str(row.get("dp_rank")), str(row.get("incarnation")), _verdict(row), str(row.get("num_running_reqs", "")),
            str(row.get("num_waiting_reqs", "")), str(row.get("num_used_tokens", "")),
            str(row.get("max_total_num_tokens", "")), f"{row.get('gen_throughput', 0.0):.0f}",
            f"{100 * row.get('cache_hit_rate', 0.0):.0f} %",
        )  # fmt: skip
    return Group(_headline(answer, ("model", "version", "context_length", "epoch", "controller")), *_if_rows(table))


def profile(answer: Mapping[str, Any]) -> Shown:
    """A profile's start or stop, one row per rank and trace."""
    table = _table("rank", "incarnation", "state", "trace", "size", "steps")
    for row in answer.get("ranks") or ():
        for trace in row.get("traces") or ({},):
            size = _size(trace["bytes"]) if trace else ""
            name, steps = str(trace.get("name", "")), str(trace.get("num_steps", ""))
            table.add_row(str(row.get("rank")), str(row.get("incarnation")), _verdict(row), name, size, steps)
    return Group(_headline(answer, ("profile_id",)), *_if_rows(table))


def traces(answer: Mapping[str, Any]) -> Shown:
    """The traces that all nodes have, and what is being recorded."""
    table = _table("trace", "size", "written", "node")
    for trace in answer.get("traces") or ():
        written = datetime.fromtimestamp(trace["modified_s"], UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
        table.add_row(trace["name"], _size(trace["bytes"]), written, str(trace.get("node"))[:12])
    lines = [Text(f"rank {rank} records profile {of}") for rank, of in (answer.get("running") or {}).items()]
    return Group(_headline(answer, ()), *lines, *_if_rows(table))


def doctor(answer: Mapping[str, Any]) -> Shown:
    """What was checked on this machine, and what to do about it."""
    table = _table("check", "state", "found", "what to do")
    colours = {"ok": "green", "warning": "yellow", "failed": "red"}
    for row in answer["findings"]:
        state = Text(row["status"], colours[row["status"]])
        table.add_row(row["check"], state, row["found"], row["advice"])
    return Group(_headline(answer, ()), *_if_rows(table))


def _headline(answer: Mapping[str, Any], facts: tuple[str, ...]) -> Text:
    is_good = answer.get("success") is True
    words = str(answer.get("message") or answer.get("status") or ("ok" if is_good else "not every rank answers"))
    known = [name for name in facts if answer.get(name) is not None and answer[name] is not False]
    rest = ", ".join(f"{name} {answer[name]}" for name in known)
    return Text.assemble((words, "green" if is_good else "red"), f"  ({rest})" if rest else "")


def _rank_verdict(row: Mapping[str, Any], rank: str) -> tuple[str, ...]:
    return (
        rank, str(row.get("incarnation")), _verdict(row), f"{row.get('waited_ms', 0.0):.1f} ms",
        str(row.get("freed_pages", 0)), _size(row.get("freed_bytes", 0)), _blockers(row.get("blockers") or {}),
    )  # fmt: skip


def _pages(row: Mapping[str, Any]) -> tuple[str, ...]:
    """Pages by state; empty for a rank that did not answer."""
    if "num_pages" not in row:
        return ("",) * 5
    in_use = row["num_pinned_pages"] + row["num_private_pages"] + row["num_copying_pages"]
    numbers = (row["num_pages"], row["num_free_pages"], row["num_cached_pages"], in_use, row["num_fenced_pages"])
    return tuple(map(str, numbers))


def _asked(entry: Mapping[str, Any]) -> str:
    """The arguments of a call, without those that say nothing."""
    if "arguments" in entry:
        # as they came, quotes and all
        return ", ".join(f"{name} {value}" for name, value in entry["arguments"].items() if name != "caller")
    names = ("mode", "timeout_s", "tiers", "scope", "dry_run", "request_ids", "replayed")
    return ", ".join(f"{name} {_plain(entry[name])}" for name in names if entry.get(name) not in (None, False, 0.0))


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _tally(rows: Sequence[Sequence[Any]]) -> str:
    """Verdicts and how many ranks gave each."""
    return ", ".join(f"{number} {verdict}" for verdict, number in Counter(row[2] for row in rows).items())


def _verdict(row: Mapping[str, Any]) -> str:
    message = row.get("message")
    return f"{row.get('status')}: {message}" if message else str(row.get("status"))


def _blockers(blockers: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {name.replace('_', ' ')}" for name, number in blockers.items() if number)


def _size(num_bytes: int) -> str:
    return f"{num_bytes / (1 << 20):.1f} MiB"


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column not in _FOLDED, overflow="fold")
    return table


def _if_rows(table: Table) -> tuple[Table, ...]:
    return (table,) if table.row_count else ()
