"""`nvidia-smi -q`, whole or in part, as `Gpu` and `Stack`.

Labels of drivers 470 to 610 are known; what a driver does not print is absent as not given, what it prints as N/A as not supported.
"""

from __future__ import annotations

import datetime
import re
import textwrap
from collections.abc import Callable, Iterator
from typing import TypeVar

import msgspec

from doctor.readers.passages import passages
from doctor.snapshot import (
    Absent,
    Activity,
    Clocks,
    Ecc,
    Fabric,
    Gpu,
    GpuMemory,
    GpuProcess,
    Maybe,
    Mig,
    MigDevice,
    Pcie,
    Power,
    Stack,
    Thermal,
    Why,
)

T = TypeVar("T")

NOT_PRINTED = Absent(Why.NOT_GIVEN, "not in this nvidia-smi -q")

_REASONS = (
    (
        re.compile(r"^\[?(?:N/A|Not Supported|Requested functionality has been deprecated)", re.IGNORECASE),
        Why.NOT_SUPPORTED,
    ),
    (re.compile(r"GPU is lost|Lost", re.IGNORECASE), Why.LOST),
    (re.compile(r"Insufficient Permissions", re.IGNORECASE), Why.NO_PERMISSION),
    (re.compile(r"Unknown Error|ERR!|requires reset|Not Found", re.IGNORECASE), Why.FAILED),
)
"""Why there is no value, by what nvidia-smi prints in its place."""

_LINE = re.compile(r"^( *)(\S.*?)(?: +: ?|:$|$)(.*)$")
_GPU = re.compile(r"^GPU ([0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-7])\s*$")
_LOST = re.compile(
    r"Unable to (?:determine|detect) the device handle for (?:GPU|gpu)\d{0,4}?:? ?([0-9A-Fa-f]{3,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.[0-7]): *(.*)"
)
_HEADING = re.compile(r"^=+ ?NVSMI LOG ?=+\s*$")
_TOP = re.compile(
    r"^(?:Timestamp|Driver Version|CUDA Version|KMD Version|CUDA UMD Version|NVIDIA-SMI version|Attached \w+|HIC info|Unit \d+) *(?::.*)?$"
)
_PART = re.compile(
    r"^ {4}(?:Temperature|Fabric|(?:FB |BAR1 )Memory Usage|Clocks(?: Event Reasons| Throttle Reasons)?|ECC Errors|Utilization|Remapped Rows|Retired [Pp]ages"
    r"|(?:GPU )?Power Readings|MIG Mode|Product Name *:.*|Processes *(?::.*)?|PCI)\s*$"
)
_NUMBER = re.compile(r"^-?\d+(?:\.\d+)?")
_TIME = re.compile(r"^\w{3} (\w{3}) +(\d+) (\d\d):(\d\d):(\d\d) (\d{4})")
_MONTHS = ("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec")

_CAPABILITIES = {"Volta": (7, 0), "Turing": (7, 5), "Ada Lovelace": (8, 9), "Hopper": (9, 0)}
"""Architectures of one compute capability; Ampere and Blackwell have several."""

REASON_LABELS = {
    "gpu_idle": "Idle",
    "applications_clocks_setting": "Applications Clocks Setting",
    "sw_power_cap": "SW Power Cap",
    "hw_slowdown": "HW Slowdown",
    "hw_thermal_slowdown": "HW Thermal Slowdown",
    "hw_power_brake_slowdown": "HW Power Brake Slowdown",
    "sw_thermal_slowdown": "SW Thermal Slowdown",
    "sync_boost": "Sync Boost",
}
"""A clocks event reason as the XML and the columns of a query name it → its label in the plain log."""

_EVENT_REASONS = {
    "Idle": "idle",
    "Applications Clocks Setting": "applications-clocks",
    "SW Power Cap": "sw-power-cap",
    "HW Slowdown": "hw-slowdown",
    "HW Thermal Slowdown": "hw-thermal-slowdown",
    "HW Power Brake Slowdown": "hw-power-brake",
    "Sync Boost": "sync-boost",
    "SW Thermal Slowdown": "sw-thermal-slowdown",
    "Display Clock Setting": "display-clocks",
    "Board Limit": "board-limit",
    "Reliability": "reliability",
}
"""Label → name in `EVENT_REASONS`. The last two are of driver 615 and their labels guessed."""

_KINDS = {"C": "compute", "G": "graphics", "C+G": "compute+graphics", "M+C": "compute"}

_LINE_MAX = 1024
_DEPTH_MAX = 16


