"""What the simulated node writes: kernel log, engine log, fabric manager log; each line with its time of the drill.

The engine's lines follow the templates of vLLM 0.32, PyTorch 2.13 and NCCL 2.29, the kernel's those of the open kernel
modules 595.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterator

import msgspec

from doctor.simulation import serving
from doctor.simulation.faults import Fault
from doctor.simulation.physics import Drill

GIB = 1 << 30
UPTIME_SECONDS = 3 * 86400.0
"""How long the node had run when the drill began."""

STARTS_SECONDS = {
    "out-of-memory-at-startup": 45.0,
    "driver-too-old": 18.0,
    "driver-library-mismatch": 18.0,
    "gpu-memory-held": 25.0,
    "fabric-manager-dead-at-start": 18.0,
    "fabric-manager-version": 18.0,
}
"""Faults of which the engine dies while it starts: how long before the fault its start began."""

READY_SECONDS = 100.0
"""From the engine's start until it serves."""

STATS_SECONDS = 10.0
"""vLLM's interval of its statistics line."""


class Line(msgspec.Struct, frozen=True):
    """A line of a log, and when it is written."""

    seconds: float
    text: str


# The kernel ------------------------------------------------------------------------------------------------------


def kernel_lines(drill: Drill) -> list[Line]:
    """Return what the kernel logs, without its stamps, in order of time."""
    node = drill.node
    lines = [
        Line(-UPTIME_SECONDS, "Linux version 6.8.0-60-generic (buildd@builder) (gcc 13.3.0) #63-Ubuntu SMP"),
        Line(-UPTIME_SECONDS + 9, f"NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  {drill.driver}"),
    ]
    for number, switch in enumerate(node.switches):
        lines.append(Line(-UPTIME_SECONDS + 10, f"nvidia-nvswitch{number}: using MSI at {switch}"))
    for fault in drill.faults:
        told = _KERNEL.get(fault.name)
        if told is not None:
            lines += [Line(fault.start_seconds + after, text) for after, text in told(drill, fault)]
    return sorted(lines, key=lambda line: line.seconds)


def _bus(address: str) -> str:
    """Return a PCI address as the driver writes it in an Xid: without the function."""
    return address.rpartition(".")[0]


def _xid(drill: Drill, gpu: int, code: int, text: str, *, of_engine: bool = False) -> str:
    who = "pid='<unknown>', name=<unknown>"
    engine = drill.engine
    if of_engine and gpu in engine.gpus:
        rank = engine.gpus.index(gpu)
        who = f"pid={engine.rank_pids[rank]}, name={engine.title(rank)[:15]}"
    return f"NVRM: Xid (PCI:{_bus(drill.node.pci_addresses[gpu])}): {code}, {who}, {text}"


def _gpu_lost_kernel(drill: Drill, fault: Fault) -> Iterator[tuple[float, str]]:
    gpu = int(fault.params["gpu"])
    address = drill.node.pci_addresses[gpu]
    yield 0.0, f"NVRM: GPU at PCI:{_bus(address)}: {drill.node.uuid(gpu)}"
    yield 0.0, _xid(drill, gpu, 79, "GPU has fallen off the bus.")
    yield 0.0, f"NVRM: GPU {address}: GPU has fallen off the bus."
    yield 0.1, _xid(drill, gpu, 154, "GPU recovery action changed from 0x0 (None) to 0x2 (Node Reboot Required)")


def _application_fault_kernel(drill: Drill, fault: Fault) -> Iterator[tuple[float, str]]:
    gpu = int(fault.params["gpu"])
    text = (
        "Ch 00000008, intr 00000000. MMU Fault: ENGINE GRAPHICS GPC1 GPCCLIENT_T1_0 faulted @ 0x7e4a_1c000000. "
        "Fault is of type FAULT_PDE ACCESS_TYPE_VIRT_READ"
    )
    yield 0.0, _xid(drill, gpu, 31, text, of_engine=True)


def _mismatch_kernel(drill: Drill, fault: Fault) -> Iterator[tuple[float, str]]:  # noqa: ARG001 - one form for all
    yield 0.0, f"NVRM: API mismatch: the client has the version {upgraded_driver(drill)}, but"
    yield 0.0, f"NVRM: this kernel module has the version {drill.driver}.  Please"
    yield 0.0, "NVRM: make sure that this kernel module and all NVIDIA driver components have the same version."


