"""The last report as Prometheus metrics. A value that was not seen is absent, never zero and never the one before."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator

import msgspec
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from doctor.report import Report, Verdict
from doctor.snapshot import Engine, EngineMetrics, Gpu, Maybe, Snapshot, Xid, known, or_none
from exporters.wording import cut, gpu_number, plain, severity_of

Number = int | float | bool
Labels = tuple[str, ...]

LABEL_WIDTH = 120
"""A label's value is a name, not a text."""

COUNTED_MAX = 512
"""How many label sets a counter of events holds: more would be somebody's forged log."""


class Family(msgspec.Struct, frozen=True):
    """One metric with its help and its samples by the values of its labels."""

    name: str
    help: str
    labels: Labels
    samples: dict[Labels, float]

    @property
    def kind(self) -> str:
        """`counter` or `gauge`, as the name tells."""
        return "counter" if self.name.endswith("_total") else "gauge"

    def metric(self) -> Metric:
        """Return it in the client library's form."""
        make = CounterMetricFamily if self.kind == "counter" else GaugeMetricFamily
        family = make(self.name, self.help, labels=self.labels)
        for labels, value in self.samples.items():
            family.add_metric(labels, value)
        return family


class Tally(msgspec.Struct):
    """What the daemon counted since it started: events, which a report shows only once."""

    visits: int = 0
    nccl_timeouts: int | None = None
    """None until an engine's log was seen."""
    xids: Counter[Labels] = msgspec.field(default_factory=Counter[Labels])

    def add(self, report: Report) -> None:
        """Count what this visit brought."""
        snapshot = report.snapshot
        self.visits += 1
        if snapshot.logs or snapshot.engine_events:
            lines = sum(event.count for event in snapshot.engine_events if event.signal == "watchdog-timeout")
            self.nccl_timeouts = (self.nccl_timeouts or 0) + lines
        for event in snapshot.kernel:
            if isinstance(event, Xid) and not event.before_boot:
                key = (str(event.code), _label(event.pci_address))
                if key in self.xids or len(self.xids) < COUNTED_MAX:
                    self.xids[key] += 1


class Page(Collector):
    """What a scrape reads: the report that *latest* returns (None: there is none, or it is stale) and the tally."""

    def __init__(self, latest: Callable[[], Report | None], tally: Tally, version: str) -> None:
        self._latest = latest
        self._tally = tally
        self._version = version

    def collect(self) -> Iterator[Metric]:
        """Yield every metric that has a value now."""
        for family in families(self._latest(), self._tally, self._version):
            if family.samples:
                yield family.metric()


def families(report: Report | None, tally: Tally, version: str) -> Iterator[Family]:
    """Yield every metric that there is, without samples where there is nothing to tell."""
    yield from _of_the_daemon(tally, version)
    yield from _of_the_judgement(report)
    snapshot = report.snapshot if report else Snapshot(at=0.0)
    yield from _of_the_collectors(snapshot)
    yield from _of_the_gpus(snapshot)
    yield from _of_the_links(snapshot)
    yield from _of_the_engines(snapshot)


def _of_the_daemon(tally: Tally, version: str) -> Iterator[Family]:
    yield Family("gpu_doctor_build_info", "The version of gpu-doctor.", ("version",), {(version,): 1.0})
    yield Family("gpu_doctor_visits_total", "Visits since the daemon started.", (), {(): float(tally.visits)})
    yield Family(
        "gpu_doctor_nccl_timeouts_total",
        "Lines of the NCCL watchdog about a collective that timed out, read since the daemon started.",
        (),
        {} if tally.nccl_timeouts is None else {(): float(tally.nccl_timeouts)},
    )
    yield Family(
        "gpu_doctor_xids_total",
        "Xid lines of the kernel log, read since the daemon started; those of an earlier boot are left out.",
        ("xid", "pci_address"),
        {labels: float(number) for labels, number in sorted(tally.xids.items())},
    )