class SmiReport(msgspec.Struct, frozen=True, kw_only=True):
    """What `nvidia-smi -q` says."""

    at: float | None = None
    """Its time stamp, taken for UTC."""
    stack: Stack = Stack()
    gpus: tuple[Gpu, ...] = ()
    virtual_machine: Maybe[bool] = NOT_PRINTED
    """Whether the GPUs are passed through to a virtual machine."""


class _Node:
    """A label, its value, and what is indented under it."""

    __slots__ = ("children", "label", "value")

    def __init__(self, label: str, value: str) -> None:
        self.label = label
        self.value = value
        self.children: list[_Node] = []

    def under(self, *labels: str) -> _Node | None:
        """Return the first child with one of these labels."""
        return next((child for label in labels for child in self.children if child.label == label), None)

    def at(self, *path: str) -> _Node | None:
        """Return the node at this path of labels."""
        node: _Node | None = self
        for label in path:
            node = node.under(label) if node else None
        return node


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each `-q` log in *text*, and of parts of one (`-q -d TEMPERATURE`)."""
    return passages(text, _begins, _belongs, divides=_HEADING.match)


_BARE_PART = re.compile(
    r"^(?:Temperature|Fabric|ECC Errors|Remapped Rows|Retired [Pp]ages|(?:GPU )?Power Readings|Clocks (?:Event|Throttle) Reasons|MIG Mode)[ \t]*\n"
    r"(?: {2,}\S[^\n]*(?:\n|\Z))+",
    re.MULTILINE,
)


def find_bare(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each part of such a log that lost its indentation when it was pasted."""
    for match in _BARE_PART.finditer(text):
        if ": " in match[0]:
            yield match.span()


def read_bare(text: str) -> SmiReport:
    """Return what such a part says."""
    return read(textwrap.indent(text, "    "))


def _begins(line: str) -> bool:
    return (_GPU.match(line) or _PART.match(line) or _LOST.search(line)) is not None


def read(text: str) -> SmiReport:
    """Return what the text says; what is no part of such a log is passed over."""
    top = _tree(text)
    gpus: list[Gpu] = []
    for node in top.children:
        lost = _LOST.search(node.label + " " + node.value)
        if lost:
            gpus.append(_lost(lost, len(gpus)))
        elif _GPU.match(node.label) and node.children:
            gpus.append(_gpu(node, len(gpus)))
    if not gpus and any(_PART.match(" " * 4 + child.label) for child in top.children):
        gpus.append(_gpu(top, 0))  # a part without its GPU: the first one, for want of a better name
    attached = _value(top.under("Attached GPUs"), _integer)
    if isinstance(attached, int) and attached > len(gpus):
        gpus = _by_minor_number(top, gpus)
    driver = _text(top.under("KMD Version", "Driver Version"))
    cuda = _text(top.under("CUDA UMD Version", "CUDA Version"))
    return SmiReport(
        at=_unix(top.under("Timestamp")),
        stack=Stack(driver=_version(driver), cuda_driver=_version(cuda)),
        gpus=with_known_uuids(gpus),
        virtual_machine=_is_virtual(top),
    )


def _is_virtual(top: _Node) -> Maybe[bool]:
    modes = [node.at("GPU Virtualization Mode", "Virtualization Mode") for node in top.children]
    words = {mode.value for mode in modes if mode is not None}
    return NOT_PRINTED if not words or "N/A" in words else not words <= {"None", "Host VGPU", "Host VSGA"}


def gpu_of(text: str, index: int) -> Gpu:
    """Return the GPU that a part of such a log, without the line that names the GPU, is about."""
    return _gpu(_tree(text), index)


def _by_minor_number(top: _Node, gpus: list[Gpu]) -> list[Gpu]:
    """Return the GPUs of `nvidia-smi -q -i N`, whose place in the log is not their index, by their device files' numbers."""
    nodes = [node for node in top.children if _GPU.match(node.label) and node.children]
    numbers = [_value(node.under("Minor Number"), _integer) for node in nodes]
    if len(nodes) != len(gpus) or not all(isinstance(number, int) for number in numbers):
        return gpus
    renumbered: list[Gpu] = []
    for gpu, number in zip(gpus, numbers, strict=True):
        index = number if isinstance(number, int) else gpu.index
        uuid = f"index:{index}" if gpu.uuid.startswith("index:") else gpu.uuid
        renumbered.append(msgspec.structs.replace(gpu, index=index, uuid=uuid))
    return renumbered


