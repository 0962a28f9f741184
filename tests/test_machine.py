"""The small model of the machine: its answers are checked by hand, against measurements and against the documents.

The configurations are the published `config.json` values of each model, read from the public model pages. Totals of
parameters are those of the model cards and their safetensors headers.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.machine import fabric as links
from doctor.machine.card import CARDS, CUDA_MEMORY_RATIO, Card, card_of
from doctor.machine.fabric import Fabric, Link, all_reduce_seconds, fabric_between, mesh_of, pcie_of, switch_of
from doctor.machine.fit import narrower_sizes, obstacles_in, room, why_tp_impossible
from doctor.machine.serving import Serving, serving_of
from doctor.machine.step import STEP_SECONDS, decode_step, loaded_token_seconds, prefill_step
from doctor.machine.weights import (
    Draft,
    Model,
    draft_of,
    kv_bytes_per_token,
    kv_element_bytes,
    model_of,
    read_bytes_per_gpu,
    weight_bytes_per_gpu,
)
from doctor.readers import model_config
from doctor.snapshot import (
    Absent,
    Engine,
    EngineFlags,
    EngineStack,
    Gpu,
    GpuMemory,
    GpuPair,
    Mig,
    ModelConfig,
    Snapshot,
    Why,
    known,
)
from rules.tables.products import PRODUCTS

BF16 = Absent(Why.NOT_PRESENT)
H100, H200 = CARDS["10de:2330"], CARDS["10de:2335"]
A100, L40S, RTX_4090 = CARDS["10de:20b2"], CARDS["10de:26b9"], CARDS["10de:2684"]


def dense(kind: str, layers: int, hidden: int, width: int, vocab: int, heads: int, kv_heads: int) -> ModelConfig:
    return ModelConfig(
        model_type=kind,
        layers=layers,
        hidden_size=hidden,
        intermediate_size=width,
        vocab_size=vocab,
        attention_heads=heads,
        kv_heads=kv_heads,
        quantization_method=BF16,
    )


LLAMA_70B = dense("llama", 80, 8192, 28672, 128256, 64, 8)
LLAMA_405B = dense("llama", 126, 16384, 53248, 128256, 128, 8)
LLAMA_8B = dense("llama", 32, 4096, 14336, 128256, 32, 8)
LLAMA_2_7B = dense("llama", 32, 4096, 11008, 32000, 32, 32)
LLAMA_2_70B = dense("llama", 80, 8192, 28672, 32000, 64, 8)
QWEN_72B = dense("qwen2", 80, 8192, 29568, 152064, 64, 8)
MIXTRAL_8X22B = msgspec.structs.replace(dense("mixtral", 56, 6144, 16384, 32768, 48, 8), experts=8, experts_per_token=2)
QWEN3_235B = msgspec.structs.replace(
    dense("qwen3_moe", 94, 4096, 12288, 151936, 64, 4),
    head_dim=128,
    experts=128,
    experts_per_token=8,
    moe_intermediate_size=1536,
)
QWEN3_30B = msgspec.structs.replace(
    dense("qwen3_moe", 48, 2048, 6144, 151936, 32, 4),
    head_dim=128,
    experts=128,
    experts_per_token=8,
    moe_intermediate_size=768,
)
DEEPSEEK_V3 = msgspec.structs.replace(
    dense("deepseek_v3", 61, 7168, 18432, 129280, 128, 128),
    experts=256,
    experts_per_token=8,
    moe_intermediate_size=2048,
    shared_experts=1,
    dense_layers=3,
    kv_lora_rank=512,
    q_lora_rank=1536,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
    speculative_layers=1,
    quantization_method="fp8",
    weight_block_size=(128, 128),
)  # DeepSeek-R1 has the same


def of(config: ModelConfig, quantization: str | None = None, **changes: object) -> Model:
    model = model_of(msgspec.structs.replace(config, **changes), quantization)
    assert known(model), model
    return model


def block_fp8(config: ModelConfig) -> Model:
    return of(config, quantization_method="fp8", weight_block_size=(128, 128))


def int4(config: ModelConfig, **changes: object) -> Model:
    return of(config, quantization_method="awq", quantization_weight_bits=4, quantization_group_size=128, **changes)


# Parameters -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "published"),
    [
        # attention 80 × (2 × 8192² + 2 × 8192 × 1024), feed-forward 80 × 3 × 8192 × 28672, two embeddings of
        # 128256 × 8192, two norms of 8192 a layer: 12.08 + 56.37 + 2.10 G
        (LLAMA_70B, 70_553_706_496),
        # 12.08 + 80 × 3 × 8192 × 29568 = 58.13 + 2 × 152064 × 8192 = 2.49 G
        (QWEN_72B, 72_706_203_648),
        # 126 × (2 × 16384² + 2 × 16384 × 1024 + 3 × 16384 × 53248) + 4.20 G
        (LLAMA_405B, 405_853_388_800),
        # 56 × (2 × 6144² + 2 × 6144 × 1024 + 8 × 3 × 6144 × 16384) + 0.40 G
        (MIXTRAL_8X22B, 140_630_071_296),
        # 94 × (2 × 4096 × 8192 + 2 × 4096 × 512 + 128 × 3 × 4096 × 1536) + 1.24 G
        (QWEN3_235B, 235_093_634_560),
        # attention 61 × 187.1 M, dense 3 × 396.4 M, experts 58 × 257 × 44.04 M, embeddings 1.85 G
        (DEEPSEEK_V3, 671.0e9),
    ],
    ids=["llama-70b", "qwen-72b", "llama-405b", "mixtral-8x22b", "qwen3-235b", "deepseek-v3"],
)
def test_parameters_are_the_published_ones(config: ModelConfig, published: float) -> None:
    assert of(config).parameters == pytest.approx(published, rel=0.0005)


@pytest.mark.parametrize(
    ("config", "published"),
    [(MIXTRAL_8X22B, 39e9), (QWEN3_235B, 22e9), (DEEPSEEK_V3, 36.6e9)],
    ids=["mixtral-8x22b", "qwen3-235b-a22b", "deepseek-v3"],
)
def test_active_parameters_are_the_published_ones(config: ModelConfig, published: float) -> None:
    assert of(config).active_parameters == pytest.approx(published, rel=0.03)  # the cards round to two digits


def test_the_speculative_layer_of_deepseek_is_counted_apart() -> None:
    model = of(DEEPSEEK_V3)
    assert sum(part.parameters for part in model.speculative_parts) == pytest.approx(11.5e9, rel=0.015)
    # one layer of FP8 experts: 11.3 G / 8 and its copied rest
    extra = weight_bytes_per_gpu(model, 8, Draft.MTP) - weight_bytes_per_gpu(model, 8)
    assert extra == pytest.approx(1.6e9, rel=0.1)


@pytest.mark.parametrize(
    ("config", "published"), [(LLAMA_70B, 0.99e9), (LLAMA_8B, 0.25e9), (QWEN_72B, 1.05e9)], ids=["70b", "8b", "qwen"]
)
def test_an_eagle_head_is_a_layer_and_a_joint(config: ModelConfig, published: float) -> None:
    """EAGLE's README gives 0.99, 0.25 and 1.05 G. Llama 70B: 2 × 8192² + 2 × 8192 × 1024 + 3 × 8192 × 28672 = 855.6 M for the
    layer, 2 × 8192² = 134.2 M to join; 989.9 M. In BF16 beside a quantized model too.
    """
    assert sum(part.parameters for part in of(config).eagle_parts) == pytest.approx(published, rel=0.04)
    quantized = of(config, "fp8")
    extra = weight_bytes_per_gpu(quantized, 1, Draft.EAGLE) - weight_bytes_per_gpu(quantized, 1)
    assert extra == pytest.approx(2 * published, rel=0.04)


def test_a_draft_layer_has_a_cache_of_its_own() -> None:
    """DeepSeek-V3 with MTP in FP8: 62 × 576 bytes; Llama 70B with EAGLE at TP 4: 2 × 81 × 2 × 128 × 2 bytes."""
    assert kv_bytes_per_token(of(DEEPSEEK_V3), 8, 1.0, Draft.MTP) == 62 * 576 == 35_712
    assert kv_bytes_per_token(of(LLAMA_70B), 4, 2, Draft.EAGLE) == 2 * 81 * 2 * 128 * 2 == 82_944


def test_a_draft_is_known_by_its_name() -> None:
    names = {"deepseek_mtp": Draft.MTP, "eagle3": Draft.EAGLE, "yuhuili/EAGLE-x": Draft.EAGLE, "ngram": Draft.NONE}
    assert {name: draft_of(name) for name in names} == names
    assert draft_of(None) is Draft.NONE


def test_tied_embeddings_are_held_and_read_once() -> None:
    tied, untied = of(LLAMA_8B, tied_embeddings=True), of(LLAMA_8B)
    size = 128256 * 4096
    assert untied.parameters - tied.parameters == size
    assert read_bytes_per_gpu(tied, 1, 1) == read_bytes_per_gpu(untied, 1, 1)


# Bytes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tp", "document_gb"),
    [(2, 70), (4, 35), (8, 18)],
)
@pytest.mark.parametrize("config", [LLAMA_70B, QWEN_72B], ids=["llama-70b", "qwen-72b"])
def test_the_documents_shares_of_weights_are_right(config: ModelConfig, tp: int, document_gb: float) -> None:
    """Document 3's table says "~70, ~35, ~18 GB" for both models; Qwen's 72.7 G make it 4 % more."""
    assert weight_bytes_per_gpu(of(config), tp) == pytest.approx(document_gb * 1e9, rel=0.05)


@pytest.mark.parametrize(
    ("model", "gigabytes"),
    [
        (of(LLAMA_70B), 141.1),
        (of(LLAMA_70B, "fp8"), 72.7),  # 68.45 quantized + 2 × 2.10 embeddings
        (int4(LLAMA_70B), 39.8),  # 68.45 × (0.5 + 2.5/128) + 4.2: the AWQ checkpoints on the hub have 39.8 GB
        (of(LLAMA_405B), 811.7),
        (int4(LLAMA_405B), 217.1),
        (of(MIXTRAL_8X22B), 281.3),
        (block_fp8(QWEN3_235B), 236.4),
        (of(DEEPSEEK_V3), 673.2),
    ],
)
def test_total_weights_by_hand(model: Model, gigabytes: float) -> None:
    assert weight_bytes_per_gpu(model, 1) == pytest.approx(gigabytes * 1e9, rel=0.002)


def test_a_kv_head_is_copied_and_never_split() -> None:
    """Qwen3-235B-A22B's four KV heads on eight GPUs: 2 × 4096 × 128 × 2 bytes × 94 layers on each, as on four."""
    (keys,) = (part for part in of(QWEN3_235B).parts if part.name == "keys-and-values")
    assert keys.bytes_per_gpu(4) == keys.bytes_per_gpu(8) == 2 * 4096 * 128 * 2 * 94


