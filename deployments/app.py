"""The Serve application: ranks, and the Api in front of them.

`build_app` is what `serve run configs/demo.yaml` and `serve deploy` name as import path; `tidegate serve` binds the
same application from settings it has read. There is exactly one application: with two, gRPC clients that send no
`application` metadata get NOT_FOUND.
"""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path
from typing import Any

from ray.serve import Application

from configs.load import settings_from_dict
from configs.resolve import resolve
from configs.schema import Settings
from deployments.api import api_deployment
from deployments.hardware import this_cluster
from deployments.rank import rank_deployment

log = logging.getLogger(__name__)


def build_app(args: dict[str, Any]) -> Application:
    """The application of `args`, the same tree of settings as a YAML file, settled for the connected cluster.

    Raises ConfigError naming the field, or the resource of which the cluster will never have enough.
    """
    resolved, notes = resolve(settings_from_dict(args), this_cluster())
    for note in notes:
        log.info("%s", note)
    return bind(resolved.settings)


def bind(settings: Settings) -> Application:
    """The application of settings that `configs.resolve` has settled; builds the demo model when no model is named."""
    if settings.model.path is None:
        settings = settings.with_model_path(_demo_model(settings.resolved_state_dir / "models" / "demo"))
    return api_deployment(settings).bind(settings, rank_deployment(settings).bind(settings))


def _demo_model(directory: Path) -> Path:
    """The demo checkpoint, written if absent: beside its place first, so that a killed build leaves no half model."""
    if (directory / "config.json").is_file():
        return directory
    # imports torch, which a server of a model of its own need not load here
    from engine.demo_model import write_demo_model

    building = directory.with_name(f"{directory.name}.{os.getpid()}.building")
    write_demo_model(building, "small")
    shutil.rmtree(directory, ignore_errors=True)
    building.rename(directory)
    return directory
