"""Nodes for tests, built in memory: healthy ones of each profile, and small functions that alter them.

A node is a tuple of snapshots, 15 s apart, of a machine under serving load, with everything seen.

    visits = nodes.healthy("hgx-h100-8")
    sick = nodes.each(visits, lambda s: nodes.links_down(s, gpu=2, links=range(4)))
    found = nodes.found(RULE, sick)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import msgspec

from doctor.diagnose import judge
from doctor.history import History
from doctor.report import Report
from doctor.rule import AnyRule, Finding
from doctor.snapshot import (
    Absent,
    Activity,
    BlockedTask,
    Clocks,
    DriverGpu,
    Ecc,
    Engine,
    EngineEvent,
    EngineFlags,
    EngineMetrics,
    EngineStack,
    Fabric,
    FabricManager,
    Fact,
    Gpu,
    GpuMemory,
    GpuPair,
    GpuProcess,
    Histogram,
    Host,
    KernelEvent,
    Mig,
    MigDevice,
    ModelConfig,
    Node,
    NvLink,
    NvSwitch,
    PciDevice,
    Pcie,
    Power,
    Rank,
    Sample,
    SharedMemory,
    Snapshot,
    Source,
    Stack,
    Thermal,
    Unseen,
    Why,
    Xid,
)
from rules.tables.products import Product, product_named

START = 1_770_000_000.0
BOOT = START - 86_400.0
EVERY = 15.0
DRIVER = "590.48.01"
LOG = "/var/log/vllm.log"
MIB = 1 << 20


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A kind of node."""

    product: str
    gpus: int = 8
    board: str = "none"
    """`switch`, `mesh`, `bridged` (pairs 0-1, 2-3) or `none`."""


PROFILES = {
    "hgx-h100-8": Profile(product="NVIDIA H100 80GB HBM3", board="switch"),
    "hgx-h100-4": Profile(product="NVIDIA H100 80GB HBM3", gpus=4, board="mesh"),
    "dgx-h100-4of8": Profile(product="NVIDIA H100 80GB HBM3", gpus=4, board="switch"),
    "hgx-h200-8": Profile(product="NVIDIA H200", board="switch"),
    "hgx-a100-8": Profile(product="NVIDIA A100-SXM4-80GB", board="switch"),
    "h100-pcie-4": Profile(product="NVIDIA H100 PCIe", gpus=4),
    "h100-nvl-4": Profile(product="NVIDIA H100 NVL", gpus=4, board="bridged"),
    "l40s-4": Profile(product="NVIDIA L40S", gpus=4),
    "rtx4090-4": Profile(product="NVIDIA GeForce RTX 4090", gpus=4),
}

T = TypeVar("T", bound=msgspec.Struct)


def uuid(index: int) -> str:
    return f"GPU-{index:08x}-0000-4000-8000-000000000000"


def address(index: int) -> str:
    return f"0000:{0x10 + index * 0x11:02x}:00.0"


def switch_address(index: int) -> str:
    return f"0000:{0xC0 + index:02x}:00.0"


# Building


def healthy(
    profile: str, *, visits: int = 3, every: float = EVERY, tp: int | None = None, busy: bool = True
) -> tuple[Snapshot, ...]:
    """Return the visits of a healthy node whose engine spreads over *tp* GPUs (all by default)."""
    return tuple(_snapshot(PROFILES[profile], number, every, tp, busy) for number in range(visits))


def _snapshot(profile: Profile, number: int, every: float, tp: int | None, busy: bool) -> Snapshot:
    product = product_named(profile.product)
    assert product is not None
    at = START + number * every
    size = profile.gpus if tp is None else tp
    switches = product.nvswitches_of_8_gpus or 0 if profile.board == "switch" else 0
    return Snapshot(
        at=at,
        node=Node(name="node-1", booted_at=BOOT, simulated=True),
        seen=tuple(Source),
        gpus=tuple(_gpu(profile, product, index, number, every, busy) for index in range(profile.gpus)),
        pairs=tuple(_pair(profile, product, a, b) for a in range(profile.gpus) for b in range(a + 1, profile.gpus)),
        engines=(_engine(size),),
        engine_events=startup_lines(size, board=profile.board) if number == 0 else (),
        metrics=(_metrics(at, number, every, busy),),
        stack=Stack(
            driver=DRIVER, nvml="13." + DRIVER, cuda_driver="13.1", kernel="6.8.0-79-generic", os="Ubuntu 22.04"
        ),
        fabric_manager=FabricManager(unit_state="active", running=True, version=DRIVER, switches=_switches(switches))
        if switches
        else FabricManager(
            unit_state=Absent(Why.NOT_PRESENT), running=False, version=Absent(Why.NOT_PRESENT), switches=()
        ),
        host=Host(
            pci_devices=_pci_devices(profile, product, switches),
            driver_module=DRIVER,
            driver_gpus=tuple(
                DriverGpu(pci_address=address(i), name=product.name, uuid=uuid(i), excluded=False)
                for i in range(profile.gpus)
            ),
            blocked_tasks=(),
            iommu="passthrough",
            memory_total_bytes=2048 << 30,
            memory_available_bytes=1500 << 30,
            memory_pressure_ratio=0.0,
            virtual_machine=False,
        ),
    )


