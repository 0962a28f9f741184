"""What a line of an engine's log can say that some symptom can use: one table, first match wins.

Facts (templates, versions, what a message means) come from the source of vLLM 0.5 to 0.33, the strings of PyTorch 2.3
to 2.14, NCCL 2.20 to 2.30 and the CUDA runtime's error texts; line numbers change with every release and are never
matched. A row's `literal` stands in every line that says it, so that a reader may skip all other lines unread.
"""

from __future__ import annotations

import re
from functools import cache, lru_cache

import msgspec

from doctor.snapshot import Fact


class Signal(msgspec.Struct, frozen=True):
    """One thing that a line can say."""

    name: str
    literal: str
    pattern: str = ""
    """Searched in the message; its named groups become facts. Empty: the literal says it all. Where a paste was wrapped or
    cut, a row without pattern behind one with the same meaning takes what is left."""
    kind: str = ""
    """The fact `kind`, where several rows share one name."""
    informs: bool = False
    """It may stand in an INFO record, then at its beginning. Other rows are never looked for in INFO records."""


_SIZE = r"[\d.]+ ?[KMGT]?i?B"

IDENTITY = (
    Signal("engine-version", "vLLM API server version", r"vLLM API server version (?P<version>\S+)", informs=True),
    Signal("engine-version", "█  version ", r"█  version (?P<version>\d\S*)", informs=True),
    Signal("engine-config", "LLM engine (v", r"^Initializing an? (?:V[01] )?LLM engine \(v(?P<version>[^)]*)\) with config", informs=True),
    Signal("non-default-args", "non-default args: ", informs=True),
    Signal("nccl-version", "vLLM is using nccl==", r"nccl==(?P<version>[\d.]+)", informs=True),
    Signal("nccl-version", "NCCL version ", r"^NCCL version (?P<version>[\d.]+)"),
    Signal("rank-assigned", " in world size ", r"^rank (?P<rank>\d+) in world size (?P<world_size>\d+) is assigned", informs=True),
    Signal("world-size", "world_size=", r"^world_size=(?P<world_size>\d+) rank=(?P<rank>\d+)", informs=True),
    Signal("mixed-devices", "Detected different devices in the system"),
)  # fmt: skip

ALL_REDUCE = (
    Signal("custom-allreduce-off-pcie", "supported on more than two PCIe-only GPU"),
    Signal("custom-allreduce-off-p2p", "platform lacks GPU P2P capability or P2P test failed"),
    Signal("custom-allreduce-off-world-size", "Custom allreduce is disabled due to an unsupported world size", r"world size: (?P<world_size>\d+)"),
    Signal("custom-allreduce-off-nodes", "process group spans across nodes"),
    Signal("custom-allreduce-off-nodes", "Custom collectives are disabled because this multi-node group"),
    Signal("allreduce-backends", "all-reduce backends (in dispatch order)", r"^Using \[(?P<backends>[^\]]*)\] all-reduce backends .* for group '(?P<group>[^']*)'", informs=True),
    Signal("symm-mem-no-multicast", "SymmMemCommunicator: symmetric memory multicast operations are not supported"),
    Signal("symm-mem-unsupported", "SymmMemCommunicator: ", r"not (?:supported|available)|unknown|failed"),
    Signal("multicast-unsupported", "Device does not support multicasting"),
    Signal("flashinfer-allreduce-unavailable", "Failed to initialize FlashInfer All"),
    Signal("flashinfer-allreduce-unavailable", "FlashInfer All Reduce is disabled", informs=True),
    Signal("flashinfer-allreduce-unavailable", "FlashInfer mnnvl allreduce workspace unavailable"),
    Signal("flashinfer-allreduce-unavailable", "AllReduce fusion pass is disabled"),
    Signal("p2p-probe-failed", "Error happened when batch testing peer-to-peer access", r"access from (?P<source>\([^)]*\)) to (?P<target>\([^)]*\))"),
    Signal("p2p-probe-failed", "Error happened when batch testing peer-to-peer access"),
    Signal("p2p-cache-read", "GPU P2P access cache", r"^(?:reading|generating) GPU P2P access cache (?:from|in) (?P<path>\S+)", informs=True),
    Signal("nvlink-detection-failed", "NVLink detection failed"),
)  # fmt: skip

PRECISION = (
    Signal("fp8-weight-only", "Weight-only FP8 compression will be used"),
    Signal("fp8-kernel-missing", "object has no attribute", r"has no attribute '(?P<kernel>\w*(?:marlin|scaled_mm|fp8)\w*)'"),
    Signal("fp8-checkpoint", "Detected fp8 checkpoint"),
    Signal("fp8-linear-kernel", "Selected ", r"^Selected (?P<kernel>\w+) for (?P<method>\w*Fp8\w*)", informs=True),
    Signal("fp8-moe-backend", "Fp8 MoE backend out of", r"^Using (?P<backend>\w+) Fp8 MoE backend", informs=True),
    Signal("fp8-moe-backend", " backend for FP8 MoE", r"^Using (?P<backend>.+) backend for FP8 MoE", informs=True),
    Signal("fp8-moe-backend", "kernels for Fp8MoEMethod", r"^Using (?P<backend>.+) kernels for Fp8MoEMethod", informs=True),
    Signal("kv-cache-fp8", "Using fp8 data type to store kv cache", informs=True),
)  # fmt: skip

