"""What the commands print: answers of the server as text for people."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from rich.console import Group
from rich.table import Table
from rich.text import Text

Shown: TypeAlias = Group

#: columns of free text; a cut id is no id, so all others stay whole
_FOLDED = ("state", "verdict", "in the way", "found", "what to do")


def one_line(answer: Mapping[str, Any]) -> str:
    """The answer as one line of JSON, for scripts."""
    return json.dumps(answer, separators=(",", ":"))


def flush(answer: Mapping[str, Any]) -> Shown:
    """A flush's verdict: one line for the whole, one row per rank and host tier."""
    table = _table("rank", "incarnation", "verdict", "waited", "freed pages", "freed", "in the way")
    for row in answer.get("ranks") or ():
        table.add_row(
            str(row.get("rank")), str(row.get("incarnation")), _verdict(row), f"{row.get('waited_ms', 0.0):.1f} ms",
            str(row.get("freed_pages", 0)), _size(row.get("freed_bytes", 0)), _blockers(row.get("blockers") or {}),
        )  # fmt: skip
    for row in answer.get("host_tiers") or ():
        table.add_row("host", str(row.get("node"))[:12], _verdict(row), "", "", "", "")
    facts = ("mode", "epoch", "took_ms", "flush_id", "dry_run")
    return Group(_headline(answer, facts), *_if_rows(table))


def cache(answer: Mapping[str, Any]) -> Shown:
    """Pages of every rank."""
    table = _table("rank", "incarnation", "state", "epoch", "pages", "free", "cached", "in use", "fenced")
    for row in answer.get("ranks") or ():
        in_use = row.get("num_pinned_pages", 0) + row.get("num_private_pages", 0)
        table.add_row(
            str(row.get("rank")), str(row.get("incarnation")), _verdict(row), str(row.get("epoch", "")),
            str(row.get("num_pages", "")), str(row.get("num_free_pages", "")), str(row.get("num_cached_pages", "")),
            str(in_use), str(row.get("num_fenced_pages", "")),
        )  # fmt: skip
    lines = [_headline(answer, ("epoch", "floor", "lineage", "controller_restarts"))]
    pending = answer.get("pending_flush")
    if pending:
        lines.append(Text(f"a flush is pending: {one_line(pending)}"))
    return Group(*lines, *_if_rows(table))


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
