"""What must not matter to triage: the order of files, a shift of all stamps, unrelated lines, a paste that is doubled."""

from __future__ import annotations

import re
from itertools import permutations
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doctor.diagnose import watch
from doctor.feeds import evidence
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
@given(st.lists(st.tuples(st.integers(0, 12), st.sampled_from(NOISE)), max_size=6))
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_unrelated_lines_do_not_matter(name: str, tmp_path: Path, noise: list[tuple[int, str]]) -> None:
    lines = LOGS[name].splitlines()
    for place, line in noise:
        lines.insert(min(place, len(lines)), line)
    assert verdict(tmp_path, "\n".join(lines) + "\n") == verdict(tmp_path, LOGS[name])
