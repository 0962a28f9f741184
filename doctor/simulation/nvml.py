"""NVML of a simulated node: it stands where `libnvidia-ml.so.1` is, so that all of pynvml's own code runs.

`pynvml.nvmlLib = library(drill)`. Its attributes are callables with the C functions' signatures: they take what pynvml
hands to C (references, pointers, `c_uint`, structs with a version), fill it in and return an `nvmlReturn_t`.
A symbol that is newer than the simulated driver does not exist.
"""

from __future__ import annotations

import ctypes
import os
import select
import struct
import time
import uuid
from collections.abc import Callable
from typing import Any

import msgspec

from doctor.simulation.faults import RECOVERY_ACTIONS, Fault
from doctor.simulation.physics import Drill, GpuState, Physics
from doctor.simulation.profiles import NO_LINK

SUCCESS = 0
UNINITIALIZED = 1
INVALID_ARGUMENT = 2
NOT_SUPPORTED = 3
NO_PERMISSION = 4
NOT_FOUND = 6
INSUFFICIENT_SIZE = 7
DRIVER_NOT_LOADED = 9
GPU_IS_LOST = 15
LIB_RM_VERSION_MISMATCH = 18
ARGUMENT_VERSION_MISMATCH = 25

ERROR_TEXTS = {
    SUCCESS: b"Success",
    UNINITIALIZED: b"Uninitialized",
    INVALID_ARGUMENT: b"Invalid Argument",
    NOT_SUPPORTED: b"Not Supported",
    NO_PERMISSION: b"Insufficient Permissions",
    NOT_FOUND: b"Not Found",
    INSUFFICIENT_SIZE: b"Insufficient Size",
    DRIVER_NOT_LOADED: b"Driver Not Loaded",
    GPU_IS_LOST: b"GPU is lost",
    ARGUMENT_VERSION_MISMATCH: b"Argument version mismatch",
}

UNSIGNED, UNSIGNED_LONG_LONG, SIGNED = 1, 3, 5
FIELD_VALUE = struct.Struct("@IIqqIIQ")
"""nvmlFieldValue_t: field, scope, timestamp, latency, type, return, value."""

ROOT_ONLY = frozenset({"nvmlDeviceGetSramEccErrorStatus"})
ANCESTORS = {"PIX": 10, "PXB": 20, "PHB": 30, "NODE": 40, "SYS": 50}
P2P_READ, P2P_WRITE, P2P_NVLINK, P2P_ATOMICS = range(4)
P2P_CHIPSET_NOT_SUPPORTED, P2P_GPU_NOT_SUPPORTED, P2P_NOT_SUPPORTED = 1, 2, 5
REMOTE_GPU, REMOTE_SWITCH = 0, 2

MIG_SLICES = ((3, 40448, 60, 2), (2, 20096, 32, 3), (1, 9984, 16, 9), (1, 9984, 16, 10))
"""Slices, MiB, multiprocessors and GPU instance id, from a capture of an H100; other boards in proportion (guess)."""

FOREIGN_PID = 9377
FOREIGN_NAME = "/usr/bin/python3"

GPM_MIN_SECONDS = 0.1


