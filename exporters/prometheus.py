"""The last report as Prometheus metrics. A value that was not seen is absent, never zero and never the one before.

The page is made once a report, out of values that never change; a scrape only sends it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice

import msgspec
from prometheus_client.exposition import choose_encoder, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from doctor.history import History
from doctor.report import Report, Verdict
from doctor.snapshot import (
    NOT_ASKED,
    Engine,
    EngineMetrics,
    Gpu,
    Maybe,
    MigDevice,
    OomKill,
    Recorder,
    Snapshot,
    Source,
    Sxid,
    Xid,
    known,
    or_none,
)
from doctor.symptoms.draw import limit_of, node_draw
from exporters.wording import cut, gpu_number, plain, severity_of

Number = int | float | bool
Labels = tuple[str, ...]

LABEL_WIDTH = 120
"""A label's value is a name, not a text."""

COUNTED_MAX = 512
"""How many label sets a counter of events holds: more would be somebody's forged log."""

SERIES_MAX = 2048
"""How many samples one metric has. Sixteen GPUs with 18 links and three kinds of errors have 864."""

ENGINES_MAX = 64
"""How many engines are told of: anybody may start a process that looks like one."""

TEXT = "text/plain; version=0.0.4; charset=utf-8"
OPENMETRICS = "application/openmetrics-text; version=1.0.0; charset=utf-8"


class Family(msgspec.Struct, frozen=True):
    """One metric with its help and its samples by the values of its labels."""

    name: str
    help: str
    labels: Labels
    samples: Mapping[Labels, float]

    @property
    def kind(self) -> str:
        """`counter` or `gauge`, as the name tells."""
        return "counter" if self.name.endswith("_total") else "gauge"


class Writer:
    """Writes pages of metrics in one format. A metric that is as it was on the page before is not written anew.

    Of a node's samples nine in ten are the same for hours: what is installed, linked and set.
    """

    def __init__(self, content_type: str) -> None:
        """Prepare. *content_type*: `TEXT` or `OPENMETRICS`."""
        self._encode = generate_latest if content_type == TEXT else choose_encoder(content_type)[0]
        self._end = self._encode(_Page(()))
        """What stands below the last metric."""
        self._written: dict[str, tuple[Family, bytes]] = {}

    def page(self, families: Iterable[Family]) -> bytes:
        """Return the metrics that have samples; what is over `SERIES_MAX` is left out and counted."""
        seen = [family for family in families if family.samples]
        left_out = sum(max(0, len(family.samples) - SERIES_MAX) for family in seen)
        seen.append(_left_out(left_out))
        before, self._written = self._written, {}
        for family in seen:
            written = before.get(family.name)
            if written is None or written[0] != family:
                written = family, self._encode(_Page((_metric(family),))).removesuffix(self._end)
            self._written[family.name] = written
        return b"".join((*(text for _, text in self._written.values()), self._end))


def _left_out(number: int) -> Family:
    text = "Samples that are not on this page, because a metric had too many."
    return Family("gpu_doctor_series_left_out", text, (), {(): number})


class _Page(Collector):
    """Some metrics, as the client library asks for them."""

    def __init__(self, metrics: tuple[Metric, ...]) -> None:
        self._metrics = metrics

    def collect(self) -> Iterable[Metric]:
        return self._metrics


def _metric(family: Family) -> Metric:
    metric = Metric(family.name.removesuffix("_total"), family.help, family.kind)
    for values, value in islice(family.samples.items(), SERIES_MAX):
        metric.add_sample(family.name, dict(zip(family.labels, values, strict=True)), value)
    return metric


class Cost(msgspec.Struct, frozen=True):
    """What a process, or several together, has used and holds."""

    cpu_seconds: float
    resident_bytes: int
    proportional_bytes: int | None = None
    """In which pages that several processes share count in part for each."""