def with_known_uuids(gpus: list[Gpu]) -> tuple[Gpu, ...]:
    """Return the GPUs, those with a masked UUID (all zeros, or the same as another's) named by their index instead."""
    uuids = [gpu.uuid for gpu in gpus]
    return tuple(
        msgspec.structs.replace(gpu, uuid=f"index:{gpu.index}")
        if is_masked(gpu.uuid) or uuids.count(gpu.uuid) > 1
        else gpu
        for gpu in gpus
    )


def is_masked(uuid: str) -> bool:
    """Whether somebody has taken the identity out: zeros, dots or x in place of the digits."""
    return not set(uuid.removeprefix("GPU-").removeprefix("MIG-").lower()) - set("0-.x*…")


def _belongs(line: str) -> bool:
    return (
        not line.strip()
        or line.startswith("    ")
        or _GPU.match(line) is not None
        or _TOP.match(line) is not None
        or _LOST.search(line) is not None
    )


def _tree(text: str) -> _Node:
    top = _Node("", "")
    stack: list[tuple[int, _Node]] = [(-1, top)]
    for line in text.splitlines():
        parts = _LINE.match(line[:_LINE_MAX].expandtabs(8))
        if parts is None:
            continue
        indent, node = len(parts[1]), _Node(parts[2].strip(), parts[3].strip())
        while stack[-1][0] >= indent:
            stack.pop()
        stack[-1][1].children.append(node)
        if len(stack) < _DEPTH_MAX:
            stack.append((indent, node))
    return top


def _lost(line: re.Match[str], index: int) -> Gpu:
    return Gpu(
        uuid=f"index:{index}",
        index=index,
        pci_address=_address(line[1]),
        lost="lost" in line[2].lower() or Absent(Why.FAILED, line[2]),
    )


def _gpu(node: _Node, index: int) -> Gpu:
    uuid = _text(node.under("GPU UUID"))
    known_uuid = uuid if isinstance(uuid, str) else f"index:{index}"
    header = _GPU.match(node.label)
    bus = _value(node.at("PCI", "Bus Id"), str)
    architecture = node.under("Product Architecture")
    processes = _processes(node)
    return Gpu(
        uuid=known_uuid,
        index=index,
        pci_address=_address(header[1]) if header else _address(bus) if isinstance(bus, str) else bus,
        pci_device_id=_value(node.at("PCI", "Device Id"), _device_id),
        pci_subsystem_id=_value(node.at("PCI", "Sub System Id"), _device_id),
        name=_text(node.under("Product Name")),
        serial=_text(node.under("Serial Number")),
        vbios_version=_text(node.under("VBIOS Version")),
        inforom_version=_text(node.at("Inforom Version", "Image Version")),
        compute_capability=_CAPABILITIES.get(architecture.value if architecture else "", NOT_PRINTED),
        persistence_mode=_value(node.under("Persistence Mode"), _enabled),
        compute_mode=_value(node.under("Compute Mode"), lambda v: v.lower().replace("_", "-")),
        lost=(_says_lost(node) if header else NOT_PRINTED),
        recovery_action=_value(node.under("GPU Recovery Action"), lambda v: v.lower().replace(" ", "-")),
        memory=GpuMemory(
            total_bytes=_value(node.at("FB Memory Usage", "Total"), _bytes),
            used_bytes=_value(node.at("FB Memory Usage", "Used"), _bytes),
            free_bytes=_value(node.at("FB Memory Usage", "Free"), _bytes),
            reserved_bytes=_value(node.at("FB Memory Usage", "Reserved"), _bytes),
            bar1_total_bytes=_value(node.at("BAR1 Memory Usage", "Total"), _bytes),
            bar1_used_bytes=_value(node.at("BAR1 Memory Usage", "Used"), _bytes),
        ),
        mig=_mig(node, index, processes),
        thermal=_thermal(node),
        clocks=_clocks(node),
        power=_power(node),
        activity=Activity(
            gpu_ratio=_value(node.at("Utilization", "GPU") or node.at("Utilization", "Gpu"), _ratio),
            memory_ratio=_value(node.at("Utilization", "Memory"), _ratio),
            pcie_tx_bytes_per_second=_value(node.at("PCI", "Tx Throughput"), _kilobytes),
            pcie_rx_bytes_per_second=_value(node.at("PCI", "Rx Throughput"), _kilobytes),
        ),
        pcie=Pcie(
            generation=_value(node.at("PCI", "GPU Link Info", "PCIe Generation", "Current"), _integer),
            generation_max=_value(node.at("PCI", "GPU Link Info", "PCIe Generation", "Max"), _integer),
            width=_value(node.at("PCI", "GPU Link Info", "Link Width", "Current"), _integer),
            width_max=_value(node.at("PCI", "GPU Link Info", "Link Width", "Max"), _integer),
            replays_total=_value(node.at("PCI", "Replays Since Reset"), _integer),
        ),
        ecc=_ecc(node),
        links=Absent(Why.NOT_GIVEN, "nvidia-smi -q does not print NVLinks: add nvidia-smi nvlink -s"),
        fabric=_fabric(node.under("Fabric")),
        processes=processes if isinstance(processes, Absent) else tuple(process for _, process in processes),
    )


