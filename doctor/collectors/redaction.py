"""Secrets taken out of command lines, environments and log lines before anything leaves a collector."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache
from operator import is_
from typing import TypeVar, cast

import msgspec

from doctor.snapshot import Snapshot

REPLACEMENT = "***"

KEPT_PREFIXES = ("CUDA_", "NVIDIA_", "NCCL_", "TORCH_", "PYTORCH_", "VLLM_", "HF_")
"""The environment variables that some symptom can use; no other one leaves the collector."""

_SECRET_WORDS = frozenset(
    ("token", "secret", "password", "passwd", "passphrase", "key", "apikey", "credential", "credentials", "auth",
     "authorization", "bearer", "cookie", "signature", "private")
)  # fmt: skip
"""A name with one of these words names a secret. `tokens` is not among them: engines count tokens."""

_WORD = re.compile(r"[a-z0-9]+|[A-Z]+(?![a-z])|[A-Z][a-z0-9]*")

_SECRET_IN_TEXT = re.compile(
    r"""(?ix)
    (?P<name> (?: (?<=[_"'-]) (?:token|key) | \btoken(?==) | secret | passw(?:or)?d | passphrase | apikey | credentials?
                | authorization | [?&-](?:sig|signature) )
              ["']? \s* [:=] \s*
            | --(?:[a-z]+[-_])*(?:token|key|secret|password|passphrase) \s+ (?!-) )
    (?P<value> \[ [^\]]* \]? | "[^"]*"? | '[^']*'? | (?:basic|bearer|digest)\s+\S+
             | (?!none\b|null\b|true\b|false\b) [^\s,;}})\]]+ )
    """
)
"""`'api_key': ['…']`, `"secret": "…"`, `HF_TOKEN=…`, `password: …`, `--api-key …`, `Authorization: Basic …`, `&sig=…`."""

_SECRET_LOOKS = re.compile(
    r"""(?x)
      \bhf_[A-Za-z0-9]{16,}                       # Hugging Face
    | \bsk-[A-Za-z0-9_-]{16,}                     # OpenAI and its followers
    | \b(?:AKIA|ASIA)[A-Z0-9]{16}\b               # AWS
    | \bgh[pousr]_[A-Za-z0-9]{20,}                # GitHub
    | \bglpat-[A-Za-z0-9_-]{16,}                  # GitLab
    | \beyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{8,}(?:\.[A-Za-z0-9_-]*)?   # a JSON web token
    | (?i:\bbearer\s+)[A-Za-z0-9._~+/=-]{8,}
    | (?<=://)[^\s/@]+(?=@)                       # user:password of a URL, or a token in its place
    """
)


def names_secret(name: str) -> bool:
    """Whether something of this name (a variable, a flag, a key) holds a secret."""
    words = [word.lower() for word in _WORD.findall(name)]
    return any(word in _SECRET_WORDS for word in words) or "passw" in name.lower()


def text_without_secrets(text: str) -> str:
    """Return *text* with everything replaced that is named or looks like a secret."""
    return _SECRET_IN_TEXT.sub(lambda m: m["name"] + REPLACEMENT, _SECRET_LOOKS.sub(REPLACEMENT, text))


def environment_without_secrets(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that some symptom can use, secrets replaced, sorted by name."""
    return {
        name: REPLACEMENT if value and names_secret(name) else text_without_secrets(value)
        for name, value in sorted(environment.items())
        if name.startswith(KEPT_PREFIXES)
    }


def command_line_without_secrets(arguments: Iterable[str]) -> tuple[str, ...]:
    """Return the arguments with secrets replaced: what follows `--api-key`, `--hf-token=…`, `"password": "…"`."""
    shown: list[str] = []
    secret = False
    for argument in arguments:
        if argument.startswith("--"):
            name, equals, value = argument.partition("=")
            secret = names_secret(name.replace("-", "_")) and not equals
            hidden = bool(equals) and names_secret(name.replace("-", "_"))
            shown.append(f"{name}={REPLACEMENT}" if hidden else f"{name}{equals}{text_without_secrets(value)}")
        else:
            shown.append(REPLACEMENT if secret else text_without_secrets(argument))
    return tuple(shown)


def snapshot_without_secrets(snapshot: Snapshot) -> Snapshot:
    """Return a snapshot in which no text that came from outside holds a secret: where a snapshot is made, it is clean.

    Collectors take out what only they can know to be secret, by its place: a flag's value, a variable. This takes out
    what is named or looks like one wherever else it stands: a model's address, a line that a rule will quote, a reason.
    """
    return msgspec.structs.replace(snapshot, **{name: _clean(getattr(snapshot, name)) for name in _TEXTS})


_TEXTS = ("unseen", "kernel", "engines", "engine_events", "logs", "metrics", "fabric_manager")
"""The fields of a snapshot that hold text from outside; what else there is are the driver's own numbers and names."""

T = TypeVar("T")


def _clean(value: T) -> T:
    """Return a value with every text in it cleaned; the same object where there is nothing to clean."""
    if isinstance(value, str):
        text = _clean_text(value)
        return value if text == value else cast("T", text)
    if isinstance(value, tuple):
        items = cast("tuple[object, ...]", value)
        cleaned = tuple(map(_clean, items))
        return cast("T", items if all(map(is_, items, cleaned)) else cleaned)
    if isinstance(value, dict):
        pairs = cast("dict[object, object]", value)
        return cast("T", {key: _clean(each) for key, each in pairs.items()})
    if isinstance(value, msgspec.Struct):
        changed: dict[str, object] = {}
        for name in value.__struct_fields__:
            before: object = getattr(value, name)
            after = _clean(before)
            if after is not before:
                changed[name] = after
        return msgspec.structs.replace(value, **changed) if changed else value
    return value


_clean_text = lru_cache(maxsize=1024)(text_without_secrets)
"""Remembered: visits repeat most of what they say, some hundred texts. Lines of logs are new each time, and fill the rest."""