class Own(msgspec.Struct, frozen=True, kw_only=True):
    """What the daemon tells about itself."""

    version: str
    optional: frozenset[Source] = frozenset()
    """Sources that the site does without."""
    started_at: float | None = None
    """Unix time, seconds."""
    costs: Mapping[str, Cost] = {}
    """Of `daemon`, and of its `children` together."""
    threads: int | None = None
    open_fds: int | None = None
    loop_lag_seconds: float | None = None
    http_loop_lag_seconds: float | None = None
    responses: Mapping[str, int] = {}
    """Answers to HTTP requests, by status code."""
    dropped: Mapping[str, int] = {}
    """Connections that were not heard out, by reason."""
    logins_failed: int | None = None
    web_config_loaded: bool | None = None
    """Whether the last reading of the web configuration succeeded; None: there is none."""
    web_config_loaded_at: float | None = None
    """When it last succeeded, Unix time."""


class _Stretch(msgspec.Struct, frozen=True):
    """Since when an engine's counters have stood still."""

    work: tuple[Maybe[float], ...]
    since: float
    until: float


class Tally(msgspec.Struct):
    """What the daemon counted, this one and those before whose recording it goes on with: events, told only once."""

    visits: int = 0
    nccl_timeouts: int | None = None
    """None until an engine's log was seen."""
    xids: Counter[Labels] = msgspec.field(default_factory=Counter[Labels])
    sxids: Counter[Labels] = msgspec.field(default_factory=Counter[Labels])
    oom_kills: int = 0
    log_lines: int = 0
    log_lines_dropped: int = 0
    stretches: dict[str, _Stretch] = {}
    """By engine: how long its counters have stood still while requests ran."""

    def add(self, report: Report) -> None:
        """Count what this visit brought."""
        snapshot = report.snapshot
        self.visits += 1
        if snapshot.logs or snapshot.engine_events:
            lines = sum(event.count for event in snapshot.engine_events if event.signal == "watchdog-timeout")
            self.nccl_timeouts = (self.nccl_timeouts or 0) + lines
        self.log_lines += sum(log.lines for log in snapshot.logs)
        self.log_lines_dropped += sum(log.dropped for log in snapshot.logs)
        for event in snapshot.kernel:
            if event.before_boot:
                continue
            if isinstance(event, Xid):
                _count(self.xids, (str(event.code), _label(event.pci_address)), event.count)
            elif isinstance(event, Sxid):
                _count(self.sxids, (str(event.code), _label(event.switch)), event.count)
            elif isinstance(event, OomKill):
                self.oom_kills += 1
        self.stretches = {page.engine: self._stretch(page, snapshot.clock_stepped_seconds) for page in snapshot.metrics}

    def _stretch(self, page: EngineMetrics, clock_stepped_seconds: float) -> _Stretch:
        work = (page.steps_total, page.generation_tokens_total, page.prompt_tokens_total)
        before = self.stretches.get(page.engine)
        busy = known(page.running) and page.running > 0
        still = before is not None and busy and work == before.work
        since = before.since + clock_stepped_seconds if before is not None and still else page.at
        return _Stretch(work, since, page.at)

    def stall_seconds(self, engine: str) -> float | None:
        """Return how long an engine has run requests without a step; None where its counters are not seen."""
        stretch = self.stretches.get(engine)
        if stretch is None or not any(map(known, stretch.work)):
            return None
        return max(0.0, stretch.until - stretch.since)


def _count(counter: Counter[Labels], key: Labels, number: int) -> None:
    if key in counter or len(counter) < COUNTED_MAX:
        counter[key] += number