def _of_the_judgement(report: Report | None) -> Iterator[Family]:
    verdicts = {(verdict.value,): float(verdict is report.verdict) for verdict in Verdict} if report else {}
    yield Family(
        "gpu_doctor_verdict", "1 for the verdict of the last report, 0 for the others.", ("verdict",), verdicts
    )
    yield Family(
        "gpu_doctor_report_timestamp_seconds",
        "When the visit behind the last report began, Unix time.",
        (),
        {(): report.at} if report else {},
    )
    found: dict[Labels, float] = {}
    if report:
        for reported in report.findings:
            finding = reported.finding
            words = (finding.failure_mode, severity_of(finding).word, finding.confidence.word)
            cause = "true" if reported.depth == 0 else "false"
            for uuid in finding.subject.gpus or ("",):
                found[(*words, cause, *_gpu(uuid, report.snapshot))] = 1.0
    yield Family(
        "gpu_doctor_finding",
        "1 for each failure mode that is present, by GPU where it is about GPUs; root_cause tells whether a finding explains it.",
        ("failure_mode", "severity", "confidence", "root_cause", "gpu", "uuid"),
        found,
    )
    yield Family(
        "gpu_doctor_unjudged",
        "1 for each failure mode that could not be judged, with the reason.",
        ("failure_mode", "reason"),
        {(u.failure_mode, u.why.why.value): 1.0 for u in report.unjudged} if report else {},
    )
    yield Family(
        "gpu_doctor_quiet",
        "How many failure modes were asked about and are not present.",
        (),
        {(): float(len(report.quiet))} if report else {},
    )


def _of_the_collectors(snapshot: Snapshot) -> Iterator[Family]:
    runs = {(run.source.value,): run for run in snapshot.collectors}
    yield Family(
        "gpu_doctor_collector_success",
        "1 where the collector saw its source at the last visit, 0 where it did not.",
        ("collector",),
        {labels: float(run.succeeded) for labels, run in runs.items()},
    )
    yield Family(
        "gpu_doctor_collector_duration_seconds",
        "How long the collector took at the last visit.",
        ("collector",),
        {labels: run.duration_seconds for labels, run in runs.items()},
    )
    yield Family(
        "gpu_doctor_collector_age_seconds",
        "How old the collector's values were at the last visit.",
        ("collector",),
        {labels: run.age_seconds for labels, run in runs.items()},
    )
    unseen = Counter((u.source.value, u.why.why.value) for u in snapshot.unseen)
    yield Family(
        "gpu_doctor_unseen",
        "How many parts of a source (or 1: the whole) the last visit could not see, by reason.",
        ("source", "reason"),
        {labels: float(number) for labels, number in unseen.items()},
    )
    yield Family(
        "gpu_doctor_nvml_blocked_seconds",
        "How long NVML had not answered when the visit gave up waiting; 0: it answered.",
        (),
        {(): snapshot.nvml_blocked_seconds} if snapshot.collectors else {},
    )


GPU = ("gpu", "uuid")


def _power_peak(gpu: Gpu) -> Maybe[Number]:
    return max((s.value for s in gpu.power.samples), default=gpu.power.instant_watts)


