"""The command line. Each command reads its arguments, calls one function, and turns what it says into an exit status.

0: done. 1: the server said no, or something failed. 2: the arguments or settings cannot work.
"""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from configs.errors import ConfigError, TidegateError
from configs.load import load_settings
from tidegate.progress import Progress

app = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, help="Serve language models on Ray.")


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DemoSize(StrEnum):
    tiny = "tiny"
    small = "small"


def main() -> None:
    """Entry point of the `tidegate` command: an error of ours is one line, never a stack trace."""
    console = Console(stderr=True)
    try:
        app()
    except TidegateError as error:
        console.print(f"tidegate: {error.message}", style="red", soft_wrap=True, highlight=False, markup=False)
        raise SystemExit(2 if isinstance(error, ConfigError) else 1) from None


@app.command()
def serve(
    model: Annotated[Path | None, typer.Option(help="Directory in Hugging Face format; without it, the demo.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options given here win.")] = None,
    dp: Annotated[int | None, typer.Option(help="Data-parallel ranks. Demo: 2.")] = None,
    device: Annotated[Device | None, typer.Option(help="Where ranks compute.")] = None,
    host: Annotated[str | None, typer.Option(help="Address of the HTTP door.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the HTTP door.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the gRPC door, on 127.0.0.1.")] = None,
    dashboard_port: Annotated[int | None, typer.Option(help="Port of the Ray dashboard.")] = None,
    served_name: Annotated[str | None, typer.Option(help="The model's name in the routes.")] = None,
    api_key: Annotated[str | None, typer.Option(envvar="TIDEGATE_API_KEY", help="Key of inference routes.")] = None,
    admin_key: Annotated[str | None, typer.Option(envvar="TIDEGATE_ADMIN_KEY", help="Key of admin routes.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Sockets, log, demo model, local Ray.")] = None,
) -> None:
    """Start a local Ray, serve a model on it, and end everything with Ctrl-C."""
    given: dict[str, Any] = {
        "model.path": model,
        "model.served_name": served_name,
        "dp": dp,
        "engine.device": None if device is None else device.value,
        "api.host": host,
        "api.port": port,
        "grpc.port": grpc_port,
        "ray.dashboard_port": dashboard_port,
        "api.api_key": api_key,
        "api.admin_key": admin_key,
        "state_dir": state_dir,
    }
    if model is None and config is None:
        # the demo shows what one rank cannot: verdicts of several
        given["dp"] = dp or 2
    settings = load_settings(config, {name: value for name, value in given.items() if value is not None})
    # Ray and Serve take a second to import, which no other command needs
    from deployments.app import bind
    from tidegate.local import LocalServer

    raise typer.Exit(LocalServer(settings, bind, Progress(Console())).run())


@app.command("demo-model")
def demo_model(
    directory: Annotated[Path, typer.Argument(help="Where to write it; made if absent.")],
    size: Annotated[DemoSize, typer.Option(help="tiny is for tests, small for a demo.")] = DemoSize.small,
) -> None:
    """Write a random-weight Llama with tokenizer and chat template; the same bytes on every machine, no download."""
    from engine.demo_model import write_demo_model

    write_demo_model(directory, size.value)
    Console().print(f"{size.value} demo model: {directory}", soft_wrap=True, highlight=False, markup=False)
