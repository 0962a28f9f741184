"""Make the recordings that `test_cases.py` judges: `python tests/record_cases.py [ID …]`.

Most are recorded from the simulated node, through the real collectors; what it can't play is built by `nodes.py`.
A case is `tests/cases/<failure mode>/{fires,quiet}-<name>.rec`; a healthy node is `tests/healthy/<profile>.rec`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import nodes

from doctor.feeds import recording, simulated
from doctor.snapshot import Absent, Engine, GpuProcess, Rank, Recorder, Snapshot, Why

HERE = Path(__file__).parent
PROGRAM = "gpu-doctor tests"

SIMULATED: dict[str, dict[str, tuple[str, ...]]] = {
    "pcie-fallback": {
        "fires-l40s-advice": ("l40s-4",),
        "quiet-mesh": ("hgx-h100-4",),
        "quiet-bridged-pair": ("h100-nvl-4",),
        "quiet-one-link-down": ("hgx-h100-4", "nvlink-down:gpu=1,link=4"),
    },
    "nvlink-degraded": {
        "fires-one-link": ("hgx-h100-4", "nvlink-down:gpu=1,link=4"),
        "fires-one-gpu": ("dgx-h100-4of8", "nvlinks-all-down:gpu=3"),
        "fires-all": ("hgx-h100-4", "pcie-fallback"),
        "quiet-unbridged-cards": ("h100-pcie-4",),
        "quiet-mig": ("hgx-h100-4", "mig-enabled:gpu=1"),
        "quiet-bridged-pairs": ("h100-nvl-4",),
    },
    "nvlink-errors": {
        "fires-replays": ("hgx-h100-4", "nvlink-errors:gpu=1,link=3"),
        "fires-xid-74": ("hgx-h100-4", "xid:code=74,gpu=1"),
        "quiet-link-down": ("hgx-h100-4", "nvlink-down:gpu=1,link=4"),
        "quiet-before": ("hgx-h100-4", "nvlink-errors:gpu=1,link=3,end=-60"),
    },
    "nvswitch-fabric-fault": {
        "fires-manager-dead": ("dgx-h100-4of8", "fabric-manager-dead"),
        "fires-manager-version": ("dgx-h100-4of8", "fabric-manager-version"),
        "fires-incomplete": ("dgx-h100-4of8", "fabric-incomplete"),
        "fires-unhealthy": ("dgx-h100-4of8", "fabric-unhealthy:gpu=3"),
        "fires-sxid-20034": ("dgx-h100-4of8", "sxid:code=20034"),
        "quiet-no-switches": ("hgx-h100-4",),
        "quiet-sxid-non-fatal": ("dgx-h100-4of8", "sxid:code=12028"),
        "quiet-health-not-reported": ("dgx-h100-4of8",),
    },
    "p2p-blocked": {
        "fires-chipset": ("hgx-h100-4", "p2p-blocked"),
        "quiet-geforce": ("rtx4090-4", "p2p-blocked"),
        "quiet-dead-links": ("hgx-h100-4", "nvlinks-all-down"),
        "quiet-fabric-in-progress": ("dgx-h100-4of8", "fabric-incomplete"),
    },
    "pcie-link-degraded": {
        "fires-width": ("hgx-h100-4", "pcie-width:gpu=1"),
        "fires-generation": ("l40s-4", "pcie-generation:gpu=1"),
        "quiet-idle": ("rtx4090-4", "idle"),
        "quiet-idle-generation": ("rtx4090-4", "idle", "pcie-generation:gpu=1,generation=1"),
    },
    "nccl-timeout": {
        "fires-silent-rank": ("hgx-h100-4", "nccl-timeout:rank=1"),
        "quiet-fault": ("hgx-h100-4", "application-fault:gpu=1"),
        "quiet-idle": ("hgx-h100-4", "idle"),
    },
    "engine-stalled": {
        "fires-hardware": ("hgx-h100-4", "engine-stalled:kind=hardware"),
        "fires-collective": ("hgx-h100-4", "engine-stalled:kind=collective"),
        "fires-software": ("hgx-h100-4", "engine-stalled:kind=software"),
        "quiet-idle": ("hgx-h100-4", "idle"),
        "quiet-failed-scrape": ("hgx-h100-4", "metrics-down"),
    },
    "tp-single-stream-stall": {
        "fires-one-stream": ("hgx-h100-4", "single-stream"),
        "quiet-many-streams": ("hgx-h100-4",),
        "quiet-no-traffic": ("hgx-h100-4", "idle"),
    },
    "fp8-not-engaged": {
        "fires-weight-only": ("hgx-h100-4", "fp8-not-engaged"),
        "quiet-engaged": ("hgx-h100-4", "single-stream"),
        "quiet-bf16": ("hgx-h100-4",),
    },
    "out-of-memory-at-startup": {
        "fires-profiling": ("hgx-h100-4", "out-of-memory-at-startup"),
        "quiet-foreign-process": ("hgx-h100-4", "foreign-process:gpu=1"),
        "quiet-killed-worker": ("hgx-h100-4", "oom-kill"),
    },
    "gpu-memory-held": {
        "fires-beside-an-engine": ("hgx-h100-4", "foreign-process:gpu=1"),
        "quiet-nobody-else": ("hgx-h100-4", "out-of-memory-at-startup"),
        "quiet-small": ("hgx-h100-4", "foreign-process:gpu=1,gib=0.2"),
    },
    "cooling-insufficient": {
        "fires-one-gpu": ("hgx-h100-4", "overheating:gpu=2"),
        "fires-chassis": ("hgx-h100-4", "overheating"),
        "quiet-brake": ("hgx-h100-4", "power-brake"),
        "quiet-power-cap": ("hgx-h100-4", "power-cap"),
        "quiet-idle": ("hgx-h100-4", "idle"),
    },
    "power-transient": {
        "fires-common-steps": ("hgx-h100-4", "power-transient"),
        "quiet-full-load": ("hgx-h100-4",),
        "quiet-brake-without-steps": ("hgx-h100-4", "power-brake"),
    },
    "power-brake": {
        "fires-brake": ("hgx-h100-4", "power-brake"),
        "quiet-overheating": ("hgx-h100-4", "overheating:gpu=2"),
        "quiet-before": ("hgx-h100-4", "power-brake:end=-60"),
    },
    "power-capped": {
        "fires-one-rank": ("hgx-h100-4", "power-cap:gpu=1"),
        "fires-all": ("hgx-h100-4", "power-cap"),
        "quiet-full-load": ("hgx-h100-4",),
        "quiet-brake": ("hgx-h100-4", "power-brake"),
    },
    "stack-mismatch": {
        "fires-driver-too-old": ("hgx-h100-4", "driver-too-old"),
        "fires-library": ("hgx-h100-4", "driver-library-mismatch"),
        "quiet-older-driver": ("hgx-h100-4", "driver-old:branch=580"),
        "quiet-fabric-manager": ("dgx-h100-4of8", "fabric-manager-version"),
    },
    "mig-misconfigured": {
        "fires-under-tensor-parallelism": ("hgx-h100-4", "mig-enabled:gpu=1"),
        "fires-pending": ("hgx-h100-4", "mig-pending:gpu=1"),
        "quiet-off": ("hgx-h100-4",),
    },
    "gpu-lost": {
        "fires-under-load": ("hgx-h100-8", "gpu-lost:gpu=2"),
        "fires-in-a-mesh": ("hgx-h100-4", "gpu-lost:gpu=1"),
        "fires-just-now": ("hgx-h100-4", "gpu-lost:gpu=1,start=0.5"),
        "fires-gap-on-the-board": ("hgx-h100-8", "gpu-removed:gpu=3"),
        "quiet-other-xid": ("hgx-h100-4", "xid:code=31,gpu=1"),
        "quiet-driver-hung": ("hgx-h100-4", "driver-hung"),
    },
    "gpu-hung": {
        "fires-xid-119": ("hgx-h100-4", "xid:code=119,gpu=1"),
        "quiet-collective": ("hgx-h100-4", "engine-stalled:kind=collective"),
        "quiet-lost": ("hgx-h100-4", "gpu-lost:gpu=1"),
    },
    "driver-unresponsive": {
        "fires-hung": ("hgx-h100-4", "driver-hung"),
        "quiet-lost": ("hgx-h100-4", "gpu-lost:gpu=1"),
        "quiet-no-rights": ("hgx-h100-4", "permission-denied"),
    },
    "gpu-memory-faulty": {
        "fires-uncorrected": ("hgx-h100-4", "ecc-uncorrected:gpu=1"),
        "fires-remap-pending": ("hgx-h100-4", "remap-pending:gpu=1"),
        "fires-contained": ("hgx-h100-4", "xid:code=94,gpu=1"),
        "fires-retired-part": ("hgx-h100-4", "xid:code=156,gpu=1"),
        "fires-detail-alone": ("hgx-h100-4", "xid:code=171,gpu=1"),
        "quiet-xid-63": ("hgx-h100-4", "xid:code=63,gpu=1"),
        "quiet-application": ("hgx-h100-4", "application-fault:gpu=1"),
    },
    "application-fault": {
        "fires-illegal-access": ("hgx-h100-4", "application-fault:gpu=1"),
        "quiet-timeout": ("hgx-h100-4", "nccl-timeout:rank=1"),
        "quiet-software": ("hgx-h100-4", "engine-crashed"),
    },
    "recovery-pending": {
        "fires-reset": ("hgx-h100-4", "recovery-action:gpu=1"),
        "quiet-none": ("hgx-h100-4", "recovery-action:gpu=1,action=none"),
        "quiet-other-xid": ("hgx-h100-4", "xid:code=13,gpu=1"),
    },
    "xid-unclassified": {
        "fires-xid-110": ("hgx-h100-4", "xid:code=110,gpu=1"),
        "quiet-known": ("hgx-h100-4", "xid:code=31,gpu=1"),
        "quiet-lost-and-shadows": ("hgx-h100-4", "gpu-lost:gpu=1"),
    },
    "worker-killed": {
        "fires-out-of-memory-killer": ("hgx-h100-4", "oom-kill"),
        "quiet-gpu-memory": ("hgx-h100-4", "out-of-memory-at-startup"),
        "quiet-software": ("hgx-h100-4", "engine-crashed"),
    },
    "engine-crashed": {
        "fires-software-error": ("hgx-h100-4", "engine-crashed"),
        "quiet-no-engine": ("hgx-h100-4", "no-engine"),
        "quiet-no-traffic": ("hgx-h100-4", "idle"),
    },
}
"""Case → its profile and faults."""


def given_away(snapshot: Snapshot) -> Snapshot:
    """A GPU that a virtual machine has."""
    devices = snapshot.host.pci_devices
    assert not isinstance(devices, Absent)
    vfio = tuple(nodes.put(d, driver="vfio-pci") if d.address == nodes.address(3) else d for d in devices)
    return nodes.put(nodes.forget_gpu(snapshot, 3), host__pci_devices=vfio)


def lost_before_boot(snapshot: Snapshot) -> Snapshot:
    return nodes.with_kernel(snapshot, nodes.xid(79, 1, at=nodes.BOOT - 60, before_boot=True))


def dead_links(snapshot: Snapshot) -> Snapshot:
    """NVLink ways that are missing, on a driver that can't tell of single links."""
    unread = nodes.with_gpu(snapshot, range(8), links=Absent(Why.MISSING_SYMBOL))
    return nodes.with_pairs(unread, nvlinks=0, p2p_nvlink="not-supported")


