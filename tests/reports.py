"""Reports made by hand: what the exporters are tested on."""

from __future__ import annotations

from doctor.report import Report, in_order_of_cause, verdict_of
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, Unjudged
from doctor.snapshot import (
    OF_A_NODE,
    Absent,
    Clocks,
    CollectorRun,
    Ecc,
    Engine,
    EngineEvent,
    EngineFlags,
    EngineMetrics,
    EngineStack,
    Fabric,
    Gpu,
    GpuMemory,
    GpuPair,
    Mig,
    Node,
    NvLink,
    Pcie,
    Power,
    Sample,
    Snapshot,
    Source,
    Stack,
    Thermal,
    Unseen,
    Why,
    Xid,
)

AT = 1_790_000_000.0
"""2026-09-21 14:13:20 UTC."""
ENGINE = "4711@1789990000"
QUIET = ("mig-misconfigured", "cooling-insufficient", "power-transient")
EVERYTHING = OF_A_NODE


def uuid(index: int) -> str:
    return f"GPU-0000000{index}-aaaa-bbbb-cccc-dddddddddddd"


def gpu(index: int, *, links_down: tuple[int, ...] = ()) -> Gpu:
    return Gpu(
        uuid=uuid(index),
        index=index,
        pci_address=f"0000:{0x18 + 0x10 * index:02x}:00.0",
        pci_device_id="10de:2330",
        name="NVIDIA H100 80GB HBM3",
        vbios_version="96.00.89.00.01",
        lost=False,
        memory=GpuMemory(total_bytes=85_520_809_984, used_bytes=70_000_000_000),
        mig=Mig(enabled=False, enabled_after_reset=False, devices=()),
        thermal=Thermal(gpu_celsius=61.0, memory_celsius=70.0, margin_celsius=26.0),
        clocks=Clocks(sm_mhz=1980, event_reasons=("sw-power-cap",), sw_power_cap_seconds=12.5, hw_thermal_seconds=0.0),
        power=Power(
            average_watts=640.5,
            instant_watts=655.0,
            limit_watts=700.0,
            energy_joules=1_234_567.0,
            samples=(Sample(AT - 0.5, 655.0), Sample(AT - 0.2, 812.5)),
        ),
        pcie=Pcie(generation=5, generation_max=5, width=16, width_max=16, replays_total=0),
        ecc=Ecc(corrected_volatile=3, uncorrected_volatile=0, remap_pending=False, remap_failed=False),
        links=tuple(
            NvLink(
                link=link,
                active=link not in links_down,
                remote="switch",
                replay_errors_total=0,
                recovery_errors_total=2 if link in links_down else 0,
                crc_errors_total=Absent(Why.NOT_SUPPORTED),
            )
            for link in range(18)
        ),
        fabric=Fabric(state="completed", status="Success", health="healthy"),
    )


def snapshot(gpus: tuple[Gpu, ...], *, nvlinks: dict[int, int] | None = None, **changes: object) -> Snapshot:
    """A simulated node with one engine; *nvlinks*: of the GPUs that do not have 18."""
    nvlinks = nvlinks or {}
    fields: dict[str, object] = {
        "at": AT,
        "node": Node(name="hgx-17", booted_at=AT - 86_400, simulated=True),
        "seen": EVERYTHING,
        "gpus": gpus,
        "pairs": tuple(
            GpuPair(
                first=a.uuid,
                second=b.uuid,
                nvlinks=min(nvlinks.get(a.index, 18), nvlinks.get(b.index, 18)),
                ancestor="NODE" if a.index // 2 == b.index // 2 else "SYS",
                p2p_read="ok",
                p2p_write="ok",
            )
            for i, a in enumerate(gpus)
            for b in gpus[i + 1 :]
        ),
        "collectors": (
            CollectorRun(Source.NVML, True, 0.041),
            CollectorRun(Source.KERNEL_LOG, True, 0.002, 0.5),
            CollectorRun(Source.ENGINE_METRICS, False, 1.0),
        ),
        "engines": (
            Engine(
                pid=4711,
                started_at=1_789_990_000.0,
                kind="vllm",
                flags=EngineFlags(model="meta-llama/Llama-3.3-70B-Instruct", tensor_parallel_size=4, port=8000),
                unit="vllm.service",
                stack=EngineStack(engine="0.11.0", torch="2.8.0+cu128", nccl="2.27.3"),
            ),
        ),
        "metrics": (
            EngineMetrics(
                engine=ENGINE,
                at=AT,
                running=12.0,
                waiting=0.0,
                kv_cache_usage_ratio=0.31,
                steps_total=90_210.0,
                generation_tokens_total=1_100_000.0,
            ),
        ),
        "stack": Stack(driver="580.65.06", nvml="13.580.65.06", cuda_driver="13.0"),
    }
    return Snapshot(**(fields | changes))  # type: ignore[arg-type]


