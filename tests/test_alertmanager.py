"""From the fault to the call: a simulated fault, the daemon, a real Prometheus with the shipped rules, a real Alertmanager."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import subprocess
import threading
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from daemons import ALERTMANAGER, Daemon, Place, alertmanager, alerts, await_true, free_place, prometheus, running
from test_alerts import FILE, ONE_EACH, RUNBOOKS, expected, last
from test_cases import FIRES, name_of

from doctor.feeds import simulated
from doctor.rule import Severity

EXAMPLE = FILE.with_name("alertmanager-example.yml")

needs_alertmanager = pytest.mark.skipif(
    ALERTMANAGER is None, reason="Alertmanager is not on this machine; Debian's package is prometheus-alertmanager"
)


@pytest.mark.skipif(shutil.which("amtool") is None, reason="amtool comes with Debian's package prometheus-alertmanager")
def test_amtool_accepts_the_example() -> None:
    done = subprocess.run(["amtool", "check-config", str(EXAMPLE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(shutil.which("amtool") is None, reason="amtool comes with Debian's package prometheus-alertmanager")
@pytest.mark.parametrize(("severity", "receiver"), [("critical", "pager"), ("warning", "tickets")])
def test_critical_alerts_go_to_the_pager_and_warnings_become_tickets(severity: str, receiver: str) -> None:
    done = subprocess.run(
        ["amtool", "config", "routes", "test", f"--config.file={EXAMPLE}", f"severity={severity}"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == receiver


# One call an incident ----------------------------------------------------------------------------------------------


MESH = "gpu-lost/fires-in-a-mesh"
"""A GPU falls off the bus, the ranks time out, the engine dies: one incident."""


@needs_alertmanager
def test_a_cause_keeps_what_it_explains_quiet_and_a_ticket_hides_no_page(tmp_path: Path) -> None:
    """The alerts of all recordings at once, each of a node of its own."""
    nodes = [*ONE_EACH, *(path for path in FIRES if name_of(path) == MESH)]
    raised = {name_of(path): expected(last(path), name_of(path)) for path in nodes}
    loud: set[tuple[str, str]] = set()
    for path in nodes:
        reported = last(path).findings
        told = {(f.finding.failure_mode, f.finding.severity) for f in reported}
        page = any(f.depth == 0 and f.finding.severity is Severity.CRITICAL for f in reported)
        for f in reported:
            mode, severity = f.finding.failure_mode, f.finding.severity
            hushed = any((cause, severity) in told for cause in f.caused_by)
            if (
                severity is not Severity.NOTICE
                and not hushed
                and not (f.depth and page and severity is Severity.WARNING)
            ):
                loud.add((name_of(path), mode))
    assert {mode for instance, mode in loud if instance == MESH} == {"gpu-lost"}
    assert len(loud) < sum(map(len, raised.values())), "some are kept quiet"
    body = [{"labels": {"alertname": r.name, **r.labels}} for each in raised.values() for r in each]
    with alertmanager(tmp_path, EXAMPLE) as place:
        post(place, body)
        await_true(lambda: len(alerts(place)) == len(body))
        heard = {
            (a["labels"]["instance"], a["labels"]["failure_mode"])
            for a in alerts(place)
            if not a["status"]["inhibitedBy"]
        }
    assert heard == loud
    for instance, each in raised.items():
        if any(r.labels["severity"] == "critical" for r in each):
            modes = {r.labels["failure_mode"] for r in each if r.labels["severity"] == "critical"}
            assert modes & {mode for name, mode in heard if name == instance}, instance


def post(place: Place, body: list[dict[str, Any]]) -> None:
    connection = http.client.HTTPConnection(place.host, place.port, timeout=10)
    connection.request("POST", "/api/v2/alerts", json.dumps(body), {"Content-Type": "application/json"})
    assert connection.getresponse().status == 200
    connection.close()


# From the fault to the call ----------------------------------------------------------------------------------------

PROFILE, GPU, LINK = "hgx-h100-4", 2, 1
INTERVAL_SECONDS = 1.0
BEGINS_SECONDS = 1.5
"""After the first visit."""
LASTS_SECONDS = (4.0, 20.0, 60.0)
"""How long the fault stands; longer where the machine was too busy to see all of it."""

SOON = ((r"\bfor: [1-9]\d*m", "for: 300ms"), (r"keep_firing_for: \d+m", "keep_firing_for: 300ms"), (r"\[3m\]", "[2s]"))
"""What makes the shipped rules fast enough for a test."""


class Look(NamedTuple):
    """What one page said."""

    visit_at: float
    drill_at: float
    """When the simulated node began to live."""
    found: bool


TIMES = re.compile(r"^gpu_doctor_(report|engine)(?:_start_time|_timestamp)_seconds\S* (\S+)$", re.MULTILINE)
FOUND = re.compile(r'^gpu_doctor_finding\{.*failure_mode="nvlink-degraded"', re.MULTILINE)


class Watcher:
    """Reads a daemon's page again and again, and remembers what each visit told."""

    def __init__(self, daemon: Daemon) -> None:
        self.looks: dict[float, Look] = {}
        self._daemon = daemon
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()

    def _watch(self) -> None:
        started = simulated.drill_of(PROFILE).engine.started_seconds
        while not self._over.wait(0.1):
            try:
                page = self._daemon.get("/metrics")[2].decode()
            except OSError:  # the machine is busy: another look will do
                continue
            times = dict(TIMES.findall(page))
            if "report" in times:
                visit_at, engine_at = float(times["report"]), float(times["engine"])
                self.looks[visit_at] = Look(visit_at, engine_at - started, bool(FOUND.search(page)))

    def end(self) -> list[Look]:
        self._over.set()
        self._thread.join()
        return list(self.looks.values())


