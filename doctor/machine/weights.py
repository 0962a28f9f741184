"""A model's bytes on each GPU: its parameters from `config.json`, their precision, their split, and its KV cache.

A model is a handful of parts; each knows how many parameters it has, over how many GPUs tensor parallelism can
spread it (the rest is copied), and what share of it a step reads.
"""

from __future__ import annotations

import enum
import fnmatch
import re

import msgspec

from doctor.snapshot import Absent, Maybe, ModelConfig, Why, known, or_none

HALF_BYTES = 2
"""BF16 and FP16; an FP32 checkpoint is cast when it is loaded (vLLM `--dtype auto`)."""

EVERYWHERE = 1
ANYWHERE = 1 << 16
"""`Part.ways` of a part that each GPU holds whole, and of one that any number of GPUs can share."""

MOST_LAYERS = 1000
"""More is no model; the largest published have 126."""

GATED = frozenset({"llama", "mistral", "qwen2", "qwen3", "phi3"})
MIXTURES = frozenset({"mixtral", "qwen2_moe", "qwen3_moe", "glm4_moe"})
LATENT = frozenset({"deepseek_v2", "deepseek_v3", "kimi_k2"})
"""The `model_type`s whose `config.json` tells every part: gated feed-forward, full attention in each layer."""

FILES_TOLERANCE = 0.15
"""How far the weight files may be from the arithmetic; DeepSeek-V3's are 2.3 % above it (its speculative layer)."""