def report(
    visit: Snapshot,
    *findings: Finding,
    unjudged: tuple[Unjudged, ...] = (),
    quiet: tuple[str, ...] = QUIET,
    optional: frozenset[Source] = frozenset(),
) -> Report:
    return Report(
        at=visit.at,
        node=visit.node,
        verdict=verdict_of(findings, visit, optional),
        findings=in_order_of_cause(findings),
        unjudged=unjudged,
        quiet=quiet,
        unseen=visit.unseen,
        snapshot=visit,
    )


LOST = Finding(
    failure_mode="gpu-lost",
    title="A GPU has fallen off the bus, or the node has fewer GPUs than it should",
    severity=Severity.CRITICAL,
    summary="GPU 2 (0000:38:00.0) fell off the bus at 14:12:40: the driver reports Xid 79 and NVML answers GPU_IS_LOST.",
    evidence=(
        Evidence("kernel-log", "/dev/kmsg:4711", "NVRM: Xid (PCI:0000:38:00): 79, GPU has fallen off the bus."),
        Evidence("nvml", "nvmlDeviceGetHandleByUUID", "GPU_IS_LOST"),
    ),
    subject=Subject(gpus=(uuid(2),)),
    since=AT - 40,
    advice=(
        "Drain the node: no request may be routed to it.",
        "Save the evidence while it is there: `sudo nvidia-bug-report.sh --safe-mode --extra-system-data --output-file /tmp/report`.",
        "Power-cycle the node (a warm reboot does not always bring the GPU back); if Xid 79 returns, replace GPU 2.",
    ),
    explains=("nccl-timeout", "engine-crashed"),
)
TIMEOUT = Finding(
    failure_mode="nccl-timeout",
    title="A collective operation timed out",
    severity=Severity.CRITICAL,
    summary="Ranks TP0, TP1 and TP3 waited 600 s in ALLREDUCE for rank TP2, which never came.",
    evidence=(
        Evidence(
            "engine-log", "vllm.log:1201", "[Rank 0] Watchdog caught collective operation timeout: " + "x, " * 200
        ),
        Evidence("engine-log", "vllm.log:1202", "second"),
        Evidence("engine-log", "vllm.log:1203", "third"),
    ),
    subject=Subject(ranks=("TP2",), engine=ENGINE),
    since=AT - 30,
    explains=("engine-crashed",),
    advice=("Look for the rank that never arrived.",),
)
CRASHED = Finding(
    failure_mode="engine-crashed",
    title="The engine died of an error of its own",
    severity=Severity.CRITICAL,
    confidence=Confidence.MEDIUM,
    summary="vLLM (pid 4711) ended after the timeout.",
    evidence=(Evidence("engine-log", "vllm.log:1300", "EngineDeadError"),),
    subject=Subject(engine=ENGINE),
    since=AT - 20,
)
DEGRADED = Finding(
    failure_mode="nvlink-degraded",
    title="A GPU has fewer active NVLinks than its board gives it",
    severity=Severity.CRITICAL,
    summary="GPU 1 (0000:28:00.0) has 16 of 18 NVLinks up: links 5 and 7 are down.",
    evidence=(Evidence("nvml", "nvmlDeviceGetNvLinkState", "links 5, 7: inactive"),),
    subject=Subject(gpus=(uuid(1),), links=(f"{uuid(1)}/5", f"{uuid(1)}/7")),
    advice=("Reset the GPU: `nvidia-smi --gpu-reset -i 1`.",),
)
HINT = Finding(
    failure_mode="tp-single-stream-stall",
    title="Tensor parallelism over four GPUs serves one stream more slowly than over two",
    severity=Severity.NOTICE,
    confidence=Confidence.LOW,
    summary="TP=4 with about 1 request at a time for 60 s.",
    evidence=(Evidence("engine-metrics", "vllm:num_requests_running", "1"),),
    subject=Subject(engine=ENGINE),
)

FOUR = tuple(gpu(i) for i in range(4))
LOG_LINE = EngineEvent(signal="watchdog-timeout", text="Watchdog caught …", where="vllm.log:1201", count=3)
XID = Xid(text="Xid 79", where="/dev/kmsg:4711", at=AT - 40, code=79, pci_address="0000:38:00.0")


