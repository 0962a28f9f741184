"""An engine's log: every record format since vLLM 0.5, whatever stands before the record, and nothing else."""

from __future__ import annotations

import time
from calendar import timegm

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.readers import signals, vllm_log
from doctor.readers.vllm_log import LogReader
from doctor.snapshot import EngineEvent

AT = float(timegm((2026, 11, 21, 12, 0, 0)))


def events_of(text: str | bytes, at: float = AT) -> tuple[EngineEvent, ...]:
    data = text.encode() if isinstance(text, str) else text
    return vllm_log.read(data, "vllm.log", at).events


def only(text: str | bytes, at: float = AT) -> EngineEvent:
    events = events_of(text, at)
    assert len(events) == 1, events
    return events[0]


MESSAGE = "Available KV cache memory: 42.54 GiB"

RECORDS = {
    "0.5, no bracket": f"INFO 11-20 08:57:52 gpu_worker.py:297] {MESSAGE}",
    "0.8, bracket": f"INFO 11-20 08:57:52 [gpu_worker.py:297] {MESSAGE}",
    "0.6 V0 worker": f"(VllmWorkerProcess pid=110) INFO 11-20 08:57:52 worker.py:12] {MESSAGE}",
    "0.9 V1 worker": f"(VllmWorker rank=3 pid=110) INFO 11-20 08:57:52 [worker.py:12] {MESSAGE}",
    "0.10.1 worker": f"(VllmWorker PP0_TP3 pid=110) INFO 11-20 08:57:52 [worker.py:12] {MESSAGE}",
    "0.11 worker": f"(Worker_TP3 pid=110) INFO 11-20 08:57:52 [worker.py:12] {MESSAGE}",
    "0.20 data and expert parallel": f"(Worker_DP0_TP3_EP3 pid=110) INFO 11-20 08:57:52 [worker.py:12] {MESSAGE}",
    "0.32 debug path": f"(EngineCore pid=110) INFO 11-20 08:57:52 [v1/worker/gpu_worker.py:297] {MESSAGE}",
    "ray": f"(RayWorkerWrapper pid=110, ip=10.0.0.1) INFO 11-20 08:57:52 worker.py:12] {MESSAGE}",
    "docker compose": f"vllm-llm-1  | INFO 11-20 08:57:52 [worker.py:12] {MESSAGE}",
    "ansi": f"\x1b[1;36m(Worker_TP3 pid=110)\x1b[0;0m INFO 11-20 08:57:52 [worker.py:12] {MESSAGE}",
    "ansi level": f"\x1b[0;36m(Worker_TP3 pid=110)\x1b[0;0m \x1b[32mINFO\x1b[0m 11-20 08:57:52 \x1b[90m[worker.py:12]\x1b[0m {MESSAGE}",
    "ansi pasted without escape": f"[1;36m(Worker_TP3 pid=110)[0;0m INFO 11-20 08:57:52 [worker.py:12] {MESSAGE}",
    "ansi as an arrow": f"←[36m(Worker_TP3 pid=110)←[0m INFO 11-20 08:57:52 [worker.py:12] {MESSAGE}",
    "a CI system": f"[2026-11-20T08:57:52Z] INFO 11-20 01:57:52 [worker.py:12] {MESSAGE}",
    "kubectl --timestamps": f"2026-11-20T08:57:52.123456789Z INFO 11-20 01:57:52 [worker.py:12] {MESSAGE}",
    "cri": f"2026-11-20T08:57:52.123456789+00:00 stdout F INFO 11-20 08:57:52 [worker.py:12] {MESSAGE}",
    "journal": f"Nov 20 08:57:52 node1 vllm[4711]: (Worker_TP3 pid=110) INFO 11-20 08:57:52 [worker.py:12] {MESSAGE}",
    "quoted in a thread": f"> INFO 11-20 08:57:52 [worker.py:12] {MESSAGE}",
    "behind a progress bar": f"Capturing graphs: 100%|██| 35/35 [00:08<00:00](EngineCore pid=110) INFO 11-20 08:57:52 [worker.py:12] {MESSAGE}",
    "behind carriage returns": f"Loading:  50%\rLoading: 100%\rINFO 11-20 08:57:52 [worker.py:12] {MESSAGE}",
    "crlf": f"INFO 11-20 08:57:52 [worker.py:12] {MESSAGE}\r",
    "json record": '{"asctime": "2026-11-20 08:57:52,123", "levelname": "INFO", "name": "vllm", "processName": "VllmWorker-3", "process": 110, "message": "Available KV cache memory: 42.54 GiB"}',
    "docker json-file": '{"log":"INFO 11-20 08:57:52 [worker.py:12] Available KV cache memory: 42.54 GiB\\n","stream":"stdout","time":"2026-11-20T08:57:52.5Z"}',
}  # fmt: skip


