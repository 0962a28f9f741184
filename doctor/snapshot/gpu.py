"""What one visit saw of one GPU, of its links and of a pair of GPUs.

Values are NVML's, in the units that the names give; `nvidia-smi -q` and `collect-env` fill the same fields.
"""

from __future__ import annotations

import msgspec

from doctor.snapshot.absence import NOT_ASKED, Maybe


class Sample(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """One fast reading between two visits."""

    at: float
    """Unix time, seconds."""
    value: float


class GpuMemory(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Frame buffer and BAR1, bytes."""

    total_bytes: Maybe[int] = NOT_ASKED
    used_bytes: Maybe[int] = NOT_ASKED
    free_bytes: Maybe[int] = NOT_ASKED
    reserved_bytes: Maybe[int] = NOT_ASKED
    bar1_total_bytes: Maybe[int] = NOT_ASKED
    bar1_used_bytes: Maybe[int] = NOT_ASKED


class MigDevice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One MIG device: a compute instance inside a GPU instance."""

    uuid: str
    gpu_instance: Maybe[int] = NOT_ASKED
    compute_instance: Maybe[int] = NOT_ASKED
    profile: Maybe[str] = NOT_ASKED
    """As the driver names it, e.g. `3g.40gb`."""
    memory_total_bytes: Maybe[int] = NOT_ASKED
    memory_used_bytes: Maybe[int] = NOT_ASKED
    multiprocessors: Maybe[int] = NOT_ASKED
    processes: Maybe[tuple[GpuProcess, ...]] = NOT_ASKED


class Mig(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Multi-Instance GPU state."""

    enabled: Maybe[bool] = NOT_ASKED
    enabled_after_reset: Maybe[bool] = NOT_ASKED
    """NVML's pending mode: differs from `enabled` when a reset is due."""
    devices: Maybe[tuple[MigDevice, ...]] = NOT_ASKED
    device_slots: Maybe[int] = NOT_ASKED
    """How many MIG devices the GPU can hold."""


class Thermal(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Temperatures, degrees Celsius."""

    gpu_celsius: Maybe[float] = NOT_ASKED
    memory_celsius: Maybe[float] = NOT_ASKED
    margin_celsius: Maybe[float] = NOT_ASKED
    """NVML's T.Limit: distance of the hottest internal sensor to the slowdown reference. It is not `87 - gpu_celsius`."""
    slowdown_margin_celsius: Maybe[float] = NOT_ASKED
    """The margin at which the hardware slows down: -2 on H100 and H200."""
    shutdown_margin_celsius: Maybe[float] = NOT_ASKED
    slowdown_celsius: Maybe[float] = NOT_ASKED
    """Older boards: the absolute threshold."""
    shutdown_celsius: Maybe[float] = NOT_ASKED
    gpu_max_celsius: Maybe[float] = NOT_ASKED
    memory_max_celsius: Maybe[float] = NOT_ASKED
    fan_percent: Maybe[float] = NOT_ASKED


class Clocks(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Clocks, MHz, and why they are where they are."""

    sm_mhz: Maybe[int] = NOT_ASKED
    sm_max_mhz: Maybe[int] = NOT_ASKED
    memory_mhz: Maybe[int] = NOT_ASKED
    memory_max_mhz: Maybe[int] = NOT_ASKED
    performance_state: Maybe[int] = NOT_ASKED
    """0 (fastest) to 15."""
    event_reasons: Maybe[tuple[str, ...]] = NOT_ASKED
    """Active clocks event reasons, by the names of `EVENT_REASONS`, sorted."""
    sw_power_cap_seconds: Maybe[float] = NOT_ASKED
    """Time under this reason since the driver was loaded; use its growth."""
    sync_boost_seconds: Maybe[float] = NOT_ASKED
    sw_thermal_seconds: Maybe[float] = NOT_ASKED
    hw_thermal_seconds: Maybe[float] = NOT_ASKED
    power_brake_seconds: Maybe[float] = NOT_ASKED


EVENT_REASONS = {
    0x1: "idle",
    0x2: "applications-clocks",
    0x4: "sw-power-cap",
    0x8: "hw-slowdown",
    0x10: "sync-boost",
    0x20: "sw-thermal-slowdown",
    0x40: "hw-thermal-slowdown",
    0x80: "hw-power-brake",
    0x100: "display-clocks",
    0x200: "board-limit",
    0x400: "reliability",
}
"""Clocks event reasons by NVML's bit (nvml.h, CUDA 13.3)."""


class Power(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Power of the GPU, watts; energy in joules."""

    average_watts: Maybe[float] = NOT_ASKED
    instant_watts: Maybe[float] = NOT_ASKED
    limit_watts: Maybe[float] = NOT_ASKED
    limit_enforced_watts: Maybe[float] = NOT_ASKED
    limit_default_watts: Maybe[float] = NOT_ASKED
    limit_min_watts: Maybe[float] = NOT_ASKED
    limit_max_watts: Maybe[float] = NOT_ASKED
    energy_joules: Maybe[float] = NOT_ASKED
    """Since the driver was loaded."""
    samples: tuple[Sample, ...] = ()
    """Instant power since the last visit, as fast as the sensor changes, oldest first."""


class Activity(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How busy the GPU is. Ratios are 0 to 1."""

    gpu_ratio: Maybe[float] = NOT_ASKED
    """Share of the sampling time in which any kernel ran (nvidia-smi's GPU-Util)."""
    memory_ratio: Maybe[float] = NOT_ASKED
    """Share of the sampling time in which memory was read or written."""
    sm_ratio: Maybe[float] = NOT_ASKED
    """GPM: SMs busy."""
    tensor_ratio: Maybe[float] = NOT_ASKED
    """GPM: tensor cores busy."""
    dram_ratio: Maybe[float] = NOT_ASKED
    """GPM: memory bandwidth used."""
    nvlink_rx_bytes_per_second: Maybe[float] = NOT_ASKED
    nvlink_tx_bytes_per_second: Maybe[float] = NOT_ASKED
    pcie_rx_bytes_per_second: Maybe[float] = NOT_ASKED
    pcie_tx_bytes_per_second: Maybe[float] = NOT_ASKED


class Pcie(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The GPU's PCI Express link."""

    generation: Maybe[int] = NOT_ASKED
    generation_max: Maybe[int] = NOT_ASKED
    """The lesser of what GPU and slot can do."""
    width: Maybe[int] = NOT_ASKED
    width_max: Maybe[int] = NOT_ASKED
    replays_total: Maybe[int] = NOT_ASKED
    told_by: str = ""
    """The program whose output tells it, where that is not NVML: `lspci`, `dcgmi`."""


class Ecc(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Memory errors and repairs."""

    enabled: Maybe[bool] = NOT_ASKED
    corrected_volatile: Maybe[int] = NOT_ASKED
    """Volatile counters start at zero when the driver is loaded."""
    uncorrected_volatile: Maybe[int] = NOT_ASKED
    corrected_aggregate: Maybe[int] = NOT_ASKED
    uncorrected_aggregate: Maybe[int] = NOT_ASKED
    sram_threshold_exceeded: Maybe[bool] = NOT_ASKED
    rows_remapped_corrected: Maybe[int] = NOT_ASKED
    rows_remapped_uncorrected: Maybe[int] = NOT_ASKED
    remap_pending: Maybe[bool] = NOT_ASKED
    remap_failed: Maybe[bool] = NOT_ASKED


class NvLink(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One NVLink of a GPU."""

    link: int
    active: Maybe[bool] = NOT_ASKED
    version: Maybe[str] = NOT_ASKED
    """`4.0` on Hopper."""
    speed_bytes_per_second: Maybe[float] = NOT_ASKED
    """One direction."""
    remote: Maybe[str] = NOT_ASKED
    """What the other end is: `gpu`, `switch`, `cpu` or `unknown`."""
    remote_pci_address: Maybe[str] = NOT_ASKED
    replay_errors_total: Maybe[int] = NOT_ASKED
    recovery_errors_total: Maybe[int] = NOT_ASKED
    crc_errors_total: Maybe[int] = NOT_ASKED


class Fabric(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The GPU's registration with the NVLink fabric. `completed` is sticky: no proof that the manager lives."""

    state: Maybe[str] = NOT_ASKED
    """`not-supported`, `not-started`, `in-progress` or `completed`."""
    status: Maybe[str] = NOT_ASKED
    """NVML's word, meaningful only when completed: `Success` or an error."""
    health: Maybe[str] = NOT_ASKED
    """Summary: `not-reported`, `healthy`, `unhealthy` or `limited`."""
    unhealthy: tuple[str, ...] = ()
    """The fields of the health mask that report a fault, in words."""


class GpuProcess(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A process that holds memory of a GPU. The pid is the host's."""

    pid: int
    used_bytes: Maybe[int] = NOT_ASKED
    kind: str = "compute"
    name: Maybe[str] = NOT_ASKED


class Gpu(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One GPU. It is its UUID; evidence that tells no UUID gives `index:N`."""

    uuid: str
    index: int
    """NVML's index at this visit: for people and commands, never an identity."""
    pci_address: Maybe[str] = NOT_ASKED
    """Domain:bus:device.function, lower case, four-digit domain: `0000:18:00.0`."""
    pci_device_id: Maybe[str] = NOT_ASKED
    """`vendor:device`, lower case: `10de:2330`. The product is looked up by this."""
    pci_subsystem_id: Maybe[str] = NOT_ASKED
    name: Maybe[str] = NOT_ASKED
    serial: Maybe[str] = NOT_ASKED
    vbios_version: Maybe[str] = NOT_ASKED
    inforom_version: Maybe[str] = NOT_ASKED
    compute_capability: Maybe[tuple[int, int]] = NOT_ASKED
    numa_node: Maybe[int] = NOT_ASKED
    persistence_mode: Maybe[bool] = NOT_ASKED
    compute_mode: Maybe[str] = NOT_ASKED
    """`default`, `exclusive-process` or `prohibited`."""
    lost: Maybe[bool] = NOT_ASKED
    """NVML answers GPU_IS_LOST for it."""
    recovery_action: Maybe[str] = NOT_ASKED
    """`none`, `reset`, `reboot`, `drain-p2p`, `drain-and-reset`, …"""
    memory: GpuMemory = GpuMemory()
    mig: Mig = Mig()
    thermal: Thermal = Thermal()
    clocks: Clocks = Clocks()
    power: Power = Power()
    activity: Activity = Activity()
    pcie: Pcie = Pcie()
    ecc: Ecc = Ecc()
    links: Maybe[tuple[NvLink, ...]] = NOT_ASKED
    fabric: Fabric = Fabric()
    processes: Maybe[tuple[GpuProcess, ...]] = NOT_ASKED


class GpuPair(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """How two GPUs reach each other. One entry a pair, `first` before `second` in index order."""

    first: str
    """UUID."""
    second: str
    nvlinks: Maybe[int] = NOT_ASKED
    """The `n` of `NVn` in `topo -m`; 0 where the connection is PCIe."""
    ancestor: Maybe[str] = NOT_ASKED
    """The PCIe way, in `topo -m`'s words: `X`, `PIX`, `PXB`, `PHB`, `NODE` or `SYS`."""
    p2p_read: Maybe[str] = NOT_ASKED
    """`ok`, or NVML's reason: `chipset-not-supported`, `gpu-not-supported`, `topology-not-supported`,
    `disabled-by-regkey`, `not-supported`, `unknown`."""
    p2p_write: Maybe[str] = NOT_ASKED
    p2p_nvlink: Maybe[str] = NOT_ASKED
    p2p_atomics: Maybe[str] = NOT_ASKED
