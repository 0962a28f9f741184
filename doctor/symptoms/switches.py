"""Whether this node's GPUs meet at NVSwitches, joined from whoever can tell."""

from __future__ import annotations

from collections import Counter

from doctor.history import History, measured_once
from doctor.snapshot import FabricMessage, Snapshot, known

LEAST_SWITCHED_LINKS = 8
"""A GPU with so many links to each of two others meets them at a switch: a 4-GPU mesh gives a pair 6 (H100) or 4 (A100),
a bridge joins two GPUs, or four at 6 (H200 NVL); H800, with the fewest links of a switched board, has 8."""


@measured_once
def has_switches(history: History) -> bool | None:
    """Return whether there are NVSwitches; None where nothing that could tell was seen.

    A virtual machine or a container may hide the switches and still use them; a link's far end tells all the same.
    """
    latest = history.latest
    if known(latest.fabric_manager.switches) and latest.fabric_manager.switches:
        return True
    if known(latest.host.pci_devices) and any(d.kind == "nvswitch" for d in latest.host.pci_devices):
        return True
    ends = {link.remote for gpu in latest.gpus if known(gpu.links) for link in gpu.links if known(link.remote)}
    if "switch" in ends or _matrix_shows_switches(latest):
        return True
    if ends - {"unknown"} or _no_links(latest) or known(latest.host.pci_devices):
        return False
    return None


def _matrix_shows_switches(snapshot: Snapshot) -> bool:
    wide = (p for p in snapshot.pairs if known(p.nvlinks) and p.nvlinks >= LEAST_SWITCHED_LINKS)
    peers = Counter(uuid for pair in wide for uuid in (pair.first, pair.second))
    return any(count >= 2 for count in peers.values())


def _no_links(snapshot: Snapshot) -> bool:
    return bool(snapshot.pairs) and all(pair.nvlinks == 0 for pair in snapshot.pairs)


def standing_messages(history: History) -> tuple[FabricMessage, ...]:
    """Return what the fabric manager's log says since it last came up."""
    messages = [m for snapshot in history.snapshots for m in snapshot.fabric_manager.messages]
    started = max((i for i, m in enumerate(messages) if m.kind == "started"), default=-1)
    return tuple(dict.fromkeys(messages[started + 1 :]))
