"""The rules that an engine's log and metrics decide: each fires on its failure mode, and not on what only looks like it."""

from __future__ import annotations

import nodes
import pytest

from doctor.diagnose import judge
from doctor.history import History
from doctor.readers import signals, vllm_log
from doctor.report import Report
from doctor.rule import AnyRule, Confidence, Finding, Severity
from doctor.snapshot import NOT_GIVEN, NvidiaMessage, OomKill, Snapshot, Source, Unseen
from doctor.symptoms import engine_log
from rules import (
    RULES,
    application_fault,
    context_does_not_fit,
    engine_crashed,
    engine_stalled,
    fp8_block_misaligned,
    fp8_not_engaged,
    gpu_memory_faulty,
    kv_cache_saturated,
    launch_refused,
    nccl_timeout,
    out_of_memory_at_startup,
    p2p_blocked,
    quantization_mismatch,
    shared_memory_too_small,
    stack_mismatch,
    tp_exceeds_visible_gpus,
    tp_heads_indivisible,
    worker_killed,
)
from rules.tables.stacks import cuda_release, engine_release, numbers

AT = 1_795_254_000.0

MINE = (
    nccl_timeout.RULE,
    engine_stalled.RULE,
    shared_memory_too_small.RULE,
    p2p_blocked.RULE,
    tp_heads_indivisible.RULE,
    tp_exceeds_visible_gpus.RULE,
    fp8_not_engaged.RULE,
    fp8_block_misaligned.RULE,
    quantization_mismatch.RULE,
    out_of_memory_at_startup.RULE,
    context_does_not_fit.RULE,
    kv_cache_saturated.RULE,
    stack_mismatch.RULE,
    gpu_memory_faulty.RULE,
    application_fault.RULE,
    worker_killed.RULE,
    engine_crashed.RULE,
    launch_refused.RULE,
)


def visit_of(log: str) -> Snapshot:
    """Return the visit that a pasted log makes, all else not given."""
    reading = vllm_log.read(log.encode(), "vllm.log", AT)
    unseen = tuple(Unseen(source, NOT_GIVEN) for source in Source if source is not Source.ENGINE_LOG)
    return Snapshot(
        at=AT, seen=(Source.ENGINE_LOG,), unseen=unseen, engine_events=reading.events, logs=(reading.state,)
    )


def report_of(log: str) -> Report:
    return judge(History((visit_of(log),), 3600), RULES)


def ids(report: Report) -> list[str]:
    return [f.finding.failure_mode for f in report.findings]


def first(log: str) -> Finding:
    report = report_of(log)
    assert report.findings, "nothing fired"
    return report.findings[0].finding


ERR = "(Worker_TP{0} pid={1}) ERROR 11-20 08:00:00 [x.py:1] "
E0 = ERR.format(0, 100)
STARTED = "INFO 11-20 07:00:00 [api.py:1] vLLM API server version 0.11.2\nINFO:     Application startup complete.\n"
SERVED = 'INFO:     127.0.0.1:5 - "POST /v1/completions HTTP/1.1" 200 OK\n'
STATS = "INFO 11-20 07:5{n}:00 [loggers.py:1] Engine 000: Avg prompt throughput: 9.0 tokens/s, Avg generation throughput: {tps}.0 tokens/s, Running: {running} reqs, Waiting: {waiting} reqs, GPU KV cache usage: {usage}%, Prefix cache hit rate: 1.0%\n"
DEAD = "(EngineCore pid=9) ERROR 11-20 08:00:01 [core.py:1] EngineCore encountered a fatal error.\n(APIServer pid=1) ERROR 11-20 08:00:02 [a.py:1] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.\n"
NOT_STARTED = "(EngineCore pid=9) ERROR 11-20 08:00:01 [core.py:1] EngineCore failed to start.\n(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}\n"
STOP = "(APIServer pid=1) INFO 11-20 08:20:00 [launcher.py:254] [shutdown] API server: shutdown triggered\n"
RESTART = (
    "INFO 11-20 08:30:00 [api.py:1] vLLM API server version 0.11.2\nINFO:     Application startup complete.\n" + SERVED
)
WATCHDOG = "[rank{0}]:[E1120 08:00:00.5 ProcessGroupNCCL.cpp:616] [Rank {0}] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=31, OpType=ALLREDUCE, NumelIn=1, NumelOut=1, Timeout(ms)=600000) ran for 600031 milliseconds before timing out.\n"
OOM = "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.14 GiB of which 1.00 GiB is free."
WAIT = "(EngineCore_DP0 pid=9) INFO 11-20 08:1{}:00 [shm_broadcast.py:681] No available shared memory broadcast block found in 60 seconds.\n"
MARLIN = "WARNING 11-20 07:00:00 [marlin_utils_fp8.py:1] Your GPU does not have native support for FP8 computation but FP8 quantization is being used. Weight-only FP8 compression will be used leveraging the Marlin kernel.\n"
CONFIG = "INFO 11-20 07:00:00 [core.py:1] Initializing a V1 LLM engine (v0.22.1) with config: model='{model}', dtype=torch.bfloat16, tensor_parallel_size=4, quantization={quantization}, enforce_eager=False\n"

