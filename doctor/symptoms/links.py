"""How the GPUs are linked: NVLinks that are up, and the ways between the GPUs of a rank group."""

from __future__ import annotations

import msgspec

from doctor.history import History, measured_once
from doctor.snapshot import GpuPair, NvLink, Snapshot, known


class LinkCount(msgspec.Struct, frozen=True, kw_only=True):
    """The NVLinks of one GPU whose states were all read."""

    gpu: str
    """UUID."""
    active: int
    down: tuple[int, ...]
    """Link numbers."""
    far_ends: tuple[str, ...]
    """PCI addresses at the other end of those that are down, where NVML tells."""


@measured_once
def link_counts(history: History) -> tuple[LinkCount, ...]:
    """Return the links of each GPU at the last visit; GPUs whose links could not be read, or under MIG, are left out."""
    counts: list[LinkCount] = []
    for gpu in history.latest.gpus:
        if not known(gpu.links) or gpu.mig.enabled is True:  # MIG shows every link as down
            continue
        down = [link for link in gpu.links if link.active is False]
        active = sum(1 for link in gpu.links if link.active is True)
        if active + len(down) == len(gpu.links):
            counts.append(
                LinkCount(gpu=gpu.uuid, active=active, down=tuple(link.link for link in down), far_ends=_far_ends(down))
            )
    return tuple(counts)


def _far_ends(links: list[NvLink]) -> tuple[str, ...]:
    return tuple(sorted({link.remote_pci_address for link in links if known(link.remote_pci_address)}))


def went_down(history: History) -> dict[str, tuple[int, ...]]:
    """Return, by GPU, the links that are down now and were up at an earlier visit."""
    lost: dict[str, tuple[int, ...]] = {}
    for count in link_counts(history):
        if not count.down:
            continue
        was_up = {
            link.link
            for _, gpu in history.of_gpu(count.gpu)
            if known(gpu.links)
            for link in gpu.links
            if link.active is True
        }
        gone = tuple(link for link in count.down if link in was_up)
        if gone:
            lost[count.gpu] = gone
    return lost


def pairs_among(snapshot: Snapshot, gpus: tuple[str, ...]) -> tuple[GpuPair, ...]:
    """Return the pairs that lie within a set of GPUs (UUIDs)."""
    chosen = set(gpus)
    return tuple(p for p in snapshot.pairs if p.first in chosen and p.second in chosen)


def speaks_nvlink(pair: GpuPair) -> bool | None:
    """Return whether two GPUs reach each other over NVLink; None where nothing tells."""
    if known(pair.nvlinks):
        return pair.nvlinks > 0
    if known(pair.p2p_nvlink):
        return pair.p2p_nvlink == "ok"
    return None


def way_between(pair: GpuPair) -> str:
    """Return the way between two GPUs in `topo -m`'s words, as far as it is known."""
    if known(pair.nvlinks) and pair.nvlinks:
        return f"NV{pair.nvlinks}"
    return pair.ancestor if known(pair.ancestor) else "PCIe"
