"""Record the cases of the rules that quote an engine's refusal: `python tests/record_log_cases.py [RULE…]`.

An engine starts, its log says why it can't, and at the last visit its processes are gone.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import nodes
from launches import AWQ, BLOCK_FP8, QWEN_72B, changed, died, gone, launch, starting
from record_cases import keep

from doctor.readers import vllm_log
from doctor.snapshot import EngineEvent, Snapshot

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
TILE_OF_ONE_RANK = CORE + "RuntimeError: size_n = 2 is not divisible by tile_n_size = 64\n" + NOT_STARTED
TILE = WORKER + "RuntimeError: size_n = 2736 is not divisible by tile_n_size = 64\n" + NOT_STARTED
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
        "fires-tile-of-a-share": TILE,
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
        "quiet-tile": TILE,
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


LAUNCHES: dict[str, dict[str, Callable[[], tuple[Snapshot, ...]]]] = {
    "tp-heads-indivisible": {
        "fires-before-it-loads": lambda: launch("hgx-h100-4", 3),
        "fires-without-words": lambda: gone(launch("hgx-h100-4", 3), died()),
        "quiet-it-loads": lambda: launch("hgx-h100-4", 4),
    },
    "fp8-block-misaligned": {
        "fires-before-it-loads": lambda: launch("hgx-h100-4", 4, **QWEN_72B | BLOCK_FP8),
        "fires-without-words": lambda: gone(launch("hgx-h100-4", 4, **QWEN_72B | BLOCK_FP8), died()),
        "quiet-whole-blocks": lambda: launch("hgx-h100-4", 4, **BLOCK_FP8),
        "quiet-it-serves": lambda: changed(nodes.healthy("hgx-h100-4"), **QWEN_72B | BLOCK_FP8),
    },
    "quantization-mismatch": {
        "fires-before-it-loads": lambda: launch("hgx-h100-4", 4, flags={"quantization": "gptq"}, **AWQ),
        "fires-tile-of-one-rank": lambda: gone(launch("hgx-h100-4", 1, **AWQ), *events(TILE_OF_ONE_RANK)),
        "quiet-overriding-kernel": lambda: launch("hgx-h100-4", 4, flags={"quantization": "awq_marlin"}, **AWQ),
        "quiet-at-load-time": lambda: launch("hgx-h100-4", 4, flags={"quantization": "fp8"}),
    },
    "context-does-not-fit": {
        "fires-before-it-loads": lambda: launch("hgx-h100-4", 2, flags={"gpu_memory_utilization": 0.9}),
        "fires-without-words": lambda: gone(launch("hgx-h100-4", 2, flags={"gpu_memory_utilization": 0.9}), died()),
        "quiet-it-serves": lambda: changed(nodes.healthy("hgx-h100-4", tp=2), {"gpu_memory_utilization": 0.9}),
        "quiet-too-close-to-tell": lambda: launch(
            "hgx-h100-4", 2, flags={"gpu_memory_utilization": 0.9, "max_model_len": 16384}
        ),
    },
    "model-does-not-fit": {
        "fires-without-words": lambda: gone(launch("hgx-h100-4", 1), died()),
    },
}
"""Case → an engine that has not come up, judged by config.json, flags and GPUs."""


def logged(log: str) -> tuple[Snapshot, ...]:
    """Return the visits of an engine that logs this; it runs on where it came up."""
    visits = starting(nodes.healthy("hgx-h100-4"))
    if UP in log:
        return nodes.last(visits, lambda s: nodes.with_lines(s, *events(log)))
    return gone(visits, *events(log))


def events(log: str) -> tuple[EngineEvent, ...]:
    return vllm_log.read(log.encode(), nodes.LOG, nodes.START + 2 * nodes.EVERY).events


def main(wanted: list[str]) -> None:
    for failure_mode, logs in CASES.items():
        for name, log in logs.items() if not wanted or failure_mode in wanted else ():
            keep(logged(log), "cases", failure_mode, name)
    for failure_mode, launched in LAUNCHES.items():
        for name, visits in launched.items() if not wanted or failure_mode in wanted else ():
            keep(visits(), "cases", failure_mode, name)


if __name__ == "__main__":
    main(sys.argv[1:])