def test_modules_that_stay_unquantized_count_whole() -> None:
    """Meta's own FP8 of Llama 3.1 405B leaves attention and both ends alone; vLLM loaded 57.752 GiB on each of 8 GPUs
    (vllm#6746): (126 × 570.4 M × 2 + (124 + 2 × 2) × 2617.2 M + 2 × 2.10 G × 2) / 8 = 60.9 GB.
    """
    ends = tuple(f"model.layers.{i}.mlp.{name}_proj" for i in (0, 125) for name in ("gate", "up", "down"))
    model = of(
        LLAMA_405B, quantization_method="fbgemm_fp8", quantization_ignored=(*ends, r"re:.*self_attn\..*", "lm_head")
    )
    assert weight_bytes_per_gpu(model, 8) == pytest.approx(57.752 * 2**30, rel=0.02)


def test_an_ignored_name_means_a_whole_module() -> None:
    all_quantized = of(LLAMA_70B, quantization_method="fp8")
    first = of(LLAMA_70B, quantization_method="fp8", quantization_ignored=("model.layers.1",))
    layer = 2 * 8192**2 + 2 * 8192 * 1024 + 3 * 8192 * 28672
    plain = sum(part.bytes for part in first.parts) - sum(part.bytes for part in all_quantized.parts)
    assert plain == layer  # layer 1, and not layers 10 to 19
    globbed = of(LLAMA_70B, quantization_method="fp8", quantization_ignored=("model.layers.*.mlp*", "re:(", "re:["))
    assert sum(p.bytes for p in globbed.parts if p.name == "feed-forward") == 80 * 3 * 8192 * 28672 * 2


@pytest.mark.parametrize(
    ("config", "tp", "bytes_per_token"),
    [
        (LLAMA_70B, 1, 327_680),  # 2 × 80 × 8 × 128 × 2
        (LLAMA_70B, 4, 81_920),  # a quarter: document 3's "25 %"
        (LLAMA_70B, 8, 40_960),
        (LLAMA_70B, 16, 40_960),  # one head is the least
        (QWEN3_235B, 4, 48_128),  # 2 × 94 × 1 × 128 × 2
        (QWEN3_235B, 8, 48_128),
        (DEEPSEEK_V3, 1, 70_272),  # 61 × 576 × 2, the same latent on every GPU
        (DEEPSEEK_V3, 8, 70_272),
    ],
)
def test_kv_bytes_of_a_token_by_hand(config: ModelConfig, tp: int, bytes_per_token: int) -> None:
    assert kv_bytes_per_token(of(config), tp) == bytes_per_token


def test_kv_bytes_are_those_that_vllm_allocates() -> None:
    """Qwen3-235B-A22B-FP8 on 4 × H100: 8.11 GiB for 178,880 tokens (vllm#21348)."""
    assert kv_bytes_per_token(block_fp8(QWEN3_235B), 4) == pytest.approx(8.11 * 2**30 / 178_880, rel=0.015)


def test_an_fp8_kv_cache_takes_half() -> None:
    one = kv_element_bytes("fp8_e4m3")
    assert one == 1.0
    assert kv_element_bytes("auto") == kv_element_bytes(None) == 2
    assert not known(kv_element_bytes("turbo"))
    assert kv_bytes_per_token(of(LLAMA_70B), 4, 1.0) == 40_960


