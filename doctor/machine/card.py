"""One GPU in numbers, by PCI device id: memory, bandwidths, compute; each with its source."""

from __future__ import annotations

import msgspec

from doctor.snapshot import Absent, Gpu, Maybe, Why, known

GB = 1e9
MIB = 2**20
TERA = 1e12

CUDA_MEMORY_RATIO = 0.99
"""What CUDA hands out of the memory that NVML reports: 79.14 GiB (PyTorch's out-of-memory message) of 80.00 GiB."""


class Card(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU product. Bandwidths are one direction, bytes a second; compute is dense, operations a second."""

    name: str
    memory_bytes: float
    """What CUDA can hand out, before `--gpu-memory-utilization`."""
    memory_bytes_per_second: float
    bf16_flops: float
    fp8_flops: float | None
    """None: no FP8 units; FP8 weights are unpacked and computed in BF16."""
    nvlinks: int
    nvlink_bytes_per_second: float
    """All links together, one direction; 0 where there are none. Half of the figure that data sheets print."""
    pcie_bytes_per_second: float


def _card(
    name: str,
    memory: tuple[int, float],
    compute: tuple[float, float | None],
    nvlink: tuple[int, float],
    pcie_gb_per_second: float,
) -> Card:
    """Make a card of (MiB as NVML reports them, GB/s), (BF16, FP8) TFLOPS, (links, GB/s both ways) and GB/s one way."""
    mib, memory_gb_per_second = memory
    bf16_teraflops, fp8_teraflops = compute
    nvlinks, nvlink_gb_per_second = nvlink
    return Card(
        name=name,
        memory_bytes=mib * MIB * CUDA_MEMORY_RATIO,
        memory_bytes_per_second=memory_gb_per_second * GB,
        bf16_flops=bf16_teraflops * TERA,
        fp8_flops=None if fp8_teraflops is None else fp8_teraflops * TERA,
        nvlinks=nvlinks,
        nvlink_bytes_per_second=nvlink_gb_per_second / 2 * GB,
        pcie_bytes_per_second=pcie_gb_per_second * GB,
    )


PCIE_4 = 31.5
PCIE_5 = 63.0
"""GB/s one way over 16 lanes: 16 and 32 GT/s a lane, 128b/130b coding (PCI Express base specification)."""

# Memory sizes and links: products.csv (NVML captures). Bandwidth and compute: NVIDIA's data sheet of the product, which
# prints tensor compute with sparsity from Ampere on; half of it is dense. NVLink: the data sheet's sum of both ways.
CARDS: dict[str, Card] = {
    "10de:2330": _card("H100 SXM5 80GB", (81559, 3350), (989.4, 1978.9), (18, 900), PCIE_5),  # H100 data sheet
    "10de:2331": _card(
        "H100 PCIe 80GB", (81559, 2000), (756.0, 1513.0), (12, 600), PCIE_5
    ),  # H100 data sheet; product brief PB-11133
    "10de:2321": _card("H100 NVL 94GB", (95830, 3900), (835.0, 1671.0), (12, 600), PCIE_5),  # H100 data sheet
    "10de:2324": _card(
        "H800 SXM5 80GB", (81559, 3350), (989.4, 1978.9), (8, 400), PCIE_5
    ),  # as H100 SXM; links: products.csv
    "10de:2329": _card(
        "H20 96GB", (97871, 4000), (148.0, 296.0), (18, 900), PCIE_5
    ),  # unverified: published by resellers
    "10de:2335": _card("H200 SXM 141GB", (143771, 4800), (989.4, 1978.9), (18, 900), PCIE_5),  # H200 data sheet
    "10de:233b": _card("H200 NVL 141GB", (143771, 4800), (835.0, 1671.0), (18, 900), PCIE_5),  # H200 data sheet
    "10de:2342": _card(
        "GH200 96GB", (97871, 4000), (989.4, 1978.9), (18, 900), PCIE_5
    ),  # GH200 data sheet; memory unverified
    "10de:20b2": _card("A100 SXM4 80GB", (81920, 2039), (312.0, None), (12, 600), PCIE_4),  # A100 data sheet
    "10de:20b0": _card("A100 SXM4 40GB", (40960, 1555), (312.0, None), (12, 600), PCIE_4),  # A100 data sheet
    "10de:20b5": _card("A100 PCIe 80GB", (81920, 1935), (312.0, None), (12, 600), PCIE_4),  # A100 data sheet
    "10de:20f1": _card("A100 PCIe 40GB", (40960, 1555), (312.0, None), (12, 600), PCIE_4),  # A100 data sheet
    "10de:26b9": _card("L40S 48GB", (46068, 864), (362.0, 733.0), (0, 0), PCIE_4),  # L40S data sheet
    "10de:2684": _card(
        "RTX 4090 24GB", (24564, 1008), (165.2, 330.3), (0, 0), PCIE_4
    ),  # Ada whitepaper, FP32 accumulation
    "10de:2901": _card("B200 180GB", (183359, 8000), (2250.0, 4500.0), (18, 1800), PCIE_5),  # DGX B200 data sheet, / 8
}


def card_of(gpu: Gpu) -> Maybe[Card]:
    """Return the card of a GPU, with the memory that NVML saw where it did; absent for a product not in the table.

    An H20 with 141 GB is an H20 here, with its own memory: NVML's total wins over the table's.
    """
    if not known(gpu.pci_device_id):
        return Absent(gpu.pci_device_id.why, "the GPU's PCI device id was not seen")
    card = CARDS.get(gpu.pci_device_id)
    if card is None:
        return Absent(Why.NOT_SUPPORTED, f"no bandwidth and compute figures for PCI device {gpu.pci_device_id}")
    if known(gpu.memory.total_bytes):
        return msgspec.structs.replace(card, memory_bytes=gpu.memory.total_bytes * CUDA_MEMORY_RATIO)
    return card
