"""The commands. Each reads its arguments, calls one function, and turns what it says into an exit status.

0: done. 1: the server said no, or something failed. 2: the arguments or settings cannot work. 3: no server answers.
"""

from __future__ import annotations

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
import yaml
from rich.console import Console

from configs.errors import ConfigError, InvalidField, TidegateError
from configs.load import load_settings
from configs.schema import ControlSettings, Settings
from tidegate import profile_commands, tables
from tidegate.cache_commands import audit, cache, flush
from tidegate.client import ADMIN_KEY_VARIABLE, RawClient, Unreachable
from tidegate.options import DEFAULT_URL, ApiKey, AsJson, Url, show

app = typer.Typer(
    no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Serve language models on Ray."
)


class Device(StrEnum):
    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


class DemoSize(StrEnum):
    tiny = "tiny"
    small = "small"


def run() -> NoReturn:
    """Run the command line: an error of ours is one line, never a stack trace."""
    try:
        app()
    except TidegateError as error:
        sys.exit(_report(error))
    sys.exit(0)


def _report(error: TidegateError) -> int:
    """Print the error; returns the exit status that belongs to it."""
    Console(stderr=True).print(f"tidegate: {error.message}", style="red", soft_wrap=True, highlight=False, markup=False)
    if isinstance(error, Unreachable):
        return 3
    return 2 if isinstance(error, ConfigError | InvalidField) else 1


@app.command()
def serve(
    model: Annotated[Path | None, typer.Option(help="Directory in Hugging Face format; without it, the demo.")] = None,
    config: Annotated[Path | None, typer.Option(help="YAML file of settings; options given here win.")] = None,
    dp: Annotated[int | None, typer.Option(help="Data-parallel ranks. Demo: 2.")] = None,
    device: Annotated[Device | None, typer.Option(help="Where ranks compute.")] = None,
    host: Annotated[str | None, typer.Option(help="Address of the HTTP door.")] = None,
    port: Annotated[int | None, typer.Option(help="Port of the HTTP door.")] = None,
    grpc_port: Annotated[int | None, typer.Option(help="Port of the gRPC door, on 127.0.0.1.")] = None,
    dashboard_port: Annotated[int | None, typer.Option(help="Port of the Ray dashboard, or the next free one.")] = None,
    served_name: Annotated[str | None, typer.Option(help="The model's name in the routes.")] = None,
    api_key: ApiKey = None,
    admin_key: Annotated[str | None, typer.Option(envvar=ADMIN_KEY_VARIABLE, help="Key of admin routes.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="Sockets, log, demo model, local Ray.")] = None,
    host_tier_gb: Annotated[
        float | None, typer.Option(help="GiB of host memory as a second cache tier; 0: none.")
    ] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting, e.g. engine.page_size=32.")
    ] = None,
    exit_with_parent: Annotated[
        bool, typer.Option(help="End when the process that started this one ends, however it ends.")
    ] = False,
) -> None:
    """Start a local Ray, serve a model on it, and end everything with Ctrl-C."""
    if exit_with_parent:
        # imports ctypes, which few need
        from tidegate.parent import end_with_parent

        end_with_parent()
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
        "host_tier.size_gb": host_tier_gb,
    }
    _serve(_settings(config, given, setting or []))


def _settings(config: Path | None, given: dict[str, Any], pairs: list[str]) -> Settings:
    """The settings of a server: the file's, over them the options that were given, over these `--set`."""
    overrides = {name: value for name, value in given.items() if value is not None}
    named = _named_values(pairs)
    if config is None and "model.path" not in overrides:
        # the demo shows what one rank cannot: verdicts of several, and a cache that they share
        overrides.setdefault("dp", 2)
        if not any(name.startswith(("host_tier.", "control.shared_dir")) for name in named):
            overrides.setdefault("host_tier.size_gb", _demo_host_tier_gb())
            # its device pools hold all that a visitor says: written back on eviction, nothing would outlive a kill
            overrides["host_tier.write_policy"] = "write_through"
    return load_settings(config, overrides | named)


def _demo_host_tier_gb() -> float:
    """A quarter GiB where there is shared memory to spare, as on most machines; a container often has 64 MiB in all."""
    try:
        shared = os.statvfs(ControlSettings().shared_dir)
    except OSError:
        return 0.0
    return 0.25 if shared.f_blocks * shared.f_frsize >= 1024**3 else 0.0


def _serve(settings: Settings) -> NoReturn:
    """Start a server, wait for its end, and end everything it has started."""
    # Ray and Serve take a second to import, which no other command needs
    from deployments.app import bind
    from tidegate.local import LocalServer
    from tidegate.progress import Progress

    server = LocalServer(settings, bind, Progress(Console()))
    status = 0
    try:
        server.run()
    except TidegateError as error:
        status = _report(error)
    server.end(status)


@app.command("demo-model")
def demo_model(
    directory: Annotated[Path, typer.Argument(help="Where to write it; made if absent.")],
    size: Annotated[DemoSize, typer.Option(help="tiny is for tests, small for a demo.")] = DemoSize.small,
) -> None:
    """Write a random-weight Llama with tokenizer and chat template; the same bytes on every machine, no download."""
    from engine.demo_model import write_demo_model

    try:
        write_demo_model(directory, size.value)
    except OSError as error:
        raise ConfigError(f"cannot write to {directory}: {error.strerror}") from None
    Console().print(f"{size.value} demo model: {directory}", soft_wrap=True, highlight=False, markup=False)


app.command()(flush)
app.command()(cache)
app.command()(audit)
app.add_typer(profile_commands.app, name="profile")


@app.command()
def status(
    url: Url = DEFAULT_URL,
    api_key: ApiKey = None,
    as_json: AsJson = False,
) -> None:
    """What is served, and what every rank has to do. Exit status 0 only if every rank answers."""
    answer = RawClient(url, api_key).status()
    show(answer, tables.status(answer), as_json)


@app.command()
def doctor(
    config: Annotated[Path | None, typer.Option(help="YAML file of settings that would be served.")] = None,
    device: Annotated[Device | None, typer.Option(help="Where ranks would compute.")] = None,
    dp: Annotated[int | None, typer.Option(help="Data-parallel ranks.")] = None,
    state_dir: Annotated[Path | None, typer.Option(help="State directory that would be used.")] = None,
    setting: Annotated[
        list[str] | None, typer.Option("--set", metavar="NAME=VALUE", help="Any setting, e.g. api.port=9001.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Check versions, GPU, /dev/shm, ports, Ray, folders, and say what to do. Exit status 1 if it could not serve."""
    # no other command looks at the machine
    from tidegate.doctor import answer, examine
    from tidegate.doctor_facts import read_facts

    given: dict[str, Any] = {
        "dp": dp,
        "engine.device": None if device is None else device.value,
        "state_dir": state_dir,
    }
    overrides = {name: value for name, value in given.items() if value is not None} | _named_values(setting or [])
    settings = load_settings(config, overrides)
    told = answer(examine(settings, read_facts(settings, os.environ)))
    show(told, tables.doctor(told), as_json)


def _named_values(pairs: list[str]) -> dict[str, Any]:
    """NAME=VALUE with values as YAML reads them."""
    values: dict[str, Any] = {}
    for pair in pairs:
        name, separator, text = pair.partition("=")
        if not separator or not name:
            raise ConfigError(f"--set takes NAME=VALUE, e.g. engine.page_size=32; got {pair!r}")
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError:
            raise ConfigError(f"--set {name}: {text!r} is no YAML value") from None
    return values