def test_a_small_batch_reads_only_the_experts_it_chose() -> None:
    model = of(MIXTRAL_8X22B)
    expert = 56 * 3 * 6144 * 16384 * 2
    rest = sum(part.bytes for part in model.parts if part.read and not part.routed)
    assert read_bytes_per_gpu(model, 1, 1) == pytest.approx(rest + 2 * expert)
    assert read_bytes_per_gpu(model, 1, 64) == pytest.approx(rest + 8 * expert, rel=1e-6)


# What can't be told -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mamba2"}, "model type mamba2"),
        ({"model_type": Absent(Why.NOT_GIVEN)}, "unknown type"),
        ({"layers": Absent(Why.NOT_PRESENT)}, "does not tell layers"),
        ({"quantization_method": Absent(Why.NOT_ASKED)}, "was not seen"),
        ({"quantization_method": "bitsandbytes"}, "bitsandbytes"),
        ({"weights_bytes": 282_000_000_000}, "the weight files hold 282 GB, the arithmetic finds 141 GB"),
        ({"layers": 10**9}, "1000000000 layers"),
    ],
)
def test_what_the_arithmetic_does_not_know_is_absent_with_a_reason(changes: dict[str, object], words: str) -> None:
    model = model_of(msgspec.structs.replace(LLAMA_70B, **changes))
    assert isinstance(model, Absent)
    assert words in str(model)


def test_weight_files_that_agree_are_believed() -> None:
    assert known(model_of(msgspec.structs.replace(LLAMA_70B, weights_bytes=141_107_497_872)))
    # DeepSeek-V3's files hold the speculative layer and its copies of both embeddings too: 688.6 GB
    assert known(model_of(msgspec.structs.replace(DEEPSEEK_V3, weights_bytes=688_586_727_753)))


def test_weight_files_of_a_model_quantized_at_load_time_say_nothing_about_its_size() -> None:
    files = msgspec.structs.replace(LLAMA_70B, weights_bytes=141_107_497_872)
    assert of(files, "fp8").precision.name == "fp8"
    block = msgspec.structs.replace(DEEPSEEK_V3, weights_bytes=1_300_000_000_000)
    assert not known(model_of(block, "fp8"))  # the flag repeats what the checkpoint is


def test_a_config_as_published_becomes_a_model() -> None:
    text = {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "num_hidden_layers": 94,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_attention_heads": 64,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "vocab_size": 151936,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "moe_intermediate_size": 1536,
        "tie_word_embeddings": False,
        "quantization_config": {
            "quant_method": "fp8",
            "weight_block_size": [128, 128],
            "modules_to_not_convert": ["lm_head", "model.layers.0.mlp.gate"],
        },
    }
    config = model_config.read(json.dumps(text))
    assert config is not None
    assert of(config) == msgspec.structs.replace(block_fp8(QWEN3_235B), precision=of(config).precision)


# Fabric -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ranks", "kib", "custom", "measured_us"),
    [
        (2, 128, True, 4.5),  # H100, sglang#2904 (sizes there are FP32 elements)
        (4, 128, True, 4.8),
        (8, 128, True, 7.8),
        (2, 1024, True, 7.9),
        (2, 512, True, 7),  # H100, vllm#24111: one-stage kernel
        (4, 512, True, 10),  # vllm#24532, GPU not stated: one-stage kernel
        (8, 512, True, 11),  # compute capability 9.0, vllm#42324: multimem
        (8, 1024, True, 14),
        (8, 4096, True, 27),
        (8, 16384, True, 87),
        (8, 32768, True, 165),
        (8, 131072, True, 561),  # NCCL through the switch's own reduction
        (4, 512, False, 21),  # vllm#24532: NCCL
        (8, 512, False, 24),  # vllm#42324: NCCL
        (8, 32, False, 18.7),  # Mooncake#3484: NCCL
        (8, 4096, False, 50),
        (8, 32768, False, 195),
    ],
)
def test_all_reduces_on_a_switch_take_what_was_measured(ranks: int, kib: int, custom: bool, measured_us: float) -> None:
    predicted_us = all_reduce_seconds(switch_of(H100, custom=custom), ranks, kib * 1024) * 1e6
    assert predicted_us == pytest.approx(measured_us, rel=0.4)


@pytest.mark.parametrize(
    ("kib", "measured_us"), [(4, 19.4), (8, 20.3), (16, 22.3), (32, 24.2), (128, 51.8), (384, 83.5)]
)
def test_all_reduces_over_pcie_take_what_was_measured(kib: int, measured_us: float) -> None:
    """Four V100 behind one PCIe 3 switch, in a CUDA graph (haohervchb/sglang-V100#2)."""
    third_generation = Fabric(link=Link.PCIE, bytes_per_second=15.75e9, custom=False)
    assert all_reduce_seconds(third_generation, 4, kib * 1024) * 1e6 == pytest.approx(measured_us, rel=0.15)


def pairs(gpus: str, nvlinks: int | Absent, **others: int) -> tuple[GpuPair, ...]:
    return tuple(
        GpuPair(first=a, second=b, nvlinks=others.get(a + b, nvlinks))
        for i, a in enumerate(gpus)
        for b in gpus[i + 1 :]
    )


def test_the_fabric_is_what_the_pairs_say() -> None:
    switched = fabric_between(H100, pairs("abcdefgh", 18), "abcd")
    assert switched == switch_of(H100)
    mesh = fabric_between(H100, pairs("abcd", 6), "abcd")
    assert mesh == Fabric(link=Link.MESH, bytes_per_second=450e9)
    half = fabric_between(H100, pairs("abcd", 6), "ab")
    assert half == Fabric(link=Link.MESH, bytes_per_second=150e9)  # the links to c and d carry nothing
    bridged = CARDS["10de:2321"]
    assert fabric_between(bridged, pairs("abcd", 0, ab=12, cd=12), "ab") == switch_of(bridged)
    assert fabric_between(bridged, pairs("abcd", 0, ab=12, cd=12), "abcd") == pcie_of(bridged, 4)
    degraded = fabric_between(H100, pairs("abcd", 16), "abcd")
    assert degraded == Fabric(link=Link.SWITCH, bytes_per_second=400e9)
    assert fabric_between(L40S, pairs("abcd", 0), "abcd") == pcie_of(L40S, 4)
    assert not pcie_of(L40S, 4).custom


def test_pairs_that_were_not_seen_make_no_fabric() -> None:
    assert not known(fabric_between(H100, pairs("abcd", Absent(Why.NOT_GIVEN)), "abcd"))
    assert not known(fabric_between(H100, pairs("ab", 18), "abcd"))
    assert not known(fabric_between(H100, (), "ab"))


def test_own_kernels_serve_some_group_sizes_only() -> None:
    assert links.latency_seconds(switch_of(H100), 3) > links.latency_seconds(switch_of(H100), 4)