def _memory_fault_kernel(drill: Drill, fault: Fault) -> Iterator[tuple[float, str]]:
    gpu = int(fault.params["gpu"])
    yield 0.0, _xid(drill, gpu, 48, XID_TEXTS[48], of_engine=True)
    yield 0.0, _xid(drill, gpu, 95, XID_TEXTS[95], of_engine=True)
    yield 0.1, _xid(drill, gpu, 63, XID_TEXTS[63])
    yield 0.1, _xid(drill, gpu, 154, XID_TEXTS[154])
    yield 3.0, _xid(drill, gpu, 45, "Ch 00000008", of_engine=True)


def _blocked_kernel(drill: Drill, fault: Fault) -> Iterator[tuple[float, str]]:
    rank = int(fault.params["rank"])
    name, pid = drill.engine.title(rank)[:15], drill.engine.rank_pids[rank]
    yield 121.0, f"INFO: task {name}:{pid} blocked for more than 120 seconds."


def _oom_kill_kernel(drill: Drill, fault: Fault) -> Iterator[tuple[float, str]]:
    rank = int(fault.params["rank"])
    pid, name = drill.engine.rank_pids[rank], drill.engine.title(rank)[:15]
    group = f"/system.slice/{serving.UNIT}"
    yield 0.0, f"{name} invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0, oom_score_adj=0"
    chosen = (
        f"oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0-1,oom_memcg={group},"
        f"task_memcg={group},task={name},pid={pid},uid=0"
    )
    yield 0.0, chosen
    killed = (
        f"Memory cgroup out of memory: Killed process {pid} ({name}) total-vm:98304000kB, anon-rss:61440000kB, "
        "file-rss:245760kB, shmem-rss:1048576kB, UID:0 pgtables:130000kB oom_score_adj:0"
    )
    yield 0.0, killed


def _xid_kernel(drill: Drill, fault: Fault) -> Iterator[tuple[float, str]]:
    code = int(fault.params["code"])
    yield (
        0.0,
        _xid(drill, int(fault.params["gpu"]), code, XID_TEXTS.get(code, "simulated"), of_engine=code in {13, 31, 43}),
    )


def _sxid_kernel(drill: Drill, fault: Fault) -> Iterator[tuple[float, str]]:
    code = int(fault.params["code"])
    severity = "Non-fatal" if code in {11004, 11012, 12028, 20001} else "Fatal"
    head = f"nvidia-nvswitch0: SXid (PCI:{drill.node.switches[0]}): {code:05d}"
    yield 0.0, f"{head}, {severity}, Link 61 simulated error"
    yield 0.0, f"{head}, Severity {0 if severity == 'Non-fatal' else 1} Engine instance 61 Sub-engine instance 00"


def _reloaded_kernel(drill: Drill, fault: Fault) -> Iterator[tuple[float, str]]:
    down = fault.number("down")
    driver = drill.driver_at(fault.start_seconds + down) or drill.driver
    yield down, f"NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  {driver}"


def _hung_kernel(drill: Drill, fault: Fault) -> Iterator[tuple[float, str]]:  # noqa: ARG001 - one form for all
    yield 121.0, "INFO: task nvidia-smi:4711 blocked for more than 120 seconds."


XID_TEXTS = {
    13: "Graphics SM Warp Exception on (GPC 0, TPC 0, SM 0): Out Of Range Address",
    43: "Ch 00000008",
    48: "An uncorrectable double bit error (DBE) has been detected on GPU in the framebuffer at partition 3, subpartition 1.",
    63: "Row Remapper: New row marked for remapping, reset gpu to activate.",
    64: "Row Remapper: Failed to write remapping entry",
    74: "NVLink: fatal error detected on link 5(0x10000, 0x0, 0x0, 0x0, 0x0, 0x0, 0x0)",
    79: "GPU has fallen off the bus.",
    94: "Contained: CE User Channel (0x9). RST: No, D-RST: No",
    95: "Uncontained: LTC TAG (0x2, 0x1). RST: Yes, D-RST: No",
    119: "Timeout after 6s of waiting for RPC response from GPU0 GSP! Expected function 76 (GSP_RM_CONTROL) sequence 8120 (0x20800a4c 0x4).",
    154: "GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)",
}