def _gpu(profile: Profile, product: Product, index: int, number: int, every: float, busy: bool) -> Gpu:
    load = 0.85 if busy else 0.1
    watts = load * (product.power_default_watts or 300.0)
    total = (product.memory_mib or 81559) * MIB
    at = START + number * every
    absolute = product.slowdown_margin_celsius is None
    return Gpu(
        uuid=uuid(index),
        index=index,
        pci_address=address(index),
        pci_device_id=product.device_id,
        name=product.name,
        vbios_version="96.00.A5.00.01",
        compute_capability=product.compute_capability,
        numa_node=index * 2 // profile.gpus,
        persistence_mode=True,
        compute_mode="default",
        lost=False,
        recovery_action="none",
        memory=GpuMemory(
            total_bytes=total, used_bytes=int(total * 0.9), free_bytes=int(total * 0.1), reserved_bytes=479 * MIB
        ),
        mig=Mig(enabled=False, enabled_after_reset=False, devices=(), device_slots=product.mig_instances_max)
        if product.mig_instances_max
        else Mig(enabled=Absent(Why.NOT_SUPPORTED), enabled_after_reset=Absent(Why.NOT_SUPPORTED)),
        thermal=Thermal(
            gpu_celsius=58.0 + index % 3,
            memory_celsius=64.0,
            margin_celsius=Absent(Why.NOT_SUPPORTED) if absolute else 26.0 - index % 3,
            slowdown_margin_celsius=Absent(Why.NOT_SUPPORTED) if absolute else product.slowdown_margin_celsius,
            shutdown_margin_celsius=Absent(Why.NOT_SUPPORTED) if absolute else product.shutdown_margin_celsius,
            slowdown_celsius=product.slowdown_celsius or Absent(Why.NOT_SUPPORTED),
            shutdown_celsius=product.shutdown_celsius or Absent(Why.NOT_SUPPORTED),
            memory_max_celsius=product.memory_max_celsius or Absent(Why.NOT_SUPPORTED),
        ),
        clocks=Clocks(
            sm_mhz=product.sm_clock_max_mhz or 1980,
            sm_max_mhz=product.sm_clock_max_mhz or 1980,
            memory_mhz=product.memory_clock_max_mhz or 2619,
            memory_max_mhz=product.memory_clock_max_mhz or 2619,
            performance_state=0,
            event_reasons=() if busy else ("idle",),
            sw_power_cap_seconds=200.0,
            sync_boost_seconds=0.0,
            sw_thermal_seconds=0.0,
            hw_thermal_seconds=0.0,
            power_brake_seconds=0.0,
        ),
        power=Power(
            average_watts=watts,
            instant_watts=watts,
            limit_watts=product.power_default_watts or 300.0,
            limit_enforced_watts=product.power_default_watts or 300.0,
            limit_default_watts=product.power_default_watts or 300.0,
            energy_joules=1e9 + watts * number * every,
            samples=steady(at, watts, every),
        ),
        activity=Activity(gpu_ratio=0.98 if busy else 0.0, memory_ratio=0.4 if busy else 0.0),
        pcie=Pcie(
            generation=product.pcie_generation or 5,
            generation_max=product.pcie_generation or 5,
            width=16,
            width_max=16,
            replays_total=9,
        ),
        ecc=Ecc(
            enabled=True,
            corrected_volatile=0,
            uncorrected_volatile=0,
            corrected_aggregate=0,
            uncorrected_aggregate=0,
            sram_threshold_exceeded=False,
            rows_remapped_corrected=0,
            rows_remapped_uncorrected=0,
            remap_pending=False,
            remap_failed=False,
        ),
        links=_links(profile, product, index),
        fabric=Fabric(state="completed", status="Success", health="not-reported")
        if product.fabric == "completed"
        else Fabric(state="not-supported"),
        processes=(GpuProcess(pid=2000 + index, used_bytes=int(total * 0.88), name="VLLM::Worker"),),
    )


