"""Record the cases of the rules that quote an engine's refusal: `python tests/record_log_cases.py [RULE…]`.

An engine starts, its log says why it can't, and at the last visit its processes are gone.
"""

from __future__ import annotations

import sys

import nodes
from record_cases import keep
from test_rules_capacity import starting

from doctor.readers import vllm_log
from doctor.snapshot import Snapshot

CORE = "(EngineCore pid=9) ERROR 11-20 08:00:00 [core.py:700] "
WORKER = "(Worker_TP0 pid=100) ERROR 11-20 08:00:00 [multiproc_executor.py:500] "
NOT_STARTED = (
    CORE + "EngineCore failed to start.\n"
    "(APIServer pid=1) RuntimeError: Engine core initialization failed. See root cause above. "
    "Failed core proc(s): {'EngineCore': 1}\n"
)
UP = "(APIServer pid=1) INFO:     Application startup complete.\n"
AGAIN = "(APIServer pid=1) INFO 11-20 08:05:00 [api_server.py:900] vLLM API server version 0.22.1\n" + UP
HEADS = (
    WORKER + "ValueError: Total number of attention heads (28) must be divisible by tensor parallel size (8).\n"
) + NOT_STARTED
WORLD = WORKER + "ValueError: Tensor parallel size (8) cannot be larger than the number of available GPUs (4).\n"
BLOCKS = (
    WORKER + "ValueError: The output_size of gate's and up's weight = 3696 is not divisible by weight quantization "
    "block_n = 128.\n" + NOT_STARTED
)
OUT_OF_MEMORY = (
    WORKER + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of "
    "79.14 GiB of which 1.00 GiB is free.\n" + NOT_STARTED
)

CASES: dict[str, dict[str, str]] = {
    "shared-memory-too-small": {
        "fires-nccl": "node-1:7:9 [0] linux.cc:842 NCCL WARN Error while creating shared memory segment /dev/shm/nccl-Ab1 "
        "(size 33030528), error: No space left on device (28)\n"
        + WORKER
        + "torch.distributed.DistBackendError: NCCL error in: NCCLUtils.cpp:94, unhandled system error\n"
        + NOT_STARTED,
        "quiet-full-disk": CORE
        + "OSError: [Errno 28] No space left on device: '/var/cache/vllm/torch_aot'\n"
        + NOT_STARTED,
        "quiet-segmentation-fault": "!!!!!!! Segfault encountered !!!!!!!\n" + NOT_STARTED,
    },
    "tp-heads-indivisible": {
        "fires-28-over-8": HEADS,
        "quiet-too-few-gpus": WORLD,
        "quiet-other-assertion": WORKER + "AssertionError\n" + NOT_STARTED,
    },
    "tp-exceeds-visible-gpus": {
        "fires-8-of-4": WORLD,
        "quiet-heads": HEADS,
        "quiet-past": WORLD + AGAIN,
    },
    "fp8-block-misaligned": {
        "fires-29568-over-8": BLOCKS,
        "quiet-heads": HEADS,
        "quiet-past": BLOCKS + AGAIN,
    },
    "quantization-mismatch": {
        "fires-flag": "(APIServer pid=1)   Value error, Quantization method specified in the model config (awq) does not "
        "match the quantization method specified in the `quantization` argument (gptq). [type=value_error]\n",
        "quiet-blocks": BLOCKS,
        "quiet-converted": "(APIServer pid=1) INFO 11-20 08:00:00 [awq_marlin.py:1] The model is convertible to awq_marlin "
        "during runtime. Using awq_marlin kernel.\n" + UP,
    },
    "context-does-not-fit": {
        "fires-128k": CORE
        + "ValueError: To serve at least one request with the models's max seq len (131072), (40.00 GiB "
        "KV cache is needed, which is larger than the available KV cache memory (12.50 GiB). Based on the available "
        "memory, the estimated maximum model length is 40960.\n" + NOT_STARTED,
        "quiet-room-for-three": "(EngineCore pid=9) INFO 11-20 08:00:00 [kv_cache_utils.py:1] GPU KV cache size: 400,000 "
        "tokens\n(EngineCore pid=9) INFO 11-20 08:00:00 [kv_cache_utils.py:1] Maximum concurrency for 131,072 tokens per "
        "request: 3.05x\n" + UP,
        "quiet-out-of-memory": OUT_OF_MEMORY,
    },
    "launch-refused": {
        "fires-port": "(APIServer pid=1) OSError: [Errno 98] Address already in use\n",
        "quiet-second-try": "(APIServer pid=1) OSError: [Errno 98] Address already in use\n" + AGAIN,
        "quiet-software": CORE + "ImportError: cannot import name 'x' from 'vllm.vllm_flash_attn'\n" + NOT_STARTED,
    },
}
"""Case → what the engine logs after its configuration."""


def logged(log: str) -> tuple[Snapshot, ...]:
    """Return the visits of an engine that logs this; it runs on where it came up."""
    *before, last = starting(nodes.healthy("hgx-h100-4"))
    events = vllm_log.read(log.encode(), nodes.LOG, last.at).events
    gone = nodes.with_lines(last, *events) if UP in log else nodes.put(nodes.without_engine(last), engine_events=events)
    return (*before, gone)


def main(wanted: list[str]) -> None:
    for failure_mode, logs in CASES.items():
        for name, log in logs.items() if not wanted or failure_mode in wanted else ():
            keep(logged(log), "cases", failure_mode, name)


if __name__ == "__main__":
    main(sys.argv[1:])
