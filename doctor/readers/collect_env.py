"""What vLLM's `collect-env` (and PyTorch's) prints, flat before 0.9.0 and in boxes since."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from doctor.readers import topo_matrix
from doctor.snapshot import Absent, EngineStack, Gpu, Maybe, Mig, MigDevice, Stack, Why

_MISSING = Absent(Why.NOT_GIVEN, "collect_env does not say")
_NOT_COLLECTED = Absent(Why.FAILED, "collect_env could not collect it")

_BEGIN = re.compile(
    r"^(?:Collecting environment information|PyTorch version +?:|PyTorch version:|={10,}[ \r]*\n[ \t]+System Info[ \r]*$)",
    re.MULTILINE,
)
_VLLM = re.compile(r"^vLLM Version *: *(.*)$", re.MULTILINE)
_TAIL = re.compile(
    r"^\s*$|^\s*CUDA Archs:|^vLLM Build Flags|^GPU Topology|^={10,}|^\s+Environment Variables\s*$|^(?:ROCM|Neuron|XPU) "
    r"|^\s*(?:Could not collect|N/A)|^GPU\[?\d+|^\s+GPU\d+|^[A-Za-z_][A-Za-z0-9_]*="
)
"""What follows the version: build flags, topology (of ROCm too) and the environment."""
_FOREIGN = re.compile(r"^(?:```|#{2,} |</details>|=+ ?NVSMI LOG)", re.MULTILINE)

_KEY = re.compile(r"^(\S[^:=\n]{1,60}?) *: ?(.*)$")
_GPU = re.compile(r"^(?:GPU models and configuration *: *)?GPU (\d{1,4}): (.+?)(?: \(UUID: (\S+)\))?\s*$")
_MIG = re.compile(r"^\s+MIG (\S+)\s+Device\s+(\d+):")
_PACKAGE = re.compile(r"^\[(?:pip3?|conda)\] (\S+?)(?:==|\s+)(\S+)")
_VARIABLE = re.compile(r"^([A-Za-z_][A-Za-z0-9_]*)=(.*)$")
_KERNEL = re.compile(r"^Linux-(.+?)-(?:x86_64|aarch64|ppc64le)\b")
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_CUT = 4096
_REPORT_MAX = 128 << 10
"""Characters of a report; the largest of 48 public ones has 18 thousand."""


class Environment(msgspec.Struct, frozen=True, kw_only=True):
    """What the report says."""

    stack: Stack
    engine_stack: EngineStack
    """`engine` is absent where vLLM is not installed or does not know its own version."""
    gpus: tuple[Gpu, ...] = ()
    topology: topo_matrix.TopoMatrix | None = None
    environment: dict[str, str] = {}
    """The variables that collect_env prints; it leaves out those whose names look secret."""
    virtual_machine: Maybe[bool] = _MISSING


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each report in *text*."""
    position = 0
    while begin := _BEGIN.search(text, position):
        end = _end(text, begin.end())
        yield begin.start(), end
        position = end


def read(text: str) -> Environment:
    """Return what the report says; a field that it lacks is absent."""
    values: dict[str, str] = {}
    packages: dict[str, str] = {}
    gpus: dict[int, Gpu] = {}
    devices: list[MigDevice] = []
    environment: dict[str, str] = {}
    current: int | None = None
    for line in (_COLOUR.sub("", whole[:_CUT]) for whole in text.splitlines()):
        gpu, mig, package = _GPU.match(line), _MIG.match(line), _PACKAGE.match(line)
        key = _KEY.match(line)
        if gpu:
            current = int(gpu[1])
            devices = []
            gpus[current] = Gpu(uuid=gpu[3] or f"index:{current}", index=current, name=gpu[2])
        elif mig and current is not None:
            devices.append(MigDevice(uuid=f"index:{current}/mig:{mig[2]}", profile=mig[1]))
            gpus[current] = msgspec.structs.replace(gpus[current], mig=Mig(enabled=True, devices=tuple(devices)))
        elif package:
            packages.setdefault(package[1].lower(), package[2])
        elif key:
            values.setdefault(key[1].strip().lower(), key[2].strip())
        elif "vllm version" in values:
            variable = _VARIABLE.match(line)
            if variable:
                environment[variable[1]] = variable[2]
    torch = _first_word(_said(values, "pytorch version"))
    return Environment(
        stack=Stack(
            driver=_first_word(_said(values, "nvidia driver version")),
            cuda_toolkit=_said(values, "cuda runtime version"),
            kernel=_kernel(_said(values, "python platform")),
            os=_said(values, "os"),
        ),
        engine_stack=EngineStack(
            python=_first_word(_said(values, "python version")),
            engine=_vllm_version(_said(values, "vllm version")),
            torch=torch,
            torch_cuda=_said(values, "cuda used to build pytorch"),
            nccl=next((v for name, v in packages.items() if name.startswith("nvidia-nccl")), _MISSING),
        ),
        gpus=tuple(gpus[index] for index in sorted(gpus)),
        topology=topo_matrix.read(text),
        environment=environment,
        virtual_machine="hypervisor vendor" in values if "architecture" in values else _MISSING,
    )


def _end(text: str, start: int) -> int:
    limit = min(len(text), start + _REPORT_MAX)
    foreign = _FOREIGN.search(text, start, limit)
    limit = foreign.start() if foreign else limit
    version = _VLLM.search(text, start, limit)
    if version is None:
        return limit
    end = position = min(version.end() + 1, len(text))
    matrices = [(version.end() + a, version.end() + b) for a, b in topo_matrix.find(text[version.end() : limit])]
    while position < limit:
        inside = next((b for a, b in matrices if a <= position < b), None)
        if inside is not None:
            end = position = inside
            continue
        newline = text.find("\n", position, limit)
        following = limit if newline < 0 else newline + 1
        line = text[position : min(following, position + _CUT)]
        if not _TAIL.match(line):
            break
        position = following
        if line.strip():
            end = position
    return end


def _said(values: dict[str, str], key: str) -> Maybe[str]:
    value = values.get(key)
    if value is None:
        return _MISSING
    if not value or value.startswith(("Could not collect", "N/A")):
        return _NOT_COLLECTED
    return value


def _first_word(value: Maybe[str]) -> Maybe[str]:
    return value if isinstance(value, Absent) else value.split(maxsplit=1)[0]


def _vllm_version(value: Maybe[str]) -> Maybe[str]:
    """Return the version without the `@COMMIT` of old builds and the `(git sha: …)` of newer ones."""
    word = _first_word(value)
    return word if isinstance(word, Absent) else word.partition("@")[0] or _NOT_COLLECTED


def _kernel(platform: Maybe[str]) -> Maybe[str]:
    if isinstance(platform, Absent):
        return platform
    kernel = _KERNEL.match(platform)
    return kernel[1] if kernel else _MISSING