_KERNEL: dict[str, Callable[[Drill, Fault], Iterator[tuple[float, str]]]] = {
    "gpu-lost": _gpu_lost_kernel,
    "application-fault": _application_fault_kernel,
    "driver-library-mismatch": _mismatch_kernel,
    "driver-hung": _hung_kernel,
    "driver-reloaded": _reloaded_kernel,
    "gpu-memory-fault": _memory_fault_kernel,
    "oom-kill": _oom_kill_kernel,
    "rank-blocked": _blocked_kernel,
    "xid": _xid_kernel,
    "sxid": _sxid_kernel,
}


def upgraded_driver(drill: Drill) -> str:
    """Return the version of the libraries that an upgrade laid beside the loaded module."""
    branch, _, rest = drill.driver.partition(".")
    return f"{int(branch) + 5}.{rest}"


# The fabric manager ----------------------------------------------------------------------------------------------


def fabric_manager_version(drill: Drill, seconds: float = 0.0) -> str:
    """Return the version of the fabric manager that is installed at this time of the drill."""
    wrong = any(fault.name == "fabric-manager-version" for fault in drill.faults)
    return upgraded_driver(drill) if wrong else drill.driver_at(seconds) or drill.driver


def fabric_manager_lines(drill: Drill) -> list[Line]:
    """Return what the fabric manager logs, with its stamps."""
    begins = -UPTIME_SECONDS + 30

    def line(seconds: float, level: str, text: str) -> Line:
        moment = datetime.datetime.fromtimestamp(drill.started_at + seconds).astimezone()
        return Line(seconds, f"[{moment:%b %d %Y %H:%M:%S}] [{level}] [tid 1584] {text}")

    lines = list(_fabric_manager_starts(drill, begins, line))
    for fault in drill.faults:
        if fault.name == "driver-reloaded":
            lines += _fabric_manager_starts(drill, fault.start_seconds + fault.number("down"), line)
        elif fault.name == "fabric-manager-restarted":
            lines += _fabric_manager_starts(drill, fault.start_seconds, line)
        elif fault.name == "fabric-manager-version":
            text = (
                f"fabric manager NVIDIA GPU driver interface version {fabric_manager_version(drill)} don't match with "
                f"driver version {drill.driver}. Please update with matching NVIDIA driver package."
            )
            lines.append(line(fault.start_seconds - 30, "ERROR", text))
    return lines


def _fabric_manager_starts(drill: Drill, seconds: float, line: Callable[[float, str, str], Line]) -> Iterator[Line]:
    driver = drill.driver_at(seconds) or drill.driver
    yield line(seconds, "INFO", f"Fabric Manager version {driver} is running with the following configuration options")
    yield line(seconds + 4, "INFO", "Connected to 1 node.")
    yield line(
        seconds + 5,
        "INFO",
        "Successfully configured all the available NVSwitches to route GPU NVLink traffic. "
        "NVLink Peer-to-Peer support will be enabled once the GPUs are successfully registered with the NVLink fabric.",
    )


# The engine ------------------------------------------------------------------------------------------------------


