"""The host without NVML: PCI tree, driver module, blocked tasks, memory, IOMMU, processors."""

from __future__ import annotations

import math
import re
import struct
import time
from collections.abc import Callable, Container, Iterable, Iterator
from pathlib import Path

from doctor.collectors import files
from doctor.collectors.collector import CannotSeeError, Reading, Visit
from doctor.collectors.cpu_share import cpu_share, pressure_ratio
from doctor.collectors.processes import booted_at
from doctor.collectors.tasks import Task, Tasks, task_of
from doctor.snapshot import Absent, BlockedTask, DriverGpu, Host, Maybe, Node, PciDevice, Source, Why

NVIDIA = "0x10de"

KINDS = {"0300": "gpu", "0302": "gpu", "0680": "nvswitch"}
"""By PCI class: VGA and 3D controllers are GPUs; NVIDIA's only bridges of class 0680 are NVSwitches
(`10de:22a3` on HGX H100, `10de:1af1` on HGX A100; lspci samples)."""

GENERATIONS = {"2.5": 1, "5.0": 2, "5": 2, "8.0": 3, "8": 3, "16.0": 4, "16": 4, "32.0": 5, "32": 5, "64.0": 6, "64": 6}
"""PCI Express generation by transfer rate in GT/s, as sysfs writes it (`32.0 GT/s PCIe`)."""

DEAD_WIDTH = 63
"""All bits of the width field: the device does not answer, its config space reads as ones."""

_ADDRESS = re.compile(r"^[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-7]$")


# The PCI tree ----------------------------------------------------------------------------------------------------


def pci_devices(root: Path) -> tuple[PciDevice, ...]:
    """Return the NVIDIA GPUs and NVSwitches of the PCI tree, by address. Raises OSError."""
    devices: list[PciDevice] = []
    for folder in sorted((root / "sys/bus/pci/devices").iterdir()):
        try:
            if files.word_of(folder / "vendor") != NVIDIA or (folder / "physfn").exists():
                continue  # a virtual function belongs to a guest
            kind = KINDS.get(files.word_of(folder / "class")[2:6])
            if kind is not None:
                devices.append(_device(folder, kind))
        except OSError:  # it was removed while we looked
            continue
    return tuple(devices)


def _device(folder: Path, kind: str) -> PciDevice:
    here = folder.resolve()  # /sys/devices/pci0000:17/0000:17:01.0/0000:18:00.0
    ports = [parent for parent in here.parents if _ADDRESS.match(parent.name)]
    no_port = Absent(Why.NOT_PRESENT, "no port above it: a virtual machine shows the device on its root bus")
    return PciDevice(
        address=folder.name,
        device_id=f"10de:{files.word_of(folder / 'device')[2:]}",
        kind=kind,
        driver=_driver(folder),
        generation=_generation(here / "current_link_speed"),
        generation_max=_generation(here / "max_link_speed"),
        width=_width(here / "current_link_width"),
        width_max=_width(here / "max_link_width"),
        numa_node=_numa_node(here / "numa_node"),
        upstream=ports[0].name if ports else no_port,
        upstream_generation=_generation(ports[0] / "current_link_speed") if ports else no_port,
        upstream_generation_max=_generation(ports[0] / "max_link_speed") if ports else no_port,
        upstream_width=_width(ports[0] / "current_link_width") if ports else no_port,
        upstream_width_max=_width(ports[0] / "max_link_width") if ports else no_port,
        acs_enabled=_acs_enabled(ports) if ports else no_port,
    )


def _driver(folder: Path) -> Maybe[str]:
    try:
        return (folder / "driver").readlink().name
    except OSError:
        return Absent(Why.NOT_PRESENT, "no driver is bound to it")


def _generation(path: Path) -> Maybe[int]:
    generation = files.maybe(path, lambda text: GENERATIONS.get(text.split()[0], 0))
    return generation or Absent(Why.LOST, "the device does not tell its link speed: it may be gone")


def _width(path: Path) -> Maybe[int]:
    width = files.maybe(path, int)
    if width in {0, DEAD_WIDTH}:
        return Absent(Why.LOST, "the device does not tell its link width: it may be gone")
    return width


def _numa_node(path: Path) -> Maybe[int]:
    node = files.maybe(path, int)
    return Absent(Why.NOT_PRESENT, "the firmware names no NUMA node") if node == -1 else node


ACS_CAPABILITY = 0x000D
ACS_CONTROL = 6
"""Offset of the control register in the capability (PCI Express Base Specification, 7.7.8.3)."""
ACS_REDIRECTS = 0x4 | 0x8 | 0x10
"""P2P request redirect, P2P completion redirect, upstream forwarding: each sends peer traffic to the root complex."""