def slow_start() -> tuple[Snapshot, ...]:
    """An idle node whose driver wakes for 25 s without persistence mode, and then answers."""
    idle = nodes.each(nodes.healthy("hgx-h100-4", busy=False), nodes.without_engine)
    return (nodes.put(nodes.hung(idle[0], 25.0), host__blocked_tasks=()), *idle[1:])


def deliberate() -> tuple[Snapshot, ...]:
    """Seven small instances a GPU, none of them under tensor parallelism."""
    visits = nodes.healthy("hgx-h100-4", tp=1)
    return nodes.each(visits, lambda s: nodes.partitioned(s, range(4), ("1g.10gb",) * 7))


def reset_since() -> tuple[Snapshot, ...]:
    """An uncorrectable error half an hour ago, and the reset that the driver asked for and no longer does."""
    ago = nodes.START - 1800
    lines = (
        nodes.xid(48, 1, at=ago),
        nodes.xid(154, 1, at=ago + 1, recovery_action="reset"),
        nodes.xid(154, 1, at=ago + 300, recovery_action="none"),
    )
    return nodes.last(nodes.healthy("hgx-h100-4", visits=2), lambda s: nodes.with_kernel(s, *lines))


def other_card(snapshot: Snapshot) -> Snapshot:
    return nodes.with_gpu(
        snapshot, 3, pci_device_id="10de:2335", name="NVIDIA H200", memory__total_bytes=143771 * nodes.MIB
    )