OF_A_GPU: tuple[tuple[str, str, Callable[[Gpu], Maybe[Number]]], ...] = (
    ("gpu_temperature_celsius", "Temperature of the GPU.", lambda g: g.thermal.gpu_celsius),
    ("gpu_memory_temperature_celsius", "Temperature of the memory.", lambda g: g.thermal.memory_celsius),
    (
        "gpu_thermal_margin_celsius",
        "NVML's T.Limit: how far the hottest sensor is from the slowdown reference.",
        lambda g: g.thermal.margin_celsius,
    ),
    ("gpu_power_watts", "Power, as the sensor averages it.", lambda g: g.power.average_watts),
    ("gpu_power_instant_watts", "Power at the moment of the visit.", lambda g: g.power.instant_watts),
    ("gpu_power_peak_watts", "Highest sample of power since the visit before.", _power_peak),
    ("gpu_power_limit_watts", "Power limit that is set.", lambda g: g.power.limit_watts),
    (
        "gpu_power_limit_default_watts",
        "Power limit that the product comes with.",
        lambda g: g.power.limit_default_watts,
    ),
    ("gpu_energy_joules_total", "Energy since the driver was loaded.", lambda g: g.power.energy_joules),
    ("gpu_busy_ratio", "Share of the time in which any kernel ran.", lambda g: g.activity.gpu_ratio),
    ("gpu_sm_busy_ratio", "Share of the multiprocessors that were busy (GPM).", lambda g: g.activity.sm_ratio),
    (
        "gpu_tensor_busy_ratio",
        "Share of the time in which tensor cores worked (GPM).",
        lambda g: g.activity.tensor_ratio,
    ),
    (
        "gpu_nvlink_receive_bytes_per_second",
        "Bytes received over NVLink (GPM).",
        lambda g: g.activity.nvlink_rx_bytes_per_second,
    ),
    (
        "gpu_nvlink_transmit_bytes_per_second",
        "Bytes sent over NVLink (GPM).",
        lambda g: g.activity.nvlink_tx_bytes_per_second,
    ),
    (
        "gpu_pcie_receive_bytes_per_second",
        "Bytes received over PCI Express.",
        lambda g: g.activity.pcie_rx_bytes_per_second,
    ),
    (
        "gpu_pcie_transmit_bytes_per_second",
        "Bytes sent over PCI Express.",
        lambda g: g.activity.pcie_tx_bytes_per_second,
    ),
    ("gpu_memory_bytes", "Memory of the GPU.", lambda g: g.memory.total_bytes),
    ("gpu_memory_used_bytes", "Memory in use.", lambda g: g.memory.used_bytes),
    (
        "gpu_sm_clock_hertz",
        "Clock of the multiprocessors.",
        lambda g: g.clocks.sm_mhz * 1_000_000 if known(g.clocks.sm_mhz) else g.clocks.sm_mhz,
    ),
    ("gpu_pcie_generation", "PCI Express generation now; idle links go down on purpose.", lambda g: g.pcie.generation),
    ("gpu_pcie_generation_max", "PCI Express generation that GPU and slot can do.", lambda g: g.pcie.generation_max),
    ("gpu_pcie_lanes", "PCI Express lanes now.", lambda g: g.pcie.width),
    ("gpu_pcie_lanes_max", "PCI Express lanes that GPU and slot can do.", lambda g: g.pcie.width_max),
    ("gpu_pcie_replays_total", "PCI Express replays.", lambda g: g.pcie.replays_total),
    ("gpu_row_remap_pending", "1 where a memory row waits for a reset to be remapped.", lambda g: g.ecc.remap_pending),
    ("gpu_row_remap_failed", "1 where the remapping of a memory row failed.", lambda g: g.ecc.remap_failed),
    ("gpu_persistence_mode", "1 where persistence mode is on.", lambda g: g.persistence_mode),
    ("gpu_lost", "1 where NVML answers that the GPU is lost.", lambda g: g.lost),
    ("gpu_mig_enabled", "1 where Multi-Instance GPU mode is on.", lambda g: g.mig.enabled),
    ("gpu_mig_enabled_after_reset", "1 where the mode will be on after a reset.", lambda g: g.mig.enabled_after_reset),
    ("gpu_mig_devices", "MIG devices.", lambda g: len(g.mig.devices) if known(g.mig.devices) else g.mig.devices),
)
"""Metrics with one value a GPU: name without its prefix, help, value."""


