"""The NVML child: the only process that talks to NVML, because a sick driver blocks its caller in the kernel.

It is started by `doctor.collectors.nvml` and answers one frame with one frame. Between two visits it samples power.
It ends when its input ends, or when asked to by SIGTERM after the call in which it is.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import importlib
import math
import os
import select
import signal
import struct
import sys
import time
from collections import deque
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NoReturn, cast

import msgspec
import pynvml

from doctor.collectors.nvml_frames import FRAME_MAX_BYTES, LENGTH, Answer, Ask, frame
from doctor.collectors.nvml_words import (
    ANCESTORS,
    COMPUTE_MODES,
    FABRIC_HEALTH,
    FABRIC_STATES,
    LINK_VERSIONS,
    P2P_STATUS,
    RECOVERY_ACTIONS,
    REMOTES,
    counted,
    fabric_faults,
    flag,
    hollow,
    link_ends,
    mig_profile,
    nobody,
    nvlinks_between,
    pci_address,
    pci_id,
    scaled,
    worded,
)
from doctor.snapshot import (
    EVENT_REASONS,
    Absent,
    Activity,
    Clocks,
    Ecc,
    Fabric,
    Gpu,
    GpuMemory,
    GpuPair,
    GpuProcess,
    Maybe,
    Mig,
    MigDevice,
    NvLink,
    Pcie,
    Power,
    Sample,
    Source,
    Stack,
    Thermal,
    Unseen,
    Why,
    known,
)

nvml: Any = pynvml
"""The binding, which has no types; a benchmark puts a recorder here."""

SAMPLE_SECONDS = 0.1
"""Instant power changes about ten times a second on A100 and H100; faster tells nothing new."""
REST_FACTOR = 3.0
"""Sampling rests this many times as long as it took: a slow driver is not asked for more than a quarter of its time. guess."""
SAMPLES_KEPT = 600
"""A minute: the parent asks more often, unless it is held up."""
GPM_MIN_SECONDS = 0.1
"""nvml.h: two GPM samples must lie more than 100 ms apart."""

OK = 0
NOT_SUPPORTED = Absent(Why.NOT_SUPPORTED)
LOST = Absent(Why.LOST, "the GPU has fallen off the bus")
LEFT_ALONE = Absent(Why.NOT_ASKED, "the kernel log says that this GPU fell off the bus: NVML is not asked about it")
LINK_IS_DOWN = Absent(Why.NOT_SUPPORTED, "the link is down")
NO_SECOND_SAMPLE = Absent(Why.NOT_ASKED, "a rate needs two visits")
NO_DEVICE_NODE = Absent(Why.NO_PERMISSION, "this user may not open /dev/nvidiactl")
OTHER_GPUS = Absent(Why.FAILED, "the driver's GPUs are no longer those that NVML was opened on")
NOT_TEXT = Absent(Why.FAILED, "NVML answered with bytes that are no text; the InfoROM may be corrupt")

# Field ids of nvmlDeviceGetFieldValues (nvml.h). A field asked with a scope is that of a link.
ECC_CORRECTED_VOLATILE, ECC_UNCORRECTED_VOLATILE, ECC_CORRECTED_AGGREGATE, ECC_UNCORRECTED_AGGREGATE = 3, 4, 5, 6
SW_POWER_CAP_TIME, SYNC_BOOST_TIME, SW_THERMAL_TIME, HW_THERMAL_TIME, POWER_BRAKE_TIME = 74, 76, 269, 270, 271
MEMORY_CELSIUS, ENERGY, LINK_COUNT, PCIE_REPLAYS = 82, 83, 91, 94
LINK_REPLAYS, LINK_RECOVERIES, LINK_CRC, LINK_SPEED, LINK_STATE = 161, 162, 163, 164, 165
POWER_AVERAGE, POWER_INSTANT = 185, 186
MARGIN_SHUTDOWN, MARGIN_SLOWDOWN = 193, 194
LINK_RECOVERY_EVENTS = 215
RECOVERY_ACTION = 230

FIELDS: tuple[int, ...] = (
    ECC_CORRECTED_VOLATILE, ECC_UNCORRECTED_VOLATILE, ECC_CORRECTED_AGGREGATE, ECC_UNCORRECTED_AGGREGATE,
    SW_POWER_CAP_TIME, SYNC_BOOST_TIME, SW_THERMAL_TIME, HW_THERMAL_TIME, POWER_BRAKE_TIME,
    MEMORY_CELSIUS, ENERGY, PCIE_REPLAYS, POWER_AVERAGE, POWER_INSTANT, RECOVERY_ACTION,
)  # fmt: skip
"""What every visit reads of a GPU in one driver call."""
LINK_FIELDS = (LINK_STATE, LINK_REPLAYS, LINK_RECOVERIES, LINK_CRC, LINK_SPEED)
"""What every visit reads of each NVLink, all links in one driver call."""
FIXED_FIELDS: tuple[int, ...] = (LINK_COUNT, MARGIN_SHUTDOWN, MARGIN_SLOWDOWN)
FIELD_VALUE = struct.Struct("@IIqqIIQ")
"""nvmlFieldValue_t: field, scope, timestamp, latency, type, return, value."""
DOUBLE, UNSIGNED_INT, UNSIGNED_LONG, UNSIGNED_LONG_LONG, SIGNED_LONG_LONG, SIGNED_INT = range(6)
"""nvmlValueType_t. T.Limit thresholds are signed."""

GA100 = (8, 0)
BLACKWELL = 10

P2P_READ, P2P_WRITE, P2P_NVLINK, P2P_ATOMICS = range(4)
"""The binding's own NVML_P2P_CAPS_INDEX_READ is a tuple by mistake."""
FABRIC_VERSIONS = (0x3000028, 0x2000024)
"""nvmlGpuFabricInfo_v3 and _v2, the second a beginning of the first."""
GPM_SM, GPM_TENSOR, GPM_DRAM, GPM_PCIE_TX, GPM_PCIE_RX, GPM_NVLINK_RX, GPM_NVLINK_TX = 2, 5, 10, 20, 21, 60, 61
GPM_METRICS: tuple[int, ...] = (GPM_SM, GPM_TENSOR, GPM_DRAM, GPM_PCIE_TX, GPM_PCIE_RX, GPM_NVLINK_RX, GPM_NVLINK_TX)