MEMORY = (
    Signal("sampler-warmup-out-of-memory", "CUDA out of memory occurred when warming up", r"with (?P<requests>\d+) dummy requests"),
    Signal("cuda-out-of-memory", "CUDA out of memory", rf"CUDA out of memory(?:\. Tried to allocate (?P<tried_bytes>{_SIZE}))?(?:\.? \(?GPU (?P<gpu>\d+)(?: has a total capaci?ty of (?P<total_bytes>{_SIZE}) of which (?P<free_bytes>{_SIZE}) is free|; (?P<capacity_bytes>{_SIZE}) total capacity)?)?"),
    Signal("cuda-out-of-memory", "CUDA error: out of memory"),
    Signal("cuda-out-of-memory", "CUDA_ERROR_OUT_OF_MEMORY"),
    Signal("cuda-out-of-memory", "Cuda failure", r"Cuda failure (?:2 )?'out of memory'"),
    Signal("cuda-out-of-memory", "CUBLAS_STATUS_ALLOC_FAILED"),
    Signal("free-memory-below-utilization", "Free memory on device", r"Free memory on device (?:cuda:(?P<gpu>\d+) )?\((?P<free_gib>[\d.]+)/(?P<total_gib>[\d.]+) GiB\) on startup is less than [^(]*\((?P<utilization>[\d.]+), (?P<wanted_gib>[\d.]+) GiB\)"),
    Signal("free-memory-below-utilization", "Free memory on device", r"Free memory on device .{0,12}\([\d.]+/[\d.]+ GiB"),
    Signal("free-memory-below-utilization", " on startup is less than "),
    Signal("host-memory-too-small", "Available memory on node ", r"\((?P<free_gib>[\d.]+)/(?P<total_gib>[\d.]+) GiB\).* is less than .*?(?P<wanted_gib>[\d.]+) GiB\)"),
    Signal("memory-profiling-disturbed", "Error in memory profiling."),
    Signal("no-kv-blocks", "No available memory for the cache blocks"),
    Signal("kv-cache-too-small", "max seq len (", r"max seq len \((?P<max_model_len>\d+)\),? \((?P<needed_gib>[\d.]+) Gi?B KV cache is needed, which is larger than the available KV cache memory \((?P<available_gib>[\d.]+) Gi?B\)(?:.*?estimated maximum model length is (?P<estimated_max_model_len>\d+))?"),
    Signal("kv-cache-too-small", "max seq len (", r"max seq len \((?P<max_model_len>\d+)\) is larger than the maximum number of tokens that can be stored in KV cache \((?P<tokens>\d+)\)"),
    Signal("kv-cache-too-small", "max seq len (", r"max seq len \((?P<max_model_len>\d+)\),? (?:is larger than|\(?[\d.]+ GiB)"),
    Signal("kv-cache-too-small", "which is larger than the available KV cache memory"),
    Signal("kv-cache-too-small", "number of tokens that can be stored in KV cache"),
    Signal("no-kv-blocks", "Available KV cache memory: -", informs=True),
    Signal("kv-cache-memory", "Available KV cache memory: ", r"^Available KV cache memory: (?P<gib>-?[\d.]+) GiB", informs=True),
    Signal("kv-cache-size", " KV cache size: ", r"^\w+ KV cache size: (?P<tokens>[\d,]+) tokens", informs=True),
    Signal("preemption", "is preempted by", r"total_num_cumulative_preemption=(?P<total>\d+)"),
    Signal("preemption", "because there is not enough KV cache space"),
    Signal("no-space-left", "No space left on device", r"No space left on device(?:.*?(?P<path>/dev/shm\S*))?"),
)  # fmt: skip