class Part(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of tensor of a model, over all its layers."""

    name: str
    parameters: int
    bytes: float
    ways: int = ANYWHERE
    """Over how many GPUs it can be spread; beyond that it is copied."""
    read: bool = True
    """Whether a step reads it: the input embedding is only looked up."""
    routed: bool = False
    """Experts: a step reads only those that its tokens chose."""
    quantized: bool = False
    """Whether any layer's tensor is."""

    def bytes_per_gpu(self, tp: int) -> float:
        """Return the bytes that each of *tp* GPUs holds."""
        return self.bytes / min(tp, self.ways)


class Width(msgspec.Struct, frozen=True, kw_only=True):
    """An inner width of a feed-forward, which tensor parallelism divides."""

    what: str
    size: int
    field: str
    """Where `config.json` says it."""
    quantized: bool
    routed: bool = False
    """Of an expert: expert parallelism leaves it whole."""


class Precision(msgspec.Struct, frozen=True, kw_only=True):
    """How quantized weights are stored and computed. Unquantized: two bytes, BF16."""

    name: str
    """`bf16`, `fp8`, `fp8-block`, `int4`, …"""
    weight_bytes: float
    """A quantized weight with its share of the scales."""
    computes_fp8: bool = False
    """Whether activations are FP8 too, so that FP8 units compute; else weights are unpacked to BF16."""
    block: tuple[int, int] | None = None
    """Block of output × input dimension that shares a scale."""
    group: int | None = None
    """Weights along the input dimension that share a scale."""
    ignored: tuple[str, ...] = ()


class Model(msgspec.Struct, frozen=True, kw_only=True):
    """A model as the arithmetic sees it."""

    layers: int
    hidden_size: int
    vocab_size: int
    attention_heads: int
    kv_heads: int
    head_dim: int
    """Of a query head; with latent attention, both its parts together."""
    value_dim: int
    latent_dim: int = 0
    """Latent attention: what the KV cache holds a token and layer, on every GPU."""
    widths: tuple[Width, ...] = ()
    experts: int = 0
    experts_per_token: int = 0
    precision: Precision
    parts: tuple[Part, ...]
    speculative_layers: int = 0
    speculative_parts: tuple[Part, ...] = ()
    """Multi-token-prediction layers: in the files, loaded only where speculation is asked for."""
    eagle_parts: tuple[Part, ...] = ()
    """An EAGLE head for this model: one layer of its shape in BF16, which joins the token before; none for experts."""

    @property
    def parameters(self) -> int:
        """Return the parameters of the model itself, without its speculative layers.

        Llama 3.3 70B: attention 80 × (2 × 8192² + 2 × 8192 × 1024) = 12.08 G, feed-forward 80 × 3 × 8192 × 28672 =
        56.37 G, two embeddings 2 × 128256 × 8192 = 2.10 G, norms 161 × 8192; 70.55 G.
        """
        return sum(part.parameters for part in self.parts)

    @property
    def active_parameters(self) -> float:
        """Return the parameters that one token multiplies with: what is read, of the experts only those chosen.

        DeepSeek-V3: latent attention 11.41 G, three dense layers 1.19 G, 58 × 9 of 257 experts × 44.0 M = 22.99 G,
        head 0.93 G; 36.6 G, as its model card says.
        """
        return sum(
            part.parameters * (self.experts_per_token / self.experts if part.routed else 1.0)
            for part in self.parts
            if part.read
        )


def model_of(config: ModelConfig, quantization: str | None = None) -> Maybe[Model]:
    """Return the model of a `config.json`; absent where the config or the arithmetic does not tell.

    *quantization*: the flag, which matters for a checkpoint that is not quantized itself (FP8 at load time).
    A total that the weight files contradict is not believed: then the model has parts that nobody counted here.
    """
    kind = or_none(config.model_type) or ""
    if kind not in GATED | MIXTURES | LATENT:
        what = f"model type {kind}" if kind else "a model of unknown type"
        return Absent(Why.NOT_SUPPORTED, f"there is no arithmetic for {what}")
    needed = ("layers", "hidden_size", "vocab_size", "attention_heads", "intermediate_size")
    if kind in MIXTURES | LATENT:
        needed += ("experts", "experts_per_token")
    if kind in LATENT:
        needed += ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    for name in needed:
        value: Maybe[int] = getattr(config, name)
        if not known(value) or value < 1:
            return Absent(Why.FAILED, f"config.json does not tell {name.replace('_', ' ')}")
    layers, chosen, experts = (or_none(n) or 0 for n in (config.layers, config.experts_per_token, config.experts))
    if layers > MOST_LAYERS or chosen > experts > 0:
        return Absent(Why.FAILED, f"config.json tells {layers} layers and {chosen} of {experts} experts for a token")
    precision = precision_of(config, quantization)
    if isinstance(precision, Absent):
        return precision
    model = _Counted(config, precision).model()
    as_stored = known(config.quantization_method) or precision.name == "bf16"
    if known(config.weights_bytes) and as_stored:
        expected = sum(part.bytes for part in model.parts)
        if abs(config.weights_bytes - expected) > FILES_TOLERANCE * expected:
            told, counted = config.weights_bytes / 1e9, expected / 1e9
            return Absent(Why.FAILED, f"the weight files hold {told:.0f} GB, the arithmetic finds {counted:.0f} GB")
    return model


def precision_of(config: ModelConfig, quantization: str | None = None) -> Maybe[Precision]:
    """Return how the weights are stored; absent for a format whose size is not known here.

    FP8: 1 byte; in blocks of 128 × 128 with one FP32 scale each, 1 + 4/16384. INT4 in groups of 128 with an FP16
    scale each, AWQ and GPTQ with a 4-bit zero point too: 0.5 + (2 + 0.5)/128 = 0.52 bytes. NVFP4: a byte of scale
    for 16 weights, 0.5625.
    """
    method = config.quantization_method
    ignored = or_none(config.quantization_ignored) or ()
    if not known(method):
        if method.why is not Why.NOT_PRESENT:
            return Absent(method.why, "whether the checkpoint is quantized was not seen")
        if quantization in {None, "auto"}:
            return Precision(name="bf16", weight_bytes=HALF_BYTES)
        if quantization == "fp8":
            return Precision(name="fp8", weight_bytes=1.0, computes_fp8=True)
        return Absent(Why.NOT_SUPPORTED, f"there is no arithmetic for quantization {quantization} at load time")
    bits = or_none(config.quantization_weight_bits)
    group = or_none(config.quantization_group_size) or 0
    sides = or_none(config.weight_block_size) or ()
    block = (sides[0], sides[1]) if len(sides) == 2 and min(sides) > 0 else None
    activations = or_none(config.quantization_activations) is not False
    floats = or_none(config.quantization_weight_type) != "int"
    if method in {"fp8", "fbgemm_fp8"} or (method in {"compressed-tensors", "modelopt"} and bits == 8 and floats):
        return Precision(
            name="fp8-block" if block else "fp8",
            weight_bytes=1.0 + (4 / (block[0] * block[1]) if block else 0.0),
            computes_fp8=activations,
            block=block,
            ignored=ignored,
        )
    if method in {"awq", "awq_marlin", "gptq", "gptq_marlin"}:
        bits = bits or 4  # what AWQ checkpoints that don't say are
        share = (HALF_BYTES + bits / 8) / group if group > 0 else 0.0
        name = f"int{bits}"
        return Precision(name=name, weight_bytes=bits / 8 + share, group=max(group, 0) or None, ignored=ignored)
    if method == "compressed-tensors" and bits is not None and not floats:
        share = HALF_BYTES / group if group > 0 else 0.0
        name = f"int{bits}"
        return Precision(name=name, weight_bytes=bits / 8 + share, group=max(group, 0) or None, ignored=ignored)
    if method in {"modelopt_fp4", "nvfp4"} or (method in {"compressed-tensors", "modelopt"} and bits == 4):
        return Precision(name="nvfp4", weight_bytes=0.5 + 1 / 16, group=16, ignored=ignored)
    return Absent(Why.NOT_SUPPORTED, f"there is no arithmetic for quantization method {method}")


class _Counted:
    """The parts of a model, counted layer by layer, so that modules left unquantized count as such."""

    def __init__(self, config: ModelConfig, precision: Precision) -> None:
        self.precision = precision
        self.layers = _count(config.layers)
        self.hidden = _count(config.hidden_size)
        self.vocab = _count(config.vocab_size)
        self.tied = or_none(config.tied_embeddings) is True
        self.heads = _count(config.attention_heads)
        self.kv_heads = _count(config.kv_heads) or self.heads
        self.latent = _count(config.kv_lora_rank) if or_none(config.model_type) in LATENT else 0
        self.query_rank = _count(config.q_lora_rank)
        self.rope = _count(config.qk_rope_head_dim) if self.latent else 0
        self.head_dim = _count(config.head_dim) or self.hidden // self.heads
        self.value_dim = self.head_dim
        if self.latent:
            self.head_dim = _count(config.qk_nope_head_dim) + self.rope
            self.value_dim = _count(config.v_head_dim)
        self.intermediate = _count(config.intermediate_size)
        self.experts = _count(config.experts) if or_none(config.model_type) not in GATED else 0
        self.experts_per_token = _count(config.experts_per_token) if self.experts else 0
        self.expert_size = _count(config.moe_intermediate_size) or self.intermediate  # Mixtral gives only the one
        self.shared_size = _count(config.shared_expert_intermediate_size) or (
            _count(config.shared_experts) * self.expert_size
        )
        self.shared_field = (
            "shared_expert_intermediate_size"
            if _count(config.shared_expert_intermediate_size)
            else "n_shared_experts × moe_intermediate_size"
        )
        self.dense_layers = min(_count(config.dense_layers), self.layers) if self.experts else self.layers
        self.speculative_layers = min(_count(config.speculative_layers), MOST_LAYERS)
        self.ignored = _Ignored(precision.ignored)

    def model(self) -> Model:
        parts = (*self._embeddings(), *self._parts(range(self.layers)))
        following = range(self.layers, self.layers + self.speculative_layers)
        return Model(
            layers=self.layers,
            hidden_size=self.hidden,
            vocab_size=self.vocab,
            attention_heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            value_dim=self.value_dim,
            latent_dim=self.latent + self.rope if self.latent else 0,
            widths=self._widths({part.name for part in parts if part.quantized}),
            experts=self.experts,
            experts_per_token=self.experts_per_token,
            precision=self.precision,
            parts=parts,
            speculative_layers=len(following),
            speculative_parts=self._parts(following, joined=True),
            eagle_parts=self._eagle_parts(),
        )

    def _widths(self, quantized: set[str]) -> tuple[Width, ...]:
        dense, expert = "intermediate_size", "moe_intermediate_size" if self.expert_size != self.intermediate else ""
        sizes = {
            "feed-forward": (self.intermediate if self.dense_layers else 0, dense),
            "experts": (self.expert_size if self.experts else 0, expert or dense),
            "shared-experts": (self.shared_size if self.experts else 0, self.shared_field),
        }
        return tuple(
            Width(
                what=f"width of the {name}",
                size=size,
                field=field,
                quantized=name in quantized,
                routed=name == "experts",
            )
            for name, (size, field) in sizes.items()
            if size
        )

    def _eagle_parts(self) -> tuple[Part, ...]:
        if self.experts:
            return ()
        whole, self.precision = self.precision, Precision(name="bf16", weight_bytes=HALF_BYTES)
        parts = self._parts(range(self.layers, self.layers + 1), joined=True)
        self.precision = whole
        return parts

    def _embeddings(self) -> tuple[Part, ...]:
        size = self.vocab * self.hidden
        embedding = Part(name="embedding", parameters=size, bytes=size * HALF_BYTES, read=self.tied)
        if self.tied:  # one tensor, and the head reads all of it
            return (embedding,)
        return (embedding, Part(name="head", parameters=size, bytes=size * HALF_BYTES))

    def _parts(self, layers: range, *, joined: bool = False) -> tuple[Part, ...]:
        """Return the parts of these layers; *joined*: each also joins the token before it (2 × hidden → hidden)."""
        last = min(self.dense_layers, layers.stop) if self.experts else layers.stop
        dense = range(layers.start, max(layers.start, last))
        routed = range(dense.stop, layers.stop)
        expert = 3 * self.hidden * self.expert_size
        parts = [
            *(self._latent_attention(layers) if self.latent else self._attention(layers)),
            self._part("feed-forward", dense, 3 * self.hidden * self.intermediate, "mlp.gate_proj"),
            self._part("experts", routed, self.experts * expert, "mlp.experts.0.gate_proj", routed=True),
            self._part("shared-experts", routed, 3 * self.hidden * self.shared_size, "mlp.shared_experts.gate_proj"),
            self._part("router", routed, self.experts * self.hidden, None, ways=EVERYWHERE),
            self._part("norms", layers, 2 * self.hidden, None, ways=EVERYWHERE),
        ]
        if joined:
            parts.append(self._part("joint", layers, 2 * self.hidden * self.hidden, None, ways=EVERYWHERE))
        return tuple(part for part in parts if part.parameters)

    def _attention(self, layers: range) -> tuple[Part, ...]:
        queries = 2 * self.hidden * self.heads * self.head_dim
        keys = 2 * self.hidden * self.kv_heads * self.head_dim
        return (
            self._part("queries-and-output", layers, queries, "self_attn.q_proj", ways=self.heads),
            self._part("keys-and-values", layers, keys, "self_attn.k_proj", ways=self.kv_heads),
        )

    def _latent_attention(self, layers: range) -> tuple[Part, ...]:
        queries = (self.query_rank or self.hidden) * self.heads * self.head_dim
        values = self.latent * self.heads * (self.head_dim - self.rope + self.value_dim)
        output = self.heads * self.value_dim * self.hidden
        down = self.hidden * (self.query_rank + self.latent + self.rope)
        return (
            self._part("latent-up", layers, queries + values + output, "self_attn.kv_b_proj", ways=self.heads),
            self._part("latent-down", layers, down, "self_attn.kv_a_proj_with_mqa", ways=EVERYWHERE),
        )

    def _part(
        self,
        name: str,
        layers: range,
        parameters: int,
        module: str | None,
        *,
        ways: int = ANYWHERE,
        routed: bool = False,
    ) -> Part:
        """Return a part with *parameters* in each of *layers*; a *module* of None is never quantized."""
        plain = len(layers)
        if module is not None:
            plain = sum(self.ignored.holds(f"model.layers.{i}.{module}") for i in layers)
        quantized = len(layers) - plain
        return Part(
            name=name,
            parameters=parameters * len(layers),
            bytes=parameters * (plain * HALF_BYTES + quantized * self.precision.weight_bytes),
            ways=ways,
            routed=routed,
            quantized=quantized > 0,
        )


def _count(value: Maybe[int]) -> int:
    """Return a count of a config, 0 where it is missing or no count."""
    return max(or_none(value) or 0, 0)


class _Ignored:
    """An ignore list: `re:…` and `*` match a module's name from its beginning, a plain entry is a run of its words."""

    def __init__(self, entries: tuple[str, ...]) -> None:
        written = {e: e[3:] if e.startswith("re:") else fnmatch.translate(e) for e in entries if _is_pattern(e)}
        self.names = frozenset(entries) - frozenset(written)
        self.patterns = tuple(pattern for text in written.values() if (pattern := _compiled(text)) is not None)

    def holds(self, module: str) -> bool:
        """Whether *module* is left as it was."""
        if not self.names and not self.patterns:
            return False
        words = module.split(".")
        runs = (".".join(words[i:j]) for i in range(len(words)) for j in range(i + 1, len(words) + 1))
        return any(run in self.names for run in runs) or any(p.match(module) for p in self.patterns)


def _is_pattern(entry: str) -> bool:
    return entry.startswith("re:") or "*" in entry


def _compiled(text: str) -> re.Pattern[str] | None:
    try:
        return re.compile(text)
    except re.error:  # the engine would not load such a checkpoint either
        return None


class Draft(enum.Enum):
    """What guesses tokens ahead, as far as its size follows from the model's."""

    NONE = "none"
    """Nothing, or something whose size nothing here tells: n-grams, a draft model of its own."""
    MTP = "mtp"
    """The checkpoint's own multi-token-prediction layers."""
    EAGLE = "eagle"
    """A head beside the checkpoint."""


def draft_of(speculative: str | None) -> Draft:
    """Return the draft that the method or the model of a speculative configuration names."""
    name = (speculative or "").lower()
    return next((draft for draft in (Draft.MTP, Draft.EAGLE) if draft.value in name), Draft.NONE)


def draft_parts(model: Model, draft: Draft) -> tuple[Part, ...]:
    """Return what a draft adds to the model's parts.

    EAGLE for Llama 2 or 3 70B: a layer of 855.6 M and 2 × 8192 × 8192 = 134.2 M to join: 0.99 G, as its README says. An
    EAGLE-3 head has a head of its own and a wider joint on top, up to 40 % more.
    """
    return {Draft.NONE: (), Draft.MTP: model.speculative_parts, Draft.EAGLE: model.eagle_parts}[draft]


def draft_layers(model: Model, draft: Draft) -> int:
    """Return how many layers with a KV cache of their own a draft adds."""
    return {Draft.NONE: 0, Draft.MTP: model.speculative_layers, Draft.EAGLE: 1 if model.eagle_parts else 0}[draft]


def weight_bytes_per_gpu(model: Model, tp: int, draft: Draft = Draft.NONE) -> float:
    """Return the bytes of weights that each of *tp* GPUs holds.

    Llama 3.3 70B in BF16 at TP 4: 70.55 G × 2 / 4 = 35.3 GB. Keys and values are copied beyond one head a GPU, so
    at TP 16 its 8 KV heads would lie in two copies.
    """
    return sum(part.bytes_per_gpu(tp) for part in (*model.parts, *draft_parts(model, draft)))


def read_bytes_per_gpu(model: Model, tp: int, tokens: int) -> float:
    """Return the bytes of weights that a step over *tokens* tokens reads on each GPU.

    The input embedding is not read; of the experts only those that some token chose: with k of E and b tokens
    choosing alike often, E × (1 − (1 − k/E)^b). Mixtral at b = 1: 2 of 8; at b = 32: 8 × (1 − 0.75³²) = 8.
    """
    chosen = 1.0
    if model.experts:
        chosen = 1.0 - (1.0 - model.experts_per_token / model.experts) ** tokens
    return sum(part.bytes_per_gpu(tp) * (chosen if part.routed else 1.0) for part in model.parts if part.read)


def kv_bytes_per_token(model: Model, tp: int, element_bytes: float = HALF_BYTES, draft: Draft = Draft.NONE) -> float:
    """Return the bytes of KV cache that one token of context takes on each of *tp* GPUs.

    Llama 3.3 70B at TP 4: keys and values × 80 layers × 2 of 8 heads × 128 × 2 bytes = 81,920. A head is never
    split, so beyond 8 GPUs it would be copied. DeepSeek-V3: 61 × (512 + 64) × 2 = 70,272 on every GPU, at any TP.
    """
    layers = model.layers + draft_layers(model, draft)
    if model.latent_dim:
        return layers * model.latent_dim * element_bytes
    heads = max(1, -(-model.kv_heads // tp))
    return 2 * layers * heads * model.head_dim * element_bytes


def kv_element_bytes(kv_cache_dtype: str | None) -> Maybe[float]:
    """Return the bytes of one KV element for `--kv-cache-dtype`; None, `auto` and the half types: two."""
    if kv_cache_dtype in {None, "", "auto", "bfloat16", "float16", "half"}:
        return HALF_BYTES
    if str(kv_cache_dtype).startswith(("fp8", "float8", "int8")):
        return 1.0
    return Absent(Why.NOT_SUPPORTED, f"there is no arithmetic for KV cache type {kv_cache_dtype}")
