"""Which GPU is which, and which rank works on it: what the engine was told to use, confirmed by the processes that NVML sees."""

from __future__ import annotations

import msgspec

from doctor.snapshot import NOT_ASKED, Absent, Engine, Gpu, Maybe, Rank, Snapshot, Why, known, or_none


def identified(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot with names given to GPUs of which NVML tells only the index: they are lost.

    The driver's own list in /proc still holds them, in the order of PCI addresses, which is that of NVML's indices.
    """
    nameless = sorted((gpu for gpu in snapshot.gpus if gpu.uuid.startswith("index:")), key=lambda gpu: gpu.index)
    told = {gpu.pci_address for gpu in snapshot.gpus if known(gpu.pci_address)}
    missing = [gpu for gpu in or_none(snapshot.host.driver_gpus) or () if gpu.pci_address not in told]
    if not nameless or len(nameless) != len(missing):
        return snapshot
    product = {device.address: device.device_id for device in or_none(snapshot.host.pci_devices) or ()}
    named = {
        gpu.uuid: msgspec.structs.replace(
            gpu,
            uuid=driver_gpu.uuid if isinstance(driver_gpu.uuid, str) else gpu.uuid,
            pci_address=driver_gpu.pci_address,
            pci_device_id=product.get(driver_gpu.pci_address, gpu.pci_device_id),
            name=gpu.name if known(gpu.name) else driver_gpu.name,
        )
        for gpu, driver_gpu in zip(nameless, missing, strict=True)
    }
    gpus = tuple(named.get(gpu.uuid, gpu) for gpu in snapshot.gpus)
    uuids = {index: gpu.uuid for index, gpu in named.items()}
    pairs = tuple(
        msgspec.structs.replace(
            pair, first=uuids.get(pair.first, pair.first), second=uuids.get(pair.second, pair.second)
        )
        for pair in snapshot.pairs
    )
    return msgspec.structs.replace(snapshot, gpus=gpus, pairs=pairs)


def placed(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot with `Engine.visible_gpus` and `Rank.gpu` filled in, as far as can be told."""
    uuids = _uuids(snapshot)
    uniform = len({gpu.pci_device_id for gpu in snapshot.gpus}) <= 1
    holders = _holders(snapshot.gpus)
    engines = tuple(_engine_placed(engine, uuids, uniform, holders) for engine in snapshot.engines)
    return msgspec.structs.replace(snapshot, engines=engines)


def _uuids(snapshot: Snapshot) -> tuple[str, ...]:
    """Return the node's GPUs in NVML's order, which is that of PCI addresses; without NVML, as the driver knows them."""
    if snapshot.gpus:
        return tuple(gpu.uuid for gpu in sorted(snapshot.gpus, key=lambda gpu: gpu.index))
    by_driver = or_none(snapshot.host.driver_gpus) or ()
    return tuple(gpu.uuid for gpu in by_driver if isinstance(gpu.uuid, str) and gpu.uuid.startswith("GPU-"))


def _holders(gpus: tuple[Gpu, ...]) -> dict[int, set[str]]:
    """Return the GPUs that each process holds memory of."""
    holders: dict[int, set[str]] = {}
    for gpu in gpus:
        for process in or_none(gpu.processes) or ():
            holders.setdefault(process.pid, set()).add(gpu.uuid)
    return holders


def _engine_placed(engine: Engine, uuids: tuple[str, ...], uniform: bool, holders: dict[int, set[str]]) -> Engine:
    visible = engine.visible_gpus
    if visible == NOT_ASKED:  # its environment was read
        visible = visible_gpus(engine.environment, uuids, uniform)
    ranks = tuple(_rank_placed(rank, visible, holders) for rank in engine.ranks)
    return msgspec.structs.replace(engine, visible_gpus=visible, ranks=ranks)


def visible_gpus(environment: dict[str, str], uuids: tuple[str, ...], uniform: bool) -> Maybe[tuple[str, ...]]:
    """Return the GPUs that a process with this environment may use, in its own order.

    *uniform*: all GPUs of the node are of one product. Otherwise CUDA numbers them by speed, unless told not to.
    """
    if not uuids:
        return Absent(Why.NOT_ASKED, "the node's GPUs are unknown")
    by_runtime = environment.get("NVIDIA_VISIBLE_DEVICES", "all")
    left = uuids if by_runtime in {"all", ""} else _selected(by_runtime, uuids)
    by_cuda = environment.get("CUDA_VISIBLE_DEVICES")
    if isinstance(left, Absent) or by_cuda is None:
        return left
    numbered = any(word.strip().isdigit() for word in by_cuda.split(","))
    if numbered and not uniform and environment.get("CUDA_DEVICE_ORDER") != "PCI_BUS_ID":
        return Absent(Why.NOT_SUPPORTED, "CUDA numbers unlike GPUs by their speed; set CUDA_DEVICE_ORDER=PCI_BUS_ID")
    return _selected(by_cuda, left)


def _selected(words: str, uuids: tuple[str, ...]) -> Maybe[tuple[str, ...]]:
    chosen: list[str] = []
    for word in (word.strip() for word in words.split(",")):
        if word.isdigit() and int(word) < len(uuids):
            chosen.append(uuids[int(word)])
        elif word.startswith("GPU-") and (match := [uuid for uuid in uuids if uuid.startswith(word)]):
            chosen.append(match[0])
        elif word.startswith("MIG-"):
            return Absent(Why.NOT_SUPPORTED, "it uses MIG devices, not whole GPUs")
        else:  # CUDA ignores an unknown device and all that follow it
            break
    return tuple(chosen)


def _rank_placed(rank: Rank, visible: Maybe[tuple[str, ...]], holders: dict[int, set[str]]) -> Rank:
    held = holders.get(rank.pid, set())
    expected = visible[rank.rank] if known(visible) and known(rank.rank) and rank.rank < len(visible) else None
    if len(held) == 1:
        gpu: Maybe[str] = next(iter(held))
    elif expected is not None and (not held or expected in held):
        gpu = expected
    else:
        gpu = Absent(Why.NOT_PRESENT, "neither its environment nor NVML's processes tell its GPU")
    return msgspec.structs.replace(rank, gpu=gpu)