LIFE = (
    Signal("startup-complete", "Application startup complete", informs=True),
    Signal("load-started", "Starting to load model", informs=True),
    Signal("weights-loaded", "Loading model weights took", r"took (?:in total )?(?P<gib>[\d.]+)", informs=True),
    Signal("weights-loaded", "Model loading took", r"took (?P<gib>[\d.]+)", informs=True),
    Signal("graphs-captured", "Graph capturing finished", informs=True),
    Signal("engine-ready", "init engine (profile, create kv cache, warmup model) took", informs=True),
    Signal("stats", "Avg prompt throughput: ", informs=True),
    Signal("shutdown", "[shutdown] API server: shutdown triggered", informs=True),
    Signal("shutdown", "EngineCore: trigger received signal=", r"signal=(?P<by>\w+)", informs=True),
    Signal("shutdown", "Application shutdown complete", informs=True),
    Signal("shutdown", "Shutting down", r"^(?:INFO:\s+)?Shutting down$", informs=True),
    Signal("shutdown", "Gracefully stopping http server", informs=True),
    Signal("shutdown", "Shutting down FastAPI HTTP server", informs=True),
    Signal("shutdown", "Received SIG", r"^Received (?P<by>SIG(?:TERM|INT))", informs=True),
    Signal("shutdown", "KeyboardInterrupt", r"^KeyboardInterrupt(?:: terminated)?$"),
    Signal("engine-fatal", "EngineCore encountered a fatal error"),
    Signal("engine-fatal", "EngineCore failed to start"),
    Signal("engine-fatal", "EngineCore hit an exception"),
    Signal("engine-fatal", "Engine iteration timed out. This should never happen"),
    Signal("engine-dead", "EngineDeadError"),
    Signal("engine-dead", "got fatal signal from worker processes"),
    Signal("engine-dead", "Got fatal signal from worker processes"),
    Signal("engine-dead", "AsyncLLM output_handler failed"),
    Signal("engine-dead", "Background loop has errored already"),
    Signal("engine-dead", "Background loop is not running"),
    Signal("engine-dead", "Engine loop is not running"),
    Signal("engine-dead", "Task finished unexpectedly. This should never happen"),
    Signal("engine-core-init-failed", "Engine core initialization failed", r"initialization failed(?:.{0,80}Failed core proc\(s\): \{'(?P<process>[^']+)': (?P<exit_code>-?\d+))?"),
    Signal("engine-core-init-failed", "Engine process failed to start"),
    Signal("engine-core-init-failed", "RPCServer process died before responding"),
    Signal("engine-start-timeout", "Timed out waiting for engine"),
    Signal("worker-init-failed", "WorkerProc initialization failed"),
    Signal("worker-init-failed", "WorkerProc failed to start"),
    Signal("worker-failed", "WorkerProc hit an exception"),
    Signal("worker-failed", "WorkerProc failed."),
    Signal("worker-failed", "Worker failed with error"),
    Signal("worker-died", " died unexpectedly", r"(?:proc(?:ess)?|RayWorkerProc) (?P<name>\S+) died unexpectedly(?: \(exit code: (?P<exit_code>-?\d+)\))?"),
    Signal("worker-died", " died, exit code: ", r"Worker (?P<name>\S+) pid (?P<worker_pid>\d+) died, exit code: (?P<exit_code>-?\d+)"),
    Signal("worker-died", "engine core exited unexpectedly"),
    Signal("worker-died", " exited with exit code ", r"exited with exit code (?P<exit_code>13[2-9]|-\d+)"),
    Signal("worker-died", " exited with code ", r"exited with code (?P<exit_code>13[2-9])"),
    Signal("worker-died", "OOMKilled", kind="host-memory"),
    Signal("worker-died", "killed due to the node running low on memory", kind="host-memory"),
    Signal("worker-died", " killed due to memory pressure", r"\b[1-9]\d* Workers \(tasks / ?actors\) killed due to memory pressure", kind="host-memory"),
    Signal("worker-died", "Refer to the documentation on how to address the out of memory issue", kind="host-memory"),
    Signal("worker-died", "worker died or was killed while executing"),
    Signal("worker-died", "The actor died unexpectedly before finishing"),
    Signal("worker-died", "Worker unexpectedly exits"),
    Signal("rpc-timeout", "RPC call to ", r"RPC call to (?P<method>\w+) timed out"),
    Signal("shm-broadcast-wait", "No available shared memory broadcast block found", r"found ?in (?P<seconds>\d+) second", informs=True),
    Signal("shm-broadcast-wait", "No available block found in", r"found in (?P<seconds>\d+) second", informs=True),
)  # fmt: skip

COLLECTIVES = (
    Signal("watchdog-timeout", "Watchdog caught collective operation timeout", r"(?:\[Rank (?P<rank>\d+)\] )?Watchdog caught collective operation timeout: \w+\(SeqNum=(?P<seq>\d+), OpType=(?P<op>\w+).{0,200}?Timeout\(ms\)=(?P<timeout_ms>\d+)\) ran for (?P<ran_ms>\d+) milliseconds"),
    Signal("watchdog-timeout", "Watchdog caught collective operation timeout"),
    Signal("watchdog-timeout", "timeout watchdog detected operation timeout"),
    Signal("watchdog-timeout", " operation to complete", r"gloo.*Timed out waiting (?P<timeout_ms>\d+)ms for (?:recv|send) operation"),
    Signal("watchdog-work", "last enqueued NCCL work: ", r"(?:work sequence id|[Ww]ork): (?P<seq>\d+), last enqueued NCCL work: (?P<enqueued>-?\d+), last completed NCCL work: (?P<completed>-?\d+)"),
    Signal("watchdog-work", "last enqueued work: ", r"(?P<seq>\d+).*last enqueued work: (?P<enqueued>-?\d+), last completed work: (?P<completed>-?\d+)"),
    Signal("nccl-duplicate-gpu", "Duplicate GPU detected", r"rank (?P<first>\d+) and rank (?P<second>\d+) both on CUDA device (?P<device>\w+)"),
    Signal("nccl-duplicate-gpu", "Duplicate GPU detected"),
    Signal("nccl-nvls-failed", "NVLink SHARP (NVLS) Multicast memory"),
    Signal("nccl-nvls-failed", "transport/nvls.cc", r"NCCL WARN"),
    Signal("nccl-shm-failed", "shared memory segment", r"Error while .*shared memory segment (?P<path>\S+) \(size (?P<wanted_bytes>\d+)\)"),
    Signal("nccl-shm-failed", "failed to extend /dev/shm", r"failed to extend (?P<path>\S+) to (?P<wanted_bytes>\d+) bytes"),
    Signal("nccl-shm-failed", "failed to create shared memory file"),
    Signal("nccl-p2p-disabled", "P2P is disabled between NVLINK connected GPUs", r"GPUs (?P<first>\d+) and (?P<second>\d+)"),
    Signal("nccl-driver-too-old", "CUDA Driver version found is", r"found is (?P<found>\d+)\. Minimum requirement is (?P<minimum>\d+)"),
    Signal("nccl-library-missing", "Failed to load NCCL library from"),
)  # fmt: skip

