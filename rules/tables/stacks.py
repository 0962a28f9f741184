"""Which versions of driver, CUDA, PyTorch and vLLM go together."""

from __future__ import annotations

import re
from importlib import resources

import msgspec


class EngineRelease(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a release of vLLM is built with and needs, as its wheel on PyPI has it."""

    version: str
    released: str
    """Day, or month where no day is known."""
    torch: str
    cuda: str
    """Of the PyTorch that it pins."""
    wheel_cuda: str
    """That its own wheel on PyPI was built with."""
    image_cuda: str
    """Of its container image."""
    nccl: str
    """That its PyTorch pins."""
    image_nccl: str = ""
    """That its image installs instead; empty: the same."""
    driver_min: str
    capability_min: str
    architectures: tuple[str, ...] = ()
    """Compute capabilities that its kernels are compiled for, where its build says."""
    python: str
    source: str


class CudaRelease(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a CUDA toolkit needs of the driver."""

    version: str
    driver_of_toolkit: str
    """The driver that came with it: what is compiled at run time may need it."""
    driver_min: str
    """The floor of minor-version compatibility."""
    source: str


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    vllm: tuple[EngineRelease, ...]
    cuda: tuple[CudaRelease, ...]


_TOML = resources.files(__package__ or "rules.tables").joinpath("stack_compatibility.toml").read_bytes()
_TABLE = msgspec.toml.decode(_TOML, type=_Table)

_SPECIFIER = re.compile(r"(<|>=)(\d+)\.(\d+)")
_NUMBERS = re.compile(r"v?(\d{1,6}(?:\.\d{1,6}){0,5})")


def numbers(version: str) -> tuple[int, ...]:
    """Return the numbers that a version begins with, `(0, 20, 2)` of `0.20.2rc1+cu129`; empty where it has none."""
    found = _NUMBERS.match(version)
    return tuple(int(part) for part in found[1].split(".")) if found else ()


def engine_release(version: str) -> EngineRelease | None:
    """Return the row of this version of vLLM: its own, or the newest before it of the releases read.

    None for versions before the first row, and for minors after the last one, of which nothing is known.
    """
    wanted = numbers(version)
    rows = [row for row in _TABLE.vllm if numbers(row.version) <= wanted]
    if not rows or wanted[:2] > numbers(_TABLE.vllm[-1].version)[:2]:
        return None
    return rows[-1]


def own_release(version: str) -> EngineRelease | None:
    """Return the row of exactly this release; None for others, and for builds of its own (`0.22.1+local`, `…dev3`)."""
    return next((row for row in _TABLE.vllm if row.version == version), None)


def admits_python(specifier: str, version: str) -> bool:
    """Whether a wheel's `Requires-Python` (`<3.13,>=3.9`) admits an interpreter; a version without numbers is admitted."""
    there = numbers(version)[:2]
    if len(there) < 2:
        return True
    bounds = [(word, (int(major), int(minor))) for word, major, minor in _SPECIFIER.findall(specifier)]
    return all(there < bound if word == "<" else there >= bound for word, bound in bounds)


def cuda_release(version: str) -> CudaRelease | None:
    """Return the row of this CUDA version; for an unread minor, the row of its major's first."""
    wanted = numbers(version)
    exact = next((row for row in _TABLE.cuda if numbers(row.version)[:2] == wanted[:2]), None)
    return exact or next((row for row in _TABLE.cuda if numbers(row.version)[:1] == wanted[:1]), None)
