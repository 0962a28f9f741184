"""The report for Slurm and node-problem-detector: what makes a node unfit, and what is only its workload's own trouble."""

from __future__ import annotations

import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import msgspec
import pytest
import reports
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from doctor.cli import cli
from doctor.diagnose import watch
from doctor.feeds import recording, simulated
from doctor.report import Report
from doctor.silence import Moment, Silence
from doctor.snapshot import Source
from exporters import node_health
from exporters.node_health import LINE_BYTES, NODE_FAULTS, RECOVERY, Fitness
from rules import RULES

PACKAGING = Path(__file__).parent.parent / "packaging"
HEALTH_CHECK = PACKAGING / "slurm" / "health-check.sh"
PLUGIN = PACKAGING / "node-problem-detector" / "gpu-doctor.json"


def report(*faults: str, profile: str = "hgx-h100-8") -> Report:
    *_, last = watch(simulated.node(profile, faults, every=0.1, times=2), RULES, 3600.0)
    return last


def test_every_fault_of_a_node_is_a_failure_mode() -> None:
    assert {rule.id for rule in RULES} >= {*NODE_FAULTS, RECOVERY}


def test_a_healthy_node_is_fit() -> None:
    healthy = report()
    assert node_health.fitness(healthy) is Fitness.FIT
    assert node_health.render(healthy) == "fit: 8 GPUs, no fault of hardware or driver\n"


@pytest.mark.parametrize(
    ("fault", "mode"),
    [
        ("gpu-lost:gpu=2", "gpu-lost"),
        ("nvlink-down:gpu=2,link=5", "nvlink-degraded"),
        ("fabric-incomplete", "nvswitch-fabric-fault"),
        ("gpu-memory-fault:gpu=1", "gpu-memory-faulty"),
        ("recovery-action:gpu=3", "recovery-pending"),
        ("driver-library-mismatch", "stack-mismatch"),
    ],
)
def test_a_fault_of_the_node_makes_it_unfit(fault: str, mode: str) -> None:
    sick = report(fault)
    assert node_health.fitness(sick) is Fitness.UNFIT, node_health.render(sick)
    assert re.search(rf"^{mode}: |also .*{mode}", node_health.render(sick)), node_health.render(sick)


def test_a_driver_that_does_not_answer_makes_it_unfit() -> None:
    (first, *_) = sorted((Path(__file__).parent / "cases" / "driver-unresponsive").glob("fires-*.rec"))
    *_, hung = watch(recording.read(first), RULES, 3600.0)
    assert node_health.fitness(hung) is Fitness.UNFIT
    assert "driver-unresponsive" in node_health.render(hung)


@pytest.mark.parametrize(
    "fault",
    [
        "engine-crashed",
        "application-fault:gpu=1",
        "out-of-memory-at-startup",
        "oom-kill",
        "rank-stopped:rank=1",
        "driver-too-old",
        "foreign-process:gpu=1",
        "power-cap:gpu=1",
        "engine-log-missing",
        "metrics-down",
    ],
)
def test_trouble_of_the_workload_makes_no_node_unfit(fault: str) -> None:
    assert node_health.fitness(report(fault)) is Fitness.FIT, node_health.render(report(fault))


def test_blindness_is_not_fitness() -> None:
    blind = report("kernel-log-denied")
    assert node_health.fitness(blind) is Fitness.UNKNOWN
    assert node_health.render(blind).startswith("could not be told: the kernel log (")


def test_a_source_that_the_site_does_without_leaves_no_doubt() -> None:
    assert node_health.fitness(report("kernel-log-denied"), frozenset((Source.KERNEL_LOG,))) is Fitness.FIT


def test_a_silenced_fault_is_the_sites_own_business() -> None:
    sick = report("nvlink-down:gpu=2,link=5")
    silence = Silence(rule="nvlink-degraded", until=Moment(9e9), reason="ticket 4711")
    silent = msgspec.structs.replace(
        sick, findings=tuple(msgspec.structs.replace(found, silence=silence) for found in sick.findings)
    )
    assert node_health.fitness(silent) is Fitness.FIT


@given(text=st.text(max_size=3000))
def test_the_reason_is_one_line_that_no_plugin_cuts(text: str) -> None:
    lost = reports.lost_gpu()
    findings = tuple(
        msgspec.structs.replace(found, finding=msgspec.structs.replace(found.finding, summary=text))
        for found in lost.findings
    )
    line = node_health.render(msgspec.structs.replace(lost, findings=findings))
    assert len(line.encode()) <= LINE_BYTES
    assert line.count("\n") == 1
    assert line.endswith("\n")


# The command --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--simulate", "hgx-h100-8"), 0),
        (("--simulate", "hgx-h100-8", "--fault", "gpu-lost:gpu=2"), 1),
        (("--simulate", "hgx-h100-8", "--fault", "kernel-log-denied"), 2),
        (("--simulate", "hgx-h100-8", "--fault", "kernel-log-denied", "--optional", "kernel-log"), 0),
        (("--simulate", "no-such-node"), 3),
    ],
)
def test_the_exit_code_is_what_node_problem_detector_understands(arguments: tuple[str, ...], code: int) -> None:
    ended = CliRunner().invoke(cli, ["check", "--format", "node-health", "--for", "0", *arguments])
    assert ended.exit_code == code, ended.output
    assert len(ended.stdout.splitlines()) == (code < 3)