FIRES = {
    "a watchdog timeout on one rank": (WATCHDOG.format(3), "nccl-timeout"),
    "a watchdog timeout in service, and the death that follows": (STARTED + SERVED + WATCHDOG.format(3) + DEAD, "nccl-timeout"),
    "V0 and Ray": ("(RayWorkerWrapper pid=5, ip=10.0.0.1) " + WATCHDOG.format(1), "nccl-timeout"),
    "NCCL fails at start, without a word why": (E0 + "RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)\n" + NOT_STARTED, "nccl-timeout"),
    "torch reports a remote process gone": ("torch.distributed.DistBackendError: NCCL error in: NCCLUtils.hpp:1, remote process exited or there was a network error\n", "nccl-timeout"),
    "NCCL has no shared memory": ("n1:7:9 [0] shmutils.cc:72 NCCL WARN Error: failed to extend /dev/shm/nccl-x to 33030532 bytes\n" + E0 + "RuntimeError: NCCL error: unhandled system error\n", "shared-memory-too-small"),
    "a segment that could not be attached, newer NCCL": ("n1:7:9 [0] linux.cc:842 NCCL WARN Error while creating shared memory segment /dev/shm/nccl-x (size 33030528), error: No space left on device (28)\n" + E0 + "ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.\n", "shared-memory-too-small"),
    "a bus error": (STARTED + "Fatal Python error: Bus error\n" + DEAD, "shared-memory-too-small"),
    "an illegal memory access behind an NCCL error": (E0 + "RuntimeError: NCCL error: unhandled cuda error\n" + ERR.format(1, 101) + "RuntimeError: CUDA error: an illegal memory access was encountered\n" + DEAD, "application-fault"),
    "a fault that the watchdog wraps": ("[rank1]:[E1120 08:00:00.5 ProcessGroupNCCL.cpp:1] [Rank 1] Process group watchdog thread terminated with exception: CUDA error: an illegal memory access was encountered\n" + WATCHDOG.format(0), "application-fault"),
    "a fault as NCCL sees it": ("n1:7:9 [2] enqueue.cc:1 NCCL WARN Cuda failure 'an illegal memory access was encountered'\n" + E0 + "RuntimeError: NCCL error: unhandled cuda error\n", "application-fault"),
    "a device-side assertion": (STARTED + E0 + "RuntimeError: CUDA error: device-side assert triggered\n" + DEAD, "application-fault"),
    "a fault in V0": ("(VllmWorkerProcess pid=5) ERROR 11-20 08:00:00 multiproc_worker_utils.py:1] RuntimeError: CUDA error: misaligned address\n", "application-fault"),
    "an uncorrectable memory error": (STARTED + E0 + "RuntimeError: CUDA error: uncorrectable ECC error encountered\n" + DEAD, "gpu-memory-faulty"),
    "out of memory while profiling": (E0 + OOM + "\n" + NOT_STARTED, "out-of-memory-at-startup"),
    "out of memory, torch before 2.5": ("torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 23.65 GiB total capacity; 22.1 GiB already allocated; 11.25 MiB free; 22.6 GiB reserved in total by PyTorch)\n", "out-of-memory-at-startup"),
    "a GPU that is not empty": (E0 + "ValueError: Free memory on device cuda:2 (10.5/79.2 GiB) on startup is less than desired GPU memory utilization (0.92, 72.8 GiB). Decrease GPU memory utilization\n" + NOT_STARTED, "out-of-memory-at-startup"),
    "out of memory in the warm-up": (E0 + "RuntimeError: CUDA out of memory occurred when warming up sampler with 1024 dummy requests. Please try lowering `max_num_seqs`\n", "out-of-memory-at-startup"),
    "somebody else freed memory": (E0 + "AssertionError: Error in memory profiling. Initial free memory 10.0 GiB, current free memory 20.0 GiB.\n", "out-of-memory-at-startup"),
    "the KV cache is smaller than a request, V0": ("ValueError: The model's max seq len (131072) is larger than the maximum number of tokens that can be stored in KV cache (40960).\n", "context-does-not-fit"),
    "the KV cache is smaller than a request, V1": (E0 + "ValueError: To serve at least one request with the models's max seq len (131072), (40.00 GiB KV cache is needed, which is larger than the available KV cache memory (12.50 GiB). Based on the available memory, the estimated maximum model length is 40960.\n" + NOT_STARTED, "context-does-not-fit"),
    "no KV cache at all": (E0 + "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`\n", "context-does-not-fit"),
    "heads": (E0 + "ValueError: Total number of attention heads (28) must be divisible by tensor parallel size (8).\n", "tp-heads-indivisible"),
    "world size": ("ValueError: Tensor parallel size (8) cannot be larger than the number of available GPUs (4).\n", "tp-exceeds-visible-gpus"),
    "two ranks on one GPU": ("n1:7:9 [0] init.cc:974 NCCL WARN Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 19000\n" + E0 + "RuntimeError: NCCL error: invalid usage\n", "tp-exceeds-visible-gpus"),
    "an ordinal that does not exist": (E0 + "RuntimeError: CUDA error: invalid device ordinal\n" + NOT_STARTED, "tp-exceeds-visible-gpus"),
    "FP8 blocks": (E0 + "ValueError: The output_size of gate's and up's weight = 96 is not divisible by weight quantization block_n = 128.\n" + NOT_STARTED, "fp8-block-misaligned"),
    "another quantization than the flag's": ("  Value error, Quantization method specified in the model config (awq) does not match the quantization method specified in the `quantization` argument (gptq). [type=value_error]\n", "quantization-mismatch"),
    "a quantization that the GPU can't run": ("ValueError: The quantization method fp8 is not supported for the current GPU. Minimum capability: 89. Current capability: 70.\n", "quantization-mismatch"),
    "error 803": (E0 + "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 803: system has unsupported display driver / cuda driver combination\n" + NOT_STARTED, "stack-mismatch"),
    "error 804": ("RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted on non supported HW\n", "stack-mismatch"),
    "a driver that is too old": ("UserWarning: CUDA initialization: The NVIDIA driver on your system is too old (found version 12020).\nRuntimeError: Failed to infer device type\n", "stack-mismatch"),
    "library and module": ("pynvml.NVMLError_LibRmVersionMismatch: RM has detected an NVML/RM version mismatch.\n", "stack-mismatch"),
    "library and module, by nvidia-smi's words": ("Failed to initialize NVML: Driver/library version mismatch\nNVML library version: 570.86\n", "stack-mismatch"),
    "PTX of a newer toolkit": (E0 + "RuntimeError: CUDA error: the provided PTX was compiled with an unsupported toolchain.\n", "stack-mismatch"),
    "no kernel image, in prose": ("When I start it I get\n\n    RuntimeError: CUDA error: no kernel image is available for execution on the device\n\nany help?\n", "stack-mismatch"),
    "an extension of another PyTorch": ("ImportError: /opt/vllm/_C.abi3.so: undefined symbol: _ZN3c104cuda9SetDeviceEi\n", "stack-mismatch"),
    "waits after serving": (STATS.format(n=0, tps=96, running=2, waiting=0, usage=41.2) + WAIT.format(1) + WAIT.format(2), "engine-stalled"),
    "waits in V0, with requests running": ("WARNING 11-20 08:00:00 shm_broadcast.py:342] No available block found in 60 second. \n" * 3, "engine-stalled"),
    "waits until the call times out": (STARTED + SERVED + WAIT.format(1) + "(EngineCore_DP0 pid=9) ERROR 11-20 08:15:00 [core.py:1] TimeoutError: RPC call to execute_model timed out.\n" + DEAD, "engine-stalled"),
    "a call that times out, and nothing else": (DEAD + "(EngineCore pid=9) ERROR 11-20 08:00:01 [core.py:1] TimeoutError: RPC call to sample_tokens timed out.\n", "engine-crashed"),
    "an import that fails": ("ERROR 11-20 08:00:00 [core.py:1] ImportError: cannot import name 'x' from 'vllm.vllm_flash_attn'\n", "engine-crashed"),
    "an assertion in service": (STARTED + SERVED + E0 + "AssertionError\n" + DEAD, "engine-crashed"),
    "out of memory in service": (STARTED + SERVED + E0 + OOM + "\n" + DEAD, "engine-crashed"),
    "graph capture and NCCL": ("h:5:5 [0] enqueue.cc:1 NCCL WARN Cuda failure 'dependency created on uncaptured work in another stream'\n", "engine-crashed"),
    "a segmentation fault": (STARTED + "!!!!!!! Segfault encountered !!!!!!!\n" + DEAD, "engine-crashed"),
    "the reports of a death alone": (DEAD, "engine-crashed"),
    "V0's background loop": ("vllm.engine.async_llm_engine.AsyncEngineDeadError: Background loop has errored already.\n", "engine-crashed"),
    "Ray's channel": ("ERROR 11-20 08:00:00 [core.py:1] ray.exceptions.RayChannelTimeoutError: System error: Timed out waiting for object available to read.\n", "engine-crashed"),
    "a worker killed": (STARTED + "(EngineCore pid=9) ERROR 11-20 08:00:00 [m.py:1] Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.\n" + DEAD, "worker-killed"),
    "a worker killed, V0": ("ERROR 11-20 08:00:00 multiproc_worker_utils.py:120] Worker VllmWorkerProcess pid 350 died, exit code: -9\n", "worker-killed"),
    "the engine core killed at start": ("RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore_0': -9}\n", "worker-killed"),
    "peer access": (E0 + "RuntimeError: CUDA error: peer access is not supported between these two devices\n", "p2p-blocked"),
    "the test of peer access": ("[rank0]: RuntimeError: Error happened when batch testing peer-to-peer access from (0, 0) to (0, 1):\n", "p2p-blocked"),
    "FP8 weights only": (STARTED + MARLIN, "fp8-not-engaged"),
    "FP8 experts through Marlin": ("INFO 11-20 07:00:00 [fp8.py:405] Using MARLIN Fp8 MoE backend out of potential backends: ['TRITON', 'MARLIN'].\n" + STARTED, "fp8-not-engaged"),
    "an FP8 model run unquantized": (CONFIG.format(model="org/model-70B-FP8", quantization="None"), "fp8-not-engaged"),
    "a Marlin kernel that the build lacks": (MARLIN + "ERROR 11-20 08:00:00 _custom_ops.py:61] Error in calling custom op: '_OpNamespace' '_C' object has no attribute 'gptq_marlin_repack'\n", "fp8-not-engaged"),
    "a full KV cache": ("".join(STATS.format(n=n, tps=900, running=99, waiting=40 + n, usage=97.5) for n in range(4)), "kv-cache-saturated"),
    "port": ("OSError: [Errno 98] Address already in use\n", "launch-refused"),
    "port, uvicorn's words": ("ERROR:    [Errno 98] error while attempting to bind on address ('0.0.0.0', 8000): address already in use\n", "launch-refused"),
    "a dimension that TP does not divide": (E0 + "AssertionError: 151937 is not divisible by 4\n" + NOT_STARTED, "tp-heads-indivisible"),
    "Ray has too few GPUs": ("ValueError: The number of required GPUs exceeds the total number of available GPUs in the placement group.\n", "tp-exceeds-visible-gpus"),
    "an architecture that PyTorch was not built for": ("UserWarning: \nNVIDIA GeForce RTX 5090 with CUDA capability sm_120 is not compatible with the current PyTorch installation.\n", "stack-mismatch"),
    "Triton's assembler is older than the GPU": (E0 + "ptxas fatal   : Value 'sm_121a' is not defined for option 'gpu-name'\n" + NOT_STARTED, "stack-mismatch"),
    "no library of the driver": ("DEBUG 11-20 08:00:00 [__init__.py:103] CUDA platform is not available because: NVML Shared Library Not Found\nRuntimeError: Failed to infer device type\n", "stack-mismatch"),
    "V0's preemptions": ("WARNING 11-20 08:00:00 scheduler.py:1775] Sequence group cmpl-7 is preempted by PreemptionMode.RECOMPUTE mode because there is not enough KV cache space. total_num_cumulative_preemption=51\n", "kv-cache-saturated"),
    "a start that takes too long": ("TimeoutError: Timed out waiting for engine core processes to start. Waited 600s\n", "engine-crashed"),
    "waits while starting, for long": ("INFO 11-20 07:00:00 [m.py:1] Starting to load model x...\n" + WAIT.format(0) * 9, "engine-stalled"),
    "cut: heads": ("ValueError: Total number of\nattention heads (28) must be divisible by tensor parallel size\n(8).\n", "tp-heads-indivisible"),
    "cut: blocks": ("ValueError: The output_size of gate's and up's weight\n= 96 is not divisible by weight quantization block_n =\n128.\n", "fp8-block-misaligned"),
    "cut: KV cache": ("ValueError: To serve at least one request with the models's max seq\nlen (131072), (40.00 GiB KV cache is needed, which is larger than the available KV cache memory\n", "context-does-not-fit"),
    "cut: free memory": ("ValueError: Free memory on device (31.44/47.38\nGiB) on startup is less than desired GPU memory utilization (0.95,\n", "out-of-memory-at-startup"),
    "cut: driver": ("The NVIDIA driver on your system is too old (found\nversion 12020).\n", "stack-mismatch"),
    "cut: world size": ("Value error, World size\n(8) is larger than the number of available GPUs\n(4) in this node.\n", "tp-exceeds-visible-gpus"),
    "the engine core's death in 0.8.5": ("RuntimeError: Engine core initialization failed. See root cause above.\n", "engine-crashed"),
    "gated model": ("huggingface_hub.errors.GatedRepoError: 401 Client Error. Access to model x is restricted.\n", "launch-refused"),
    "a flag it does not know": ("usage: vllm serve\nvllm: error: unrecognized arguments: --tp 4\n", "launch-refused"),
}  # fmt: skip