def lost_gpu() -> Report:
    """Four GPUs, one of them gone, with two consequences and one mode that could not be judged."""
    survivors = tuple(g for g in FOUR if g.index != 2)
    gone = Gpu(uuid=uuid(2), index=2, pci_address="0000:38:00.0", lost=True)
    visit = snapshot(
        (*survivors, gone),
        kernel=(XID,),
        engine_events=(LOG_LINE,),
        unseen=(Unseen(Source.NVML, Absent(Why.LOST), "values of GPU 2"),),
    )
    return report(
        visit,
        CRASHED,
        TIMEOUT,
        LOST,
        unjudged=(Unjudged("nvswitch-fabric-fault", Absent(Why.NO_PERMISSION, "fabric manager's log")),),
    )


def links_down() -> Report:
    """Four GPUs of an NVSwitch board; two links of GPU 1 are down."""
    gpus = tuple(gpu(i, links_down=(5, 7) if i == 1 else ()) for i in range(4))
    return report(snapshot(gpus, nvlinks={1: 16}), DEGRADED, HINT)


def clear() -> Report:
    return report(snapshot(FOUR))


def notice() -> Report:
    return report(snapshot(FOUR), HINT)


def no_driver() -> Report:
    """A laptop: no driver, no engine, a kernel log that this user may not read."""
    missing = Absent(Why.NOT_PRESENT, "no NVIDIA driver is loaded")
    denied = Absent(Why.NO_PERMISSION, "/dev/kmsg: Operation not permitted")
    visit = Snapshot(
        at=AT,
        node=Node(name="laptop"),
        seen=(Source.PROCESSES, Source.HOST),
        unseen=(Unseen(Source.NVML, missing), Unseen(Source.KERNEL_LOG, denied)),
        collectors=(CollectorRun(Source.NVML, False, 0.1),),
    )
    return report(
        visit,
        unjudged=(
            Unjudged("pcie-fallback", Absent(Why.NOT_PRESENT, "nvml no NVIDIA driver is loaded")),
            Unjudged("nvlink-degraded", Absent(Why.NOT_PRESENT, "nvml no NVIDIA driver is loaded")),
            Unjudged("gpu-lost", Absent(Why.NO_PERMISSION, "kernel-log /dev/kmsg: Operation not permitted")),
        ),
        quiet=("engine-crashed",),
    )


def half_blind() -> Report:
    """A hint, and a driver that does not answer."""
    hung = Absent(Why.TIMED_OUT, "nvml has not answered for 5.0 s")
    visit = snapshot(
        FOUR, seen=tuple(s for s in EVERYTHING if s is not Source.NVML), unseen=(Unseen(Source.NVML, hung),)
    )
    return report(visit, HINT, unjudged=(Unjudged("nvlink-degraded", hung),))


def pasted_log() -> Report:
    """Triage of one engine log: everything else was not given."""
    not_given = Absent(Why.NOT_GIVEN, "add the output of `nvidia-smi -q`")
    visit = Snapshot(
        at=AT,
        seen=(Source.ENGINE_LOG,),
        unseen=tuple(Unseen(source, not_given) for source in Source if source is not Source.ENGINE_LOG),
    )
    return report(visit, unjudged=(Unjudged("nvlink-degraded", not_given),), quiet=("engine-crashed",))


def hostile() -> Report:
    """Log text that tries to move the cursor, to retitle the terminal, to break tables and to end a code fence."""
    text = "\x1b[2J\x1b]0;owned\x07red \x1b[31mtext\x1b[0m\r\nsecond\tline ```` | <b> \u202egnirts\x00 \ud800 \x9b1m"
    finding = Finding(
        failure_mode="application-fault",
        title="A kernel of the workload faulted",
        severity=Severity.WARNING,
        summary=f"The engine said: {text}",
        evidence=(Evidence("engine-log", f"{text}.log:1", text),),
        subject=Subject(engine=text, ranks=(text,), gpus=(text,)),
        advice=(f"Look at {text}",),
    )
    visit = snapshot(FOUR, node=Node(name=text), unseen=(Unseen(Source.MODEL, Absent(Why.FAILED, text), text),))
    return report(visit, finding, unjudged=(Unjudged("gpu-lost", Absent(Why.FAILED, text)),))


ALL = {
    "lost_gpu": lost_gpu,
    "links_down": links_down,
    "clear": clear,
    "notice": notice,
    "no_driver": no_driver,
    "half_blind": half_blind,
    "pasted_log": pasted_log,
    "hostile": hostile,
}
