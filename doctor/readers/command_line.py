"""A serving engine's command line: a list of arguments or a line of shell in, what it asks for out."""

from __future__ import annotations

import itertools
import json
import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import msgspec

from doctor.readers.vllm_flags import ALIASES, FLAGS, SWITCHES
from doctor.snapshot import Absent, EngineFlags, Why

_NOT_GIVEN = Absent(Why.NOT_GIVEN)

_ENTRY_POINTS = (
    ("vllm", re.compile(r"(?:^|/)vllm$|^vllm\.entrypoints\.|vllm/vllm-openai(?::|@|$)|vllm/entrypoints/.*\.py$")),
    ("sglang", re.compile(r"^sglang\.launch_server$|(?:^|/)sglang$|lmsysorg/sglang(?::|@|$)")),
    ("tensorrt-llm", re.compile(r"(?:^|/)trtllm-serve$|^tensorrt_llm\.")),
    ("tgi", re.compile(r"(?:^|/)text-generation-launcher$|text-generation-inference(?::|@|$)")),
    ("llama.cpp", re.compile(r"(?:^|/)llama-server$")),
)
"""By what one argument of the command line says: program, module or image."""

_NO_SERVERS = frozenset(("bench", "chat", "complete", "collect-env", "run-batch"))
"""Subcommands of `vllm` that serve nothing."""

_FIELDS = {
    "model": "model",
    "model-tag": "model",
    "tensor-parallel-size": "tensor_parallel_size",
    "pipeline-parallel-size": "pipeline_parallel_size",
    "data-parallel-size": "data_parallel_size",
    "enable-expert-parallel": "expert_parallel",
    "quantization": "quantization",
    "dtype": "dtype",
    "kv-cache-dtype": "kv_cache_dtype",
    "max-model-len": "max_model_len",
    "max-num-seqs": "max_num_seqs",
    "max-num-batched-tokens": "max_num_batched_tokens",
    "gpu-memory-utilization": "gpu_memory_utilization",
    "enforce-eager": "enforce_eager",
    "disable-custom-all-reduce": "disable_custom_all_reduce",
    "enable-prefix-caching": "enable_prefix_caching",
    "speculative-config": "speculative",
    "speculative-model": "speculative",
    "host": "host",
    "port": "port",
}
"""vLLM's flag → field of `EngineFlags`."""

_OTHER_ENGINES: dict[str, dict[str, str]] = {
    "sglang": {
        "model-path": "model",
        "tp": "tensor-parallel-size",
        "tp-size": "tensor-parallel-size",
        "pp-size": "pipeline-parallel-size",
        "dp": "data-parallel-size",
        "dp-size": "data-parallel-size",
        "context-length": "max-model-len",
        "max-running-requests": "max-num-seqs",
        "speculative-algorithm": "speculative-model",
    },
    "tensorrt-llm": {
        "tp-size": "tensor-parallel-size",
        "pp-size": "pipeline-parallel-size",
        "max-seq-len": "max-model-len",
        "max-batch-size": "max-num-seqs",
        "max-num-tokens": "max-num-batched-tokens",
    },
    "tgi": {
        "model-id": "model",
        "num-shard": "tensor-parallel-size",
        "quantize": "quantization",
        "max-total-tokens": "max-model-len",
        "max-concurrent-requests": "max-num-seqs",
        "hostname": "host",
    },
    "llama.cpp": {"m": "model", "c": "max-model-len", "ctx-size": "max-model-len"},
}
"""Their flag → vLLM's flag of the same meaning. `mem-fraction-static` and its like mean something else."""

_HUMAN_INTEGER = re.compile(r"^(-?\d+(?:\.\d+)?)([kKmMgGtT])$")
_HUMAN_FACTORS = {"k": 10**3, "m": 10**6, "g": 10**9, "t": 10**12, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
"""As vLLM reads `--max-model-len 16k` (16000) and `16K` (16384) since 0.8.5."""

_ASSIGNMENT = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*)=(.*)$", re.DOTALL)

_REST = rb"(?:[^\n\\]+|\\\r?\n|\\.)*"
"""The rest of a command: its line, and those that a backslash adds."""

_SHELL = re.compile(
    rb"^[ \t]*(?:[$#>] |\+ )?(?:[A-Za-z_]\w*=\S* |(?:sudo|env|exec|nohup|time|CMD|ENTRYPOINT) )*"
    rb"(?:(?:\S*/)?(?:vllm serve|python[\d.]* (?:-\w+ )*-m (?:vllm\.entrypoints|sglang\.launch_server)|sglang serve"
    rb"|trtllm-serve|text-generation-launcher|llama-server)(?![^\s\\])" + _REST + rb"|docker run " + _REST + rb")",
    re.MULTILINE,
)


class CommandLine(msgspec.Struct, frozen=True, kw_only=True):
    """A command that starts an engine."""

    kind: str
    """As in `Engine.kind`."""
    arguments: tuple[str, ...]
    environment: dict[str, str] = {}
    """Assignments before the command, and those that `docker run -e` makes."""
    flags: EngineFlags


def find(text: bytes) -> Iterator[tuple[int, int]]:
    """Yield start and end of each command in *text* that starts an engine, as a shell would take it."""
    for match in _SHELL.finditer(text):
        yield match.span()


