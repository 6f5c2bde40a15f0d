"""The dashboard and the alerts read metrics that the service really exports, by labels that they really have.

That the definitions in deployments/metrics.py are what a real run exports: tests/cluster/test_watching.py.
"""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
import yaml

from deployments import metrics
from serve_app.settings import Settings

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "cluster" / "observability"
PANELS: list[dict[str, Any]] = json.loads((FOLDER / "dashboard.json").read_text())["panels"]
RULES: list[dict[str, Any]] = yaml.safe_load((FOLDER / "prometheus-rule.yaml").read_text())["spec"]["groups"][0][
    "rules"
]
PAGE = (ROOT / "docs" / "observability.md").read_text()
GRAFANAS = {"$__rate_interval": "1m", "$__range": "6h"}
SERVES = {"deployment", "replica", "application", "le"}
TAGS = {name: SERVES | set(metric.tags) for metric in metrics.ALL for name in metric.exported}


def expressions() -> Iterator[tuple[str, str]]:
    """Where it stands, and the PromQL."""
    for panel in PANELS:
        for target in panel.get("targets", []):
            expr = target["expr"]
            for variable, value in GRAFANAS.items():
                expr = expr.replace(variable, value)
            yield panel["title"], expr
    for rule in RULES:
        yield rule["alert"], rule["expr"]


def problems(expr: str) -> list[str]:
    """What of `expr` is not there."""
    found: list[str] = []
    grouped: list[str] = []
    series: list[str] = []

    def visit(node: Any) -> bool:
        if isinstance(node, promql.VectorSelector):
            if node.name not in TAGS:
                found.append(f"no metric {node.name}")
            else:
                series.append(node.name)
                labels = {matcher.name for matcher in node.matchers.matchers}
                found.extend(f"{node.name} has no label {label}" for label in labels - TAGS[node.name])
        if isinstance(node, promql.AggregateExpr) and node.modifier is not None:
            grouped.extend(node.modifier.labels)
        return True

    promql.walk(promql.parse(expr), visit)
    found.extend(f"{name} has no label {label}" for name in series for label in grouped if label not in TAGS[name])
    return found


ALL = list(expressions())


@pytest.mark.parametrize(("where", "expr"), ALL, ids=[f"{where}-{n}" for n, (where, _) in enumerate(ALL)])
def test_what_is_read_exists_and_a_wrong_name_is_noticed(where: str, expr: str) -> None:
    assert problems(expr) == []
    for name in set(re.findall(r"ray_wan_serve_\w+", expr)):
        assert problems(expr.replace(name, name.replace("wan_serve", "wan_serv")))
        assert problems(expr.replace(name, name + "s"))
    for label in set(re.findall(r"(\w+)=~?\"", expr)):
        assert problems(re.sub(rf"\b{label}(=~?\")", r"lable\1", expr))


def test_outcomes_that_are_asked_for_exist() -> None:
    """A wrong value of a label gives no error anywhere, only an empty panel."""
    known = {"outcome": {"succeeded", "failed", "cancelled"}, "kept": {"on_time", "late"}, "use": {"billed", "wasted"},
             "cache": {"hit", "miss"}, "deployment": {"Ingress", "Conductor"}, "code": {"replica_lost"}}  # fmt: skip
    for where, expr in ALL:
        for label, _, value in re.findall(r"(\w+)(=~?)\"([^\"]+)\"", expr):
            assert set(value.split("|")) <= known[label], where


def test_every_metric_is_shown() -> None:
    shown = {name for _, expr in ALL for name in re.findall(r"ray_wan_serve_\w+", expr)}
    for metric in metrics.ALL:
        assert shown & set(metric.exported), f"{metric.name} is measured and never looked at"


def test_the_success_measures_are_the_first_row() -> None:
    top = PANELS[0]["gridPos"]["y"] + 1
    first = {panel["title"] for panel in PANELS if panel["gridPos"]["y"] == top}
    assert first == {"Success rate", "Average generation", "Uptime", "In time", "Satisfaction"}


def test_panels_do_not_lie_on_each_other() -> None:
    taken: dict[tuple[int, int], str] = {}
    for panel in PANELS:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        for cell in ((x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])):
            assert cell not in taken, f"{panel['title']} lies on {taken[cell]}"
            taken[cell] = panel["title"]
    assert len({panel["id"] for panel in PANELS}) == len(PANELS)


def test_buckets_reach_beyond_the_longest_job() -> None:
    assert metrics.LONGEST_S[-1] > Settings(data_dir=Path("x")).time_limit_s
    for metric in metrics.ALL:
        if isinstance(metric, metrics.Histogram):
            assert list(metric.buckets) == sorted(set(metric.buckets))


def test_the_page_tells_of_each_metric_and_each_alert() -> None:
    rows = [line.split("|")[1] for line in PAGE.splitlines() if line.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([\w]+)`", row)}
    assert named == {metric.exported[0].removesuffix("_bucket") for metric in metrics.ALL} | {
        rule["alert"] for rule in RULES
    }