# Steps ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("config", "tp", "measured_tokens_per_second"),
    [
        (LLAMA_2_7B, 1, 104.9),
        (LLAMA_2_7B, 2, 168.84),
        (LLAMA_2_7B, 4, 254.02),
        (LLAMA_2_7B, 8, 328.43),
        (LLAMA_2_70B, 2, 21.32),
        (LLAMA_2_70B, 4, 38.01),
        (LLAMA_2_70B, 8, 62.50),
    ],
)
def test_a_single_stream_is_as_fast_as_measured(
    config: ModelConfig, tp: int, measured_tokens_per_second: float
) -> None:
    """gpt-fast's README: 8 × A100-80GB, BF16, batch 1, short prompt. It has no scheduler, so no step overhead."""
    step = decode_step(of(config), A100, mesh_of(A100, 4, tp), tp)
    assert 1 / (step.seconds - STEP_SECONDS) == pytest.approx(measured_tokens_per_second, rel=0.06)


@pytest.mark.parametrize(
    ("card", "tp", "milliseconds"),
    [
        # weights read (141.1 − 2.1)/n GB at 0.83 of 3350 or 4800 GB/s, 160 all-reduces of 16 KiB, 80 × 50 µs + 1 ms
        (H100, 2, 25.0 + 160 * 0.00455 + 5),
        (H100, 4, 12.5 + 160 * 0.00607 + 5),
        (H100, 8, 6.25 + 160 * 0.00758 + 5),
        (H200, 1, 34.9 + 5),
        (H200, 2, 17.4 + 160 * 0.00455 + 5),
        (H200, 4, 8.72 + 160 * 0.00607 + 5),
        (H200, 8, 4.36 + 160 * 0.00758 + 5),
    ],
)
def test_inter_token_latency_of_llama_70b_by_hand(card: Card, tp: int, milliseconds: float) -> None:
    step = decode_step(of(LLAMA_70B), card, switch_of(card), tp)
    assert step.seconds * 1e3 == pytest.approx(milliseconds, rel=0.005)


@pytest.mark.parametrize(("tp", "document"), [(2, 0.10), (4, 0.15), (8, 0.25)])
@pytest.mark.parametrize("config", [LLAMA_70B, QWEN_72B], ids=["llama-70b", "qwen-72b"])
def test_the_documents_communication_shares_are_those_of_nccl(config: ModelConfig, tp: int, document: float) -> None:
    """Document 3 gives 10, 15 and 25 % of a step; that is NCCL's all-reduce. The engine's kernels need half of it."""
    nccl = decode_step(of(config), H100, switch_of(H100, custom=False), tp, batch=32, context=1152)
    own = decode_step(of(config), H100, switch_of(H100), tp, batch=32, context=1152)
    assert nccl.communication_ratio == pytest.approx(document, abs=0.03)
    assert own.communication_ratio < 0.55 * document


@pytest.mark.parametrize(
    ("model", "card", "tp", "milliseconds"),
    [
        # Qwen 2.5 72B: 72.706 − 1.246 (embedding) = 71.46 G × 2 bytes / n, at 0.83 of 3350 or 4800 GB/s; 80 layers
        (of(QWEN_72B), H100, 2, 71.46 / 2.7805 + 160 * 0.00455 + 5),
        (of(QWEN_72B), H100, 4, 35.73 / 2.7805 + 160 * 0.00607 + 5),
        (of(QWEN_72B), H100, 8, 17.87 / 2.7805 + 160 * 0.00758 + 5),
        (of(QWEN_72B), H200, 2, 71.46 / 3.984 + 160 * 0.00455 + 5),
        (of(QWEN_72B), H200, 4, 35.73 / 3.984 + 160 * 0.00607 + 5),
        (of(QWEN_72B), H200, 8, 17.87 / 3.984 + 160 * 0.00758 + 5),
        # Mixtral 8x22B: 39.0 G active × 2 bytes / n; 56 layers of 100 µs
        (of(MIXTRAL_8X22B), H100, 4, 19.48 / 2.7805 + 112 * 0.00605 + 6.6),
        (of(MIXTRAL_8X22B), H100, 8, 9.75 / 2.7805 + 112 * 0.00756 + 6.6),
        # Qwen3-235B-A22B in block FP8: 21.57 G active, 0.62 G of them the head in two bytes; the router whole
        (block_fp8(QWEN3_235B), H100, 4, 5.637 / 2.7805 + 188 * 0.00603 + 10.4),
        (block_fp8(QWEN3_235B), H200, 4, 5.637 / 3.984 + 188 * 0.00603 + 10.4),
        # Llama 3.1 405B in FP8: (401.65 G + 2 × 2.10 G) / 8; 126 layers of 50 µs
        (of(LLAMA_405B, "fp8"), H100, 8, 50.74 / 2.7805 + 252 * 0.00766 + 7.3),
        (of(LLAMA_405B, "fp8"), H200, 8, 50.74 / 3.984 + 252 * 0.00766 + 7.3),
        # DeepSeek-V3 and R1: 36.6 G active / 8, and the copied projections to the latent: 61 × 15.1 M
        (of(DEEPSEEK_V3), H100, 8, 5.705 / 2.7805 + 122 * 0.00757 + 7.1),
        (of(DEEPSEEK_V3), H200, 8, 5.705 / 3.984 + 122 * 0.00757 + 7.1),
    ],
)
def test_inter_token_latency_of_the_others_by_hand(model: Model, card: Card, tp: int, milliseconds: float) -> None:
    """Memory + two all-reduces a layer + overhead a layer and 1 ms a step."""
    assert decode_step(model, card, switch_of(card), tp).seconds * 1e3 == pytest.approx(milliseconds, rel=0.005)


@pytest.mark.parametrize(
    ("model", "tp", "milliseconds"),
    [
        # 2 × 69.5 G × 2048 + 80 × 64 × 256 × 2048² = 290.2 T at 593.6 TFLOPS, over n; all-reduces of 32 MiB; 5 ms
        (of(LLAMA_70B), 1, 488.8 + 5),
        (of(LLAMA_70B), 2, 244.4 + 160 * (0.0045 + 1.0 * 33.55 / 369) + 5),
        (of(LLAMA_70B), 4, 122.2 + 160 * (0.006 + 1.5 * 33.55 / 369) + 5),
        (of(LLAMA_70B), 8, 61.1 + 160 * (0.0075 + 1.75 * 33.55 / 369) + 5),
        # 2 × 71.46 G × 2048 + 5.5 T = 298.2 T
        (of(QWEN_72B), 4, 125.6 + 160 * (0.006 + 1.5 * 33.55 / 369) + 5),
        (of(QWEN_72B), 8, 62.8 + 160 * (0.0075 + 1.75 * 33.55 / 369) + 5),
        # 2 × 403.7 G × 2048 + 126 × 128 × 256 × 2048² = 1671 T at 1187 TFLOPS in FP8; 64 MiB
        (of(LLAMA_405B, "fp8"), 8, 175.9 + 252 * (0.0075 + 1.75 * 67.11 / 369) + 7.3),
    ],
)
def test_a_prompt_of_2048_tokens_by_hand(model: Model, tp: int, milliseconds: float) -> None:
    """Compute is the same on H100 and H200, and so is NVLink: a prompt takes as long on both."""
    for card in (H100, H200):
        assert prefill_step(model, card, switch_of(card), tp, 2048).seconds * 1e3 == pytest.approx(
            milliseconds, rel=0.005
        )


