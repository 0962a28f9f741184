"""The front door: every command, and every way to get it wrong."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner, Result

from doctor.cli import cli
from doctor.feeds import recording
from doctor.snapshot import Node, Snapshot
from rules import RULES

ROOT = Path(__file__).parent.parent
SICK = ("--simulate", "dgx-h100-4of8", "--fault", "gpu-lost:gpu=2")


def run(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(a) for a in arguments], prog_name="gpu-doctor")


def program(*arguments: str | Path, **more: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(  # type: ignore[call-overload]
        [sys.executable, "-m", "doctor", *map(str, arguments)],
        cwd=ROOT, capture_output=True, text=True, check=False, timeout=60, **more,
    )  # fmt: skip


def refused(result: Result) -> str:
    """One clear sentence on standard error, exit code 3, no traceback."""
    assert result.exit_code == 3, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("gpu-doctor: ")
    return line.removeprefix("gpu-doctor: ")


# A simulated node


@pytest.fixture(scope="module")
def sick() -> Result:
    return run("check", *SICK, "--format", "json")


def test_check_finds_the_fault_of_a_simulated_node(sick: Result) -> None:
    assert sick.exit_code == 2
    report = json.loads(sick.stdout)
    assert report["verdict"] == "critical"
    assert report["findings"][0]["failure_mode"] == "gpu-lost"
    assert report["node"]["simulated"] is True
    assert sick.stderr == ""


def test_a_healthy_simulated_node_is_clear_or_gets_a_hint() -> None:
    result = run("check", "--simulate", "hgx-h100-8", "--for", "1")
    assert result.exit_code == 0, result.stdout
    assert result.stdout.startswith(("CLEAR  ", "NOTICE  "))


def test_a_replay_tells_what_the_run_told_to_the_byte(tmp_path: Path) -> None:
    """The visits of a simulated run go through a recording; both are judged."""
    from doctor.diagnose import watch
    from doctor.feeds import simulated
    from exporters import json as json_report

    path = tmp_path / "incident.rec"
    node = simulated.node("dgx-h100-4of8", ("gpu-lost:gpu=2",), every=0.2, times=3)
    *_, live = watch(recording.write(node, path, "test"), RULES, 3600.0)
    result = run("check", "--replay", path, "--format", "json")
    assert result.exit_code == 2
    assert result.stdout_bytes == json_report.render(live)


def test_record_writes_what_check_can_replay(tmp_path: Path) -> None:
    path = tmp_path / "incident.rec"
    recorded = run("record", "--for", "1", "-o", path, *SICK)
    assert recorded.exit_code == 0
    assert recorded.stderr == f"{path}: 2 visits\n"
    assert run("check", "--replay", path, "--format", "nagios").stdout.startswith("GPU-DOCTOR CRITICAL - gpu-lost: ")


@pytest.mark.parametrize(
    ("form", "start"),
    [("console", "CRITICAL  "), ("markdown", "# Critical: "), ("nagios", "GPU-DOCTOR CRITICAL - gpu-lost")],
)
def test_every_form_of_a_report(form: str, start: str) -> None:
    result = run("check", *SICK, "--for", "0", "--format", form)
    assert result.exit_code == 2
    assert result.stdout.startswith(start)


# A node without a GPU, and recordings


def test_without_a_driver_check_says_so_and_names_the_demo(tmp_path: Path) -> None:
    """A root without anything of NVIDIA's: what could be judged is judged, the rest is not called healthy."""
    (tmp_path / "proc").mkdir()
    result = run("check", "--root", tmp_path, "--for", "0")
    assert result.exit_code == 3
    assert result.stdout.startswith("INCOMPLETE  there is no NVIDIA driver here")
    assert "gpu-doctor check --simulate" in result.stdout


