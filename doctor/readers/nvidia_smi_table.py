"""The table that `nvidia-smi` prints when it is asked for nothing in particular."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from doctor.readers.nvidia_smi_q import SmiReport
from doctor.snapshot import (
    Absent,
    Activity,
    Clocks,
    Ecc,
    Gpu,
    GpuMemory,
    GpuProcess,
    Maybe,
    Mig,
    MigDevice,
    Power,
    Stack,
    Thermal,
    Why,
    known,
)

_TITLE = re.compile(r"^\| NVIDIA-SMI \S+ +(?:Driver|KMD) Version: *(\S+) +(?:CUDA (?:UMD )?Version: *(\S+) +)?\|")
_FIRST = re.compile(
    r"^\| +(\d{1,4}) +(\S.*?) +(On|Off|N/A) +\| +([0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d) "
    r"(?: *\S+ *\| *(\d{1,9}|N/A|Off|ERR!|\S.*?) *\|)?"
)
_SECOND = re.compile(
    r"^\| *(\S+) +(\d+C|N/A|ERR!) +(P\d+|N/A|ERR!|Unknown) +(\S+(?: Error)?) */ *(\S+(?: Error)?) *\|"
    r" *(?:(\d{1,9})Mi?B / *(\d{1,9})Mi?B|N/A|\S.*?) *\| *(\d+%|N/A|ERR!) +(\S.*?) *\|"
)
_THIRD = re.compile(r"^\| +\| +\| +(Enabled|Disabled|N/A)(\*?) +\|")
_MIG = re.compile(r"^\| +(\d{1,4}) +(\d{1,3}) +(\d{1,3}) +(\d{1,3}) +\| +(\d{1,9})MiB / *(\d{1,9})MiB *\| *(\d{1,5}) ")
_PROCESS = re.compile(
    r"^\| +(\d{1,4}) +(\d+|N/A) +(\d+|N/A) +(\d{1,10}) +(C|G|C\+G|M\+C) +(\S.*?) +(\d{1,9}MiB|N/A) +\|"
)
_NO_MIG_DEVICES = re.compile(r"^\| +No MIG devices found")
_NOTHING_RUNS = re.compile(r"^\| +No running processes found")

_ROW_MAX = 256
"""The table is 91 columns wide, 79 in old drivers."""

_NOT_SHOWN = Absent(Why.NOT_SUPPORTED)
_OLD = Absent(Why.NOT_GIVEN, "this old table does not show it")
_FAILED = Absent(Why.FAILED, "nvidia-smi prints ERR!")

_COMPUTE_MODES = {"Default": "default", "E. Process": "exclusive-process", "Prohibited": "prohibited"}


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each table in *text*."""
    start: int | None = None
    position = end = 0
    before = 0
    for line in text.splitlines(keepends=True):
        if start is None and _TITLE.match(line):
            start = before
        elif start is not None and line.strip() and line[0] not in "+|":
            yield start, end
            start = None
        if start is None:
            before = position if line.startswith("+--") else position + len(line)
        position += len(line)
        if line.strip():
            end = position
    if start is not None:
        yield start, end