@pytest.mark.parametrize("line", RECORDS.values(), ids=RECORDS)
def test_a_record_of_every_era_and_wrapping_is_read(line: str) -> None:
    event = only(f"noise\n{line}\n")
    assert event.signal == "kv-cache-memory"
    assert event.facts["bytes"] == round(42.54 * 2**30)
    assert event.text == MESSAGE
    assert event.where == "vllm.log:2"
    assert event.at == timegm((2026, 11, 20, 8, 57, 52))
    assert event.level == "INFO"
    if "110" in line:
        assert event.pid == 110
    if "TP3" in line or "rank=3" in line or "VllmWorker-3" in line:
        assert event.rank == 3


SAID = {
    "ValueError: Total number of attention heads (28) must be divisible by tensor parallel size (8).": ("launch-error", "heads-indivisible"),
    "  Value error, Total number of attention heads (28) must be divisible by tensor parallel size (8). [type=value_error]": ("launch-error", "heads-indivisible"),
    "  Value error, World size (16) is larger than the number of available GPUs (8) in this node.": ("launch-error", "world-size"),
    "ValueError: Tensor parallel size (8) cannot be larger than the number of available GPUs (4).": ("launch-error", "world-size"),
    "AssertionError: please ensure that world_size (4) is less than than max local gpu count (2)": ("launch-error", "world-size"),
    "ValueError: The number of required GPUs exceeds the total number of available GPUs in the placement group.": ("launch-error", "world-size"),
    "ValueError: Weight output_partition_size = 192 is not divisible by weight quantization block_n = 128.": ("launch-error", "fp8-block"),
    "ValueError: The input_size of down's weight = 3696 is not divisible by weight quantization block_k = 128.": ("launch-error", "fp8-block"),
    "ValueError: Weight input_size_per_partition = 3696 is not divisible by group_size = 128. Consider reducing": ("launch-error", "quantization-group"),
    "ValueError: The quantization method fp8 is not supported for the current GPU. Minimum capability: 89. Current capability: 80.": ("launch-error", "quantization-capability"),
    "ValueError: Quantization method specified in the model config (awq) does not match the quantization method specified in the `quantization` argument (gptq).": ("launch-error", "quantization-mismatch"),
    "ValueError: invalid literal for int() with base 10: 'MIG-0d1e'": ("launch-error", "mig-uuid"),
    "OSError: [Errno 98] Address already in use": ("launch-error", "port-in-use"),
    "ERROR:    [Errno 98] error while attempting to bind on address ('0.0.0.0', 8000): address already in use": ("launch-error", "port-in-use"),
    "vllm: error: unrecognized arguments: --tensor-paralel-size 4": ("launch-error", "bad-flag"),
    "api_server.py: error: argument --dtype: invalid choice: 'fp4'": ("launch-error", "bad-flag"),
    "huggingface_hub.errors.GatedRepoError: 401 Client Error.": ("launch-error", "no-access"),
    "OSError: some/model is not a local folder and is not a valid model identifier listed on the hub": ("launch-error", "model-not-found"),
    "ValueError: Bfloat16 is only supported on GPUs with compute capability of at least 8.0.": ("launch-error", "dtype"),
    "RuntimeError: Failed to infer device type": ("launch-error", "no-device-type"),
    "RuntimeError: CUDA error: an illegal memory access was encountered": ("cuda-error", "illegal-memory-access"),
    "torch.AcceleratorError: CUDA error: an illegal instruction was encountered": ("cuda-error", "illegal-instruction"),
    "RuntimeError: CUDA error: misaligned address": ("cuda-error", "misaligned-address"),
    "RuntimeError: CUDA error: device-side assert triggered": ("cuda-error", "device-assert"),
    "RuntimeError: CUDA error: uncorrectable ECC error encountered": ("cuda-error", "ecc"),
    "RuntimeError: CUDA error: uncorrectable NVLink error detected during the execution": ("cuda-error", "nvlink"),
    "RuntimeError: CUDA error: the provided PTX was compiled with an unsupported toolchain.": ("cuda-error", "unsupported-toolchain"),
    "RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable": ("cuda-error", "other"),
    "RuntimeError: CUDA error: all CUDA-capable devices are busy or unavailable": ("cuda-error", "busy"),
    "RuntimeError: CUDA error: peer access is not supported between these two devices": ("cuda-error", "peer-unsupported"),
    "RuntimeError: CUDA error: CUBLAS_STATUS_EXECUTION_FAILED when calling `cublasGemmEx`": ("cuda-error", "cublas"),
    "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 802: system not yet initialized": ("cuda-error", "system-not-initialized"),
    "RuntimeError: Unexpected error from cudaGetDeviceCount(). Error 804: forward compatibility was attempted on non supported HW": ("cuda-error", "compat-unsupported"),
    "RuntimeError: No CUDA GPUs are available": ("cuda-error", "no-device"),
    "RuntimeError: Triton Error [CUDA]: device kernel image is invalid": ("cuda-error", "invalid-kernel-image"),
    "node1:12:34 [2] enqueue.cc:99 NCCL WARN Cuda failure 'an illegal memory access was encountered'": ("cuda-error", "illegal-memory-access"),
    "pynvml.NVMLError_LibRmVersionMismatch: RM has detected an NVML/RM version mismatch.": ("nvml-error", "driver-library-mismatch"),
    "Failed to initialize NVML: Driver/library version mismatch": ("nvml-error", "driver-library-mismatch"),
    "pynvml.NVMLError_GpuIsLost: GPU is lost": ("nvml-error", "gpu-lost"),
    "RuntimeError: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details)": ("nccl-error", "unhandled-system-error"),
    "ncclRemoteError: A call failed possibly due to a network error or a remote process exiting prematurely.": ("nccl-error", "remote-error"),
    "torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/ProcessGroupNCCL.cpp:317, unhandled system error, NCCL version 2.21.5": ("nccl-error", "unhandled-system-error"),
    "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.hpp:268, internal error - please report this issue to the NCCL developers": ("nccl-error", "internal-error"),
    "node1:7:9 [0] misc/shmutils.cc:72 NCCL WARN Error: failed to extend /dev/shm/nccl-9Pq to 33030532 bytes": ("nccl-shm-failed", None),
    "node1:7:9 [0] transport/nvls.cc:97 NCCL WARN Cuda failure 401 'the operation cannot be performed in the present state'": ("nccl-nvls-failed", None),
    "node1:7:9 [0] init.cc:974 NCCL WARN Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 19000": ("nccl-duplicate-gpu", None),
    "node1:7:9 [0] graph/search.cc:1127 NCCL WARN Could not find a path for pattern 4, falling back to simple order": ("nccl-warn", None),
    "[rank2]:[E1120 08:00:00.5 ProcessGroupNCCL.cpp:616] [Rank 2] Watchdog caught collective operation timeout: WorkNCCL(SeqNum=7, OpType=BROADCAST, NumelIn=1, NumelOut=1, Timeout(ms)=1800000) ran for 1800012 milliseconds before timing out.": ("watchdog-timeout", None),
    "TimeoutError: RPC call to sample_tokens timed out.": ("rpc-timeout", None),
    "ERROR 11-20 08:00:00 [multiproc_executor.py:315] Worker proc VllmWorker-1 died unexpectedly, shutting down executor.": ("worker-died", None),
    "ERROR 11-20 08:00:00 multiproc_worker_utils.py:120] Worker VllmWorkerProcess pid 350 died, exit code: -15": ("worker-died", None),
    "Fatal Python error: Segmentation fault": ("process-signal", "segfault"),
    "Fatal Python error: Bus error": ("process-signal", "bus-error"),
    "ValueError: No available memory for the cache blocks. Try increasing `gpu_memory_utilization`": ("no-kv-blocks", None),
    "torch.cuda.OutOfMemoryError: CUDA out of memory. Tried to allocate 20.00 MiB (GPU 0; 79.15 GiB total capacity; 77 GiB already allocated)": ("cuda-out-of-memory", None),
    "WARNING 11-20 08:00:00 [fp8.py:1] Your GPU does not have native support for FP8 computation but FP8 quantization is being used. Weight-only FP8 compression will be used leveraging the Marlin kernel.": ("fp8-weight-only", None),
    "INFO 11-20 08:00:00 [fp8.py:199] Using Marlin backend for FP8 MoE": ("fp8-moe-backend", None),
    "ImportError: /opt/vllm/_C.abi3.so: undefined symbol: _ZN3c104cuda9SetDeviceEi": ("library-mismatch", "undefined-symbol"),
    "ImportError: libcudart.so.12: cannot open shared object file: No such file or directory": ("library-mismatch", "missing-library"),
    "WARNING 11-20 08:00:00 shm_broadcast.py:342] No available block found in 60 second. ": ("shm-broadcast-wait", None),
    "KeyError: 'lm_head.weight'": ("exception", None),
    "jinja2.exceptions.TemplateError: bad": ("exception", None),
}  # fmt: skip


