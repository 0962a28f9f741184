"""Pasted files become visits: kinds told by content, parts cut out, everything joined, and garbage refused in one sentence."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doctor.feeds import evidence, recording
from doctor.snapshot import OF_A_NODE, Snapshot, Source, Why, Xid, known

NOW = 1795246600.0

TOPO = "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\nGPU0\t X \tNV18\t0-47\t0\t\tN/A\nGPU1\tNV18\t X \t0-47\t0\t\tN/A\n\nLegend:\n\n  X    = Self\n"
SMI_Q = """\
==============NVSMI LOG==============

Timestamp                                 : Sat Nov 21 07:30:00 2026
Driver Version                            : 550.90.07
CUDA Version                              : 12.4

Attached GPUs                             : 2
GPU 00000000:18:00.0
    Product Name                          : NVIDIA H100 80GB HBM3
    GPU UUID                              : GPU-11111111-aaaa-bbbb-cccc-000000000001
    Temperature
        GPU Current Temp                  : 41 C
GPU 00000000:3B:00.0
    Product Name                          : NVIDIA H100 80GB HBM3
    GPU UUID                              : GPU-11111111-aaaa-bbbb-cccc-000000000002
    Temperature
        GPU Current Temp                  : 43 C
"""
DMESG = "[    0.000000] Linux version 6.8.0\n[Sat Nov 21 07:35:01 2026] NVRM: Xid (PCI:0000:3b:00): 79, pid=12, name=VLLM::Worker_TP, GPU has fallen off the bus.\n"
COLLECT_ENV = """\
Collecting environment information...
PyTorch version: 2.6.0+cu124
CUDA used to build PyTorch: 12.4
Nvidia driver version: 550.90.07
GPU models and configuration:
GPU 0: NVIDIA H100 80GB HBM3
GPU 1: NVIDIA H100 80GB HBM3

vLLM Version: 0.9.1
GPU Topology:
GPU0\tGPU1\tCPU Affinity
GPU0\t X \tNV18\t0-47
GPU1\tNV18\t X \t0-47

CUDA_VISIBLE_DEVICES=1
HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz
"""
LOG = "INFO 11-21 07:34:00 [api_server.py:1] vLLM API server version 0.9.1\nERROR 11-21 07:35:02 [core.py:1] RuntimeError: CUDA error: an illegal memory access was encountered\n"
PAGE = '# HELP vllm:num_requests_running x\n# TYPE vllm:num_requests_running gauge\nvllm:num_requests_running{model_name="m"} 3.0\n'
CONFIG = json.dumps({"architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 80})
COMMAND = "$ HF_TOKEN=hf_abcdefghijklmnopqrstuvwxyz vllm serve org/m -tp 2 --api-key sk-very-secret-0123456789\n"
STATUS = "● nvidia-fabricmanager.service - NVIDIA fabric manager service\n     Active: active (running) since Sat 2026-11-21 02:10:15 UTC\n   Main PID: 2116 (nv-fabricmanage)\n"
LSPCI = "0000:18:00.0 3D controller [0302]: NVIDIA Corporation GH100 [H100 SXM5 80GB] [10de:2330] (rev a1)\n0000:3b:00.0 3D controller [0302]: NVIDIA Corporation GH100 [H100 SXM5 80GB] [10de:2330] (rev a1)\n"
NVLINK = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-aaaa-bbbb-cccc-000000000001)\n\t Link 0: 26.562 GB/s\n\t Link 1: <inactive>\n"

ALL = (TOPO, SMI_Q, DMESG, COLLECT_ENV, LOG, PAGE, COMMAND, STATUS, LSPCI, NVLINK)


class Folder:
    """Writes evidence and reads it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.paths: list[Path] = []

    def file(self, content: str | bytes, name: str = "") -> Path:
        path = self.path / (name or f"{len(self.paths)}.txt")
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        self.paths.append(path)
        return path

    def visits(self, *contents: str | bytes) -> list[Snapshot]:
        return list(evidence.read([self.file(content) for content in contents], now=NOW))

    def visit(self, *contents: str | bytes) -> Snapshot:
        return self.visits(*contents)[-1]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.mark.parametrize(
    ("content", "kinds"),
    [
        (TOPO, ("topo",)),
        (SMI_Q, ("smi-q",)),
        (DMESG, ("kernel-log",)),
        (COLLECT_ENV, ("collect-env", "topo")),
        (LOG, ("engine-log",)),
        (PAGE, ("engine-metrics",)),
        (CONFIG, ("model-config",)),
        (COMMAND, ("command-line",)),
        (STATUS, ("fabricmanager-status",)),
        (LSPCI, ("lspci",)),
        (NVLINK, ("smi-list",)),
        (COLLECT_ENV + "\n### dmesg\n" + DMESG + "\n### smi\n" + SMI_Q, ("collect-env", "kernel-log", "smi-q", "topo")),
    ],
)
def test_a_file_is_taken_for_what_stands_in_it(folder: Folder, content: str, kinds: tuple[str, ...]) -> None:
    assert evidence.kinds(folder.file(content, "misleading.prom"), now=NOW) == kinds


