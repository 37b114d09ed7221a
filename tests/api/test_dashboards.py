"""The dashboard and the alert rules of configs/ ask for metrics that exist."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import yaml
from prometheus_client import generate_latest

from mdiq.api.certificate import Certificate
from mdiq.api.figures import Figures
from mdiq.api.metrics import metrics_registry
from mdiq.api.requests import REASONS
from mdiq.api.tls import TlsFiles
from mdiq.route.figures import FAILOVERS, OUTCOMES, RouteFigures
from mdiq.route.servers import Server, State, report_of
from tests.api.certificates import make_certificate
from tests.api.test_metrics import STATUS
from tests.route.test_choice import STATUS as SERVER_STATUS

CONFIGS = Path(__file__).parents[2] / "configs"
DASHBOARD = json.loads((CONFIGS / "grafana-dashboard.json").read_text())
GROUPS = yaml.safe_load((CONFIGS / "prometheus-alerts.yml").read_text())["groups"]
RULES = [rule for group in GROUPS for rule in group["rules"]]
METRIC = re.compile(r"\bmdiq_[a-z_]+")


def _samples() -> dict[str, set[str]]:
    """Return the names of all samples, of a ring and of a router, with those of their labels."""
    registry = metrics_registry(lambda: STATUS)
    Figures(registry)
    server = Server("ring-a", 5.0)
    server.reported(report_of({**SERVER_STATUS, "kv_live_tokens": 3, "kv_capacity_tokens": 9}), 0.0)
    router = RouteFigures(lambda: [server])
    router.known("ring-a")
    router.refused.labels("busy")
    with TemporaryDirectory() as folder:
        registry.register(Certificate(TlsFiles(*make_certificate(Path(folder)))))
    found: dict[str, set[str]] = {}
    for line in (generate_latest(registry) + generate_latest(router.registry)).decode().splitlines():
        if not line.startswith("#"):
            name, _, labels = line.split(" ")[0].partition("{")
            found.setdefault(name, set()).update(re.findall(r'(\w+)="', labels))
    return found


SAMPLES = _samples()
VALUES = {"reason": REASONS, "state": [*State], "result": FAILOVERS, "outcome": OUTCOMES}
"""Of labels that expressions may ask for."""


def _targets() -> Iterator[tuple[str, str]]:
    for panel in DASHBOARD["panels"]:
        for target in panel.get("targets", ()):  # a row has none
            yield target["expr"], target["legendFormat"]


EXPRESSIONS = [expr for expr, _ in _targets()] + [rule["expr"] for rule in RULES]


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_an_expression_asks_for_metrics_that_exist(expression: str) -> None:
    names = METRIC.findall(expression)
    assert names or "up{" in expression
    assert [name for name in names if name not in SAMPLES] == []
    for name in names:
        is_growing = name.endswith(("_total", "_bucket")) and name != "mdiq_rings_formed_total"
        assert is_growing == ("rate(" in expression or "increase(" in expression), "rates are of counters"
    assert all("le" in SAMPLES[name] for name in names if "histogram_quantile" in expression)
    for label, values in VALUES.items():
        assert [value for value in re.findall(rf'{label}="(\w+)"', expression) if value not in values] == []
    assert expression.count("(") == expression.count(")")


def test_labels_in_legends_are_those_of_the_metrics() -> None:
    for expression, legend in _targets():
        for label in re.findall(r"{{(\w+)}}", legend):
            assert all(label in SAMPLES[name] for name in METRIC.findall(expression)), (expression, legend)


def test_every_figure_is_on_the_dashboard() -> None:
    shown = " ".join(expr for expr, _ in _targets())
    families = {re.sub(r"_(bucket|sum|count|created)$", "", name) for name in SAMPLES}
    assert {name for name in families if name not in shown} == set()


def test_panels_have_their_own_numbers_and_do_not_overlap() -> None:
    panels: list[dict[str, Any]] = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]
    assert len(set(cells)) == len(cells) and max(x for x, _ in cells) < 24


def test_each_alert_says_what_to_do() -> None:
    assert len({rule["alert"] for rule in RULES}) == len(RULES) >= 8
    for rule in RULES:
        assert rule["labels"]["severity"] in ("info", "warning", "critical")
        assert {"summary", "what_to_do"} == rule["annotations"].keys()