@pytest.mark.parametrize(("line", "expected"), SAID.items())
def test_a_message_is_known_by_what_it_says(line: str, expected: tuple[str, str | None]) -> None:
    event = only(line)
    assert (event.signal, event.facts.get("kind")) == expected


QUIET = (
    "CUDA kernel errors might be asynchronously reported at some other API call, so the stacktrace below might be incorrect.",
    "For debugging consider passing CUDA_LAUNCH_BLOCKING=1",
    "Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.",
    '    raise RuntimeError(f"NCCL error: {error_str}")',
    '  File "/opt/vllm/pynccl_wrapper.py", line 223, in NCCL_CHECK',
    '        "CUDA out of memory occurred when warming up sampler"',
    "INFO 11-20 08:00:00 [logger.py:41] Received request cmpl-1: prompt: 'why do I get CUDA error: an illegal memory access was encountered?'",
    "INFO 11-20 08:00:00 [launcher.py:46] Route: /health, Methods: GET",
    'INFO:     10.0.0.9:1 - "POST /v1/completions HTTP/1.1" 500 Internal Server Error',
    "Loading safetensors checkpoint shards: 100% Completed | 2/2 [00:05<00:00,  2.70s/it]",
    "INFO 11-20 08:00:00 [envs.py:1] VLLM_EXECUTE_MODEL_TIMEOUT_SECONDS=300",
)