def _says_lost(node: _Node) -> bool:
    """Whether nvidia-smi prints that the GPU is lost in place of its values."""
    return any(child.value.startswith("GPU is lost") for child in node.children)


_Placed = tuple[tuple[int, int] | None, GpuProcess]
"""A process, and the GPU instance and compute instance in which it runs."""


def _processes(node: _Node) -> Maybe[tuple[_Placed, ...]]:
    part = node.under("Processes")
    if part is None:
        return NOT_PRINTED
    if part.value and not part.children:
        return () if part.value == "None" else _absent(part.value)
    found: list[_Placed] = []
    instance: list[int | None] = [None, None]
    for child in part.children:
        number = _integer(child.value)
        if child.label == "GPU instance ID":
            instance = [number, None]
        elif child.label == "Compute instance ID":
            instance[1] = number
        elif child.label == "Process ID" and number is not None:
            kind = child.under("Type")
            process = GpuProcess(
                pid=number,
                used_bytes=_value(child.under("Used GPU Memory"), _bytes),
                kind=_KINDS.get(kind.value, "compute") if kind else "compute",
                name=_text(child.under("Name")),
            )
            gpu_instance, compute_instance = instance
            place = None if gpu_instance is None or compute_instance is None else (gpu_instance, compute_instance)
            found.append((place, process))
    return tuple(found)


def _mig(node: _Node, index: int, processes: Maybe[tuple[_Placed, ...]]) -> Mig:
    devices: list[MigDevice] = []
    for device in node.children:
        if device.label != "MIG Device":
            continue
        gpu_instance = _value(device.under("GPU Instance ID"), _integer)
        compute_instance = _value(device.under("Compute Instance ID"), _integer)
        number = device.under("Index")
        devices.append(
            MigDevice(
                uuid=f"index:{index}/mig:{number.value if number else len(devices)}",
                gpu_instance=gpu_instance,
                compute_instance=compute_instance,
                profile=NOT_PRINTED,
                memory_total_bytes=_value(
                    device.at("Shared FB Memory Usage", "Total") or device.at("FB Memory Usage", "Total"), _bytes
                ),
                memory_used_bytes=_value(
                    device.at("Shared FB Memory Usage", "Used") or device.at("FB Memory Usage", "Used"), _bytes
                ),
                multiprocessors=_value(device.at("Device Attributes", "Shared", "Multiprocessor count"), _integer),
                processes=processes
                if isinstance(processes, Absent)
                else tuple(process for place, process in processes if place == (gpu_instance, compute_instance)),
            )
        )
    current = node.at("MIG Mode", "Current")
    return Mig(
        enabled=_value(current, _enabled),
        enabled_after_reset=_value(node.at("MIG Mode", "Pending"), _enabled),
        devices=tuple(devices) if devices or current else NOT_PRINTED,
    )


def _thermal(node: _Node) -> Thermal:
    part = node.under("Temperature") or _Node("", "")
    return Thermal(
        gpu_celsius=_value(part.under("GPU Current Temp"), _number),
        memory_celsius=_value(part.under("Memory Current Temp"), _number),
        margin_celsius=_value(part.under("GPU T.Limit Temp", "GPU Current T.Limit Temp"), _number),
        slowdown_margin_celsius=_value(part.under("GPU Slowdown T.Limit Temp"), _number),
        shutdown_margin_celsius=_value(part.under("GPU Shutdown T.Limit Temp"), _number),
        slowdown_celsius=_value(part.under("GPU Slowdown Temp"), _number),
        shutdown_celsius=_value(part.under("GPU Shutdown Temp"), _number),
        gpu_max_celsius=_value(part.under("GPU Max Operating Temp"), _number),
        memory_max_celsius=_value(part.under("Memory Max Operating Temp"), _number),
        fan_percent=_value(node.under("Fan Speed"), _number),
    )


