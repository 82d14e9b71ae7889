"""Files that people use as they are: checked by the programs that read them."""

from __future__ import annotations

import ast
import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.serve.schema import ServeDeploySchema

from configs.load import load_settings

ROOT = Path(__file__).parents[2]
PACKAGES = ("cache", "engine", "actors", "deployments", "configs", "tidegate")


def _yaml(name: str) -> Any:
    return yaml.safe_load((ROOT / name).read_text())


def test_the_cluster_file_is_what_rays_launcher_takes() -> None:
    config = _yaml("cluster.yaml")
    validate_config(prepare_config(config))
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(prepare_config(config | {"clutser_name": "x"}))


def test_the_cluster_file_names_files_and_targets_that_exist() -> None:
    text = (ROOT / "cluster.yaml").read_text()
    for path in re.findall(r"~/tidegate/([\w./]+)", text):
        assert (ROOT / path).is_file(), path
    targets = re.findall(r"make ([\w-]+) VENV", text)
    makefile = (ROOT / "Makefile").read_text()
    assert targets
    assert all(f"\n{target}:" in makefile for target in targets)


def test_the_demo_is_one_serve_application_with_our_settings() -> None:
    deployed = ServeDeploySchema.model_validate(_yaml("configs/demo.yaml"))
    (application,) = deployed.applications
    module, _, name = application.import_path.partition(":")
    assert callable(getattr(importlib.import_module(module), name))
    settings = load_settings(ROOT / "configs" / "demo.yaml")
    assert settings.dp == 2
    assert settings.api.host == deployed.http_options.host
    assert settings.api.port == deployed.http_options.port


def test_every_dependency_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = project["dependencies"] + project["optional-dependencies"]["dev"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {line.partition("==")[0].lower() for line in lines if "==" in line}
    names = {re.split(r"[\[<>=]", one)[0].lower() for one in asked}
    assert names <= pins, f"not pinned: {sorted(names - pins)}"


@pytest.mark.parametrize("page", ["README.md", *sorted(f"docs/{path.name}" for path in (ROOT / "docs").glob("*.md"))])
def test_files_that_a_page_names_exist(page: str) -> None:
    text = (ROOT / page).read_text()
    named = re.findall(r"`([\w./-]+/[\w-]+\.\w+)`", text)
    linked = [str(Path(page).parent / link) for link in re.findall(r"\]\(([\w./-]+)\)", text)]
    missing = [path for path in [*named, *linked] if not (ROOT / path).exists()]
    assert missing == []


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_sleeps(package: str) -> None:
    """Waiting is for an event with a deadline; a sleep is a guess about another process."""
    calls = [
        f"{path.relative_to(ROOT)}:{node.lineno}: {ast.unparse(node)}"
        for path in sorted((ROOT / package).rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func).split(".")[-1] == "sleep"
    ]
    assert calls == []