@pytest.mark.parametrize("line", QUIET)
def test_what_only_looks_like_a_signal_is_none(line: str) -> None:
    assert events_of(f"{line}\n") == ()


def test_the_numbers_of_a_watchdog_line_are_facts() -> None:
    line = next(line for line, said in SAID.items() if said[0] == "watchdog-timeout")
    event = only(line)
    assert event.rank == 2
    assert event.facts == {"rank": 2, "seq": 7, "op": "BROADCAST", "timeout_ms": 1800000, "ran_ms": 1800012}
    assert event.at == timegm((2026, 11, 20, 8, 0, 0))


def test_the_sizes_of_an_out_of_memory_line_are_bytes() -> None:
    event = only(
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.50 GiB. GPU 1 has a total capacity of 79.14 GiB of which "
        "512.00 MiB is free. Process 77 has 9.00 GiB memory in use. Process 78 has 1.00 GiB memory in use. Including non-PyTorch "
        "memory, this process has 60.00 GiB memory in use. Of the allocated memory 58.00 GiB is allocated by PyTorch"
    )
    assert event.facts["gpu"] == 1
    assert event.facts["tried_bytes"] == 3 * 2**29
    assert event.facts["free_bytes"] == 2**29
    assert event.facts["process_pids"] == "77,78"
    assert event.facts["process_bytes"] == 9 * 2**30
    assert event.facts["own_bytes"] == 60 * 2**30