class EngineScript:
    """The engine's log of one drill."""

    def __init__(self, drill: Drill, port: int) -> None:
        self.drill = drill
        self.engine = drill.engine
        self.port = port
        self.ends = drill.engine_ends_seconds

    def lines(self) -> list[Line]:
        """Return all lines but the statistics, in order of time."""
        begins = self.engine.started_seconds
        lines = list(self._start(begins))
        failing = next((f for f in self.drill.faults if f.name in STARTS_SECONDS), None)
        if failing is not None:
            lines = [line for line in lines if line.seconds < failing.start_seconds]
        for fault in self.drill.faults:
            told = getattr(self, f"_{fault.name.replace('-', '_')}", None)
            if told is not None:
                lines += told(fault)
        end = self.ends + 5.0
        return sorted((line for line in lines if line.seconds < end), key=lambda line: line.seconds)

    def statistics(self, seconds: float, running: int, generated: float, prompted: float, used: float) -> Line:
        """Return the statistics line of one moment; *generated* and *prompted* in tokens a second, *used* 0 to 1."""
        text = (
            f"Engine 000: Avg prompt throughput: {prompted:.1f} tokens/s, Avg generation throughput: {generated:.1f} "
            f"tokens/s, Running: {running} reqs, Waiting: 0 reqs, GPU KV cache usage: {used * 100:.1f}%, "
            "Prefix cache hit rate: 41.2%"
        )
        return self._front(seconds, "INFO", "loggers.py:271", text)

    def served(self, seconds: float) -> Line:
        """Return the access line of a request."""
        return Line(seconds, 'INFO:     127.0.0.1:47342 - "POST /v1/chat/completions HTTP/1.1" 200 OK')

    # Who writes.

    def _stamp(self, seconds: float) -> datetime.datetime:
        return datetime.datetime.fromtimestamp(self.drill.started_at + seconds, datetime.timezone.utc)

    def _record(self, seconds: float, who: str, level: str, place: str, text: str) -> Line:
        head = f"({who}) {level} {self._stamp(seconds):%m-%d %H:%M:%S} [{place}] "
        return Line(seconds, "\n".join(head + part for part in text.split("\n")))

    def _front(self, seconds: float, level: str, place: str, text: str) -> Line:
        return self._record(seconds, f"APIServer pid={self.engine.front_pid}", level, place, text)

    def _core(self, seconds: float, level: str, place: str, text: str) -> Line:
        return self._record(seconds, f"EngineCore pid={self.engine.core_pid}", level, place, text)

    def _worker(self, seconds: float, rank: int, level: str, place: str, text: str) -> Line:
        name = self.engine.title(rank).removeprefix("VLLM::")
        return self._record(seconds, f"{name} pid={self.engine.rank_pids[rank]}", level, place, text)

    def _watchdog(self, seconds: float, rank: int, text: str) -> Line:
        stamp = self._stamp(seconds)
        head = f"[rank{rank}]:[E{stamp:%m%d %H:%M:%S}.{stamp.microsecond:06d}000 ProcessGroupNCCL.cpp:688] "
        return Line(seconds, head + text)

    @property
    def _ranks(self) -> range:
        return range(self.engine.tensor_parallel_size)

    # How it starts.

    def _start(self, t: float) -> Iterator[Line]:
        engine, size = self.engine, self.engine.tensor_parallel_size
        model, fp8 = serving.model_of(self.drill), any(f.name == "fp8-not-engaged" for f in self.drill.faults)
        eager = self.drill.node.product.memory_mib < 32768
        yield self._front(t, "INFO", "api_utils.py:347", f" ▄▄ ▄█ █     █     █ ▀▄▀ █  version {serving.VLLM}")
        yield self._front(t, "INFO", "api_utils.py:347", f"  █▄█▀ █     █     █     █  model   {engine.model}")
        arguments = {
            "model_tag": engine.model, "host": "127.0.0.1", "port": self.port, "model": engine.model,
            "max_model_len": serving.MAX_MODEL_LEN, "tensor_parallel_size": size,
            "gpu_memory_utilization": engine.memory_utilization,
            "distributed_timeout_seconds": serving.COLLECTIVE_TIMEOUT_SECONDS,
        }  # fmt: skip
        yield self._front(t + 0.2, "INFO", "api_utils.py:286", f"non-default args: {arguments}")
        architecture = model.config["architectures"][0]
        yield self._front(t + 1, "INFO", "model.py:733", f"Resolved architecture: {architecture}")
        yield self._front(t + 1, "INFO", "model.py:2152", f"Using max model len {serving.MAX_MODEL_LEN}")
        config = (
            f"model='{engine.model}', speculative_config=None, tokenizer='{engine.model}', dtype=torch.bfloat16, "
            f"max_seq_len={serving.MAX_MODEL_LEN}, download_dir=None, load_format=auto, tensor_parallel_size={size}, "
            "pipeline_parallel_size=1, data_parallel_size=1, disable_custom_all_reduce=False, "
            f"quantization={model.quantization}, enforce_eager={eager}, kv_cache_dtype=auto, device_config=cuda"
        )
        text = f"Initializing a V1 LLM engine (v{serving.VLLM}) with config: {config}"
        yield self._core(t + 11, "INFO", "core.py:133", text)
        for rank in self._ranks:
            text = f"world_size={size} rank={rank} local_rank={rank} distributed_init_method=tcp://127.0.0.1:51877 backend=nccl"
            yield self._worker(t + 20, rank, "INFO", "parallel_state.py:1906", text)
        if size > 1:
            yield from self._communicators(t + 22)
        for rank in self._ranks:
            text = f"rank {rank} in world size {size} is assigned as DP rank 0, PP rank 0, PCP rank 0, TP rank {rank}, ETP rank {rank}, EP rank N/A, EPLB rank N/A"
            yield self._worker(t + 26, rank, "INFO", "parallel_state.py:2350", text)
            yield self._worker(
                t + 28, rank, "INFO", "gpu_model_runner.py:4512", f"Starting to load model {engine.model}..."
            )
        yield from self._precision(t + 29, fp8)
        share = model.weights_bytes / size / GIB
        yield self._worker(t + 58, 0, "INFO", "default_loader.py:501", "Loading weights took 28.31 seconds")
        yield self._worker(
            t + 59,
            0,
            "INFO",
            "gpu_model_runner.py:4538",
            f"Model loading took {share:.2f} GiB memory and 30.114520 seconds",
        )
        free = serving.kv_cache_bytes(self.drill) / size / GIB
        tokens = serving.kv_cache_tokens(self.drill)
        for rank in self._ranks:
            yield self._worker(t + 80, rank, "INFO", "gpu_worker.py:772", f"Available KV cache memory: {free:.2f} GiB")
        text = (
            f"GPU KV cache size: {tokens:,} tokens, Maximum concurrency for {serving.MAX_MODEL_LEN:,} tokens per "
            f"request: {tokens / serving.MAX_MODEL_LEN:.2f}x"
        )
        yield self._core(t + 81, "INFO", "kv_cache_utils.py:2327", text)
        if not eager:
            yield self._worker(
                t + 95, 0, "INFO", "gpu_model_runner.py:6516", "Graph capturing finished in 12 secs, took 1.85 GiB"
            )
        text = "init engine (profile, create kv cache, warmup model) took 36.21 s (compilation: 14.50 s)"
        yield self._core(t + 96, "INFO", "core.py:405", text)
        yield self._front(t + 99, "INFO", "entry.py:140", f"Starting vLLM server on http://127.0.0.1:{self.port}")
        yield Line(t + 99.5, f"INFO:     Started server process [{engine.front_pid}]")
        yield Line(t + 99.5, "INFO:     Waiting for application startup.")
        yield Line(t + READY_SECONDS, "INFO:     Application startup complete.")

    def _communicators(self, t: float) -> Iterator[Line]:
        node, size = self.drill.node, self.engine.tensor_parallel_size
        yield self._worker(t, 0, "INFO", "pynccl.py:148", f"vLLM is using nccl=={serving.NCCL}")
        linked = not serving.reduces_over_pcie(self.drill)
        if not linked and size > 2:
            for rank in self._ranks:
                text = (
                    "Custom allreduce is disabled because it's not supported on more than two PCIe-only GPUs. "
                    "To silence this warning, specify disable_custom_all_reduce=True explicitly."
                )
                yield self._worker(t + 0.5, rank, "WARNING", "custom_all_reduce.py:268", text)
        backends = ["CUSTOM"] if linked else []
        if linked and node.fabric:
            backends.append("SYMM_MEM")
        used = ", ".join(f"'{name}'" for name in [*backends, "PYNCCL"])
        text = (
            f"Using [{used}] all-reduce backends (in dispatch order) for group 'tp:0' out of potential backends: "
            "['NCCL_SYMM_MEM', 'QUICK_REDUCE', 'FLASHINFER', 'CUSTOM', 'SYMM_MEM', 'PYNCCL']."
        )
        yield self._worker(t + 1, 0, "INFO", "cuda_communicator.py:353", text)

    def _precision(self, t: float, weight_only: bool) -> Iterator[Line]:
        if not serving.model_of(self.drill).fp8:
            return
        kernel = "MarlinFP8ScaledMMLinearKernel" if weight_only else "CutlassFP8ScaledMMLinearKernel"
        yield self._worker(t, 0, "INFO", "__init__.py:312", f"Selected {kernel} for CompressedTensorsW8A8Fp8")
        if weight_only:
            text = (
                "Your GPU does not have native support for FP8 computation but FP8 quantization is being used. "
                "Weight-only FP8 compression will be used leveraging the Marlin kernel. This may degrade performance "
                "for compute-heavy workloads."
            )
            for rank in self._ranks:
                yield self._worker(t + 1, rank, "WARNING", "marlin_utils_fp8.py:66", text)

    # How it dies.

    def _stuck(self, t: float, missing: int) -> Iterator[Line]:
        """Yield what the ranks say that wait for one which does not come."""
        waited = serving.COLLECTIVE_TIMEOUT_SECONDS
        text = (
            f"No available shared memory broadcast block found in {waited} seconds. This typically happens when some "
            "processes are hanging or doing some time-consuming work (e.g. compilation, weight/kv cache quantization)."
        )
        yield self._core(t + waited - 0.9, "INFO", "shm_broadcast.py:878", text)
        for rank in self._ranks:
            if rank == missing:
                continue
            work = (
                f"WorkNCCL(SeqNum=48213, OpType=ALLREDUCE, NumelIn=524288, NumelOut=524288, Timeout(ms)={waited * 1000}) "
                f"ran for {waited * 1000 + 11 + rank} milliseconds before timing out."
            )
            at = t + waited - 0.8 + 0.01 * rank
            yield self._watchdog(at, rank, f"[Rank {rank}] Watchdog caught collective operation timeout: {work}")
            text = (
                "Some NCCL operations have failed or timed out. Due to the asynchronous nature of CUDA kernels, "
                "subsequent GPU operations might run on corrupted/incomplete data."
            )
            yield self._watchdog(at + 0.1, rank, f"[Rank {rank}] {text}")
            text = f"[PG ID 2 PG GUID 3 Rank {rank}] Process group watchdog thread terminated with exception: [Rank {rank}] Watchdog caught collective operation timeout: {work}"
            yield self._watchdog(at + 0.15, rank, text)
        first = next(rank for rank in self._ranks if rank != missing)
        yield from self._dies(t + waited - 0.5, first, "-6", "TimeoutError", "RPC call to execute_model timed out.")

    def _dies(self, t: float, rank: int | None, code: str, error: str, message: str) -> Iterator[Line]:
        """Yield how the engine falls after its worker, or of itself."""
        if rank is not None and self.engine.tensor_parallel_size > 1:
            text = f"Worker proc VllmWorker-{rank} died unexpectedly (exit code: {code}), shutting down executor."
            yield self._core(t, "ERROR", "multiproc_executor.py:380", text)
        trace = (
            "EngineCore encountered a fatal error.\n"
            "Traceback (most recent call last):\n"
            f'  File "{serving.ENVIRONMENT}/lib/python3.12/site-packages/vllm/v1/engine/core.py", line 2797, in run_engine_core\n'
            "    engine_core.run_busy_loop()\n"
            f"{error}: {message}"
        )
        yield self._core(t + 0.1, "ERROR", "core.py:2806", trace)
        trace = (
            "AsyncLLM output_handler failed.\n"
            "Traceback (most recent call last):\n"
            f'  File "{serving.ENVIRONMENT}/lib/python3.12/site-packages/vllm/v1/engine/async_llm.py", line 731, in output_handler\n'
            "    outputs = await engine_core.get_output_async()\n"
            "vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue. See stack trace (above) for the root cause."
        )
        yield self._front(t + 0.2, "ERROR", "async_llm.py:745", trace)
        yield Line(
            t + 0.3, 'INFO:     127.0.0.1:47388 - "POST /v1/chat/completions HTTP/1.1" 500 Internal Server Error'
        )
        yield Line(t + 0.35, "INFO:     Shutting down")
        yield Line(t + 0.4, "INFO:     Waiting for application shutdown.")
        yield Line(t + 0.4, "INFO:     Application shutdown complete.")
        yield Line(t + 0.4, f"INFO:     Finished server process [{self.engine.front_pid}]")

    def _does_not_start(self, t: float, rank: int, trace: str) -> Iterator[Line]:
        """Yield how an engine gives up while it starts, of a worker's error."""
        yield self._worker(t, rank, "ERROR", "multiproc_executor.py:1057", f"WorkerProc failed to start.\n{trace}")
        text = (
            "EngineCore failed to start.\n"
            "Traceback (most recent call last):\n"
            f'  File "{serving.ENVIRONMENT}/lib/python3.12/site-packages/vllm/v1/executor/multiproc_executor.py", line 884, in wait_for_ready\n'
            "    raise e from None\n"
            "Exception: WorkerProc initialization failed due to an exception in a background process. See stack trace for root cause."
        )
        yield self._core(t + 1, "ERROR", "core.py:1584", text)
        text = (
            "Traceback (most recent call last):\n"
            f'  File "{serving.ENVIRONMENT}/bin/vllm", line 8, in <module>\n'
            "    sys.exit(main())\n"
            "RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {'EngineCore': 1}"
        )
        yield Line(t + 2, text)

    def _trace(self, file: str, error: str) -> str:
        return (
            "Traceback (most recent call last):\n"
            f'  File "{serving.ENVIRONMENT}/lib/python3.12/site-packages/{file}", line 214, in call\n'
            "    return func(*args)\n"
            f"{error}"
        )

    def _gpu_lost(self, fault: Fault) -> Iterator[Line]:
        gpu = int(fault.params["gpu"])
        if gpu in self.engine.gpus:
            yield from self._stuck(fault.start_seconds, self.engine.gpus.index(gpu))

    def _nccl_timeout(self, fault: Fault) -> Iterator[Line]:
        yield from self._stuck(fault.start_seconds, int(fault.params["rank"]))

    def _waits(self, fault: Fault) -> Iterator[Line]:
        """Yield what the engine core says each minute while it waits for a worker."""
        end = 3600.0 if fault.end_seconds is None else fault.end_seconds
        for number in range(1, math.ceil((end - fault.start_seconds) / 60)):
            text = (
                "No available shared memory broadcast block found in 60 seconds. This typically happens when some "
                "processes are hanging or doing some time-consuming work (e.g. compilation, weight/kv cache quantization)."
            )
            yield self._core(fault.start_seconds + 60 * number, "INFO", "shm_broadcast.py:878", text)

    _engine_stalled = _rank_stopped = _rank_blocked = _kernel_hung = _waits

    def _engine_crashed(self, fault: Fault) -> Iterator[Line]:
        message = "request chatcmpl-5f2c was scheduled with 4097 tokens, and its block table holds 4096"
        yield from self._dies(fault.start_seconds, None, "", "AssertionError", message)

    def _application_fault(self, fault: Fault) -> Iterator[Line]:
        gpu = int(fault.params["gpu"])
        if gpu not in self.engine.gpus:
            return
        rank, t = self.engine.gpus.index(gpu), fault.start_seconds
        error = "torch.AcceleratorError: CUDA error: an illegal memory access was encountered"
        trace = self._trace("vllm/v1/worker/gpu_model_runner.py", error)
        yield self._worker(
            t + 0.1, rank, "ERROR", "multiproc_executor.py:1189", f"WorkerProc hit an exception.\n{trace}"
        )
        text = "Process group watchdog thread terminated with exception: CUDA error: an illegal memory access was encountered"
        yield self._watchdog(t + 0.5, rank, f"[PG ID 2 PG GUID 3 Rank {rank}] {text}")
        yield from self._dies(
            t + 2,
            rank,
            "-6",
            "RuntimeError",
            "Worker failed with error 'CUDA error: an illegal memory access was encountered', please check the stack trace above for the root cause",
        )

    def _gpu_memory_fault(self, fault: Fault) -> Iterator[Line]:
        """Yield how the rank on that GPU meets the error, and how the others meet its death."""
        rank, t = self.engine.gpus.index(int(fault.params["gpu"])), fault.start_seconds
        text = "CUDA error: uncorrectable ECC error encountered"
        trace = self._trace("vllm/v1/worker/gpu_model_runner.py", f"torch.AcceleratorError: {text}")
        yield self._worker(
            t + 0.1, rank, "ERROR", "multiproc_executor.py:1189", f"WorkerProc hit an exception.\n{trace}"
        )
        yield self._watchdog(
            t + 0.4,
            rank,
            f"[PG ID 2 PG GUID 3 Rank {rank}] Process group watchdog thread terminated with exception: {text}",
        )
        for other in self._ranks:
            if other != rank:
                error = (
                    "torch.distributed.DistBackendError: NCCL error in: ../torch/csrc/distributed/c10d/NCCLUtils.cpp:94, "
                    f"unhandled cuda error (run with NCCL_DEBUG=INFO for details), NCCL version {serving.NCCL}\n"
                    "ncclUnhandledCudaError: Call to CUDA function failed."
                )
                trace = self._trace("torch/distributed/distributed_c10d.py", error)
                yield self._worker(
                    t + 0.8, other, "ERROR", "multiproc_executor.py:1189", f"WorkerProc hit an exception.\n{trace}"
                )
        message = f"Worker failed with error '{text}', please check the stack trace above for the root cause"
        yield from self._dies(t + 2, rank, "-6", "RuntimeError", message)

    def _gpu_memory_held(self, fault: Fault) -> Iterator[Line]:
        total = self.drill.node.product.total_bytes / GIB
        rank = self.engine.gpus.index(int(fault.params["gpu"]))
        share = self.engine.memory_utilization
        error = (
            f"ValueError: Free memory on device cuda:{rank} ({max(0.0, total - fault.number('gib') - 0.6):.2f}/{total:.2f} "
            f"GiB) on startup is less than desired GPU memory utilization ({share}, {share * total:.2f} GiB). Decrease GPU "
            "memory utilization or reduce GPU memory used by other processes."
        )
        yield from self._does_not_start(fault.start_seconds, rank, self._trace("vllm/v1/worker/utils.py", error))

    def _out_of_memory_at_startup(self, fault: Fault) -> Iterator[Line]:
        total = self.drill.node.product.total_bytes / GIB
        rank = self._ranks[-1]
        error = (
            f"torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.95 GiB. GPU {self.engine.gpus[rank]} has a "
            f"total capacity of {total:.2f} GiB of which 758.44 MiB is free. Including non-PyTorch memory, this process "
            f"has {total - 0.9:.2f} GiB memory in use. Of the allocated memory {total - 3.4:.2f} GiB is allocated by "
            "PyTorch, and 512.60 MiB is reserved by PyTorch but unallocated."
        )
        trace = self._trace("vllm/v1/worker/gpu_worker.py", error)
        yield from self._does_not_start(fault.start_seconds, rank, trace)

    def _driver_too_old(self, fault: Fault) -> Iterator[Line]:
        major, _, minor = self.drill.cuda_of(self.drill.driver).partition(".")
        error = (
            f"RuntimeError: The NVIDIA driver on your system is too old (found version {int(major) * 1000 + int(minor) * 10}). "
            "Please update your GPU driver by downloading and installing a new version from the URL: "
            "http://www.nvidia.com/Download/index.aspx"
        )
        yield from self._does_not_start(fault.start_seconds, 0, self._trace("torch/cuda/__init__.py", error))

    def _driver_library_mismatch(self, fault: Fault) -> Iterator[Line]:
        error = (
            "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
            "NumCudaDevices() that might have already set an error? Error 803: system has unsupported display driver / "
            "cuda driver combination"
        )
        yield from self._does_not_start(fault.start_seconds, 0, self._trace("torch/cuda/__init__.py", error))

    def _fabric_manager_dead_at_start(self, fault: Fault) -> Iterator[Line]:
        yield from self._no_fabric(fault)

    def _fabric_manager_version(self, fault: Fault) -> Iterator[Line]:
        yield from self._no_fabric(fault)

    def _no_fabric(self, fault: Fault) -> Iterator[Line]:
        error = (
            "RuntimeError: Unexpected error from cudaGetDeviceCount(). Did you run some cuda functions before calling "
            "NumCudaDevices() that might have already set an error? Error 802: system not yet initialized"
        )
        yield from self._does_not_start(fault.start_seconds, 0, self._trace("torch/cuda/__init__.py", error))

    def _oom_kill(self, fault: Fault) -> Iterator[Line]:
        rank = int(fault.params["rank"])
        yield from self._dies(fault.start_seconds + 7, rank, "-9", "RuntimeError", "Executor failed.")