@pytest.mark.parametrize(("log", "expected"), FIRES.values(), ids=FIRES)
def test_a_log_alone_gives_its_failure_mode_first(log: str, expected: str) -> None:
    report = report_of(log)
    assert ids(report)[:1] == [expected], [(f.finding.failure_mode, f.finding.summary) for f in report.findings]
    finding = report.findings[0].finding
    assert finding.evidence
    assert finding.advice
    assert len(report.roots) == 1, ids(report)


ALARMS = {
    "healthy": STARTED + SERVED + STATS.format(n=0, tps=50, running=2, waiting=0, usage=20.0),
    "orderly stop that prints a death": STARTED + SERVED + STOP + DEAD,
    "a crash before a good start": STARTED + E0 + "KeyError: 'x'\n" + DEAD + RESTART,
    "a timeout before a good start": WATCHDOG.format(3) + DEAD + RESTART,
    "out of memory before a good start": E0 + OOM + "\n" + NOT_STARTED + RESTART,
    "an error in one request": STARTED + "ERROR 11-20 08:00:00 [serving.py:1] Traceback (most recent call last):\nERROR 11-20 08:00:00 [serving.py:1]   x\nERROR 11-20 08:00:00 [serving.py:1] ValueError: bad template\n" + SERVED,
    "the word timeout": "INFO 11-20 08:00:00 [envs.py:1] VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=300\nWARNING 11-20 08:00:00 [x.py:1] client timeout after 30 s\n" + STARTED,
    "waits while the model loads": "INFO 11-20 07:00:00 [m.py:1] Starting to load model x...\n" + WAIT.format(0) * 6 + STARTED,
    "waits of an idle V0 worker": STATS.format(n=0, tps=0, running=0, waiting=0, usage=0.0) + "(VllmWorkerProcess pid=5) WARNING 11-20 08:00:00 shm_broadcast.py:342] No available block found in 60 second. \n" * 5,
    "one wait at the first large request": STARTED + STATS.format(n=0, tps=9, running=1, waiting=0, usage=1.0) + WAIT.format(1),
    "waits that ended": STARTED + WAIT.format(1) + WAIT.format(2) + STATS.format(n=9, tps=9, running=1, waiting=0, usage=1.0),
    "waits at DEBUG": STARTED + WAIT.format(1).replace("INFO", "DEBUG") * 5,
    "FP8 engaged, Marlin only in the list": "INFO 11-20 07:00:00 [fp8.py:405] Using TRITON Fp8 MoE backend out of potential backends: ['TRITON', 'MARLIN'].\nINFO 11-20 07:00:00 [k.py:1] Selected CutlassFP8ScaledMMLinearKernel for Fp8LinearMethod\n" + STARTED,
    "compressed-tensors FP8 without a flag": CONFIG.format(model="org/m-FP8-dynamic", quantization="compressed-tensors") + STARTED,
    "a BF16 model without a flag": CONFIG.format(model="org/m-70b", quantization="None") + STARTED,
    "NCCL's harmless warnings": "n:1:1 [0] graph/search.cc:1 NCCL WARN Could not find a path for pattern 4, falling back to simple order\n" + STARTED,
    "symmetric memory that this capability lacks": "WARNING 11-20 07:00:00 [symm_mem.py:67] SymmMemCommunicator: Device capability 8.6 not supported, communicator is not available.\n" + STARTED,
    "exit-time warnings": STARTED + STOP + "[rank0]:[W1120 08:00:00.5 ProcessGroupNCCL.cpp:1] Warning: WARNING: destroy_process_group() was not called before program exit\n",
    "a full cache that nobody waits for": "".join(STATS.format(n=n, tps=900, running=9, waiting=0, usage=97.5) for n in range(4)),
    "a short peak": STATS.format(n=0, tps=9, running=9, waiting=3, usage=97.5) + STATS.format(n=1, tps=9, running=9, waiting=0, usage=30.0),
    "a debug reason on a build that works": "DEBUG 11-20 07:00:00 [__init__.py:103] CUDA platform is not available because: NVML Shared Library Not Found\n" + STARTED + SERVED,
    "NVLink asked for where there is none": "ERROR 11-20 07:00:00 [cuda.py:833] NVLink detection failed. This is normal if your machine has no NVLink equipped.\nERROR 11-20 07:00:00 [cuda.py:833] Traceback (most recent call last):\nERROR 11-20 07:00:00 [cuda.py:833]   x\nERROR 11-20 07:00:00 [cuda.py:833] pynvml.NVMLError_NotSupported: Not Supported\n",
    "a request that the server could not handle": "ERROR:    Exception in ASGI application\nTraceback (most recent call last):\n  x\njinja2.exceptions.TemplateError: bad\n\nDuring handling of the above exception, another exception occurred:\n\nTraceback (most recent call last):\n  y\nValueError: bad template\n",
    "an optional import that fails": "WARNING 11-20 07:00:00 [_custom_ops.py:20] Failed to import from vllm._C with ImportError('libcuda.so.1: cannot open shared object file: No such file or directory')\n",
    "bad requests": STARTED + 'INFO:     1.1.1.1:5 - "POST /v1/completions HTTP/1.1" 400 Bad Request\n' * 50,
}  # fmt: skip