def test_an_exception_knows_where_it_was_raised() -> None:
    event = only(
        "(Worker_TP1 pid=9) ERROR 11-20 08:00:00 [x.py:1] Traceback (most recent call last):\n"
        '(Worker_TP1 pid=9) ERROR 11-20 08:00:00 [x.py:1]   File "/opt/site-packages/vllm/a.py", line 3, in profile_run\n'
        "(Worker_TP1 pid=9) ERROR 11-20 08:00:00 [x.py:1]     self.go()\n"
        '(Worker_TP1 pid=9) ERROR 11-20 08:00:00 [x.py:1]   File "/opt/site-packages/vllm/b.py", line 3, in go\n'
        "(Worker_TP1 pid=9) ERROR 11-20 08:00:00 [x.py:1]     assert x is not None\n"
        "(Worker_TP1 pid=9) ERROR 11-20 08:00:00 [x.py:1]            ^^^^^^^^^^^^^\n"
        "(Worker_TP1 pid=9) ERROR 11-20 08:00:00 [x.py:1] AssertionError\n"
    )
    assert event.facts == {
        "type": "AssertionError",
        "message": "",
        "within": "profile_run > go",
        "file": "vllm/b.py",
        "code": "assert x is not None",
    }


def test_the_last_line_of_a_traceback_counts_whatever_it_is_called() -> None:
    event = only(
        "Traceback (most recent call last):\n  File 'x', line 1, in y\ntorch._dynamo.exc.BackendCompilerFailed: sad\n"
    )
    assert (event.signal, event.facts["type"]) == ("exception", "torch._dynamo.exc.BackendCompilerFailed")


def test_an_error_that_follows_from_another_in_a_chain_says_so() -> None:
    first, second = events_of(
        "Traceback (most recent call last):\n  x\njson.decoder.JSONDecodeError: Expecting value\n\n"
        "During handling of the above exception, another exception occurred:\n\n"
        "Traceback (most recent call last):\n  y\nOSError: the config is not a valid JSON file.\n"
    )
    assert "chained" not in first.facts
    assert second.facts["chained"] == 1
    assert second.signal == "launch-error"


def test_what_the_engine_says_of_itself_becomes_facts() -> None:
    event = only(
        "(EngineCore pid=1) INFO 11-20 08:00:00 [core.py:1] Initializing a V1 LLM engine (v0.22.1) with config: model='org/m-70b', "
        "speculative_config=None, dtype=torch.bfloat16, max_seq_len=8192, tensor_parallel_size=4, quantization=None, enforce_eager=False"
    )
    assert event.facts["version"] == "0.22.1"
    assert event.facts["model"] == "org/m-70b"
    assert event.facts["tensor_parallel_size"] == 4
    assert event.facts["quantization"] == "None"


def test_secrets_among_the_arguments_do_not_leave_the_reader() -> None:
    event = only(
        "INFO 11-20 08:00:00 [u.py:1] non-default args: {'model': 'm', 'api_key': ['hush-1'], 'hf_token': 'hush-2', 'port': 8001}"
    )
    assert "hush" not in repr(event)
    assert event.facts["port"] == 8001


def test_the_same_words_of_one_process_are_one_event_with_a_count() -> None:
    line = "(Worker_TP0 pid=1) WARNING 11-20 08:00:00 [c.py:1] Custom allreduce is disabled because it's not supported on more than two PCIe-only GPUs.\n"
    first, second = events_of(line * 5 + line.replace("TP0 pid=1", "TP1 pid=2"))
    assert (first.count, second.count) == (5, 1)


def test_a_repetition_after_a_sign_of_progress_stands_on_its_own() -> None:
    error, served = "KeyError: 'x'\n", access("200 OK")
    stats = "INFO 11-20 08:00:00 [l.py:1] Engine 000: Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: 9.0 tokens/s, Running: 1 reqs, Waiting: 0 reqs\n"
    for between in (served, stats):
        assert [e.where for e in events_of(error + between + error) if e.signal == "exception"] == [
            "vllm.log:1",
            "vllm.log:3",
        ]