def _clocks(node: _Node) -> Clocks:
    reasons = node.under("Clocks Event Reasons", "Clocks Throttle Reasons")
    counters = node.under("Clocks Event Reasons Counters") or _Node("", "")
    return Clocks(
        sm_mhz=_value(node.at("Clocks", "SM"), _integer),
        sm_max_mhz=_value(node.at("Max Clocks", "SM"), _integer),
        memory_mhz=_value(node.at("Clocks", "Memory"), _integer),
        memory_max_mhz=_value(node.at("Max Clocks", "Memory"), _integer),
        performance_state=_value(node.under("Performance State"), lambda v: _integer(v[1:])),
        event_reasons=_event_reasons(reasons) if reasons else NOT_PRINTED,
        sw_power_cap_seconds=_value(counters.under("SW Power Capping"), _microseconds),
        sync_boost_seconds=_value(counters.under("Sync Boost"), _microseconds),
        sw_thermal_seconds=_value(counters.under("SW Thermal Slowdown"), _microseconds),
        hw_thermal_seconds=_value(counters.under("HW Thermal Slowdown"), _microseconds),
        power_brake_seconds=_value(counters.under("HW Power Braking"), _microseconds),
    )


def _event_reasons(part: _Node) -> Maybe[tuple[str, ...]]:
    if part.value and not part.children:
        return _absent(part.value)
    rows = [row for child in part.children for row in (child, *child.children)]
    return tuple(
        sorted(_EVENT_REASONS[row.label] for row in rows if row.value == "Active" and row.label in _EVENT_REASONS)
    )


def _power(node: _Node) -> Power:
    part = node.under("GPU Power Readings", "Power Readings") or _Node("", "")
    ceiling = part.under("GPU Ceiling Power Limit") or part  # a level of its own since 610
    return Power(
        average_watts=_value(part.under("Average Power Draw", "Power Draw"), _number),
        instant_watts=_value(part.under("Instantaneous Power Draw"), _number),
        limit_watts=_value(ceiling.under("Requested Power Limit", "Power Limit"), _number),
        limit_enforced_watts=_value(ceiling.under("Current Power Limit", "Enforced Power Limit"), _number),
        limit_default_watts=_value(ceiling.under("Default Power Limit"), _number),
        limit_min_watts=_value(part.under("Min Power Limit"), _number),
        limit_max_watts=_value(part.under("Max Power Limit"), _number),
    )


def _ecc(node: _Node) -> Ecc:
    errors = node.under("ECC Errors") or _Node("", "")
    beyond_repair = errors.under("Unrepairable Memory")  # since 580, beside the repairs of channels and TPCs
    repairs = (errors.under("Channel Repair Pending"), errors.under("TPC Repair Pending"))
    rows = node.under("Remapped Rows")
    missing = _absent(rows.value) if rows and rows.value and not rows.children else NOT_PRINTED
    rows = rows or _Node("", "")
    return Ecc(
        enabled=_value(node.at("ECC Mode", "Current") or node.at("Ecc Mode", "Current"), _enabled),
        corrected_volatile=_errors(errors.under("Volatile"), "Correctable", "Single Bit"),
        uncorrected_volatile=_errors(errors.under("Volatile"), "Uncorrectable", "Double Bit"),
        corrected_aggregate=_errors(errors.under("Aggregate"), "Correctable", "Single Bit"),
        uncorrected_aggregate=_errors(errors.under("Aggregate"), "Uncorrectable", "Double Bit"),
        sram_threshold_exceeded=_value(errors.at("Aggregate", "SRAM Threshold Exceeded"), _yes),
        rows_remapped_corrected=_value(rows.under("Correctable Error"), _integer, missing),
        rows_remapped_uncorrected=_value(rows.under("Uncorrectable Error"), _integer, missing),
        remap_pending=True
        if _retires(node) or any(map(_says_yes, repairs))
        else _value(rows.under("Pending"), _yes, missing),
        remap_failed=True
        if _says_yes(beyond_repair)
        else _value(rows.under("Remapping Failure Occurred"), _yes, missing),
    )


def _retires(node: _Node) -> bool:
    """Whether pages wait to be retired, which is what boards before Ampere do instead of remapping rows."""
    pages = node.under("Retired Pages", "Retired pages") or _Node("", "")
    pending = pages.under("Pending Page Blacklist", "Pending")
    return _says_yes(pending)