def test_a_prompt_of_a_large_mixture_reads_more_than_it_computes() -> None:
    """DeepSeek-V3 on 8 × H100: 2048 tokens choose every expert, 84.9 GB at 2.78 TB/s = 30.5 ms; 16.9 ms of arithmetic."""
    step = prefill_step(of(DEEPSEEK_V3), H100, switch_of(H100), 8, 2048)
    assert step.memory_seconds == pytest.approx(0.0305, rel=0.01)
    assert step.compute_seconds == pytest.approx(0.0169, rel=0.01)


@pytest.mark.parametrize(
    ("fabric", "ranks", "microseconds"),
    [
        # 512 KiB = 524,288 bytes, 2 (n − 1)/n times over the wire
        (switch_of(H100), 4, 6.0 + 1.5 * 524_288 / 369e3),  # 450 × 0.82 GB/s
        (mesh_of(H100, 6, 4), 4, 6.0 + 1.5 * 524_288 / 369e3),  # 3 × 6 links: the same
        (mesh_of(H100, 6, 2), 2, 4.5 + 1.0 * 524_288 / 123e3),  # six links of 25 GB/s only
        (mesh_of(CARDS["10de:2321"], 12, 2), 2, 4.5 + 1.0 * 524_288 / 246e3),  # a bridged pair of H100 NVL
        (pcie_of(CARDS["10de:2321"], 4), 4, 20.0 + 1.5 * 524_288 / 31.5e3),  # two such pairs: PCIe between them
        (pcie_of(L40S, 2), 2, 12.0 + 1.0 * 524_288 / 15.75e3),
    ],
    ids=["switch", "mesh", "two of a mesh", "bridged pair", "two pairs", "PCIe 4"],
)
def test_an_all_reduce_on_each_fabric_by_hand(fabric: Fabric, ranks: int, microseconds: float) -> None:
    assert all_reduce_seconds(fabric, ranks, 512 * 1024) * 1e6 == pytest.approx(microseconds, rel=0.001)


def test_there_are_two_all_reduces_a_layer() -> None:
    """A step of 32 tokens, 8192 wide in BF16: 160 of 512 KiB, 84 MB: what document 3 calls 80 MB "per token"."""
    step = decode_step(of(LLAMA_70B), H100, switch_of(H100), 4, batch=32)
    assert step.all_reduce_seconds == pytest.approx(160 * all_reduce_seconds(switch_of(H100), 4, 512 * 1024))


def test_a_prompt_spends_a_quarter_in_all_reduces_at_tp_8() -> None:
    """Document 3: "Prefill TP=8 spends ~25% of step time in NCCL all-reduces" (2048 tokens, 32 MB each)."""
    step = prefill_step(of(LLAMA_70B), H100, switch_of(H100), 8, 2048)
    assert step.seconds == pytest.approx(0.093, rel=0.02)  # 61.1 + 26.7 + 5 ms
    assert step.communication_ratio == pytest.approx(0.25, abs=0.05)


def test_two_cards_scale_as_document_2_says() -> None:
    """Document 2: 1.84 × on two H100 SXM, 1.4 to 1.5 × on two cards over PCIe 4, for a 70B model."""

    def gain(card: Card, two: Fabric) -> float:
        model = of(LLAMA_70B)
        return prefill_step(model, card, two, 1, 2048).seconds / prefill_step(model, card, two, 2, 2048).seconds

    assert gain(H100, switch_of(H100)) == pytest.approx(1.84, abs=0.05)
    assert gain(RTX_4090, pcie_of(RTX_4090, 2)) == pytest.approx(1.5, abs=0.2)


def test_the_documents_latency_under_load_is_decode_and_the_prompts_between() -> None:
    """Document 3: vLLM on 4 × H100, 32 requests of 1024 tokens in and 256 out: about 30 ms a token, 310 tok/s a GPU."""
    model = of(LLAMA_70B)
    decode = decode_step(model, H100, switch_of(H100), 4, batch=32, context=1152)
    seconds = loaded_token_seconds(decode, prefill_step(model, H100, switch_of(H100), 4, 1024), generated_tokens=256)
    assert seconds == pytest.approx(0.030, rel=0.1)
    assert 32 / seconds / 4 == pytest.approx(310, rel=0.15)


def test_four_gpus_are_faster_than_two_for_one_stream_of_a_dense_70b() -> None:
    """Documents 0 and 1 say the contrary; gpt-fast measured 21.3 against 38.0 tokens a second."""
    model = of(LLAMA_70B)
    two, four = (decode_step(model, H100, switch_of(H100), tp).seconds for tp in (2, 4))
    assert four < 0.7 * two


def test_four_gpus_are_slower_than_two_where_little_is_read_and_the_all_reduce_is_slow() -> None:
    """What the documents' stall is: 3 G active parameters over PCIe, where latency is all there is."""
    model = block_fp8(QWEN3_30B)
    two, four = (decode_step(model, H100, pcie_of(H100, tp), tp).seconds for tp in (2, 4))
    assert four > two


def test_fp8_computes_faster_only_where_there_are_units_for_it() -> None:
    model, half = of(LLAMA_70B, "fp8"), of(LLAMA_70B)
    assert prefill_step(model, H100, switch_of(H100), 4, 2048).compute_seconds == pytest.approx(
        prefill_step(half, H100, switch_of(H100), 4, 2048).compute_seconds / 2, rel=0.001
    )
    assert prefill_step(model, A100, switch_of(A100), 4, 2048).compute_seconds == (
        prefill_step(half, A100, switch_of(A100), 4, 2048).compute_seconds
    )


# Fit --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "card", "tp", "fits"),
    [
        # 70B: 2 × 80 GB in BF16 leaves next to nothing (76.2 − 70.6 − 5), 4 × 80 GB is comfortable
        (of(LLAMA_70B), H100, 1, False),
        (of(LLAMA_70B), H100, 2, False),
        (of(LLAMA_70B), H100, 4, True),
        (of(LLAMA_70B), H100, 8, True),
        (of(LLAMA_70B), H200, 1, False),
        (of(LLAMA_70B), H200, 2, True),
        (of(LLAMA_70B), H200, 4, True),
        (of(LLAMA_70B), H200, 8, True),
        (of(QWEN_72B), H100, 2, False),
        (of(QWEN_72B), H100, 4, True),
        (of(QWEN_72B), H200, 1, False),
        (of(QWEN_72B), H200, 2, True),
        (of(LLAMA_70B, "fp8"), H100, 1, False),  # document 4: "fits but leaves no room for KV cache"
        (of(LLAMA_70B, "fp8"), H200, 1, True),  # document 3 says "INT4 only on H200"
        (int4(LLAMA_70B), H100, 1, True),  # documents 2 and 4
        (int4(MIXTRAL_8X22B), H100, 1, False),  # document 2: two cards
        (int4(MIXTRAL_8X22B), H100, 2, True),
        (int4(LLAMA_405B), H100, 4, True),  # document 2: four cards
        (of(LLAMA_405B), H100, 8, False),  # document 2 says "at FP16, 8 × H100": 811.7 GB of weights, 678 GB of cards
        (of(LLAMA_405B), H200, 8, True),
        (of(DEEPSEEK_V3), H100, 8, False),  # FP8: 85 GB a GPU
        (of(DEEPSEEK_V3), H200, 8, True),
        (block_fp8(QWEN3_235B), H100, 4, True),
        (int4(LLAMA_70B), RTX_4090, 2, False),  # document 2 says "2 (48 GB)": 19.9 of 22.9 GB before any runtime
    ],
)
def test_what_fits_with_8192_tokens_of_context(model: Model, card: Card, tp: int, fits: bool) -> None:
    assert room(model, card, tp).holds(8192) is fits


