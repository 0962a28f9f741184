"""A model's `config.json` as `ModelConfig`: what arithmetic needs, whoever wrote the file."""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterator
from typing import Any, cast

import msgspec

from doctor.snapshot import Absent, Maybe, ModelConfig, Why

_NOT_THERE = Absent(Why.NOT_PRESENT, "config.json does not say")
_NOT_QUANTIZED = Absent(Why.NOT_PRESENT, "config.json has no quantization_config")
_UNSAID = Absent(Why.NOT_ASKED, "the quantization format does not say")

_INTEGERS: dict[str, tuple[str, ...]] = {
    "layers": ("num_hidden_layers", "n_layer", "num_layers", "n_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "dim"),
    "intermediate_size": ("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size", "hidden_dim"),
    "attention_heads": ("num_attention_heads", "n_head", "n_heads"),
    "kv_heads": ("num_key_value_heads", "multi_query_group_num", "num_kv_heads", "n_kv_heads"),
    "head_dim": ("head_dim", "kv_channels"),
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "max_position_embeddings": (
        "max_position_embeddings",
        "n_positions",
        "seq_length",
        "max_sequence_length",
        "model_max_length",
    ),
    "experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts"),
    "experts_per_token": ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_top_k", "moe_k"),
    "moe_intermediate_size": ("moe_intermediate_size", "expert_ffn_hidden_size"),
    "shared_expert_intermediate_size": ("shared_expert_intermediate_size",),
    "kv_lora_rank": ("kv_lora_rank",),
    "q_lora_rank": ("q_lora_rank",),
    "qk_nope_head_dim": ("qk_nope_head_dim",),
    "qk_rope_head_dim": ("qk_rope_head_dim",),
    "v_head_dim": ("v_head_dim",),
    "shared_experts": ("n_shared_experts", "num_shared_experts"),
    "dense_layers": ("first_k_dense_replace",),
    "speculative_layers": ("num_nextn_predict_layers",),
}
"""Field → its names in config.json, the usual one first (Llama, Qwen, Mixtral, DeepSeek; GPT-2, ChatGLM, Falcon, Mistral)."""

_TEXT_PARTS = ("text_config", "llm_config", "language_config", "thinker_config")
"""Where a multimodal model keeps its language model's numbers."""