def test_everything_together_is_one_node(folder: Folder) -> None:
    visit = folder.visit(*ALL, CONFIG)
    first, second = visit.gpus
    assert (first.uuid, second.index) == ("GPU-11111111-aaaa-bbbb-cccc-000000000001", 1)
    assert (first.pci_device_id, first.thermal.gpu_celsius) == ("10de:2330", 41)
    assert known(first.links)
    assert [link.active for link in first.links] == [True, False]
    (pair,) = visit.pairs
    assert (pair.first, pair.second, pair.nvlinks) == (first.uuid, second.uuid, 18)
    (engine,) = visit.engines
    assert (engine.kind, engine.stack.engine, engine.stack.torch, engine.model.layers) == (
        "vllm",
        "0.9.1",
        "2.6.0+cu124",
        80,
    )
    assert (engine.flags.tensor_parallel_size, engine.visible_gpus) == (2, (second.uuid,))
    assert engine.log == visit.engine_events[0].log
    assert (visit.metrics[0].engine, visit.metrics[0].running) == (engine.id, 3)
    assert [event.code for event in visit.kernel if isinstance(event, Xid)] == [79]
    assert visit.stack.driver == "550.90.07"
    assert (visit.fabric_manager.unit_state, visit.fabric_manager.running) == ("active", True)
    assert known(visit.host.pci_devices)
    assert visit.at == NOW - 98  # the engine's last line is the newest stamp
    assert {u.source for u in visit.unseen if not u.what} == {Source.PROCESSES}


def test_what_was_not_given_is_said_to_be_not_given(folder: Folder) -> None:
    visit = folder.visit(LOG)
    assert visit.seen == (Source.ENGINE_LOG,)
    for source in set(OF_A_NODE) - {Source.ENGINE_LOG}:
        why = visit.why_unseen(source)
        assert why is not None
        assert why.why is Why.NOT_GIVEN


def test_a_topology_alone_shows_pairs_but_not_the_state_of_the_gpus(folder: Folder) -> None:
    visit = folder.visit(TOPO)
    assert [pair.nvlinks for pair in visit.pairs] == [18]
    assert [gpu.uuid for gpu in visit.gpus] == ["index:0", "index:1"]
    assert Source.NVML not in visit.seen


def test_an_nvidia_smi_that_failed_is_a_failure_not_a_gap(folder: Folder) -> None:
    visit = folder.visit(
        DMESG, "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure that it runs.\n"
    )
    why = visit.why_unseen(Source.NVML)
    assert why is not None
    assert (why.why, why.detail[:9]) == (Why.FAILED, "1.txt:1: ")


def test_what_the_driver_says_in_a_mixed_log_is_not_the_engines_word(folder: Folder) -> None:
    visit = folder.visit(LOG + DMESG)
    assert [event.code for event in visit.kernel if isinstance(event, Xid)] == [79]
    assert {event.signal for event in visit.engine_events} == {"engine-version", "cuda-error"}


def test_no_secret_comes_through(folder: Folder) -> None:
    visit = folder.visit(COLLECT_ENV, COMMAND)
    assert "hf_abc" not in repr(visit)
    assert "sk-very" not in repr(visit)
    assert visit.engines[0].environment["HF_TOKEN"] == "***"


def test_parts_of_one_file_keep_their_line_numbers(folder: Folder) -> None:
    text = COLLECT_ENV + TOPO + SMI_Q + "```\n" + DMESG + LOG
    visit = folder.visit(text)
    (xid,) = [event for event in visit.kernel if isinstance(event, Xid)]
    assert xid.where == f"0.txt:{text[: text.index('NVRM: Xid')].count(chr(10)) + 1}"
    (error,) = [event for event in visit.engine_events if event.signal == "cuda-error"]
    assert error.where == f"0.txt:{text[: text.index('RuntimeError')].count(chr(10)) + 1}"