def steady(at: float, watts: float, every: float = EVERY, *, period: float = 0.1) -> tuple[Sample, ...]:
    """Return fast power samples of the *every* seconds before *at* that jitter by 3 %, as a loaded H100 does."""
    count = int(every / period)
    return tuple(Sample(at - every + i * period, watts * (1 + 0.03 * (i % 3 - 1))) for i in range(count))


def _links(profile: Profile, product: Product, index: int) -> tuple[NvLink, ...] | Absent:
    if not product.nvlinks:
        return Absent(Why.NOT_SUPPORTED)
    peers = [i for i in range(profile.gpus) if i != index]

    def link(number: int) -> NvLink:
        remote, peer = "unknown", Absent(Why.NOT_PRESENT)
        active = profile.board != "none"
        if profile.board == "switch":
            remote, peer = "switch", switch_address(number % (product.nvswitches_of_8_gpus or 4))
        elif profile.board == "mesh":
            remote, peer = "gpu", address(peers[number * len(peers) // product.nvlinks])
        elif profile.board == "bridged":
            remote, peer = "gpu", address(index ^ 1)
        return NvLink(
            link=number,
            active=active,
            version=product.nvlink_version or Absent(Why.NOT_SUPPORTED),
            speed_bytes_per_second=product.nvlink_bytes_per_second if active else Absent(Why.NOT_SUPPORTED),
            remote=remote,
            remote_pci_address=peer,
            replay_errors_total=0,
            recovery_errors_total=0,
            crc_errors_total=0,
        )

    return tuple(link(number) for number in range(product.nvlinks))


def _pair(profile: Profile, product: Product, a: int, b: int) -> GpuPair:
    links = {
        "switch": product.nvlinks,
        "mesh": product.nvlinks // (profile.gpus - 1),
        "bridged": product.nvlinks if a ^ 1 == b else 0,
        "none": 0,
    }[profile.board]
    geforce = "GeForce" in product.name
    way = "NODE" if a * 2 // profile.gpus == b * 2 // profile.gpus else "SYS"
    return GpuPair(
        first=uuid(a),
        second=uuid(b),
        nvlinks=links,
        ancestor=way,
        p2p_read="gpu-not-supported" if geforce else "ok",
        p2p_write="gpu-not-supported" if geforce else "ok",
        p2p_nvlink="ok" if links else "not-supported",
        p2p_atomics="ok" if links else "not-supported",
    )


def _switches(count: int) -> tuple[NvSwitch, ...]:
    return tuple(NvSwitch(pci_address=switch_address(i), bios_version="96.10.57.00.01") for i in range(count))


def _pci_devices(profile: Profile, product: Product, switches: int) -> tuple[PciDevice, ...]:
    generation = product.pcie_generation or 5
    gpus = tuple(
        PciDevice(
            address=address(i),
            device_id=product.device_id,
            kind="gpu",
            driver="nvidia",
            generation=generation,
            generation_max=generation,
            width=16,
            width_max=16,
            numa_node=i * 2 // profile.gpus,
            acs_enabled=False,
        )
        for i in range(profile.gpus)
    )
    return gpus + tuple(
        PciDevice(address=switch_address(i), device_id="10de:22a3", kind="nvswitch", driver="nvidia-nvswitch")
        for i in range(switches)
    )


def _engine(size: int) -> Engine:
    return Engine(
        pid=1000,
        started_at=START - 3600.0,
        kind="vllm",
        command_line=("vllm", "serve", "meta-llama/Llama-3.3-70B-Instruct", "--tensor-parallel-size", str(size)),
        flags=EngineFlags(model="meta-llama/Llama-3.3-70B-Instruct", tensor_parallel_size=size, port=8000),
        ranks=tuple(
            Rank(pid=2000 + i, rank=i, title=f"VLLM::Worker_TP{i}", gpu=uuid(i), state="running", cpu_seconds=900.0)
            for i in range(size)
        ),
        visible_gpus=tuple(uuid(i) for i in range(size)),
        unit="vllm.service",
        container=Absent(Why.NOT_PRESENT),
        oom_kills_total=0,
        shared_memory=SharedMemory(total_bytes=64 << 30, used_bytes=1 << 30),
        stack=EngineStack(python="3.12.11", engine="0.22.1", torch="2.11.0+cu130", torch_cuda="13.0", nccl="2.28.9"),
        model=LLAMA_70B,
        log=LOG,
        cpu_seconds=1200.0,
    )


LLAMA_70B = ModelConfig(
    architecture="LlamaForCausalLM",
    model_type="llama",
    layers=80,
    hidden_size=8192,
    intermediate_size=28672,
    attention_heads=64,
    kv_heads=8,
    head_dim=128,
    vocab_size=128256,
    max_position_embeddings=131072,
    dtype="bfloat16",
    quantization_method=Absent(Why.NOT_PRESENT),
    weights_bytes=141_000_000_000,
)


def _metrics(at: float, number: int, every: float, busy: bool) -> EngineMetrics:
    tokens = 1e6 + (900.0 * number * every if busy else 0.0)
    return EngineMetrics(
        engine=f"1000@{START - 3600.0:.0f}",
        at=at,
        url="http://127.0.0.1:8000/metrics",
        version="0.22.1",
        running=24.0 if busy else 0.0,
        waiting=0.0,
        kv_cache_usage_ratio=0.4 if busy else 0.0,
        steps_total=40_000.0 + (40.0 * number * every if busy else 0.0),
        generation_tokens_total=tokens,
        prompt_tokens_total=tokens * 4,
        preemptions_total=0.0,
        requests_succeeded_total=tokens / 250,
    )


def inter_token(seconds: float, tokens: float) -> Histogram:
    """Return the histogram of *tokens* that each took *seconds*."""
    bounds = (0.01, 0.025, 0.05, 0.1, 0.25, 1.0)
    counts = tuple(tokens if seconds <= bound else 0.0 for bound in (*bounds, float("inf")))
    return Histogram(bounds=bounds, counts=counts, sum=seconds * tokens)


# Lines


def line(signal: str, text: str = "", *, number: int = 1, at: float | None = START, **facts: Fact) -> EngineEvent:
    """Return a line of the engine's log."""
    return EngineEvent(
        signal=signal, text=text or signal, where=f"vllm.log:{number}", log=LOG, at=at, level="INFO", facts=facts
    )


def startup_lines(size: int, *, board: str = "switch") -> tuple[EngineEvent, ...]:
    """Return what an engine says at a good start over *size* GPUs."""
    began = START - 3600.0
    nvlink = board in ("switch", "mesh") or (board == "bridged" and size == 2)
    backends = "CUSTOM,SYMM_MEM,PYNCCL" if nvlink else "PYNCCL"
    lines = [
        line("engine-version", "vLLM API server version 0.22.1", number=1, at=began, version="0.22.1"),
        line("engine-config", "Initializing a V1 LLM engine", number=2, at=began + 5, tensor_parallel_size=size),
    ]
    if size > 1:
        if not nvlink and size > 2:
            lines.append(line("custom-allreduce-off-pcie", "Custom allreduce is disabled", number=3, at=began + 20))
        lines.append(line("allreduce-backends", "Using …", number=4, at=began + 21, group="tp:0", backends=backends))
    lines.append(line("startup-complete", "Application startup complete.", number=5, at=began + 90))
    return tuple(lines)


def xid(code: int, gpu: int = 0, *, at: float | None = START, text: str = "", **fields: Any) -> Xid:
    """Return a kernel line about a GPU."""
    return Xid(
        text=text or f"NVRM: Xid (PCI:{address(gpu)[:-2]}): {code}, made for a test",
        where="/dev/kmsg:4711",
        at=at,
        code=code,
        pci_address=address(gpu),
        **fields,
    )


# Altering


def put(value: T, **changes: Any) -> T:
    """Return *value* with other fields; `thermal__margin_celsius=1.0` reaches into a field's fields."""
    here = {name: change for name, change in changes.items() if "__" not in name}
    below: dict[str, dict[str, Any]] = {}
    for name, change in changes.items():
        if "__" in name:
            head, rest = name.split("__", 1)
            below.setdefault(head, {})[rest] = change
    for head, rest in below.items():
        here[head] = put(getattr(value, head), **rest)
    return msgspec.structs.replace(value, **here)


def each(visits: Iterable[Snapshot], change: Callable[[Snapshot], Snapshot]) -> tuple[Snapshot, ...]:
    """Return the visits, each changed."""
    return tuple(change(snapshot) for snapshot in visits)


def last(visits: Sequence[Snapshot], change: Callable[[Snapshot], Snapshot]) -> tuple[Snapshot, ...]:
    """Return the visits, the last one changed."""
    return (*visits[:-1], change(visits[-1]))


def with_gpu(snapshot: Snapshot, gpu: int | Iterable[int], **changes: Any) -> Snapshot:
    """Return the snapshot with changes (as in `put`) to one GPU or several."""
    chosen = {gpu} if isinstance(gpu, int) else set(gpu)
    return put(snapshot, gpus=tuple(put(g, **changes) if g.index in chosen else g for g in snapshot.gpus))


def with_pairs(snapshot: Snapshot, among: Iterable[int] | None = None, **changes: Any) -> Snapshot:
    """Return the snapshot with changes to the pairs in which one of *among* is (None: all)."""
    chosen = None if among is None else {uuid(i) for i in among}
    return put(
        snapshot,
        pairs=tuple(put(p, **changes) if chosen is None or {p.first, p.second} & chosen else p for p in snapshot.pairs),
    )


def with_engine(snapshot: Snapshot, **changes: Any) -> Snapshot:
    return put(snapshot, engines=tuple(put(e, **changes) for e in snapshot.engines))


def without_engine(snapshot: Snapshot) -> Snapshot:
    """Return the snapshot of a node that serves nothing."""
    idle = put(snapshot, engines=(), engine_events=(), metrics=(), logs=())
    return put(idle, gpus=tuple(put(g, processes=()) for g in idle.gpus))


def with_metrics(snapshot: Snapshot, **changes: Any) -> Snapshot:
    return put(snapshot, metrics=tuple(put(m, **changes) for m in snapshot.metrics))


def with_lines(snapshot: Snapshot, *lines: EngineEvent) -> Snapshot:
    return put(snapshot, engine_events=(*snapshot.engine_events, *lines))


def with_kernel(snapshot: Snapshot, *events: KernelEvent) -> Snapshot:
    return put(snapshot, kernel=(*snapshot.kernel, *events))


def links_down(snapshot: Snapshot, gpu: int, links: Iterable[int]) -> Snapshot:
    """Return the snapshot with links of a GPU down, in its matrix too."""
    down = set(links)
    before = next(g for g in snapshot.gpus if g.index == gpu).links
    assert not isinstance(before, Absent)
    after = tuple(put(link, active=False) if link.link in down else link for link in before)
    left = sum(1 for link in after if link.active)
    pairs = tuple(
        put(p, nvlinks=min(p.nvlinks, left), p2p_nvlink="ok" if left else "not-supported")
        if uuid(gpu) in (p.first, p.second) and not isinstance(p.nvlinks, Absent)
        else p
        for p in snapshot.pairs
    )
    return put(with_gpu(snapshot, gpu, links=after), pairs=pairs)


def lose(snapshot: Snapshot, gpu: int) -> Snapshot:
    """Return the snapshot as NVML shows a GPU that fell off the bus: known by its address, and nothing else answers."""
    gone = Absent(Why.LOST)
    gpus = tuple(
        Gpu(
            uuid=g.uuid,
            index=g.index,
            pci_address=g.pci_address,
            pci_device_id=g.pci_device_id,
            name=g.name,
            lost=True,
            links=gone,
            processes=gone,
        )
        if g.index == gpu
        else g
        for g in snapshot.gpus
    )
    return with_pairs(
        put(snapshot, gpus=gpus), (gpu,), nvlinks=gone, p2p_read=gone, p2p_write=gone, p2p_nvlink=gone, p2p_atomics=gone
    )


def forget_gpu(snapshot: Snapshot, gpu: int) -> Snapshot:
    """Return the snapshot of a GPU that NVML no longer lists, while the PCI tree and the driver still do."""
    return put(
        snapshot,
        gpus=tuple(g for g in snapshot.gpus if g.index != gpu),
        pairs=tuple(p for p in snapshot.pairs if uuid(gpu) not in (p.first, p.second)),
    )


def unseen(snapshot: Snapshot, *sources: Source, why: Why = Why.FAILED, detail: str = "") -> Snapshot:
    """Return the snapshot without whole sources, and without the values that they would have brought."""
    blank: dict[Source, dict[str, Any]] = {
        Source.NVML: {"gpus": (), "pairs": ()},
        Source.KERNEL_LOG: {"kernel": ()},
        Source.PROCESSES: {"engines": ()},
        Source.ENGINE_LOG: {"engine_events": (), "logs": ()},
        Source.ENGINE_METRICS: {"metrics": ()},
        Source.STACK: {"stack": Stack()},
        Source.MODEL: {},
        Source.FABRIC_MANAGER: {"fabric_manager": FabricManager()},
        Source.HOST: {"host": Host()},
        Source.RECORDER: {},
    }
    fields: dict[str, Any] = {}
    for source in sources:
        fields |= blank[source]
    return put(
        snapshot,
        seen=tuple(s for s in snapshot.seen if s not in sources),
        unseen=(*snapshot.unseen, *(Unseen(source, Absent(why, detail)) for source in sources)),
        **fields,
    )


def hung(snapshot: Snapshot, seconds: float = 10.0) -> Snapshot:
    """Return the snapshot of a node whose driver does not answer."""
    blind = unseen(snapshot, Source.NVML, why=Why.TIMED_OUT, detail=f"NVML has not answered for {seconds:.0f} s")
    return put(blind, nvml_blocked_seconds=seconds, host__blocked_tasks=(BlockedTask(pid=2000, name="nvidia-smi"),))


def partitioned(
    snapshot: Snapshot, gpu: int | Iterable[int], profiles: Sequence[str] = ("3g.40gb", "4g.40gb")
) -> Snapshot:
    """Return the snapshot with MIG on: one device a profile, links down as MIG shows them, no process."""
    size_mib = {
        "7g.80gb": 80896,
        "4g.40gb": 40448,
        "3g.40gb": 40448,
        "2g.20gb": 20096,
        "1g.20gb": 20096,
        "1g.10gb": 9984,
    }
    chosen = (gpu,) if isinstance(gpu, int) else tuple(gpu)
    for index in chosen:
        devices = tuple(
            MigDevice(
                uuid=f"MIG-{index:08x}-{i:04x}-4000-8000-000000000000",
                gpu_instance=i + 1,
                compute_instance=0,
                profile=profile,
                memory_total_bytes=size_mib[profile] * MIB,
                memory_used_bytes=17 * MIB,
                processes=(),
            )
            for i, profile in enumerate(profiles)
        )
        snapshot = with_gpu(
            snapshot,
            index,
            mig=Mig(enabled=True, enabled_after_reset=True, devices=devices, device_slots=7),
            links=Absent(Why.NOT_SUPPORTED, "in MIG mode"),
            processes=(),
            activity=Activity(gpu_ratio=Absent(Why.NOT_SUPPORTED), memory_ratio=Absent(Why.NOT_SUPPORTED)),
        )
    return with_pairs(snapshot, chosen, nvlinks=0, p2p_nvlink="not-supported", p2p_read="not-supported")


# Asking


def history(visits: Sequence[Snapshot], keep: float = 3600.0) -> History:
    return History(tuple(visits), keep)


def found(rule: AnyRule, visits: Sequence[Snapshot]) -> tuple[Finding, ...]:
    """Return the rule's findings after the last visit."""
    return rule.judge(history(visits))[0]


def why_blind(rule: AnyRule, visits: Sequence[Snapshot]) -> Absent | None:
    """Return why the rule could not judge, or None."""
    return rule.judge(history(visits))[1]


def one(rule: AnyRule, visits: Sequence[Snapshot]) -> Finding:
    """Return the rule's only finding."""
    findings, why = rule.judge(history(visits))
    assert len(findings) == 1, (findings, why)
    return findings[0]


def quiet(rule: AnyRule, visits: Sequence[Snapshot]) -> bool:
    """Whether the rule was asked, could judge, and found nothing."""
    return rule.judge(history(visits)) == ((), None)


def report(visits: Sequence[Snapshot], rules: Sequence[AnyRule]) -> Report:
    return judge(history(visits), rules)