def _of_the_gpus(snapshot: Snapshot) -> Iterator[Family]:
    gpus = {_gpu(gpu.uuid, snapshot): gpu for gpu in snapshot.gpus}
    yield Family(
        "gpu_doctor_gpu_info",
        "What a GPU is.",
        (*GPU, "pci_address", "name", "vbios_version"),
        {
            (*labels, *(_label(or_none(word) or "") for word in (gpu.pci_address, gpu.name, gpu.vbios_version))): 1.0
            for labels, gpu in gpus.items()
        },
    )
    for name, text, value_of in OF_A_GPU:
        yield Family(f"gpu_doctor_{name}", text, GPU, _seen((labels, value_of(gpu)) for labels, gpu in gpus.items()))
    reasons = [((*labels, r), 1.0) for labels, g in gpus.items() for r in or_none(g.clocks.event_reasons) or ()]
    yield Family(
        "gpu_doctor_gpu_clocks_event",
        "1 for each reason that holds the clocks where they are.",
        (*GPU, "reason"),
        dict(reasons),
    )
    yield Family(
        "gpu_doctor_gpu_clocks_event_seconds_total",
        "Time under a clocks event reason since the driver was loaded.",
        (*GPU, "reason"),
        _seen(
            ((*labels, reason), value)
            for labels, gpu in gpus.items()
            for reason, value in (
                ("sw-power-cap", gpu.clocks.sw_power_cap_seconds),
                ("sw-thermal-slowdown", gpu.clocks.sw_thermal_seconds),
                ("hw-thermal-slowdown", gpu.clocks.hw_thermal_seconds),
                ("hw-power-brake", gpu.clocks.power_brake_seconds),
            )
        ),
    )
    yield Family(
        "gpu_doctor_gpu_ecc_errors_total",
        "Memory errors since the driver was loaded.",
        (*GPU, "kind"),
        _seen(
            ((*labels, kind), value)
            for labels, gpu in gpus.items()
            for kind, value in (
                ("corrected", gpu.ecc.corrected_volatile),
                ("uncorrected", gpu.ecc.uncorrected_volatile),
            )
        ),
    )
    yield Family(
        "gpu_doctor_gpu_fabric_info",
        "The GPU's registration with the NVLink fabric; `completed` is no proof that the fabric manager lives.",
        (*GPU, "state", "status", "health"),
        {
            (*labels, *(_label(or_none(word) or "") for word in (f.state, f.status, f.health))): 1.0
            for labels, gpu in gpus.items()
            if known((f := gpu.fabric).state)
        },
    )


def _of_the_links(snapshot: Snapshot) -> Iterator[Family]:
    links = [
        ((*_gpu(gpu.uuid, snapshot), str(link.link)), link)
        for gpu in snapshot.gpus
        for link in or_none(gpu.links) or ()
    ]
    yield Family(
        "gpu_doctor_nvlink_up",
        "1 where the NVLink is active, 0 where it is not.",
        (*GPU, "link"),
        _seen((labels, link.active) for labels, link in links),
    )
    yield Family(
        "gpu_doctor_nvlink_errors_total",
        "Errors of an NVLink.",
        (*GPU, "link", "kind"),
        _seen(
            ((*labels, kind), value)
            for labels, link in links
            for kind, value in (
                ("replay", link.replay_errors_total),
                ("recovery", link.recovery_errors_total),
                ("crc", link.crc_errors_total),
            )
        ),
    )
    pairs = [((*_gpu(p.first, snapshot), *_gpu(p.second, snapshot)), p) for p in snapshot.pairs]
    pair = (*GPU, "peer", "peer_uuid")
    yield Family(
        "gpu_doctor_pair_nvlinks",
        "NVLinks between two GPUs, as `nvidia-smi topo -m` counts them; 0: they talk over PCI Express.",
        pair,
        _seen((labels, p.nvlinks) for labels, p in pairs),
    )
    yield Family(
        "gpu_doctor_pair_ancestor_info",
        "What two GPUs have in common on the PCI Express side: PIX, PXB, PHB, NODE or SYS.",
        (*pair, "ancestor"),
        {(*labels, _label(p.ancestor)): 1.0 for labels, p in pairs if known(p.ancestor)},
    )
    yield Family(
        "gpu_doctor_pair_peer_access",
        "1 where the driver lets two GPUs access each other's memory, by kind of access.",
        (*pair, "access"),
        {
            (*labels, access): float(status == "ok")
            for labels, p in pairs
            for access, status in (("read", p.p2p_read), ("write", p.p2p_write), ("atomics", p.p2p_atomics))
            if known(status)
        },
    )