# In this order an error's own word stands before the generic row that would take it too.
CUDA = (
    Signal("cuda-error", "an illegal memory access was encountered", kind="illegal-memory-access"),
    Signal("cuda-error", "CUDA_ERROR_ILLEGAL_ADDRESS", kind="illegal-memory-access"),
    Signal("cuda-error", "cudaErrorIllegalAddress", kind="illegal-memory-access"),
    Signal("cuda-error", "Failed to initialize the TMA descriptor", r"descriptor 700", kind="illegal-memory-access"),
    Signal("cuda-error", "unspecified launch failure", kind="launch-failure"),
    Signal("cuda-error", "CUDA_ERROR_LAUNCH_FAILED", kind="launch-failure"),
    Signal("cuda-error", "the launch timed out and was terminated", kind="launch-timeout"),
    Signal("cuda-error", "an illegal instruction was encountered", kind="illegal-instruction"),
    Signal("cuda-error", "misaligned address", kind="misaligned-address"),
    Signal("cuda-error", "invalid program counter", kind="invalid-program-counter"),
    Signal("cuda-error", "operation not supported on global/shared address space", kind="invalid-address-space"),
    Signal("cuda-error", "device-side assert triggered", kind="device-assert"),
    Signal("cuda-error", "hardware stack error", kind="hardware-stack"),
    Signal("cuda-error", "uncorrectable ECC error encountered", kind="ecc"),
    Signal("cuda-error", "uncorrectable NVLink error", kind="nvlink"),
    Signal("cuda-error", "CUDA_ERROR_ECC_UNCORRECTABLE", kind="ecc"),
    Signal("cuda-error", "no kernel image is available for execution", kind="no-kernel-image"),
    Signal("cuda-error", "CUDA_ERROR_NO_BINARY_FOR_GPU", kind="no-kernel-image"),
    Signal("cuda-error", "is not compatible with the current PyTorch installation", kind="no-kernel-image"),
    Signal("cuda-error", "only supports Ampere GPUs or newer", kind="old-gpu"),
    Signal("cuda-error", "device kernel image is invalid", kind="invalid-kernel-image"),
    Signal("cuda-error", "PTX was compiled with an unsupported toolchain", kind="unsupported-toolchain"),
    Signal("cuda-error", "system not yet initialized", kind="system-not-initialized"),
    Signal("cuda-error", "unsupported display driver / cuda driver combination", kind="driver-mismatch"),
    Signal("cuda-error", "forward compatibility was attempted on non supported HW", kind="compat-unsupported"),
    Signal("cuda-error", "NVIDIA driver on your system is too old", r"found version (?P<found>\d+)", kind="driver-too-old"),
    Signal("cuda-error", "NVIDIA driver on your system is too old", kind="driver-too-old"),
    Signal("cuda-error", "nvidia-container-cli: requirement error", r"unsatisfied condition: (?P<condition>[\w<>=. ]{1,60})", kind="driver-too-old"),
    Signal("cuda-error", "CUDA driver version is insufficient for CUDA runtime version", kind="driver-too-old"),
    Signal("cuda-error", "API call is not supported in the installed CUDA driver", kind="driver-too-old"),
    Signal("cuda-error", "Found no NVIDIA driver on your system", kind="no-driver"),
    Signal("cuda-error", "no CUDA-capable device is detected", kind="no-device"),
    Signal("cuda-error", "No CUDA GPUs are available", kind="no-device"),
    Signal("cuda-error", "CUDA_VISIBLE_DEVICES is set to empty string", kind="no-device"),
    Signal("cuda-error", "invalid device ordinal", kind="invalid-device"),
    Signal("cuda-error", "peer access is not supported between these two devices", kind="peer-unsupported"),
    Signal("cuda-error", "CUDA-capable devices are busy or unavailable", kind="busy"),
    Signal("cuda-error", "CUDA error: unknown error", kind="unknown"),
    Signal("cuda-error", "CUDA unknown error", kind="unknown"),
    Signal("cuda-error", "uncaptured work in another stream", kind="stream-capture"),
    Signal("cuda-error", "during capture", r"CUDA error", kind="stream-capture"),
    Signal("cuda-error", "stream is capturing", kind="stream-capture"),
    Signal("cuda-error", "operation cannot be performed in the present state", kind="illegal-state"),
    Signal("cuda-error", "Unexpected error from cudaGetDeviceCount", r"Error (?P<code>\d+)", kind="initialization"),
    Signal("cuda-error", "CUBLAS_STATUS_", r"(?P<status>CUBLAS_STATUS_\w+)", kind="cublas"),
    Signal("cuda-error", "CUDNN_STATUS_", r"(?P<status>CUDNN_STATUS_\w+)", kind="cudnn"),
    Signal("cuda-error", "CUDA error", r"CUDA error(?: \d+)?: (?P<message>[^\n]{1,120})", kind="other"),
    Signal("cuda-error", "CUDA driver error: ", r"CUDA driver error: (?P<message>[^\n]{1,120})", kind="other"),
    Signal("cuda-error", "Triton Error [CUDA]: ", r"Triton Error \[CUDA\]: (?P<message>[^\n]{1,120})", kind="other"),
    Signal("cuda-error", "Cuda failure ", r"Cuda failure (?P<message>[^\n]{1,120})", kind="other"),
)  # fmt: skip

