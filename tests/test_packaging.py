"""The systemd unit: what systemd itself says of it. `packaging/try-in-systemd.sh` boots the packages."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest

from doctor.collectors.collector import CannotSeeError, Visit
from doctor.collectors.kernel_log import KernelLog

PACKAGING = Path(__file__).parent.parent / "packaging"
UNIT = PACKAGING / "systemd" / "gpu-doctor.service"
PROGRAM = "/opt/gpu-doctor/bin/gpu-doctor"

EXPOSURE_AT_MOST = 35
"""Tenths of systemd's exposure level: what an observer of a whole node can't do without makes 3.0."""

analysed = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not on this machine")


def settings(name: str) -> list[str]:
    return [line.partition("=")[2] for line in UNIT.read_text().splitlines() if line.startswith(name + "=")]


def analyse(*arguments: str, unit: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["systemd-analyze", *arguments, str(unit)], capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def unit(tmp_path: Path) -> Path:
    """The unit with a program that this machine has."""
    copy = tmp_path / UNIT.name
    copy.write_text(UNIT.read_text().replace(PROGRAM, "/bin/true"))
    return copy


@analysed
def test_systemd_knows_every_setting_of_the_unit(unit: Path) -> None:
    judged = analyse("verify", "--man=no", unit=unit)
    assert (judged.returncode, judged.stderr) == (0, ""), "an unknown setting is only a warning to systemd"


@analysed
def test_a_misspelt_setting_would_be_told(unit: Path) -> None:
    unit.write_text(unit.read_text().replace("WatchdogSec", "WatchdogSecs"))
    assert "WatchdogSecs" in analyse("verify", "--man=no", unit=unit).stderr


@analysed
def test_the_unit_exposes_no_more_than_it_must(unit: Path) -> None:
    judged = analyse("security", "--offline=true", f"--threshold={EXPOSURE_AT_MOST}", "--no-pager", unit=unit)
    assert judged.returncode == 0, judged.stdout


def test_it_keeps_three_capabilities_and_can_make_no_device() -> None:
    assert settings("CapabilityBoundingSet") == settings("AmbientCapabilities")
    assert set(settings("CapabilityBoundingSet")[0].split()) == {"CAP_SYSLOG", "CAP_SYS_PTRACE", "CAP_DAC_READ_SEARCH"}


@pytest.mark.parametrize(
    "blinding",
    [
        "PrivateDevices",
        "PrivateNetwork",
        "PrivateTmp",
        "PrivateUsers",
        "ProcSubset",
        "ProtectKernelLogs",
        "ProtectProc",
    ],
)
def test_nothing_hides_from_it_what_it_is_to_read(blinding: str) -> None:
    assert settings(blinding) == []


def test_the_folders_are_those_that_the_program_knows() -> None:
    from doctor import config
    from doctor.cli import STATE_FOLDER

    assert Path("/etc", *settings("ConfigurationDirectory")) == config.FILE.parent
    assert Path("/var/lib", *settings("StateDirectory")) == STATE_FOLDER


@pytest.mark.parametrize(("kernel", "seen"), [("this one", True), ("another", False)])
def test_a_container_reads_the_log_of_its_own_kernel_where_the_device_is_barred(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kernel: str, seen: bool
) -> None:
    """As in a pod that is not privileged: the node's root is mounted, /dev/kmsg may not be opened, syslog(2) may be asked."""
    boot_id = Path("/proc/sys/kernel/random/boot_id")
    there = tmp_path / "root" / boot_id.relative_to("/")
    there.parent.mkdir(parents=True)
    there.write_text(boot_id.read_text() if kernel == "this one" else "b0\n")
    program = tmp_path / "dmesg"
    program.write_text("#!/bin/sh\necho '[   12.500000] NVRM: Xid (PCI:0000:18:00): 79, GPU has fallen off the bus.'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    log = KernelLog(tmp_path / "root")
    if seen:
        (xid,) = log.collect(Visit(at=time.time())).fields["kernel"]
        assert xid.code == 79
    else:
        with pytest.raises(CannotSeeError):
            log.collect(Visit(at=time.time()))


@pytest.mark.parametrize("script", sorted(PACKAGING.rglob("*.sh")), ids=lambda path: path.name)
def test_each_script_is_one_that_its_shell_can_read(script: Path) -> None:
    shell = "bash" if "bash" in script.read_text().splitlines()[0] else "sh"
    assert subprocess.run([shell, "-n", str(script)], capture_output=True, check=False).stderr == b""