def test_optional_sources_are_taken_off_the_essential_ones(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    result = run(
        "check", "--root", tmp_path, "--for", "0", "--optional", "nvml", "--optional", "kernel-log", "--format", "json"
    )
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["verdict"] == "clear"
    assert "nvml" in {unseen["source"] for unseen in report["unseen"]}, "the report still says so"


def empty_recording(path: Path) -> Path:
    list(recording.write([Snapshot(at=1.0, node=Node(name="n"))], path, "test"))
    return path


def test_a_configuration_is_laid_over_the_rules(tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text("".join(f"[rules.{rule.id}]\nenabled = false\n" for rule in RULES))
    result = run("check", "--replay", empty_recording(tmp_path / "x.rec"), "--config", site, "--format", "json")
    report = json.loads(result.stdout)
    assert (report["unjudged"], report["quiet"]) == ([], [])


# Getting it wrong


def test_wrong_use_is_clicks_own_error() -> None:
    assert run("check", "--format", "xml").exit_code == 2
    assert run("triage").exit_code == 2
    assert run("nonsense").exit_code == 2
    alone = run("check", "--fault", "gpu-lost:gpu=1")
    assert alone.exit_code == 2
    assert "it needs --simulate" in alone.stderr
    assert run("check", "--replay", "x.rec", "--simulate", "l40s-4").exit_code == 2


@pytest.mark.parametrize("seconds", ["nan", "inf", "-1", "soon"])
def test_what_is_no_span_of_time_is_wrong_use(seconds: str) -> None:
    assert run("check", "--for", seconds).exit_code == 2
    assert run("daemon", "--interval", seconds).exit_code == 2


def test_an_unknown_profile_or_fault_is_named() -> None:
    assert "'hgx-h900-8' is no profile; there are hgx-h100-8, " in refused(run("check", "--simulate", "hgx-h900-8"))
    assert "'sleepy' is no fault" in refused(run("check", "--simulate", "hgx-h100-8", "--fault", "sleepy"))
    wrong = refused(run("check", "--simulate", "hgx-h100-8", "--fault", "gpu-lost:gpu=9"))
    assert "GPUs 0 to 7, not 9" in wrong


def test_an_unknown_source_is_named() -> None:
    assert "--optional dcgm: there is no such source; there are nvml, " in refused(run("check", "--optional", "dcgm"))


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("[rules.no-such-rule]\n", "no-such-rule"),
        ("[rules.gpu-lost]\nno_such_limit = 1\n", "no_such_limit"),
        ("colour = 'red'\n", "colour"),
        ("= = =", "site.toml"),
        ("\x00\xff", "site.toml"),
    ],
)
def test_a_wrong_configuration_is_one_sentence(text: str, part: str, tmp_path: Path) -> None:
    site = tmp_path / "site.toml"
    site.write_text(text, encoding="latin-1")
    assert part in refused(run("check", "--config", site, "--replay", empty_recording(tmp_path / "x.rec")))


def test_a_missing_configuration_is_one_sentence(tmp_path: Path) -> None:
    assert "No such file" in refused(run("check", "--config", tmp_path / "no.toml"))


@pytest.mark.parametrize(
    "content", [b"", b"\x00\xff" * 50, b"{}", b"\x1f\x8b\x08", b'{"recording":99,"program":"x"}\n']
)
def test_what_is_no_recording_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "x.rec"
    path.write_bytes(content)
    assert str(path) in refused(run("check", "--replay", path))


def test_a_torn_recording_is_one_sentence(tmp_path: Path) -> None:
    whole = empty_recording(tmp_path / "x.rec").read_bytes()
    (tmp_path / "torn.rec").write_bytes(whole[:-10])
    assert "cut off" in refused(run("check", "--replay", tmp_path / "torn.rec"))


def test_a_recording_without_visits_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "x.rec"
    path.write_bytes(gzip.compress(msgspec.json.encode({"recording": 1, "program": "x"}) + b"\n"))
    assert "no visit to judge" in refused(run("check", "--replay", path))


def test_a_directory_in_the_place_of_a_file_is_one_sentence(tmp_path: Path) -> None:
    assert str(tmp_path) in refused(run("check", "--replay", tmp_path))
    assert str(tmp_path) in refused(run("check", "--config", tmp_path))
    assert str(tmp_path) in refused(run("triage", tmp_path))
    assert str(tmp_path) in refused(run("record", "--for", "0", "-o", tmp_path, "--simulate", "l40s-4"))


def test_a_missing_piece_of_evidence_is_one_sentence(tmp_path: Path) -> None:
    assert "no.log" in refused(run("triage", tmp_path / "no.log"))


def test_a_binary_file_is_no_evidence(tmp_path: Path) -> None:
    path = tmp_path / "core.123"
    path.write_bytes(b"\x7fELF" + bytes(range(256)) * 100)
    assert "core.123" in refused(run("triage", path))


def test_an_address_that_is_none_is_one_sentence() -> None:
    assert "no address to listen on" in refused(run("daemon", "--simulate", "l40s-4", "--listen", "9481"))