NVML = (
    Signal("nvml-error", "river/library version mismatch", kind="driver-library-mismatch"),
    Signal("nvml-error", "NVML/RM version mismatch", kind="driver-library-mismatch"),
    Signal("nvml-error", "NVMLError_LibRmVersionMismatch", kind="driver-library-mismatch"),
    Signal("nvml-error", "GPU is lost", kind="gpu-lost"),
    Signal("nvml-error", "NVMLError_GpuIsLost", kind="gpu-lost"),
    Signal("nvml-error", "fallen off the bus", kind="gpu-lost"),
    Signal("nvml-error", "NVMLError_Unknown", kind="unknown"),
    Signal("nvml-error", "NVMLError_DriverNotLoaded", kind="not-loaded"),
    Signal("nvml-error", "Driver Not Loaded", kind="not-loaded"),
    Signal("nvml-error", "NVMLError_LibraryNotFound", kind="library-not-found"),
    Signal("nvml-error", "NVML Shared Library Not Found", kind="library-not-found"),
    Signal("nvml-error", "Failed to initialize NVML", kind="initialization"),
    Signal("nvml-error", "pynvml.NVMLError", r"pynvml\.(?P<type>NVMLError\w*)", kind="other"),
)  # fmt: skip

LIBRARIES = (
    Signal("library-mismatch", "undefined symbol: ", r"undefined symbol: (?P<symbol>\S{1,120})", kind="undefined-symbol"),
    Signal("library-mismatch", "cannot open shared object file", r"(?P<library>lib[\w.+-]+): cannot open shared object file", kind="missing-library"),
    Signal("library-mismatch", "' not found (required by", r"version `(?P<symbol>[\w.]+)' not found", kind="old-library"),
    Signal("library-mismatch", "PTXAS error: ", kind="assembler"),
    Signal("library-mismatch", "ptxas fatal ", kind="assembler"),
)  # fmt: skip

