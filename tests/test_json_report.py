"""The report as JSON, and its schema."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import reports
from jsonschema import Draft202012Validator

from exporters import json as json_report

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("name", reports.ALL)
def test_a_report_is_what_its_schema_says(name: str) -> None:
    schema = json.loads(json_report.schema())
    Draft202012Validator.check_schema(schema)
    Draft202012Validator(schema).validate(json.loads(json_report.render(reports.ALL[name]())))


def test_the_schema_in_the_documentation_is_up_to_date() -> None:
    assert (ROOT / "docs" / "report.schema.json").read_bytes() == json_report.schema(), "run: make docs"


def test_a_finding_says_who_what_why_and_how_sure() -> None:
    document = json.loads(json_report.render(reports.lost_gpu()))
    assert {k: document[k] for k in ("schema", "at", "verdict")} == {
        "schema": 1,
        "at": reports.AT,
        "verdict": "critical",
    }
    assert document["node"] == {"name": "hgx-17", "booted_at": reports.AT - 86_400, "simulated": True}
    assert [f["failure_mode"] for f in document["findings"]] == ["gpu-lost", "nccl-timeout", "engine-crashed"]
    lost, timeout, _ = document["findings"]
    assert list(lost) == [
        "failure_mode", "severity", "confidence", "title", "summary", "subject", "evidence", "caused_by", "since",
        "advice", "runbook", "silenced",
    ]  # fmt: skip
    assert (lost["severity"], lost["confidence"], lost["caused_by"]) == ("critical", "high", [])
    assert lost["subject"] == {"gpus": [reports.uuid(2)], "links": [], "ranks": [], "engine": "", "pids": []}
    assert lost["evidence"][1] == {"source": "nvml", "where": "nvmlDeviceGetHandleByUUID", "text": "GPU_IS_LOST"}
    assert lost["runbook"] == "gpu-doctor explain gpu-lost"
    assert timeout["caused_by"] == ["gpu-lost"]
    assert document["unjudged"] == [
        {"failure_mode": "nvswitch-fabric-fault", "why": "no permission: fabric manager's log"}
    ]
    assert document["quiet"] == list(reports.QUIET)
    assert document["unseen"] == [{"source": "nvml", "what": "values of GPU 2", "why": "lost"}]


def test_text_from_a_log_is_clean_in_json_too() -> None:
    """Programs print what `jq -r` gives them."""

    def strings(value: object) -> list[str]:
        if isinstance(value, dict):
            return [s for v in value.values() for s in strings(v)]
        if isinstance(value, list):
            return [s for v in value for s in strings(v)]
        return [value] if isinstance(value, str) else []

    found = strings(json.loads(json_report.render(reports.hostile())))
    assert found
    assert all(text.isprintable() for text in found)


def test_the_same_report_gives_the_same_bytes() -> None:
    assert json_report.render(reports.lost_gpu()) == json_report.render(reports.lost_gpu())
