"""The alert rules: each failure mode alarms once, by the right severity; healthy and silenced nodes never do."""

from __future__ import annotations

import json
import runpy
import shutil
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec
import pytest
import reports
from prometheus_client.parser import text_string_to_metric_families
from test_cases import FIRES, HEALTHY, name_of, replayed

from doctor.report import Report
from doctor.rule import Severity
from doctor.silence import Silence
from exporters.prometheus import TEXT, Own, Tally, Writer, families
from rules import RULES

ROOT = Path(__file__).parent.parent
FILE = ROOT / "packaging" / "prometheus" / "gpu-doctor.rules.yml"
ALERTS: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "alerts.py"))
FAMILIES: dict[str, tuple[str, ...]] = ALERTS["FAMILIES"]

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not on this machine; Debian's package prometheus brings it"
)

ONE_EACH = list({path.parent.name: path for path in FIRES}.values())


def series(report: Report | None, instance: str) -> list[dict[str, str]]:
    """Return what Prometheus would hold of a node that shows this page for half an hour."""
    text = Writer(TEXT).page(families(report, Tally(), Own(version="0.0.0"))).decode()
    read = [{"series": f'up{{job="gpu-doctor",instance="{instance}"}}', "values": "1+0x30"}]
    for family in text_string_to_metric_families(text):
        if family.name.removeprefix("gpu_doctor_") not in (
            "finding", "verdict", "unseen", "build_info", "collector_success"
        ):  # fmt: skip
            continue
        for sample in family.samples:
            labels = {**sample.labels, "job": "gpu-doctor", "instance": instance}
            written = ",".join(f"{name}={json.dumps(value)}" for name, value in labels.items())
            read.append({"series": f"{sample.name}{{{written}}}", "values": f"{sample.value:.0f}+0x30"})
    return read


def expected(report: Report, instance: str) -> set[tuple[str, str, str, str]]:
    """Return the alerts that a report's findings should raise, told without the page."""
    family_of = {failure_mode: family for family, held in FAMILIES.items() for failure_mode in held}
    return {
        (family_of[f.finding.failure_mode], instance, f.finding.failure_mode, severity.word)
        for f in report.findings
        if f.silence is None and (severity := f.finding.severity) not in (None, Severity.NOTICE)
    }


def test_every_failure_mode_belongs_to_exactly_one_alert() -> None:
    held = Counter(failure_mode for family in FAMILIES.values() for failure_mode in family)
    assert held == Counter(rule.id for rule in RULES)


def test_a_failure_mode_that_fires_without_alarm_is_a_notice() -> None:
    assert set(ALERTS["HOLD"]) == set(Severity) - {Severity.NOTICE}


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(FILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_promtool
def test_alerts_fire_on_their_recordings_and_stay_quiet_on_healthy_nodes(tmp_path: Path) -> None:
    """One run for all nodes: each is an instance of its own, and Prometheus' own ALERTS tells what fires."""
    inputs: list[dict[str, str]] = []
    alerts: set[tuple[str, str, str, str]] = set()
    for path in ONE_EACH:
        report = replayed(path)[-1]
        inputs += series(report, name_of(path))
        wanted = expected(report, name_of(path))
        first = report.findings[0].finding
        assert first.severity is Severity.NOTICE or path.parent.name in {mode for _, _, mode, _ in wanted}
        alerts |= wanted
    for path in HEALTHY:
        inputs += series(replayed(path)[-1], f"healthy/{path.stem}")
    silence = Silence(rule="gpu-lost", until=reports.AT + 3600, reason="the riser is ordered")
    lost = reports.lost_gpu()
    hushed = tuple(msgspec.structs.replace(f, silence=silence) for f in lost.findings)
    inputs += series(msgspec.structs.replace(lost, findings=hushed), "silenced")
    inputs += series(None, "blind")
    inputs.append({"series": 'up{job="gpu-doctor",instance="down"}', "values": "0+0x30"})
    alerts |= {("GpuDoctorBlind", "blind", "", "critical"), ("GpuDoctorDown", "down", "", "critical")}
    raised = 'count by (alertname, instance, failure_mode, severity) (ALERTS{alertstate="firing",severity!=""})'
    own = 'alertname=~"GpuDoctorIncomplete|GpuDoctorCollectorFailing"'
    checks = [
        {"expr": raised.replace("{a", '{alertname!~"GpuDoctorIncomplete|GpuDoctorCollectorFailing",a'), "eval_time": "20m",
         "exp_samples": [{"labels": labelled(alert), "value": 1} for alert in sorted(alerts)]},
        {"expr": f'count(ALERTS{{{own},instance=~"healthy/.*"}})', "eval_time": "20m", "exp_samples": []},
        {"expr": 'max(instance:gpu_doctor_verdict:rank{instance=~"healthy/.*"})', "eval_time": "20m",
         "exp_samples": [{"labels": "{}", "value": 1}]},
        {"expr": 'instance:gpu_doctor_verdict:rank{instance=~"gpu-lost/.*"}', "eval_time": "20m", "exp_samples": [
            {"labels": f'instance:gpu_doctor_verdict:rank{{job="gpu-doctor",instance="{name_of(path)}"}}', "value": 4}
            for path in ONE_EACH if path.parent.name == "gpu-lost"]},
    ]  # fmt: skip
    run(tmp_path, inputs, checks)


def labelled(alert: tuple[str, str, str, str]) -> str:
    names = ("alertname", "instance", "failure_mode", "severity")
    return "{" + ",".join(f'{name}="{value}"' for name, value in zip(names, alert, strict=True) if value) + "}"


def run(folder: Path, inputs: list[dict[str, str]], checks: list[dict[str, Any]]) -> None:
    test = {
        "rule_files": [str(FILE)],
        "evaluation_interval": "1m",
        "tests": [{"interval": "1m", "input_series": inputs, "promql_expr_test": checks}],
    }
    (folder / "alerts.test.yml").write_text(json.dumps(test))  # JSON is YAML
    done = subprocess.run(
        ["promtool", "test", "rules", str(folder / "alerts.test.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[:6000]