class GpuIsLostError(Exception):
    """NVML says that the GPU has fallen off the bus: there is no point in asking it anything else."""


class CannotStartError(Exception):
    """NVML can't be used at all."""

    def __init__(self, why: Absent) -> None:
        super().__init__(str(why))
        self.why = why


_why_absent: dict[int, Absent] = {
    1: Absent(Why.FAILED, "the driver was reloaded since NVML was opened"),
    3: NOT_SUPPORTED,
    4: Absent(Why.NO_PERMISSION, "only root may read it"),
    9: Absent(Why.NOT_PRESENT, "no NVIDIA driver is loaded"),
    12: Absent(Why.NOT_PRESENT, "libnvidia-ml.so.1 is not installed, or this container does not see it"),
    13: Absent(Why.MISSING_SYMBOL, "this driver is older than the question"),
    15: LOST,
    18: Absent(
        Why.FAILED,
        "the driver's kernel module and its libraries are of different versions: the package was updated and the module "
        "is still the old one; reload it, or reboot",
    ),
    25: Absent(Why.MISSING_SYMBOL, "this driver is older than the question"),
}


OUTLIVED = frozenset((1, 9, 18))
"""Uninitialized, driver not loaded, library and module of different versions: true of the whole of NVML, never of one
value. An NVML that was opened before the driver was reloaded answers so from then on."""


def absent(status: int) -> Absent:
    """Return the absence that an NVML status means."""
    if status not in _why_absent:
        _why_absent[status] = Absent(Why.FAILED, f"NVML: {nvml.NVMLError(status)}")
    return _why_absent[status]


def ask(function: str, *arguments: Any) -> Any:
    """Return what NVML answers, or the reason why there is no answer. Raises GpuIsLostError and CannotStartError."""
    try:
        return getattr(nvml, function)(*arguments)
    except pynvml.NVMLError as e:
        status = cast("int", e.value)  # pyright: ignore[reportAttributeAccessIssue, reportUnknownMemberType] # set in __new__
        if status == pynvml.NVML_ERROR_GPU_IS_LOST:
            raise GpuIsLostError from e
        if status in OUTLIVED:
            raise CannotStartError(absent(status)) from e
        return absent(status)
    except UnicodeDecodeError:
        return NOT_TEXT
    except AttributeError:
        return Absent(Why.MISSING_SYMBOL, f"the installed nvidia-ml-py has no {function}")


def first_known(*asked: tuple[Any, ...]) -> Any:
    """Ask one thing by its newest function, and by older ones while the driver does not know it."""
    answer: Any = NOT_SUPPORTED
    for function, *arguments in asked:
        answer = ask(function, *arguments)
        if not (isinstance(answer, Absent) and answer.why is Why.MISSING_SYMBOL):
            break
    return answer


def field_values(handle: Any, fields: list[Any]) -> list[Maybe[float]]:
    """Return the values of fields, each with its own answer, read in one driver call."""
    values = ask("nvmlDeviceGetFieldValues", handle, fields)
    if isinstance(values, Absent):
        return [values] * len(fields)
    return [
        bits if status == OK and kind in {UNSIGNED_LONG, UNSIGNED_LONG_LONG} else field_value(kind, status, bits)
        for _, _, _, _, kind, status, bits in FIELD_VALUE.iter_unpack(values)
    ]


def field_value(kind: int, status: int, bits: int) -> Maybe[float]:
    """Return what a field's union holds, by its type."""
    if status != OK:
        # A field that the driver does not know is answered with Invalid Argument.
        return absent(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND if status == pynvml.NVML_ERROR_INVALID_ARGUMENT else status)
    if kind == UNSIGNED_INT:
        return bits & 0xFFFFFFFF
    if kind == SIGNED_INT:
        return ((bits & 0xFFFFFFFF) ^ 0x80000000) - 0x80000000
    if kind == SIGNED_LONG_LONG:
        return (bits ^ (1 << 63)) - (1 << 63)
    if kind == DOUBLE:
        return struct.unpack("=d", struct.pack("=Q", bits))[0]
    return bits


class FabricInfo(ctypes.Structure):
    """nvmlGpuFabricInfo_v3_t, with nvml.h's names. Bindings up to 12.575 lack it, and some have a cluster UUID of the wrong length."""

    _fields_ = (
        ("version", ctypes.c_uint),
        ("clusterUuid", ctypes.c_uint8 * 16),
        ("status", ctypes.c_uint),
        ("cliqueId", ctypes.c_uint32),
        ("state", ctypes.c_uint8),
        ("healthMask", ctypes.c_uint32),
        ("healthSummary", ctypes.c_uint8),
    )


class FieldOfGpu:
    """One field of one GPU that is asked for ten times a second: the question is made once, not anew each time."""

    def __init__(self, handle: Any, field: int) -> None:
        self._handle = handle
        self._field = field
        self._values: Any = (pynvml.c_nvmlFieldValue_t * 1)()
        self._values[0].fieldId = field
        self._arguments = (handle, ctypes.c_int32(1), ctypes.byref(self._values))
        self._function = getattr(pynvml.nvmlLib, "nvmlDeviceGetFieldValues", None)

    def value(self) -> Maybe[float]:
        """Return it, or why there is none. Raises as `ask` does."""
        if self._function is None or self._function(*self._arguments) != OK:
            return field_values(self._handle, [self._field])[0]  # the binding has the words for it
        _, _, _, _, kind, status, bits = FIELD_VALUE.unpack_from(self._values)
        return field_value(kind, status, bits)


