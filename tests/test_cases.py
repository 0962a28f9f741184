"""Law 8: each rule fires on its recordings, and stays quiet on near-misses and on every healthy node.

`record_cases.py`, `record_load_cases.py` and `record_log_cases.py` make the recordings.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from doctor.diagnose import watch
from doctor.feeds import recording
from doctor.report import Report
from doctor.rule import Severity
from exporters import json as json_report
from rules import RULES

HERE = Path(__file__).parent
CASES = sorted((HERE / "cases").glob("*/*.rec"))
FIRES = [path for path in CASES if path.stem.startswith("fires-")]
QUIET = [path for path in CASES if path.stem.startswith("quiet-")]
HEALTHY = sorted((HERE / "healthy").glob("*.rec"))

CHAINS = {
    "gpu-lost/fires-under-load": ["gpu-lost", "nccl-timeout", "engine-crashed"],
    "gpu-lost/fires-in-a-mesh": ["gpu-lost", "nccl-timeout", "engine-crashed"],
    "nvlink-degraded/fires-all": ["nvlink-degraded", "pcie-fallback"],
    "p2p-blocked/fires-chipset": ["p2p-blocked", "pcie-fallback"],
    "application-fault/fires-illegal-access": ["application-fault", "engine-crashed"],
    "nccl-timeout/fires-silent-rank": ["nccl-timeout", "engine-crashed"],
}
"""Case → what stands first, each caused by the one before."""


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


def replayed(path: Path) -> list[Report]:
    return list(watch(recording.read(path), RULES, keep=3600))


def found(report: Report) -> list[str]:
    return [reported.finding.failure_mode for reported in report.findings]


@pytest.mark.parametrize("path", FIRES, ids=name_of)
def test_a_firing_case_gives_its_failure_mode_first(path: Path) -> None:
    assert found(replayed(path)[-1])[:1] == [path.parent.name]


@pytest.mark.parametrize("path", QUIET, ids=name_of)
def test_a_near_miss_does_not_give_it(path: Path) -> None:
    for report in replayed(path)[1:]:  # a driver that has not answered at the first visit may still be waking
        assert path.parent.name not in found(report)


@pytest.mark.parametrize("path", HEALTHY, ids=name_of)
def test_a_healthy_node_gets_no_alarm(path: Path) -> None:
    for report in replayed(path):
        assert [f for f in report.findings if f.finding.severity != Severity.NOTICE] == []
        assert report.verdict.exit_code == 0


@pytest.mark.parametrize("case", CHAINS)
def test_causes_come_before_consequences(case: str) -> None:
    report = replayed(HERE / "cases" / f"{case}.rec")[-1]
    chain = CHAINS[case]
    assert found(report)[: len(chain)] == chain
    assert [f.depth for f in report.findings[: len(chain)]] == list(range(len(chain)))


@pytest.mark.parametrize("path", [*FIRES[::7], *HEALTHY[:2]], ids=name_of)
def test_a_replay_gives_the_same_reports_to_the_byte(path: Path) -> None:
    once, again = ([json_report.render(report) for report in replayed(path)] for _ in range(2))
    assert once == again


@pytest.mark.parametrize("failure_mode", [rule.id for rule in RULES])
def test_every_rule_has_its_cases(failure_mode: str) -> None:
    assert [path for path in FIRES if path.parent.name == failure_mode]
    assert len([path for path in QUIET if path.parent.name == failure_mode]) >= 2


def test_cases_belong_to_rules() -> None:
    assert {path.parent.name for path in CASES} <= {rule.id for rule in RULES}