@pytest.mark.parametrize("log", ALARMS.values(), ids=ALARMS)
def test_what_only_looks_like_a_failure_raises_no_alarm(log: str) -> None:
    loud = [f.finding for f in report_of(log).findings if f.finding.severity is not Severity.NOTICE]
    assert loud == []


@pytest.mark.parametrize("profile", ["hgx-h100-8", "hgx-h100-4", "hgx-a100-8", "h100-pcie-4", "l40s-4"])
@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
def test_a_healthy_node_is_quiet(rule: AnyRule, profile: str) -> None:
    assert nodes.found(rule, nodes.healthy(profile)) == ()


def test_silence_without_a_log_is_no_health() -> None:
    report = judge(History((Snapshot(at=AT, unseen=tuple(Unseen(s, NOT_GIVEN) for s in Source)),), 60), MINE)
    assert {u.failure_mode for u in report.unjudged} == {rule.id for rule in MINE}


def test_every_error_of_the_reader_is_somebody_s() -> None:
    told = engine_crashed.TOLD_BY_OTHERS
    decisive = engine_log._DECISIVE
    assert told <= decisive
    kinds = {(row.name, row.kind) for row in signals.SIGNALS if row.name == "launch-error"}
    refused = set(launch_refused.WORDS) | engine_crashed.KINDS_TOLD_BY_OTHERS["launch-error"]
    assert {kind for _, kind in kinds} - refused == {"no-device-type", "model-inspection"}


