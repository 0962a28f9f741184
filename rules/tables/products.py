"""NVIDIA's products: what each is and has when nothing is wrong."""

from __future__ import annotations

from importlib import resources
from typing import Literal

import msgspec

from doctor.snapshot import Gpu, known


class Product(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One product, by its PCI device id."""

    device_id: str
    """`vendor:device`, as in `Gpu.pci_device_id`."""
    name: str
    """As NVML names it, letter for letter."""
    model: str
    """As people name it."""
    compute_capability: tuple[int, int]
    memory_mib: int | None = None
    sm_clock_max_mhz: int | None = None
    memory_clock_max_mhz: int | None = None
    wiring: Literal["board", "bridge", "none"]
    """`board`: links are soldered, one that is down is a fault. `bridge`: none active is normal."""
    nvlinks: int
    """Links of one GPU with everything cabled, whatever is at their other end (switch or mesh)."""
    nvlink_version: str | None = None
    nvlink_bytes_per_second: float | None = None
    """One link, one direction."""
    nvswitches_of_8_gpus: int | None = None
    """NVSwitches of the 8-GPU board that the `nvidia-nvswitch` driver shows."""
    pcie_generation: int | None = None
    pcie_width: int | None = None
    power_default_watts: float | None = None
    power_min_watts: float | None = None
    power_max_watts: float | None = None
    slowdown_margin_celsius: float | None = None
    """T.Limit at which the hardware slows down."""
    shutdown_margin_celsius: float | None = None
    slowdown_celsius: float | None = None
    """Older products: the absolute threshold."""
    shutdown_celsius: float | None = None
    memory_max_celsius: float | None = None
    native_fp8: bool
    mig_instances_max: int
    fabric: Literal["completed", "not-supported"] | None = None
    """What NVML's fabric state says on a healthy node; None: not known."""
    confidence: Literal["high", "medium", "low"]
    source: str

    @property
    def has_board_nvlink(self) -> bool:
        """Whether every GPU of a board must have NVLink."""
        return self.wiring == "board"


class _Table(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    product: tuple[Product, ...]


_TOML = resources.files(__package__ or "rules.tables").joinpath("products.toml").read_bytes()

PRODUCTS = msgspec.toml.decode(_TOML, type=_Table).product
_BY_ID = {product.device_id: product for product in PRODUCTS}
_BY_NAME = {product.name: product for product in PRODUCTS}


def product_of(gpu: Gpu) -> Product | None:
    """Return the GPU's product, or None where the table has none.

    Looked up by PCI device id; by the exact name only where evidence tells no id. A name is never searched
    for a part of itself: "GH200" holds "H200".
    """
    if known(gpu.pci_device_id):
        return _BY_ID.get(gpu.pci_device_id)
    return product_named(gpu.name) if known(gpu.name) else None


def product_named(name: str) -> Product | None:
    """Return the product that NVML names exactly so, or None."""
    return _BY_NAME.get(name)