def access(status: str, path: str = "/v1/chat/completions", method: str = "POST") -> str:
    return f'INFO:     127.0.0.1:5 - "{method} {path} HTTP/1.1" {status}\n'


def test_served_requests_are_the_first_and_the_last_of_a_visit() -> None:
    text = (
        access("200 OK", method="GET", path="/health")
        + access("200 OK") * 50
        + access("500 Internal Server Error") * 20
    )
    assert [e.where for e in events_of(text) if e.signal == "request-served"] == ["vllm.log:2", "vllm.log:51"]


def test_statistics_of_both_engines_are_numbers() -> None:
    v0 = "INFO 11-20 08:00:00 metrics.py:349] Avg prompt throughput: 1.5 tokens/s, Avg generation throughput: 2.0 tokens/s, Running: 3 reqs, Swapped: 0 reqs, Pending: 4 reqs, GPU KV cache usage: 98.5%, CPU KV cache usage: 0.0%."
    assert only(v0).facts == {
        "running": 3, "waiting": 4, "prompt_tokens_per_second": 1.5, "generation_tokens_per_second": 2.0, "kv_cache_usage_ratio": 0.985,
    }  # fmt: skip
    v1 = "(APIServer pid=7) INFO 11-20 08:00:00 [loggers.py:1] 2 Engines Aggregated: Avg prompt throughput: 1.5 tokens/s, Avg generation throughput: 2.0 tokens/s, Running: 3 reqs, Waiting: 4 reqs, Preemptions: 6, GPU KV cache usage: 98.5%, Prefix cache hit rate: 1.0%"
    stats, preemption = events_of(v1)
    assert stats.facts["preemptions"] == 6
    assert (preemption.signal, preemption.facts["count"]) == ("preemption", 6)


def test_of_many_statistics_lines_the_first_and_the_last_ones_stay() -> None:
    line = "INFO 11-20 08:00:00 [loggers.py:1] Engine 000: Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: {}.0 tokens/s, Running: 1 reqs, Waiting: 0 reqs\n"
    events = events_of("".join(line.format(i) for i in range(5000)))
    assert events[0].where == "vllm.log:1"
    assert events[-1].where == "vllm.log:5000"
    assert len(events) == vllm_log.STATS_KEPT + 1


