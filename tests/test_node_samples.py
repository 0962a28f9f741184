"""Public evidence of real nodes: every file is read for what it is, and a healthy node gets no warning."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from doctor.diagnose import watch
from doctor.feeds import evidence
from doctor.report import Report, Verdict
from rules import RULES

SAMPLES = Path(__file__).parent.parent.parent / "shared" / "samples"
NOW = 1795300000.0  # 2026-11-21

pytestmark = pytest.mark.skipif(not SAMPLES.is_dir(), reason="the folder of public samples is not beside the checkout")

KINDS = {
    "smi-q": "smi-q",
    "topo": "topo",
    "nvlink": "smi-list",
    "smi-L": "smi-list",
    "dmon": "dmon",
    "smi-table": "smi-table",
    "smi-csv": "smi-lists",
    "help": "smi-help",
    "lspci": "lspci",
    "kmsg": "kernel-log",
    "xid": "kernel-log",
    "sxid": "kernel-log",
    "source": "kernel-log",
    "dcgm": "dcgm",
}
"""The index's word → the reader's."""

OF_SEVERAL_KINDS = {
    "smi-q-fabric-completed-while-fm-dead.txt": ("fabricmanager", "fabricmanager-status", "smi-q"),
    "gpud-h100-pcie-fabric-not-supported.txt": ("gpud",),
    "fabricmanager-systemd-active-h100.txt": ("fabricmanager-status",),
    "fabricmanager-systemd-active-b300-nvlsm.txt": ("fabricmanager-status",),
    "fabricmanager-nothing-to-do-a40.txt": ("fabricmanager",),
    "fabricmanager-log-inband-and-nonfatal.txt": ("fabricmanager",),
}

FAULTS: dict[str, set[str]] = {
    "sxid-gpud.txt": {"nvswitch-fabric-fault"},
    "sxid-nvsentinel.txt": {"nvswitch-fabric-fault"},
    "xid-mixed-nvsentinel.txt": {"application-fault"},
}
"""Files whose index says that they show a fault, and the failure mode that the first slice of rules has for it."""

MAY_ALARM = {
    *FAULTS,
    "xid-nvlink5-144-150.txt",
    "xid119-old-45s-each.txt",
    "kernel-format-strings.txt",
    "fabricmanager-log-inband-and-nonfatal.txt",
    "smi-q-fabric-completed-while-fm-dead.txt",
    "nvlink-s-v100-inactive.txt",
}
"""Files that show a fault of which a later rule may speak."""

TELLS_A_FAILURE = {"033.txt", "035.txt", "032.txt"}
"""Issue texts in which a failure of the engine is quoted below the report."""


def index(folder: str) -> list[dict[str, object]]:
    path = SAMPLES / folder / "index.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def report_on(*paths: Path) -> Report:
    return list(watch(evidence.read(paths, now=NOW), RULES, keep=3600))[-1]


def named(row: dict[str, object]) -> str:
    return str(row["file"])


@pytest.mark.parametrize("row", index("node"), ids=named)
def test_a_file_of_a_node_is_taken_for_what_its_index_says(row: dict[str, object]) -> None:
    name = named(row)
    expected = OF_SEVERAL_KINDS.get(name) or (KINDS[str(row["kind"])],)
    assert evidence.kinds(SAMPLES / "node" / name, now=NOW) == expected


@pytest.mark.parametrize("row", index("node"), ids=named)
def test_a_healthy_node_gets_no_warning_and_a_sick_one_its_finding(row: dict[str, object]) -> None:
    report = report_on(SAMPLES / "node" / named(row))
    found = {reported.finding.failure_mode for reported in report.findings}
    assert FAULTS.get(named(row), set()) <= found
    if set(evidence.kinds(SAMPLES / "node" / named(row), now=NOW)) <= UNJUDGED:
        assert report.verdict is Verdict.INCOMPLETE  # nobody looked at it: no word of health
    elif named(row) in TELLS_NO_BOARD:
        assert report.verdict is Verdict.INCOMPLETE
    elif named(row) not in MAY_ALARM:
        assert report.verdict in {Verdict.CLEAR, Verdict.NOTICE}, [r.finding.summary for r in report.findings]


TELLS_NO_BOARD = {"dcgm-nvlink-down-false-positive-a100-pcie.txt"}
"""DCGM fails links that are down for ever on an unbridged card; whether it is one, the excerpt does not tell."""

UNJUDGED = {"smi-lists", "smi-help", "dmon", "gpud"}
"""Kinds that no rule reads."""


@pytest.mark.parametrize("row", index("collect_env"), ids=named)
def test_a_node_of_which_people_report_its_environment_gets_no_warning(row: dict[str, object]) -> None:
    path = SAMPLES / "collect_env" / named(row)
    assert "collect-env" in evidence.kinds(path, now=NOW)
    report = report_on(path)
    if path.name not in TELLS_A_FAILURE:
        assert report.verdict in {Verdict.CLEAR, Verdict.NOTICE}, [r.finding.summary for r in report.findings]


def test_what_many_tools_say_of_one_node_comes_together_without_a_warning() -> None:
    names = ("smi-q-h100-load.txt", "topo-m-single-h100.txt", "nvlink-s-h100.txt", "smi-L-h100.txt")
    report = report_on(*(SAMPLES / "node" / name for name in names))
    (gpu,) = report.snapshot.gpus
    assert gpu.pci_device_id == "10de:2330"
    assert isinstance(gpu.links, tuple)
    assert len(gpu.links) == 18
    assert report.verdict in {Verdict.CLEAR, Verdict.NOTICE}


@pytest.mark.parametrize(
    "folder",
    [
        "tp2_normal",
        "normal_small",
        "normal_tiny",
        "term_drain",
        "apiservers2",
        "debug_logs",
        "ok_kv_bytes_ignored_on_cpu",
    ],
)
def test_a_healthy_live_run_with_all_its_files_gets_no_warning(folder: str) -> None:
    place = next(SAMPLES.glob(f"live/v*/{folder}"))
    paths = [
        path
        for path in (*sorted(place.glob("metrics_*.prom")), place / "server.log", place / "cmd.txt")
        if path.is_file()
    ]
    report = report_on(*paths, place.parent / "collect_env.txt")
    assert report.verdict in {Verdict.CLEAR, Verdict.NOTICE}, [r.finding.summary for r in report.findings]


def test_a_real_xid_79_in_the_journal_is_a_lost_gpu() -> None:
    report = report_on(SAMPLES / "live" / "kernel" / "synthetic_xid_journal_export.txt")
    assert report.roots[0].finding.failure_mode == "gpu-lost"
