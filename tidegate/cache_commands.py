"""`tidegate flush`, `cache` and `audit`. Status 0 only if what was asked for is done, on every rank and tier."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from enum import StrEnum
from typing import Annotated, Any

import typer

from configs.errors import ConfigError
from tidegate import tables
from tidegate.client import NoAnswer, RawClient
from tidegate.options import DEFAULT_URL, AdminKey, AsJson, Url, show

#: options that go with --cancel and --read
_ABOUT_ONE = frozenset({"url", "admin_key", "as_json", "cancel", "read"})


class Mode(StrEnum):
    wait = "wait"
    drain = "drain"
    retract = "retract"
    abort = "abort"
    fence = "fence"


def flush(
    context: typer.Context,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    mode: Annotated[Mode, typer.Option(help="What becomes of running requests.")] = Mode.wait,
    timeout: Annotated[float, typer.Option(help="Seconds to wait for an idle moment; 0: now or refuse.")] = 0.0,
    tiers: Annotated[
        list[str] | None, typer.Option("--tiers", "--tier", help="Only these tiers, parted by commas.")
    ] = None,
    namespace: Annotated[str | None, typer.Option(help="Only this namespace (cache_salt).")] = None,
    adapter: Annotated[str | None, typer.Option(help="Only this adapter.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Only what begins with this text (its first page).")] = None,
    older_than: Annotated[float | None, typer.Option(help="Only what is older than so many seconds.")] = None,
    flush_id: Annotated[
        str | None, typer.Option("--id", "--flush-id", help="A repeat with the same id joins or re-reads the first.")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and flush nothing.")] = False,
    cancel: Annotated[str | None, typer.Option(metavar="ID", help="End this flush, if it has not begun.")] = None,
    read: Annotated[
        str | None, typer.Option(metavar="ID", help="What became of this flush, late verdicts too.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Flush the cache of every rank. Exit status 0 only if every rank and tier did."""
    client = RawClient(url, admin_key)
    if cancel is not None or read is not None:
        _refuse_others(context, both=cancel is not None and read is not None)
        if cancel is not None:
            answer = client.cancel(cancel)
            return show(answer, tables.cancelled(answer), as_json)
        answer = client.read(read or "")
        return show(answer, tables.flush(answer), as_json)
    scope = {"namespace": namespace, "adapter": adapter, "prefix_text": prefix, "older_than_s": older_than}
    answer = _flush(
        client,
        timeout_s=timeout,
        mode=mode.value,
        tiers=[tier for part in tiers for tier in part.split(",")] if tiers else None,
        scope={name: value for name, value in scope.items() if value is not None} or None,
        flush_id=flush_id or f"cli-{secrets.token_hex(8)}",
        dry_run=dry_run,
    )
    show(answer, tables.flush(answer), as_json)


def cache(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """Epoch, floor, pending flush, how full the tiers are, and every rank and node. Status 0 only if all answer."""
    answer = RawClient(url, admin_key).cache()
    show(answer, tables.cache(answer), as_json)


def audit(
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    limit: Annotated[int, typer.Option(help="Number of entries, the newest first.")] = 20,
    flush_id: Annotated[str | None, typer.Option("--id", "--flush-id", help="Only those of this flush.")] = None,
    as_json: AsJson = False,
) -> None:
    """Who asked for which flush or control call, refused ones too, and what came of it."""
    answer = RawClient(url, admin_key).audit(limit, flush_id)
    show(answer, tables.audit(answer), as_json)


def _flush(client: RawClient, *, flush_id: str, **arguments: Any) -> Mapping[str, Any]:
    """The flush, under an id by which it can be asked about when its answer is lost."""
    try:
        return client.flush(flush_id=flush_id, **arguments)
    except NoAnswer as error:
        raise NoAnswer(f"{error.message}; what became of it: tidegate flush --read {flush_id}") from None


def _refuse_others(context: typer.Context, both: bool) -> None:
    """Nothing that was written on the command line is ignored."""
    sources = {name: context.get_parameter_source(name) for name in context.params if name not in _ABOUT_ONE}
    given = [name for name, source in sources.items() if source is not None and source.name == "COMMANDLINE"]
    if both or given:
        other = given[0].replace("_", "-") if given else "read"
        raise ConfigError(f"--cancel and --read take the id of one flush and nothing else; got --{other} as well")