@pytest.mark.parametrize(
    ("stamp", "now", "expected"),
    [
        ([12, 31, 23, 59, 0], (2026, 1, 1, 0, 1), (2025, 12, 31, 23, 59)),
        ([1, 1, 0, 10, 0], (2025, 12, 31, 23, 50), (2026, 1, 1, 0, 10)),
        ([11, 23, 0, 0, 0], (2026, 11, 21, 0, 0), (2025, 11, 23, 0, 0)),
        ([2, 29, 1, 0, 0], (2026, 3, 1, 0, 0), (2024, 2, 29, 1, 0)),
    ],
)
def test_a_stamp_without_a_year_is_never_more_than_a_day_ahead(
    stamp: list[int], now: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    reference = float(timegm((*now, 0)))
    assert vllm_log.stamp_time(stamp, reference) == timegm((*expected, 0))


def test_a_stamp_that_is_no_moment_is_none() -> None:
    assert vllm_log.stamp_time([13, 1, 0, 0, 0], AT) is None
    assert events_of("ERROR 99-99 99:99:99 [a.py:1] KeyError: 'x'")[0].at is None


def test_a_local_stamp_is_moved_by_its_zone() -> None:
    reader = LogReader("l", utc_offset_seconds=3600.0)
    reader.feed(b"ERROR 11-20 08:00:00 [a.py:1] KeyError: 'x'\n", AT)
    assert reader.take().events[0].at == timegm((2026, 11, 20, 7, 0, 0))


def test_a_follower_gets_each_line_once_and_an_unfinished_one_when_it_ends() -> None:
    reader = LogReader("journal:vllm", name="vllm.service")
    reader.feed(b"KeyError: 'a'\nKeyErr", AT)
    assert [e.where for e in reader.take().events] == ["vllm.service:1"]
    assert reader.take().events == ()
    reader.feed(b"or: 'b'\n", AT)
    reading = reader.take()
    assert [(e.where, e.text) for e in reading.events] == [("vllm.service:2", "KeyError: 'b'")]
    assert (reading.state.lines, reading.state.log) == (1, "journal:vllm")


def test_after_a_rotation_lines_count_from_one() -> None:
    reader = LogReader("l")
    reader.feed(b"x\ny\nz", AT)
    reader.begin_anew()
    reader.feed(b"KeyError: 'b'\n", AT)
    assert reader.take().events[0].where == "l:1"


def test_a_line_without_end_costs_no_memory_and_is_read_at_its_beginning() -> None:
    reader = LogReader("l")
    reader.feed(b"KeyError: 'start of something long' ", AT)
    for _ in range(200):
        reader.feed(b"x" * 100_000, AT)
    assert len(reader._rest) <= vllm_log.LINE_MAX_BYTES
    reader.feed(b"\nKeyError: 'next'\n", AT)
    reading = reader.take()
    assert [e.where for e in reading.events] == ["l:1", "l:2"]
    assert reading.state.long_lines == 1
    assert all(len(e.text) <= vllm_log.TEXT_MAX for e in reading.events)


def test_a_quoted_report_of_death_is_no_statistics_line() -> None:
    assert only('"Engine core initialization failed. See root cause above."').signal == "engine-core-init-failed"


@pytest.mark.parametrize(
    "unit",
    [
        "num_heads is not divisible by tp_size 3 ",
        "Avg prompt throughput: 1 tokens/s, ",
        "(a(a(a ",
        "Watchdog caught collective operation timeout SeqNum=1, OpType=A ",
        "max seq len (1), (1 GiB KV cache is needed ",
        "Process 1 has 1 GiB memory in use CUDA out of memory. ",
        "non-default args: 'a': 'b', ",
    ],
)
def test_no_line_takes_long_however_it_repeats_itself(unit: str) -> None:
    line = (unit * (vllm_log.LINE_MAX_BYTES // len(unit))).encode() + b"\n"
    started = time.perf_counter()
    events_of(line * 3)
    assert time.perf_counter() - started < 1.5


def test_a_flood_of_errors_keeps_the_first_and_the_last_and_counts_the_rest() -> None:
    reading = vllm_log.read("".join(f"KeyError: '{i}'\n" for i in range(10_000)).encode(), "l", AT)
    assert reading.events[0].text == "KeyError: '0'"
    assert reading.events[-1].text == "KeyError: '9999'"
    assert len(reading.events) == vllm_log.FIRST_KEPT + vllm_log.LAST_KEPT
    assert reading.state.dropped == 10_000 - len(reading.events)


def test_the_first_error_of_a_later_start_survives_the_flood_of_an_earlier_one() -> None:
    start = "INFO 11-20 08:00:00 [api.py:1] vLLM API server version 0.9.2\n"
    flood = "".join(f"RuntimeError: {i}\n" for i in range(500))
    kept = [e.text for e in events_of(f"{start}{flood}{start}KeyError: 'the one'\n{flood}")]
    assert "KeyError: 'the one'" in kept


def test_a_crash_loop_is_bounded() -> None:
    life = "INFO 11-20 08:00:00 [api.py:1] vLLM API server version 0.9.2\nKeyError: 'x{}'\n"
    reading = vllm_log.read("".join(life.format(i) for i in range(3000)).encode(), "l", AT)
    assert len(reading.events) <= 2 * vllm_log.LIVES_KEPT
    assert reading.state.dropped > 2900


def test_every_literal_passes_the_gate() -> None:
    for row in signals.SIGNALS:
        assert any(token in row.literal for token in signals.GATE), row
    for text in signals.EXCEPTION_LITERALS:
        assert any(token in text for token in signals.GATE), text


def test_the_table_is_in_order() -> None:
    names = {row.name for row in signals.SIGNALS}
    assert len(names) > 60
    assert all(name == name.lower() for name in names)


LINES = st.lists(
    st.one_of(
        st.sampled_from(
            [*RECORDS.values(), *SAID, *QUIET, access("200 OK").strip(), "Traceback (most recent call last):"]
        ),
        st.text(max_size=60).map(lambda text: text.replace("\n", " ")),
    ),
    max_size=12,
)


@settings(max_examples=150, deadline=None)
@given(LINES, st.lists(st.integers(1, 400), max_size=8))
def test_how_a_log_is_cut_into_chunks_changes_nothing(lines: list[str], cuts: list[int]) -> None:
    data = "\n".join(lines).encode("utf-8", "surrogatepass")
    whole = vllm_log.read(data, "vllm.log", AT)
    reader = LogReader("vllm.log")
    start = 0
    for cut in cuts:
        reader.feed(data[start : start + cut], AT)
        start += cut
    reader.feed(data[start:], AT)
    assert reader.finish() == whole


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=2000), st.floats(0, 4e9))
def test_no_bytes_make_the_reader_fail(data: bytes, at: float) -> None:
    reading = vllm_log.read(data, "l", at)
    assert reading.state.bytes == len(data)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from([*RECORDS.values(), *SAID]), st.text(max_size=20), st.integers(0, 200))