def test_reports_of_two_times_are_two_visits(folder: Folder) -> None:
    later = SMI_Q.replace("07:30:00", "07:31:00").replace("41 C", "81 C")
    first, last = folder.visits(later, SMI_Q, DMESG)
    assert [visit.gpus[0].thermal.gpu_celsius for visit in (first, last)] == [41, 81]
    assert (first.at, first.kernel) == (NOW - 400, ())
    assert last.at == NOW - 99


def test_of_several_pages_the_last_one_counts_since_nothing_tells_their_times(folder: Folder) -> None:
    (visit,) = folder.visits(PAGE, PAGE.replace("3.0", "7.0"))
    assert [metrics.running for metrics in visit.metrics] == [7]


def test_two_commands_on_two_ports_are_two_engines(folder: Folder) -> None:
    visit = folder.visit(
        "vllm serve m --port 8000 -tp 2\nvllm serve m --port 8001 -tp 2\nvllm serve m --port 8001 -tp 4\n"
    )
    assert [(engine.flags.port, engine.flags.tensor_parallel_size) for engine in visit.engines] == [
        (8000, 2),
        (8001, 4),
    ]
    assert len({engine.id for engine in visit.engines}) == 2


def test_a_sentence_about_an_engine_is_no_command(folder: Folder) -> None:
    assert folder.visit(LOG + "vllm serve is hanging since this morning\n").engines == ()


def test_a_report_whose_vllm_is_unknown_makes_no_engine(folder: Folder) -> None:
    assert folder.visit(COLLECT_ENV.replace("0.9.1", "N/A")).engines == ()


def test_the_loaded_driver_is_read_from_the_kernel_log(folder: Folder) -> None:
    assert (
        folder.visit("[ 5.0] NVRM: loading NVIDIA UNIX x86_64 Kernel Module  570.86.15  Release\n").host.driver_module
        == "570.86.15"
    )


def test_compressed_and_utf_16_files_are_read(folder: Folder) -> None:
    assert folder.visit(gzip.compress(DMESG.encode())).kernel
    assert folder.visit(b"\xff\xfe" + SMI_Q.encode("utf-16-le")).gpus


def test_a_recording_is_replayed_and_not_mixed(folder: Folder) -> None:
    path = folder.path / "incident.rec"
    list(recording.write([Snapshot(at=1.0), Snapshot(at=2.0)], path, "test"))
    assert [visit.at for visit in evidence.read([path], now=NOW)] == [1.0, 2.0]
    with pytest.raises(evidence.EvidenceError, match="--replay"):
        list(evidence.read([path, folder.file(DMESG)], now=NOW))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(evidence.EvidenceError, match="cut off"):
        list(evidence.read([path], now=NOW))


def test_a_pipe_is_read_from_its_first_byte(folder: Folder) -> None:
    pipe = folder.path / "pipe"
    os.mkfifo(pipe)
    writer = threading.Thread(target=lambda: pipe.write_text(DMESG))
    writer.start()
    (visit,) = evidence.read([pipe], now=NOW)
    writer.join()
    assert [event.where for event in visit.kernel] == ["pipe:1", "pipe:2"]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "the file is empty"),
        (b"\x7fELF\x02\x01\x01" + bytes(range(256)) * 40, "is not text"),
        (bytes(4096), "is not text"),
        (b"PK\x03\x04" + b"a" * 100, "is compressed with zip"),
        (b"\x28\xb5\x2f\xfd" + b"a" * 100, "is compressed with zstd"),
        (gzip.compress(DMESG.encode() * 50)[:60], "can't be read to its end"),
        (b"Dear all, our holiday starts on Friday.\n", "nothing in it is evidence"),
    ],
    ids=["empty", "binary", "zeros", "zip", "zstd", "torn gzip", "a letter"],
)
def test_garbage_is_refused_with_one_sentence_that_names_the_file(folder: Folder, content: bytes, says: str) -> None:
    path = folder.file(content, "odd")
    with pytest.raises(evidence.EvidenceError, match=says) as refused:
        list(evidence.read([path], now=NOW))
    assert str(refused.value).startswith(f"{path}: ")
    assert "\n" not in str(refused.value)


def test_what_can_not_be_opened_is_refused_too(folder: Folder) -> None:
    for path, says in ((folder.path, "is a directory"), (folder.path / "nowhere", "No such file")):
        with pytest.raises(evidence.EvidenceError, match=says):
            list(evidence.read([path], now=NOW))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission_is_refused(folder: Folder) -> None:
    path = folder.file(DMESG)
    path.chmod(0)
    with pytest.raises(evidence.EvidenceError, match="Permission denied"):
        list(evidence.read([path], now=NOW))