def test_one_fp8_70b_on_80_gb_leaves_6000_tokens_at_best() -> None:
    """0.9 × 84.7 − 72.7 − 1.5 = 2.0 GB at 327,680 bytes a token."""
    tight = room(of(LLAMA_70B, "fp8"), H100, 1)
    assert tight.kv_tokens == 0
    assert tight.kv_tokens_at_most == pytest.approx(6200, rel=0.02)
    assert tight.may_hold(4096)
    assert not tight.may_hold(8192)


def test_room_is_what_vllm_found_within_its_own_runtime() -> None:
    """Qwen3-235B-A22B-FP8 on 4 × H100: 8.11 GiB for the cache (vllm#21348), a runtime of 8.3 GB, not of 5."""
    found = 8.11 * 2**30
    four = room(block_fp8(QWEN3_235B), H100, 4)
    assert found < four.kv_bytes < four.kv_bytes_at_most
    assert four.kv_bytes - found < 4e9


@pytest.mark.parametrize(
    ("model", "tp", "expert_parallel", "kinds"),
    [
        (of(LLAMA_70B), 8, False, []),
        (of(LLAMA_70B), 1, False, []),
        (of(LLAMA_70B), 6, False, ["heads", "width"]),  # 64 heads over 6; 28672 over 6
        (of(QWEN3_235B), 8, False, []),  # 4 KV heads are copied to 8 GPUs
        (of(MIXTRAL_8X22B), 3, False, ["kv-heads", "width"]),  # 48 heads divide, 8 KV heads don't
        (block_fp8(QWEN_72B), 1, False, []),
        (block_fp8(QWEN_72B), 2, False, ["fp8-block"]),  # document 3: 29568 = 231 × 128
        (block_fp8(QWEN_72B), 4, False, ["fp8-block"]),
        (block_fp8(QWEN_72B), 8, False, ["fp8-block"]),
        (of(QWEN_72B, "fp8"), 8, False, []),  # one scale for a tensor: no blocks
        (int4(QWEN_72B), 4, False, ["group"]),
        (int4(QWEN_72B, intermediate_size=29696), 4, False, []),  # as Qwen padded it for its own AWQ and GPTQ
        (block_fp8(QWEN3_235B), 4, False, []),
        (block_fp8(QWEN3_235B), 8, False, ["fp8-block"]),  # experts of 1536 / 8 = 192 = 1.5 blocks
        (block_fp8(QWEN3_235B), 8, True, []),
        (of(DEEPSEEK_V3), 8, False, []),
    ],
)
def test_what_a_model_can_be_split_over(model: Model, tp: int, expert_parallel: bool, kinds: list[str]) -> None:
    obstacles = why_tp_impossible(model, tp, expert_parallel=expert_parallel)
    assert [obstacle.kind for obstacle in obstacles] == kinds


def test_an_obstacle_says_its_numbers() -> None:
    (block,) = why_tp_impossible(block_fp8(QWEN_72B), 8)
    assert block.sentence(8) == "width of the feed-forward 29568 / 8 GPUs = 3696, which is not a multiple of 128"
    heads = why_tp_impossible(of(LLAMA_70B), 6)[0]
    assert heads.sentence(6) == "64 attention heads can't be divided among 6 GPUs"


def test_narrower_sizes_are_those_that_load() -> None:
    assert narrower_sizes(of(LLAMA_70B), 8) == (4, 2, 1)
    assert narrower_sizes(block_fp8(QWEN_72B), 8) == (1,)
    assert narrower_sizes(of(LLAMA_70B), 1) == ()


# An engine of a snapshot ------------------------------------------------------------------------------------------


def node(device_id: str = "10de:2330", count: int = 4, **changes: object) -> Snapshot:
    gpus = tuple(Gpu(uuid=uuid, index=i, pci_device_id=device_id) for i, uuid in enumerate("abcdefgh"[:count]))
    return Snapshot(at=0.0, gpus=gpus, pairs=pairs("abcdefgh"[:count], 18), **changes)


def engine(config: ModelConfig = LLAMA_70B, version: str = "0.19.1", **flags: object) -> Engine:
    return Engine(
        pid=1, started_at=0.0, kind="vllm", flags=EngineFlags(**flags), stack=EngineStack(engine=version), model=config
    )


def served(snapshot: Snapshot, of: Engine, gpus: str, **how: bool) -> Serving:
    serving = serving_of(snapshot, of, gpus, **how)
    assert known(serving), serving
    return serving


def test_an_engine_is_asked_at_its_own_width_and_at_others() -> None:
    serving = served(node(), engine(), "abcd")
    model = of(LLAMA_70B)
    assert serving.decode(batch=2, context=9) == decode_step(model, H100, switch_of(H100), 4, batch=2, context=9)
    assert serving.decode(tp=2) == decode_step(model, H100, switch_of(H100), 2)
    assert serving.prefill(100) == prefill_step(model, H100, switch_of(H100), 4, 100)
    assert serving.room() == room(model, H100, 4)
    assert serving.obstacles(6)[0].kind == "heads"
    assert not known(serving.decode(tp=8))


def test_the_flags_of_an_engine_count() -> None:
    flags = {"kv_cache_dtype": "fp8", "quantization": "fp8", "max_model_len": 4096, "disable_custom_all_reduce": True}
    serving = served(node(), engine(**flags), "ab")
    assert serving.context == 4096
    assert serving.fabric() == switch_of(H100, custom=False)
    assert serving.room() == room(of(LLAMA_70B, "fp8"), H100, 2, kv_element_bytes=1.0)
    assert served(node(), engine(version="0.32.0"), "ab").room() == room(of(LLAMA_70B), H100, 2, utilization=0.92)
    assert served(node(), engine(gpu_memory_utilization=0.8), "ab").room() == room(
        of(LLAMA_70B), H100, 2, utilization=0.8
    )
    assert served(node(), engine(), "ab", custom=False).fabric() == switch_of(H100, custom=False)
    assert served(node(), engine(DEEPSEEK_V3, speculative='{"method": "mtp"}'), "ab").room().weight_bytes == (
        weight_bytes_per_gpu(of(DEEPSEEK_V3), 2, Draft.MTP)
    )


