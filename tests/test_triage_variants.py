"""Pasted logs in the forms that bug reports have: cut, wrapped, quoted, and only the middle of the story."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from doctor.diagnose import watch
from doctor.feeds import evidence
from doctor.report import Report, Verdict
from rules import RULES

AT = 1795254000.0


def report_of(tmp_path: Path, text: str) -> Report:
    file = tmp_path / "engine.log"
    file.write_text(text)
    return list(watch(evidence.read([file], now=AT), RULES, keep=3600))[-1]


def first_of(report: Report) -> str:
    return report.findings[0].finding.failure_mode if report.findings else report.verdict.value


WORKER = "(Worker_TP1 pid=20) ERROR 06-12 11:02:10 [multiproc_executor.py:703] "
CORE = "(EngineCore pid=10) ERROR 06-12 11:02:11 [core.py:1100] "

BROKEN = {
    "gloo-times-out": (
        "nccl-timeout",
        WORKER + "RuntimeError: [../third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:81] Timed out waiting 1800000ms for recv operation to complete\n",
    ),
    "descriptor-of-a-poisoned-context": (
        "application-fault",
        "(Worker_TP1 pid=20) Error: Failed to initialize the TMA descriptor 700\n" + CORE + "EngineCore encountered a fatal error.\n",
    ),
    "assembler-too-old": (
        "stack-mismatch",
        CORE + "triton.runtime.errors.PTXASError: PTXAS error: Internal Triton PTX codegen error\n"
        + CORE + "ptxas fatal   : Value 'sm_999' is not defined for option 'gpu-name'\n",
    ),
    "vocabulary-indivisible": (
        "tp-heads-indivisible",
        '[rank0]:   File "/x/vllm/distributed/utils.py", line 31, in ensure_divisibility\n[rank0]: AssertionError: 32003 is not divisible by 2\n',
    ),
    "heads-asserted-without-words": (
        "tp-heads-indivisible",
        WORKER + '  File "/x/vllm/model_executor/models/some.py", line 99, in __init__\n'
        + WORKER + "    assert self.total_num_heads % tp_size == 0\n"
        + WORKER + "AssertionError\n"
        + CORE + "EngineCore failed to start.\n",
    ),
    "ray-waits-for-gpus": (
        "tp-exceeds-visible-gpus",
        "WARNING 05-05 05:05:05 [ray_utils.py:325] Tensor parallel size (16) exceeds available GPUs (8). This may result in failures.\n",
    ),
    "killed-by-the-shell's-word": (
        "worker-killed",
        "INFO 11-20 10:45:55 model_runner.py:680] Starting to load model /models/m...\nKilled\n",
    ),
    "killed-by-ray": (
        "worker-killed",
        "ray.exceptions.OutOfMemoryError: Task was killed due to the node running low on memory.\n",
    ),
    "ray-quotes-its-task": (
        "out-of-memory-at-startup",
        ("(EngineCore pid=10) ray.exceptions.RayTaskError(ValueError): ray::RayWorkerWrapper.execute_method() (pid=71, ip=10.0.0.1)\n"
        "(EngineCore pid=10) ValueError: Free memory on device cuda:0 (10.5/22.0 GiB) on startup is less than desired GPU memory utilization (0.9, 19.8 GiB).\n"),
    ),
    "multicast-slots-used-up": (
        "nvswitch-fabric-fault",
        ("ncclUnhandledCudaError: Call to CUDA function failed.\n"
        "Failed to bind NVLink SHARP (NVLS) Multicast memory of size 4194304 : CUDA error 2 'out of memory'.\n"),
    ),
    "no-handle-of-a-gpu": (
        "gpu-lost",
        ("Traceback (most recent call last):\n"
        '  File "/x/vllm/platforms/cuda.py", line 540, in log_warnings\n'
        "    handle = pynvml.nvmlDeviceGetHandleByIndex(i)\n"
        "vllm.third_party.pynvml.NVMLError_Unknown: Unknown Error\n"),
    ),
    "waits-after-the-warm-up": (
        "engine-stalled",
        ("(EngineCore pid=10) INFO 10-22 09:33:49 [kv_cache_utils.py:1087] GPU KV cache size: 162,704 tokens\n"
        "(EngineCore pid=10) INFO 10-22 09:33:58 [core.py:210] init engine (profile, create kv cache, warmup model) took 61.17 seconds\n"
        "(EngineCore pid=10) INFO 10-22 09:43:49 [shm_broadcast.py:466] No available shared memory broadcast block found in 60 seconds.\n"
        "(EngineCore pid=10) INFO 10-22 09:44:49 [shm_broadcast.py:466] No available shared memory broadcast block found in 60 seconds.\n"),
    ),
    "one-wait-and-no-more": (
        "engine-stalled",
        "(EngineCore pid=10) INFO 08-13 11:27:02 [shm_broadcast.py:802] No available shared memory broadcast block found in 60 seconds.\n",
    ),
    "preempted-and-one-line": (
        "kv-cache-saturated",
        ("WARNING 06-06 12:00:00 scheduler.py:1057] Sequence group cmpl-1 is preempted by PreemptionMode.RECOMPUTE mode because there is not "
        "enough KV cache space. total_num_cumulative_preemption=51\n"),
    ),
    "peer-access-missing-and-nothing-else": (
        "pcie-fallback",
        ("(Worker_TP0 pid=19) WARNING 03-20 10:10:09 [custom_all_reduce.py:137] Custom allreduce is disabled because your platform lacks "
        "GPU P2P capability or P2P test failed.\n"),
    ),
    "tile-of-a-weight-only-kernel": (
        "tp-heads-indivisible",
        WORKER + "RuntimeError: size_n = 352 is not divisible by tile_n_size = 64\n" + CORE + "EngineCore failed to start.\n",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_the_first_finding_is_the_cause(name: str, tmp_path: Path) -> None:
    expected, text = BROKEN[name]
    report = report_of(tmp_path, text)
    assert first_of(report) == expected, [found.finding.summary for found in report.findings]


SERVED = '(APIServer pid=1) INFO:     127.0.0.1:4000 - "POST /v1/chat/completions HTTP/1.1" 200 OK\n'

HEALTHY = {
    "a-wait-that-ended": "(EngineCore pid=10) INFO 10-22 09:33:49 [shm_broadcast.py:466] No available shared memory broadcast block found in 60 seconds.\n"
    + SERVED,
    "a-preemption-long-ago": "WARNING 06-06 12:00:00 scheduler.py:1057] Sequence group cmpl-1 is preempted by PreemptionMode.RECOMPUTE mode because "
    "there is not enough KV cache space. total_num_cumulative_preemption=1\n"
    "INFO 06-06 14:00:05 metrics.py:345] Avg prompt throughput: 210.0 tokens/s, Avg generation throughput: 340.0 tokens/s, Running: 3 reqs, "
    "Swapped: 0 reqs, Pending: 0 reqs, GPU KV cache usage: 8.8%, CPU KV cache usage: 0.0%.\n",
    "ray-found-its-gpus": BROKEN["ray-waits-for-gpus"][1] + "INFO:     Application startup complete.\n" + SERVED,
    "a-request-that-was-too-long": "(APIServer pid=1) ERROR 12-01 11:00:00 [serving_chat.py:257] Error in preprocessing prompt inputs\n"
    "(APIServer pid=1) ERROR 12-01 11:00:00 [serving_chat.py:257] Traceback (most recent call last):\n"
    "(APIServer pid=1) ERROR 12-01 11:00:00 [serving_chat.py:257] ValueError: This model's maximum context length is 4096 tokens.\n" + SERVED,
}  # fmt: skip


@pytest.mark.parametrize("name", HEALTHY)
def test_what_is_over_or_harmless_raises_no_alarm(name: str, tmp_path: Path) -> None:
    report = report_of(tmp_path, HEALTHY[name])
    assert report.verdict in (Verdict.CLEAR, Verdict.NOTICE), [found.finding.summary for found in report.findings]


STORIES = {
    "nccl-timeout": "[rank1]:[E612 11:12:21.426415540 ProcessGroupNCCL.cpp:683] [Rank 1] Watchdog caught collective operation timeout: "
    "WorkNCCL(SeqNum=91, OpType=ALLREDUCE, NumelIn=4, NumelOut=4, Timeout(ms)=600000) ran for 600081 milliseconds before timing out.\n"
    "(EngineCore pid=10) ERROR 06-12 11:12:22 [core.py:708] EngineCore encountered a fatal error.\n",
    "application-fault": "Traceback (most recent call last):\n"
    '  File "/x/vllm/v1/worker/gpu_worker.py", line 300, in execute_model\n'
    "    output = self.model_runner.execute_model(scheduler_output)\n"
    "RuntimeError: CUDA error: an illegal memory access was encountered\n"
    "(EngineCore pid=10) ERROR 06-12 11:12:22 [core.py:708] EngineCore encountered a fatal error.\n",
    "tp-heads-indivisible": "Traceback (most recent call last):\n"
    '  File "/x/vllm/config.py", line 300, in verify\n'
    "    raise ValueError(\n"
    "ValueError: Total number of attention heads (28) must be divisible by tensor parallel size (8).\n",
    "stack-mismatch": "Traceback (most recent call last):\n"
    '  File "/x/vllm/platforms/cuda.py", line 60, in wrapper\n'
    "    pynvml.nvmlInit()\n"
    "vllm.third_party.pynvml.NVMLError_LibRmVersionMismatch: Driver/library version mismatch\n",
    "clear": "node1:100:100 [0] NCCL INFO NET/Plugin: Plugin load returned 2 : libnccl-net.so: cannot open shared object file: No such file or directory\n"
    "INFO 06-12 11:12:22 [gpu_model_runner.py:1549] Graph capturing finished in 18 secs, took 1.94 GiB\n",
}  # fmt: skip

WRAPPERS: dict[str, Callable[[int, str], str]] = {
    "indented": lambda _, line: f"    {line}",
    "indented-by-two": lambda _, line: f"  {line}",
    "tab": lambda _, line: f"\t{line}",
    "quotation": lambda _, line: f"> {line}",
    "column": lambda _, line: f"  | {line}",
    "columns": lambda _, line: f"  |   | 2026-11-04 10:07:58.278801 master-0 >> {line}",
    "compose": lambda _, line: f"vllm-1  | {line}",
    "compose-by-name": lambda _, line: f"qwen3-vl-32b  | {line}",
    "kubernetes": lambda _, line: f"2026-02-24T20:21:58.123456789Z stderr F {line}",
    "kubectl": lambda _, line: f"[pod/vllm-0/vllm] {line}",
    "journal": lambda _, line: f"Feb 24 20:21:58 node1 vllm[812]: {line}",
    "tag": lambda _, line: f"[vllm]: {line}",
    "mpirun": lambda _, line: f"[1,0]<stderr>:{line}",
    "notebook": lambda n, line: f"449.7s {n} {line}",
    "numbered": lambda n, line: f"[{n}] {line}",
    "cat-n": lambda n, line: f"{n:6}\t{line}",
    "grep-n": lambda n, line: f"logs/vllm.log:{n}:{line}",
    "trailing-spaces": lambda _, line: f"{line}   ",
    "carriage-returns": lambda _, line: f"{line}\r",
}


@pytest.mark.parametrize("story", STORIES)
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_what_stands_before_a_line_changes_no_verdict(wrapper: str, story: str, tmp_path: Path) -> None:
    lines = STORIES[story].splitlines()
    text = "".join(WRAPPERS[wrapper](n, line) + "\n" for n, line in enumerate(lines, 1))
    report = report_of(tmp_path, text)
    assert first_of(report) == story, [found.finding.summary for found in report.findings]


def test_lines_that_share_no_indentation_keep_theirs(tmp_path: Path) -> None:
    mixed = "\t" + STORIES["nccl-timeout"].replace("\n", "\n    ", 1)
    assert first_of(report_of(tmp_path, mixed)) == "nccl-timeout"


MATRIX = (
    "\tGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\n"
    "GPU0\t X \tNV18\t0-31\t0\tN/A\n"
    "GPU1\tNV18\t X \t0-31\t0\tN/A\n"
)


@pytest.mark.parametrize("mark", ["> ", ">", ">> ", "    ", "\ufeff"])
def test_a_quoted_or_indented_document_is_read(mark: str, tmp_path: Path) -> None:
    file = tmp_path / "paste.txt"
    text = "Our topology:\n" + MATRIX
    file.write_text(mark + text if mark == "\ufeff" else "".join(f"{mark}{line}\n" for line in text.splitlines()))
    assert "topo" in evidence.kinds(file, now=AT)


def test_a_report_part_that_is_indented_by_nature_is_read(tmp_path: Path) -> None:
    file = tmp_path / "part.txt"
    file.write_text(
        "    Temperature\n        GPU Current Temp                  : 41 C\n        GPU T.Limit Temp                  : 45 C\n"
    )
    assert "smi-q" in evidence.kinds(file, now=AT)


ENVIRONMENT = (
    "PyTorch version: 2.7.0+cu126\nIs debug build: False\nCUDA used to build PyTorch: 12.6\n\nOS: Ubuntu 22.04.5 LTS (x86_64)\n\n"
    "Python version: 3.12.9 (64-bit runtime)\nIs CUDA available: True\nNvidia driver version: 570.124.06\n\n"
    "Versions of relevant libraries:\n[pip3] torch==2.7.0\n\nvLLM Version: 0.9.0\n"
)


@pytest.mark.parametrize("story", [story for story in STORIES if story != "clear"])
def test_what_is_known_of_the_engine_hides_no_refusal_to_start(story: str, tmp_path: Path) -> None:
    """An engine that pasted evidence tells of is not therefore alive."""
    log, environment, both = (tmp_path / name for name in ("engine.log", "env.txt", "issue.txt"))
    log.write_text(STORIES[story])
    environment.write_text(ENVIRONMENT)
    both.write_text(f"```text\n{ENVIRONMENT}```\n\n```\n{STORIES[story]}```\n")
    for files in ([log, environment], [environment, log], [both]):
        report = list(watch(evidence.read(files, now=AT), RULES, keep=3600))[-1]
        assert first_of(report) == story, [file.name for file in files]


DUPLICATE = WORKER + "Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 3b000\n"
LISTED = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-11111111-2222-3333-4444-555555555555)\n"
SLICES = "".join(f"  MIG 3g.40gb     Device  {n}: (UUID: MIG-{n}1111111-2222-3333-4444-555555555555)\n" for n in (0, 1))


def test_two_ranks_on_slices_of_one_gpu_are_a_matter_of_mig(tmp_path: Path) -> None:
    assert first_of(report_of(tmp_path, DUPLICATE + LISTED + SLICES)) == "mig-misconfigured"


def test_two_ranks_on_one_whole_gpu_are_not(tmp_path: Path) -> None:
    assert first_of(report_of(tmp_path, DUPLICATE + LISTED)) != "mig-misconfigured"