# What the sentences say.


def test_a_timeout_names_operation_number_time_and_ranks() -> None:
    finding = first("".join(WATCHDOG.format(rank) for rank in (0, 1, 3)))
    assert "ALLREDUCE (number 31) did not finish within 600 s" in finding.summary
    assert finding.subject.ranks == ("rank0", "rank1", "rank3")
    assert finding.confidence is Confidence.HIGH


def test_the_rank_that_reported_nothing_is_where_to_look() -> None:
    world = "INFO 11-20 07:00:00 [p.py:1] rank 0 in world size 4 is assigned as DP rank 0, PP rank 0, TP rank 0, EP rank 0\n"
    finding = first(world + "".join(WATCHDOG.format(rank) for rank in (0, 1, 3)))
    assert "rank 2 never reported" in finding.summary


def test_the_rank_that_is_behind_is_named_from_the_watchdog_s_counts() -> None:
    work = "[rank{0}]:[E1120 08:00:00.6 ProcessGroupNCCL.cpp:1] [PG ID 2 PG GUID 3 Rank {0}] Timeout at NCCL work: 31, last enqueued NCCL work: 58, last completed NCCL work: {1}.\n"
    log = WATCHDOG.format(0) + WATCHDOG.format(1) + work.format(0, 30) + work.format(1, 12)
    assert "rank 1 had completed 12 operations" in first(log).summary


