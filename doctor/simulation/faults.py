"""The faults that a simulated node can have: named, composable, each with its parameters, start and end.

The drill's time is counted from the first visit. A fault that names no start has been there for two minutes by then,
as in life: the log already tells of it, and the counters have moved.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TypeAlias

import msgspec

from doctor.simulation.profiles import PROFILES, Profile

Value: TypeAlias = int | float | str

START_SECONDS = -120.0
"""When a fault begins that names no start."""


class FaultError(ValueError):
    """A profile, a fault or a parameter is none; the message names it and says what there is."""


class Parameter(msgspec.Struct, frozen=True):
    """A parameter of a fault."""

    name: str
    text: str
    default: Value | None = None
    """None: must be given, unless `optional`."""
    kind: str = "int"
    """`int`, `float` or `str`."""
    choices: tuple[str, ...] = ()
    optional: bool = False
    """May be left out without a default."""
    minimum: float = -math.inf
    maximum: float = math.inf


class Kind(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of fault."""

    name: str
    text: str
    """One line, for `simulate --list`."""
    parameters: tuple[Parameter, ...] = ()
    activity: str = ""
    """What the GPUs do meanwhile: `idle`, `spinning` (100 % busy at low power), `hung` (the same at idle power), or as
    usual. All GPUs of the engine, or the one of the parameter `gpu`, or with `spares_gpu` all but that one, which does
    nothing."""
    spares_gpu: bool = False
    halts_engine: bool = False
    """Requests go on running, and no step advances."""
    ends_engine_after_seconds: float | None = None
    """The engine dies this long after the beginning, and its GPUs are left idle and empty; None: it lives."""


