"""Public log excerpts and live captures: the first finding is the diagnosis that the thread reached; health is no alarm."""

from __future__ import annotations

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest

confusion = SimpleNamespace(**runpy.run_path(str(Path(__file__).parent.parent / "docs" / "confusion.py")))
if not confusion.SAMPLES.is_dir():
    pytest.skip("the samples are not beside this checkout", allow_module_level=True)

EXCERPTS = tuple(confusion.excerpts())
RUNS = tuple(confusion.runs())


def summaries(report: object) -> list[str]:
    return [found.finding.summary for found in report.findings]  # type: ignore[attr-defined]


def test_the_first_finding_is_the_diagnosis_of_the_thread() -> None:
    print(confusion.page())
    outcomes = tuple(confusion.serving())
    assert sum(right for *_, right in outcomes) >= 0.95 * len(outcomes), [o for o in outcomes if not o[-1]]


@pytest.mark.parametrize(
    "file", [file for _, label, file in EXCERPTS if label.startswith("healthy")], ids=lambda file: file.stem
)
def test_a_healthy_excerpt_raises_no_alarm(file: Path) -> None:
    report = confusion.report_of(file)
    assert confusion.is_quiet(report), summaries(report)


@pytest.mark.parametrize("run", [run for run in RUNS if confusion.is_healthy(run.name)], ids=lambda run: run.name)
def test_a_healthy_run_raises_no_alarm(run: Path) -> None:
    report = confusion.report_of(run / "server.log")
    assert confusion.is_quiet(report), summaries(report)


@pytest.mark.parametrize("run", [run for run in RUNS if run.name in confusion.LIVE], ids=lambda run: run.name)
def test_a_broken_run_is_called_by_its_name(run: Path) -> None:
    report = confusion.report_of(run / "server.log")
    assert confusion.first_of(report) == confusion.LIVE[run.name], summaries(report)


def test_every_live_run_is_expected_to_be_something() -> None:
    assert {run.name for run in RUNS if not confusion.is_healthy(run.name)} <= set(confusion.LIVE)