class _RefusalError(Exception):
    """NVML says no."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class _Device:
    """What a handle points to: a GPU, or a MIG device of it."""

    def __init__(self, gpu: int, mig: int | None = None) -> None:
        self.gpu = gpu
        self.mig = mig


class _Opaque(ctypes.Structure):
    """Something that has an address."""


class _GpmSample:
    def __init__(self) -> None:
        self.at = 0.0
        self.gpu = -1


Function = Callable[..., int]
SYMBOLS: dict[str, tuple[int, Function]] = {}
"""The C functions there are, each with the driver branch that first had it."""


def _since(branch: int, *names: str) -> Callable[[Function], Function]:
    """Register a C function under its names; *branch*: the driver that first had it (450: older than we care)."""

    def register(function: Function) -> Function:
        SYMBOLS.update(dict.fromkeys(names, (branch, function)))
        return function

    return register


def _number(argument: Any) -> int:
    """Return an argument as C sees it. ctypes refuses what is no number, and so does this."""
    if isinstance(argument, int):
        return argument
    value = getattr(argument, "value", None)
    if not isinstance(value, int):
        raise ctypes.ArgumentError(f"Don't know how to convert {argument!r}")
    return value


def _text(buffer: Any, size: Any, text: bytes) -> int:
    if len(text) >= _number(size):
        return INSUFFICIENT_SIZE
    buffer.value = text
    return SUCCESS


def _is_hung_up() -> bool:
    """Whether standard input is a pipe that nobody holds the other end of: the NVML child is asked through one."""
    poll = select.poll()
    poll.register(0, 0)
    return any(event & select.POLLHUP for _, event in poll.poll(0))


class Library:
    """The simulated `libnvidia-ml.so.1`."""

    def __init__(self, drill: Drill) -> None:
        self._drill = drill
        self._node = drill.node
        self.product = drill.node.product
        self._engine = drill.engine
        self._engine_ends = drill.engine_ends_seconds
        self._physics = Physics(drill)
        self._driver = drill.driver_at(self._now) or drill.driver
        """That on which it was opened."""
        self._initialized = 0
        self._parent = os.getppid()
        self._kept: list[_Opaque] = []
        self._devices: dict[int, _Device] = {}
        self._handles: dict[tuple[int, int | None], _Opaque] = {}
        self._samples: dict[int, _GpmSample] = {}
        self._hangs = [fault for fault in drill.faults if fault.name == "driver-hung"]
        self._losses = [fault for fault in drill.faults if fault.name in {"gpu-lost", "gpu-removed"}]
        self._removals = [fault for fault in drill.faults if fault.name == "gpu-removed"]
        self._reloads = any(fault.name == "driver-reloaded" for fault in drill.faults)
        self._migs = [fault for fault in drill.faults if fault.name == "mig-enabled"]
        self._link_faults = [
            (fault, self._links_of(fault)) for fault in drill.faults if fault.name.startswith("nvlink")
        ]

    def __getattr__(self, name: str) -> Function:
        branch, function = SYMBOLS.get(name, (0, None))
        missing = any(f.name == "symbol-missing" and f.params["name"] == name for f in self._drill.faults)
        if function is None or branch > self._branch or missing:
            raise AttributeError(name)

        def call(*arguments: Any) -> int:
            if self._hangs:
                self._hang()
            if name not in {"nvmlInitWithFlags", "nvmlErrorString"} and not self._is_open():
                return UNINITIALIZED
            if self._denied(name):
                return NO_PERMISSION
            try:
                return function(self, *arguments)
            except _RefusalError as refusal:
                return refusal.status

        return call

    @property
    def _branch(self) -> int:
        return int(self._driver.partition(".")[0])

    def _is_open(self) -> bool:
        """Whether it was opened on the driver that is loaded now."""
        return self._initialized > 0 and (not self._reloads or self._drill.driver_at(self._now) == self._driver)

    # Time, faults and handles.

    @property
    def _now(self) -> float:
        return time.time() - self._drill.started_at

    def _active(self, name: str, gpu: int | None = None) -> Fault | None:
        return self._drill.active(name, self._now, gpu)

    def _hang(self) -> None:
        while any(fault.active(self._now) for fault in self._hangs):
            time.sleep(0.05)
            # The kernel would keep a real caller; a drill must not outlive its audience, not even one that left early.
            if os.getppid() != self._parent or _is_hung_up():
                raise SystemExit(0)

    def _denied(self, name: str) -> bool:
        fault = self._active("permission-denied") if self._drill.faults else None
        return fault is not None and (fault.params["calls"] == "all" or name in ROOT_ONLY)

    def _device(self, handle: Any) -> _Device:
        try:
            device = self._devices[ctypes.addressof(handle.contents)]
        except (KeyError, ValueError):
            raise _RefusalError(INVALID_ARGUMENT) from None
        if self._losses and any(fault.hits(device.gpu) and fault.active(self._now) for fault in self._losses):
            raise _RefusalError(GPU_IS_LOST)
        return device

    def gpu_of(self, handle: Any) -> int:
        """Return the GPU that a handle points to."""
        return self._device(handle).gpu

    def state(self, gpu: int) -> GpuState:
        """Return the GPU's state now."""
        return self._physics.at(self._now).gpus[gpu]

    def _give(self, reference: Any, gpu: int, mig: int | None = None) -> None:
        key = (gpu, mig)
        if key not in self._handles:
            self._handles[key] = opaque = _Opaque()
            self._devices[ctypes.addressof(opaque)] = _Device(gpu, mig)
        pointer = reference._obj
        ctypes.memmove(ctypes.byref(pointer), ctypes.byref(ctypes.c_void_p(ctypes.addressof(self._handles[key]))), 8)

    def _present(self) -> list[int]:
        """Return the GPUs that there are: those behind a removed one move up."""
        return [
            gpu
            for gpu in self._node.gpus
            if not any(fault.hits(gpu) and fault.active(self._now) for fault in self._removals)
        ]

    def _mig(self, gpu: int) -> bool:
        return bool(self._migs) and any(fault.hits(gpu) and fault.active(self._now) for fault in self._migs)

    def _links_of(self, fault: Fault) -> frozenset[tuple[int, int]]:
        """Return the links that a fault takes down, with their far ends."""
        if fault.name == "nvlink-down":
            ends = {(int(fault.params["gpu"]), int(fault.params["link"]))}
        elif fault.name == "nvlinks-all-down":
            ends = {(gpu, link) for gpu in self._node.gpus if fault.hits(gpu) for link in range(self.product.nvlinks)}
        else:
            return frozenset()
        far = {end for gpu, link in ends if (end := self._node.far_end(gpu, link))}
        return frozenset(ends | far)

    def _link_active(self, gpu: int, link: int) -> bool:
        if self._node.wiring in {"none", "unbridged"}:
            return False
        return not any((gpu, link) in links and fault.active(self._now) for fault, links in self._link_faults)

    def _link(self, gpu: int, link: Any) -> int:
        number = _number(link)
        if self._mig(gpu):
            raise _RefusalError(NOT_SUPPORTED)
        if number >= self.product.nvlinks:
            raise _RefusalError(INVALID_ARGUMENT if self.product.nvlinks else NOT_SUPPORTED)
        return number

    def _link_errors(self, gpu: int, link: int) -> tuple[int, int, int]:
        """Return replays, recoveries and CRC errors."""
        replays = 0
        for fault, _ in self._link_faults:
            if fault.name == "nvlink-errors" and fault.hits(gpu) and fault.params["link"] == link:
                replays += int(fault.elapsed(self._now) * fault.number("rate"))
        return replays, replays // 20, replays * 3

    def _processes(self, gpu: int) -> list[tuple[int, int]]:
        """Return pid and bytes of each process."""
        now = self._now
        found: list[tuple[int, int]] = []
        if gpu in self._engine.gpus and self._engine.started_seconds <= now < self._engine_ends:
            pid = self._engine.rank_pids[self._engine.gpus.index(gpu)]
            found.append((pid, int(self.product.total_bytes * self._engine.memory_utilization)))
        if foreign := self._drill.active("foreign-process", now, gpu):
            found.append((FOREIGN_PID, int(foreign.number("gib") * (1 << 30))))
        return found

    def _memory(self, gpu: int) -> tuple[int, int, int, int]:
        """Return total, reserved, used and free bytes."""
        total = self.product.total_bytes
        reserved = self.product.reserved_mib << 20
        used = min(total - reserved, sum(used for _, used in self._processes(gpu)))
        return total, reserved, used, total - reserved - used

    def _mig_slice(self, device: _Device) -> tuple[int, int, int, int]:
        if device.mig is None:
            raise _RefusalError(INVALID_ARGUMENT)
        slices, mib, multiprocessors, instance = MIG_SLICES[device.mig]
        return slices, mib * self.product.memory_mib // 81559, multiprocessors, instance

    # What the plain getters ask for.

    def performance_state(self, gpu: int) -> int:
        """Return the P-state: GeForce boards rest in P8, data-centre boards in P0."""
        return self.product.performance_state_idle if self.state(gpu).activity == "idle" else 0

    def pcie_generation(self, gpu: int) -> int:
        """Return the current generation: trained too low by a fault, or resting."""
        if fault := self._active("pcie-generation", gpu):
            return min(int(fault.params["generation"]), self.product.pcie_generation)
        idle = self.state(gpu).activity == "idle"
        return self.product.pcie_generation_idle if idle else self.product.pcie_generation

    def pcie_width(self, gpu: int) -> int:
        """Return the current number of lanes."""
        fault = self._active("pcie-width", gpu)
        return int(fault.params["width"]) if fault else 16

    def fan_percent(self, gpu: int) -> int | None:
        """Return the fan's speed; boards for servers have none."""
        return None if self.product.ecc else round(min(100.0, max(30.0, self.state(gpu).gpu_celsius)))

    def power_usage_milliwatts(self, gpu: int) -> int:
        """Return instant power on GA100, and the mean of a second on what is newer."""
        state = self.state(gpu)
        instant = self.product.compute_capability == (8, 0)
        return int((state.power_watts if instant else state.average_watts) * 1000)

    # The system.

    @_since(450, "nvmlInitWithFlags")
    def _init(self, _flags: int) -> int:
        if self._active("driver-library-mismatch"):
            return LIB_RM_VERSION_MISMATCH
        driver = self._drill.driver_at(self._now)
        if driver is None:
            return DRIVER_NOT_LOADED
        self._driver = driver
        self._initialized += 1
        return SUCCESS

    @_since(450, "nvmlShutdown")
    def _shutdown(self) -> int:
        self._initialized -= 1
        return SUCCESS

    @_since(450, "nvmlErrorString")
    def _error_string(self, status: int) -> Any:
        return ERROR_TEXTS.get(status, b"Unknown Error")

    @_since(450, "nvmlSystemGetDriverVersion")
    def _driver_version(self, buffer: Any, size: Any) -> int:
        return _text(buffer, size, self._driver.encode())

    @_since(450, "nvmlSystemGetNVMLVersion")
    def _nvml_version(self, buffer: Any, size: Any) -> int:
        return _text(buffer, size, f"{self._drill.cuda_of(self._driver).partition('.')[0]}.{self._driver}".encode())

    @_since(450, "nvmlSystemGetCudaDriverVersion_v2")
    def _cuda_driver_version(self, out: Any) -> int:
        major, _, minor = self._drill.cuda_of(self._driver).partition(".")
        out._obj.value = int(major) * 1000 + int(minor) * 10
        return SUCCESS

    @_since(450, "nvmlSystemGetProcessName")
    def _process_name(self, pid: Any, buffer: Any, size: Any) -> int:
        number = _number(pid)
        if number == FOREIGN_PID:
            return _text(buffer, size, FOREIGN_NAME.encode())
        if number in self._engine.rank_pids:
            return _text(buffer, size, self._engine.title(self._engine.rank_pids.index(number)).encode())
        return NOT_FOUND

    @_since(450, "nvmlDeviceGetCount_v2")
    def _count(self, out: Any) -> int:
        out._obj.value = len(self._present())
        return SUCCESS

    @_since(450, "nvmlDeviceGetHandleByIndex_v2")
    def _handle_by_index(self, index: Any, out: Any) -> int:
        present = self._present()
        if not 0 <= _number(index) < len(present):
            return INVALID_ARGUMENT
        gpu = present[_number(index)]
        if self._active("gpu-lost", gpu):
            return GPU_IS_LOST
        self._give(out, gpu)
        return SUCCESS

    # What a GPU is.

    @_since(450, "nvmlDeviceGetName")
    def _name(self, handle: Any, buffer: Any, size: Any) -> int:
        device = self._device(handle)
        name = self.product.name
        if device.mig is not None:
            slices, mib, *_ = self._mig_slice(device)
            name += f" MIG {slices}g.{-(-mib // 1024)}gb"
        return _text(buffer, size, name.encode())

    @_since(450, "nvmlDeviceGetUUID")
    def _uuid(self, handle: Any, buffer: Any, size: Any) -> int:
        device = self._device(handle)
        text = self._node.uuid(device.gpu)
        if device.mig is not None:
            text = f"MIG-{uuid.uuid5(uuid.NAMESPACE_DNS, f'{text}.{device.mig}')}"
        return _text(buffer, size, text.encode())

    @_since(450, "nvmlDeviceGetSerial")
    def _serial(self, handle: Any, buffer: Any, size: Any) -> int:
        gpu = self.gpu_of(handle)
        if not self.product.ecc:
            return NOT_SUPPORTED  # GeForce boards have none
        garbage = self._active("nvml-garbage-serial", gpu)
        return _text(buffer, size, b"\xff\xfe16\x80" if garbage else self._node.serial(gpu).encode())

    @_since(450, "nvmlDeviceGetVbiosVersion")
    def _vbios(self, handle: Any, buffer: Any, size: Any) -> int:
        self._device(handle)
        return _text(buffer, size, self.product.vbios.encode())

    @_since(450, "nvmlDeviceGetInforomImageVersion")
    def _inforom(self, handle: Any, buffer: Any, size: Any) -> int:
        self._device(handle)
        return _text(buffer, size, self.product.inforom.encode())

    def _fill_pci(self, info: Any, address: str, device_id: str, subsystem_id: str = "") -> None:
        domain, bus, rest = address.split(":")
        info.busIdLegacy = address.upper().encode()
        info.busId = f"0000{address}".upper().encode()
        info.domain, info.bus, info.device = int(domain, 16), int(bus, 16), int(rest[:2], 16)
        info.pciDeviceId = _pci_word(device_id)
        info.pciSubSystemId = _pci_word(subsystem_id) if subsystem_id else 0

    @_since(450, "nvmlDeviceGetPciInfo_v3")
    def _pci(self, handle: Any, out: Any) -> int:
        gpu = self.gpu_of(handle)
        self._fill_pci(
            out._obj, self._node.pci_addresses[gpu], self.product.pci_device_id, self.product.pci_subsystem_id
        )
        return SUCCESS

    @_since(450, "nvmlDeviceGetCudaComputeCapability")
    def _capability(self, handle: Any, major: Any, minor: Any) -> int:
        self._device(handle)
        major._obj.value, minor._obj.value = self.product.compute_capability
        return SUCCESS

    @_since(450, "nvmlDeviceGetMemoryAffinity")
    def _memory_affinity(self, handle: Any, size: int, out: Any, _scope: Any) -> int:
        numa = self._node.numa_nodes[self.gpu_of(handle)]
        for word in range(size):
            out._obj[word] = 1 << (numa % 64) if numa // 64 == word else 0
        return SUCCESS

    # What it does.

    @_since(450, "nvmlDeviceGetMemoryInfo")
    def _memory_info(self, handle: Any, out: Any) -> int:
        total, reserved, used, free = self._memory(self.gpu_of(handle))
        out._obj.total, out._obj.used, out._obj.free = total, used + reserved, free
        return SUCCESS

    @_since(510, "nvmlDeviceGetMemoryInfo_v2")
    def _memory_info_v2(self, handle: Any, out: Any) -> int:
        device = self._device(handle)
        info = out._obj
        _check_version(info, 0x02000028)
        info.total, info.reserved, info.used, info.free = self._memory(device.gpu)
        if device.mig is not None:
            total = self._mig_slice(device)[1] << 20
            info.total, info.reserved, info.used, info.free = total, 0, 10 << 20, total - (10 << 20)
        return SUCCESS

    @_since(450, "nvmlDeviceGetBAR1MemoryInfo")
    def _bar1(self, handle: Any, out: Any) -> int:
        used = self._memory(self.gpu_of(handle))[2] + (1 << 20)
        info = out._obj
        info.bar1Total = self.product.bar1_mib << 20
        info.bar1Used = min(used, info.bar1Total)
        info.bar1Free = info.bar1Total - info.bar1Used
        return SUCCESS

    @_since(450, "nvmlDeviceGetMigMode")
    def _mig_mode(self, handle: Any, current: Any, pending: Any) -> int:
        gpu = self.gpu_of(handle)
        if not self.product.mig_slots:
            return NOT_SUPPORTED
        enabled = self._mig(gpu)
        current._obj.value = enabled
        pending._obj.value = enabled or self._active("mig-pending", gpu) is not None
        return SUCCESS

    @_since(450, "nvmlDeviceGetMigDeviceHandleByIndex")
    def _mig_handle(self, handle: Any, index: Any, out: Any) -> int:
        gpu = self.gpu_of(handle)
        number = _number(index)
        if number >= self.product.mig_slots:
            return INVALID_ARGUMENT
        mig = self._active("mig-enabled", gpu)
        if mig is None or number >= int(mig.params["instances"]):
            return NOT_FOUND
        self._give(out, gpu, number)
        return SUCCESS

    @_since(450, "nvmlDeviceGetGpuInstanceId")
    def _gpu_instance(self, handle: Any, out: Any) -> int:
        out._obj.value = self._mig_slice(self._device(handle))[3]
        return SUCCESS

    @_since(450, "nvmlDeviceGetComputeInstanceId")
    def _compute_instance(self, handle: Any, out: Any) -> int:
        self._mig_slice(self._device(handle))
        out._obj.value = 0
        return SUCCESS

    @_since(455, "nvmlDeviceGetAttributes_v2")
    def _attributes(self, handle: Any, out: Any) -> int:
        slices, mib, multiprocessors, _ = self._mig_slice(self._device(handle))
        info = out._obj
        info.multiprocessorCount, info.memorySizeMB = multiprocessors, mib
        info.gpuInstanceSliceCount = info.computeInstanceSliceCount = slices
        return SUCCESS

    @_since(450, "nvmlDeviceGetTemperature")
    def _temperature(self, handle: Any, _sensor: Any, out: Any) -> int:
        out._obj.value = round(self.state(self.gpu_of(handle)).gpu_celsius)
        return SUCCESS

    @_since(570, "nvmlDeviceGetTemperatureV")
    def _temperature_v(self, handle: Any, out: Any) -> int:
        _check_version(out._obj, 0x100000C)
        out._obj.temperature = round(self.state(self.gpu_of(handle)).gpu_celsius)
        return SUCCESS

    @_since(570, "nvmlDeviceGetMarginTemperature")
    def _margin(self, handle: Any, out: Any) -> int:
        gpu = self.gpu_of(handle)
        _check_version(out._obj, 0x1000008)
        if self.product.margin is None:
            return NOT_SUPPORTED
        out._obj.marginTemperature = round(self.state(gpu).margin_celsius)
        return SUCCESS

    @_since(450, "nvmlDeviceGetTemperatureThreshold")
    def _threshold(self, handle: Any, which: Any, out: Any) -> int:
        self._device(handle)
        number = _number(which)
        thresholds = self.product.thresholds_celsius
        if thresholds is None or number > 3:
            return NOT_SUPPORTED
        value = (thresholds[0], thresholds[1], thresholds[3], thresholds[2])[number]
        if not value:
            return NOT_SUPPORTED
        out._obj.value = value
        return SUCCESS

    @_since(450, "nvmlDeviceGetClockInfo")
    def _clock(self, handle: Any, which: Any, out: Any) -> int:
        gpu = self.gpu_of(handle)
        out._obj.value = self.product.memory_clock_mhz if _number(which) == 2 else self.state(gpu).sm_mhz
        return SUCCESS

    @_since(450, "nvmlDeviceGetMaxClockInfo")
    def _max_clock(self, handle: Any, which: Any, out: Any) -> int:
        self._device(handle)
        out._obj.value = self.product.memory_clock_mhz if _number(which) == 2 else self.product.sm_clock_mhz
        return SUCCESS

    @_since(450, "nvmlDeviceGetPowerManagementLimitConstraints")
    def _limit_range(self, handle: Any, low: Any, high: Any) -> int:
        self._device(handle)
        low._obj.value, high._obj.value = self.product.limit_min_watts * 1000, self.product.limit_max_watts * 1000
        return SUCCESS

    @_since(450, "nvmlDeviceGetUtilizationRates")
    def _utilization(self, handle: Any, out: Any) -> int:
        gpu = self.gpu_of(handle)
        if self._mig(gpu):
            return NOT_SUPPORTED
        state = self.state(gpu)
        out._obj.gpu = 100 if state.activity in {"spinning", "hung"} else round(min(1.0, state.load * 1.3) * 100)
        out._obj.memory = round(state.load * 55) if state.activity == "working" else 0
        return SUCCESS

    @_since(450, "nvmlDeviceGetEccMode")
    def _ecc_mode(self, handle: Any, current: Any, pending: Any) -> int:
        self._device(handle)
        if not self.product.ecc:
            return NOT_SUPPORTED
        current._obj.value = pending._obj.value = 1
        return SUCCESS

    @_since(550, "nvmlDeviceGetSramEccErrorStatus")
    def _sram(self, handle: Any, out: Any) -> int:
        self._device(handle)
        _check_version(out._obj, 0x1000068)
        if not self.product.ecc:
            return NOT_SUPPORTED
        out._obj.bThresholdExceeded = 0
        return SUCCESS

    @_since(450, "nvmlDeviceGetRemappedRows")
    def _remapped(self, handle: Any, corrected: Any, uncorrected: Any, pending: Any, failure: Any) -> int:
        gpu = self.gpu_of(handle)
        if not self.product.ecc or self._mig(gpu):
            return NOT_SUPPORTED
        due = self._active("remap-pending", gpu) is not None
        corrected._obj.value, uncorrected._obj.value = 0, int(due)
        pending._obj.value, failure._obj.value = int(due), 0
        return SUCCESS

    @_since(455, "nvmlDeviceGetComputeRunningProcesses_v2")
    @_since(510, "nvmlDeviceGetComputeRunningProcesses_v3")
    def _running(self, handle: Any, count: Any, processes: Any) -> int:
        device = self._device(handle)
        found = self._processes(device.gpu)
        if self._mig(device.gpu) != (device.mig == 0):
            found = []  # With MIG a process is in a MIG device, here the first one, and not on the GPU's own list.
        room = count._obj.value
        count._obj.value = len(found)
        if room < len(found):
            return INSUFFICIENT_SIZE
        for slot, (pid, used) in zip(processes or (), found, strict=False):
            slot.pid, slot.usedGpuMemory = pid, used
            slot.gpuInstanceId = slot.computeInstanceId = 0xFFFFFFFF
        return SUCCESS

    # NVLink, peers and the fabric.

    @_since(450, "nvmlDeviceGetNvLinkState")
    def _link_state(self, handle: Any, link: Any, out: Any) -> int:
        gpu = self.gpu_of(handle)
        out._obj.value = self._link_active(gpu, self._link(gpu, link))
        return SUCCESS

    @_since(450, "nvmlDeviceGetNvLinkVersion")
    def _link_version(self, handle: Any, link: Any, out: Any) -> int:
        self._link(self.gpu_of(handle), link)
        out._obj.value = self.product.nvlink_version
        return SUCCESS

    @_since(470, "nvmlDeviceGetNvLinkRemoteDeviceType")
    def _link_remote_type(self, handle: Any, link: Any, out: Any) -> int:
        gpu = self.gpu_of(handle)
        if not self._link_active(gpu, self._link(gpu, link)):
            return NOT_SUPPORTED
        out._obj.value = REMOTE_SWITCH if self._node.switches else REMOTE_GPU
        return SUCCESS

    @_since(450, "nvmlDeviceGetNvLinkRemotePciInfo_v2")
    def _link_remote_pci(self, handle: Any, link: Any, out: Any) -> int:
        gpu = self.gpu_of(handle)
        number = self._link(gpu, link)
        if not self._link_active(gpu, number):
            return NOT_SUPPORTED
        peer = self._node.peer_of(gpu, number)
        if peer == NO_LINK:
            self._fill_pci(out._obj, self._node.switch_of(number), self._node.switch_device_id)
        else:
            self._fill_pci(out._obj, self._node.pci_addresses[peer], self.product.pci_device_id)
        return SUCCESS

    @_since(450, "nvmlDeviceGetNvLinkErrorCounter")
    def _link_error_counter(self, handle: Any, link: Any, counter: Any, out: Any) -> int:
        gpu = self.gpu_of(handle)
        number = self._link(gpu, link)
        which = _number(counter)
        if which > 2:
            return NOT_SUPPORTED
        out._obj.value = self._link_errors(gpu, number)[which]
        return SUCCESS

    @_since(450, "nvmlDeviceGetTopologyCommonAncestor")
    def _ancestor(self, first: Any, second: Any, out: Any) -> int:
        out._obj.value = ANCESTORS[self._node.ancestor(self.gpu_of(first), self.gpu_of(second))]
        return SUCCESS

    @_since(450, "nvmlDeviceGetP2PStatus")
    def _p2p(self, first: Any, second: Any, index: Any, out: Any) -> int:
        one, two = self.gpu_of(first), self.gpu_of(second)
        which = _number(index)
        linked = self._connected(one, two)
        if not self.product.p2p:
            status = P2P_GPU_NOT_SUPPORTED
        elif self._mig(one) or self._mig(two):
            status = P2P_NOT_SUPPORTED
        elif self._active("p2p-blocked"):
            status = P2P_CHIPSET_NOT_SUPPORTED
        elif which in {P2P_READ, P2P_WRITE} or linked:
            status = 0
        else:
            status = P2P_NOT_SUPPORTED
        out._obj.value = status
        return SUCCESS

    def _connected(self, one: int, two: int) -> bool:
        if self._mig(one) or self._mig(two):
            return False
        links = range(self.product.nvlinks)
        if self._node.switches:
            fabric = not (self._node.fabric and self._active("fabric-incomplete"))
            return fabric and all(any(self._link_active(gpu, link) for link in links) for gpu in (one, two))
        return any(self._node.peer_of(one, link) == two and self._link_active(one, link) for link in links)

    def _register(self, info: Any) -> None:
        if not self._node.fabric:
            raise _RefusalError(NOT_SUPPORTED)
        info.status, info.cliqueId = SUCCESS, 0
        info.state = 2 if self._active("fabric-incomplete") else 3

    @_since(525, "nvmlDeviceGetGpuFabricInfo")
    def _fabric_without_health(self, handle: Any, out: Any) -> int:
        self._device(handle)
        self._register(out._obj)
        return SUCCESS

    @_since(550, "nvmlDeviceGetGpuFabricInfoV")
    def _fabric(self, handle: Any, out: Any) -> int:
        gpu = self.gpu_of(handle)
        info = out._obj
        if info.version not in {0x02000024, 0x3000028} or (info.version == 0x3000028 and self._branch < 570):
            return ARGUMENT_VERSION_MISMATCH
        self._register(info)
        info.healthMask = 0
        unhealthy = self._active("fabric-unhealthy", gpu) is not None
        if unhealthy:
            info.healthMask = 1 | 2 << 2 | 2 << 4 | 2 << 6 | 1 << 8  # bandwidth degraded; the other fields are well
        if info.version == 0x3000028:
            info.healthSummary = 2 if unhealthy else 0
        return SUCCESS

    # Samples and fields.

    @_since(520, "nvmlGpmQueryDeviceSupport")
    def _gpm_support(self, handle: Any, out: Any) -> int:
        self._device(handle)
        out._obj.isSupportedDevice = self.product.gpm
        return SUCCESS

    @_since(520, "nvmlGpmSampleAlloc")
    def _gpm_alloc(self, out: Any) -> int:
        opaque = _Opaque()
        self._kept.append(opaque)
        address = ctypes.addressof(opaque)
        self._samples[address] = _GpmSample()
        ctypes.memmove(out, ctypes.byref(ctypes.c_void_p(address)), 8)
        return SUCCESS

    @_since(520, "nvmlGpmSampleGet")
    def _gpm_get(self, handle: Any, pointer: Any) -> int:
        sample = self._samples[ctypes.addressof(pointer.contents)]
        sample.gpu, sample.at = self.gpu_of(handle), self._now
        return NOT_SUPPORTED if self._mig(sample.gpu) or not self.product.gpm else SUCCESS

    @_since(520, "nvmlGpmMetricsGet")
    def _gpm_metrics(self, out: Any) -> int:
        info = out._obj
        _check_version(info, 1)
        first, second = (self._samples[ctypes.addressof(p.contents)] for p in (info.sample1, info.sample2))
        if second.at - first.at < GPM_MIN_SECONDS or first.gpu != second.gpu:
            return INVALID_ARGUMENT
        state = self.state(second.gpu)
        working = state.load if state.activity == "working" else 0.0
        values = {
            2: 99.0 if state.activity in {"spinning", "hung"} else working * 92,
            5: working * 34,
            10: working * 61,
            20: state.pcie_bytes_per_second / (1 << 20),
            21: state.pcie_bytes_per_second / (1 << 20),
            60: state.nvlink_bytes_per_second / (1 << 20),
            61: state.nvlink_bytes_per_second / (1 << 20),
        }
        for index in range(info.numMetrics):
            metric = info.metrics[index]
            metric.nvmlReturn = SUCCESS if metric.metricId in values else NOT_SUPPORTED
            metric.value = values.get(metric.metricId, 0.0)
        return SUCCESS

    @_since(450, "nvmlDeviceGetFieldValues")
    def _field_values(self, handle: Any, count: Any, out: Any) -> int:
        gpu = self.gpu_of(handle)
        state = self.state(gpu)
        memory = memoryview(out._obj).cast("B")
        stamp = int(time.time() * 1e6)
        for offset in range(0, _number(count) * FIELD_VALUE.size, FIELD_VALUE.size):
            field, scope, *_ = FIELD_VALUE.unpack_from(memory, offset)
            try:
                kind, value = self._field(gpu, state, field, scope)
                status = SUCCESS
            except _RefusalError as refusal:
                kind, value, status = UNSIGNED, 0, refusal.status
            mask = 0xFFFFFFFF if kind in {UNSIGNED, SIGNED} else 0xFFFFFFFFFFFFFFFF
            FIELD_VALUE.pack_into(memory, offset, field, scope, stamp, 0, kind, status, value & mask)
        return SUCCESS

    def _field(self, gpu: int, state: GpuState, field: int, scope: int) -> tuple[int, int]:
        """Return type and value of a field. What Hopper no longer counts it answers with 0, as the real one does."""
        if 161 <= field <= 166:
            return self._link_field(gpu, field, scope)
        if 32 <= field <= 59 or 96 <= field <= 119 or 148 <= field <= 160:
            return UNSIGNED_LONG_LONG, 0
        since, value = self._other_field(gpu, state, field)
        if since > self._branch:
            raise _RefusalError(INVALID_ARGUMENT)
        if value is None:
            raise _RefusalError(NOT_SUPPORTED)
        return value

    def _link_field(self, gpu: int, field: int, scope: int) -> tuple[int, int]:
        if self._branch < 520:
            raise _RefusalError(INVALID_ARGUMENT)
        link = self._link(gpu, scope)
        if field == 164:
            return UNSIGNED, self.product.nvlink_mbps if self._link_active(gpu, link) else 0
        if field == 165:
            return UNSIGNED, int(self._link_active(gpu, link))
        if field == 166:
            return UNSIGNED, self.product.nvlink_version
        return UNSIGNED_LONG_LONG, self._link_errors(gpu, link)[field - 161] if self._link_faults else 0

    def _other_field(self, gpu: int, state: GpuState, field: int) -> tuple[int, tuple[int, int] | None]:
        """Return the branch that first had the field, and its type and value (None: this board has it not)."""
        product = self.product
        margins = product.margin_thresholds
        switched_power = product.compute_capability != (8, 0)  # GA100 and older have no average
        if 3 <= field <= 6:  # corrected and uncorrected, volatile; then the same, aggregate
            return 450, self._ecc_field(gpu, field)
        if field == 82:
            has = product.memory_celsius_per_watt is not None
            return 450, (UNSIGNED, round(state.memory_celsius)) if has else None
        if field == 91:
            return 450, (UNSIGNED, product.nvlinks)
        if field == 94:
            return 450, (UNSIGNED, 9 if gpu == 0 else 0)
        if field in {83, 191}:
            return 450 if field == 83 else 535, (UNSIGNED_LONG_LONG, int(state.energy_joules * 1000))
        if field in _DURATIONS:
            since, name = _DURATIONS[field]
            return since, (UNSIGNED_LONG_LONG, int(getattr(state, name) * 1e9) if name else 0)
        if field == 185:
            return 535, (UNSIGNED, int(state.average_watts * 1000)) if switched_power else None
        if field == 186:
            return 535, (UNSIGNED, int(state.power_watts * 1000))
        if field == 187:
            return 535, (UNSIGNED, product.limit_min_watts * 1000)
        if field == 188:
            return 535, (UNSIGNED, product.limit_max_watts * 1000)
        if field == 189:
            return 535, (UNSIGNED, product.limit_watts * 1000)
        if field in {190, 192}:
            return 535, (UNSIGNED, int(state.limit_watts * 1000))
        if 193 <= field <= 196:
            value = None if margins is None else (margins[0], margins[1], margins[3], margins[2])[field - 193]
            return 535, None if value is None else (SIGNED, value)
        if field == 230:
            fault = self._active("recovery-action", gpu)
            return 570, (UNSIGNED, RECOVERY_ACTIONS.index(str(fault.params["action"])) if fault else 0)
        raise _RefusalError(INVALID_ARGUMENT)

    def _ecc_field(self, gpu: int, field: int) -> tuple[int, int] | None:
        if not self.product.ecc or (field <= 4 and self._mig(gpu)):
            return None
        fault = self._active("ecc-uncorrected", gpu)
        return UNSIGNED_LONG_LONG, int(fault.params["count"]) if fault and field in {4, 6} else 0


