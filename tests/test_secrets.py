"""No secret leaves a collector: planted in environments, flags, addresses and logs, and looked for in all that goes out."""

from __future__ import annotations

import gzip
import io
import json
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import structlog
from hypothesis import given
from hypothesis import strategies as st
from roots import CONTAINER, Root

from doctor import daemon
from doctor.collectors.redaction import snapshot_without_secrets
from doctor.diagnose import watch
from doctor.feeds import evidence, live, recording
from doctor.recorder.changes import SourcesTold, changes
from doctor.report import Report
from doctor.snapshot import Absent, EngineEvent, EngineMetrics, Snapshot, Source, Unseen, Why
from exporters import console, html, markdown, nagios
from exporters import json as json_report
from exporters.prometheus import OPENMETRICS, TEXT, Own, Tally, Writer, families
from exporters.terminal import Terminal
from rules import RULES

MARK = "Zq7"
"""In every planted secret, and nowhere else."""

ENVIRONMENT = {
    "VLLM_API_KEY": f"{MARK}vllmkey",
    "HF_TOKEN": f"hf_{MARK}aaaaaaaaaaaaaaaaaaaa",
    "HF_ENDPOINT": f"https://user:{MARK}pw@mirror.example/hf",
    "AWS_SECRET_ACCESS_KEY": f"{MARK}aws",
    "NCCL_SOCKET_IFNAME": "eth0",
    "DATABASE_PASSWORD": f"{MARK}db",
    "CUDA_VISIBLE_DEVICES": "0,1",
}
FLAGS = (
    "--model", f"https://reader:{MARK}model@store.example/llama",
    "--api-key", f"{MARK}apikey",
    f"--hf-token={MARK}hftoken",
    "--port", "8123",
    "--served-model-name", f"sk-{MARK}aaaaaaaaaaaaaaaaaaaaaa",
    "--speculative-config", json.dumps({"model": f"s3://id:{MARK}draft@bucket/d", "api_key": f"{MARK}spec"}),
    "--no-such-flag", f"Bearer {MARK}bearerbearer",
)  # fmt: skip
LINES = (
    f"non-default args: {{'api_key': ['{MARK}arg'], 'model': 'https://u:{MARK}m@h/x', 'hf_token': '{MARK}t'}}",
    f"ValueError: Unable to reach https://user:{MARK}in-url@hub.example/api?token={MARK}query&sig={MARK}sig",
    f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB. GPU 0 HF_TOKEN=hf_{MARK}bbbbbbbbbbbbbbbbbb",
    f"RuntimeError: Engine core initialization failed. Authorization: Bearer {MARK}cccccccccc password: {MARK}pw",
    f"RuntimeError: CUDA error: an illegal memory access Authorization: Basic {MARK}dXNlcjpwYXNz",
    f"OSError: {MARK} is looked for"[:9] + f" started as vllm serve m --api-key {MARK}shown --hf-token {MARK}shown2",
)


def log_text() -> str:
    prefix = "(APIServer pid=100) ERROR 11-21 03:12:40 [api_server.py:10] "
    return "".join(f"{prefix}{line}\n" for line in LINES)


@pytest.fixture
def node(tmp_path: Path) -> Path:
    """A node with an engine in a container, whose configuration and log are full of secrets."""
    root = Root(tmp_path / "root")
    root.engine(
        arguments=("/opt/e/bin/python3", "/opt/e/bin/vllm", "serve", *FLAGS),
        environment=ENVIRONMENT,
        cgroup=f"/system.slice/docker-{CONTAINER}.scope",
        output=None,
    )
    folder = f"var/lib/docker/containers/{CONTAINER}"
    root.put(
        f"{folder}/{CONTAINER}-json.log",
        "".join(json.dumps({"log": f"{line}\n", "stream": "stderr"}) + "\n" for line in log_text().splitlines()),
    )
    root.put(f"{folder}/config.v2.json", json.dumps({"Config": {"Env": [f"{k}={v}" for k, v in ENVIRONMENT.items()]}}))
    root.process(200, ("/opt/e/bin/python3", "-c", "x", "--api-key", f"{MARK}child"), parent=100)
    return root.folder