def test_one_rank_that_reports_is_not_called_the_culprit() -> None:
    assert "not therefore the culprit" in first(WATCHDOG.format(3)).summary


def test_a_fault_carries_its_consequences_below_it() -> None:
    report = report_of(
        STARTED + SERVED + E0 + "RuntimeError: CUDA error: unspecified launch failure\n" + WATCHDOG.format(1) + DEAD
    )
    assert ids(report) == ["application-fault", "nccl-timeout", "engine-crashed"]
    assert len(report.roots) == 1


def test_an_out_of_memory_line_says_who_else_holds_memory() -> None:
    log = (
        OOM
        + " Process 77 has 9.00 GiB memory in use. Process 78 has 1.00 GiB memory in use. Including non-PyTorch memory, this process has 60.00 GiB memory in use. Of the allocated memory 58.00 GiB is allocated by PyTorch\n"
    )
    summary = first(log).summary
    assert "GPU 1 had no room for another 2 GiB (1 of 79.14 GiB free)" in summary
    assert "77 and 78 hold memory there too, up to 9 GiB" in summary


def test_the_engine_itself_is_no_stranger_where_torch_can_t_tell_it_apart() -> None:
    log = (
        OOM
        + " Process 2751070 has 21.35 GiB memory in use. Of the allocated memory 20.90 GiB is allocated by PyTorch\n"
    )
    assert "2751070" not in first(log).summary


def test_a_gpu_that_is_not_empty_says_how_much_is_held() -> None:
    log = "ValueError: Free memory on device cuda:2 (16.0/80.0 GiB) on startup is less than desired GPU memory utilization (0.9, 72.0 GiB).\n"
    finding = first(log)
    assert (
        "GPU 2 has 16 of 80 GiB free, the engine wants 72 (utilization 0.9): about 64 GiB are held" in finding.summary
    )
    assert finding.facts["gpu-index"] == "2"


def test_error_803_does_not_advise_a_newer_driver() -> None:
    finding = first(FIRES["error 803"][0])
    assert "compatibility library" in finding.summary
    assert "too old" not in finding.summary


def test_torch_s_number_is_told_as_a_version() -> None:
    assert "the driver serves CUDA 12.2" in first(FIRES["a driver that is too old"][0]).summary


def test_a_crash_quotes_the_first_error_and_where_it_was_raised() -> None:
    log = (
        STARTED + SERVED + E0 + "Traceback (most recent call last):\n" + E0 + '  File "/x/site-packages/vllm/v1/core/sched.py", line 5, in schedule\n'
        + E0 + "    self.blocks[i]\n" + E0 + "KeyError: 'block 7'\n" + DEAD
    )  # fmt: skip
    finding = first(log)
    assert "KeyError: 'block 7'" in finding.summary
    assert "schedule of vllm/v1/core/sched.py" in finding.summary
    assert finding.facts["version"] == "0.11.2"


def test_context_that_would_fit_is_in_the_advice() -> None:
    finding = first(FIRES["the KV cache is smaller than a request, V1"][0])
    assert "--max-model-len 40960" in finding.advice[0]


def test_heads_that_would_divide_are_named() -> None:
    assert "1, 2, 4, 7, 14 would do" in first(FIRES["heads"][0]).summary


# With the node beside the log.


def log_beside(visits: tuple[Snapshot, ...], log: str) -> tuple[Snapshot, ...]:
    reading = vllm_log.read(log.encode(), nodes.LOG, AT)
    return nodes.last(visits, lambda s: nodes.put(s, engine_events=reading.events))