def holding(snapshot: Snapshot, gpu: int, pid: int, gib: float, name: str) -> Snapshot:
    """A further process on a GPU."""
    before = next(g for g in snapshot.gpus if g.index == gpu).processes
    assert not isinstance(before, Absent)
    more = GpuProcess(pid=pid, used_bytes=int(gib * (1 << 30)), name=name)
    return nodes.with_gpu(snapshot, gpu, processes=(*before, more))


def second_engine(snapshot: Snapshot, *command: str) -> Snapshot:
    """Another engine's one rank on GPU 1."""
    engine = Engine(
        pid=3000,
        started_at=nodes.START - 60,
        kind="vllm",
        command_line=command,
        ranks=(Rank(pid=3001, rank=0, title="VLLM::EngineCore", gpu=nodes.uuid(1)),),
    )
    both = nodes.put(snapshot, engines=(*snapshot.engines, engine))
    return holding(both, 1, 3001, 6.0, "VLLM::EngineCore")


def not_empty() -> tuple[Snapshot, ...]:
    """An engine that refused to start, and the job that holds its GPU."""
    text = (
        "ValueError: Free memory on device cuda:1 (19.1/79.65 GiB) on startup is less than desired GPU memory utilization "
        "(0.92, 73.28 GiB). Decrease GPU memory utilization or reduce GPU memory used by other processes."
    )
    gib = {"free_bytes": 19.1, "total_bytes": 79.65, "wanted_bytes": 73.28}
    facts = {name: int(value * (1 << 30)) for name, value in gib.items()}
    refusal = nodes.line("free-memory-below-utilization", text, number=9, gpu=1, utilization=0.92, **facts)
    idle = nodes.each(nodes.healthy("hgx-h100-4", busy=False), nodes.without_engine)
    held = nodes.each(idle, lambda s: holding(s, 1, 4000, 60.0, "/usr/bin/python3"))
    return nodes.last(held, lambda s: nodes.with_lines(s, refusal))