_DURATIONS = {
    74: (450, "sw_power_cap_seconds"),
    76: (450, ""),
    269: (575, "sw_thermal_seconds"),
    270: (575, "hw_thermal_seconds"),
    271: (575, "power_brake_seconds"),
}
"""Clocks event durations by field: the branch that first had it, and the state's name for it."""


def _check_version(info: Any, version: int) -> None:
    if info.version != version:
        raise _RefusalError(ARGUMENT_VERSION_MISMATCH)


def _pci_word(ids: str) -> int:
    vendor, _, device = ids.partition(":")
    return int(device, 16) << 16 | int(vendor, 16)


def _getter(branch: int, name: str, value: Callable[[Library, int], int | None]) -> None:
    """Register a function of the shape `f(handle, &number)`; None: not supported."""

    def function(library: Library, handle: Any, out: Any) -> int:
        number = value(library, library.gpu_of(handle))
        if number is None:
            return NOT_SUPPORTED
        out._obj.value = number
        return SUCCESS

    SYMBOLS[name] = (branch, function)


_getter(450, "nvmlDeviceGetPersistenceMode", lambda _library, _gpu: 1)
_getter(450, "nvmlDeviceGetComputeMode", lambda _library, _gpu: 0)
_getter(450, "nvmlDeviceGetArchitecture", lambda library, _gpu: library.product.architecture)
_getter(450, "nvmlDeviceGetMaxMigDeviceCount", lambda library, _gpu: library.product.mig_slots)
_getter(450, "nvmlDeviceGetFanSpeed", lambda library, gpu: library.fan_percent(gpu))
_getter(450, "nvmlDeviceGetPerformanceState", lambda library, gpu: library.performance_state(gpu))
_getter(450, "nvmlDeviceGetCurrPcieLinkGeneration", lambda library, gpu: library.pcie_generation(gpu))
_getter(450, "nvmlDeviceGetMaxPcieLinkGeneration", lambda library, _gpu: library.product.pcie_generation)
_getter(450, "nvmlDeviceGetCurrPcieLinkWidth", lambda library, gpu: library.pcie_width(gpu))
_getter(450, "nvmlDeviceGetMaxPcieLinkWidth", lambda _library, _gpu: 16)
_getter(450, "nvmlDeviceGetCurrentClocksThrottleReasons", lambda library, gpu: library.state(gpu).reasons)
_getter(535, "nvmlDeviceGetCurrentClocksEventReasons", lambda library, gpu: library.state(gpu).reasons)
_getter(450, "nvmlDeviceGetPowerUsage", lambda library, gpu: library.power_usage_milliwatts(gpu))
_getter(450, "nvmlDeviceGetEnforcedPowerLimit", lambda library, gpu: round(library.state(gpu).limit_watts * 1000))
_getter(450, "nvmlDeviceGetPowerManagementLimit", lambda library, gpu: round(library.state(gpu).limit_watts * 1000))
_getter(450, "nvmlDeviceGetPowerManagementDefaultLimit", lambda library, _gpu: library.product.limit_watts * 1000)


def library(spec: str) -> Library:
    """Return the library of a drill, given as JSON: the NVML child's door."""
    return Library(msgspec.json.decode(spec, type=Drill))
