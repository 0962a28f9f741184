"""What must not matter to triage: order of files, cuts, shifted stamps, noise, repetition, line ends, what stands before."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise, permutations
from pathlib import Path

import drills
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cause_chains import PASTED, pasted

from doctor.diagnose import watch
from doctor.feeds import evidence
from doctor.readers import kernel_log, vllm_log
from rules import RULES

NOW = 1795270000.0

START = (
    "(APIServer pid=70) INFO 11-21 07:30:00 [api_server.py:1] vLLM API server version 0.11.0\n"
    "(EngineCore_DP0 pid=71) INFO 11-21 07:30:05 [core.py:77] Initializing a V1 LLM engine (v0.11.0) with config: "
    "model='m', tensor_parallel_size=4, quantization=None\n"
)
READY = (
    "(APIServer pid=70) INFO:     Application startup complete.\n"
    '(APIServer pid=70) INFO:     127.0.0.1:5000 - "POST /v1/completions HTTP/1.1" 200 OK\n'
)
DEAD = (
    "(EngineCore_DP0 pid=71) ERROR 11-21 07:41:03 [core.py:700] EngineCore encountered a fatal error.\n"
    "(APIServer pid=70) ERROR 11-21 07:41:04 [async_llm.py:400] EngineDeadError: EngineCore encountered an issue.\n"
)
LOGS = {
    "healthy": START + READY,
    "illegal access": START
    + READY
    + "(Worker_TP1 pid=73) ERROR 11-21 07:41:02 [mp.py:1] RuntimeError: CUDA error: an illegal memory access was encountered\n"
    + DEAD,
    "collective timeout": START
    + READY
    + "[rank2]:[E1121 07:41:02.100000001 ProcessGroupNCCL.cpp:616] [Rank 2] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=31, OpType=ALLREDUCE, NumelIn=4, NumelOut=4, Timeout(ms)=600000) ran for 600031 milliseconds before "
    "timing out.\n" + DEAD,
    "out of memory": START
    + "(Worker_TP0 pid=72) ERROR 11-21 07:31:02 [mp.py:1] torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 "
    "GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.02 GiB is free.\n"
    "(EngineCore_DP0 pid=71) ERROR 11-21 07:31:03 [core.py:700] EngineCore failed to start.\n",
    "own error": START
    + "(EngineCore_DP0 pid=71) ERROR 11-21 07:31:03 [core.py:700] KeyError: 'lm_head.weight'\n"
    + "(EngineCore_DP0 pid=71) ERROR 11-21 07:31:03 [core.py:700] EngineCore failed to start.\n",
}
DMESG = (
    "[    0.000000] Linux version 6.8.0\n"
    "[Sat Nov 21 07:41:01 2026] NVRM: Xid (PCI:0000:3b:00): 79, pid=73, name=VLLM::Worker_TP, GPU has fallen off the bus.\n"
)
MISMATCH = (
    "[Sat Nov 21 07:41:05 2026] NVRM: API mismatch: the client has the version 595.71.05, but\n"
    "[Sat Nov 21 07:41:05 2026] NVRM: this kernel module has the version 590.48.01.  Please\n"
    "[Sat Nov 21 07:41:05 2026] NVRM: make sure that this kernel module and all NVIDIA driver components have the same version.\n"
)
KILL = (
    "[Sat Nov 21 07:41:06 2026] oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/vllm,"
    "task_memcg=/vllm,task=VLLM::Worker_TP,pid=73,uid=0\n"
    "[Sat Nov 21 07:41:06 2026] Memory cgroup out of memory: Killed process 73 (VLLM::Worker_TP) total-vm:9kB, anon-rss:6kB, "
    "file-rss:2kB, shmem-rss:1kB, UID:0 pgtables:13kB oom_score_adj:0\n"
)
COLLECT_ENV = (
    "Collecting environment information...\nPyTorch version: 2.8.0+cu128\nNvidia driver version: 580.65.06\n"
    "GPU models and configuration:\nGPU 0: NVIDIA H100 80GB HBM3\nGPU 1: NVIDIA H100 80GB HBM3\n\nvLLM Version: 0.11.0\n"
)

NOISE = (
    "systemd[1]: Started Session 12 of User ops.",
    '10.0.0.1 - - [21/Nov/2026:07:30:00 +0000] "GET / HTTP/1.1" 200 612',
    "level=info msg=heartbeat component=sidecar",
    "2026-11-21T07:30:00Z proxy: upstream ok",
    "",
    '(APIServer pid=70) INFO:     10.0.0.9:41000 - "GET /health HTTP/1.1" 200 OK',
    '(APIServer pid=70) INFO:     10.0.0.9:41002 - "GET /metrics HTTP/1.1" 200 OK',
    "(APIServer pid=70) INFO 11-21 07:30:01 [chat_utils.py:444] Detected the chat template content format to be 'string'.",
    "(Worker_TP1 pid=73) WARNING 11-21 07:30:02 [utils.py:12] Using slow tokenizer for special tokens.",
    "node-1:73:210 [1] NCCL INFO Channel 00/0 : 0[0] -> 1[1] via P2P/CUMEM",
    "Loading safetensors checkpoint shards:  50% Completed | 2/4 [00:03<00:03,  1.52s/it]",
    "/usr/lib/python3.12/site-packages/torch/utils.py:88: UserWarning: this flag has no effect any more",
    "huggingface/tokenizers: The current process just got forked, after parallelism has already been used.",
    "[12345.678901] usb 1-1: new high-speed USB device number 4 using xhci_hcd",
)


def verdict(folder: Path, *texts: str) -> tuple[object, ...]:
    """What triage says of these files: the verdict and the failure modes, causes first."""
    paths: list[Path] = []
    for number, text in enumerate(texts):
        path = folder / f"{number}.txt"
        path.write_text(text)
        paths.append(path)
    *_, report = watch(evidence.read(paths, now=NOW), RULES, keep=3600)
    return (report.verdict, *((f.finding.failure_mode, f.depth) for f in report.findings))


@pytest.mark.parametrize("name", LOGS)
def test_each_log_alone_is_judged_as_its_name_says(name: str, tmp_path: Path) -> None:
    first = {
        "healthy": None,
        "illegal access": "application-fault",
        "collective timeout": "nccl-timeout",
        "out of memory": "out-of-memory-at-startup",
        "own error": "engine-crashed",
    }[name]
    said = verdict(tmp_path, LOGS[name])
    assert (said[1][0] if len(said) > 1 else None) == first


@pytest.mark.parametrize("name", LOGS)
def test_the_order_of_files_does_not_matter(name: str, tmp_path: Path) -> None:
    files = (LOGS[name], DMESG, COLLECT_ENV)
    assert len({verdict(tmp_path, *order) for order in permutations(files)}) == 1


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("hours", [1, 5, 11])
def test_a_shift_of_all_stamps_does_not_matter(name: str, hours: int, tmp_path: Path) -> None:
    shifted = re.sub(r"\b07:(\d\d:\d\d)\b", rf"{7 + hours:02}:\1", LOGS[name])
    assert verdict(tmp_path, shifted) == verdict(tmp_path, LOGS[name])


@pytest.mark.parametrize("name", LOGS)
def test_a_paste_that_is_doubled_says_the_same(name: str, tmp_path: Path) -> None:
    assert verdict(tmp_path, LOGS[name] * 2) == verdict(tmp_path, LOGS[name])


@pytest.mark.parametrize("name", LOGS)
@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from(NOISE)), max_size=8))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_unrelated_lines_do_not_matter(name: str, tmp_path: Path, noise: list[tuple[int, str]]) -> None:
    lines = LOGS[name].splitlines()
    for place, line in noise:
        lines.insert(min(place, len(lines)), line)
    assert verdict(tmp_path, "\n".join(lines) + "\n") == verdict(tmp_path, LOGS[name])


def docker(line: str) -> str:
    return json.dumps({"log": line + "\n", "stream": "stderr", "time": "2026-11-21T07:41:02.123456789Z"})


BEFORE: dict[str, Callable[[str], str]] = {
    "docker": docker,
    "journal": lambda line: f"Nov 21 07:41:02 node-1 vllm[70]: {line}",
    "kubernetes": lambda line: f"2026-11-21T07:41:02.123456789Z stderr F {line}",
    "compose": lambda line: f"vllm-1  | {line}",
    "carriage return": lambda line: f"{line}\r",
}


@pytest.mark.parametrize("name", LOGS)
@pytest.mark.parametrize("wrapper", BEFORE)
def test_who_kept_the_log_does_not_matter(name: str, wrapper: str, tmp_path: Path) -> None:
    kept = "".join(f"{BEFORE[wrapper](line)}\n" for line in LOGS[name].splitlines())
    assert verdict(tmp_path, kept) == verdict(tmp_path, LOGS[name])


CUTS = st.lists(st.integers(0, 3000), max_size=12)


def cut(data: bytes, places: list[int]) -> Iterator[bytes]:
    edges = sorted({0, len(data), *(place for place in places if place < len(data))})
    return (data[start:end] for start, end in pairwise(edges))


@pytest.mark.parametrize("name", LOGS)
@given(CUTS)
@settings(max_examples=40, deadline=None)
def test_where_a_log_is_cut_while_it_is_read_does_not_matter(name: str, places: list[int]) -> None:
    def read(pieces: Iterable[bytes]) -> object:
        reader = vllm_log.LogReader("a.log")
        for piece in pieces:
            reader.feed(piece, NOW)
        return reader.finish().events

    data = LOGS[name].encode()
    assert read(cut(data, places)) == read([data])


@given(CUTS)
@settings(max_examples=40, deadline=None)
def test_where_a_kernel_log_is_cut_does_not_matter(places: list[int]) -> None:
    data = (DMESG + MISMATCH + KILL).encode()
    whole, pieces = (kernel_log.KernelLogReader("dmesg", now=NOW) for _ in range(2))
    together = [*whole.feed(data), *whole.finish()]
    assert [event for piece in cut(data, places) for event in pieces.feed(piece)] + pieces.finish() == together


# Whole incidents: kernel and engine together.


@pytest.mark.parametrize("name", PASTED)
@pytest.mark.parametrize("hours", [0, -31, 2000])
def test_an_incident_is_the_same_at_another_time(name: str, hours: int, tmp_path: Path) -> None:
    before = pasted(name, tmp_path, drills.BEGINS + hours * 3600)
    (*_, report) = watch(evidence.read(before, now=drills.BEGINS + hours * 3600 + 600), RULES, keep=3600)
    assert [root.finding.failure_mode for root in report.roots] == PASTED[name][2]


@pytest.mark.parametrize("name", PASTED)
def test_kernel_and_engine_log_in_one_file_say_the_same(name: str, tmp_path: Path) -> None:
    dmesg, log = pasted(name, tmp_path)
    both = tmp_path / "both.txt"
    both.write_text(dmesg.read_text() + log.read_text())
    (*_, report) = watch(evidence.read([both], now=drills.BEGINS + 600), RULES, keep=3600)
    assert [root.finding.failure_mode for root in report.roots] == PASTED[name][2]