def test_no_mutilated_record_makes_the_reader_fail(line: str, inserted: str, place: int) -> None:
    events_of((line[:place] + inserted + line[place:]).encode("utf-8", "surrogatepass"))


@pytest.mark.parametrize("literal", sorted({*(row.literal for row in signals.SIGNALS), *signals.EXCEPTION_LITERALS}))
def test_no_line_that_holds_a_literal_is_passed_over_unread(literal: str) -> None:
    assert vllm_log.holds_literal(literal.encode())
    assert vllm_log.holds_literal(f"(Worker pid=1) WARNING 11-21 07:35:02 [x.py:1] and:{literal}\u2026".encode())
    assert not vllm_log.holds_literal(b"WARNING 11-21 07:35:02 [x.py:1] an ordinary line")


@pytest.mark.parametrize(
    ("line", "signal", "kind"),
    [
        ("AssertionError: local_world_size (16) must be less than or equal to the number of visible devices (8).", "launch-error", "world-size"),
        ("(autoscaler +3m2s) Error: No available node types can fulfill resource request {'GPU': 1.0}.", "launch-error", "world-size"),
        ("pod/vllm-0  0/1  OOMKilled  3", "worker-died", "host-memory"),
        ("(raylet) node_manager.cc:31: 1 Workers (tasks / actors) killed due to memory pressure (OOM), 0 Workers crashed", "worker-died", "host-memory"),
        ("vllm-1 exited with code 137", "worker-died", None),
        ("nvidia-container-cli: initialization error: nvml error: driver/library version mismatch: unknown.", "nvml-error", "driver-library-mismatch"),
        ("  what():  Error (drv.cpp:298): system not yet initialized", "cuda-error", "system-not-initialized"),
        ("INFO 03-04 05:06:07 [gpu_worker.py:298] Available KV cache memory: -2.77 GiB", "no-kv-blocks", None),
        ("ValueError: Free memory on device cuda:0 (13.30/15.40 GiB", "free-memory-below-utilization", None),
        ("ValueError: To serve at least one request with the model's max seq len (4096), (4.2 GiB KV cach", "kv-cache-too-small", None),
        ("INFO 03-04 05:06:07 [launcher.py:80] Shutting down FastAPI HTTP server.", "shutdown", None),
    ],
)  # fmt: skip
def test_what_a_cut_or_foreign_line_says(line: str, signal: str, kind: str | None) -> None:
    (event,) = vllm_log.read(f"{line}\n".encode(), "a.log", 0.0).events
    assert (event.signal, event.facts.get("kind")) == (signal, kind)


@pytest.mark.parametrize("code", [0, 130, 143])
def test_an_exit_that_was_asked_for_is_no_death(code: int) -> None:
    assert not vllm_log.read(f"vllm-1 exited with code {code}\n".encode(), "a.log", 0.0).events
