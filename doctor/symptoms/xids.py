"""What the kernel log says about GPUs and switches, sorted: bursts are one event, shadows and the past are not."""

from __future__ import annotations

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


@measured_once
def of_this_boot(history: History) -> tuple[KernelEvent, ...]:
    """Return the kernel events since the node booted and the driver was last loaded, in the order seen."""
    booted_at = history.latest.node.booted_at
    kept: list[KernelEvent] = []
    for event in history.kernel_events():
        if event.before_boot or (known(booted_at) and event.at is not None and event.at < booted_at):
            continue
        if _starts_anew(event):
            kept = _of_its_probing(kept) if isinstance(event, NvidiaMessage) else []
        kept.append(event)
    return tuple(kept)


_PROBING = ("NVRM: The NVIDIA GPU ", "NVRM: The NVIDIA probe routine ")
"""What the driver says of devices only while it is loaded; it prints that it is loading when it has probed them."""


def _of_its_probing(kept: list[KernelEvent]) -> list[KernelEvent]:
    """Return what stands right before the driver's word that it is loading and is about that same load."""
    first = len(kept)
    while first and isinstance(kept[first - 1], NvidiaMessage) and kept[first - 1].text.startswith(_PROBING):
        first -= 1
    return kept[first:]


def _starts_anew(event: KernelEvent) -> bool:
    return (isinstance(event, HostMessage) and event.kind == "boot") or (
        isinstance(event, NvidiaMessage) and event.kind == "module-loaded"
    )


@measured_once
def xid_events(history: History) -> tuple[XidEvent, ...]:
    """Return the Xid events of this boot and driver load, in the order seen, without shadows (45 after another)."""
    grouping = _Grouping()
    for event in of_this_boot(history):
        if isinstance(event, Xid):
            grouping.take(event)
    return tuple(grouping.events)


class _Grouping:
    """Makes events of Xid lines, in time that grows with the lines and not with their square."""

    def __init__(self) -> None:
        self.events: list[XidEvent] = []
        self._by_code: dict[tuple[str, int], int] = {}
        """Index of the last event of a code on a GPU."""
        self._by_gpu: dict[str, tuple[int, float | None]] = {}
        """Index of the event that a GPU's last line belongs to, shadows included, and that line's time."""
        self._last: tuple[int, float | None] | None = None
        """The same of the node, of causes and their shadows only."""

    def take(self, xid: Xid) -> None:
        """Add a line to the event that it belongs to, or begin one."""
        cause = self._cause(xid) if xid.code == 45 else None
        if cause is not None:
            self._shadow(cause, xid)
            return
        if xid.code == 45 and xid.caused_by is not None:
            # Its cause stood in a part of the log that nobody has; the line itself says what it was.
            xid = msgspec.structs.replace(xid, code=xid.caused_by, caused_by=None)
        mine = self._by_code.get((xid.pci_address, xid.code))
        if mine is not None and _is_near(xid.at, self.events[mine].last_at):
            event = self.events[mine]
            last_at = event.last_at if xid.at is None else xid.at
            self.events[mine] = msgspec.structs.replace(event, count=event.count + xid.count, last_at=last_at)
        else:
            mine = len(self.events)
            self.events.append(XidEvent(first=xid, count=xid.count, last_at=xid.at))
        self._by_code[xid.pci_address, xid.code] = mine
        self._by_gpu[xid.pci_address] = mine, xid.at
        if xid.code != 45:
            self._last = mine, xid.at

    def _cause(self, shadow: Xid) -> int | None:
        """Return the event that an Xid 45 cleans up after: the one that it names, its GPU's last, or the node's.

        An engine has a process on each of its GPUs: what one of them dies of is cleaned up on all.
        """
        if shadow.caused_by is not None:
            named = self._by_code.get((shadow.pci_address, shadow.caused_by))
            if named is not None:
                return named
        for last in (self._by_gpu.get(shadow.pci_address), self._last):
            if last is not None and self.events[last[0]].code != 45 and _is_near(shadow.at, last[1]):
                return last[0]
        return None

    def _shadow(self, cause: int, xid: Xid) -> None:
        event = self.events[cause]
        self.events[cause] = msgspec.structs.replace(event, shadows=event.shadows + xid.count)
        self._by_gpu[xid.pci_address] = self._last = cause, xid.at


def _is_near(one: float | None, other: float | None) -> bool:
    return one is None or other is None or abs(one - other) <= BURST_SECONDS


def was_recovered(history: History, event: XidEvent) -> bool:
    """Whether the driver asked for a reset or a reboot after this event, and has taken that back: the GPU was reset.

    A driver that never asked has taken nothing back: its "none" clears nobody.
    """
    lines = [e for e in of_this_boot(history) if isinstance(e, Xid) and e.pci_address == event.pci_address]
    ours = max((i for i, line in enumerate(lines) if line.code == event.code), default=-1)
    changes = [line for line in lines[ours + 1 :] if line.code == 154 and line.recovery_action is not None]
    if changes and changes[-1].recovery_action == "none":
        return True
    words = [
        (snapshot.at, gpu.recovery_action)
        for snapshot in history.snapshots
        for gpu in snapshot.gpus
        if gpu.pci_address == event.pci_address and known(gpu.recovery_action)
    ]
    if event.last_at is None or not words or words[-1][1] != "none":
        return False
    asked = [at for at, word in words if word != "none" and at >= event.last_at]
    asked += [change.at for change in changes if change.at is not None]
    return bool(asked) and history.now >= max(asked) + AGAIN_SECONDS


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