def families(report: Report | None, tally: Tally | None, own: Own) -> Iterator[Family]:
    """Yield every metric that there is, without samples where there is nothing to tell."""
    yield from _of_the_daemon(own)
    for family in _of_the_tally(tally or Tally()):
        yield family if tally else msgspec.structs.replace(family, samples={})
    yield from _of_the_judgement(report)
    snapshot = report.snapshot if report else Snapshot(at=0.0)
    yield from _of_the_collectors(snapshot)
    yield from _of_the_recorder(snapshot.recorder)
    yield from _of_the_node(snapshot)
    yield from _of_the_gpus(snapshot)
    yield from _of_the_mig_devices(snapshot)
    yield from _of_the_links(snapshot)
    yield from _of_the_engines(snapshot, tally or Tally())


def _of_the_daemon(own: Own) -> Iterator[Family]:
    yield Family("gpu_doctor_build_info", "The version of gpu-doctor.", ("version",), {(own.version,): 1.0})
    yield Family(
        "gpu_doctor_optional",
        "1 for each source that the site says it does without.",
        ("source",),
        {(name,): 1.0 for name in sorted(source.value for source in own.optional)},
    )
    yield _single("process_start_time_seconds", "When the daemon started, Unix time.", own.started_at)
    yield Family(
        "gpu_doctor_process_cpu_seconds_total",
        "CPU time of the daemon, and of its children together (NVML lives in one).",
        ("process",),
        {(name,): cost.cpu_seconds for name, cost in own.costs.items()},
    )
    yield Family(
        "gpu_doctor_process_resident_memory_bytes",
        "Memory of the daemon, and of its children together; pages that they share count in both.",
        ("process",),
        {(name,): cost.resident_bytes for name, cost in own.costs.items()},
    )
    yield Family(
        "gpu_doctor_process_proportional_memory_bytes",
        "Memory of the daemon, and of its children together; of a page that processes share each has its part (PSS).",
        ("process",),
        {(name,): float(pss) for name, cost in own.costs.items() if (pss := cost.proportional_bytes) is not None},
    )
    yield _single("process_threads", "Threads of the daemon.", own.threads)
    yield _single("process_open_fds", "File descriptors that the daemon holds.", own.open_fds)
    yield _single(
        "loop_lag_seconds", "How much later than due the last report came: visit and judgement.", own.loop_lag_seconds
    )
    yield _single(
        "http_loop_lag_seconds",
        "How much later than due the event loop that answers HTTP requests last woke.",
        own.http_loop_lag_seconds,
    )
    yield Family(
        "gpu_doctor_http_responses_total",
        "Answers to HTTP requests since the daemon started.",
        ("code",),
        _counts(own.responses),
    )
    yield Family(
        "gpu_doctor_http_connections_dropped_total",
        "Connections that were not heard out: too slow, crowded out by newer ones, or no TLS handshake.",
        ("reason",),
        _counts(own.dropped),
    )
    yield _single("http_logins_failed_total", "Requests with a wrong user or password.", own.logins_failed)
    yield _single(
        "web_config_reload_successful",
        "1 where the web configuration that lies on disk is in force, 0 where it is bad and the one before is.",
        own.web_config_loaded,
    )
    yield _single(
        "web_config_reload_success_timestamp_seconds",
        "When the web configuration in force was read, Unix time.",
        own.web_config_loaded_at,
    )