class Device:
    """One GPU: its handle, what never changes of it, and what is kept between visits."""

    def __init__(self, handle: Any, index: int) -> None:
        self.handle = handle
        self.index = index
        self.samples: deque[tuple[int, float]] = deque(maxlen=SAMPLES_KEPT)
        """Watts by the tenth of a second, counted on the monotonic clock."""
        self._fixed: dict[tuple[Any, ...], Any] = {}
        self._fixed_fields: dict[int, Maybe[float]] = {}
        self._links_before: dict[int, tuple[tuple[Maybe[float], ...], NvLink]] = {}
        self._link_versions: dict[int, Maybe[str]] = {}
        self._remotes: dict[int, tuple[Maybe[str], Maybe[str]]] = {}
        self._gpm_samples: tuple[Any, Any] | None = None
        self._gpm_at = -math.inf
        self._gpm_request = gpm_request()
        self._instant_power = FieldOfGpu(handle, POWER_INSTANT)
        self._mig_before: Maybe[bool] = NOT_SUPPORTED
        uuid = ask("nvmlDeviceGetUUID", handle)
        self.uuid: str = f"index:{index}" if isinstance(uuid, Absent) else uuid
        pci = ask("nvmlDeviceGetPciInfo", handle)
        self.pci: Maybe[str] = pci if isinstance(pci, Absent) else pci_address(pci)
        self._pci_device_id: Maybe[str] = pci if isinstance(pci, Absent) else pci_id(pci.pciDeviceId)
        self._pci_subsystem_id: Maybe[str] = pci if isinstance(pci, Absent) else pci_id(pci.pciSubSystemId)
        self._numa_node = self._read_numa_node()

    def _ask(self, function: str, *arguments: Any) -> Any:
        return ask(function, self.handle, *arguments)

    def _once(self, function: str, *arguments: Any) -> Any:
        """Ask what never changes; a failure is asked again."""
        key = (function, *arguments)
        answer = self._fixed.get(key)
        if answer is None or (isinstance(answer, Absent) and answer.why is Why.FAILED):
            answer = self._fixed[key] = self._ask(function, *arguments)
        return answer

    def _field_once(self, field: int) -> Maybe[float]:
        if not self._fixed_fields:
            self._fixed_fields = dict(zip(FIXED_FIELDS, field_values(self.handle, list(FIXED_FIELDS)), strict=True))
        return self._fixed_fields[field]

    @property
    def _instant_by_usage(self) -> bool:
        """GA100 and older: the classic power reading is instant, and there is no average."""
        capability = self._once("nvmlDeviceGetCudaComputeCapability")
        return not isinstance(capability, Absent) and capability <= GA100

    def visit(self, epoch: int) -> Gpu:
        """Read everything. *epoch*: the tenth of a second of Unix time from which samples count. Raises GpuIsLostError."""
        fields = dict(zip(FIELDS, field_values(self.handle, list(FIELDS)), strict=True))
        mig = self._mig()
        if mig.enabled != self._mig_before:  # much that never changes is another thing with MIG on
            self._mig_before = mig.enabled
            self._fixed.clear()
            self._fixed_fields.clear()
        return Gpu(
            uuid=self.uuid,
            index=self.index,
            pci_address=self.pci,
            pci_device_id=self._pci_device_id,
            pci_subsystem_id=self._pci_subsystem_id,
            name=self._once("nvmlDeviceGetName"),
            serial=self._once("nvmlDeviceGetSerial"),
            vbios_version=self._once("nvmlDeviceGetVbiosVersion"),
            inforom_version=self._once("nvmlDeviceGetInforomImageVersion"),
            compute_capability=self._once("nvmlDeviceGetCudaComputeCapability"),
            numa_node=self._numa_node,
            persistence_mode=flag(self._ask("nvmlDeviceGetPersistenceMode")),
            compute_mode=worded(self._ask("nvmlDeviceGetComputeMode"), COMPUTE_MODES),
            lost=False,
            recovery_action=worded(fields[RECOVERY_ACTION], RECOVERY_ACTIONS),
            memory=self._memory(),
            mig=mig,
            thermal=self._thermal(fields),
            clocks=self._clocks(fields),
            power=self._power(fields, epoch),
            activity=self._activity(),
            pcie=self._pcie(fields),
            ecc=self._ecc(fields),
            links=self._links(mig),
            fabric=self._fabric(),
            processes=self._processes(self.handle),
        )

    def gone(self, why: Absent, lost: Maybe[bool]) -> Gpu:
        """Return who it is, when nothing else can be said of it."""
        return msgspec.structs.replace(
            nobody(self.uuid, self.index, why, lost),
            pci_address=self.pci,
            pci_device_id=self._pci_device_id,
            pci_subsystem_id=self._pci_subsystem_id,
            name=self._fixed.get(("nvmlDeviceGetName",), why),
            compute_capability=self._fixed.get(("nvmlDeviceGetCudaComputeCapability",), why),
        )

    def instant_watts(self) -> Maybe[float]:
        """Return instant power, where there is such a thing. Raises GpuIsLostError."""
        value = self._instant_power.value()
        if isinstance(value, Absent) and self._instant_by_usage:
            value = cast("Maybe[float]", self._ask("nvmlDeviceGetPowerUsage"))
        return scaled(value, 1e-3)

    def _read_numa_node(self) -> Maybe[int]:
        affinity = self._ask("nvmlDeviceGetMemoryAffinity", 4, 0)
        if isinstance(affinity, Absent):
            return affinity
        nodes = [64 * word + bit for word in range(4) for bit in range(64) if affinity[word] >> bit & 1]
        return nodes[0] if len(nodes) == 1 else NOT_SUPPORTED

    def _memory(self) -> GpuMemory:
        # Before driver 510 the reserved part counts as used, and is not told.
        memory = first_known(
            ("nvmlDeviceGetMemoryInfo", self.handle, pynvml.nvmlMemory_v2), ("nvmlDeviceGetMemoryInfo", self.handle)
        )
        bar1 = self._ask("nvmlDeviceGetBAR1MemoryInfo")
        no_memory, no_bar1 = isinstance(memory, Absent), isinstance(bar1, Absent)
        return GpuMemory(
            total_bytes=memory if no_memory else memory.total,
            used_bytes=memory if no_memory else memory.used,
            free_bytes=memory if no_memory else memory.free,
            reserved_bytes=memory if no_memory else getattr(memory, "reserved", NOT_SUPPORTED),
            bar1_total_bytes=bar1 if no_bar1 else bar1.bar1Total,
            bar1_used_bytes=bar1 if no_bar1 else bar1.bar1Used,
        )

    def _mig(self) -> Mig:
        mode = self._ask("nvmlDeviceGetMigMode")
        if isinstance(mode, Absent):
            return hollow(Mig, mode)
        slots = self._once("nvmlDeviceGetMaxMigDeviceCount")
        enabled, pending = map(bool, mode)
        return Mig(
            enabled=enabled,
            enabled_after_reset=pending,
            devices=self._mig_devices(slots) if enabled and known(slots) else () if not enabled else slots,
            device_slots=slots,
        )

    def _mig_devices(self, slots: int) -> tuple[MigDevice, ...]:
        devices: list[MigDevice] = []
        for slot in range(slots):
            handle = self._ask("nvmlDeviceGetMigDeviceHandleByIndex", slot)
            if isinstance(handle, Absent):
                continue  # A hole: Not Found.
            memory = ask("nvmlDeviceGetMemoryInfo", handle, pynvml.nvmlMemory_v2)
            attributes = ask("nvmlDeviceGetAttributes", handle)
            uuid = ask("nvmlDeviceGetUUID", handle)
            devices.append(
                MigDevice(
                    uuid=f"{self.uuid}/{slot}" if isinstance(uuid, Absent) else uuid,
                    gpu_instance=ask("nvmlDeviceGetGpuInstanceId", handle),
                    compute_instance=ask("nvmlDeviceGetComputeInstanceId", handle),
                    profile=attributes if isinstance(attributes, Absent) else mig_profile(attributes),
                    memory_total_bytes=memory if isinstance(memory, Absent) else memory.total,
                    memory_used_bytes=memory if isinstance(memory, Absent) else memory.used,
                    multiprocessors=attributes if isinstance(attributes, Absent) else attributes.multiprocessorCount,
                    processes=self._processes(handle),
                )
            )
        return tuple(devices)

    def _thermal(self, fields: dict[int, Maybe[float]]) -> Thermal:
        return Thermal(
            gpu_celsius=first_known(
                ("nvmlDeviceGetTemperatureV", self.handle, pynvml.NVML_TEMPERATURE_GPU),
                ("nvmlDeviceGetTemperature", self.handle, pynvml.NVML_TEMPERATURE_GPU),
            ),
            memory_celsius=fields[MEMORY_CELSIUS],
            margin_celsius=self._ask("nvmlDeviceGetMarginTemperature"),
            slowdown_margin_celsius=self._field_once(MARGIN_SLOWDOWN),
            shutdown_margin_celsius=self._field_once(MARGIN_SHUTDOWN),
            slowdown_celsius=self._once(
                "nvmlDeviceGetTemperatureThreshold", pynvml.NVML_TEMPERATURE_THRESHOLD_SLOWDOWN
            ),
            shutdown_celsius=self._once(
                "nvmlDeviceGetTemperatureThreshold", pynvml.NVML_TEMPERATURE_THRESHOLD_SHUTDOWN
            ),
            gpu_max_celsius=self._once("nvmlDeviceGetTemperatureThreshold", pynvml.NVML_TEMPERATURE_THRESHOLD_GPU_MAX),
            memory_max_celsius=self._once(
                "nvmlDeviceGetTemperatureThreshold", pynvml.NVML_TEMPERATURE_THRESHOLD_MEM_MAX
            ),
            fan_percent=self._ask("nvmlDeviceGetFanSpeed"),
        )

    def _clocks(self, fields: dict[int, Maybe[float]]) -> Clocks:
        reasons = first_known(
            ("nvmlDeviceGetCurrentClocksEventReasons", self.handle),
            ("nvmlDeviceGetCurrentClocksThrottleReasons", self.handle),
        )
        if known(reasons):
            reasons = tuple(sorted(word for bit, word in EVENT_REASONS.items() if reasons & bit))
        return Clocks(
            sm_mhz=self._ask("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_SM),
            sm_max_mhz=self._once("nvmlDeviceGetMaxClockInfo", pynvml.NVML_CLOCK_SM),
            memory_mhz=self._ask("nvmlDeviceGetClockInfo", pynvml.NVML_CLOCK_MEM),
            memory_max_mhz=self._once("nvmlDeviceGetMaxClockInfo", pynvml.NVML_CLOCK_MEM),
            performance_state=self._ask("nvmlDeviceGetPerformanceState"),
            event_reasons=reasons,
            sw_power_cap_seconds=scaled(fields[SW_POWER_CAP_TIME], 1e-9),
            sync_boost_seconds=scaled(fields[SYNC_BOOST_TIME], 1e-9),
            sw_thermal_seconds=scaled(fields[SW_THERMAL_TIME], 1e-9),
            hw_thermal_seconds=scaled(fields[HW_THERMAL_TIME], 1e-9),
            power_brake_seconds=scaled(fields[POWER_BRAKE_TIME], 1e-9),
        )

    def _power(self, fields: dict[int, Maybe[float]], epoch: int) -> Power:
        average, instant = fields[POWER_AVERAGE], fields[POWER_INSTANT]
        if isinstance(average, Absent) or isinstance(instant, Absent):
            usage = cast("Maybe[float]", self._ask("nvmlDeviceGetPowerUsage"))
            if self._instant_by_usage:
                instant = usage if isinstance(instant, Absent) else instant
            else:
                average = usage if isinstance(average, Absent) else average
        limits = self._once("nvmlDeviceGetPowerManagementLimitConstraints")
        low, high = (limits, limits) if isinstance(limits, Absent) else limits
        # The middle of the tenth before: what is laid over each other in tenths must not lie on their edges.
        samples = tuple(
            Sample(round((epoch + tenth - 0.5) * SAMPLE_SECONDS, 2), watts) for tenth, watts in self.samples
        )
        self.samples.clear()
        return Power(
            average_watts=scaled(average, 1e-3),
            instant_watts=scaled(instant, 1e-3),
            limit_watts=scaled(self._ask("nvmlDeviceGetPowerManagementLimit"), 1e-3),
            limit_enforced_watts=scaled(self._ask("nvmlDeviceGetEnforcedPowerLimit"), 1e-3),
            limit_default_watts=scaled(self._once("nvmlDeviceGetPowerManagementDefaultLimit"), 1e-3),
            limit_min_watts=scaled(low, 1e-3),
            limit_max_watts=scaled(high, 1e-3),
            energy_joules=scaled(fields[ENERGY], 1e-3),
            samples=samples,
        )

    def _activity(self) -> Activity:
        rates = self._ask("nvmlDeviceGetUtilizationRates")
        unknown = isinstance(rates, Absent)
        metrics = self._gpm()
        return Activity(
            gpu_ratio=rates if unknown else rates.gpu / 100,
            memory_ratio=rates if unknown else rates.memory / 100,
            sm_ratio=scaled(metrics[GPM_SM], 0.01),
            tensor_ratio=scaled(metrics[GPM_TENSOR], 0.01),
            dram_ratio=scaled(metrics[GPM_DRAM], 0.01),
            nvlink_rx_bytes_per_second=scaled(metrics[GPM_NVLINK_RX], 1 << 20),
            nvlink_tx_bytes_per_second=scaled(metrics[GPM_NVLINK_TX], 1 << 20),
            pcie_rx_bytes_per_second=scaled(metrics[GPM_PCIE_RX], 1 << 20),
            pcie_tx_bytes_per_second=scaled(metrics[GPM_PCIE_TX], 1 << 20),
        )

    def _gpm(self) -> dict[int, Maybe[float]]:
        """Return the rates since the last visit's sample."""
        support = self._once("nvmlGpmQueryDeviceSupport")
        if isinstance(support, Absent) or not support.isSupportedDevice:
            return dict.fromkeys(GPM_METRICS, support if isinstance(support, Absent) else NOT_SUPPORTED)
        if self._gpm_samples is None:
            samples = ask("nvmlGpmSampleAlloc"), ask("nvmlGpmSampleAlloc")
            if failed := next((sample for sample in samples if isinstance(sample, Absent)), None):
                return dict.fromkeys(GPM_METRICS, failed)
            self._gpm_samples = samples
        now = time.monotonic()
        if now - self._gpm_at <= GPM_MIN_SECONDS:
            return dict.fromkeys(GPM_METRICS, NO_SECOND_SAMPLE)
        before, fresh = self._gpm_samples
        taken = self._ask("nvmlGpmSampleGet", fresh)
        if isinstance(taken, Absent):
            return dict.fromkeys(GPM_METRICS, taken)
        self._gpm_samples = (fresh, before)
        first, self._gpm_at = self._gpm_at == -math.inf, now
        if first:
            return dict.fromkeys(GPM_METRICS, NO_SECOND_SAMPLE)
        request = self._gpm_request
        request.sample1, request.sample2 = before, fresh
        answer = ask("nvmlGpmMetricsGet", request)
        if isinstance(answer, Absent):
            return dict.fromkeys(GPM_METRICS, answer)
        found = (request.metrics[i] for i in range(len(GPM_METRICS)))
        return {m.metricId: m.value if m.nvmlReturn == OK else absent(m.nvmlReturn) for m in found}

    def _pcie(self, fields: dict[int, Maybe[float]]) -> Pcie:
        return Pcie(
            generation=self._ask("nvmlDeviceGetCurrPcieLinkGeneration"),
            generation_max=self._once("nvmlDeviceGetMaxPcieLinkGeneration"),
            width=self._ask("nvmlDeviceGetCurrPcieLinkWidth"),
            width_max=self._once("nvmlDeviceGetMaxPcieLinkWidth"),
            replays_total=counted(fields[PCIE_REPLAYS]),
        )

    def _ecc(self, fields: dict[int, Maybe[float]]) -> Ecc:
        mode = self._once("nvmlDeviceGetEccMode")
        rows = self._ask("nvmlDeviceGetRemappedRows")
        corrected, uncorrected, pending, failed = [rows] * 4 if isinstance(rows, Absent) else rows
        return Ecc(
            enabled=mode if isinstance(mode, Absent) else bool(mode[0]),
            corrected_volatile=counted(fields[ECC_CORRECTED_VOLATILE]),
            uncorrected_volatile=counted(fields[ECC_UNCORRECTED_VOLATILE]),
            corrected_aggregate=counted(fields[ECC_CORRECTED_AGGREGATE]),
            uncorrected_aggregate=counted(fields[ECC_UNCORRECTED_AGGREGATE]),
            sram_threshold_exceeded=self._sram_threshold(),
            rows_remapped_corrected=corrected,
            rows_remapped_uncorrected=uncorrected,
            remap_pending=flag(pending),
            remap_failed=flag(failed),
        )

    def _sram_threshold(self) -> Maybe[bool]:
        status = pynvml.c_nvmlEccSramErrorStatus_v1_t()
        answer = self._ask("nvmlDeviceGetSramEccErrorStatus", ctypes.byref(status))
        return answer if isinstance(answer, Absent) else bool(status.bThresholdExceeded)

    def _links(self, mig: Mig) -> Maybe[tuple[NvLink, ...]]:
        count = self._field_once(LINK_COUNT)
        if isinstance(count, Absent):
            return count
        if mig.enabled is True:
            return Absent(Why.NOT_SUPPORTED, "NVML tells nothing of NVLinks while MIG is on")
        architecture = self._once("nvmlDeviceGetArchitecture")
        blackwell = known(architecture) and architecture >= BLACKWELL
        # What counts errors differs: the DL counters end with Hopper, and the older field ids answer 0 there.
        wanted = (LINK_STATE, LINK_RECOVERY_EVENTS, LINK_SPEED) if blackwell else LINK_FIELDS
        asked = [(field, link) for link in range(int(count)) for field in wanted]
        values = iter(field_values(self.handle, asked) if asked else ())
        rows = enumerate(zip(*[values] * len(wanted), strict=True))  # each link takes its own off the one row of them
        return tuple(self._same_link(link, row) or self._link(link, row) for link, row in rows)

    def _same_link(self, link: int, row: tuple[Maybe[float], ...]) -> NvLink | None:
        """Return what was said of a link at the last visit, if its numbers are the same still."""
        before = self._links_before.get(link)
        return before[1] if before is not None and before[0] == row else None

    def _link(self, link: int, row: tuple[Maybe[float], ...]) -> NvLink:
        state, *errors, speed = row
        if len(errors) == 1:
            replays, recoveries, crc = NOT_SUPPORTED, errors[0], NOT_SUPPORTED
        elif isinstance(state, Absent):  # Before driver 520 there are no such fields.
            state = cast("Maybe[float]", self._ask("nvmlDeviceGetNvLinkState", link))
            replays, recoveries, crc = (self._ask("nvmlDeviceGetNvLinkErrorCounter", link, n) for n in range(3))
        else:
            replays, recoveries, crc = errors
        active = state if isinstance(state, Absent) else state == 1
        remote, remote_pci = self._remote(link, active)
        found = NvLink(
            link=link,
            active=active,
            version=self._link_version(link),
            speed_bytes_per_second=speed if isinstance(speed, Absent) else speed * 1e6,
            remote=remote,
            remote_pci_address=remote_pci,
            replay_errors_total=counted(replays),
            recovery_errors_total=counted(recoveries),
            crc_errors_total=counted(crc),
        )
        if known(row[0]):  # else its state was asked by itself, and is not in the row
            self._links_before[link] = row, found
        return found

    def _link_version(self, link: int) -> Maybe[str]:
        version = self._link_versions.get(link)
        if version is None:
            version = self._link_versions[link] = worded(self._ask("nvmlDeviceGetNvLinkVersion", link), LINK_VERSIONS)
        return version

    def _remote(self, link: int, active: Maybe[bool]) -> tuple[Maybe[str], Maybe[str]]:
        """Return kind and address of the other end, which a link that is down does not tell."""
        if active is not True:
            self._remotes.pop(link, None)
            why = active if isinstance(active, Absent) else LINK_IS_DOWN
            return why, why
        if link not in self._remotes:
            kind = self._ask("nvmlDeviceGetNvLinkRemoteDeviceType", link)
            pci = self._ask("nvmlDeviceGetNvLinkRemotePciInfo", link)
            self._remotes[link] = (worded(kind, REMOTES), pci if isinstance(pci, Absent) else pci_address(pci))
        return self._remotes[link]

    def _fabric(self) -> Fabric:
        info = FabricInfo()
        for version in FABRIC_VERSIONS:
            info.version = version
            answer = self._ask("nvmlDeviceGetGpuFabricInfoV", ctypes.byref(info))
            if not (isinstance(answer, Absent) and answer.why is Why.MISSING_SYMBOL):
                break
        else:  # Before driver 550 there is a registration, and no health.
            answer = self._ask("nvmlDeviceGetGpuFabricInfo", ctypes.byref(info, FabricInfo.clusterUuid.offset))
            info.version = 0
        if isinstance(answer, Absent):
            return hollow(Fabric, answer)
        state = worded(info.state, FABRIC_STATES)
        status: Maybe[str] = NOT_SUPPORTED
        if state == "completed":
            status = "Success" if info.status == OK else str(nvml.NVMLError(info.status))
        if not info.version:
            return Fabric(state=state, status=status, health=absent(pynvml.NVML_ERROR_FUNCTION_NOT_FOUND))
        unhealthy = fabric_faults(info.healthMask)
        summary = info.healthSummary or (2 if unhealthy else 1 if info.healthMask else 0)
        return Fabric(state=state, status=status, health=worded(summary, FABRIC_HEALTH), unhealthy=unhealthy)

    def _processes(self, handle: Any) -> Maybe[tuple[GpuProcess, ...]]:
        processes = first_known(
            ("nvmlDeviceGetComputeRunningProcesses_v3", handle), ("nvmlDeviceGetComputeRunningProcesses_v2", handle)
        )
        if isinstance(processes, Absent):
            return processes
        return tuple(
            GpuProcess(
                pid=process.pid,
                used_bytes=NOT_SUPPORTED if process.usedGpuMemory is None else process.usedGpuMemory,
                name=ask("nvmlSystemGetProcessName", process.pid),
            )
            for process in processes
        )


def gpm_request() -> Any:
    """Return a request for the GPM metrics."""
    request: Any = pynvml.c_nvmlGpmMetricsGet_t()
    request.version = pynvml.NVML_GPM_METRICS_GET_VERSION
    request.numMetrics = len(GPM_METRICS)
    for index, metric in enumerate(GPM_METRICS):
        request.metrics[index].metricId = metric
    return request


class Nvml:
    """An open NVML: all GPUs of the node."""

    def __init__(self, root: Path | None) -> None:
        """Open it. Raises CannotStartError."""
        self._root = root
        answer = ask("nvmlInit")
        if isinstance(answer, Absent):
            raise CannotStartError(NO_DEVICE_NODE if answer.why is Why.NO_PERMISSION else answer)
        self._opened_on = self._driver_side()
        self._library = library_file()
        self._epoch = 0
        self._devices: dict[int, Device] = {}
        self._ancestors: dict[tuple[str, str], Maybe[str]] = {}
        self._left_alone: frozenset[str] = frozenset()
        self._lost: set[int] = set()
        cuda = ask("nvmlSystemGetCudaDriverVersion_v2")
        self._stack = Stack(
            driver=ask("nvmlSystemGetDriverVersion"),
            nvml=ask("nvmlSystemGetNVMLVersion"),
            cuda_driver=cuda if isinstance(cuda, Absent) else f"{cuda // 1000}.{cuda % 1000 // 10}",
        )

    def visit(self, question: Ask) -> Answer:
        """Look at every GPU once. Raises CannotStartError."""
        self._left_alone = frozenset(question.left_alone)
        if self._driver_side() != self._opened_on:
            raise CannotStartError(OTHER_GPUS)  # indices and handles may be another GPU's by now
        count = self._opened_on[0]
        if isinstance(count, Absent):
            raise CannotStartError(count)
        self._epoch = epoch_after(self._epoch, (time.time() - time.monotonic()) / SAMPLE_SECONDS)
        closed = self._must_not_open(count)
        gpus = tuple(self._gpu(index, index in closed) for index in range(count))
        return Answer(
            number=question.number,
            gpus=gpus,
            pairs=self._pairs(gpus),
            stack=self._stack,
            unseen=tuple(unseen_parts(gpus)),
            outdated=self._library != library_file(),
        )

    def sample(self) -> None:
        """Sample the power of every GPU, at one moment. Raises CannotStartError."""
        began = time.monotonic()
        taken: list[tuple[Device, float]] = []
        for index, device in self._devices.items():
            if index not in self._lost and device.pci not in self._left_alone:
                try:
                    watts = device.instant_watts()
                except GpuIsLostError:
                    self._lost.add(index)
                    continue
                if known(watts):
                    taken.append((device, watts))
        if time.monotonic() - began > SAMPLE_SECONDS:
            return  # the first and the last are of different readings of the sensor: they have no sum
        for device, watts in taken:
            device.samples.append((tenth_at(began), watts))

    def _driver_side(self) -> tuple[Maybe[int], str, tuple[str, ...]]:
        """Return what NVML's indices hang on: how many GPUs there are, the driver's version, and its own list of GPUs."""
        count = ask("nvmlDeviceGetCount")
        if self._root is None:
            return count, "", ()
        try:
            version = (self._root / "sys/module/nvidia/version").read_text()
        except OSError:
            version = ""
        try:
            addresses = sorted(entry.name for entry in (self._root / "proc/driver/nvidia/gpus").iterdir())
        except OSError:
            addresses = []
        return count, version, tuple(addresses)

    def _must_not_open(self, count: int) -> set[int]:
        """Return the indices of the GPUs that a fresh child must leave alone: to take their handle is to wake them.

        NVML's indices follow the PCI addresses, and so does the driver's own list, which needs no NVML.
        """
        if self._root is None or not self._left_alone or len(self._devices) == count:
            return set()
        try:
            addresses = sorted(entry.name.lower() for entry in (self._root / "proc/driver/nvidia/gpus").iterdir())
        except OSError:
            return set()
        return (
            {index for index, a in enumerate(addresses) if a in self._left_alone} if len(addresses) == count else set()
        )

    def _gpu(self, index: int, closed: bool) -> Gpu:
        device = self._devices.get(index)
        if closed if device is None else device.pci in self._left_alone:
            # What NVML called lost stays lost: only a reset brings it back.
            return self._gone(index, LEFT_ALONE, index in self._lost or LEFT_ALONE)
        try:
            if device is None:
                handle = ask("nvmlDeviceGetHandleByIndex", index)
                if isinstance(handle, Absent):
                    return self._gone(index, handle, handle)
                device = self._devices[index] = Device(handle, index)
            gpu = device.visit(self._epoch)
        except GpuIsLostError:
            self._lost.add(index)
            return self._gone(index, LOST, lost=True)
        self._lost.discard(index)
        return gpu

    def _gone(self, index: int, why: Absent, lost: Maybe[bool]) -> Gpu:
        device = self._devices.get(index)
        return nobody(f"index:{index}", index, why, lost) if device is None else device.gone(why, lost)

    def _pairs(self, gpus: tuple[Gpu, ...]) -> tuple[GpuPair, ...]:
        ends = [link_ends(gpu) for gpu in gpus]
        return tuple(
            self._pair(gpus[i], gpus[j], nvlinks_between(gpus[i], ends[i], gpus[j], ends[j]))
            for i in range(len(gpus))
            for j in range(i + 1, len(gpus))
        )

    def _pair(self, first: Gpu, second: Gpu, nvlinks: Maybe[int]) -> GpuPair:
        why = first.lost if isinstance(first.lost, Absent) else second.lost if isinstance(second.lost, Absent) else LOST
        if first.lost is not False or second.lost is not False:
            return GpuPair(
                first=first.uuid,
                second=second.uuid,
                nvlinks=why,
                ancestor=self._ancestors.get((first.uuid, second.uuid), why),
                p2p_read=why,
                p2p_write=why,
                p2p_nvlink=why,
                p2p_atomics=why,
            )
        handles = self._devices[first.index].handle, self._devices[second.index].handle
        key = (first.uuid, second.uuid)
        try:
            if key not in self._ancestors:
                self._ancestors[key] = worded(ask("nvmlDeviceGetTopologyCommonAncestor", *handles), ANCESTORS)
            read, write, nvlink, atomics = (
                worded(ask("nvmlDeviceGetP2PStatus", *handles, way), P2P_STATUS)
                for way in (P2P_READ, P2P_WRITE, P2P_NVLINK, P2P_ATOMICS)
            )
        except GpuIsLostError:
            read = write = nvlink = atomics = LOST
        return GpuPair(
            first=first.uuid,
            second=second.uuid,
            nvlinks=nvlinks,
            ancestor=self._ancestors.get(key, LOST),
            p2p_read=read,
            p2p_write=write,
            p2p_nvlink=nvlink,
            p2p_atomics=atomics,
        )


def tenth_at(moment: float) -> int:
    """Return the tenth of a second that a moment of the monotonic clock is nearest to."""
    return round(moment / SAMPLE_SECONDS)


def epoch_after(before: int, epoch: float) -> int:
    """Return the tenth of a second of Unix time at which the monotonic clock's began, which is *epoch* exactly.

    It moves when the wall clock is set, and not because that runs a little faster: tenths would be told twice.
    """
    return before if abs(epoch - before) <= 0.75 else round(epoch)


def next_sample_at(began: float, ended: float) -> float:
    """Return when to sample again after a round: at the next tenth, or later, where the driver is slow."""
    earliest = ended + REST_FACTOR * (ended - began)
    return max(tenth_at(began) + 1, math.ceil(earliest / SAMPLE_SECONDS)) * SAMPLE_SECONDS


def library_file() -> tuple[int, int] | None:
    """Return device and inode of the file that lies where NVML's library was loaded from; None: there is none."""
    path = _library_path()
    try:
        there = Path(path).stat()
    except OSError:
        return None
    return (there.st_dev, there.st_ino) if path else None


@cache
def _library_path() -> str:
    """Return where NVML's library was loaded from; empty: it was not, as in a simulation."""
    try:
        lines = Path("/proc/self/maps").read_text().splitlines()
    except OSError:
        return ""
    mapped = (line.partition("/")[2] for line in lines if "/libnvidia-ml.so" in line)
    return next((f"/{path}".removesuffix(" (deleted)") for path in mapped), "")


def unseen_parts(gpus: tuple[Gpu, ...]) -> Iterator[Unseen]:
    """Yield the parts that rights or an error keep from us; a single value that a board does not have is none."""
    for gpu in gpus:
        if gpu.lost is not True and isinstance(gpu.lost, Absent):
            yield Unseen(Source.NVML, gpu.lost, f"GPU {gpu.index}")
    thresholds = [gpu.ecc.sram_threshold_exceeded for gpu in gpus]
    denied = next((t for t in thresholds if isinstance(t, Absent) and t.why is Why.NO_PERMISSION), None)
    if denied:
        yield Unseen(Source.NVML, denied, "SRAM error threshold")


def serve(questions: BinaryIO, answers: BinaryIO, root: Path | None) -> None:
    """Answer questions until there are no more; sample power in between."""
    opened: Nvml | None = None
    next_sample: float | None = None
    while True:
        patience = None if next_sample is None else max(0.0, next_sample - time.monotonic())
        if not select.select([questions], [], [], patience)[0]:
            assert opened is not None
            next_sample = sampled(opened)
            continue
        question = read(questions)
        if question is None:
            return
        try:
            opened = opened or Nvml(root)
            next_sample = next_sample or time.monotonic()
            answer = opened.visit(question)
        except CannotStartError as e:
            answer = Answer(number=question.number, failure=e.why)
        except GpuIsLostError:
            answer = Answer(number=question.number, failure=LOST)
        except Exception as e:  # The last seam before the pipe: what is said here is all that the parent learns.
            answer = Answer(number=question.number, failure=Absent(Why.FAILED, f"the NVML child failed: {e!r}"))
        answers.write(frame(answer))
        answers.flush()
        if answer.failure is not None:
            return


def sampled(opened: Nvml) -> float | None:
    """Sample power; return when to do so again, None: never, as NVML has ended. The next question learns why."""
    began = time.monotonic()
    try:
        opened.sample()
    except CannotStartError:
        return None
    return next_sample_at(began, time.monotonic())


def read(questions: BinaryIO) -> Ask | None:
    """Return the next question, or None when the parent has hung up."""
    head = questions.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    (length,) = LENGTH.unpack(head)
    body = questions.read(min(length, FRAME_MAX_BYTES))
    return msgspec.msgpack.decode(body, type=Ask) if len(body) == length else None


def stop(_signal: int, _frame: object) -> NoReturn:
    """End in good order: Python calls this between two calls of NVML, never within one."""
    raise SystemExit(0)


def main() -> None:
    """Run the child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's affair; it hangs up when it goes.
    signal.signal(signal.SIGTERM, stop)
    options = argparse.ArgumentParser(prog="nvml_child")
    options.add_argument("--root", type=Path)
    options.add_argument("--library", help="module whose library(spec) stands in for libnvidia-ml.so.1")
    options.add_argument("--spec", default="")
    given = options.parse_args()
    # What a library may print must not get between the frames.
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    if given.library:
        pynvml.nvmlLib = importlib.import_module(given.library).library(given.spec)
    with os.fdopen(os.dup(0), "rb", buffering=0) as questions, contextlib.suppress(BrokenPipeError):
        serve(questions, answers, given.root)
    with contextlib.suppress(pynvml.NVMLError):
        pynvml.nvmlShutdown()


if __name__ == "__main__":
    main()
    sys.exit(0)