class Fault(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One fault of a drill."""

    name: str
    params: dict[str, Value] = {}
    start_seconds: float = START_SECONDS
    end_seconds: float | None = None

    def active(self, seconds: float) -> bool:
        """Whether it is there at this time of the drill."""
        return self.start_seconds <= seconds and (self.end_seconds is None or seconds < self.end_seconds)

    def elapsed(self, seconds: float) -> float:
        """How long it has lasted by then, ended or not."""
        return max(0.0, min(seconds, math.inf if self.end_seconds is None else self.end_seconds) - self.start_seconds)

    def hits(self, gpu: int) -> bool:
        """Whether it concerns this GPU; a fault without a GPU concerns all."""
        return self.params.get("gpu", gpu) == gpu

    def number(self, name: str) -> float:
        """Return a parameter that is a number."""
        return float(self.params[name])

    def __str__(self) -> str:
        """As it is written on a command line."""
        given = {**self.params}
        if self.start_seconds != START_SECONDS:
            given["start"] = self.start_seconds
        if self.end_seconds is not None:
            given["end"] = self.end_seconds
        text = ",".join(
            f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}" for name, value in given.items()
        )
        return f"{self.name}:{text}" if text else self.name


GPU = Parameter("gpu", "index of the GPU", minimum=0)
SOME_GPU = msgspec.structs.replace(GPU, text="index of the GPU; left out: all", optional=True)
LINK = Parameter("link", "number of the NVLink", minimum=0)
TIMES = (
    Parameter("start", "seconds after the first visit; left out: two minutes before it", kind="float", optional=True),
    Parameter("end", "seconds after the first visit; left out: never", kind="float", optional=True),
)
"""Every fault takes these."""

RECOVERY_ACTIONS = (
    "none",
    "reset",
    "reboot",
    "drain-p2p",
    "drain-and-reset",
    "recover-imex",
    "bus-reset",
    "system-reboot",
)

NVML_KINDS = (
    Kind(name="driver-hung", text="NVML does not answer any more; its caller is blocked"),
    Kind(
        name="gpu-lost",
        text="A GPU falls off the bus; the other ranks wait for it, then the engine dies",
        parameters=(GPU,),
        activity="spinning",
        spares_gpu=True,
        halts_engine=True,
        ends_engine_after_seconds=60.0,
    ),
    Kind(
        name="gpu-removed",
        text="A GPU is not there any more, and nothing is logged: taken off the PCI bus; an engine that used it dies",
        parameters=(GPU,),
        activity="spinning",
        spares_gpu=True,
        halts_engine=True,
        ends_engine_after_seconds=60.0,
    ),
    Kind(
        name="driver-reloaded",
        text="The engine is ended, the driver is unloaded, and another version is loaded",
        parameters=(
            Parameter("branch", "the new driver's, e.g. 595", 595, minimum=470, maximum=615),
            Parameter("down", "seconds without a driver", 5.0, kind="float", minimum=0),
        ),
        ends_engine_after_seconds=0.0,
    ),
    Kind(name="nvlink-down", text="One NVLink of a GPU is down", parameters=(GPU, LINK)),
    Kind(name="nvlinks-all-down", text="All NVLinks are down, of one GPU or of all", parameters=(SOME_GPU,)),
    Kind(
        name="nvlink-errors",
        text="An NVLink replays and recovers again and again",
        parameters=(GPU, LINK, Parameter("rate", "replays a second", 2.0, kind="float", minimum=0)),
    ),
    Kind(
        name="permission-denied",
        text="NVML refuses calls for want of rights",
        parameters=(Parameter("calls", "which calls", "root-only", kind="str", choices=("root-only", "all")),),
    ),
    Kind(
        name="symbol-missing",
        text="The driver's NVML lacks a function",
        parameters=(Parameter("name", "the C function, e.g. nvmlDeviceGetMarginTemperature", kind="str"),),
    ),
    Kind(
        name="driver-old",
        text="The driver is of an older branch: newer functions and fields are missing",
        parameters=(Parameter("branch", "e.g. 535", 535, minimum=470, maximum=615),),
    ),
    Kind(
        name="pcie-width",
        text="A GPU's PCIe link has trained to fewer lanes",
        parameters=(GPU, Parameter("width", "lanes", 8, minimum=1, maximum=16)),
    ),
    Kind(
        name="pcie-generation",
        text="A GPU's PCIe link has trained to a lower generation",
        parameters=(GPU, Parameter("generation", "PCIe generation", 3, minimum=1, maximum=6)),
    ),
    Kind(name="p2p-blocked", text="GPUs can't reach each other's memory (ACS, IOMMU, a container)"),
    Kind(
        name="mig-enabled",
        text="MIG is on, cut into 3g + 2g + 1g + 1g",
        parameters=(GPU, Parameter("instances", "how many of these there are", 4, minimum=0, maximum=4)),
    ),
    Kind(name="mig-pending", text="MIG mode was switched and waits for a reset", parameters=(GPU,)),
    Kind(
        name="overheating",
        text="Cooling is insufficient: heat leaves the GPU more slowly",
        parameters=(
            SOME_GPU,
            Parameter("factor", "thermal resistance, times", 4.0, kind="float", minimum=1, maximum=20),
        ),
    ),
    Kind(
        name="power-transient",
        text="GPUs step between low and above-limit power at the same moments, a fifth of the time high",
        parameters=(
            SOME_GPU,
            Parameter("peak", "of the power limit", 1.4, kind="float", minimum=0.5, maximum=2),
            Parameter("period", "seconds from step to step", 2.0, kind="float", minimum=0.2, maximum=60),
        ),
    ),
    Kind(name="power-brake", text="The external power brake slows a GPU down", parameters=(SOME_GPU,)),
    Kind(
        name="power-cap",
        text="A GPU's power limit is set below its default",
        parameters=(SOME_GPU, Parameter("watts", "the limit", 350.0, kind="float", minimum=50)),
    ),
    Kind(
        name="ecc-uncorrected",
        text="A GPU counts uncorrectable memory errors",
        parameters=(GPU, Parameter("count", "errors", 1, minimum=1)),
    ),
    Kind(name="remap-pending", text="A memory row waits for its repair by a reset", parameters=(GPU,)),
    Kind(
        name="fabric-incomplete", text="The GPUs' registration with the NVLink fabric never completes", activity="idle"
    ),
    Kind(name="fabric-unhealthy", text="A GPU reports degraded bandwidth to the NVLink fabric", parameters=(GPU,)),
    Kind(
        name="recovery-action",
        text="The driver says what a GPU needs",
        parameters=(GPU, Parameter("action", "what is due", "reset", kind="str", choices=RECOVERY_ACTIONS)),
    ),
    Kind(name="nvml-garbage-serial", text="A corrupt InfoROM: the serial number is not text", parameters=(SOME_GPU,)),
    Kind(name="gpu-idle", text="A GPU of the engine gets no work", parameters=(GPU,), activity="idle"),
    Kind(
        name="foreign-process",
        text="Another process holds memory of a GPU",
        parameters=(GPU, Parameter("gib", "GiB", 20.0, kind="float", minimum=0, maximum=1000)),
    ),
)
"""Faults that NVML shows."""

RANK = Parameter("rank", "tensor-parallel rank", minimum=0)

HOST_KINDS = (
    Kind(
        name="nccl-timeout",
        text="A rank does not arrive at a collective; the others wait a minute, then the engine dies",
        parameters=(RANK,),
        activity="spinning",
        spares_gpu=True,
        halts_engine=True,
        ends_engine_after_seconds=62.0,
    ),
    Kind(
        name="engine-stalled",
        text="Requests run and no step advances",
        parameters=(
            Parameter("kind", "where it hangs", "hardware", kind="str", choices=("hardware", "collective", "software")),
        ),
        activity="spinning",
        halts_engine=True,
    ),
    Kind(
        name="rank-stopped",
        text="A rank is stopped (SIGSTOP, a debugger); the others wait for it in a collective",
        parameters=(RANK,),
        activity="spinning",
        spares_gpu=True,
        halts_engine=True,
    ),
    Kind(
        name="rank-blocked",
        text="A rank hangs in the kernel (state D); the others wait for it in a collective",
        parameters=(RANK,),
        activity="spinning",
        spares_gpu=True,
        halts_engine=True,
    ),
    Kind(
        name="engine-core-busy",
        text="The engine core computes in Python and schedules nothing; the ranks and their GPUs wait for it",
        activity="idle",
        halts_engine=True,
    ),
    Kind(
        name="kernel-hung",
        text="A kernel on one GPU of the engine never ends, and the driver says nothing",
        parameters=(GPU,),
        activity="hung",
        halts_engine=True,
    ),
    Kind(
        name="engine-crashed",
        text="The engine dies of an error of its own software",
        ends_engine_after_seconds=3.0,
    ),
    Kind(
        name="application-fault",
        text="A kernel of the workload faults (illegal memory access), and the engine dies of it",
        parameters=(GPU,),
        ends_engine_after_seconds=4.0,
    ),
    Kind(
        name="gpu-memory-fault",
        text="A GPU meets an uncorrectable memory error, CUDA reports it, and the engine dies of it",
        parameters=(GPU,),
        ends_engine_after_seconds=4.0,
    ),
    Kind(
        name="gpu-memory-held",
        text="The engine starts on a GPU whose memory another process holds, and refuses",
        parameters=(
            GPU,
            Parameter("gib", "GiB that the other process holds", 20.0, kind="float", minimum=0, maximum=1000),
        ),
        ends_engine_after_seconds=3.0,
    ),
    Kind(
        name="out-of-memory-at-startup",
        text="The engine starts, runs out of GPU memory while it measures its peak, and dies",
        ends_engine_after_seconds=12.0,
    ),
    Kind(
        name="driver-too-old",
        text="The engine was upgraded to a CUDA that the driver is too old for: it does not start",
        ends_engine_after_seconds=3.0,
    ),
    Kind(
        name="driver-library-mismatch",
        text="The driver's libraries were upgraded under the loaded module: NVML and CUDA fail until a reboot",
        ends_engine_after_seconds=3.0,
    ),
    Kind(name="fp8-not-engaged", text="An FP8 model runs weight-only although the GPU has FP8 tensor cores"),
    Kind(name="single-stream", text="One request at a time, on as many GPUs as the engine has"),
    Kind(name="idle", text="Nobody sends a request", activity="idle"),
    Kind(name="no-engine", text="No serving engine runs", ends_engine_after_seconds=0.0),
    Kind(name="pcie-fallback", text="All NVLinks are down, and the engine falls back to PCIe at its start"),
    Kind(name="fabric-manager-dead", text="The fabric manager has died; the GPUs still say that all is well"),
    Kind(name="fabric-manager-restarted", text="The fabric manager is restarted, and all is well"),
    Kind(
        name="fabric-manager-dead-at-start",
        text="The fabric manager had died before the engine started: CUDA refuses (802)",
        ends_engine_after_seconds=3.0,
    ),
    Kind(
        name="fabric-manager-version",
        text="The fabric manager is of another version than the driver and refuses to start, so CUDA does too",
        ends_engine_after_seconds=3.0,
    ),
    Kind(
        name="oom-kill",
        text="The kernel's out-of-memory killer takes a worker, and the engine dies of it",
        parameters=(msgspec.structs.replace(RANK, default=0),),
        ends_engine_after_seconds=9.0,
    ),
    Kind(
        name="xid",
        text="The driver logs an Xid",
        parameters=(Parameter("code", "its number", minimum=1, maximum=999), GPU),
    ),
    Kind(
        name="sxid",
        text="The driver logs an SXid of an NVSwitch",
        parameters=(Parameter("code", "its number", minimum=1, maximum=99999),),
    ),
    Kind(name="kernel-log-denied", text="The kernel log may not be read"),
    Kind(name="engine-log-missing", text="The engine writes its log to a terminal"),
    Kind(name="metrics-down", text="The engine's metrics page does not answer"),
)
"""Faults that the engine, its logs and the host show, some of them with what NVML shows of the same."""

OF_THE_ENGINE = frozenset({"application-fault", "gpu-memory-fault", "gpu-memory-held", "kernel-hung"})
"""Faults of a GPU that the engine must use."""

KINDS: dict[str, Kind] = {kind.name: kind for kind in (*NVML_KINDS, *HOST_KINDS)}
"""All faults by name."""


def profile(name: str) -> Profile:
    """Return the profile of this name. Raises FaultError."""
    try:
        return PROFILES[name]
    except KeyError:
        raise FaultError(f"{name!r} is no profile; there are {', '.join(PROFILES)}") from None


def parse(text: str, node: Profile) -> Fault:
    """Read a fault as it is written on a command line: `nvlink-down:gpu=2,link=5,start=3`. Raises FaultError."""
    name, colon, rest = text.partition(":")
    name = name.strip()
    kind = KINDS.get(name)
    if kind is None:
        raise FaultError(f"{name!r} is no fault; there are {', '.join(KINDS)}")
    known = {parameter.name: parameter for parameter in (*kind.parameters, *TIMES)}
    values: dict[str, Value] = {}
    for part in rest.split(",") if colon else ():
        key, equals, word = (piece.strip() for piece in part.partition("="))
        if not equals or not word:
            raise FaultError(f"{text}: {part.strip()!r} is not name=value")
        if key not in known:
            raise FaultError(f"{text}: {name} has no parameter {key!r}; it takes {', '.join(known)}")
        if key in values:
            raise FaultError(f"{text}: {key} is given twice")
        values[key] = _value(known[key], word, text)
    for parameter in kind.parameters:
        if parameter.name not in values:
            if parameter.default is not None:
                values[parameter.name] = parameter.default
            elif not parameter.optional:
                raise FaultError(f"{text}: {name} needs {parameter.name} ({parameter.text})")
    start, end = (values.pop(parameter.name, None) for parameter in TIMES)
    fault = Fault(
        name=name,
        params={p.name: values[p.name] for p in kind.parameters if p.name in values},
        start_seconds=START_SECONDS if start is None else float(start),
        end_seconds=None if end is None else float(end),
    )
    if fault.end_seconds is not None and fault.end_seconds <= fault.start_seconds:
        raise FaultError(f"{text}: it ends before it starts")
    _fits(fault, node, text)
    return fault


def parse_all(texts: Iterable[str], node: Profile) -> tuple[Fault, ...]:
    """Read several faults. Raises FaultError."""
    return tuple(parse(text, node) for text in texts)


def _value(parameter: Parameter, word: str, text: str) -> Value:
    if parameter.kind == "str":
        if parameter.choices and word not in parameter.choices:
            raise FaultError(f"{text}: {parameter.name} is one of {', '.join(parameter.choices)}, not {word!r}")
        return word
    try:
        value = int(word) if parameter.kind == "int" else float(word)
    except ValueError:
        what = "a whole number" if parameter.kind == "int" else "a number"
        raise FaultError(f"{text}: {parameter.name} is {what}, not {word!r}") from None
    if not parameter.minimum <= value <= parameter.maximum or not math.isfinite(value):
        low, high = parameter.minimum, parameter.maximum
        bounds = f"from {low:g} to {high:g}" if math.isfinite(high) else f"at least {low:g}"
        raise FaultError(f"{text}: {parameter.name} is {'a finite number' if math.isinf(low) else bounds}, not {word}")
    return value


def _fits(fault: Fault, node: Profile, text: str) -> None:
    gpu = fault.params.get("gpu")
    if gpu is not None and gpu not in node.gpus:
        raise FaultError(f"{text}: {node.name} has GPUs 0 to {len(node.gpus) - 1}, not {gpu}")
    link = fault.params.get("link")
    if link is not None and node.wiring in {"none", "unbridged"}:
        raise FaultError(f"{text}: the GPUs of {node.name} have no NVLink in use")
    if link is not None and int(link) >= node.product.nvlinks:
        raise FaultError(f"{text}: the GPUs of {node.name} have NVLinks 0 to {node.product.nvlinks - 1}, not {link}")
    if fault.name.startswith("mig-") and not node.product.mig_slots:
        raise FaultError(f"{text}: {node.product.name} has no MIG")
    if fault.name == "symbol-missing" and not str(fault.params["name"]).startswith("nvml"):
        raise FaultError(f"{text}: {fault.params['name']!r} is no function of NVML; they begin with nvml")
    if fault.name in OF_THE_ENGINE and gpu not in node.workload.gpus:
        raise FaultError(f"{text}: the engine of {node.name} does not use GPU {gpu}")
    rank = fault.params.get("rank")
    if rank is not None and int(rank) >= node.workload.tensor_parallel_size:
        raise FaultError(f"{text}: the engine has ranks 0 to {node.workload.tensor_parallel_size - 1}, not {rank}")
    if (fault.name == "sxid" or fault.name.startswith("fabric-manager-")) and not node.fabric_manager:
        raise FaultError(f"{text}: {node.name} has no NVSwitch")
    if fault.name == "gpu-memory-fault" and not node.product.ecc:
        raise FaultError(f"{text}: {node.product.name} has no ECC memory that NVML tells of")
    if fault.name == "pcie-fallback" and node.wiring in {"none", "unbridged"}:
        raise FaultError(f"{text}: the GPUs of {node.name} have no NVLink in use")
    if fault.name == "single-stream" and node.workload.tensor_parallel_size < 2:
        raise FaultError(f"{text}: the engine of {node.name} has one GPU only")
    if fault.name in {"fabric-incomplete", "fabric-unhealthy"} and not node.fabric:
        raise FaultError(f"{text}: the GPUs of {node.name} don't register with an NVLink fabric")