def test_a_fault_of_our_own_says_so_and_is_no_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    """Exit code 1 would read as a verdict."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("doctor.config.lay_over", broken)
    result = run("check", "--simulate", "l40s-4", "--for", "0")
    assert result.exit_code == 3
    assert "ZeroDivisionError" in result.stderr
    assert "this is a bug of gpu-doctor" in result.stderr


# Triage, explain, rules, simulate, schema


def test_triage_of_a_kernel_log_finds_the_lost_gpu(tmp_path: Path) -> None:
    log = tmp_path / "dmesg.txt"
    log.write_text(
        "[Sat Nov 21 03:12:40 2026] NVRM: Xid (PCI:0000:5d:00): 79, pid='<unknown>', name=<unknown>, "
        "GPU has fallen off the bus.\n"
    )
    result = run("triage", log, "--format", "json")
    assert result.exit_code == 2
    assert json.loads(result.stdout)["findings"][0]["failure_mode"] == "gpu-lost"
    screen = run("triage", log).stdout
    assert "dmesg.txt:1" in screen


def test_explain_shows_the_runbook_of_every_rule() -> None:
    for rule in RULES:
        result = run("explain", rule.id)
        assert result.exit_code == 0
        assert result.stdout.startswith(rule.id)
        for heading in ("Meaning", "Diagnosis", "Fix"):
            assert f"\n{heading}\n" in result.stdout
        assert "\x1b" not in result.stdout


def test_explain_knows_what_was_meant() -> None:
    assert refused(run("explain", "gpu-lots")) == "'gpu-lots' is no failure mode; did you mean gpu-lost?"
    assert "`gpu-doctor rules` lists them" in refused(run("explain", "x"))


def test_rules_lists_every_failure_mode_and_whether_this_node_can_judge_it(tmp_path: Path) -> None:
    (tmp_path / "proc").mkdir()
    lines = run("rules", "--root", tmp_path).stdout.splitlines()
    for rule in RULES:
        (line,) = [line for line in lines if line.startswith(f"{rule.id} ")]
        assert rule.severity.word in line
    assert "unjudged" in next(line for line in lines if line.startswith("gpu-lost "))
    simulated = run("rules", *SICK).stdout.splitlines()
    assert "present" in next(line for line in simulated if line.startswith("gpu-lost "))


def test_rules_as_markdown_asks_no_node() -> None:
    table = run("rules", "--format", "markdown").stdout.splitlines()
    assert len(table) == 2 + len(RULES)


def test_simulate_lists_profiles_and_faults() -> None:
    screen = run("simulate", "--list").stdout
    for name in ("hgx-h100-8", "rtx4090-4", "driver-hung", "gpu-lost", "must be given"):
        assert name in screen


def test_schema_is_the_documented_one() -> None:
    assert run("schema").stdout_bytes == (ROOT / "docs" / "report.schema.json").read_bytes()


@pytest.mark.parametrize("command", ["", *sorted(cli.commands)])
def test_every_command_explains_itself(command: str) -> None:
    result = run(*([command] if command else []), "--help")
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 100
    assert run("-h").stdout == run("--help").stdout


# As a program of its own


def test_the_program_says_its_version_and_help_without_loading_the_rooms() -> None:
    assert program("--version").stdout.startswith("gpu-doctor, version 0.")
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "doctor", "--help"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    ).stderr  # fmt: skip
    for slow in ("msgspec", "psutil", "structlog", "prometheus_client", "pynvml", "doctor.snapshot", "rules"):
        assert f" {slow}\n" not in loaded, f"--help imports {slow}"


def test_a_reader_that_leaves_early_is_no_error() -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m doctor simulate --list | head -n 1; echo ${{PIPESTATUS[0]}}"],
        cwd=ROOT, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.splitlines()[0] == "Profiles"
    assert done.stdout.splitlines()[1] in {"0", "141"}, "it may have written all before the reader left"
    assert done.stderr == ""


def test_a_reader_that_is_gone_is_no_error() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as gone:
        done = subprocess.run(
            [sys.executable, "-m", "doctor", "simulate", "--list"],
            cwd=ROOT, stdout=gone, stderr=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
    assert (done.returncode, done.stderr) == (141, "")


def test_a_locale_without_these_characters_gets_others_and_no_error() -> None:
    done = program("simulate", "--list", env={**os.environ, "PYTHONIOENCODING": "ascii"})
    assert (done.returncode, done.stderr) == (0, "")
    assert "8? H100 SXM" in done.stdout


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_is_quiet_and_leaves_no_child(end: signal.Signals) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "doctor", "check", "--simulate", "l40s-4", "--for", "60"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    time.sleep(3.0)
    os.killpg(process.pid, end)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, "", "")
    with pytest.raises(ProcessLookupError):
        os.killpg(process.pid, 0)


def test_the_daemon_serves_a_simulated_node(tmp_path: Path) -> None:
    import http.client

    process = subprocess.Popen(
        [sys.executable, "-m", "doctor", "daemon", *SICK, "--listen", "127.0.0.1:0", "--interval", "0.5"],
        cwd=ROOT, stderr=subprocess.PIPE, text=True, start_new_session=True,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        bound = json.loads(process.stderr.readline())
        assert bound["event"] == "listening"
        told = (json.loads(line) for line in process.stderr)
        appeared = next(event for event in told if event["event"] == "finding appeared")
        assert appeared["failure_mode"] == "gpu-lost"
        connection = http.client.HTTPConnection(bound["address"], timeout=10)
        connection.request("GET", "/metrics")
        page = connection.getresponse().read().decode()
        connection.close()
        assert 'gpu_doctor_finding{confidence="high",failure_mode="gpu-lost"' in page
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)
    finally:
        process.stderr.close()
        if process.poll() is None:
            process.kill()
            process.wait()
