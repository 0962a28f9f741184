"""The time of a decode step and of a prompt, at a TP and batch: what an engine that runs as it should needs."""

from __future__ import annotations

import msgspec

from doctor.machine.card import Card
from doctor.machine.fabric import Fabric, all_reduce_seconds
from doctor.machine.weights import HALF_BYTES, Model, kv_bytes_per_token, read_bytes_per_gpu

MEMORY_EFFICIENCY = 0.83
"""Of the data sheet's memory bandwidth: 1700 of 2039 GB/s on an A100 (gpt-fast's README, measured)."""
COMPUTE_EFFICIENCY = 0.6
"""Of dense peak over a whole forward pass. Single matrix products reach 0.79 in BF16 (783 of 989 TFLOPS, milabench#277)
and 0.55–0.74 in FP8 (1117–1470 of 1979, DeepGEMM#73); attention and norms between them cost the rest  # guess."""
LAYER_SECONDS = 50e-6
"""Small kernels and gaps of a dense layer in a CUDA graph, beside its matrix products and all-reduces: gpt-fast's
Llama-2-7B on one A100 takes 9.5 ms for 13.2 GB, so (9.5 − 7.8)/32 layers = 55 µs."""
MIXTURE_LAYER_SECONDS = 100e-6  # guess: routing, sorting and grouped products about double it
STEP_SECONDS = 1e-3  # guess: scheduling, sampling and detokenizing a step; less where scheduling is asynchronous
ALL_REDUCES_PER_LAYER = 2
"""After the attention's output projection and after the feed-forward (document 3)."""


class Step(msgspec.Struct, frozen=True, kw_only=True):
    """One step of an engine, seconds, by what takes the time."""

    tokens: int
    memory_seconds: float
    """Reading weights and KV cache."""
    compute_seconds: float
    all_reduce_seconds: float
    overhead_seconds: float

    @property
    def seconds(self) -> float:
        """The whole step: memory and compute overlap, all-reduces and overhead do not."""
        return max(self.memory_seconds, self.compute_seconds) + self.all_reduce_seconds + self.overhead_seconds

    @property
    def communication_ratio(self) -> float:
        """The share of the step that all-reduces take, 0 to 1."""
        return self.all_reduce_seconds / self.seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens a second over all requests of the batch."""
        return self.tokens / self.seconds


def decode_step(
    model: Model,
    card: Card,
    fabric: Fabric,
    tp: int,
    *,
    batch: int = 1,
    context: int = 0,
    kv_element_bytes: float = HALF_BYTES,
) -> Step:
    """Return a step that gives each of *batch* requests, *context* tokens long, its next token.

    Its `seconds` are the inter-token latency. Every weight is read once, and each request's KV cache; two
    all-reduces of batch × hidden × 2 bytes a layer.
    Llama 3.3 70B in BF16 on 4 × H100, batch 32, context 1024: weights (141.1 − 2.1) / 4 = 34.8 GB and KV
    32 × 1024 × 81,920 = 2.7 GB at 3350 × 0.83 GB/s: 13.5 ms; all-reduce 160 × 8.1 µs = 1.3 ms; overhead
    80 × 50 µs + 1 ms = 5.0 ms; 19.8 ms, 1617 tokens a second, 6.6 % of it communication.
    """
    read_bytes = read_bytes_per_gpu(model, tp, batch) + batch * context * kv_bytes_per_token(
        model, tp, kv_element_bytes
    )
    return Step(
        tokens=batch,
        memory_seconds=read_bytes / (card.memory_bytes_per_second * MEMORY_EFFICIENCY),
        compute_seconds=_compute_seconds(model, card, tp, 2 * model.active_parameters * batch),
        all_reduce_seconds=_all_reduces_seconds(model, fabric, tp, batch),
        overhead_seconds=_overhead_seconds(model),
    )


def prefill_step(model: Model, card: Card, fabric: Fabric, tp: int, tokens: int) -> Step:
    """Return a step that reads a prompt of *tokens* tokens; its `seconds` are the time to first token, unqueued.

    Two operations a parameter and token, and causal attention: 2 × layers × heads × head size × tokens² for scores
    and values together. Llama 3.3 70B in BF16 on 8 × H100, 2048 tokens: (2 × 69.5 G × 2048 + 5.5 T) / 8 at
    989 × 0.6 TFLOPS = 61.1 ms; all-reduce 160 × (7.5 µs + 1.75 × 33.6 MB / 369 GB/s) = 26.7 ms; overhead 5 ms;
    93 ms, 29 % of it communication. The engine may cut a long prompt into chunks; the sum stays.
    """
    scores = model.attention_heads * (model.head_dim + model.value_dim) * tokens**2
    return Step(
        tokens=tokens,
        memory_seconds=read_bytes_per_gpu(model, tp, tokens) / (card.memory_bytes_per_second * MEMORY_EFFICIENCY),
        compute_seconds=_compute_seconds(model, card, tp, 2 * model.active_parameters * tokens + model.layers * scores),
        all_reduce_seconds=_all_reduces_seconds(model, fabric, tp, tokens),
        overhead_seconds=_overhead_seconds(model),
    )


def loaded_token_seconds(decode: Step, prompt: Step, generated_tokens: float) -> float:
    """Return the mean inter-token latency under load, which holds the prompts that enter between decode steps.

    Each of the batch's requests brings its prompt once in *generated_tokens* steps, and all others wait for it.
    Document 3's 32 requests of 1024 tokens in and 256 out, Llama 3.3 70B in BF16 on 4 × H100: 19.9 ms + 32 × 77.4 ms
    / 256 = 29.6 ms; the document measured about 30 ms. Prompts found in the prefix cache cost less.
    """
    return decode.seconds + decode.tokens * prompt.seconds / max(generated_tokens, 1.0)


def _compute_seconds(model: Model, card: Card, tp: int, operations: float) -> float:
    flops = card.fp8_flops if model.precision.computes_fp8 and card.fp8_flops else card.bf16_flops
    return operations / tp / (flops * COMPUTE_EFFICIENCY)


def _all_reduces_seconds(model: Model, fabric: Fabric, tp: int, tokens: int) -> float:
    size_bytes = tokens * model.hidden_size * HALF_BYTES
    return ALL_REDUCES_PER_LAYER * model.layers * all_reduce_seconds(fabric, tp, size_bytes)


def _overhead_seconds(model: Model) -> float:
    return model.layers * (MIXTURE_LAYER_SECONDS if model.experts else LAYER_SECONDS) + STEP_SECONDS
