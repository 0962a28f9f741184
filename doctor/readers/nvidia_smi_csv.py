"""`nvidia-smi --query-gpu=… --format=csv`: its columns as the labels of `nvidia-smi -q`, read by the same reader.

Names of columns are those of `nvidia-smi --help-query-gpu` (590) and what older drivers called them.
"""

from __future__ import annotations

import csv
import datetime
import re
from collections.abc import Iterator, Mapping

import msgspec

from doctor.readers import nvidia_smi_q
from doctor.readers.nvidia_smi_q import SmiReport
from doctor.snapshot import EVENT_REASONS, Absent, Gpu, Stack, Why, known

ROWS_MAX = 20_000
"""Rows read of one table: eight GPUs every ten seconds over seven hours."""

REPORTS_MAX = 256
"""Looks kept of a table that goes on, the last ones."""

_LINE_MAX = 4096

_VOLATILE, _AGGREGATE = ("ECC Errors", "Volatile"), ("ECC Errors", "Aggregate")

_PATHS: dict[str, tuple[str, ...]] = {
    "name": ("Product Name",),
    "gpu_name": ("Product Name",),
    "uuid": ("GPU UUID",),
    "gpu_uuid": ("GPU UUID",),
    "serial": ("Serial Number",),
    "gpu_serial": ("Serial Number",),
    "vbios_version": ("VBIOS Version",),
    "inforom.img": ("Inforom Version", "Image Version"),
    "persistence_mode": ("Persistence Mode",),
    "compute_mode": ("Compute Mode",),
    "gpu_recovery_action": ("GPU Recovery Action",),
    "fan.speed": ("Fan Speed",),
    "pstate": ("Performance State",),
    "mig.mode.current": ("MIG Mode", "Current"),
    "mig.mode.pending": ("MIG Mode", "Pending"),
    # PCI
    "pci.bus_id": ("PCI", "Bus Id"),
    "gpu_bus_id": ("PCI", "Bus Id"),
    "pci.device_id": ("PCI", "Device Id"),
    "pci.sub_device_id": ("PCI", "Sub System Id"),
    "pcie.link.gen.current": ("PCI", "GPU Link Info", "PCIe Generation", "Current"),
    "pcie.link.gen.gpucurrent": ("PCI", "GPU Link Info", "PCIe Generation", "Current"),
    "pcie.link.gen.max": ("PCI", "GPU Link Info", "PCIe Generation", "Max"),
    "pcie.link.width.current": ("PCI", "GPU Link Info", "Link Width", "Current"),
    "pcie.link.width.max": ("PCI", "GPU Link Info", "Link Width", "Max"),
    # Memory
    "memory.total": ("FB Memory Usage", "Total"),
    "memory.used": ("FB Memory Usage", "Used"),
    "memory.free": ("FB Memory Usage", "Free"),
    "memory.reserved": ("FB Memory Usage", "Reserved"),
    # Activity, clocks
    "utilization.gpu": ("Utilization", "GPU"),
    "utilization.memory": ("Utilization", "Memory"),
    "clocks.sm": ("Clocks", "SM"),
    "clocks.current.sm": ("Clocks", "SM"),
    "clocks.mem": ("Clocks", "Memory"),
    "clocks.current.memory": ("Clocks", "Memory"),
    "clocks.max.sm": ("Max Clocks", "SM"),
    "clocks.max.mem": ("Max Clocks", "Memory"),
    "clocks.max.memory": ("Max Clocks", "Memory"),
    "clocks_event_reasons_counters.sw_power_cap": ("Clocks Event Reasons Counters", "SW Power Capping"),
    "clocks_event_reasons_counters.sync_boost": ("Clocks Event Reasons Counters", "Sync Boost"),
    "clocks_event_reasons_counters.sw_thermal_slowdown": ("Clocks Event Reasons Counters", "SW Thermal Slowdown"),
    "clocks_event_reasons_counters.hw_thermal_slowdown": ("Clocks Event Reasons Counters", "HW Thermal Slowdown"),
    "clocks_event_reasons_counters.hw_power_brake_slowdown": ("Clocks Event Reasons Counters", "HW Power Braking"),
    # Heat
    "temperature.gpu": ("Temperature", "GPU Current Temp"),
    "temperature.gpu.tlimit": ("Temperature", "GPU T.Limit Temp"),
    "temperature.memory": ("Temperature", "Memory Current Temp"),
    # Power
    "power.draw": ("GPU Power Readings", "Power Draw"),
    "power.draw.average": ("GPU Power Readings", "Average Power Draw"),
    "power.draw.instant": ("GPU Power Readings", "Instantaneous Power Draw"),
    "power.limit": ("GPU Power Readings", "Requested Power Limit"),
    "enforced.power.limit": ("GPU Power Readings", "Current Power Limit"),
    "power.default_limit": ("GPU Power Readings", "Default Power Limit"),
    "power.min_limit": ("GPU Power Readings", "Min Power Limit"),
    "power.max_limit": ("GPU Power Readings", "Max Power Limit"),
    # Errors
    "ecc.mode.current": ("ECC Mode", "Current"),
    "ecc.errors.corrected.volatile.total": (*_VOLATILE, "DRAM Correctable"),
    "ecc.errors.uncorrected.volatile.total": (*_VOLATILE, "DRAM Uncorrectable"),
    "ecc.errors.corrected.aggregate.total": (*_AGGREGATE, "DRAM Correctable"),
    "ecc.errors.uncorrected.aggregate.total": (*_AGGREGATE, "DRAM Uncorrectable"),
    "ecc.errors.uncorrected.aggregate.sram.thresholdexceeded": (*_AGGREGATE, "SRAM Threshold Exceeded"),
    "retired_pages.pending": ("Retired Pages", "Pending Page Blacklist"),
    "remapped_rows.correctable": ("Remapped Rows", "Correctable Error"),
    "remapped_rows.uncorrectable": ("Remapped Rows", "Uncorrectable Error"),
    "remapped_rows.pending": ("Remapped Rows", "Pending"),
    "remapped_rows.failure": ("Remapped Rows", "Remapping Failure Occurred"),
    # Fabric
    "fabric.state": ("Fabric", "State"),
    "fabric.status": ("Fabric", "Status"),
    "fabric.health.summary": ("Fabric", "Health", "Summary"),
    "fabric.health.bandwidth": ("Fabric", "Health", "Bandwidth"),
    "fabric.health.route_unhealthy": ("Fabric", "Health", "Route Unhealthy"),
    "fabric.health.incorrect_configuration": ("Fabric", "Health", "Incorrect Configuration"),
}
"""Column → path of labels in the plain log."""

