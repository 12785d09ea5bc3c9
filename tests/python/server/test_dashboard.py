"""The Grafana dashboard asks only for what the server exports."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

import nanobraid as nb
from nanobraid.server.metrics import Metrics

FILE = Path(__file__).resolve().parents[3] / "demo" / "grafana" / "nanobraid.json"
DATASOURCE = {"type": "prometheus", "uid": "${datasource}"}
NAME = re.compile(r"\b(?:vllm|nanobraid):\w+")


@pytest.fixture(scope="module")
def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(FILE.read_text(encoding="utf-8"))
    return loaded


@pytest.fixture(scope="module")
def panels(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


@pytest.fixture(scope="module")
def exported(llm: nb.LLM) -> dict[str, set[str]]:
    """Names of samples and the labels they have."""
    metrics = Metrics("smol", nb.AsyncEngine(llm))
    metrics.http_request("/v1/models", "GET", 200)
    names: dict[str, set[str]] = {}
    for line in metrics.render().decode().splitlines():
        if not line.startswith("#"):
            name, labels = line.split("{", 1)
            names.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return names


def expressions(panels: list[dict[str, Any]]) -> list[str]:
    return [target["expr"] for panel in panels for target in panel["targets"]]


def test_every_metric_that_is_asked_for_is_exported(
    panels: list[dict[str, Any]], exported: dict[str, set[str]]
) -> None:
    asked = {name for expression in expressions(panels) for name in NAME.findall(expression)}
    assert len(asked) > 40
    assert asked <= exported.keys()


def test_labels_are_those_of_the_metrics(panels: list[dict[str, Any]], exported: dict[str, set[str]]) -> None:
    for expression in expressions(panels):
        labels = set.union(*(exported[name] for name in NAME.findall(expression))) | {"instance"}
        for grouping in re.findall(r"\bby \(([^)]*)\)", expression):
            assert {label.strip() for label in grouping.split(",")} <= labels, expression
        for selector in re.findall(r"\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)=", selector)) <= labels, expression
    for panel in panels:
        for target in panel["targets"]:
            named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named <= set(re.findall(r"\w+", "".join(re.findall(r"by \([^)]*\)", target["expr"]))))


def test_counters_are_read_as_rates_and_gauges_are_not(panels: list[dict[str, Any]]) -> None:
    for expression in expressions(panels):
        for name in NAME.findall(expression):
            counts = name.endswith(("_total", "_bucket", "_sum", "_count"))
            assert (f"rate({name}{{" in expression) == counts, expression
        assert expression.count("(") == expression.count(")")


def test_every_selector_follows_the_choice_at_the_top(panels: list[dict[str, Any]]) -> None:
    for expression in expressions(panels):
        chosen = 'model_name=~"$model",instance=~"$instance"'
        assert expression.count(chosen) == len(NAME.findall(expression)), expression


def test_it_can_be_imported_anywhere(dashboard: dict[str, Any], panels: list[dict[str, Any]]) -> None:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert {"model", "instance"} < variables.keys()
    for panel in panels:
        assert panel["title"]
        assert panel["description"]
        assert panel["datasource"] == DATASOURCE
        assert all(target["datasource"] == DATASOURCE for target in panel["targets"])


def test_panels_do_not_overlap(dashboard: dict[str, Any]) -> None:
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
    for one, other in combinations([panel["gridPos"] for panel in dashboard["panels"]], 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        above = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or above, (one, other)
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in dashboard["panels"])
