"""An engine's Prometheus page, text or OpenMetrics, both generations of vLLM's names, as `EngineMetrics`."""

from __future__ import annotations

import re
from collections.abc import Iterator

from doctor.snapshot import Absent, EngineMetrics, Histogram, Maybe, Why

_NOT_THERE = Absent(Why.NOT_PRESENT, "the engine's page has no such metric")

_SAMPLE = re.compile(
    r"^(?P<name>[a-zA-Z_:][\w:]*)(?:\{(?P<labels>.*)\})? +(?P<value>[+-]?(?:[\d.]+(?:[eE][+-]?\d+)?|Inf|NaN))"
    r"(?: +-?[\d.]+)?(?: +#.*)?\s*$",
    re.ASCII,
)
_LABEL = re.compile(r'([a-zA-Z_]\w*)="((?:[^"\\]|\\.)*)"', re.ASCII)

_PAGE = re.compile(rb"^(?:# (?:HELP|TYPE) \S|(?:vllm|sglang|tgi|trtllm|llamacpp):?_?[a-z]\w*\{)", re.MULTILINE)
_PAGE_LINE = re.compile(rb"^(?:#|[a-zA-Z_:][\w:]*(?:\{[^\n]*\})? +[+-]?(?:\d|Inf|NaN|\.\d)|\s*$)")

_TOTALS: dict[str, tuple[str, ...]] = {
    "steps_total": ("vllm:iteration_tokens_total_count",),
    "generation_tokens_total": ("vllm:generation_tokens_total",),
    "prompt_tokens_total": ("vllm:prompt_tokens_total",),
    "preemptions_total": ("vllm:num_preemptions_total",),
    "requests_succeeded_total": ("vllm:request_success_total",),
    "prefix_cache_queries_total": (
        "vllm:prefix_cache_queries_total",
        "vllm:gpu_prefix_cache_queries_total",
        "vllm:gpu_prefix_cache_queries",
    ),
    "prefix_cache_hits_total": (
        "vllm:prefix_cache_hits_total",
        "vllm:gpu_prefix_cache_hits_total",
        "vllm:gpu_prefix_cache_hits",
    ),
    "draft_tokens_total": ("vllm:spec_decode_num_draft_tokens_total",),
    "accepted_tokens_total": ("vllm:spec_decode_num_accepted_tokens_total",),
    "running": ("vllm:num_requests_running",),
    "waiting": ("vllm:num_requests_waiting",),
}
"""Field → the names that it had, newest first; summed over data-parallel engines."""

_FAILED = frozenset(("abort", "error"))
"""Reasons that `request_success_total` counts too."""

_LARGEST = {"kv_cache_usage_ratio": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc")}
"""A share of each engine: the largest counts. Its name says per cent; it is 0 to 1 in every release."""

_HISTOGRAMS: dict[str, tuple[str, ...]] = {
    "time_to_first_token_seconds": ("vllm:time_to_first_token_seconds",),
    "inter_token_seconds": ("vllm:inter_token_latency_seconds", "vllm:time_per_output_token_seconds"),
    "queue_seconds": ("vllm:request_queue_time_seconds", "vllm:time_in_queue_requests"),
    "prefill_seconds": ("vllm:request_prefill_time_seconds",),
    "request_prompt_tokens": ("vllm:request_prompt_tokens",),
    "request_generation_tokens": ("vllm:request_generation_tokens",),
}

_WANTED = frozenset(
    {name for names in (*_TOTALS.values(), *_LARGEST.values()) for name in names}
    | {name + suffix for names in _HISTOGRAMS.values() for name in names for suffix in ("_bucket", "_sum", "_count")}
    | {"vllm:cache_config_info", "vllm:cache_config"}
)


def find(text: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and end of each metrics page in *text*."""
    position = 0
    while start := _PAGE.search(text, position):
        end = start.start()
        while end < len(text):
            newline = text.find(b"\n", end)
            following = len(text) if newline < 0 else newline + 1
            if not _PAGE_LINE.match(text[end : min(following, end + 4096)]):
                break
            end = following
        position = max(end, start.end())
        if end > start.start():
            yield start.start(), end


def read(text: str, *, engine: str, at: float, url: str = "") -> EngineMetrics | None:
    """Return what the page says, or None where it has no metric of vLLM. Lines that are no samples are passed over."""
    values: dict[str, list[float]] = {}
    buckets: dict[str, dict[float, float]] = {}
    blocks: list[float] = []
    model: str | None = None
    seen = False
    for line in text.splitlines():
        if not line.startswith("vllm:"):
            continue
        seen = True
        name = line[: _end_of_name(line)]
        if name not in _WANTED:
            continue
        sample = _SAMPLE.match(line)
        if sample is None:
            continue
        value = float(sample["value"])
        labels = dict(_LABEL.findall(sample["labels"] or ""))
        model = labels.get("model_name", model)
        if labels.get("finished_reason") in _FAILED:
            continue
        if name.startswith("vllm:cache_config"):
            blocks += _tokens_of(labels)
        elif name.endswith("_bucket"):
            bound = _bound(labels.get("le", ""))
            if bound is not None:
                of_name = buckets.setdefault(name.removesuffix("_bucket"), {})
                of_name[bound] = of_name.get(bound, 0.0) + value
        else:
            values.setdefault(name, []).append(value)
    if not seen:
        return None
    fields: dict[str, Maybe[float] | Maybe[Histogram]] = {}
    for field, names in _TOTALS.items():
        fields[field] = next((sum(values[n]) for n in names if n in values), _NOT_THERE)
    for field, names in _LARGEST.items():
        fields[field] = next((max(values[n]) for n in names if n in values), _NOT_THERE)
    for field, names in _HISTOGRAMS.items():
        fields[field] = next(
            (_histogram(buckets[n], values.get(f"{n}_sum")) for n in names if n in buckets), _NOT_THERE
        )
    fields["kv_cache_tokens"] = sum(blocks) if blocks else _NOT_THERE
    return EngineMetrics(engine=engine, at=at, url=url, model=model or _NOT_THERE, **fields)  # pyright: ignore[reportArgumentType] - the tables say which field holds what


def _end_of_name(line: str) -> int:
    brace, space = line.find("{"), line.find(" ")
    ends = [place for place in (brace, space) if place >= 0]
    return min(ends, default=len(line))


def _bound(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _tokens_of(labels: dict[str, str]) -> list[float]:
    """Return the capacity of one engine's KV cache, tokens, as a list of one; none where the page does not tell."""
    tokens = _bound(labels.get("kv_cache_size_tokens", ""))  # newer releases tell it themselves
    if tokens is not None:
        return [tokens]
    blocks, size = _bound(labels.get("num_gpu_blocks", "")), _bound(labels.get("block_size", ""))
    return [blocks * size] if blocks is not None and size is not None else []


def _histogram(buckets: dict[float, float], sums: list[float] | None) -> Histogram:
    counts = dict(sorted(buckets.items()))
    bounds = tuple(bound for bound in counts if bound != float("inf"))
    last = counts.get(float("inf"), max(counts.values(), default=0.0))
    return Histogram(bounds=bounds, counts=(*(counts[b] for b in bounds), last), sum=sum(sums or ()))