@pytest.mark.parametrize(
    ("snapshot", "of", "gpus", "words"),
    [
        (node(), engine(), "", "which GPUs the engine's 1 ranks"),
        (node(), engine(tensor_parallel_size=8), "abcd", "which GPUs the engine's 8 ranks"),
        (node(), engine(), "ax", "GPU x was not seen"),
        (node("10de:1eb8"), engine(), "ab", "10de:1eb8"),
        (node(), engine(pipeline_parallel_size=2), "ab", "pipeline"),
        (node(), engine(kv_cache_dtype="turbo"), "ab", "turbo"),
        (node(), engine(ModelConfig()), "ab", "unknown type"),
    ],
)
def test_an_engine_that_can_not_be_reckoned_says_why(snapshot: Snapshot, of: Engine, gpus: str, words: str) -> None:
    answer = serving_of(snapshot, of, gpus)
    assert isinstance(answer, Absent)
    assert words in str(answer)


def test_a_replica_is_one_of_the_data_parallel_ones() -> None:
    snapshot = node(count=8)
    assert served(snapshot, engine(tensor_parallel_size=4, data_parallel_size=2), "abcdefgh").gpus == tuple("abcd")
    assert served(snapshot, engine(data_parallel_size=4), "abcdefgh").gpus == tuple("ab")
    assert served(snapshot, engine(data_parallel_size=8), "abcdefgh").gpus == ("a",)
    spread = engine(QWEN3_235B, data_parallel_size=2, expert_parallel=True)
    assert "data-parallel" in str(serving_of(snapshot, spread, "abcdefgh"))


def test_fewer_ranks_take_the_gpus_that_are_best_linked() -> None:
    bridged = CARDS["10de:2321"]
    snapshot = msgspec.structs.replace(node("10de:2321"), pairs=pairs("abcd", 0, ac=12, bd=12))
    serving = served(snapshot, engine(), "abcd")
    assert serving.fabric() == pcie_of(bridged, 4)
    assert serving.fabric(2) == switch_of(bridged)


def test_unlike_or_partitioned_gpus_are_not_reckoned() -> None:
    gpus = (Gpu(uuid="a", index=0, pci_device_id="10de:2330"), Gpu(uuid="b", index=1, pci_device_id="10de:2335"))
    mixed = serving_of(Snapshot(at=0.0, gpus=gpus), engine(), "ab")
    assert "different products" in str(mixed)
    cut = (msgspec.structs.replace(gpus[0], mig=Mig(enabled=True)),)
    assert "MIG" in str(serving_of(Snapshot(at=0.0, gpus=cut), engine(), "a"))


# The page ----------------------------------------------------------------------------------------------------------

PAGE = Path(__file__).parent.parent / "docs" / "arithmetic.md"
BEGINS, ENDS = "GOLDEN=write makes it anew -->\n", "<!-- end -->"
SHOWN = (
    ("Llama 3.3 70B, BF16", of(LLAMA_70B), (1, 2, 4, 8)),
    ("Llama 3.3 70B, FP8", of(LLAMA_70B, "fp8"), (1, 2, 4, 8)),
    ("Llama 3.3 70B, INT4", int4(LLAMA_70B), (1, 2)),
    ("Qwen 2.5 72B, BF16", of(QWEN_72B), (1, 2, 4, 8)),
    ("Mixtral 8x22B, BF16", of(MIXTRAL_8X22B), (4, 8)),
    ("Qwen3-235B-A22B, FP8", block_fp8(QWEN3_235B), (4,)),
    ("Llama 3.1 405B, FP8", of(LLAMA_405B, "fp8"), (8,)),
    ("DeepSeek-V3 and R1, FP8", of(DEEPSEEK_V3), (8,)),
)


def rows() -> str:
    heads = ("model", "GPUs", "weights a GPU", "KV room", "1 request", "32 requests", "all-reduce", "prompt")
    lines = ["| " + " | ".join(heads) + " |", "|---" * len(heads) + "|"]
    for name, model, widths in SHOWN:
        for card in (H100, H200):
            for tp in widths:
                cells = [name, f"{tp} × {card.name.split()[0]}", f"{weight_bytes_per_gpu(model, tp) / 1e9:.1f} GB"]
                tokens = room(model, card, tp).kv_tokens
                lines.append(
                    "| "
                    + " | ".join(cells + (timed(model, card, tp, tokens) if tokens else ["none"] + ["–"] * 4))
                    + " |"
                )
    return "\n".join(lines) + "\n"


def timed(model: Model, card: Card, tp: int, tokens: int) -> list[str]:
    own, nccl = switch_of(card), switch_of(card, custom=False)
    many = decode_step(model, card, own, tp, batch=32, context=1152)
    share = decode_step(model, card, nccl, tp, batch=32, context=1152).communication_ratio
    return [
        f"{tokens / 1000:.0f} k",
        f"{decode_step(model, card, own, tp).seconds * 1e3:.1f} ms",
        f"{many.seconds * 1e3:.1f} ms, {many.tokens_per_second:.0f} tok/s",
        f"{many.communication_ratio:.0%} / {share:.0%}",
        f"{prefill_step(model, card, own, tp, 2048).seconds * 1e3:.0f} ms",
    ]


def test_the_page_shows_what_the_arithmetic_says() -> None:
    before, begins, rest = PAGE.read_text(encoding="utf-8").partition(BEGINS)
    shown, ends, after = rest.partition(ENDS)
    if os.environ.get("GOLDEN") == "write":
        PAGE.write_text(before + begins + rows() + ends + after, encoding="utf-8")
        shown = rows()
    assert shown == rows(), "docs/arithmetic.md differs; look at it, then GOLDEN=write"


# Cards ------------------------------------------------------------------------------------------------------------


def test_a_card_is_its_device_id_and_its_memory_is_what_nvml_saw() -> None:
    by_table = card_of(Gpu(uuid="GPU-1", index=0, pci_device_id="10de:2330"))
    assert by_table == H100
    larger = card_of(Gpu(uuid="GPU-1", index=0, pci_device_id="10de:2329", memory=GpuMemory(total_bytes=150 * 2**30)))
    assert known(larger)
    assert larger.memory_bytes == pytest.approx(148.5 * 2**30)
    assert not known(card_of(Gpu(uuid="GPU-1", index=0, pci_device_id="10de:1eb8")))
    assert not known(card_of(Gpu(uuid="GPU-1", index=0)))


def test_a_card_never_holds_more_than_cuda_hands_out() -> None:
    assert CARDS["10de:20b2"].memory_bytes == pytest.approx(79.14 * 2**30, rel=0.002)  # PyTorch's own words


def test_cards_and_products_say_the_same() -> None:
    """Two rooms, one truth: this floor can't read the rules' table of products, so the two are compared here."""
    products = {product.device_id: product for product in PRODUCTS}
    assert set(CARDS) <= set(products)
    for device_id, card in CARDS.items():
        product = products[device_id]
        assert card.nvlinks == product.nvlinks, product.name
        assert (card.fp8_flops is not None) == product.native_fp8, product.name
        assert product.memory_mib is None or card.memory_bytes == product.memory_mib * 2**20 * CUDA_MEMORY_RATIO
        wire = card.nvlinks * (product.nvlink_bytes_per_second or 0.0)  # NVML counts the coding, the data sheet doesn't
        assert card.nvlink_bytes_per_second == pytest.approx(wire, rel=0.07), product.name