LAUNCH = (
    Signal("launch-error", "must be divisible by tensor parallel size", r"attention heads \((?P<heads>\d+)\) must be divisible by tensor parallel size \((?P<tensor_parallel_size>\d+)\)", kind="heads-indivisible"),
    Signal("launch-error", "must be divisible by tensor parallel size", kind="heads-indivisible"),
    Signal("launch-error", " is not divisible by ", r"(?:num_heads|num_kv_heads|total_num_heads|attention heads)\D{0,20}(?P<heads>\d+)?.* is not divisible by .*(?:tp_size|tensor parallel)\D*(?P<tensor_parallel_size>\d+)?", kind="heads-indivisible"),
    Signal("launch-error", " is not divisible by ", r"^AssertionError: (?P<size>\d+) is not divisible by (?P<tensor_parallel_size>\d+)$", kind="heads-indivisible"),
    Signal("launch-error", "is not divisible by weight quantization block", r"= (?P<size>\d+) is not divisible by weight quantization block_(?P<side>[nk]) = (?P<block>\d+)", kind="fp8-block"),
    Signal("launch-error", "is not divisible by weight quantization block", kind="fp8-block"),
    Signal("launch-error", "is not divisible by group_size", r"= (?P<size>\d+) is not divisible by group_size = (?P<block>\d+)", kind="quantization-group"),
    Signal("launch-error", "is not divisible by tile_", r"= (?P<size>\d+) is not divisible by tile_\w+ = (?P<block>\d+)", kind="quantization-group"),
    Signal("launch-error", "is not divisible by min_thread", r"= (?P<size>\d+) is not divisible by min_thread_. = (?P<block>\d+)", kind="quantization-group"),
    Signal("launch-error", "is larger than the number of available GPUs", r"World size \((?P<world_size>\d+)\) is larger than the number of available GPUs \((?P<gpus>\d+)\)", kind="world-size"),
    Signal("launch-error", "is larger than the number of available GPUs", kind="world-size"),
    Signal("launch-error", "cannot be larger than the number of available GPUs", r"size \((?P<world_size>\d+)\) cannot be larger than the number of available GPUs \((?P<gpus>\d+)\)", kind="world-size"),
    Signal("launch-error", "cannot be larger than the number of available GPUs", kind="world-size"),
    Signal("launch-error", "please ensure that world_size", r"world_size \((?P<world_size>\d+)\) is less than than max local gpu count \((?P<gpus>\d+)\)", kind="world-size"),
    Signal("launch-error", "exceeds the total number of available", r"number of required \w+ exceeds", kind="world-size"),
    Signal("launch-error", "equal to the number of visible devices", r"local_world_size \((?P<world_size>\d+)\).* visible devices \((?P<gpus>\d+)\)", kind="world-size"),
    Signal("launch-error", "No available node types can fulfill resource request", r"'GPU'", kind="world-size"),
    Signal("launch-error", "Current node has no GPU available", kind="world-size"),
    Signal("launch-error", "Cannot provide a placement group of", kind="world-size"),
    Signal("launch-error", " exceeds available GPUs (", r"size \((?P<world_size>\d+)\) exceeds available GPUs \((?P<gpus>\d+)\)", kind="world-size"),
    Signal("launch-error", "does not match the quantization method specified in the `quantization` argument", r"model config \((?P<checkpoint>\w+)\).*argument \((?P<flag>\w+)\)", kind="quantization-mismatch"),
    Signal("launch-error", "does not match the quantization method specified", kind="quantization-mismatch"),
    Signal("launch-error", "Cannot find the config file for ", r"config file for (?P<flag>\w+)", kind="quantization-mismatch"),
    Signal("launch-error", "Unknown quantization method", r"method: '?(?P<checkpoint>[\w-]+)", kind="quantization-mismatch"),
    Signal("launch-error", "Invalid quantization method", kind="quantization-mismatch"),
    Signal("launch-error", "quantization is currently not supported", kind="quantization-mismatch"),
    Signal("launch-error", "Quantization scheme is not supported for ", kind="quantization-capability"),
    Signal("launch-error", "is not supported for the current GPU", r"quantization method (?P<flag>.+?) is not supported for the current GPU\. Minimum capability: (?P<minimum>\d+)\. Current capability: (?P<capability>\d+)", kind="quantization-capability"),
    Signal("launch-error", "Bfloat16 is only supported on GPUs with compute capability", kind="dtype"),
    Signal("launch-error", "invalid literal for int() with base 10: 'MIG-", kind="mig-uuid"),
    Signal("launch-error", "invalid literal for int() with base 10: 'GPU-", kind="gpu-uuid"),
    Signal("launch-error", "Failed to infer device type", kind="no-device-type"),
    Signal("launch-error", "Address already in use", r"Errno 98|[Aa]ddress already in use", kind="port-in-use"),
    Signal("launch-error", "address already in use", kind="port-in-use"),
    Signal("launch-error", "error: unrecognized arguments", r"unrecognized arguments: (?P<flag>.*)", kind="bad-flag"),
    Signal("launch-error", "error: argument ", r"error: argument (?P<flag>\S+):", kind="bad-flag"),
    Signal("launch-error", "error: the following arguments are required", kind="bad-flag"),
    Signal("launch-error", "Repo id must be in the form", kind="model-not-found"),
    Signal("launch-error", "is not a local folder and is not a valid model identifier", kind="model-not-found"),
    Signal("launch-error", "Repository Not Found for url", kind="model-not-found"),
    Signal("launch-error", "RepositoryNotFoundError", kind="model-not-found"),
    Signal("launch-error", "LocalEntryNotFoundError", kind="model-not-found"),
    Signal("launch-error", "Cannot find any model weights", kind="model-not-found"),
    Signal("launch-error", "does not appear to have a file named", kind="model-not-found"),
    Signal("launch-error", "Can't load the configuration of", kind="model-not-found"),
    Signal("launch-error", "couldn't connect to 'https://huggingface.co'", kind="model-not-found"),
    Signal("launch-error", "Entry Not Found for url", kind="model-not-found"),
    Signal("launch-error", "Invalid repository ID or local directory specified", kind="model-not-found"),
    Signal("launch-error", "GatedRepoError", kind="no-access"),
    Signal("launch-error", "is restricted. You must", kind="no-access"),
    Signal("launch-error", "gated repo", kind="no-access"),
    Signal("launch-error", "401 Client Error", kind="no-access"),
    Signal("launch-error", "PermissionError", r"^PermissionError", kind="no-access"),
    Signal("launch-error", "does not recognize this architecture", kind="unsupported-architecture"),
    Signal("launch-error", "are not supported for now", r"Model architectures", kind="unsupported-architecture"),
    Signal("launch-error", "failed to be inspected", kind="model-inspection"),
    Signal("launch-error", "is not a valid JSON file", kind="bad-model-files"),
    Signal("launch-error", "incomplete metadata, file not fully covered", kind="bad-model-files"),
    Signal("launch-error", "Error while deserializing header", kind="bad-model-files"),
    Signal("launch-error", "exceeds dimension size", r"start \(\d+\) \+ length", kind="bad-model-files"),
    Signal("launch-error", "trust_remote_code=True", r"(?:requires|set|pass|option).{0,80}trust_remote_code=True", kind="bad-flag"),
    Signal("launch-error", "User-specified max_model_len", r"max_model_len \((?P<max_model_len>\d+)\) is greater than", kind="bad-value"),
    Signal("launch-error", "is smaller than max_model_len", kind="bad-value"),
    Signal("launch-error", "Value error, ", r"^\s*Value error, (?P<message>.*)", kind="bad-value"),
    Signal("launch-error", "Not enough allowed NUMA nodes", kind="bad-value"),
)  # fmt: skip