EXTENDED_CAPABILITIES = 0x100
"""Where they begin in the configuration space; without CAP_SYS_ADMIN the kernel shows only the first 64 bytes."""


def _acs_enabled(ports: list[Path]) -> Maybe[bool]:
    """Return whether a port above the device redirects peer traffic."""
    for port in ports:
        try:
            space = (port / "config").read_bytes()
        except OSError as e:
            return files.why_not(e, f"the configuration space of {port.name}")
        if len(space) <= EXTENDED_CAPABILITIES:
            return Absent(Why.NO_PERMISSION, "ACS stands in the extended configuration space: run as root to read it")
        if any(control & ACS_REDIRECTS for control in _acs_controls(space)):
            return True
    return False


def _acs_controls(space: bytes) -> Iterator[int]:
    at = EXTENDED_CAPABILITIES
    seen: set[int] = set()
    while EXTENDED_CAPABILITIES <= at <= len(space) - 8 and at not in seen:
        seen.add(at)
        (header,) = struct.unpack_from("<I", space, at)
        if header & 0xFFFF == ACS_CAPABILITY:
            yield struct.unpack_from("<H", space, at + ACS_CONTROL)[0]
        at = header >> 20


def iommu(root: Path, addresses: tuple[str, ...]) -> Maybe[str]:
    """Return how the IOMMU treats these devices: `off`, `passthrough` or `translated`."""
    groups = root / "sys/kernel/iommu_groups"
    try:
        if not any(groups.iterdir()):
            return "off"
    except OSError as e:
        return files.why_not(e, groups)
    types: set[str] = set()
    for address in addresses:
        kind = files.maybe(root / f"sys/bus/pci/devices/{address}/iommu_group/type", str)
        if not isinstance(kind, Absent):
            types.add(kind)
    if not types:
        return Absent(Why.NOT_PRESENT, "no NVIDIA device stands in an IOMMU group")
    return "passthrough" if types == {"identity"} else "translated"


# The driver ------------------------------------------------------------------------------------------------------

_MODULE_VERSION = re.compile(r"Kernel Module(?: for \S+)?\s+(\d+(?:\.\d+)+)")


def driver_module(root: Path) -> Maybe[str]:
    """Return the version of the loaded `nvidia` kernel module."""
    version = files.maybe(root / "sys/module/nvidia/version", str)
    if isinstance(version, str):
        return version
    line = files.maybe(root / "proc/driver/nvidia/version", str)
    if isinstance(line, str) and (match := _MODULE_VERSION.search(line)):
        return match[1]
    if version.why is Why.NOT_PRESENT:
        return Absent(Why.NOT_PRESENT, "the nvidia kernel module is not loaded")
    return version


def driver_gpus(root: Path) -> Maybe[tuple[DriverGpu, ...]]:
    """Return the GPUs that the driver has bound, from its own cache."""
    devices = files.informations(root / "proc/driver/nvidia/gpus")
    if isinstance(devices, Absent):
        return devices
    return tuple(_driver_gpu(address, facts) for address, facts in devices)


def _driver_gpu(address: str, facts: Maybe[dict[str, str]]) -> DriverGpu:
    if isinstance(facts, Absent):
        return DriverGpu(pci_address=address, name=facts, uuid=facts, excluded=facts)
    not_told = Absent(Why.MISSING_SYMBOL, "this driver does not tell")
    return DriverGpu(
        pci_address=address,
        name=facts.get("Model", not_told),
        uuid=facts.get("GPU UUID", not_told),
        excluded=facts["GPU Excluded"] == "Yes" if "GPU Excluded" in facts else not_told,
    )


# Tasks and memory ------------------------------------------------------------------------------------------------


THREADS_SECONDS = 30.0
"""How often the threads of an engine's processes are looked at: hundreds each, and a hang lasts. guess"""


class BlockedThreads:
    """Which processes of engines have a thread that hangs in the kernel. One that has is looked at again each time."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seen: dict[int, tuple[float, bool]] = {}
        """By process: when its threads were looked at, and whether one hung."""

    def among(self, pid: int, folder: str) -> bool:
        """Whether one of the threads in *folder* hangs, as it was when they were last looked at."""
        looked_at, hung = self._seen.get(pid, (-math.inf, False))
        now = self._clock()
        if hung or now - looked_at >= THREADS_SECONDS:
            hung = "D" in _states_of_threads(folder)
            self._seen[pid] = now, hung
        return hung

    def forget_all_but(self, pids: Container[int]) -> None:
        """Forget processes that are no engine's any more: their numbers may be given to others."""
        self._seen = {pid: seen for pid, seen in self._seen.items() if pid in pids}


