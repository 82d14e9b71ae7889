"""The Grafana dashboard asks for metrics that exist, by the names that Ray gives them, and for all of them."""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
DASHBOARD: dict[str, Any] = json.loads((ROOT / "configs" / "dashboards" / "tidegate.json").read_text())
KINDS = {"Counter": "counter", "Gauge": "gauge", "Histogram": "histogram"}
#: what Ray's exporter puts behind a name of each kind
SUFFIXES = {"counter": {"_total"}, "gauge": {""}, "histogram": {"_bucket", "_sum", "_count"}}


def metrics() -> dict[str, tuple[str, set[str]]]:
    """Name -> (kind, labels) of everything that actors/metrics.py makes."""
    found: dict[str, tuple[str, set[str]]] = {}
    for call in ast.walk(ast.parse((ROOT / "actors" / "metrics.py").read_text())):
        if not (isinstance(call, ast.Call) and call.args and isinstance(call.args[0], ast.Constant)):
            continue
        name, words = call.args[0].value, ast.unparse(call.func)
        if not (isinstance(name, str) and name.startswith("tidegate_")):
            continue
        keys = [keyword.value for keyword in call.keywords if keyword.arg == "tag_keys"]
        own = words.startswith("_")
        labels = {ast.literal_eval(argument) for argument in call.args[2:]} | {"rank"} if own else set()
        labels |= {key for value in keys for key in ast.literal_eval(value)}
        found[name] = (KINDS[words.removeprefix("_").capitalize()], labels)
    return found


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):
            yield target["expr"]


def asked() -> set[str]:
    """Names as the dashboard writes them, those of its variables too."""
    return set(re.findall(r"\b(?:ray_)?tidegate_\w+", json.dumps(DASHBOARD)))


def test_every_metric_that_is_asked_for_exists() -> None:
    exported = {f"ray_{name}{suffix}" for name, (kind, _) in metrics().items() for suffix in SUFFIXES[kind]}
    assert len(asked()) > 20
    assert asked() <= exported


def test_every_metric_is_shown() -> None:
    shown = {re.sub(r"_(total|bucket|sum|count)$", "", name.removeprefix("ray_")) for name in asked()}
    assert set(metrics()) <= shown


@pytest.mark.parametrize("expression", list(expressions()))
def test_a_restarted_process_breaks_no_query(expression: str) -> None:
    for name in re.findall(r"ray_tidegate_\w+", expression):
        assert f'{name}{{SessionName=~"$SessionName"' in expression
        kind, labels = metrics()[re.sub(r"_(total|bucket|sum|count)$", "", name.removeprefix("ray_"))]
        if kind != "gauge":
            assert re.search(rf"(rate|increase)\({name}\b", expression), "a counter begins anew with its process"
        grouped = {label.strip() for by in re.findall(r"by\(([^)]*)\)", expression) for label in by.split(",")}
        assert grouped <= labels | {"le"}
    assert "sum without(WorkerId)" in expression or re.match(r"(sum|max)\(", expression)


def test_the_variables_and_the_grid() -> None:
    assert [variable["name"] for variable in DASHBOARD["templating"]["list"]] == ["datasource", "SessionName"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))
    cells = [
        (x, y)
        for place in (panel["gridPos"] for panel in DASHBOARD["panels"])
        for x in range(place["x"], place["x"] + place["w"])
        for y in range(place["y"], place["y"] + place["h"])
    ]
    assert len(cells) == len(set(cells)), "two panels lie on each other"
    assert max(x for x, _ in cells) < 24
