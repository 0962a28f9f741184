"""What one visit saw of the serving engines: processes, flags, log lines, metrics, model."""

from __future__ import annotations

from typing import TypeAlias

import msgspec

from doctor.snapshot.absence import NOT_ASKED, Maybe

Fact: TypeAlias = int | float | str


class Rank(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One worker process of an engine."""

    pid: int
    rank: Maybe[int] = NOT_ASKED
    """Tensor-parallel rank, or global rank where there is pipeline parallelism too."""
    title: str = ""
    """The process title, e.g. `VLLM::Worker_TP0`."""
    gpu: Maybe[str] = NOT_ASKED
    """UUID."""
    state: Maybe[str] = NOT_ASKED
    """As psutil names it: `running`, `sleeping`, `disk-sleep`, `stopped`, `zombie`."""
    cpu_seconds: Maybe[float] = NOT_ASKED
    """User and system time since its start; use its growth."""


class EngineFlags(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What the command line asks for. Absent `not-given` means: the engine's default of its version."""

    model: Maybe[str] = NOT_ASKED
    tensor_parallel_size: Maybe[int] = NOT_ASKED
    pipeline_parallel_size: Maybe[int] = NOT_ASKED
    data_parallel_size: Maybe[int] = NOT_ASKED
    expert_parallel: Maybe[bool] = NOT_ASKED
    quantization: Maybe[str] = NOT_ASKED
    dtype: Maybe[str] = NOT_ASKED
    kv_cache_dtype: Maybe[str] = NOT_ASKED
    max_model_len: Maybe[int] = NOT_ASKED
    max_num_seqs: Maybe[int] = NOT_ASKED
    max_num_batched_tokens: Maybe[int] = NOT_ASKED
    gpu_memory_utilization: Maybe[float] = NOT_ASKED
    enforce_eager: Maybe[bool] = NOT_ASKED
    disable_custom_all_reduce: Maybe[bool] = NOT_ASKED
    enable_prefix_caching: Maybe[bool] = NOT_ASKED
    speculative: Maybe[str] = NOT_ASKED
    host: Maybe[str] = NOT_ASKED
    port: Maybe[int] = NOT_ASKED
    unknown: tuple[str, ...] = ()
    """Flags that no release read knows."""


class SharedMemory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """`/dev/shm` in the engine's mount namespace, bytes."""

    total_bytes: Maybe[int] = NOT_ASKED
    used_bytes: Maybe[int] = NOT_ASKED


class CpuShare(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What an engine's control groups let it have of the processors; counters of the one with the smallest quota."""

    cgroup: Maybe[str] = NOT_ASKED
    """The one with the smallest quota, as `/proc/PID/cgroup` names it; `not-present`: none has a quota."""
    quota_cores: Maybe[float] = NOT_ASKED
    """CPU seconds a second that it may use."""
    periods_total: Maybe[int] = NOT_ASKED
    """Enforcement periods in which it had something to run."""
    throttled_periods_total: Maybe[int] = NOT_ASKED
    """Those in which its quota ran out and it was stopped."""
    throttled_seconds_total: Maybe[float] = NOT_ASKED
    """Summed over its processors, so that it may grow by more than a second a second."""
    pressure_ratio: Maybe[float] = NOT_ASKED
    """PSI `some avg60` of the engine's own control group, 0 to 1: time in which a task of it waited for a processor."""


class EngineStack(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The versions in the engine's own environment, read from its files."""

    python: Maybe[str] = NOT_ASKED
    engine: Maybe[str] = NOT_ASKED
    """vLLM's version (or the engine's own)."""
    torch: Maybe[str] = NOT_ASKED
    """With its build suffix where there is one: `2.11.0+cu130`."""
    torch_cuda: Maybe[str] = NOT_ASKED
    """`13.0`."""
    nccl: Maybe[str] = NOT_ASKED
    cuda_compat: Maybe[str] = NOT_ASKED
    """Driver version of the forward-compatibility libcuda in its file system; `not-present`: there is none."""


class ModelConfig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What arithmetic needs of the served model's `config.json` (and of its `quantization_config`)."""

    architecture: Maybe[str] = NOT_ASKED
    model_type: Maybe[str] = NOT_ASKED
    layers: Maybe[int] = NOT_ASKED
    hidden_size: Maybe[int] = NOT_ASKED
    intermediate_size: Maybe[int] = NOT_ASKED
    attention_heads: Maybe[int] = NOT_ASKED
    kv_heads: Maybe[int] = NOT_ASKED
    head_dim: Maybe[int] = NOT_ASKED
    vocab_size: Maybe[int] = NOT_ASKED
    max_position_embeddings: Maybe[int] = NOT_ASKED
    dtype: Maybe[str] = NOT_ASKED
    experts: Maybe[int] = NOT_ASKED
    experts_per_token: Maybe[int] = NOT_ASKED
    moe_intermediate_size: Maybe[int] = NOT_ASKED
    shared_expert_intermediate_size: Maybe[int] = NOT_ASKED
    kv_lora_rank: Maybe[int] = NOT_ASKED
    """Present: multi-head latent attention (DeepSeek)."""
    q_lora_rank: Maybe[int] = NOT_ASKED
    """Latent attention only; absent there: the query is projected in one step (DeepSeek-V2-Lite)."""
    qk_nope_head_dim: Maybe[int] = NOT_ASKED
    qk_rope_head_dim: Maybe[int] = NOT_ASKED
    v_head_dim: Maybe[int] = NOT_ASKED
    shared_experts: Maybe[int] = NOT_ASKED
    """`n_shared_experts`, each as wide as a routed one; Qwen2-MoE gives the width of its one instead."""
    dense_layers: Maybe[int] = NOT_ASKED
    """`first_k_dense_replace`: the first layers of a mixture of experts that have none."""
    speculative_layers: Maybe[int] = NOT_ASKED
    """`num_nextn_predict_layers`: multi-token-prediction layers, loaded only where speculation is asked for."""
    tied_embeddings: Maybe[bool] = NOT_ASKED
    """`tie_word_embeddings`: the output head is the input embedding."""
    quantization_method: Maybe[str] = NOT_ASKED
    """`fp8`, `compressed-tensors`, `awq`, `gptq`, `modelopt`, …; absent `not-present`: not quantized."""
    quantization_weight_bits: Maybe[int] = NOT_ASKED
    quantization_weight_type: Maybe[str] = NOT_ASKED
    """`float` or `int`, where the checkpoint tells."""
    quantization_activations: Maybe[bool] = NOT_ASKED
    """Whether activations are quantized too; False is weight-only."""
    weight_block_size: Maybe[tuple[int, ...]] = NOT_ASKED
    quantization_group_size: Maybe[int] = NOT_ASKED
    """Weights that share one scale along the input dimension (AWQ, GPTQ, INT4)."""
    quantization_ignored: Maybe[tuple[str, ...]] = NOT_ASKED
    """Modules left as they were: `ignore`, `modules_to_not_convert`, `ignored_layers`, as written (`re:` included)."""
    sliding_window: Maybe[int] = NOT_ASKED
    """Tokens that a layer looks back, where it does not look back over all; absent `not-present`: full attention."""
    weights_bytes: Maybe[int] = NOT_ASKED
    """Size of the weight files on disk."""
    path: str = ""
    """Where `config.json` lies, as the engine sees it; empty where it was pasted."""


class Engine(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A serving engine that runs on this node. It is its process and that process's start time."""

    pid: int
    started_at: float
    """Unix time, seconds."""
    kind: str
    """`vllm`, `sglang`, `tensorrt-llm`, `tgi` or `llama.cpp`."""
    command_line: tuple[str, ...] = ()
    """Secrets replaced by `***` before it left the collector."""
    environment: dict[str, str] = {}
    """Only CUDA_*, NVIDIA_*, NCCL_*, TORCH_*, PYTORCH_*, VLLM_*, HF_*; secrets replaced."""
    flags: EngineFlags = EngineFlags()
    ranks: tuple[Rank, ...] = ()
    cores: tuple[Rank, ...] = ()
    """vLLM's engine cores, which schedule for the workers; without a rank's number. Empty where the core is the worker."""
    visible_gpus: Maybe[tuple[str, ...]] = NOT_ASKED
    """UUIDs of the GPUs that it may use."""
    unit: Maybe[str] = NOT_ASKED
    """systemd unit, where it runs in one."""
    container: Maybe[str] = NOT_ASKED
    """Container id, where it runs in one."""
    cgroup: Maybe[str] = NOT_ASKED
    oom_kills_total: Maybe[int] = NOT_ASKED
    """`memory.events` of its cgroup."""
    shared_memory: SharedMemory = SharedMemory()
    cpu_share: CpuShare = CpuShare()
    stack: EngineStack = EngineStack()
    model: ModelConfig = ModelConfig()
    log: Maybe[str] = NOT_ASKED
    """Where its log was found: a path, `journal:UNIT`, `journal:FIELD=value`, `docker:ID`. `EngineEvent.log` refers to this."""
    cpu_seconds: Maybe[float] = NOT_ASKED
    """Of the front process; use its growth."""
    state: Maybe[str] = NOT_ASKED
    """Of the front process, as `Rank.state`."""
    is_embedded: bool = False
    """A program that is no server runs it, with vLLM as a library: its engine core is all that is seen of it."""
    identity: str = ""
    """Its name from before the wall clock was set, which moved its start; empty: the clock was not set."""

    @property
    def id(self) -> str:
        """The engine's identity: pid and start time, as they were told first."""
        return self.identity or f"{self.pid}@{self.started_at:.0f}"

    @property
    def is_left_over(self) -> bool:
        """Whether its server is gone: what is left of a vLLM is known by its title alone, `VLLM::EngineCore`.

        While it ends it has not even that, and is known by the kernel's name for it; one of pasted evidence never had.
        """
        if self.is_embedded:
            return False
        if not self.command_line:
            return self.started_at > 0
        return len(self.command_line) == 1 and "::" in self.command_line[0]


class EngineEvent(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of an engine's log that some symptom can use."""

    signal: str
    """What it says, by the reader's table, e.g. `watchdog-timeout`, `cuda-out-of-memory`, `startup-complete`;
    `site:ID` for a pattern of the site's own."""
    text: str
    """The message without its prefix, cut to 600 characters."""
    where: str
    """`vllm.log:123`: file and line."""
    log: str = ""
    """Which log: `Engine.log`, or the file given to triage."""
    at: float | None = None
    """Unix time, seconds; None where the line carries no stamp."""
    level: str = ""
    process: str = ""
    """The prefix's name: `Worker_TP0`, `EngineCore_DP0`, `APIServer`; empty where there is none."""
    pid: int | None = None
    rank: int | None = None
    facts: dict[str, Fact] = {}
    """Numbers and words taken out of the text, by the table's names."""
    count: int = 1
    """How many times in a row it stood there with the same signal, process and text."""


class LogState(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How far a log was read at this visit."""

    log: str
    lines: int = 0
    """Lines read at this visit."""
    bytes: int = 0
    dropped: int = 0
    """Matching lines over the visit's bound, counted and not kept."""
    last_at: float | None = None
    """The stamp of the last record of the log, matching or not."""
    long_lines: int = 0
    """Lines over the length bound, of which only the beginning was read."""
    passed_over_bytes: int = 0
    """Of a large log: earlier lives of the engine, between its first and its last ones, that were not read."""


class Histogram(msgspec.Struct, frozen=True, kw_only=True, tag="histogram", tag_field="absent"):
    """A Prometheus histogram: cumulative counts by upper bound."""

    bounds: tuple[float, ...]
    """Without +Inf."""
    counts: tuple[float, ...]
    """Cumulative, one a bound; the last one is +Inf's, so one longer than `bounds`."""
    sum: float


class EngineMetrics(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An engine's own Prometheus page, both generations of names; summed over data-parallel engines."""

    engine: str
    """`Engine.id`, or the file given to triage."""
    at: float
    url: str = ""
    version: Maybe[str] = NOT_ASKED
    model: Maybe[str] = NOT_ASKED
    running: Maybe[float] = NOT_ASKED
    """Requests; the gauge is sampled on the API server's own loop and may read 0 under load."""
    waiting: Maybe[float] = NOT_ASKED
    kv_cache_usage_ratio: Maybe[float] = NOT_ASKED
    """0 to 1; the largest over data-parallel engines."""
    steps_total: Maybe[float] = NOT_ASKED
    """Engine steps: `vllm:iteration_tokens_total_count`."""
    generation_tokens_total: Maybe[float] = NOT_ASKED
    prompt_tokens_total: Maybe[float] = NOT_ASKED
    preemptions_total: Maybe[float] = NOT_ASKED
    requests_succeeded_total: Maybe[float] = NOT_ASKED
    prefix_cache_queries_total: Maybe[float] = NOT_ASKED
    prefix_cache_hits_total: Maybe[float] = NOT_ASKED
    draft_tokens_total: Maybe[float] = NOT_ASKED
    accepted_tokens_total: Maybe[float] = NOT_ASKED
    kv_cache_tokens: Maybe[float] = NOT_ASKED
    """Capacity, from `cache_config_info`."""
    time_to_first_token_seconds: Maybe[Histogram] = NOT_ASKED
    inter_token_seconds: Maybe[Histogram] = NOT_ASKED
    queue_seconds: Maybe[Histogram] = NOT_ASKED
    prefill_seconds: Maybe[Histogram] = NOT_ASKED
    request_prompt_tokens: Maybe[Histogram] = NOT_ASKED
    request_generation_tokens: Maybe[Histogram] = NOT_ASKED