def blocked_tasks(
    root: Path, tasks: Iterable[Task], threads: BlockedThreads, engine_pids: frozenset[int]
) -> Maybe[tuple[BlockedTask, ...]]:
    """Return the tasks in state D that are the driver's, its tools' or an engine's; *tasks*: the processes."""
    blocked: list[BlockedTask] = []
    proc = root / "proc"
    threads.forget_all_but(engine_pids)
    try:
        for task in tasks:
            if task.pid in engine_pids:
                hangs = task.state == "D" or threads.among(task.pid, f"{proc}/{task.pid}/task")
            else:
                hangs = task.state == "D" and _is_of_driver(task.name)
            if hangs:
                blocked.append(BlockedTask(task.pid, task.name))
    except OSError as e:
        return files.why_not(e, proc)
    return tuple(sorted(blocked, key=lambda task: task.pid))


def _states_of_threads(folder: str) -> Iterator[str]:
    try:
        names = files.names_in(folder)
    except OSError:
        return
    for name in names:
        thread = task_of(f"{folder}/{name}")
        if thread is not None:
            yield thread.state


def _is_of_driver(name: str) -> bool:
    """Whether a task is NVIDIA's by its name: `nvidia-smi`, `nv_queue`, `nv-fabricmanager`; `nvme` is a disk."""
    return name.startswith("nv") and not name.startswith("nvme")


def _memory_bytes(text: str, name: str) -> int:
    lines = dict(line.split(":", 1) for line in text.splitlines() if ":" in line)
    return int(lines.get(name, "").split()[0]) * 1024  # kB, says proc_meminfo(5)


def _full_pressure_ratio(text: str) -> float:
    full = next((line for line in text.splitlines() if line.startswith("full ")), "")
    words = dict(word.split("=") for word in full.split()[1:])
    return round(float(words.get("avg60", "")) / 100, 4)


def _is_virtual(text: str) -> bool:
    flags = next((line for line in text.splitlines() if line.startswith("flags")), "")
    if not flags:
        msg = "no flags: not an x86 processor"
        raise ValueError(msg)
    return "hypervisor" in flags.split()


class HostState:
    """The host: what /sys and /proc tell of it, NVML aside."""

    source = Source.HOST
    deadline_seconds = 3.0
    after_engines = True

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self._tasks = Tasks(root, of_kernel=_is_of_driver)
        self._threads = BlockedThreads()

    def collect(self, visit: Visit) -> Reading:
        """Look at the host. Raises CannotSeeError when there is neither /sys nor /proc."""
        root = self.root
        if not (root / "proc/stat").exists() and not (root / "sys/bus").exists():
            raise CannotSeeError(Absent(Why.FAILED, f"neither {root / 'proc'} nor {root / 'sys'} is mounted"))
        try:
            devices: Maybe[tuple[PciDevice, ...]] = pci_devices(root)
        except OSError as e:
            devices = files.why_not(e, root / "sys/bus/pci/devices")
        addresses = () if isinstance(devices, Absent) else tuple(device.address for device in devices)
        engine_pids = frozenset(
            pid for engine in visit.engines for pid in (engine.pid, *(rank.pid for rank in engine.ranks))
        )
        meminfo = root / "proc/meminfo"
        host = Host(
            pci_devices=devices,
            driver_module=driver_module(root),
            driver_gpus=driver_gpus(root),
            blocked_tasks=blocked_tasks(root, self._tasks, self._threads, engine_pids),
            iommu=iommu(root, addresses),
            memory_total_bytes=files.maybe(meminfo, lambda text: _memory_bytes(text, "MemTotal")),
            memory_available_bytes=files.maybe(meminfo, lambda text: _memory_bytes(text, "MemAvailable")),
            memory_pressure_ratio=files.maybe(root / "proc/pressure/memory", _full_pressure_ratio),
            cpu_pressure_ratio=files.maybe(root / "proc/pressure/cpu", pressure_ratio),
            virtual_machine=files.maybe(root / "proc/cpuinfo", _is_virtual),
        )
        shares = {engine.id: {"cpu_share": cpu_share(root, engine.pid)} for engine in visit.engines}
        return Reading(fields={"host": host, "node": Node(booted_at=_boot(root))}, engine_fields=shares)

    def close(self) -> None:
        """Nothing is held between visits."""


def _boot(root: Path) -> Maybe[float]:
    try:
        return booted_at(root)
    except (OSError, ValueError) as e:
        return Absent(Why.FAILED, f"the time of boot: {e}")