def test_an_engine_that_stands_still_is_stalled_and_the_idle_rank_named() -> None:
    visits = nodes.each(
        nodes.healthy("hgx-h100-4"),
        lambda s: nodes.with_gpu(
            nodes.with_metrics(s, running=4.0, steps_total=9.0, generation_tokens_total=5.0, prompt_tokens_total=1.0),
            2,
            activity__gpu_ratio=0.0,
        ),
    )
    (finding,) = nodes.found(engine_stalled.RULE.but(limits=engine_stalled.Limits(window_seconds=30.0)), visits)
    assert "GPU 2 is idle" in finding.summary
    assert finding.confidence is Confidence.HIGH


def test_a_saturated_engine_that_generates_is_not_stalled() -> None:
    visits = nodes.each(
        nodes.healthy("hgx-h100-4"), lambda s: nodes.with_metrics(s, waiting=90.0, kv_cache_usage_ratio=0.99)
    )
    assert nodes.found(engine_stalled.RULE, visits) == ()


def test_marlin_on_a_gpu_without_fp8_units_is_a_notice_and_on_hopper_a_warning() -> None:
    (ampere,) = nodes.found(fp8_not_engaged.RULE, log_beside(nodes.healthy("hgx-a100-8"), MARLIN))
    (hopper,) = nodes.found(fp8_not_engaged.RULE, log_beside(nodes.healthy("hgx-h100-8"), MARLIN))
    assert ampere.severity is Severity.NOTICE
    assert hopper.severity is Severity.WARNING
    assert "8.0" in ampere.summary
    assert "9.0" in hopper.summary


def test_the_flag_asks_for_fp8_and_the_engine_runs_unquantized() -> None:
    log = CONFIG.format(model="org/m-70b", quantization="None")
    visits = nodes.each(nodes.healthy("hgx-h100-8"), lambda s: nodes.with_engine(s, flags__quantization="fp8"))
    (finding,) = nodes.found(fp8_not_engaged.RULE, log_beside(visits, log))
    assert "--quantization fp8" in finding.summary


def versions(driver: str, cuda: str) -> tuple[Snapshot, ...]:
    def change(s: Snapshot) -> Snapshot:
        s = nodes.put(
            s,
            metrics=(),
            engine_events=(),
            host__driver_module=driver,
            stack__driver=driver,
            stack__nvml=f"13.{driver}",
        )
        return nodes.with_engine(s, stack__engine="0.22.1", stack__torch_cuda=cuda)

    return nodes.each(nodes.healthy("hgx-h100-8"), change)


def test_a_driver_below_the_floor_of_its_cuda_is_a_mismatch() -> None:
    (finding,) = nodes.found(stack_mismatch.RULE, versions("570.86.10", "13.0"))
    assert "570.86.10" in finding.summary
    assert "580.65.06" in finding.summary


@pytest.mark.parametrize(
    ("driver", "cuda"), [("580.65.06", "13.0"), ("535.161.08", "12.9"), ("525.60.13", "12.1"), ("590.44.01", "13.0")]
)
def test_minor_version_compatibility_is_respected(driver: str, cuda: str) -> None:
    assert nodes.found(stack_mismatch.RULE, versions(driver, cuda)) == ()


def test_forward_compatibility_is_respected() -> None:
    asked = nodes.each(
        versions("570.86.10", "13.0"),
        lambda s: nodes.with_engine(s, environment={"VLLM_ENABLE_CUDA_COMPATIBILITY": "1"}),
    )
    assert nodes.found(stack_mismatch.RULE, asked) == ()
    serving = log_beside(versions("570.86.10", "13.0"), STARTED + SERVED)
    assert nodes.found(stack_mismatch.RULE, serving) == ()


def test_a_module_that_differs_from_the_library_is_a_mismatch() -> None:
    visits = nodes.each(
        nodes.healthy("hgx-h100-8"),
        lambda s: nodes.with_kernel(
            nodes.put(s, host__driver_module="580.65.06", stack__nvml="13.580.95.05"),
            NvidiaMessage(
                text="NVRM: API mismatch: the client has the version 580.95.05",
                where="dmesg:1",
                at=s.at,
                kind="api-mismatch",
            ),
        ),
    )
    (finding,) = nodes.found(stack_mismatch.RULE, visits)
    assert "580.95.05" in finding.summary
    assert "580.65.06" in finding.summary


def test_the_table_answers_for_versions_between_and_beyond_its_rows() -> None:
    between = engine_release("0.20.1")
    assert between is not None
    assert between.version == "0.19.1"
    assert engine_release("0.34.0") is None
    assert engine_release("0.4.2") is None
    assert engine_release("nonsense") is None
    cuda = cuda_release("12.7")
    assert cuda is not None
    assert cuda.driver_min == "525.60.13"
    assert numbers("v0.20.2rc1+cu129") == (0, 20, 2)


def test_an_xid_of_the_same_minute_makes_a_fault_certain_and_names_its_gpu() -> None:
    log = E0 + "RuntimeError: CUDA error: an illegal memory access was encountered\n" + DEAD
    visits = log_beside(nodes.healthy("hgx-h100-8"), log)
    at = vllm_log.stamp_time([11, 20, 8, 0, 0], AT)
    assert at is not None
    visits = nodes.last(
        visits, lambda s: nodes.put(nodes.with_kernel(s, nodes.xid(31, 3, at=at)), at=AT, node__booted_at=at - 9e6)
    )
    (finding,) = nodes.found(application_fault.RULE, visits[-1:])
    assert finding.confidence is Confidence.HIGH
    assert finding.facts["gpu-index"] == "3"