def _of_the_tally(tally: Tally) -> Iterator[Family]:
    yield _single("visits_total", "Visits; the flight recorder keeps the count over restarts.", tally.visits)
    yield _single(
        "nccl_timeouts_total",
        "Lines of the NCCL watchdog about a collective that timed out; the flight recorder keeps the count over restarts.",
        tally.nccl_timeouts,
    )
    yield Family(
        "gpu_doctor_xids_total",
        "Xid lines of the kernel log, those of an earlier boot left out; the flight recorder keeps the count over restarts.",
        ("xid", "pci_address"),
        _counted(tally.xids),
    )
    yield Family(
        "gpu_doctor_sxids_total",
        "SXid lines (NVSwitch) of the kernel log, those of an earlier boot left out; the flight recorder keeps the count over restarts.",
        ("sxid", "switch"),
        _counted(tally.sxids),
    )
    yield _single(
        "oom_kills_total",
        "Processes that the kernel's out-of-memory killer took, as its log tells; the flight recorder keeps the count over restarts.",
        tally.oom_kills,
    )
    yield _single(
        "engine_log_lines_total",
        "Lines of engines' logs that were read; the flight recorder keeps the count over restarts.",
        tally.log_lines,
    )
    yield _single(
        "engine_log_lines_dropped_total",
        "Lines of engines' logs that matter and were counted only, because a visit brought too many.",
        tally.log_lines_dropped,
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
        leads = report.leads
        for reported in report.findings:
            finding = reported.finding
            words = (finding.failure_mode, severity_of(finding).word, finding.confidence.word)
            cause = "true" if reported.depth == 0 or reported in leads else "false"
            silenced = "false" if reported.silence is None else "true"
            for uuid in finding.subject.gpus or ("",):
                found[(*words, cause, silenced, *_gpu(uuid, report.snapshot))] = 1.0
    yield Family(
        "gpu_doctor_finding",
        "1 for each failure mode that is present, by GPU where it is about GPUs; root_cause: no other finding that "
        "is not silenced explains it; silenced: the site wants no alarm for it.",
        ("failure_mode", "severity", "confidence", "root_cause", "silenced", "gpu", "uuid"),
        found,
    )
    yield Family(
        "gpu_doctor_unjudged",
        "1 for each failure mode that could not be judged, with the reason.",
        ("failure_mode", "reason"),
        {(u.failure_mode, u.why.why.value): 1.0 for u in report.unjudged} if report else {},
    )
    ended = len(report.ended_silences) if report else 0
    yield Family(
        "gpu_doctor_silences",
        "How many silences the site declares: in force, or ended and to be renewed or removed.",
        ("state",),
        {("in-force",): float(len(report.silences) - ended), ("ended",): float(ended)} if report else {},
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
        "How long the collector took when it last read its source.",
        ("collector",),
        {labels: run.duration_seconds for labels, run in runs.items()},
    )
    yield Family(
        "gpu_doctor_collector_age_seconds",
        "How long before the last visit the collector read what was told there; 0: for that visit. Absent where it saw "
        "nothing.",
        ("collector",),
        {labels: run.age_seconds for labels, run in runs.items() if run.succeeded},
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
        {(): blocked} if (blocked := snapshot.nvml_blocked_seconds) or Source.NVML in snapshot.seen else {},
    )


def _of_the_recorder(recorder: Recorder) -> Iterator[Family]:
    there = bool(recorder.directory)
    yield _single(
        "recorder_failing",
        "1 where the flight recorder's disk takes no visits, and they wait in memory.",
        recorder.failing_since is not None if there else None,
    )
    yield _single(
        "recorder_waiting_visits", "Visits that wait until they can be written.", recorder.waiting if there else None
    )
    yield _single(
        "recorder_lost_visits_total",
        "Visits that were never written, because too many waited, since the daemon started.",
        recorder.lost if there else None,
    )


def _of_the_node(snapshot: Snapshot) -> Iterator[Family]:
    gpus = [gpu for gpu in snapshot.gpus if gpu.lost is not True]
    draw = node_draw(History((snapshot,), 0.0))
    yield _single(
        "node_power_watts",
        "Power of all GPUs at the moment of the visit; absent where one of them does not tell.",
        _sum(gpu.power.instant_watts for gpu in gpus),
    )
    yield _single(
        "node_power_peak_watts",
        "Highest common power of all GPUs since the visit before, their fast samples laid over each other.",
        draw.peak.watts if draw else None,
    )
    yield _single(
        "node_power_step_watts",
        "Largest rise or fall of the common power within half a second since the visit before.",
        max(draw.steps, default=0.0) if draw else None,
    )
    yield _single(
        "node_power_limit_watts", "Power limits of all GPUs together.", _sum(_or_absent(limit_of(gpu)) for gpu in gpus)
    )
    host, manager = snapshot.host, snapshot.fabric_manager
    yield _single("node_memory_bytes", "Main memory.", host.memory_total_bytes)
    yield _single(
        "node_memory_available_bytes", "Main memory that can be had without swapping.", host.memory_available_bytes
    )
    yield _single(
        "node_memory_pressure_ratio",
        "Share of the last minute in which all tasks waited for memory (PSI full).",
        host.memory_pressure_ratio,
    )
    yield _single(
        "node_blocked_tasks",
        "Tasks of the driver and of engines in uninterruptible sleep.",
        len(host.blocked_tasks) if known(host.blocked_tasks) else None,
    )
    yield _single("fabric_manager_running", "1 where the fabric manager's process exists.", manager.running)
    yield _single(
        "nvswitches", "NVSwitches that the driver shows.", len(manager.switches) if known(manager.switches) else None
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
    (
        "gpu_slowdown_margin_celsius",
        "The margin at which the hardware slows the GPU down.",
        lambda g: g.thermal.slowdown_margin_celsius,
    ),
    (
        "gpu_shutdown_margin_celsius",
        "The margin at which the hardware turns the GPU off.",
        lambda g: g.thermal.shutdown_margin_celsius,
    ),
    (
        "gpu_slowdown_temperature_celsius",
        "Older boards: the temperature at which the hardware slows the GPU down.",
        lambda g: g.thermal.slowdown_celsius,
    ),
    (
        "gpu_memory_temperature_max_celsius",
        "Highest temperature at which the memory may work.",
        lambda g: g.thermal.memory_max_celsius,
    ),
    ("gpu_fan_speed_ratio", "Speed of the fan as a share of its highest.", lambda g: _share(g.thermal.fan_percent)),
    ("gpu_power_watts", "Power, as the sensor averages it.", lambda g: g.power.average_watts),
    ("gpu_power_instant_watts", "Power at the moment of the visit.", lambda g: g.power.instant_watts),
    ("gpu_power_peak_watts", "Highest sample of power since the visit before.", _power_peak),
    ("gpu_power_limit_watts", "Power limit that is set.", lambda g: g.power.limit_watts),
    (
        "gpu_power_limit_enforced_watts",
        "Power limit that binds: the lowest of those of driver, operator and board.",
        lambda g: g.power.limit_enforced_watts,
    ),
    (
        "gpu_power_limit_default_watts",
        "Power limit that the product comes with.",
        lambda g: g.power.limit_default_watts,
    ),
    ("gpu_energy_joules_total", "Energy since the driver was loaded.", lambda g: g.power.energy_joules),
    ("gpu_busy_ratio", "Share of the time in which any kernel ran.", lambda g: g.activity.gpu_ratio),
    (
        "gpu_memory_busy_ratio",
        "Share of the time in which memory was read or written.",
        lambda g: g.activity.memory_ratio,
    ),
    ("gpu_memory_bandwidth_ratio", "Share of the memory's bandwidth in use (GPM).", lambda g: g.activity.dram_ratio),
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
    ("gpu_sm_clock_hertz", "Clock of the multiprocessors.", lambda g: _hertz(g.clocks.sm_mhz)),
    ("gpu_sm_clock_max_hertz", "Highest clock of the multiprocessors.", lambda g: _hertz(g.clocks.sm_max_mhz)),
    ("gpu_memory_clock_hertz", "Clock of the memory.", lambda g: _hertz(g.clocks.memory_mhz)),
    (
        "gpu_performance_state",
        "Performance state: 0 is the fastest, 15 the slowest.",
        lambda g: g.clocks.performance_state,
    ),
    ("gpu_pcie_generation", "PCI Express generation now; idle links go down on purpose.", lambda g: g.pcie.generation),
    ("gpu_pcie_generation_max", "PCI Express generation that GPU and slot can do.", lambda g: g.pcie.generation_max),
    ("gpu_pcie_lanes", "PCI Express lanes now.", lambda g: g.pcie.width),
    ("gpu_pcie_lanes_max", "PCI Express lanes that GPU and slot can do.", lambda g: g.pcie.width_max),
    ("gpu_pcie_replays_total", "PCI Express replays.", lambda g: g.pcie.replays_total),
    ("gpu_ecc_enabled", "1 where the memory is checked and corrected.", lambda g: g.ecc.enabled),
    (
        "gpu_ecc_sram_threshold_exceeded",
        "1 where the driver says that SRAM failed too often.",
        lambda g: g.ecc.sram_threshold_exceeded,
    ),
    ("gpu_row_remap_pending", "1 where a memory row waits for a reset to be remapped.", lambda g: g.ecc.remap_pending),
    ("gpu_row_remap_failed", "1 where the remapping of a memory row failed.", lambda g: g.ecc.remap_failed),
    ("gpu_persistence_mode", "1 where persistence mode is on.", lambda g: g.persistence_mode),
    ("gpu_lost", "1 where NVML answers that the GPU is lost.", lambda g: g.lost),
    ("gpu_numa_node", "The NUMA node beside the GPU.", lambda g: g.numa_node),
    ("gpu_processes", "Processes that hold memory of the GPU.", lambda g: _length(g.processes)),
    ("gpu_mig_enabled", "1 where Multi-Instance GPU mode is on.", lambda g: g.mig.enabled),
    ("gpu_mig_enabled_after_reset", "1 where the mode will be on after a reset.", lambda g: g.mig.enabled_after_reset),
    ("gpu_mig_devices", "MIG devices.", lambda g: _length(g.mig.devices)),
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
                ("sync-boost", gpu.clocks.sync_boost_seconds),
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
        "gpu_doctor_gpu_ecc_errors_lifetime_total",
        "Memory errors over the board's life.",
        (*GPU, "kind"),
        _seen(
            ((*labels, kind), value)
            for labels, gpu in gpus.items()
            for kind, value in (
                ("corrected", gpu.ecc.corrected_aggregate),
                ("uncorrected", gpu.ecc.uncorrected_aggregate),
            )
        ),
    )
    yield Family(
        "gpu_doctor_gpu_rows_remapped_total",
        "Memory rows that were replaced by spare ones, by what they had failed of, over the board's life.",
        (*GPU, "kind"),
        _seen(
            ((*labels, kind), value)
            for labels, gpu in gpus.items()
            for kind, value in (
                ("corrected", gpu.ecc.rows_remapped_corrected),
                ("uncorrected", gpu.ecc.rows_remapped_uncorrected),
            )
        ),
    )
    yield Family(
        "gpu_doctor_gpu_recovery_action_info",
        "What the driver asks for: `none`, `reset`, `reboot`, `drain-p2p` or `drain-and-reset`.",
        (*GPU, "action"),
        {(*labels, _label(g.recovery_action)): 1.0 for labels, g in gpus.items() if known(g.recovery_action)},
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


OF_A_MIG_DEVICE: tuple[tuple[str, str, Callable[[MigDevice], Maybe[Number]]], ...] = (
    ("mig_device_memory_bytes", "Memory of a MIG device.", lambda d: d.memory_total_bytes),
    ("mig_device_memory_used_bytes", "Memory of a MIG device in use.", lambda d: d.memory_used_bytes),
    ("mig_device_multiprocessors", "Multiprocessors of a MIG device.", lambda d: d.multiprocessors),
    ("mig_device_processes", "Processes that hold memory of a MIG device.", lambda d: _length(d.processes)),
)
"""Metrics with one value a MIG device: name without its prefix, help, value."""


def _of_the_mig_devices(snapshot: Snapshot) -> Iterator[Family]:
    devices = {
        (*_gpu(gpu.uuid, snapshot), _label(device.uuid), _label(or_none(device.profile) or "")): device
        for gpu in snapshot.gpus
        for device in or_none(gpu.mig.devices) or ()
    }
    for name, text, value_of in OF_A_MIG_DEVICE:
        values = _seen((labels, value_of(device)) for labels, device in devices.items())
        yield Family(f"gpu_doctor_{name}", text, (*GPU, "device", "profile"), values)


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
        "gpu_doctor_nvlink_speed_bytes_per_second",
        "What the NVLink can carry in one direction.",
        (*GPU, "link"),
        _seen((labels, link.speed_bytes_per_second) for labels, link in links),
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
            for access, status in (
                ("read", p.p2p_read),
                ("write", p.p2p_write),
                ("nvlink", p.p2p_nvlink),
                ("atomics", p.p2p_atomics),
            )
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
    ("engine_kv_cache_tokens", "Tokens that the KV cache can hold.", lambda m: m.kv_cache_tokens),
    ("engine_generation_tokens_total", "Tokens generated.", lambda m: m.generation_tokens_total),
    ("engine_prompt_tokens_total", "Tokens read from prompts.", lambda m: m.prompt_tokens_total),
    ("engine_preemptions_total", "Requests put back because the KV cache was full.", lambda m: m.preemptions_total),
    ("engine_requests_succeeded_total", "Requests that ended well.", lambda m: m.requests_succeeded_total),
)
"""Metrics with one value an engine, from its own page: name without its prefix, help, value."""


OF_AN_ENGINES_PROCESS: tuple[tuple[str, str, Callable[[Engine], Maybe[Number]]], ...] = (
    ("engine_start_time_seconds", "When the engine's first process started, Unix time.", lambda e: e.started_at),
    ("engine_cpu_seconds_total", "CPU time of the engine's first process.", lambda e: e.cpu_seconds),
    ("engine_oom_kills_total", "OOM kills in the engine's control group.", lambda e: e.oom_kills_total),
    ("engine_shared_memory_bytes", "Size of /dev/shm as the engine sees it.", lambda e: e.shared_memory.total_bytes),
    ("engine_shared_memory_used_bytes", "Use of /dev/shm as the engine sees it.", lambda e: e.shared_memory.used_bytes),
)
"""Metrics with one value an engine, from its processes: name without its prefix, help, value."""

HELD = frozenset(("stopped", "tracing-stop", "disk-sleep", "zombie", "dead"))
"""States in which a worker takes part in no collective."""


def _of_the_engines(snapshot: Snapshot, tally: Tally) -> Iterator[Family]:
    stack = snapshot.stack
    versions = (stack.driver, stack.nvml, stack.cuda_driver, stack.kernel)
    yield Family(
        "gpu_doctor_stack_info",
        "The node's versions.",
        ("driver", "nvml", "cuda_driver", "kernel"),
        {tuple(_label(or_none(v) or "") for v in versions): 1.0} if any(map(known, versions)) else {},
    )
    engines = sorted(snapshot.engines, key=lambda e: (e.started_at, e.pid))[:ENGINES_MAX]
    names = _engine_names(engines)
    yield Family(
        "gpu_doctor_engine_info",
        "What a serving engine is, with the versions in its own environment.",
        ("engine", "kind", "version", "torch", "nccl", "model", "tensor_parallel_size"),
        {(names[e.id], _label(e.kind), *(_label(str(or_none(v) or "")) for v in _facts_of(e))): 1.0 for e in engines},
    )
    for name, text, value_of in OF_AN_ENGINES_PROCESS:
        values = _seen(((names[engine.id],), value_of(engine)) for engine in engines)
        yield Family(f"gpu_doctor_{name}", text, ("engine",), values)
    ranks = [
        ((names[engine.id], str(rank.rank) if known(rank.rank) else _label(rank.title or f"pid {rank.pid}")), rank)
        for engine in engines
        for rank in engine.ranks
    ]
    yield Family(
        "gpu_doctor_engine_rank_info",
        "Which GPU a worker of an engine runs on.",
        ("engine", "rank", *GPU),
        {(*labels, *_gpu(rank.gpu, snapshot)): 1.0 for labels, rank in ranks if known(rank.gpu)},
    )
    yield Family(
        "gpu_doctor_engine_rank_cpu_seconds_total",
        "CPU time of a worker.",
        ("engine", "rank"),
        _seen((labels, rank.cpu_seconds) for labels, rank in ranks),
    )
    yield Family(
        "gpu_doctor_engine_rank_held",
        "1 where a worker is stopped, ended, or hangs in the kernel (state D), 0 where it can run.",
        ("engine", "rank"),
        {labels: float(rank.state in HELD) for labels, rank in ranks if known(rank.state)},
    )
    pages = [((names[m.engine],), m) for m in snapshot.metrics if m.engine in names]
    yield Family(
        "gpu_doctor_engine_stall_seconds",
        "How long requests have run without a step of the engine; 0: it moves, or has nothing to do.",
        ("engine",),
        {labels: s for labels, page in pages if (s := tally.stall_seconds(page.engine)) is not None},
    )
    for name, text, value_of_page in OF_AN_ENGINE:
        values = _seen((labels, value_of_page(page)) for labels, page in pages)
        yield Family(f"gpu_doctor_{name}", text, ("engine",), values)


def _facts_of(engine: Engine) -> tuple[Maybe[str | int], ...]:
    stack, flags = engine.stack, engine.flags
    return (stack.engine, stack.torch, stack.nccl, flags.model, flags.tensor_parallel_size)


def _engine_names(engines: Iterable[Engine]) -> dict[str, str]:
    """Name engines by unit, or kind and port: a pid would make new series at each restart."""
    names: dict[str, str] = {}
    for engine in engines:
        port = or_none(engine.flags.port)
        name = _label(or_none(engine.unit) or (f"{engine.kind}:{port}" if port else engine.kind))
        taken = set(names.values())
        number = 2
        unique = name
        while unique in taken:
            unique, number = f"{name}#{number}", number + 1
        names[engine.id] = unique
    return names


def _single(name: str, text: str, value: Maybe[Number] | None) -> Family:
    """Return a metric without labels; it has no sample where there is no value."""
    return Family(f"gpu_doctor_{name}", text, (), {(): float(value)} if value is not None and known(value) else {})


def _counts(numbers: Mapping[str, int]) -> dict[Labels, float]:
    return {(word,): float(number) for word, number in sorted(dict(numbers).items())}


def _counted(counter: Counter[Labels]) -> dict[Labels, float]:
    return {labels: float(number) for labels, number in sorted(dict(counter).items())}


def _sum(values: Iterable[Maybe[float]]) -> float | None:
    """Return the sum, or None where there is nothing to add or a part is unknown."""
    added = list(values)
    seen = [value for value in added if known(value)]
    return sum(seen) if seen and len(seen) == len(added) else None


def _or_absent(value: float | None) -> Maybe[float]:
    return NOT_ASKED if value is None else value


def _hertz(mhz: Maybe[int]) -> Maybe[Number]:
    return mhz * 1_000_000 if known(mhz) else mhz


def _share(percent: Maybe[float]) -> Maybe[Number]:
    return percent / 100 if known(percent) else percent


def _length(things: Maybe[tuple[object, ...]]) -> Maybe[Number]:
    return len(things) if known(things) else things


def _seen(values: Iterable[tuple[Labels, Maybe[Number]]]) -> dict[Labels, float]:
    return {labels: float(value) for labels, value in values if known(value)}


def _gpu(uuid: str, snapshot: Snapshot) -> Labels:
    number = gpu_number(uuid, snapshot)
    return ("" if number is None else str(number), _label(uuid))


def _label(text: str) -> str:
    return cut(plain(text), LABEL_WIDTH)
