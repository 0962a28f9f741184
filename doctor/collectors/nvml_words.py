"""From NVML's numbers to the snapshot's words and units. Nothing here asks NVML anything."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from functools import cache
from typing import Any, TypeVar

import msgspec

from doctor.snapshot import (
    NOT_ASKED,
    Absent,
    Activity,
    Clocks,
    Ecc,
    Fabric,
    Gpu,
    GpuMemory,
    Maybe,
    Mig,
    Pcie,
    Power,
    Thermal,
    Why,
    known,
)

RECOVERY_ACTIONS = dict(enumerate((
    "none", "reset", "reboot", "drain-p2p", "drain-and-reset", "recover-imex", "bus-reset", "system-reboot",
)))  # fmt: skip
COMPUTE_MODES = {0: "default", 1: "exclusive-thread", 2: "prohibited", 3: "exclusive-process"}
LINK_VERSIONS = {1: "1.0", 2: "2.0", 3: "2.2", 4: "3.0", 5: "3.1", 6: "4.0", 7: "5.0", 8: "6.0"}
REMOTES = {0: "gpu", 1: "cpu", 2: "switch"}
ANCESTORS = {0: "X", 10: "PIX", 20: "PXB", 30: "PHB", 40: "NODE", 50: "SYS"}
P2P_STATUS = {
    0: "ok",
    1: "chipset-not-supported",
    2: "gpu-not-supported",
    3: "topology-not-supported",
    4: "disabled-by-regkey",
    5: "not-supported",
}
FABRIC_STATES = dict(enumerate(("not-supported", "not-started", "in-progress", "completed")))
FABRIC_HEALTH = dict(enumerate(("not-reported", "healthy", "unhealthy", "limited")))
FABRIC_FAULTS = (
    (0, "degraded bandwidth"),
    (2, "route recovery in progress"),
    (4, "route unhealthy"),
    (6, "access timeout recovery"),
)
"""Two bits each, by their shift in the health mask: 0 not reported, 1 true, 2 false."""
FABRIC_CONFIGURATION = {
    2: "wrong system GUID",
    3: "wrong chassis serial number",
    4: "no partition",
    5: "insufficient NVLinks",
    6: "incompatible GPU firmware",
    7: "invalid location",
    8: "invalid GPU state",
}
"""Four bits at shift 8: 0 not reported, 1 none."""

T = TypeVar("T", bound=msgspec.Struct)


def scaled(value: Maybe[float], factor: float) -> Maybe[float]:
    """Return a value in another unit."""
    return value if isinstance(value, Absent) else value * factor


def counted(value: Maybe[float]) -> Maybe[int]:
    """Return a value that counts something."""
    return value if isinstance(value, Absent) else int(value)


def flag(value: Maybe[float]) -> Maybe[bool]:
    """Return a value that is yes or no."""
    return value if isinstance(value, Absent) else bool(value)


def worded(value: Maybe[float], words: Mapping[int, str], other: str = "unknown") -> Maybe[str]:
    """Return the word for one of NVML's numbers."""
    return value if isinstance(value, Absent) else words.get(int(value), other)


@cache
def hollow(struct_type: type[T], why: Absent) -> T:
    """Return a struct of which every value is missing for the same reason."""
    return struct_type(
        **{field.name: why for field in msgspec.structs.fields(struct_type) if field.default is NOT_ASKED}
    )


def pci_address(info: Any) -> str:
    """Return an address as the snapshot writes it: NVML's domain has eight digits."""
    domain, _, rest = str(info.busId).lower().partition(":")
    return f"{int(domain, 16):04x}:{rest}"


def pci_id(word: int) -> str:
    """Return `vendor:device` of NVML's combined number."""
    return f"{word & 0xFFFF:04x}:{word >> 16:04x}"


def nobody(uuid: str, index: int, why: Absent, lost: Maybe[bool]) -> Gpu:
    """Return a GPU of which nothing is known, and why."""
    return msgspec.structs.replace(
        hollow_gpu(why),
        uuid=uuid,
        index=index,
        lost=lost,
        memory=hollow(GpuMemory, why),
        mig=hollow(Mig, why),
        thermal=hollow(Thermal, why),
        clocks=hollow(Clocks, why),
        power=hollow(Power, why),
        activity=hollow(Activity, why),
        pcie=hollow(Pcie, why),
        ecc=hollow(Ecc, why),
        fabric=hollow(Fabric, why),
    )


def hollow_gpu(why: Absent) -> Gpu:
    """Return a GPU without identity whose own values are missing."""
    values = {field.name: why for field in msgspec.structs.fields(Gpu) if field.default is NOT_ASKED}
    return Gpu(uuid="", index=0, **values)  # pyright: ignore[reportArgumentType] # every Maybe takes an Absent


def mig_profile(attributes: Any) -> str:
    """Return a MIG profile's name as the driver gives it: `3g.40gb`, or `1c.3g.40gb` for a part of an instance."""
    slices, part = attributes.gpuInstanceSliceCount, attributes.computeInstanceSliceCount
    whole = f"{slices}g.{math.ceil(attributes.memorySizeMB / 1024)}gb"
    return whole if part == slices else f"{part}c.{whole}"


def fabric_faults(mask: int) -> tuple[str, ...]:
    """Return what a fabric health mask complains about. In each field 0 is `not reported`, 2 is `false`."""
    found = [word for shift, word in FABRIC_FAULTS if mask >> shift & 0x3 == 1]
    configuration = mask >> 8 & 0xF
    if configuration > 1:
        found.append(FABRIC_CONFIGURATION.get(configuration, f"incorrect configuration {configuration}"))
    return tuple(found)


SWITCHES = ""
"""Where links end that go to switches, in what `link_ends` returns."""


def link_ends(gpu: Gpu) -> Maybe[Counter[str]]:
    """Return how many active NVLinks end at each other GPU, by PCI address, and how many at switches.

    A virtual machine hides its switches: links to an unknown end are counted as links to a switch.
    """
    if isinstance(gpu.links, Absent):
        without = gpu.links.why is Why.NOT_SUPPORTED and gpu.mig.enabled is not True
        return Counter() if without else gpu.links  # A board without NVLink has none.
    return Counter(
        link.remote_pci_address if link.remote == "gpu" and known(link.remote_pci_address) else SWITCHES
        for link in gpu.links
        if link.active is True and link.remote in {"gpu", "switch", "unknown"}
    )


def nvlinks_between(
    first: Gpu, first_ends: Maybe[Counter[str]], second: Gpu, second_ends: Maybe[Counter[str]]
) -> Maybe[int]:
    """Return how many NVLinks join two GPUs: those from one to the other, or those that both have to switches."""
    if isinstance(first_ends, Absent):
        return first_ends
    if isinstance(second_ends, Absent):
        return second_ends
    direct = min(first_ends[str(second.pci_address)], second_ends[str(first.pci_address)])
    return direct or min(first_ends[SWITCHES], second_ends[SWITCHES])
