"""The door: what is served, while it is fresh, and to whom."""

from __future__ import annotations

import gzip
import http.client
import json
import os
import shutil
import socket
import subprocess
import sys
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import pytest
import reports
from daemons import PATIENCE_SECONDS, PROGRAM, Daemon, await_true, running
from prometheus_client.parser import text_string_to_metric_families

from doctor.door.address import Address, DoorError, address
from doctor.door.board import Board


@pytest.fixture(scope="module")
def lost() -> Iterator[Daemon]:
    with running(PROGRAM, "lost", "0.2") as daemon:
        await_true(lambda: daemon.get("/healthz")[0] == 200)
        yield daemon


def test_the_metrics_page_tells_the_finding(lost: Daemon) -> None:
    status, headers, body = lost.get("/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    families = {f.name: f for f in text_string_to_metric_families(body.decode())}
    (finding,) = families["gpu_doctor_finding"].samples
    assert (finding.labels["failure_mode"], finding.labels["gpu"]) == ("gpu-lost", "2")


def test_openmetrics_and_gzip_are_given_to_those_who_ask(lost: Daemon) -> None:
    _, headers, body = lost.get(
        "/metrics", Accept="application/openmetrics-text; version=1.0.0", Accept_Encoding="gzip"
    )
    assert headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
    assert headers["content-encoding"] == "gzip"
    assert int(headers["content-length"]) == len(body)
    assert gzip.decompress(body).endswith(b"# EOF\n")


def test_the_report_is_the_json_of_check(lost: Daemon) -> None:
    status, headers, body = lost.get("/report")
    assert (status, headers["content-type"]) == (200, "application/json")
    assert json.loads(body)["findings"][0]["failure_mode"] == "gpu-lost"


@pytest.mark.parametrize("path", ["//", "/metrics/", "/report.json", "/%6detrics", "/../etc/passwd"])
def test_other_paths_are_not_there(lost: Daemon, path: str) -> None:
    status, _, body = lost.get(path)
    assert status == 404
    assert b"/, /metrics, /healthz and /report" in body


def test_a_query_does_not_matter_and_a_head_has_no_body(lost: Daemon) -> None:
    assert lost.get("/metrics?name[]=up")[0] == 200
    assert lost.get("/healthz", "HEAD")[0::2] == (200, b"")
    for method in ("POST", "PUT", "DELETE", "OPTIONS", "TRACE", "BREW"):
        status, headers, _ = lost.get("/metrics", method)
        assert (status, headers["allow"]) == (405, "GET, HEAD")


def test_a_client_that_sends_garbage_or_leaves_does_no_harm(lost: Daemon) -> None:
    for garbage in (b"\x00" * 100, b"GET /metrics HTTP/1.1\r\nAccept: application/openmetrics-text; version=x\r\n\r\n"):
        with socket.create_connection((lost.host, lost.port)) as client:
            client.sendall(garbage)
    with socket.create_connection((lost.host, lost.port)):
        assert lost.get("/healthz")[0] == 200


def test_what_is_stale_is_served_no_more() -> None:
    with running(PROGRAM, "lost,stop", "0.3") as daemon:
        await_true(lambda: daemon.get("/healthz")[0] == 200)
        await_true(lambda: daemon.get("/healthz")[0] == 503)
        assert b"the last report is" in daemon.get("/healthz")[2]
        page = daemon.get("/metrics")[2].decode()
        assert "gpu_doctor_build_info" in page
        assert "gpu_doctor_finding" not in page
        assert "celsius" not in page
        assert daemon.get("/report")[0] == 503


def test_a_port_that_is_taken_is_said_in_a_sentence() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = subprocess.run(
            [sys.executable, PROGRAM, "clear", "1", f"127.0.0.1:{port}"],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    assert done.returncode != 0
    assert done.stderr == f"can't listen on 127.0.0.1:{port}: Address already in use\n"


@pytest.mark.parametrize(
    ("text", "made"),
    [("127.0.0.1:9481", Address("127.0.0.1", 9481)), ("[::1]:0", Address("::1", 0)), ("node:1", Address("node", 1))],
)
def test_addresses(text: str, made: Address) -> None:
    assert address(text) == made
    assert str(made) == text


@pytest.mark.parametrize("text", ["", "9481", ":9481", "host:", "host:port", "host:70000", "host:-1", "host:٣"])
def test_no_addresses(text: str) -> None:
    with pytest.raises(DoorError, match="no address to listen on"):
        address(text)


def test_a_report_is_fresh_for_three_intervals() -> None:
    now = 100.0
    board = Board(15.0, clock=lambda: now)
    assert board.fresh() is None
    assert board.age_seconds() is None
    report = reports.clear()
    board.put(report)
    now += 45.0
    assert board.fresh() is report
    now += 0.1
    assert board.fresh() is None
    board.put(report)
    assert board.fresh() is report


@pytest.mark.skipif(shutil.which("prometheus") is None, reason="prometheus is not on this machine")
def test_a_real_prometheus_scrapes_the_daemon(tmp_path: Path, lost: Daemon) -> None:
    """Debian's Prometheus reads the page every second; the finding is asked back over its API."""
    config = tmp_path / "prometheus.yml"
    config.write_text(
        "scrape_configs:\n"
        "  - job_name: gpu-doctor\n"
        "    scrape_interval: 1s\n"
        "    scrape_timeout: 1s\n"
        f"    static_configs: [{{targets: ['{lost.host}:{lost.port}']}}]\n"
    )
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    log = (tmp_path / "prometheus.log").open("w")
    server = subprocess.Popen(
        [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={tmp_path / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
        ],
        stdout=log, stderr=log, env={"PATH": os.environ["PATH"], "GOMAXPROCS": "1"},
    )  # fmt: skip

    def asked(query: str) -> list[dict[str, dict[str, str]]]:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
            connection.request("GET", "/api/v1/query?" + urllib.parse.urlencode({"query": query}))
            body = connection.getresponse().read()
            connection.close()
        except OSError:
            return []
        return json.loads(body).get("data", {}).get("result", []) if body.startswith(b"{") else []

    try:
        (finding,) = await_true(lambda: asked('gpu_doctor_finding{failure_mode="gpu-lost"}'))  # type: ignore[misc]
        assert finding["metric"]["uuid"] == reports.uuid(2)
        assert finding["metric"]["severity"] == "critical"
        (up,) = asked('up{job="gpu-doctor"}')
        assert up["value"][1] == "1"
        assert len(asked("gpu_doctor_gpu_temperature_celsius")) == 3, "the lost GPU has no temperature"
    finally:
        server.terminate()
        server.wait(PATIENCE_SECONDS)
        log.close()
