"""How sentences name GPUs: by index, which people and commands use, with the address that identifies."""

from __future__ import annotations

from collections.abc import Iterable

from doctor.snapshot import Gpu, Snapshot, known


def name_of(gpu: Gpu) -> str:
    """Return how people name this GPU: `GPU 2 (0000:43:00.0)`."""
    return f"GPU {gpu.index} ({gpu.pci_address})" if known(gpu.pci_address) else f"GPU {gpu.index}"


def names_of(snapshot: Snapshot, gpus: Iterable[str]) -> str:
    """Return GPUs (UUIDs) for a sentence: `GPU 0, 2 and 3`."""
    chosen = set(gpus)
    indices = [str(gpu.index) for gpu in snapshot.gpus if gpu.uuid in chosen]
    return f"GPU {listed(indices, most=16)}" if indices else "no GPU"


def listed(words: Iterable[str], most: int = 6) -> str:
    """Return words as a list for a sentence, the tail counted: `a, b, c and 3 more`."""
    every = tuple(words)
    if len(every) > most:
        return f"{', '.join(every[: most - 1])} and {len(every) - most + 1} more"
    return " and ".join((", ".join(every[:-1]), every[-1])) if len(every) > 1 else "".join(every)


def gpu_at(snapshot: Snapshot, pci_address: str) -> Gpu | None:
    """Return the GPU at a PCI address, or None where NVML lists none there."""
    return next((gpu for gpu in snapshot.gpus if gpu.pci_address == pci_address), None)


def name_at(snapshot: Snapshot, pci_address: str) -> str:
    """Return how people name the GPU at a PCI address."""
    gpu = gpu_at(snapshot, pci_address)
    return name_of(gpu) if gpu is not None else f"the GPU at {pci_address}"
