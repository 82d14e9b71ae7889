"""What several commands share: where the server is, the keys, how an answer is shown and what status it ends with."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Annotated, Any

import typer
from rich.console import Console

from tidegate import tables
from tidegate.client import ADMIN_KEY_VARIABLE, API_KEY_VARIABLE

DEFAULT_URL = "http://127.0.0.1:8000"

Url = Annotated[str, typer.Option(envvar="TIDEGATE_URL", help="Where the server listens.")]
ApiKey = Annotated[str | None, typer.Option(envvar=API_KEY_VARIABLE, help="Key of inference routes.")]
AdminKey = Annotated[
    str | None, typer.Option(envvar=ADMIN_KEY_VARIABLE, help="Key of admin routes, if the server has one.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the server's JSON instead of a table.")]

_PIPE_WIDTH = 1000


def show(answer: Mapping[str, Any], table: tables.Shown, as_json: bool) -> None:
    """Print the answer. Raises typer.Exit with status 1 unless it is a success."""
    if as_json:
        print(tables.one_line(answer))
    else:
        # a pipe has no width; what reads it wants a row per line
        Console(width=None if sys.stdout.isatty() else _PIPE_WIDTH).print(table, highlight=False)
    if answer.get("success") is not True:
        raise typer.Exit(1)
