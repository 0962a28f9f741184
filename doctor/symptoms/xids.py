"""What the kernel log says about GPUs and switches, sorted: bursts are one event, shadows and the past are not."""

from __future__ import annotations

from collections.abc import Iterable

import msgspec

from doctor.history import History, measured_once
from doctor.snapshot import HostMessage, KernelEvent, NvidiaMessage, Sxid, Xid, known

BURST_SECONDS = 180.0
"""Lines of one code about one GPU this close together are one event (NVSentinel groups bursts within 3 minutes)."""

AGAIN_SECONDS = 60.0
"""NVML must answer for a GPU this long after an Xid before that counts as recovery.

guess: two visits of the daemon; a visit may have asked NVML just before the Xid came."""


class XidEvent(msgspec.Struct, frozen=True, kw_only=True):
    """One event of a GPU: the first line of a burst."""

    first: Xid
    count: int = 1
    """Lines in the burst."""
    last_at: float | None = None
    shadows: int = 0
    """Xid 45 lines that only cleaned up after it."""

    @property
    def code(self) -> int:
        """The Xid's number."""
        return self.first.code

    @property
    def pci_address(self) -> str:
        """The GPU, as in `Gpu.pci_address`."""
        return self.first.pci_address

    @property
    def at(self) -> float | None:
        """When it began, where the log tells."""
        return self.first.at


def of_this_boot(history: History) -> tuple[KernelEvent, ...]:
    """Return the kernel events since the node booted and the driver was last loaded, in the order seen."""
    booted_at = history.latest.node.booted_at
    kept: list[KernelEvent] = []
    for event in history.kernel_events():
        if event.before_boot or (known(booted_at) and event.at is not None and event.at < booted_at):
            continue
        if _starts_anew(event):
            kept.clear()
        kept.append(event)
    return tuple(kept)


def _starts_anew(event: KernelEvent) -> bool:
    return (isinstance(event, HostMessage) and event.kind == "boot") or (
        isinstance(event, NvidiaMessage) and event.kind == "module-loaded"
    )


@measured_once
def xid_events(history: History) -> tuple[XidEvent, ...]:
    """Return the Xid events of this boot and driver load, in the order seen, without shadows (45 after another)."""
    return tuple(_grouped(x for x in of_this_boot(history) if isinstance(x, Xid)))


def _grouped(xids: Iterable[Xid]) -> list[XidEvent]:
    events: list[XidEvent] = []
    for xid in xids:
        if xid.code == 45 and xid.caused_by is not None and not any(e.pci_address == xid.pci_address for e in events):
            continue  # its cause stood in a part of the log that nobody has
        mine = next((i for i in reversed(range(len(events))) if _belongs(xid, events[i])), None)
        if mine is None:
            events.append(XidEvent(first=xid, last_at=xid.at))
            continue
        event = events[mine]
        shadow = xid.code == 45 and event.code != 45
        events[mine] = msgspec.structs.replace(
            event,
            count=event.count + (not shadow),
            shadows=event.shadows + shadow,
            last_at=event.last_at if shadow or xid.at is None else xid.at,
        )
    return events


def _belongs(xid: Xid, event: XidEvent) -> bool:
    if xid.pci_address != event.pci_address or (xid.code not in (event.code, 45)):
        return False
    if xid.at is None or event.last_at is None:
        return True
    return abs(xid.at - event.last_at) <= BURST_SECONDS


def answered_since(history: History, pci_address: str, at: float | None) -> bool:
    """Whether NVML, at the last visit and well after *at*, reads this GPU as if nothing had been: it was reset."""
    latest = history.latest
    if at is None or latest.at < at + AGAIN_SECONDS:
        return False
    return any(
        gpu.pci_address == pci_address and gpu.lost is False and known(gpu.thermal.gpu_celsius) for gpu in latest.gpus
    )


@measured_once
def sxids(history: History) -> tuple[Sxid, ...]:
    """Return the SXid lines of this boot and driver load, in the order seen."""
    return tuple(e for e in of_this_boot(history) if isinstance(e, Sxid))