NCCL = (
    Signal("nccl-error", "unhandled cuda error", kind="unhandled-cuda-error"),
    Signal("nccl-error", "ncclUnhandledCudaError", kind="unhandled-cuda-error"),
    Signal("nccl-error", "unhandled system error", kind="unhandled-system-error"),
    Signal("nccl-error", "ncclSystemError", kind="unhandled-system-error"),
    Signal("nccl-error", "remote process exited or there was a network error", kind="remote-error"),
    Signal("nccl-error", "ncclRemoteError", kind="remote-error"),
    Signal("nccl-error", "ncclInternalError", kind="internal-error"),
    Signal("nccl-error", "please report this issue to the NCCL developers", kind="internal-error"),
    Signal("nccl-error", "NCCL error: internal error", kind="internal-error"),
    Signal("nccl-error", "NCCL error: invalid usage", kind="invalid-usage"),
    Signal("nccl-error", "NCCL error: invalid argument", kind="invalid-usage"),
    Signal("nccl-error", "ncclInvalidUsage", kind="invalid-usage"),
    Signal("nccl-error", "ncclInvalidArgument", kind="invalid-usage"),
    Signal("nccl-error", "NCCL error", r"NCCL error(?:: (?P<message>[^\n]{1,120})| in: (?P<place>[^\n]{1,120}))", kind="other"),
    Signal("nccl-peer-lost", "Connection closed by remote peer", r"remote peer (?P<peer>\S+)"),
    Signal("nccl-peer-lost", "Connection reset by peer", r"NCCL WARN|ProcessGroupNCCL|TCPStore"),
    Signal("nccl-peer-lost", "Connection closed by peer", r"gloo/transport.*Connection closed by peer (?P<peer>\S+)"),
    Signal("watchdog-heartbeat", "watchdog got stuck for"),
    Signal("watchdog-heartbeat", "Heartbeat monitor timed out"),
    Signal("watchdog-exception", "watchdog thread terminated with exception"),
    Signal("watchdog-exception", "detected by watchdog at work"),
    Signal("watchdog-exception", "Some NCCL operations have failed or timed out"),
    Signal("watchdog-exception", "flight recorder dump signal from another rank"),
    Signal("nccl-warn", "NCCL WARN ", r"(?P<file>\S+:\d+)? ?NCCL WARN (?P<message>.+)"),
)  # fmt: skip

SIGNALS_OF_PROCESS = (
    Signal("process-signal", "SIGSEGV", r"\*\*\* SIGSEGV|signal SIGSEGV|SIGSEGV received", kind="segfault"),
    Signal("process-signal", "Segmentation fault", kind="segfault"),
    Signal("process-signal", "Segfault encountered", kind="segfault"),
    Signal("process-signal", "SIGBUS", r"SIGBUS (?:received|\()|signal SIGBUS", kind="bus-error"),
    Signal("process-signal", "Bus error", kind="bus-error"),
    Signal("process-signal", "Killed", r"^(?:\S+: line \d+: +\d+ )?Killed(?:$| {2,})", kind="killed"),
    Signal("process-signal", "Fatal Python error: Aborted", kind="abort"),
    Signal("process-signal", "SIGABRT received", kind="abort"),
    Signal("process-signal", "terminate called after throwing", r"instance of '(?P<type>[^']*)'", kind="abort"),
    Signal("process-signal", "double free or corruption", kind="abort"),
)  # fmt: skip

SIGNALS: tuple[Signal, ...] = (
    *IDENTITY, *ALL_REDUCE, *PRECISION, *MEMORY, *COLLECTIVES, *CUDA, *NVML, *LIBRARIES, *LAUNCH, *NCCL, *LIFE, *SIGNALS_OF_PROCESS,
)  # fmt: skip
"""Every row, in the order in which they are tried. Beside them the reader gives `request-served` and `exception`."""

EXCEPTION_LITERALS = ("Traceback (most recent call last)", "Error", "Exception", "above exception")
"""What else may not be skipped: the beginning and the end of a traceback."""

INFORMING_STARTS = (
    "rank", "world_size", "Using", "Selected", "reading", "generating", "FlashInfer", "Available KV", "GPU KV", "CPU KV",
    "Application", "Starting to load", "Loading model", "Model loading", "Graph capturing", "init engine", "Avg prompt",
    "Engine ", "[shutdown]", "EngineCore", "Shutting down", "Gracefully", "Received SIG", "No available", "Initializing a",
    "CUDA platform", "vLLM", "non-default", "NCCL version", "▄",
)  # fmt: skip
"""How the messages of INFO and DEBUG records begin that some row takes; all others are skipped by their beginning."""