OF_AN_ENGINE: tuple[tuple[str, str, Callable[[EngineMetrics], Maybe[Number]]], ...] = (
    ("engine_requests_running", "Requests that the engine is working on.", lambda m: m.running),
    ("engine_requests_waiting", "Requests that wait.", lambda m: m.waiting),
    ("engine_kv_cache_usage_ratio", "Share of the KV cache that is in use.", lambda m: m.kv_cache_usage_ratio),
    (
        "engine_steps_total",
        "Steps of the engine: flat while requests run means that it stalled.",
        lambda m: m.steps_total,
    ),
    ("engine_generation_tokens_total", "Tokens generated.", lambda m: m.generation_tokens_total),
    ("engine_prompt_tokens_total", "Tokens read from prompts.", lambda m: m.prompt_tokens_total),
    ("engine_preemptions_total", "Requests put back because the KV cache was full.", lambda m: m.preemptions_total),
    ("engine_requests_succeeded_total", "Requests that ended well.", lambda m: m.requests_succeeded_total),
)
"""Metrics with one value an engine, from its own page: name without its prefix, help, value."""


def _of_the_engines(snapshot: Snapshot) -> Iterator[Family]:
    stack = snapshot.stack
    versions = (stack.driver, stack.nvml, stack.cuda_driver, stack.kernel)
    yield Family(
        "gpu_doctor_stack_info",
        "The node's versions.",
        ("driver", "nvml", "cuda_driver", "kernel"),
        {tuple(_label(or_none(v) or "") for v in versions): 1.0} if any(map(known, versions)) else {},
    )
    names = _engine_names(snapshot.engines)
    yield Family(
        "gpu_doctor_engine_info",
        "What a serving engine is, with the versions in its own environment.",
        ("engine", "kind", "version", "torch", "nccl", "model", "tensor_parallel_size"),
        {
            (names[e.id], _label(e.kind), *(_label(str(or_none(v) or "")) for v in _facts_of(e))): 1.0
            for e in snapshot.engines
        },
    )
    pages = [((names[m.engine],), m) for m in snapshot.metrics if m.engine in names]
    for name, text, value_of in OF_AN_ENGINE:
        yield Family(f"gpu_doctor_{name}", text, ("engine",), _seen((labels, value_of(page)) for labels, page in pages))


def _facts_of(engine: Engine) -> tuple[Maybe[str | int], ...]:
    stack, flags = engine.stack, engine.flags
    return (stack.engine, stack.torch, stack.nccl, flags.model, flags.tensor_parallel_size)


def _engine_names(engines: Iterable[Engine]) -> dict[str, str]:
    """Name engines by unit, or kind and port: a pid would make new series at each restart."""
    names: dict[str, str] = {}
    for engine in sorted(engines, key=lambda e: (e.started_at, e.pid)):
        port = or_none(engine.flags.port)
        name = _label(or_none(engine.unit) or (f"{engine.kind}:{port}" if port else engine.kind))
        taken = set(names.values())
        number = 2
        unique = name
        while unique in taken:
            unique, number = f"{name}#{number}", number + 1
        names[engine.id] = unique
    return names


def _seen(values: Iterable[tuple[Labels, Maybe[Number]]]) -> dict[Labels, float]:
    return {labels: float(value) for labels, value in values if known(value)}


def _gpu(uuid: str, snapshot: Snapshot) -> Labels:
    number = gpu_number(uuid, snapshot)
    return ("" if number is None else str(number), _label(uuid))


def _label(text: str) -> str:
    return cut(plain(text), LABEL_WIDTH)
