"""The Grafana dashboard: each query is understood, asks for what the daemon tells, and has an answer from a real Prometheus."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from collections.abc import Container, Iterable
from pathlib import Path
from typing import Any

import promql_parser as promql
import pytest
from daemons import await_true, prometheus, running
from test_alerts import ALERTS, FILE, ONE_EACH, Page, group, last, needs_promtool, page, run
from test_cases import HERE, name_of, replayed

from doctor.rule import Severity
from exporters.prometheus import Own, Tally, families
from rules import RULES

ROOT = Path(__file__).parent.parent
DASHBOARD = json.loads((ROOT / "packaging" / "grafana" / "gpu-doctor.json").read_text(encoding="utf-8"))
PANELS: list[dict[str, Any]] = [panel for panel in DASHBOARD["panels"] if panel["type"] != "row"]
QUERIES = {f"{panel['title']} {target['refId']}": target["expr"] for panel in PANELS for target in panel["targets"]}
LABELS = {family.name: {*family.labels} for family in families(None, Tally(), Own(version=""))}
LABELS["gpu_doctor_series_left_out"] = set()
TARGET = {"job", "instance"}

CHOICES = {"$job": ".*", "$instance": ".*", "$gpu": ".*", "$__rate_interval": "5m"}
"""What stands for the dashboard's variables here."""

LOST, A100 = "cases/gpu-lost/fires-in-a-mesh", "healthy/hgx-a100-8"
FILLED_BY = {
    "Root causes A": LOST,
    "Root causes B": LOST,
    "What follows from them A": LOST,
    "What follows from them B": "cases/p2p-blocked/fires-chipset",
    "GPUs concerned A": LOST,
    "Could not be judged A": LOST,
    "Could not be seen A": "cases/stack-mismatch/fires-library",
    "Findings over time A": LOST,
    "Worst nodes A": LOST,
    "What is wrong on how many nodes A": LOST,
    "NVLinks down A": "cases/nvlink-degraded/fires-one-link",
    "Xids A": LOST,
    "Reasons now A": "cases/power-brake/fires-brake",
    "GPU temperature B": A100,
    "Memory temperature B": A100,
    "Clients B": A100,
}
"""Queries that a healthy H100 node without passwords does not answer → a recording that does."""


def chosen(query: str) -> str:
    for variable, choice in CHOICES.items():
        query = query.replace(variable, choice)
    return query


ANSWERS = {name: chosen(query) for name, query in QUERIES.items()}


def parts(expression: Any) -> list[Any]:
    found: list[Any] = []
    promql.walk(expression, found.append)
    return found


# The file ----------------------------------------------------------------------------------------------------------


