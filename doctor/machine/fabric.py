"""The time of an all-reduce on the fabric that is there: a latency and a bandwidth."""

from __future__ import annotations

import enum
from collections.abc import Sequence
from math import log2

import msgspec

from doctor.machine.card import Card
from doctor.snapshot import Absent, GpuPair, Maybe, Why, known


class Link(enum.Enum):
    """What the ranks talk over."""

    SWITCH = "nvswitch"
    """Every GPU has all its links to every other (NV18)."""
    MESH = "nvlink-mesh"
    """Each pair has links of its own (NV6 on a 4-GPU HGX H100, NV12 on a bridged pair)."""
    PCIE = "pcie"


class Fabric(msgspec.Struct, frozen=True, kw_only=True):
    """What a group of GPUs talks over."""

    link: Link
    bytes_per_second: float
    """One direction, what the wire can do for one GPU towards the others of the group."""
    custom: bool = True
    """Whether the engine's own all-reduce kernels run on it; else NCCL's do."""


NVLINK_EFFICIENCY = 0.82
"""Of the wire's rate: 370 of 450 GB/s (NCCL's author in nccl-tests#212, measured again in nccl-tests#309)."""
PCIE_EFFICIENCY = 0.5
"""Of the wire's rate: 28–35 of 63 GB/s on 8 and 4 cards (nccl#1639), 9 of 15.8 GB/s on 4 (haohervchb/sglang-V100#2)."""


CUSTOM_RANKS = frozenset({2, 4, 6, 8})
"""The group sizes that vLLM's own kernels serve (signal `custom-allreduce-off-world-size`)."""


def switch_of(card: Card, *, custom: bool = True) -> Fabric:
    """Return the fabric of a board with NVSwitches: all links of a GPU reach any other. H100: 450 GB/s."""
    return Fabric(link=Link.SWITCH, bytes_per_second=card.nvlink_bytes_per_second, custom=custom)


def mesh_of(card: Card, links_per_pair: int, ranks: int, *, custom: bool = True) -> Fabric:
    """Return the fabric of GPUs linked pair by pair: only the links within the group carry its traffic.

    HGX H100 4-GPU, six links a pair of 25 GB/s: 450 GB/s with all four GPUs, 150 GB/s with two of them.
    """
    links = min(links_per_pair * max(ranks - 1, 1), card.nvlinks)
    rate = card.nvlink_bytes_per_second * links / card.nvlinks if card.nvlinks else 0.0
    return Fabric(link=Link.MESH, bytes_per_second=rate, custom=custom)


def pcie_of(card: Card, ranks: int, *, custom: bool = True) -> Fabric:
    """Return the fabric of GPUs without NVLink; on more than two of them vLLM leaves the all-reduce to NCCL."""
    return Fabric(link=Link.PCIE, bytes_per_second=card.pcie_bytes_per_second, custom=custom and ranks <= 2)


def fabric_between(card: Card, pairs: Sequence[GpuPair], gpus: Sequence[str], *, custom: bool = True) -> Maybe[Fabric]:
    """Return the fabric that these GPUs (UUIDs) share; absent where a pair of them was not seen.

    One pair without NVLink is enough to make the whole group talk over PCIe: a ring is as fast as its slowest hop.
    *custom*: False with `--disable-custom-all-reduce`, or where the engine says that it turned it off.
    """
    group = set(gpus)
    links = [pair.nvlinks for pair in pairs if pair.first in group and pair.second in group]
    seen = [n for n in links if known(n)]
    ranks = len(group)
    if ranks > 1 and len(seen) < ranks * (ranks - 1) // 2:
        return Absent(Why.NOT_ASKED, "how the engine's GPUs are linked was not seen")
    if not seen or min(seen) == 0 or not card.nvlinks:
        return pcie_of(card, ranks, custom=custom)
    if min(seen) >= card.nvlinks:
        return switch_of(card, custom=custom)
    if min(seen) * (ranks - 1) > card.nvlinks:  # no mesh has so many: a switch with some links down
        rate = card.nvlink_bytes_per_second * min(seen) / card.nvlinks
        return Fabric(link=Link.SWITCH, bytes_per_second=rate, custom=custom)
    return mesh_of(card, min(seen), ranks, custom=custom)


def all_reduce_seconds(fabric: Fabric, ranks: int, size_bytes: float) -> float:
    """Return the time of an all-reduce of *size_bytes* over *ranks* GPUs, in a CUDA graph; 0 for one GPU.

    Latency + 2 (n − 1)/n × size / bandwidth: each GPU sends the tensor nearly twice, in a ring or through the switch.
    8 × H100, 4 MiB: 7.5 µs + 1.75 × 4.19 MB / 369 GB/s = 27.4 µs; measured 27 µs. One decode step of Llama 3.3 70B
    at batch 32 reduces 0.5 MiB 160 times: 160 × 10.0 µs = 1.6 ms.
    """
    if ranks < 2:
        return 0.0
    efficiency = PCIE_EFFICIENCY if fabric.link is Link.PCIE else NVLINK_EFFICIENCY
    wire_bytes = 2 * (ranks - 1) / ranks * size_bytes
    return latency_seconds(fabric, ranks) + wire_bytes / (fabric.bytes_per_second * efficiency)


def latency_seconds(fabric: Fabric, ranks: int) -> float:
    """Return the time of an all-reduce of nearly nothing over *ranks* GPUs.

    NVLink, engine's kernels: 3 + 1.5 log₂ n µs; 4.5, 6.0, 7.5 at 2, 4, 8 (H100, sglang#2904: 3.9, 4.8, 7.8 at
    128 KiB or less; vllm#24111, vllm#24532, vllm#42324: 7, 10, 11 at 512 KiB, of which 1.4, 2.1, 2.5 are the wire).
    NVLink, NCCL: 12 + 3 log₂ n µs; 18 and 21 at 4 and 8 (vllm#24532: 21, vllm#42324: 24 at 512 KiB;
    Mooncake#3484: 18.7 at 32 KiB).
    PCIe, NCCL: 8 + 2 µs for each of a ring's 2 (n − 1) steps; 20 at 4 (sglang-V100#2: 19.4 at 4 KiB).
    """
    if fabric.link is Link.PCIE:
        return (8 + 2 * 2 * (ranks - 1)) * 1e-6  # guess: the growth with n; the value at 4 is measured
    if fabric.custom and ranks in CUSTOM_RANKS:
        return (3 + 1.5 * log2(ranks)) * 1e-6
    return (12 + 3 * log2(ranks)) * 1e-6
