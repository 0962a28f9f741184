"""What a simulated engine serves and with what: the models' figures, and the versions in its environment."""

from __future__ import annotations

from typing import Any

import msgspec

from doctor.simulation.physics import Drill

GIB = 1 << 30


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A served model: its `config.json`, and the size of its weights."""

    config: dict[str, Any]
    weights_bytes: int

    @property
    def quantization(self) -> str:
        """Its format by vLLM's name, or `None`."""
        method = self.config.get("quantization_config", {}).get("quant_method")
        return method or "None"

    @property
    def fp8(self) -> bool:
        """Whether its weights are FP8."""
        return "quantization_config" in self.config

    @property
    def kv_bytes_per_token(self) -> int:
        """Over all ranks, in bfloat16."""
        config = self.config
        head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
        return 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * head_dim * 2


def _llama(layers: int, hidden: int, intermediate: int, heads: int, **more: Any) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "torch_dtype": "bfloat16",
    } | more


FP8_DYNAMIC = {
    "quant_method": "compressed-tensors",
    "format": "float-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "float", "strategy": "channel", "dynamic": False},
            "input_activations": {"num_bits": 8, "type": "float", "strategy": "token", "dynamic": True},
        }
    },
    "ignore": ["lm_head"],
}

LLAMA_70B_FP8 = "RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic"

MODELS: dict[str, Model] = {
    "meta-llama/Llama-3.1-405B-Instruct-FP8": Model(
        config=_llama(126, 16384, 53248, 128, quantization_config={"quant_method": "fbgemm_fp8"}),
        weights_bytes=410 * 10**9,  # guess: one byte a parameter, embeddings in bfloat16
    ),
    "meta-llama/Llama-3.3-70B-Instruct": Model(config=_llama(80, 8192, 28672, 64), weights_bytes=141_107_000_000),
    LLAMA_70B_FP8: Model(
        config=_llama(80, 8192, 28672, 64, quantization_config=FP8_DYNAMIC), weights_bytes=72_700_000_000
    ),
    "mistralai/Mistral-Large-Instruct-2411": Model(
        config=_llama(88, 12288, 28672, 96, vocab_size=32768)
        | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "head_dim": 128},
        weights_bytes=245_200_000_000,
    ),
    "Qwen/Qwen2.5-32B-Instruct": Model(
        config=_llama(64, 5120, 27648, 40, vocab_size=152064, max_position_embeddings=32768)
        | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2"},
        weights_bytes=65_500_000_000,
    ),
}
"""By the name on the hub; the figures are those of the public `config.json` files."""

MAX_MODEL_LEN = 16384

VLLM = "0.32.0"
TORCH = "2.13.0+cu130"
CUDA = "13.0"
NCCL = "2.29.7"
PYTHON = "3.12.3"
"""One set that belongs together (reference: vLLM 0.32.0's own pins)."""

COLLECTIVE_TIMEOUT_SECONDS = 60
"""`--distributed-timeout-seconds` of the drill's engine: nobody wants to wait the usual ten minutes in a drill."""

UNIT = "vllm.service"
LOG = "/var/log/vllm/serve.log"
ENVIRONMENT = "/opt/vllm"
HUB = "/var/cache/huggingface"


def model_of(drill: Drill) -> Model:
    """Return the model that the engine serves."""
    return MODELS[drill.engine.model]


def command_line(drill: Drill, port: int) -> tuple[str, ...]:
    """Return the command line of the API server."""
    engine = drill.engine
    more: tuple[str, ...] = ("--enforce-eager",) if drill.node.product.memory_mib < 32768 else ()
    if any(fault.name == "fp8-not-engaged" for fault in drill.faults):
        more = (*more, "--linear-backend", "marlin")
    return (
        f"{ENVIRONMENT}/bin/python3", f"{ENVIRONMENT}/bin/vllm", "serve", engine.model,
        "--host", "127.0.0.1", "--port", str(port),
        "--tensor-parallel-size", str(engine.tensor_parallel_size),
        "--max-model-len", str(MAX_MODEL_LEN),
        "--gpu-memory-utilization", str(engine.memory_utilization),
        "--distributed-timeout-seconds", str(COLLECTIVE_TIMEOUT_SECONDS),
        *more,
    )  # fmt: skip


def reduces_over_pcie(drill: Drill) -> bool:
    """Whether the engine's ranks found no NVLink between them when it started: it never looks again."""
    node, engine = drill.node, drill.engine
    off = ("nvlinks-all-down", "mig-enabled")
    if any(
        fault.name in off and fault.active(engine.started_seconds) and drill.meets_engine(fault)
        for fault in drill.faults
    ):
        return True
    return not (node.wiring in {"switch", "mesh"} or (node.wiring == "pairs" and engine.tensor_parallel_size == 2))


def kv_cache_bytes(drill: Drill) -> int:
    """Return what weights and runtime leave for the KV cache, over all ranks."""
    engine = drill.engine
    usable = drill.node.product.total_bytes * engine.memory_utilization - 3 * GIB  # guess: activations and graphs
    return max(GIB, round(usable * engine.tensor_parallel_size - model_of(drill).weights_bytes))


def kv_cache_tokens(drill: Drill) -> int:
    """Return the capacity of the KV cache."""
    return kv_cache_bytes(drill) // model_of(drill).kv_bytes_per_token