def read(text: str) -> SmiReport:
    """Return what the table says; lines that are none of its rows are passed over."""
    gpus: dict[int, Gpu] = {}
    devices: dict[int, list[MigDevice]] = {}
    processes: dict[int, list[GpuProcess]] = {}
    lists_processes = lists_devices = False
    stack = Stack()
    index: int | None = None
    for line in (row[:_ROW_MAX] for row in text.splitlines()):
        title, first, second, third = _TITLE.match(line), _FIRST.match(line), _SECOND.match(line), _THIRD.match(line)
        mig, process = _MIG.match(line), _PROCESS.match(line)
        if title:
            stack = Stack(driver=title[1], cuda_driver=title[2] or _OLD)
        elif first:
            index = int(first[1])
            gpus[index] = _named(index, first)
        elif second and index in gpus:
            gpus[index] = _measured(gpus[index], second)
        elif third and index in gpus:
            enabled: Maybe[bool] = {"Enabled": True, "Disabled": False}.get(third[1], _NOT_SHOWN)
            pending = (not enabled if third[2] else enabled) if known(enabled) else enabled  # a star: changes at reset
            gpus[index] = msgspec.structs.replace(gpus[index], mig=Mig(enabled=enabled, enabled_after_reset=pending))
        elif mig:
            devices.setdefault(int(mig[1]), []).append(_mig_device(mig))
        elif process:
            lists_processes = True
            processes.setdefault(int(process[1]), []).append(
                GpuProcess(
                    pid=int(process[4]),
                    used_bytes=_mebibytes(process[7].removesuffix("MiB")),
                    kind="graphics" if process[5] == "G" else "compute",
                    name=process[6],
                )
            )
        elif _NO_MIG_DEVICES.match(line):
            lists_devices = True
        elif _NOTHING_RUNS.match(line):
            lists_processes = True
    whole: list[Gpu] = []
    for number in sorted(gpus):
        gpu = gpus[number]
        if number in devices or (lists_devices and gpu.mig.enabled is True):
            found = tuple(devices.get(number, ()))
            gpu = msgspec.structs.replace(gpu, mig=msgspec.structs.replace(gpu.mig, devices=found))
        if lists_processes:
            gpu = msgspec.structs.replace(gpu, processes=tuple(processes.get(number, ())))
        whole.append(gpu)
    return SmiReport(stack=stack, gpus=tuple(whole))


def _named(index: int, row: re.Match[str]) -> Gpu:
    name: Maybe[str] = Absent(Why.NOT_GIVEN, "the table cuts it") if row[2].endswith("...") else row[2]
    return Gpu(
        uuid=f"index:{index}",
        index=index,
        name=name,
        pci_address=_address(row[4]),
        persistence_mode={"On": True, "Off": False}.get(row[3], _NOT_SHOWN),
        ecc=Ecc(uncorrected_volatile=_counted(row[5])),
        lost=False,
    )


def _measured(gpu: Gpu, row: re.Match[str]) -> Gpu:
    fan, temperature, state, draw, limit, used, total, busy, mode = row.groups()
    silent = temperature == state == busy == "ERR!"
    return msgspec.structs.replace(
        gpu,
        lost=_FAILED if silent else gpu.lost,
        thermal=Thermal(gpu_celsius=_number(temperature, "C"), fan_percent=_number(fan, "%")),
        clocks=Clocks(performance_state=int(state[1:]) if state[1:].isdigit() else _why(state)),
        power=Power(average_watts=_number(draw, "W"), limit_enforced_watts=_number(limit, "W")),
        memory=GpuMemory(used_bytes=_mebibytes(used), total_bytes=_mebibytes(total)),
        activity=Activity(gpu_ratio=ratio / 100 if known(ratio := _number(busy, "%")) else ratio),
        compute_mode=_COMPUTE_MODES.get(mode, _NOT_SHOWN),
    )


def _mig_device(row: re.Match[str]) -> MigDevice:
    return MigDevice(
        uuid=f"index:{row[1]}/mig:{row[4]}",
        gpu_instance=int(row[2]),
        compute_instance=int(row[3]),
        memory_used_bytes=_mebibytes(row[5]),
        memory_total_bytes=_mebibytes(row[6]),
        multiprocessors=int(row[7]),
    )


def _number(text: str, unit: str) -> Maybe[float]:
    digits = text.removesuffix(unit)
    return float(digits) if digits.isascii() and digits.isdigit() and len(digits) < 9 else _why(text)


def _counted(cell: str | None) -> Maybe[int]:
    """Return the count of the column "Volatile Uncorr. ECC": Off and N/A are boards without ECC."""
    if cell is not None and cell.isascii() and cell.isdigit():
        return int(cell)
    return _FAILED if cell == "ERR!" else _NOT_SHOWN


def _address(bus: str) -> str:
    domain, _, rest = bus.lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def _why(text: str) -> Absent:
    return _FAILED if "ERR" in text or "Error" in text else _NOT_SHOWN


def _mebibytes(text: str | None) -> Maybe[int]:
    return int(text) << 20 if text is not None and text.isascii() and text.isdigit() else _NOT_SHOWN
