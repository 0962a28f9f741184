"""What fits and what can't be split: a model, a card and a tensor-parallel size."""

from __future__ import annotations

import msgspec

from doctor.machine.card import Card
from doctor.machine.weights import HALF_BYTES, Draft, Model, kv_bytes_per_token, model_of, weight_bytes_per_gpu
from doctor.snapshot import Absent, Maybe, ModelConfig, known

RUNTIME_BYTES = 5e9
"""Activations, CUDA graphs, NCCL's buffers and the context on each GPU (document 0). 8.3 GB with vLLM 0.9 and
Qwen3-235B in FP8 on 4 × H100 (vllm#21348); it grows with `--max-num-batched-tokens` and `--max-num-seqs`."""
LEAST_RUNTIME_BYTES = 1.5e9
"""Below this no engine runs on a card  # guess: a context and NCCL's buffers, no graphs, one small batch."""
UTILIZATION = 0.9
LATER_UTILIZATION = 0.92
LATER_FROM = (0, 20)
"""vLLM's `--gpu-memory-utilization` where none is given: 0.9 up to 0.19.1, 0.92 from 0.20.2 on (its CacheConfig)."""


class Room(msgspec.Struct, frozen=True, kw_only=True):
    """The memory of one GPU, bytes: what the engine may use, and what is left of it for KV cache."""

    budget_bytes: float
    """The card's memory times the utilization."""
    weight_bytes: float
    kv_bytes: float
    """Left for the KV cache beside a usual runtime; 0 where nothing is."""
    kv_bytes_at_most: float
    """The same beside the smallest runtime: what is beyond it can't be had at all."""
    kv_bytes_per_token: float

    @property
    def kv_tokens(self) -> int:
        """How many tokens of context the KV cache holds, all requests together."""
        return int(self.kv_bytes / self.kv_bytes_per_token)

    @property
    def kv_tokens_at_most(self) -> int:
        """The same beside the smallest runtime."""
        return int(self.kv_bytes_at_most / self.kv_bytes_per_token)

    @property
    def kv_bytes_beside_weights(self) -> float:
        """What the weights alone would leave: no engine has more."""
        return max(0.0, self.budget_bytes - self.weight_bytes)

    def holds(self, context: int) -> bool:
        """Whether one request of *context* tokens is expected to fit."""
        return self.kv_tokens >= max(context, 1)

    def may_hold(self, context: int) -> bool:
        """Whether one request of *context* tokens could fit at best; False is certain, True is not."""
        return self.kv_tokens_at_most >= max(context, 1)


def room(
    model: Model,
    card: Card,
    tp: int,
    *,
    utilization: float = UTILIZATION,
    kv_element_bytes: float = HALF_BYTES,
    draft: Draft = Draft.NONE,
) -> Room:
    """Return the room that a model leaves on each of *tp* cards.

    Llama 3.3 70B in FP8 on one H100: budget 0.9 × 84.7 = 76.2 GB, weights 68.5 + 2 × 2.1 = 72.7 GB, so −1.5 GB
    beside a usual runtime: no KV cache, and 6,200 tokens at best. In BF16 on four: 76.2 − 35.3 − 5 = 35.9 GB at 81,920
    bytes a token: 438,000 tokens.
    """
    budget_bytes = card.memory_bytes * utilization
    weight_bytes = weight_bytes_per_gpu(model, tp, draft)
    left = budget_bytes - weight_bytes
    return Room(
        budget_bytes=budget_bytes,
        weight_bytes=weight_bytes,
        kv_bytes=max(0.0, left - RUNTIME_BYTES),
        kv_bytes_at_most=max(0.0, left - LEAST_RUNTIME_BYTES),
        kv_bytes_per_token=kv_bytes_per_token(model, tp, kv_element_bytes, draft),
    )


class Obstacle(msgspec.Struct, frozen=True, kw_only=True):
    """A dimension that a tensor-parallel size does not divide as the engine needs it."""

    kind: str
    """`heads`, `kv-heads`, `width`, `fp8-block` or `group`."""
    what: str
    """The dimension, in words."""
    field: str
    """Where `config.json` says it."""
    size: int
    unit: int
    """What a GPU's share has to be a multiple of; 1: it has only to be whole."""

    def sentence(self, tp: int) -> str:
        """Return what is wrong, with the numbers."""
        if self.unit == 1:
            return f"{self.size} {self.what} can't be divided among {tp} GPUs"
        share = self.size / tp
        return f"{self.what} {self.size} / {tp} GPUs = {share:g}, which is not a multiple of {self.unit}"


def why_tp_impossible(model: Model, tp: int, *, expert_parallel: bool = False) -> tuple[Obstacle, ...]:
    """Return what keeps a model from being split over *tp* GPUs; empty: nothing known.

    Heads: 64 over 6 GPUs leaves 4 over. KV heads: 8 over 3 can be neither shared nor copied evenly.
    Block FP8 needs whole blocks on each GPU: Qwen 2.5 72B's 29568 = 231 × 128 is whole on one GPU, 115.5 blocks on
    two; Qwen3-235B-A22B's experts of 1536 = 12 × 128 are split up to 4 ways, 1.5 blocks at 8 (whole with expert
    parallelism, which splits by expert). The same for groups of AWQ and GPTQ along the input dimension of the last
    product. The vocabulary is padded by the engine, so it is never in the way.
    """
    if tp < 2:
        return ()
    found: list[Obstacle] = []
    if model.attention_heads % tp:
        found.append(_heads(model.attention_heads))
    elif not model.latent_dim and model.kv_heads % tp and tp % model.kv_heads:
        field = "num_key_value_heads"
        found.append(Obstacle(kind="kv-heads", what="KV heads", field=field, size=model.kv_heads, unit=1))
    block, group = model.precision.block, model.precision.group
    for width in model.widths:
        if width.routed and expert_parallel:
            continue
        share = width.size // tp
        kind, unit = "", 1
        if width.size % tp:
            kind = "width"
        elif width.quantized and block and share % max(block):
            kind, unit = "fp8-block", max(block)
        elif width.quantized and group and share % group:
            kind, unit = "group", group
        if kind:
            found.append(Obstacle(kind=kind, what=width.what, field=width.field, size=width.size, unit=unit))
    return tuple(found)


def _heads(count: int) -> Obstacle:
    return Obstacle(kind="heads", what="attention heads", field="num_attention_heads", size=count, unit=1)


def obstacles_in(
    config: ModelConfig, tp: int, *, quantization: str | None = None, expert_parallel: bool = False
) -> Maybe[tuple[Obstacle, ...]]:
    """Return what keeps the model of a `config.json` from being split over *tp* GPUs, whatever the GPUs are.

    The attention heads are told of every type of model, the rest of those that the arithmetic knows; for the others,
    absent unless the heads are in the way already.
    """
    model = model_of(config, quantization)
    if not isinstance(model, Absent):
        return why_tp_impossible(model, tp, expert_parallel=expert_parallel)
    heads = config.attention_heads
    if known(heads) and heads > 0 and heads % max(tp, 1):
        return (_heads(heads),)
    return model


def narrower_sizes(model: Model, tp: int) -> tuple[int, ...]:
    """Return the tensor-parallel sizes below *tp*, powers of two, widest first, that this model can be split to."""
    sizes = [1 << i for i in range(tp.bit_length()) if 1 << i < tp]
    return tuple(size for size in reversed(sizes) if not why_tp_impossible(model, size))