def test_every_panel_says_what_it_shows_and_in_which_unit() -> None:
    for panel in PANELS:
        assert panel["description"].endswith("."), panel["title"]
        assert panel["fieldConfig"]["defaults"]["unit"], panel["title"]
        assert panel["targets"], panel["title"]
        assert panel["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
        assert all(target["datasource"] == panel["datasource"] for target in panel["targets"])


def test_panels_have_numbers_of_their_own_and_do_not_overlap() -> None:
    everything = DASHBOARD["panels"]
    assert len({panel["id"] for panel in everything}) == len(everything)
    assert len({panel["title"] for panel in everything}) == len(everything)
    taken: Counter[tuple[int, int]] = Counter()
    for place in (panel["gridPos"] for panel in everything):
        assert place["x"] + place["w"] <= 24
        taken.update((x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"]))  # fmt: skip
    assert set(taken.values()) == {1}


def test_the_first_row_says_what_is_wrong_and_what_is_not_known() -> None:
    rows = [place for place, panel in enumerate(DASHBOARD["panels"]) if panel["type"] == "row"]
    first = [panel["title"] for panel in DASHBOARD["panels"][rows[0] + 1 : rows[1]]]
    assert first[0] == "Verdict"
    assert first.index("Root causes") < first.index("What follows from them") < first.index("Could not be judged")


def test_nodes_and_prometheus_can_be_chosen() -> None:
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert variables["datasource"]["query"] == "prometheus"
    for name in ("job", "instance", "gpu"):
        asked = variables[name]["query"]
        metric, label = re.fullmatch(r"label_values\((\w+)(?:\{.*\})?, (\w+)\)", asked).groups()  # type: ignore[union-attr]
        assert label in LABELS[metric] | TARGET
    used = set(re.findall(r"\$\{?([a-z_]+)", json.dumps(PANELS))) - {"__rate_interval", "__range", "__value"}
    assert used == set(variables)


@pytest.mark.parametrize("name", QUERIES)
def test_a_query_asks_for_what_the_daemon_tells(name: str) -> None:
    selectors = [part for part in parts(promql.parse(ANSWERS[name])) if isinstance(part, promql.VectorSelector)]
    assert selectors
    for selector in selectors:
        assert selector.name == "up" or selector.name in LABELS or selector.name in ALERTS["RECORDINGS"], selector.name
        if selector.name in LABELS:
            asked = {matcher.name for matcher in selector.matchers.matchers}
            assert asked <= LABELS[selector.name] | TARGET, selector.name
            assert "job" in asked


def told_by(expression: Any) -> set[str]:
    """Return the labels that the series of a query have."""
    if isinstance(expression, promql.VectorSelector):
        recorded = ALERTS["RECORDINGS"].get(expression.name)
        return LABELS.get(expression.name, set()) | TARGET if recorded is None else told_by(promql.parse(recorded))
    if isinstance(expression, promql.AggregateExpr) and expression.modifier is not None:
        labels = set(expression.modifier.labels)
        by = expression.modifier.type == promql.AggModifierType.By
        return labels if by else told_by(expression.expr) - labels
    if isinstance(expression, promql.Call):
        more = {expression.args[1].val} if expression.func.name == "label_replace" else set()
        return set().union(more, *map(told_by, expression.args))
    inside = ("lhs", "rhs", "expr", "vs", "vector_selector")
    return set().union(*(told_by(getattr(expression, name)) for name in inside if hasattr(expression, name)))


def test_legends_and_columns_name_labels_that_the_answers_have() -> None:
    for panel in PANELS:
        for target in panel["targets"]:
            labels = told_by(promql.parse(chosen(target["expr"])))
            if panel["type"] == "table":
                columns = panel["transformations"][-1]["options"]["indexByName"]
                named = {name for name in columns if not name.startswith("Value")}
            else:
                named = set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"]))
            assert named <= labels, f"{panel['title']}: {named - labels}"


# What Prometheus answers -------------------------------------------------------------------------------------------


def shown(name: str, read: Container[str]) -> Page:
    """Return the last page on a recording, of a daemon that counted all of it and has passwords."""
    reports, tally = replayed(HERE / f"{name}.rec"), Tally()
    for report in reports:
        tally.add(report)
    return page(reports[-1], read=read, tally=tally, logins_failed=0)


@needs_promtool
def test_what_a_healthy_node_does_not_fill_is_filled_by_its_recording(tmp_path: Path) -> None:
    asked = {name: query for name, query in ANSWERS.items() if name in FILLED_BY}
    assert asked.keys() == FILLED_BY.keys()
    tests = []
    for case in set(FILLED_BY.values()):
        queries = [query for name, query in asked.items() if FILLED_BY[name] == case]
        read = {*selected(queries), *selected(ALERTS["RECORDINGS"].values())}
        one = [{"labels": "{}", "value": 1}]
        checks = [{"expr": f"count({query}) > bool 0", "eval_time": "2m", "exp_samples": one} for query in queries]
        tests.append(group({case: [shown(case, read)] * 3}, promql_expr_test=checks))
    run(tmp_path, *tests)


def selected(queries: Iterable[str]) -> set[str]:
    """Return the metrics that queries ask for."""
    found = (part for query in queries for part in parts(promql.parse(query)))
    return {part.name for part in found if isinstance(part, promql.VectorSelector)}


@needs_promtool
def test_root_causes_come_with_severity_and_runbook_and_nodes_with_their_verdict(tmp_path: Path) -> None:
    query = ANSWERS["Root causes A"]
    stories = {
        name_of(path): [page(last(path), read={"gpu_doctor_finding", "gpu_doctor_verdict"})] * 2 for path in ONE_EACH
    }
    files = {each.id: each.id.replace("-", "_") for each in RULES}
    worst: dict[tuple[str, str], Severity] = {}
    for path in ONE_EACH:
        for reported in last(path).roots:
            finding = reported.finding
            key = (name_of(path), finding.failure_mode)
            worst[key] = max(worst.get(key, Severity.NOTICE), finding.severity or Severity.NOTICE)
    for stem in files.values():
        assert (ROOT / "rules" / f"{stem}.md").is_file()
    samples = [
        {"labels": f'{{instance="{instance}",failure_mode="{mode}",what="{mode}",runbook="{files[mode]}"}}', "value": int(severity)}
        for (instance, mode), severity in worst.items()
    ]  # fmt: skip
    assert {mode for _, mode in worst} == {path.parent.name for path in ONE_EACH}
    words = [verdict.value for verdict in ALERTS["VERDICTS"]]
    verdicts = [
        {"labels": f'{{instance="{name_of(path)}"}}', "value": words.index(last(path).verdict.value)}
        for path in ONE_EACH
    ]
    checks = [
        {"expr": f"max without (confidence) ({query})", "eval_time": "1m", "exp_samples": samples},
        {"expr": ANSWERS["Verdict A"], "eval_time": "1m", "exp_samples": verdicts},
    ]
    run(tmp_path, group(stories, promql_expr_test=checks))


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on this machine")
def test_every_query_has_an_answer_on_a_busy_node(tmp_path: Path) -> None:
    simulated = ("--simulate", "hgx-h100-4", "--interval", "1", "--listen", "127.0.0.1:0")
    with (
        running("-m", "doctor", "daemon", *simulated, "--state-dir", str(tmp_path / "state")) as daemon,
        prometheus(tmp_path, {"gpu-doctor": (daemon, "")}, f"rule_files: ['{FILE}']\n") as asked,
    ):
        await_true(lambda: asked("gpu_doctor_verdict"), 60)
        unanswered = set(QUERIES) - set(FILLED_BY)

        def answered() -> bool:
            unanswered.difference_update({name for name in unanswered if asked(ANSWERS[name])})
            return not unanswered

        try:
            await_true(answered, 60)
        except AssertionError:
            pytest.fail(f"no answer to {sorted(unanswered)}")