def asleep(snapshot: Snapshot) -> Snapshot:
    return nodes.with_gpu(snapshot, range(8), persistence_mode=False)


def recorded(**state: Any) -> Callable[[], Iterable[Snapshot]]:
    """Return the visits of a healthy node whose daemon's flight recorder is in this state at the last one."""
    directory = "/var/lib/gpu-doctor"

    def visits() -> Iterable[Snapshot]:
        *before, last = nodes.each(
            nodes.healthy("hgx-h100-4"), lambda s: nodes.put(s, recorder=Recorder(directory=directory))
        )
        since = state.get("failing_since")
        told = {**state, "failing_since": last.at + since} if since is not None else state
        return (*before, nodes.put(last, recorder=Recorder(directory=directory, **told)))

    return visits


BUILT: dict[str, dict[str, Callable[[], Iterable[Snapshot]]]] = {
    "pcie-fallback": {"fires-dead-links": lambda: nodes.each(nodes.healthy("hgx-h100-4"), dead_links)},
    "mig-misconfigured": {
        "fires-memory-in-no-instance": lambda: nodes.each(
            nodes.healthy("hgx-h100-8", tp=4, visits=2), lambda s: nodes.partitioned(s, 6, ("3g.40gb",))
        ),
        "quiet-deliberate": deliberate,
    },
    "gpu-lost": {
        "fires-not-listed": lambda: nodes.each(nodes.healthy("hgx-h100-4"), lambda s: nodes.forget_gpu(s, 2)),
        "quiet-given-away": lambda: nodes.each(nodes.healthy("hgx-h100-4"), given_away),
        "quiet-before-boot": lambda: nodes.each(nodes.healthy("hgx-h100-4", visits=2), lost_before_boot),
    },
    "gpu-memory-faulty": {"quiet-reset-since": reset_since},
    "driver-unresponsive": {"quiet-slow-first-start": slow_start},
    "gpu-memory-held": {
        "fires-at-startup": not_empty,
        "fires-left-over": lambda: nodes.each(
            nodes.healthy("hgx-h100-4"), lambda s: second_engine(s, "VLLM::EngineCore")
        ),
        "quiet-second-engine": lambda: nodes.each(
            nodes.healthy("hgx-h100-4"), lambda s: second_engine(s, "vllm", "serve", "org/embedder")
        ),
        "quiet-desktop": lambda: nodes.each(
            nodes.healthy("rtx4090-4"), lambda s: holding(s, 0, 4000, 0.2, "/usr/lib/xorg/Xorg")
        ),
        "quiet-mps": lambda: nodes.each(
            nodes.healthy("hgx-h100-4"), lambda s: holding(s, 0, 4000, 3.0, "nvidia-cuda-mps-server")
        ),
    },
    "mixed-gpus": {
        "fires-one-other": lambda: nodes.each(nodes.healthy("hgx-h100-4"), other_card),
        "quiet-not-in-the-group": lambda: nodes.each(nodes.healthy("hgx-h100-4", tp=2), other_card),
        "quiet-all-alike": lambda: nodes.healthy("hgx-h100-4"),
    },
    "recorder-failing": {
        "fires-disk-full": recorded(failing_since=-300.0, failure="No space left on device", waiting=20),
        "fires-disk-hung": recorded(
            failing_since=-8000.0, failure="a write has not returned for 7990 s", waiting=512, lost=21
        ),
        "quiet-it-writes-again": recorded(lost=21),
        "quiet-damage-of-long-ago": recorded(damaged=3),
        "quiet-none-asked-for": lambda: nodes.healthy("hgx-h100-4"),
    },
    "persistence-mode-off": {
        "fires-nobody-there": lambda: nodes.each(
            nodes.healthy("l40s-4", busy=False), lambda s: asleep(nodes.without_engine(s))
        ),
        "quiet-engine-keeps-it-awake": lambda: nodes.each(nodes.healthy("hgx-h100-4"), asleep),
        "quiet-on": lambda: nodes.each(nodes.healthy("l40s-4", busy=False), nodes.without_engine),
    },
}
"""Case → its visits."""


def play(profile: str, *faults: str) -> Iterable[Snapshot]:
    return simulated.node(profile, faults, every=1.0, times=2 if "driver-hung" in faults else 3, patience_seconds=2.0)


def keep(visits: Iterable[Snapshot], *place: str) -> None:
    path = HERE.joinpath(*place).with_suffix(".rec")
    path.parent.mkdir(parents=True, exist_ok=True)
    count = sum(1 for _ in recording.write(visits, path, PROGRAM))
    print(f"{path.relative_to(HERE)}: {count} visits, {path.stat().st_size} bytes")


def main(wanted: list[str]) -> None:
    for failure_mode, cases in SIMULATED.items():
        for name, node in cases.items() if not wanted or failure_mode in wanted else ():
            keep(play(*node), "cases", failure_mode, name)
    for failure_mode, made in BUILT.items():
        for name, visits in made.items() if not wanted or failure_mode in wanted else ():
            keep(visits(), "cases", failure_mode, name)
    for profile in nodes.PROFILES if not wanted or "healthy" in wanted else ():
        keep(play(profile), "healthy", profile)


if __name__ == "__main__":
    main(sys.argv[1:])
