"""Record whole incidents for `test_cause_chains.py`: `python tests/record_chain_cases.py [CHAIN …]`.

Each is a simulated node whose faults play the whole chain, in hardware, kernel log, engine log, processes and metrics.
`tests/chains/two-*.rec` are pairs of faults that have nothing to do with each other.
"""

from __future__ import annotations

import sys

import drills
from record_cases import keep

MOMENT = (0, 15, 30)
LOAD = range(0, 331, 30)
"""Long enough for the rules that measure a load."""

CHAINS: dict[str, tuple[range | tuple[float, ...], str, tuple[str, ...]]] = {
    "gpu-lost": (MOMENT, "hgx-h100-8", ("gpu-lost:gpu=2",)),
    "fabric-manager-dead": (MOMENT, "hgx-h100-8", ("fabric-manager-dead-at-start",)),
    "out-of-memory-killer": (MOMENT, "hgx-h100-4", ("oom-kill:rank=1",)),
    "memory-error": (MOMENT, "hgx-h100-4", ("gpu-memory-fault:gpu=1",)),
    "thermal-slowdown": (LOAD, "hgx-h100-4", ("overheating:factor=16",)),
    "memory-held": (MOMENT, "dgx-h100-4of8", ("gpu-memory-held:gpu=1",)),
    "pcie-fallback": (LOAD, "dgx-h100-4of8", ("pcie-fallback:start=-3800,end=-60",)),
    "pcie-fallback-of-dead-links": (LOAD, "hgx-h100-4", ("pcie-fallback",)),
    "mig": (MOMENT, "hgx-h100-4", tuple(f"mig-enabled:gpu={gpu},start=-4000" for gpu in range(4))),
    "two-lost-gpu-and-fault-elsewhere": (MOMENT, "h100-nvl-4", ("gpu-lost:gpu=3", "application-fault:gpu=0")),
    "two-lost-gpu-and-timeout-elsewhere": (
        (0, 15, 85, 100),
        "h100-nvl-4",
        ("gpu-lost:gpu=3", "nccl-timeout:rank=0,start=20"),
    ),
    "two-memory-error-and-a-narrow-slot": (MOMENT, "hgx-h100-4", ("gpu-memory-fault:gpu=1", "pcie-width:gpu=3")),
    "two-heat-and-a-narrow-slot": (MOMENT, "hgx-h100-4", ("overheating:gpu=0", "pcie-width:gpu=3")),
    "two-held-memory-and-a-brake": (MOMENT, "dgx-h100-4of8", ("gpu-memory-held:gpu=1", "power-brake:gpu=3")),
    "two-slow-slot-and-own-error": (MOMENT, "hgx-h100-4", ("pcie-width:gpu=0", "engine-crashed")),
}
"""Chain → when it is looked at (seconds of its drill), the node, and its faults."""


def main(wanted: list[str]) -> None:
    for name, (seconds, profile, faults) in CHAINS.items():
        if not wanted or name in wanted:
            keep(drills.visits(profile, *faults, seconds=seconds), "chains", name)


if __name__ == "__main__":
    main(sys.argv[1:])