def told(report: Report) -> Iterator[tuple[str, str]]:
    """Yield every form in which a report goes out."""
    tally = Tally()
    tally.add(report)
    metrics = tuple(families(report, tally, Own(version="0")))
    yield "metrics", Writer(TEXT).page(metrics).decode()
    yield "openmetrics", Writer(OPENMETRICS).page(metrics).decode()
    yield "json", json_report.render(report).decode()
    yield "html", html.render(report, "0").decode()
    yield "markdown", markdown.render(report)
    yield "nagios", nagios.render(report)
    yield "console", console.render(report, Terminal(width=200, colour=False))


def logged(report: Report) -> str:
    """Return what the daemon logs of a report's findings."""
    out = io.StringIO()
    log = structlog.wrap_logger(structlog.PrintLogger(out), processors=[structlog.processors.JSONRenderer()])
    for lost in SourcesTold().after(report.snapshot):
        daemon._tell_of_source(log, lost)
    for change in changes((), report.findings):
        daemon._tell(log, change)
    return out.getvalue()


def assert_clean(name: str, text: str) -> None:
    at = text.find(MARK)
    assert at < 0, f"{name} tells a secret: …{text[max(0, at - 120) : at + 60]}…"


def test_nothing_that_a_live_visit_of_this_node_leaves_behind_holds_a_secret(node: Path, tmp_path: Path) -> None:
    path = tmp_path / "it.rec"
    visits = live.every(
        0.1, live.without_nvml(node, metrics=(f"http://admin:{MARK}page@127.0.0.1:1/metrics",)), times=2
    )
    *_, report = watch(recording.write(visits, path, "test"), RULES, 3600.0)
    assert report.snapshot.engines, "the engine was found"
    assert report.findings, "and its log told something"
    assert_clean("the recording", gzip.decompress(path.read_bytes()).decode())
    for name, text in (*told(report), ("the log", logged(report))):
        assert_clean(name, text)


def test_nothing_that_triage_tells_of_pasted_files_holds_a_secret(tmp_path: Path) -> None:
    log = tmp_path / "vllm.log"
    log.write_text(log_text())
    command = tmp_path / "command.txt"
    command.write_text(" ".join(f"{k}={v}" for k, v in ENVIRONMENT.items()) + " vllm serve m " + " ".join(FLAGS[2:6]))
    *_, report = watch(evidence.read((log, command), now=1.8e9), RULES, 3600.0)
    assert report.findings
    assert_clean("the snapshot", msgspec.json.encode(report.snapshot).decode())
    for name, text in told(report):
        assert_clean(name, text)


def test_what_is_no_secret_stays(node: Path) -> None:
    (visit,) = live.every(0.1, live.without_nvml(node), times=1)
    (engine,) = visit.engines
    assert engine.environment["NCCL_SOCKET_IFNAME"] == "eth0"
    assert engine.flags.port == 8123
    assert engine.flags.model == "https://***@store.example/llama"


@pytest.mark.parametrize(
    "text",
    [
        "Maximum concurrency for 8192 tokens per request: 4.3x",
        "argument --tokenizer: expected one argument",
        "NCCL INFO comm 0x55 rank 3 nranks 8 - Abort COMPLETE",
        "/models/Llama-3.3-70B-Instruct",
        "http://127.0.0.1:8000/metrics",
        "Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=ALLREDUCE, NumelIn=1)",
        "user@host: permission denied",
        "KeyError: 'model.layers.0.mlp.weight'",
    ],
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    visit = Snapshot(at=0.0, engine_events=(EngineEvent(signal="s", text=text, where="w"),))
    assert snapshot_without_secrets(visit) == visit


@given(st.text(max_size=80))
def test_cleaning_twice_changes_nothing_more_and_keeps_the_rest(text: str) -> None:
    visit = Snapshot(
        at=1.0,
        unseen=(Unseen(Source.NVML, Absent(Why.FAILED, text), text),),
        engine_events=(EngineEvent(signal="s", text=text, where="w", facts={"n": 1, "x": text}),),
        metrics=(EngineMetrics(engine="e", at=1.0, url=text),),
    )
    once = snapshot_without_secrets(visit)
    assert snapshot_without_secrets(once) == once
    assert (once.at, once.engine_events[0].signal, once.engine_events[0].facts["n"]) == (1.0, "s", 1)
