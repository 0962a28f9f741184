"""A model's config.json gives the numbers that arithmetic needs, whoever wrote it."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.readers import model_config
from doctor.snapshot import Absent, ModelConfig, Why, known

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672,
    "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256,
    "max_position_embeddings": 131072, "torch_dtype": "bfloat16",
}  # fmt: skip


def read(**changes: Any) -> ModelConfig:
    model = model_config.read(json.dumps({**LLAMA, **changes}))
    assert model is not None
    return model


def test_a_plain_llama_is_read_and_its_head_size_worked_out() -> None:
    model = read()
    assert (model.architecture, model.model_type, model.layers) == ("LlamaForCausalLM", "llama", 80)
    assert (model.attention_heads, model.kv_heads, model.head_dim) == (64, 8, 128)
    assert (model.hidden_size, model.intermediate_size, model.vocab_size) == (8192, 28672, 128256)
    assert (model.max_position_embeddings, model.dtype) == (131072, "bfloat16")
    assert isinstance(model.quantization_method, Absent)
    assert model.quantization_method.why is Why.NOT_PRESENT


def test_the_numbers_of_a_multimodal_model_are_those_of_its_language_model() -> None:
    text = {"num_hidden_layers": 64, "num_attention_heads": 40, "hidden_size": 5120, "dtype": "bfloat16"}
    model = model_config.read(
        json.dumps({"architectures": ["X"], "model_type": "x", "hidden_size": 1, "text_config": text})
    )
    assert model is not None
    assert (model.layers, model.attention_heads, model.hidden_size, model.dtype) == (64, 40, 5120, "bfloat16")
    nested = model_config.read(json.dumps({"model_type": "omni", "thinker_config": {"text_config": text}}))
    assert nested is not None
    assert nested.layers == 64


def test_experts_and_latent_attention_are_read_under_each_name() -> None:
    deepseek = read(n_routed_experts=256, num_experts_per_tok=8, moe_intermediate_size=2048, kv_lora_rank=512)
    assert (deepseek.experts, deepseek.experts_per_token, deepseek.kv_lora_rank) == (256, 8, 512)
    assert read(num_local_experts=8).experts == 8
    assert read(num_experts=128, moe_intermediate_size=768).moe_intermediate_size == 768


@pytest.mark.parametrize(
    ("quantization", "method", "bits", "kind", "activations"),
    [
        ({"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3"}, "fp8", 8, "float", True),
        ({"quant_method": "awq", "bits": 4, "group_size": 128}, "awq", 4, "int", False),
        ({"quant_method": "gptq", "bits": 8, "desc_act": True}, "gptq", 8, "int", False),
        ({"quant_method": "mxfp4"}, "mxfp4", 4, "float", False),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {
                "weights": {"num_bits": 8, "type": "float"}, "input_activations": {"num_bits": 8, "type": "float"}}}},
            "compressed-tensors", 8, "float", True,
        ),
        (
            {"quant_method": "compressed-tensors", "config_groups": {"group_0": {
                "weights": {"num_bits": 4, "type": "int"}, "input_activations": None}}},
            "compressed-tensors", 4, "int", False,
        ),
        ({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}}, "modelopt", 8, "float", True),
        ({"quant_algo": "NVFP4", "quant_method": "modelopt"}, "modelopt", 4, "float", True),
    ],
)  # fmt: skip
def test_each_format_of_quantization_says_what_is_quantized(
    quantization: dict[str, Any], method: str, bits: int, kind: str, activations: bool
) -> None:
    model = read(quantization_config=quantization)
    assert (model.quantization_method, model.quantization_weight_bits) == (method, bits)
    assert (model.quantization_weight_type, model.quantization_activations) == (kind, activations)


def test_block_sizes_are_read_in_both_spellings() -> None:
    assert read(quantization_config={"quant_method": "fp8", "weight_block_size": [128, 128]}).weight_block_size == (
        128,
        128,
    )
    group = {"weights": {"num_bits": 8, "type": "float", "block_structure": "128x128"}}
    assert read(
        quantization_config={"quant_method": "compressed-tensors", "config_groups": {"g": group}}
    ).weight_block_size == (128, 128)
    assert not known(read(quantization_config={"quant_method": "fp8"}).weight_block_size)


def test_a_format_that_keeps_its_facts_beside_the_model_is_read_from_there() -> None:
    model = model_config.read(
        json.dumps(LLAMA), json.dumps({"producer": {"name": "modelopt"}, "quantization": {"quant_algo": "FP8"}})
    )
    assert model is not None
    assert (model.quantization_method, model.quantization_weight_bits) == ("modelopt", 8)


def test_other_json_is_no_model() -> None:
    assert not model_config.recognises(b'{"recording": 1}')
    assert not model_config.recognises(b"[1, 2]")
    assert not model_config.recognises(b"{")
    assert model_config.read("[]") is None


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
KEYS = st.sampled_from(
    [*LLAMA, "quantization_config", "text_config", "head_dim", "num_experts", "config_groups", "quant_method", "bits"]
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, JSON | st.dictionaries(KEYS, JSON, max_size=4), max_size=8), st.binary(max_size=40))
def test_no_json_and_no_bytes_raise(config: dict[str, Any], noise: bytes) -> None:
    model_config.read(json.dumps(config), noise)
    model_config.read(noise)
    model_config.recognises(noise)
