"""`tidegate profile`: record engine steps on every rank, list the traces, fetch one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from configs.errors import ConfigError
from tidegate import tables
from tidegate.options import DEFAULT_URL, AdminKey, AsJson, Url, show
from tidegate.sync_client import Client

app = typer.Typer(no_args_is_help=True, help="Record engine steps on every rank as torch traces.")


@app.command()
def start(
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
    steps: Annotated[int | None, typer.Option(help="End by itself after so many steps (of each stage).")] = None,
    start_step: Annotated[int | None, typer.Option(help="Begin with this engine step.")] = None,
    by_stage: Annotated[bool, typer.Option("--by-stage", help="A trace of prefill and one of decode steps.")] = False,
    activity: Annotated[list[str] | None, typer.Option(help="CPU, GPU or MEM; may be repeated.")] = None,
    stack: Annotated[bool, typer.Option(help="Python call stacks, at a price.")] = True,
    shapes: Annotated[bool, typer.Option(help="Shapes of tensors.")] = True,
    output_dir: Annotated[str | None, typer.Option(help="Folder below the ranks' root of traces.")] = None,
    prefix: Annotated[str | None, typer.Option(help="Put before the names of the traces.")] = None,
    profile_id: Annotated[str | None, typer.Option("--id", help="Names the traces; used once.")] = None,
    as_json: AsJson = False,
) -> None:
    """Begin on every rank, or on none. Exit status 1 if a profile is under way."""
    with Client(url, admin_key) as client:
        begun = client.start_profile(
            num_steps=steps,
            start_step=start_step,
            profile_by_stage=by_stage,
            activities=activity or None,
            with_stack=stack,
            record_shapes=shapes,
            output_dir=output_dir,
            profile_prefix=prefix,
            profile_id=profile_id,
        )
    show(begun.raw, tables.profile(begun.raw), as_json)


@app.command()
def stop(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """End the profile under way and wait until its traces are written. Exit status 1 if there is none."""
    with Client(url, admin_key) as client:
        ended = client.stop_profile()
    show(ended.raw, tables.profile(ended.raw), as_json)


@app.command("list")
def list_traces(url: Url = DEFAULT_URL, admin_key: AdminKey = None, as_json: AsJson = False) -> None:
    """The traces that all nodes have, newest first."""
    with Client(url, admin_key) as client:
        found = client.profiles()
    show(found.raw, tables.traces(found.raw), as_json)


@app.command()
def get(
    name: Annotated[str, typer.Argument(help="As `tidegate profile list` shows it.")],
    to: Annotated[Path | None, typer.Option(help="File to write; by default its own name, here.")] = None,
    url: Url = DEFAULT_URL,
    admin_key: AdminKey = None,
) -> None:
    """Fetch a trace; https://ui.perfetto.dev opens it."""
    file = to or Path(name.rpartition("/")[2])
    with Client(url, admin_key) as client:
        try:
            client.save_profile(name, file)
        except OSError as error:
            raise ConfigError(f"cannot write {file}: {error.strerror}") from None
    Console().print(f"{file}: {file.stat().st_size:,} bytes", soft_wrap=True, highlight=False, markup=False)