# node-problem-detector ----------------------------------------------------------------------------------------------

PLUGIN_FIELDS = {
    "": {"plugin", "pluginConfig", "source", "metricsReporting", "conditions", "rules"},
    "pluginConfig": {
        "invoke_interval", "timeout", "max_output_length", "concurrency", "enable_message_change_based_condition_update",
        "skip_initial_status",
    },
    "conditions": {"type", "reason", "message"},
    "rules": {"type", "condition", "reason", "path", "args", "timeout"},
}  # fmt: skip
"""What the custom plugin monitor of node-problem-detector 0.8.19 and newer reads (docs/custom_plugin_monitor.md)."""


def plugin() -> dict[str, Any]:
    return json.loads(PLUGIN.read_text())


def test_the_plugins_configuration_has_only_fields_that_are_read() -> None:
    configuration = plugin()
    assert configuration.keys() <= PLUGIN_FIELDS[""]
    assert configuration["plugin"] == "custom"
    assert configuration["pluginConfig"].keys() <= PLUGIN_FIELDS["pluginConfig"]
    for part in ("conditions", "rules"):
        assert all(each.keys() <= PLUGIN_FIELDS[part] for each in configuration[part])


def test_the_plugins_configuration_passes_the_monitors_own_checks() -> None:
    """As its Validate(): a rule's timeout within the global one, a permanent problem's condition among the defaults."""
    configuration = plugin()
    settings = configuration["pluginConfig"]
    timeout, interval = (int(settings[name].removesuffix("s")) for name in ("timeout", "invoke_interval"))
    conditions = {condition["type"] for condition in configuration["conditions"]}
    for rule in configuration["rules"]:
        assert int(rule["timeout"].removesuffix("s")) <= timeout < interval
        assert rule["type"] == "permanent"
        assert rule["condition"] in conditions
    assert settings["max_output_length"] >= LINE_BYTES


# Slurm --------------------------------------------------------------------------------------------------------------


class Slurm:
    """A node whose gpu-doctor and scontrol are scripts that note what they are told."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.calls = folder / "calls"
        self._write("logger", f'echo "logger $*" >>{self.calls}')
        self.node("State=IDLE")
        self.says("fit", 0)

    def _write(self, name: str, script: str) -> None:
        path = self.folder / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    def says(self, line: str, code: int) -> None:
        self._write("gpu-doctor", f"echo '{line}'; exit {code}")

    def node(self, state: str) -> None:
        show = f'case $2 in show) echo "NodeName=n1 {state} ThreadsPerCore=1"; exit;; esac'
        self._write("scontrol", f'{show}\necho "scontrol $*" >>{self.calls}')

    def checked(self, *, drain: bool = True) -> tuple[str, list[str]]:
        configuration = self.folder / "slurm.env"
        configuration.write_text("DRAIN=yes\n" if drain else "")
        environment = {
            "PATH": f"{self.folder}:{os.environ['PATH']}",
            "GPU_DOCTOR": str(self.folder / "gpu-doctor"),
            "GPU_DOCTOR_SLURM_ENV": str(configuration),
            "SLURMD_NODENAME": "n1",
        }
        ended = subprocess.run(
            ["sh", str(HEALTH_CHECK)], env=environment, capture_output=True, text=True, check=False, timeout=60
        )
        assert ended.returncode == 0, "some releases of Slurm keep a node out until its health check returns 0"
        calls = self.calls.read_text().splitlines() if self.calls.exists() else []
        return ended.stdout, calls


@pytest.fixture
def slurm(tmp_path: Path) -> Slurm:
    return Slurm(tmp_path)


def test_a_fit_node_is_left_alone(slurm: Slurm) -> None:
    assert slurm.checked() == ("", [])


def test_an_unfit_node_is_drained_where_the_site_wants_it(slurm: Slurm) -> None:
    slurm.says("gpu-lost: GPU 2 is gone", 1)
    told, calls = slurm.checked()
    assert told == "gpu-doctor: n1 is not fit for work: gpu-lost: GPU 2 is gone\n"
    assert calls[-1] == "scontrol update NodeName=n1 State=DRAIN Reason=gpu-doctor: gpu-lost: GPU 2 is gone"


def test_an_unfit_node_is_only_told_of_where_the_site_has_not_said_so(slurm: Slurm) -> None:
    slurm.says("gpu-lost: GPU 2 is gone", 1)
    told, calls = slurm.checked(drain=False)
    assert "not fit for work" in told
    assert [call.split()[0] for call in calls] == ["logger"]


@pytest.mark.parametrize("state", ["State=IDLE+DRAIN", "State=DRAINING", "State=DOWN*"])
def test_a_node_that_is_drained_keeps_its_reason(slurm: Slurm, state: str) -> None:
    slurm.says("gpu-lost: GPU 2 is gone", 1)
    slurm.node(state)
    assert [call.split()[0] for call in slurm.checked()[1]] == ["logger"]


@pytest.mark.parametrize("code", [2, 3, 124, 137])
def test_a_node_that_could_not_be_judged_is_not_drained(slurm: Slurm, code: int) -> None:
    slurm.says("could not be told", code)
    told, calls = slurm.checked()
    assert "could not be judged" in told
    assert [call.split()[0] for call in calls] == ["logger"]