def recognises(text: bytes) -> bool:
    """Whether *text* is a model's config.json."""
    config = _mapping(text)
    return config is not None and ("model_type" in config or "architectures" in config)


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each config.json within a longer text, as after `cat config.json`."""
    position = 0
    for begin in itertools.islice(_OBJECT.finditer(text), _OBJECTS_MAX):
        if begin.start() < position:
            continue
        try:
            _, end = _DECODER.raw_decode(text, begin.start())
        except (ValueError, RecursionError):
            continue
        position = end
        if recognises(text[begin.start() : end].encode("utf-8", "replace")):
            yield begin.start(), end


_OBJECT = re.compile(r"^\{(?=\s)", re.MULTILINE)
_OBJECTS_MAX = 64
_DECODER = json.JSONDecoder()


def read(text: bytes | str, quantization: bytes | str | None = None) -> ModelConfig | None:
    """Return what the file says, or None where it is no model's config.json.

    *quantization*: the text of `hf_quant_config.json` or `quantize_config.json`, where the format keeps one beside it.
    """
    config = _mapping(text)
    if config is None:
        return None
    part = config
    for _ in range(2):  # Qwen-Omni: thinker_config, and in it text_config
        inner = next((part[name] for name in _TEXT_PARTS if isinstance(part.get(name), dict)), None)
        if inner is not None:
            part = cast("dict[str, object]", inner)
    fields: dict[str, Any] = {field: _integer(part, config, names) for field, names in _INTEGERS.items()}
    heads, hidden = fields["attention_heads"], fields["hidden_size"]
    if isinstance(fields["kv_heads"], Absent) and isinstance(heads, int):
        fields["kv_heads"] = heads  # multi-head attention: transformers' own default
    if isinstance(fields["head_dim"], Absent) and isinstance(heads, int) and isinstance(hidden, int) and heads > 0:
        fields["head_dim"] = hidden // heads
    fields.update(_quantization(config, part, quantization))
    return ModelConfig(
        architecture=_architecture(config),
        model_type=_word(config, "model_type"),
        dtype=_first_word(part, config, ("torch_dtype", "dtype")),
        tied_embeddings=_flag(part, config, "tie_word_embeddings"),
        sliding_window=_sliding_window(part),
        **fields,
    )


def _mapping(text: bytes | str) -> dict[str, object] | None:
    try:
        decoded: object = msgspec.json.decode(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None
    return cast("dict[str, object]", decoded) if isinstance(decoded, dict) else None


def _architecture(config: dict[str, object]) -> Maybe[str]:
    names = config.get("architectures")
    if isinstance(names, list) and names and isinstance(names[0], str):
        return names[0]
    return _NOT_THERE


def _integer(part: dict[str, object], config: dict[str, object], names: tuple[str, ...]) -> Maybe[int]:
    for mapping in (part, config):
        for name in names:
            value = mapping.get(name)
            if isinstance(value, int) and not isinstance(value, bool):
                return value
            if isinstance(value, list) and value and all(isinstance(v, int) for v in cast("list[object]", value)):
                return max(cast("list[int]", value))  # a number for each layer: the largest binds
    return _NOT_THERE


def _sliding_window(part: dict[str, object]) -> Maybe[int]:
    """Return the window of the layers that have one; Qwen2 writes one down and turns it off."""
    window = part.get("sliding_window")
    if part.get("use_sliding_window") is False or isinstance(window, bool) or not isinstance(window, int):
        return Absent(Why.NOT_PRESENT, "every layer looks back over the whole context")
    return window


def _flag(part: dict[str, object], config: dict[str, object], name: str) -> Maybe[bool]:
    values = (mapping.get(name) for mapping in (part, config))
    return next((value for value in values if isinstance(value, bool)), _NOT_THERE)


def _word(mapping: dict[str, object], name: str) -> Maybe[str]:
    value = mapping.get(name)
    return value if isinstance(value, str) else _NOT_THERE


def _first_word(part: dict[str, object], config: dict[str, object], names: tuple[str, ...]) -> Maybe[str]:
    words = (_word(mapping, name) for mapping in (part, config) for name in names)
    return next((word for word in words if isinstance(word, str)), _NOT_THERE)


def _quantization(config: dict[str, object], part: dict[str, object], beside: bytes | str | None) -> dict[str, Any]:
    """Return the `quantization_*` fields and the block size."""
    own = next(
        (
            m[name]
            for m in (config, part)
            for name in ("quantization_config", "compression_config")
            if isinstance(m.get(name), dict)
        ),
        None,
    )
    if own is None and beside is not None:
        own = _mapping(beside)
    if own is None:
        return dict.fromkeys(
            (
                "quantization_method",
                "quantization_weight_bits",
                "quantization_weight_type",
                "quantization_activations",
                "weight_block_size",
                "quantization_group_size",
                "quantization_ignored",
            ),
            _NOT_QUANTIZED,
        )
    quantization = cast("dict[str, object]", own)
    method = _method(quantization)
    weights, activations = _groups(quantization)
    bits = weights.get("num_bits", quantization.get("bits", quantization.get("w_bit")))
    kind = weights.get("type")
    algorithm = str(
        _inner(quantization, "quantization").get("quant_algo") or quantization.get("quant_algo") or ""
    ).upper()
    if method in {"fp8", "fbgemm_fp8"} or algorithm.startswith("FP8") or quantization.get("fmt") == "e4m3":
        bits, kind = bits or 8, kind or "float"
    elif "FP4" in algorithm or method in {"mxfp4", "nvfp4"}:
        bits, kind = bits or 4, kind or "float"
    elif method in {"awq", "gptq", "gptq_marlin", "awq_marlin"}:
        kind = kind or "int"
    block = weights.get("block_structure") or quantization.get("weight_block_size")
    return {
        "quantization_method": method or _UNSAID,
        "quantization_weight_bits": bits if isinstance(bits, int) and not isinstance(bits, bool) else _UNSAID,
        "quantization_weight_type": kind if isinstance(kind, str) else _UNSAID,
        "quantization_activations": _activations(method, algorithm, quantization, activations),
        "weight_block_size": _block(block),
        "quantization_group_size": _group_size(quantization, weights),
        "quantization_ignored": _ignored(quantization),
    }


def _method(quantization: dict[str, object]) -> str:
    method = quantization.get("quant_method") or _inner(quantization, "producer").get("name")
    if not isinstance(method, str):
        return (
            "modelopt" if "quant_algo" in _inner(quantization, "quantization") or "quant_algo" in quantization else ""
        )
    return method.lower()


def _inner(mapping: dict[str, object], name: str) -> dict[str, object]:
    value = mapping.get(name)
    return cast("dict[str, object]", value) if isinstance(value, dict) else {}


def _groups(quantization: dict[str, object]) -> tuple[dict[str, object], dict[str, object] | None]:
    """Return the weights' and the activations' scheme of the first group of a compressed-tensors configuration."""
    for group in _inner(quantization, "config_groups").values():
        if isinstance(group, dict):
            mapping = cast("dict[str, object]", group)
            return _inner(mapping, "weights"), _inner(mapping, "input_activations") or None
    return {}, None


def _activations(
    method: str, algorithm: str, quantization: dict[str, object], activations: dict[str, object] | None
) -> Maybe[bool]:
    if method == "compressed-tensors" or "config_groups" in quantization:
        return activations is not None
    if method in {
        "awq",
        "gptq",
        "bitsandbytes",
        "mxfp4",
        "awq_marlin",
        "gptq_marlin",
        "hqq",
        "gguf",
    } or algorithm.startswith("W4A16"):
        return False
    if method in {"fp8", "fbgemm_fp8"} or algorithm.startswith(("FP8", "NVFP4", "W4A8")):
        return True
    return _UNSAID


def _block(block: object) -> Maybe[tuple[int, ...]]:
    if isinstance(block, str):  # llm-compressor writes `128x128`
        sides: list[object] = [
            int(side) if side.isascii() and side.isdigit() and len(side) < 9 else None for side in block.split("x")
        ]
    else:
        sides = cast("list[object]", block) if isinstance(block, list) else []
    if sides and all(isinstance(side, int) for side in sides):
        return tuple(cast("list[int]", sides))
    return Absent(Why.NOT_PRESENT, "the weights are not quantized by blocks")


def _group_size(quantization: dict[str, object], weights: dict[str, object]) -> Maybe[int]:
    values = (weights.get("group_size"), quantization.get("group_size"), quantization.get("q_group_size"))
    size = next((value for value in values if isinstance(value, int) and not isinstance(value, bool)), 0)
    return size if size > 0 else Absent(Why.NOT_PRESENT, "the weights are not quantized by groups")


def _ignored(quantization: dict[str, object]) -> Maybe[tuple[str, ...]]:
    inner = _inner(quantization, "quantization")
    for name in ("ignore", "modules_to_not_convert", "ignored_layers", "exclude_modules"):
        for mapping in (quantization, inner):
            modules = mapping.get(name)
            if isinstance(modules, list):
                return tuple(module for module in cast("list[object]", modules) if isinstance(module, str))
    return Absent(Why.NOT_PRESENT, "the quantization names no module that it leaves out")