MEASURE = """
import re, sys
from pathlib import Path
from doctor.feeds import evidence
visits = list(evidence.read([Path(sys.argv[1])], now=1795246600.0))
# Not getrusage: what it calls the peak counts the parent's memory from before exec.
peak = re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())
print(len(visits[-1].kernel), len(visits[-1].engine_events), int(peak[1]) // 1024)
"""


@pytest.mark.parametrize("shape", ["one long line", "many lines", "many xids", "spaces"])
def test_memory_is_bounded_whatever_the_size(folder: Folder, shape: str) -> None:
    path = folder.path / "big.log"
    with path.open("wb") as file:
        file.write(LOG.encode())
        if shape == "one long line":
            for _ in range(100):
                file.write(b"x" * (1 << 20))
        elif shape == "many lines":
            for _ in range(200):
                file.write(b'INFO:     127.0.0.1:4711 - "POST /v1/completions HTTP/1.1" 200 OK\n' * 16384)
        elif shape == "spaces":
            for _ in range(40):
                file.write(b" " * (1 << 20))
        else:
            for second in range(30_000):
                file.write(b"[%d.0] NVRM: Xid (PCI:0000:3b:00): 13, pid=7, name=python3, Graphics Exception\n" % second)
        file.write(b"\n" + DMESG.encode())
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    kernel, events, megabytes = map(int, done.stdout.split())
    assert megabytes < 150
    assert 1 <= kernel <= evidence.KERNEL_EVENTS_MAX + 1
    assert events >= 1


PIECES = st.lists(
    st.sampled_from([line for text in (*ALL, CONFIG) for line in text.splitlines(keepends=True)])
    | st.text(max_size=15),
    max_size=40,
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(PIECES.map(lambda parts: "".join(parts).encode("utf-8", "replace")) | st.binary(max_size=300))
def test_any_bytes_are_read_or_refused_in_one_line(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any"
    path.write_bytes(content)
    try:
        visits = list(evidence.read([path], now=NOW))
    except evidence.EvidenceError as e:
        visits, message = [], str(e)
    else:
        message = ""
    assert bool(visits) != bool(message)
    assert "\n" not in message
    assert all(visit.at <= NOW + evidence.DAY_SECONDS for visit in visits)


def a_life(number: int, *, lines: int) -> str:
    """One life of an engine that starts, works, and crashes."""
    stamp = f"11-21 {number // 60 % 24:02}:{number % 60:02}:00"
    work = "".join(f"INFO {stamp} [x.py:1] nothing of interest, number {n}\n" for n in range(lines))
    return (
        f"INFO {stamp} [core.py:1] Initializing a V1 LLM engine (v0.11.0) with config: model='m'\n{work}"
        f"ERROR {stamp} [core.py:1] RuntimeError: assertion number {number} failed\n"
    )


@pytest.fixture
def small_bounds(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bounds a thousandth of the real ones, so that a small log is a large one."""
    monkeypatch.setattr(evidence, "FIRST_BYTES", 8 << 10)
    monkeypatch.setattr(evidence, "LAST_LIVES_BYTES", 32 << 10)


@pytest.mark.usefixtures("small_bounds")
def test_the_middle_of_a_log_of_many_lives_is_passed_over_and_said(tmp_path: Path) -> None:
    log = tmp_path / "loop.log"
    text = "".join(a_life(number, lines=3) for number in range(2000))
    log.write_text(text)
    (snapshot,) = evidence.read([log], now=NOW)
    (state,) = snapshot.logs
    assert (state.lines, state.bytes) == (text.count("\n"), len(text))
    assert len(text) - (50 << 10) < state.passed_over_bytes < len(text)
    last = [e for e in snapshot.engine_events if "assertion number 1999" in e.text]
    assert [e.where for e in last] == [f"loop.log:{text.count(chr(10))}"]
    assert any("assertion number 0 " in e.text for e in snapshot.engine_events)


@pytest.mark.usefixtures("small_bounds")
def test_one_long_life_is_read_whole(tmp_path: Path) -> None:
    log = tmp_path / "long.log"
    fault = "ERROR 11-21 07:35:02 [core.py:1] RuntimeError: CUDA error: an illegal memory access was encountered\n"
    log.write_text(a_life(0, lines=900) + fault + a_life(1, lines=2000))
    (snapshot,) = evidence.read([log], now=NOW)
    assert snapshot.logs[0].passed_over_bytes == 0
    assert any(e.signal == "cuda-error" for e in snapshot.engine_events)