def test_an_application_xid_alone_is_a_warning_and_twice_on_one_gpu_suspicious() -> None:
    def two(s: Snapshot) -> Snapshot:
        return nodes.with_kernel(s, nodes.xid(13, 3, at=s.at - 3000), nodes.xid(13, 3, at=s.at - 10))

    (finding,) = nodes.found(application_fault.RULE, nodes.last(nodes.healthy("hgx-h100-8"), two))
    assert finding.severity is Severity.WARNING
    assert "suspect that GPU" in finding.summary


def test_a_memory_error_beside_it_takes_the_fault_from_the_application() -> None:
    def both(s: Snapshot) -> Snapshot:
        return nodes.with_kernel(s, nodes.xid(94, 3, at=s.at - 12), nodes.xid(31, 3, at=s.at - 10))

    visits = nodes.last(nodes.healthy("hgx-h100-8"), both)
    assert nodes.found(application_fault.RULE, visits) == ()
    (finding,) = nodes.found(gpu_memory_faulty.RULE, visits)
    assert finding.facts["gpu-index"] == "3"


def test_corrected_errors_and_a_repair_that_succeeded_are_wear() -> None:
    visits = nodes.last(
        nodes.healthy("hgx-h100-8"),
        lambda s: nodes.with_kernel(
            nodes.with_gpu(s, 1, ecc__corrected_volatile=70, ecc__rows_remapped_corrected=1), nodes.xid(63, 1, at=s.at)
        ),
    )
    assert nodes.found(gpu_memory_faulty.RULE, visits) == ()


def test_a_pending_repair_is_a_warning_and_a_failed_one_critical() -> None:
    pending = nodes.last(nodes.healthy("hgx-h100-8"), lambda s: nodes.with_gpu(s, 1, ecc__remap_pending=True))
    failed = nodes.last(nodes.healthy("hgx-h100-8"), lambda s: nodes.with_gpu(s, 1, ecc__remap_failed=True))
    assert [f.severity for f in nodes.found(gpu_memory_faulty.RULE, pending)] == [Severity.WARNING]
    assert [f.severity for f in nodes.found(gpu_memory_faulty.RULE, failed)] == [Severity.CRITICAL]


def test_an_out_of_memory_kill_of_a_worker_joins_kernel_and_engine() -> None:
    log = (
        STARTED
        + "(EngineCore pid=9) ERROR 11-20 08:00:00 [m.py:1] Worker proc VllmWorker-1 died unexpectedly (exit code: -9), shutting down executor.\n"
        + DEAD
    )
    kill = OomKill(
        text="Memory cgroup out of memory: Killed process 101",
        where="dmesg:9",
        at=nodes.START,
        pid=101,
        process_name="VLLM::Worker_TP",
        rss_bytes=64 << 30,
    )
    visits = log_beside(nodes.healthy("hgx-h100-8"), log)
    (finding,) = nodes.found(worker_killed.RULE, nodes.last(visits, lambda s: nodes.with_kernel(s, kill)))
    assert "out-of-memory killer took it at 64.0 GiB" in finding.summary
    assert finding.confidence is Confidence.HIGH


def test_an_out_of_memory_kill_of_a_stranger_is_none_of_ours() -> None:
    kill = OomKill(text="Out of memory: Killed process 7", where="dmesg:9", at=nodes.START, pid=7, process_name="java")
    visits = nodes.last(nodes.healthy("hgx-h100-8"), lambda s: nodes.with_kernel(s, kill))
    assert nodes.found(worker_killed.RULE, visits) == ()


def test_a_cache_that_is_full_over_the_window_with_a_queue_is_saturated() -> None:
    limits = kv_cache_saturated.Limits(window_seconds=30.0)
    full = nodes.each(
        nodes.healthy("hgx-h100-4"), lambda s: nodes.with_metrics(s, kv_cache_usage_ratio=0.97, waiting=12.0)
    )
    assert len(nodes.found(kv_cache_saturated.RULE.but(limits=limits), full)) == 1
    reusable = nodes.each(full, lambda s: nodes.with_metrics(s, waiting=0.0, preemptions_total=3.0))
    assert nodes.found(kv_cache_saturated.RULE.but(limits=limits), reusable) == ()
    short = nodes.last(
        nodes.healthy("hgx-h100-4"), lambda s: nodes.with_metrics(s, kv_cache_usage_ratio=0.97, waiting=12.0)
    )
    assert nodes.found(kv_cache_saturated.RULE.but(limits=limits), short) == ()


@pytest.mark.parametrize("code", [-4, -6, -7, -8, -11, 134, 136, 139, 1])
def test_a_worker_that_ended_by_its_own_mistake_is_a_crash(code: int) -> None:
    line = f"(EngineCore pid=9) ERROR 11-20 08:00:01 [x.py:1] Worker proc VllmWorker-1 died unexpectedly (exit code: {code}), shutting down executor.\n"
    assert ids(report_of(STARTED + SERVED + line))[:1] == ["engine-crashed"]