GATE = (
    "rror", "not ", "iled", "able", "ion ", "cted", "nval", "ed o", " mem", "size", "Not ", "ptio", "UDA_", "capt", " too",
    "back", "ess ", " fai", "_STA", "trig", "NCCL", "t co", " cal", " dri", " sto", "ax_m", "len ", "ault ", "ived", "LLM ",
    "or F", "Avg ", "has ", " dev", "oad ", "d wo", " sig", "ned ", "PU i", "Repo", "Keyb", "SIGB", "SIGS", "Shut", "Symm",
    "tchd", "ansp", "trus", "d rep", "ted b", "Killed", "PTXA", "ptxas", "suppo", "exited",
)  # fmt: skip
"""Every literal holds at least one of these, which few ordinary lines do: a line with none of them is not looked at.

A greedy cover of the literals, weighed against the lines of healthy logs; a test asserts that it covers them."""


@cache
def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(pattern)


class Match(msgspec.Struct, frozen=True):
    """A row of the table that a message matches, with the facts in the message."""

    name: str
    facts: dict[str, Fact]


@lru_cache(maxsize=512)  # ranks, and the starts of a crash loop, say the same
def matched(message: str, *, inform: bool = False) -> Match | None:
    """Return the first row that *message* matches, or None. *inform*: it is an INFO record's message."""
    for signal in _candidates(message):
        if inform and not signal.informs:
            continue
        facts: dict[str, Fact] = {"kind": signal.kind} if signal.kind else {}
        if signal.pattern:
            found = _compiled(signal.pattern).search(message)
            if found is None:
                continue
            facts |= _facts(found)
        return Match(signal.name, facts)
    return None


def by_token(literals: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return the literals that a line with a token of the gate may hold, each under one token."""
    found: dict[str, list[str]] = {}
    for literal in dict.fromkeys(literals):
        found.setdefault(next(token for token in GATE if token in literal), []).append(literal)
    return {token: tuple(of_token) for token, of_token in found.items()}


def by_word(literals: tuple[str, ...]) -> dict[str, tuple[str, ...]]:
    """Return the literals that have a word with a space on either side, each under the longest such word.

    A line that holds the literal has that word among its own words: one look into a set instead of many searches.
    """
    found: dict[str, list[str]] = {}
    for literal in dict.fromkeys(literals):
        words = [word for word in literal.split(" ")[1:-1] if word]
        if words:
            found.setdefault(max(words, key=len), []).append(literal)
    return {word: tuple(of_word) for word, of_word in found.items()}


_ROWS: dict[str, list[tuple[int, Signal]]] = {}
for _n, _row in enumerate(SIGNALS):
    _ROWS.setdefault(_row.literal, []).append((_n, _row))
_LITERALS_BY_TOKEN = by_token(tuple(_ROWS))


def _candidates(message: str) -> list[Signal]:
    """Return the rows whose literal stands in the message, in the order of the table."""
    found = [
        pair
        for token, literals in _LITERALS_BY_TOKEN.items()
        if token in message
        for literal in literals
        if literal in message
        for pair in _ROWS[literal]
    ]
    return [row for _, row in sorted(found, key=lambda pair: pair[0])]


_SIZE_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE_TEXT = re.compile(r"([\d.]+) ?([KMGT]?)i?B?")


def _facts(found: re.Match[str]) -> dict[str, Fact]:
    """Turn named groups into facts: `x_gib` and sizes become `x_bytes`, digits numbers, the rest stays text."""
    facts: dict[str, Fact] = {}
    for name, text in found.groupdict().items():
        if text is None:
            continue
        if name.endswith("_bytes"):
            size = bytes_of(text)
            if size is not None:
                facts[name] = size
        elif name == "gib" or name.endswith("_gib"):
            size = bytes_of(f"{text} GiB")
            if size is not None:
                facts[(name[:-3] + "bytes").lstrip("_")] = size
        else:
            facts[name] = number_or_text(text)
    return facts


def bytes_of(size: str) -> int | None:
    """Return the bytes of `1.95 GiB`, `758.44 MiB`, `1048576`; None where it is no size. GB is read as GiB, as torch means it."""
    found = _SIZE_TEXT.fullmatch(size.strip())
    if found is None:
        return None
    try:
        return round(float(found[1]) * _SIZE_UNITS[found[2]])
    except (ValueError, OverflowError):
        return None


_INTEGER = re.compile(r"-?\d{1,18}")
_THOUSANDS = re.compile(r"\d{1,3}(?:,\d{3}){1,6}")
_DECIMAL = re.compile(r"-?\d{1,15}\.\d{1,9}")


def number_or_text(text: str) -> Fact:
    """Return the number that *text* is (`1,204,224` too), or the text itself."""
    if _INTEGER.fullmatch(text):
        return int(text)
    if _THOUSANDS.fullmatch(text):
        return int(text.replace(",", ""))
    if _DECIMAL.fullmatch(text):
        return float(text)
    return text