# What holds for any model -----------------------------------------------------------------------------------------

counts = st.integers(min_value=1, max_value=64)
configs = st.builds(
    lambda kind, layers, heads, kv, width, experts, chosen, quantized: ModelConfig(
        model_type=kind,
        layers=layers,
        hidden_size=heads * kv * 64,
        intermediate_size=width * 128,
        moe_intermediate_size=width * 64,
        vocab_size=width * 1000,
        attention_heads=heads * kv,
        kv_heads=kv,
        experts=experts,
        experts_per_token=min(chosen, experts),
        dense_layers=1,
        shared_experts=1,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        quantization_method=quantized,
        weight_block_size=(128, 128),
        quantization_group_size=128,
    ),
    st.sampled_from(["llama", "mixtral", "deepseek_v3"]),
    counts, st.sampled_from([1, 2, 8]), st.sampled_from([1, 4, 8]), counts, counts, counts,
    st.sampled_from([BF16, "fp8", "awq"]),
)  # fmt: skip
cards = st.sampled_from(sorted(CARDS.values(), key=lambda card: card.name))
sizes = st.sampled_from([1, 2, 4, 8])


@settings(max_examples=100, deadline=None)
@given(configs, cards, sizes, st.integers(1, 64), st.integers(0, 10_000))
def test_more_gpus_hold_less_each_and_more_work_takes_longer(
    config: ModelConfig, card: Card, tp: int, batch: int, context: int
) -> None:
    model = of(config)
    assert weight_bytes_per_gpu(model, 2 * tp) < weight_bytes_per_gpu(model, tp)
    assert read_bytes_per_gpu(model, tp, batch) <= weight_bytes_per_gpu(model, tp)
    assert kv_bytes_per_token(model, 2 * tp) <= kv_bytes_per_token(model, tp)
    assert model.active_parameters <= model.parameters
    left = room(model, card, tp)
    assert 0 <= left.kv_bytes <= left.kv_bytes_at_most
    assert left.kv_tokens >= 0
    fabric = switch_of(card) if card.nvlinks else pcie_of(card, tp)
    step = decode_step(model, card, fabric, tp, batch=batch, context=context)
    more = decode_step(model, card, fabric, tp, batch=batch + 1, context=context)
    longer = decode_step(model, card, fabric, tp, batch=batch, context=context + 1000)
    assert step.seconds <= more.seconds
    assert (step.all_reduce_seconds < more.all_reduce_seconds) == (tp > 1)
    assert step.seconds <= longer.seconds
    assert 0 <= step.communication_ratio < 1
    assert (step.all_reduce_seconds == 0) == (tp == 1)
    assert prefill_step(model, card, fabric, tp, 100).seconds <= prefill_step(model, card, fabric, tp, 200).seconds


@settings(max_examples=100, deadline=None)
@given(configs, cards, sizes, st.sampled_from([1.0, 2.0]), st.sampled_from(Draft))
def test_memory_only_ever_helps(config: ModelConfig, card: Card, tp: int, element_bytes: float, draft: Draft) -> None:
    model = of(config)

    def tokens(on: Card = card, ranks: int = tp, width: float = element_bytes, drafts: Draft = draft) -> int:
        return room(model, on, ranks, kv_element_bytes=width, draft=drafts).kv_tokens

    larger = msgspec.structs.replace(card, memory_bytes=2 * card.memory_bytes)
    assert weight_bytes_per_gpu(model, 2 * tp, draft) <= weight_bytes_per_gpu(model, tp, draft)
    assert tokens() <= tokens(on=larger)
    assert tokens() <= tokens(ranks=2 * tp)
    assert tokens(width=2.0) <= tokens(width=1.0)
    assert tokens() <= tokens(drafts=Draft.NONE)
    left = room(model, card, tp, kv_element_bytes=element_bytes, draft=draft)
    assert left.kv_bytes_at_most <= left.kv_bytes_beside_weights
    assert not left.holds(4096) or left.may_hold(4096)


@settings(max_examples=100, deadline=None)
@given(configs, st.integers(1, 16), st.integers(2, 4))
def test_an_obstacle_does_not_go_away_by_splitting_further(config: ModelConfig, tp: int, more: int) -> None:
    """What n does not divide, no multiple of n does. KV heads are the exception: beyond one a GPU they are copied."""
    lasting = {"heads", "width", "fp8-block", "group"}
    found = [o for o in why_tp_impossible(of(config), tp) if o.kind in lasting]
    further = {o.what for o in why_tp_impossible(of(config), more * tp)}
    assert {o.what for o in found} <= further
    assert all(str(o.size) in o.sentence(tp) and o.field for o in found)
    assert why_tp_impossible(of(config), 1) == ()


names = st.sampled_from(
    [
        *("model_type", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_dim"),
        *("intermediate_size", "vocab_size", "num_experts", "num_experts_per_tok", "sliding_window", "kv_lora_rank"),
        *("quantization_config", "quant_method", "weight_block_size", "group_size", "bits", "text_config"),
    ]
)
values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["llama", "mixtral", "fp8", "awq", ""]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(names, inner, max_size=4),
    max_leaves=8,
)


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(names, values, max_size=10), st.integers(1, 16))
def test_any_json_gives_obstacles_or_a_reason(text: dict[str, object], tp: int) -> None:
    read = model_config.read(json.dumps(text))
    assert read is not None
    found = obstacles_in(read, tp)
    assert found.detail if isinstance(found, Absent) else all(o.sentence(tp) for o in found)


@settings(max_examples=100, deadline=None)
@given(
    st.builds(
        ModelConfig,
        model_type=st.sampled_from(["llama", "mixtral", "deepseek_v3", "qwen2_moe", "x"]),
        **{
            name: st.one_of(st.just(BF16), st.integers(-(2**63), 2**63), st.integers(-2, 200))
            for name in (
                "layers", "hidden_size", "intermediate_size", "attention_heads", "kv_heads", "head_dim", "vocab_size",
                "experts", "experts_per_token", "moe_intermediate_size", "shared_expert_intermediate_size",
                "kv_lora_rank", "q_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim",
                "shared_experts", "dense_layers", "speculative_layers", "quantization_weight_bits",
                "quantization_group_size", "weights_bytes",
            )
        },
        quantization_method=st.sampled_from([BF16, "fp8", "awq", "gptq", "compressed-tensors", "modelopt", ""]),
        weight_block_size=st.one_of(st.just(BF16), st.lists(st.integers(-1, 200), max_size=3).map(tuple)),
        quantization_ignored=st.one_of(st.just(BF16), st.lists(st.text(max_size=8), max_size=3).map(tuple)),
    ),
    st.integers(1, 16),
)  # fmt: skip
def test_any_numbers_give_a_model_or_a_reason(config: ModelConfig, tp: int) -> None:
    model = model_of(config)
    if isinstance(model, Absent):
        assert model.detail
        return
    assert weight_bytes_per_gpu(model, tp, Draft.MTP) > 0
    assert room(model, H100, tp).kv_bytes >= 0
    assert decode_step(model, H100, switch_of(H100), tp).seconds > 0
    why_tp_impossible(model, tp)
