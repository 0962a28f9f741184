"""What one visit saw of the host: PCI tree, tasks, memory, driver module, fabric manager, versions."""

from __future__ import annotations

import msgspec

from doctor.snapshot.absence import NOT_ASKED, Maybe


class PciDevice(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An NVIDIA device of the PCI tree (GPU or NVSwitch) as sysfs shows it, with its upstream port."""

    address: str
    device_id: str
    """`vendor:device`, e.g. `10de:2330`."""
    kind: str
    """`gpu` or `nvswitch`."""
    driver: Maybe[str] = NOT_ASKED
    """The bound kernel driver; `not-present` where none is, `vfio-pci` when it is given away on purpose."""
    generation: Maybe[int] = NOT_ASKED
    generation_max: Maybe[int] = NOT_ASKED
    width: Maybe[int] = NOT_ASKED
    width_max: Maybe[int] = NOT_ASKED
    numa_node: Maybe[int] = NOT_ASKED
    upstream: Maybe[str] = NOT_ASKED
    """PCI address of the port above it."""
    upstream_generation: Maybe[int] = NOT_ASKED
    upstream_generation_max: Maybe[int] = NOT_ASKED
    upstream_width: Maybe[int] = NOT_ASKED
    upstream_width_max: Maybe[int] = NOT_ASKED
    acs_enabled: Maybe[bool] = NOT_ASKED
    """Access Control Services redirect peer traffic at a port above it; needs root to read."""


class DriverGpu(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A GPU as `/proc/driver/nvidia/gpus` shows it: from the driver's cache, without NVML."""

    pci_address: str
    name: Maybe[str] = NOT_ASKED
    uuid: Maybe[str] = NOT_ASKED
    excluded: Maybe[bool] = NOT_ASKED


class BlockedTask(msgspec.Struct, frozen=True):
    """A task in uninterruptible sleep (state D)."""

    pid: int
    name: str


class Host(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The host."""

    pci_devices: Maybe[tuple[PciDevice, ...]] = NOT_ASKED
    driver_module: Maybe[str] = NOT_ASKED
    """Version of the loaded `nvidia` kernel module; `not-present`: none is loaded."""
    driver_gpus: Maybe[tuple[DriverGpu, ...]] = NOT_ASKED
    blocked_tasks: Maybe[tuple[BlockedTask, ...]] = NOT_ASKED
    """Those named `nv…` and those of serving engines."""
    iommu: Maybe[str] = NOT_ASKED
    """`off`, `passthrough` or `translated`."""
    memory_total_bytes: Maybe[int] = NOT_ASKED
    memory_available_bytes: Maybe[int] = NOT_ASKED
    memory_pressure_ratio: Maybe[float] = NOT_ASKED
    """PSI `full avg60`, 0 to 1."""
    cpu_pressure_ratio: Maybe[float] = NOT_ASKED
    """PSI `some avg60`, 0 to 1: time in which some task of the node waited for a processor."""
    virtual_machine: Maybe[bool] = NOT_ASKED


class NvSwitch(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """An NVSwitch as `/proc/driver/nvidia-nvswitch` shows it."""

    pci_address: str
    bios_version: Maybe[str] = NOT_ASKED
    uuid: Maybe[str] = NOT_ASKED


class FabricManager(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """NVIDIA's fabric manager, which a board with NVSwitches needs."""

    unit_state: Maybe[str] = NOT_ASKED
    """systemd's ActiveState (`active`, `failed`, `inactive`); `not-present`: no such unit."""
    running: Maybe[bool] = NOT_ASKED
    """Whether its process exists."""
    version: Maybe[str] = NOT_ASKED
    switches: Maybe[tuple[NvSwitch, ...]] = NOT_ASKED
    messages: tuple[FabricMessage, ...] = ()


class FabricMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A line of the fabric manager's log that some symptom can use."""

    text: str
    where: str
    at: float | None = None
    kind: str
    """`fatal`, `non-fatal`, `started`, `nothing-to-do`, `version-mismatch`, `link-failure`, `terminated`, `other`."""


class Stack(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The node's driver stack. An engine's own versions are in `EngineStack`."""

    driver: Maybe[str] = NOT_ASKED
    nvml: Maybe[str] = NOT_ASKED
    cuda_driver: Maybe[str] = NOT_ASKED
    """The newest CUDA that the driver serves: `13.0`."""
    cuda_toolkit: Maybe[str] = NOT_ASKED
    kernel: Maybe[str] = NOT_ASKED
    os: Maybe[str] = NOT_ASKED


class Node(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Which machine this is."""

    name: str = ""
    booted_at: Maybe[float] = NOT_ASKED
    """Unix time, seconds."""
    simulated: bool = False