_REASON_COLUMN = re.compile(r"clocks_(?:event|throttle)_reasons\.(\w+)$")

_OTHERS = frozenset({"timestamp", "index", "count", "driver_version", "compute_cap", "hostname"})
"""Columns that are no label of a GPU's log."""

_COLUMN = re.compile(r"[a-z][\w.]*(?: \[\S{1,8}\])?\s*$", re.IGNORECASE)
_COMMAND = re.compile(r"\bnvidia-smi\b.*?--query-gpu[= ]([\w.,]+).*\bcsv\b")
_WORD = r"[A-Za-z][\w.]*(?: \[[^\]\n]{1,8}\])?"
_HEAD = re.compile(rf"^[ \t]*{_WORD}(?:, ?{_WORD})*[ \t\r]*$|^[^\n]*--query-gpu[^\n]*$", re.MULTILINE)
"""A line that may be a table's head, or the command of one without."""
_UNIT = re.compile(r"^(.*?) \[(\S{1,8})\]$")
_STAMP = re.compile(r"(\d{4})/(\d\d)/(\d\d) (\d\d):(\d\d):(\d\d)")


class Columns(msgspec.Struct, frozen=True):
    """What the columns of a table are."""

    names: tuple[str, ...]
    units: tuple[str, ...]
    """Empty where the column has none."""


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each table, with the command above it where there is one."""
    end = 0
    for head in _HEAD.finditer(text):
        if head.start() < end:
            continue
        columns = _columns_of(head[0].strip())
        if columns is None:
            continue
        end = position = min(head.end() + 1, len(text))
        while position < len(text):
            newline = text.find("\n", position)
            following = len(text) if newline < 0 else newline + 1
            line = text[position:following].strip()
            if line:
                again = _columns_of(line)
                columns = again or columns
                if again is None and not _is_row(line, columns):
                    break
                end = following
            position = following
        yield head.start(), end


def reports(text: str) -> tuple[SmiReport, ...]:
    """Return what a table says, one report a look: where a GPU comes again, the next look begins."""
    columns: Columns | None = None
    looks: list[dict[int, Mapping[str, str]]] = []
    for n, line in enumerate(text.splitlines()):
        if n >= ROWS_MAX:
            break
        plain = line.strip()
        head = _columns_of(plain)
        if head is not None:
            columns = head
        elif columns is not None and _is_row(plain, columns):
            row = _row(plain, columns)
            index = row.get("index", "")
            place = int(index) if index.isdecimal() and len(index) <= 3 else None
            if not looks or (place in looks[-1] if place is not None else _is_again(row, looks[-1])):
                looks.append({})
            looks[-1][len(looks[-1]) if place is None else place] = row
    return tuple(_report(look) for look in looks[-REPORTS_MAX:])


def _is_again(row: Mapping[str, str], look: Mapping[int, Mapping[str, str]]) -> bool:
    """Whether a row without an index names a GPU that this look has, or is of another moment."""
    for name in ("uuid", "gpu_uuid", "pci.bus_id", "gpu_bus_id"):
        if name in row:
            return any(other.get(name) == row[name] for other in look.values())
    return "timestamp" in row and any(other.get("timestamp") != row["timestamp"] for other in look.values())


def _columns_of(line: str) -> Columns | None:
    """Return the columns that a head, or the command of a table without one, names; None where the line is neither."""
    if len(line) > _LINE_MAX:
        return None
    command = _COMMAND.search(line)
    words = command[1].split(",") if command else [word.strip() for word in line.split(",")]
    if not all(_COLUMN.match(word) for word in words):
        return None
    parted = [_UNIT.match(word) for word in words]
    names = tuple(part[1] if part else word.strip() for part, word in zip(parted, words, strict=True))
    names = tuple(name.lower() for name in names)
    ours = [name for name in names if name in _PATHS or name in _OTHERS or _REASON_COLUMN.match(name)]
    if "retired_pages.address" in names:  # a list of pages, not of GPUs
        return None
    if not ours or 2 * len(ours) < len(names) or (len(names) == 1 and not command and "." not in line):
        return None
    return Columns(names, tuple(part[2] if part else "" for part in parted))


def _is_row(line: str, columns: Columns) -> bool:
    return len(line) <= _LINE_MAX and len(_cells(line)) == len(columns.names) and not _COMMAND.search(line)


def _cells(line: str) -> list[str]:
    try:
        return [cell.strip() for row in csv.reader([line], skipinitialspace=True) for cell in row]
    except csv.Error:
        return []


def _row(line: str, columns: Columns) -> dict[str, str]:
    row: dict[str, str] = {}
    for name, unit, cell in zip(columns.names, columns.units, _cells(line), strict=True):
        row[name] = f"{cell} {unit}" if unit and re.fullmatch(r"-?\d+(?:\.\d+)?", cell) else cell
    return row


def _report(look: Mapping[int, Mapping[str, str]]) -> SmiReport:
    first = next(iter(look.values()))
    driver = first.get("driver_version", "")
    return SmiReport(
        at=_unix(first.get("timestamp", "")),
        stack=Stack(driver=driver) if re.fullmatch(r"\d+(?:\.\d+)+", driver) else Stack(),
        gpus=nvidia_smi_q.with_known_uuids([_gpu(row, index) for index, row in look.items()]),
    )


def _gpu(row: Mapping[str, str], index: int) -> Gpu:
    values: dict[tuple[str, ...], str] = {}
    for name, value in row.items():
        reason = _REASON_COLUMN.match(name)
        label = nvidia_smi_q.REASON_LABELS.get(reason[1]) if reason else None
        path = ("Clocks Event Reasons", label) if label else _PATHS.get(name)
        if path is not None:
            values[path] = _plain(value, path)
    gpu = nvidia_smi_q.gpu_of("\n".join(_lines(values)), index)
    active = row.get("clocks_event_reasons.active") or row.get("clocks_throttle_reasons.active") or ""
    if re.fullmatch(r"0x[0-9A-Fa-f]{1,16}", active):
        reasons = tuple(sorted(reason for bit, reason in EVENT_REASONS.items() if int(active, 16) & bit))
        gpu = msgspec.structs.replace(gpu, clocks=msgspec.structs.replace(gpu.clocks, event_reasons=reasons))
    if capability := re.fullmatch(r"(\d{1,2})\.(\d)", row.get("compute_cap", "")):
        gpu = msgspec.structs.replace(gpu, compute_capability=(int(capability[1]), int(capability[2])))
    if any("GPU is lost" in value for value in row.values()):
        gpu = msgspec.structs.replace(gpu, lost=True)
    elif not known(gpu.links):
        gpu = msgspec.structs.replace(gpu, links=Absent(Why.NOT_GIVEN, "add nvidia-smi nvlink -s"))
    return gpu


def _plain(value: str, path: tuple[str, ...]) -> str:
    """Return a cell as the plain log has it: `[N/A]` is N/A, a reason's bare bit is a word."""
    value = value.strip("[]") if value.startswith("[") else value
    if path[0] == "Clocks Event Reasons":
        return {"0": "Not Active", "1": "Active"}.get(value, value)
    if path[-1] in ("Pending", "Remapping Failure Occurred", "Pending Page Blacklist"):
        return {"0": "No", "1": "Yes"}.get(value, value)
    if path[0] == "FB Memory Usage" and value.isdecimal():  # asked without a head and without units
        return f"{value} MiB"
    return value


def _lines(values: Mapping[tuple[str, ...], str]) -> Iterator[str]:
    """Yield the lines of a log that holds these values."""
    before: tuple[str, ...] = ()
    for path in sorted(values):
        for depth, label in enumerate(path):
            if path[: depth + 1] != before[: depth + 1]:
                yield "    " * depth + (f"{label} : {values[path]}" if depth == len(path) - 1 else label)
        before = path


def _unix(stamp: str) -> float | None:
    found = _STAMP.match(stamp)
    if found is None:
        return None
    try:
        return datetime.datetime(*map(int, found.groups()), tzinfo=datetime.timezone.utc).timestamp()  # type: ignore[misc]
    except ValueError:
        return None