def read_shell(text: str) -> CommandLine | None:
    """Return the command that a line of shell gives, or None where it starts no engine."""
    text = re.sub(r"\\\r?\n", " ", text).strip().lstrip("$#>+ ")
    try:
        words = shlex.split(text)
    except ValueError:  # a quote that does not end: the paste was cut
        words = text.split()
    kind = engine_kind(words)
    if kind is None:
        return None
    environment: dict[str, str] = {}
    while words and (_ASSIGNMENT.match(words[0]) or words[0] in {"sudo", "env", "exec", "nohup", "time"}):
        assignment = _ASSIGNMENT.match(words.pop(0))
        if assignment:
            environment[assignment[1]] = assignment[2]
    for option, value in itertools.pairwise(words):
        assignment = _ASSIGNMENT.match(value)
        if option in {"-e", "--env"} and assignment:
            environment[assignment[1]] = assignment[2]
    return CommandLine(kind=kind, arguments=tuple(words), environment=environment, flags=read(words))


def engine_kind(arguments: Sequence[str]) -> str | None:
    """Return which engine a command line starts, as in `Engine.kind`; None: none that is known."""
    for place, argument in enumerate(arguments):
        for kind, pattern in _ENTRY_POINTS:
            if pattern.search(argument):
                following = arguments[place + 1] if place + 1 < len(arguments) else ""
                return None if kind == "vllm" and following in _NO_SERVERS else kind
    return None


def read(arguments: Sequence[str]) -> EngineFlags:
    """Return what the command line asks for. A flag that stands twice counts as it stands last."""
    kind = engine_kind(arguments) or "vllm"
    other = _OTHER_ENGINES.get(kind, {})
    values: dict[str, Any] = {}
    unknown: list[str] = []
    configured = ""
    words = list(arguments[_first_own(arguments, kind) :])
    if words and not words[0].startswith("-"):
        values["model"] = words.pop(0)
    while words:
        word = words.pop(0)
        if not word.startswith("-") or word in {"-", "--"}:
            values.setdefault("model", word)
            continue
        name, equals, value = word.lstrip("-").partition("=")
        name, _, _ = name.replace("_", "-").partition(".")
        negated = name.startswith("no-") and name[3:] in SWITCHES
        name = _full_name(name[3:] if negated else name, other)
        switch = name in SWITCHES
        if not equals and not negated and words and not _is_flag(words[0]) and not (switch and not _is_truth(words[0])):
            value = words.pop(0)
            equals = "="
        if name == "config" and equals:
            configured = value
        if name in _FIELDS:
            field = _FIELDS[name]
            values[field] = _CONVERSIONS.get(field, str)(value if equals else str(not negated))
        elif kind == "vllm" and name not in FLAGS and not word.startswith("-O"):
            unknown.append(word.partition("=")[0])
    missing = Absent(Why.NOT_ASKED, f"{configured} may set it and was not read") if configured else _NOT_GIVEN
    fields: dict[str, object] = dict.fromkeys(_FIELDS.values(), missing)
    fields.update((field, value) for field, value in values.items() if value is not None)
    return EngineFlags(**cast("Mapping[str, Any]", fields), unknown=tuple(unknown))


def _first_own(arguments: Sequence[str], kind: str) -> int:
    """Return where the engine's own arguments begin."""
    pattern = dict(_ENTRY_POINTS)[kind]
    for place, argument in enumerate(arguments):
        if pattern.search(argument):
            serve = tuple(arguments[place + 1 : place + 2]) == ("serve",)
            return place + 2 if serve else place + 1
    return 0


def _full_name(name: str, other: Mapping[str, str]) -> str:
    name = other.get(name) or ALIASES.get(name, name)
    if name in FLAGS or len(name) < 3:
        return name
    # argparse takes any beginning that fits one flag only.
    fitting = {flag for flag in FLAGS if flag.startswith(name)}
    return fitting.pop() if len(fitting) == 1 else name


def _is_flag(word: str) -> bool:
    return word.startswith("-") and not word[1:2].isdigit() and word != "-"


def _is_truth(word: str) -> bool:
    return word.lower() in {"true", "false"}


def _integer(value: str) -> int | None:
    human = _HUMAN_INTEGER.match(value)
    try:
        return int(float(human[1]) * _HUMAN_FACTORS[human[2]]) if human else int(value)
    except (ValueError, OverflowError):
        return None


def _ratio(value: str) -> float | None:
    try:
        return float(value)
    except ValueError:
        return None


def _truth(value: str) -> bool:
    return value.lower() not in {"false", "0", "no"}


def _draft(value: str) -> str:
    """Return the method or the model of a speculative configuration, which is JSON since 0.8.5."""
    try:
        config: object = json.loads(value)
    except (ValueError, RecursionError):
        return value
    if not isinstance(config, dict):
        return value
    named = cast("dict[str, object]", config)
    return str(named.get("method") or named.get("model") or value)


_CONVERSIONS: dict[str, Callable[[str], object]] = {
    "tensor_parallel_size": _integer,
    "pipeline_parallel_size": _integer,
    "data_parallel_size": _integer,
    "expert_parallel": _truth,
    "max_model_len": _integer,
    "max_num_seqs": _integer,
    "max_num_batched_tokens": _integer,
    "gpu_memory_utilization": _ratio,
    "enforce_eager": _truth,
    "disable_custom_all_reduce": _truth,
    "enable_prefix_caching": _truth,
    "speculative": _draft,
    "port": _integer,
}