def _says_yes(node: _Node | None) -> bool:
    return node is not None and node.value == "Yes"


def _errors(part: _Node | None, kind: str, old: str) -> Maybe[int]:
    """Return the sum over SRAM and DRAM; before Ampere the rows were single bit and double bit, with a total."""
    if part is None:
        return NOT_PRINTED
    total = part.at(old, "Total")
    rows = [total] if total else [row for row in part.children if f" {kind}" in f" {row.label}"]
    counts = [_integer(row.value) for row in rows]
    known = [count for count in counts if count is not None]
    if known:
        return sum(known)
    return _absent(rows[0].value) if rows else NOT_PRINTED


def _fabric(part: _Node | None) -> Fabric:
    if part is None:
        return Fabric(state=NOT_PRINTED, status=NOT_PRINTED, health=NOT_PRINTED)
    state = part.under("State")
    health = part.under("Health") or _Node("", "")
    summary = health.under("Summary")
    completed = state is not None and state.value == "Completed"
    faults = tuple(
        f"{row.label}: {row.value}"
        for row in health.children
        if row.value.lower() in {"true", "yes", "degraded"}
        or (row.label == "Incorrect Configuration" and row.value.lower() not in {"n/a", "none", "not supported"})
    )
    if completed and summary is not None and summary.value == "N/A":
        word: Maybe[str] = "not-reported"  # mask 0: normal off NVL72
    else:
        word = _value(summary, lambda v: v.lower().replace(" ", "-"))
    return Fabric(
        state=_value(state, lambda v: v.lower().replace(" ", "-")),
        status=_text(part.under("Status")),
        health=word,
        unhealthy=faults,
    )


def _value(node: _Node | None, convert: Callable[[str], T | None], missing: Absent = NOT_PRINTED) -> Maybe[T]:
    if node is None or (not node.value and node.children):
        return missing
    for pattern, _ in _REASONS:
        if pattern.search(node.value):
            return _absent(node.value)
    converted = convert(node.value)
    return Absent(Why.FAILED, f"nvidia-smi prints {node.value[:60]!r}") if converted is None else converted


def _text(node: _Node | None) -> Maybe[str]:
    return _value(node, lambda v: v or None)


def _absent(value: str) -> Absent:
    for pattern, why in _REASONS:
        if pattern.search(value):
            return Absent(why, "" if why is Why.NOT_SUPPORTED else value[:60])
    return Absent(Why.FAILED, f"nvidia-smi prints {value[:60]!r}")


def _version(value: Maybe[str]) -> Maybe[str]:
    return value if isinstance(value, Absent) else value.partition(" ")[0]


def _address(bus: str) -> str:
    domain, _, rest = bus.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}" if re.fullmatch(r"[0-9a-f]+", domain) else bus.lower()


def _device_id(value: str) -> str | None:
    digits = re.fullmatch(r"(?:0x)?([0-9A-Fa-f]{4})([0-9A-Fa-f]{4})", value)  # bare in the XML
    return f"{digits[2]}:{digits[1]}".lower() if digits else None


def _number(value: str) -> float | None:
    number = _NUMBER.match(value)
    return float(number[0]) if number and len(number[0]) < 24 else None


def _integer(value: str) -> int | None:
    number = _number(value)
    return None if number is None else int(number)


def _bytes(value: str) -> int | None:
    number = _number(value)
    factor = {"MiB": 1 << 20, "GiB": 1 << 30, "KiB": 1 << 10, "B": 1}.get(value.rpartition(" ")[2])
    return None if number is None or factor is None else int(number * factor)


def _kilobytes(value: str) -> float | None:
    number = _number(value)
    return None if number is None else number * 1000


def _ratio(value: str) -> float | None:
    number = _number(value)
    return None if number is None else number / 100


def _microseconds(value: str) -> float | None:
    number = _number(value)
    return None if number is None else number / 1e6


def _enabled(value: str) -> bool | None:
    return {"Enabled": True, "Disabled": False}.get(value)


def _yes(value: str) -> bool | None:
    return {"Yes": True, "No": False}.get(value)


def _unix(node: _Node | None) -> float | None:
    stamp = _TIME.match(node.value) if node else None
    if stamp is None or stamp[1] not in _MONTHS:
        return None
    day, hour, minute, second, year = (int(part) for part in stamp.groups()[1:])
    try:
        return datetime.datetime(
            year, _MONTHS.index(stamp[1]) + 1, day, hour, minute, second, tzinfo=datetime.timezone.utc
        ).timestamp()
    except ValueError:
        return None