@needs_alertmanager
@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on this machine")
def test_a_fault_becomes_an_alert_one_visit_later_and_ends_with_it(tmp_path: Path) -> None:
    rules = FILE.read_text(encoding="utf-8")
    for pattern, soon in SOON:
        rules, number = re.subn(pattern, soon, rules)
        assert number
    (tmp_path / "soon.rules.yml").write_text(rules, encoding="utf-8")
    node = free_place()
    with alertmanager(tmp_path, EXAMPLE) as manager:
        more = (
            "rule_files: [soon.rules.yml]\n"
            f"alerting: {{alertmanagers: [{{static_configs: [{{targets: ['{manager.host}:{manager.port}']}}]}}]}}\n"
        )
        with prometheus(tmp_path, {"gpu-doctor": (node, "")}, more, labels={"gpu_doctor_runbooks": RUNBOOKS}):
            await_true(lambda: named(manager, "GpuDoctorDown"), 60)
            for lasts in LASTS_SECONDS:
                if complete(node, manager, lasts):
                    break
            else:
                pytest.fail("no alert came while the fault stood")


def complete(node: Place, manager: Place, lasts: float) -> bool:
    """Let a fault come and go; return whether it stood long enough to be called."""
    ends = BEGINS_SECONDS + lasts
    fault = f"nvlink-down:gpu={GPU},link={LINK},start={BEGINS_SECONDS},end={ends}"
    command = ("daemon", "--simulate", PROFILE, "--fault", fault, "--interval", str(INTERVAL_SECONDS))
    with running("-m", "doctor", *command, "--listen", f"{node.host}:{node.port}") as daemon:
        watcher = Watcher(daemon)
        try:
            seen: list[dict[str, Any]] = []
            await_true(
                lambda: seen.extend(named(manager, "GpuInterconnect")) or seen or told(daemon, "finding cleared"),
                lasts + 60,
            )
            if not seen:
                return False
            is_the_alert(seen[0], daemon)
            await_true(lambda: told(daemon, "finding cleared"), lasts + 60)
            await_true(lambda: not named(manager, "GpuInterconnect"), 60)
            await_true(lambda: not named(manager, "GpuDoctorDown"), 60)
        finally:
            looks = watcher.end()
    assert [look for look in looks if look.found]
    for look, following in pairwise(looks):  # a visit is over before the next one begins
        began, ended = look.visit_at - look.drill_at, following.visit_at - look.drill_at
        if began > BEGINS_SECONDS + CLOCK_SECONDS and ended < ends:
            assert look.found, f"a visit {began - BEGINS_SECONDS:.2f} s after the fault does not tell of it"
        if ended < BEGINS_SECONDS or began > ends + CLOCK_SECONDS:
            assert not look.found
    return True


CLOCK_SECONDS = 0.05
"""Processes tell their start in hundredths of a second."""


def is_the_alert(alert: dict[str, Any], daemon: Daemon) -> None:
    (event,) = told(daemon, "finding appeared")
    assert alert["labels"] == {
        "alertname": "GpuInterconnect",
        "failure_mode": "nvlink-degraded",
        "gpu_doctor_runbooks": RUNBOOKS,
        "instance": f"{daemon.host}:{daemon.port}",
        "job": "gpu-doctor",
        "root_cause": "true",
        "severity": "critical",
    }
    uuids = event["gpus"]
    assert isinstance(uuids, list)
    assert alert["annotations"]["summary"] == f"{daemon.host}:{daemon.port}: nvlink-degraded (GPU 0, {GPU})"
    assert alert["annotations"]["description"].startswith(
        f"A GPU has fewer active NVLinks than its board gives it. {' '.join(uuids)} `gpu-doctor explain nvlink-degraded`"
    )
    assert alert["annotations"]["runbook_url"] == f"{RUNBOOKS}/nvlink_degraded.md"
    assert alert["status"]["state"] == "active"


def told(daemon: Daemon, name: str) -> list[dict[str, object]]:
    return [event for event in daemon.log if event["event"] == name and event["failure_mode"] == "nvlink-degraded"]


def named(manager: Place, name: str) -> list[dict[str, Any]]:
    return [alert for alert in alerts(manager) if alert["labels"]["alertname"] == name]
