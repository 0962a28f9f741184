"""Alert and recording rules for Prometheus, from the rules' declarations: `page()` is the file in packaging/prometheus/."""

from __future__ import annotations

import json
from collections.abc import Iterator

from doctor.report import Verdict, essential_sources
from doctor.rule import Severity
from doctor.snapshot import Engine, Snapshot
from rules import RULES

FAMILIES: dict[str, tuple[str, ...]] = {
    "GpuInterconnect": (
        "pcie-fallback", "nvlink-degraded", "nvlink-errors", "nvswitch-fabric-fault", "p2p-blocked", "pcie-link-degraded",
    ),
    "GpuCollectives": ("nccl-timeout", "engine-stalled", "allreduce-dominant", "shared-memory-too-small"),
    "GpuParallelism": (
        "tp-single-stream-stall", "tp-heads-indivisible", "tp-exceeds-visible-gpus", "idle-gpus", "mixed-gpus",
        "tp-too-wide", "pipeline-on-one-node",
    ),
    "GpuPrecision": ("fp8-not-engaged", "fp8-block-misaligned", "quantization-mismatch", "dtype-unsuited"),
    "GpuMemory": (
        "model-does-not-fit", "out-of-memory-at-startup", "context-does-not-fit", "gpu-memory-held",
        "memory-utilization-risky", "kv-cache-saturated", "queue-capped", "context-overprovisioned",
    ),
    "GpuServing": (
        "throughput-below-reference", "ttft-slow", "cold-first-request", "concurrency-ceiling",
        "speculation-ineffective", "prefix-cache-cold", "single-point-of-failure",
    ),
    "GpuHeatAndPower": ("cooling-insufficient", "power-transient", "power-brake", "power-capped"),
    "GpuStack": ("stack-mismatch", "runtime-outdated", "stack-unpinned", "persistence-mode-off", "engine-unsupported"),
    "GpuMig": ("mig-misconfigured",),
    "GpuHardware": (
        "gpu-lost", "gpu-hung", "driver-unresponsive", "gpu-memory-faulty", "application-fault", "recovery-pending",
        "xid-unclassified",
    ),
    "GpuHost": ("worker-killed", "engine-cpu-starved", "engine-crashed", "launch-refused"),
    "GpuDoctorRecorder": ("recorder-failing",),
}  # fmt: skip
"""Alert → the failure modes that it is for. One that is missing here has no alert: a test says so."""

HOLD = {Severity.CRITICAL: "0s", Severity.WARNING: "5m"}
"""How long a finding must stand. guess: the rules judge windows already; a warning may wait out a restart."""

KEEP = "5m"
"""How long an alert outlives its finding. guess: a missed scrape or one blind visit is no recovery."""

VERDICTS = (Verdict.CLEAR, Verdict.NOTICE, Verdict.INCOMPLETE, Verdict.WARNING, Verdict.CRITICAL)
"""From best to worst; the place is the value of `instance:gpu_doctor_verdict:rank`."""

RUNBOOK = (
    '{{ with $externalLabels.gpu_doctor_runbooks }}{{ . }}/{{ reReplaceAll "-" "_" $labels.failure_mode }}.md'
    "{{ else }}http://{{ $labels.instance }}/{{ end }}"
)
"""Where the site keeps the runbooks; else the daemon's own page."""

OWN_RUNBOOK = (
    "{{ with $externalLabels.gpu_doctor_runbooks }}{{ . }}/../docs/alerts.md{{ else }}"
    "http://{{ $labels.instance }}/{{ end }}"
)


def essential() -> tuple[str, ...]:
    """Return the sources without which a node with an engine can't be judged."""
    return tuple(
        sorted(
            source.value
            for source in essential_sources(Snapshot(at=0.0, engines=(Engine(pid=0, started_at=0.0, kind="vllm"),)))
        )
    )


RECORDINGS: dict[str, str] = {
    "instance:gpu_doctor_verdict:rank": "max without (verdict) ("
    + " or ".join(f'gpu_doctor_verdict{{verdict="{verdict.value}"}} * {rank}' for rank, verdict in enumerate(VERDICTS))
    + ")",
    "verdict:gpu_doctor_verdict:sum": "sum by (job, verdict) (gpu_doctor_verdict)",
    "failure_mode:gpu_doctor_finding:count": "count by (job, failure_mode, severity) "
    '(max without (gpu, uuid, confidence, root_cause) (gpu_doctor_finding{silenced="false"}))',
    "instance:gpu_doctor_essential_unseen:sum": "sum without (source, reason) "
    f'(gpu_doctor_unseen{{source=~"{"|".join(essential())}",reason!="not-given"}})',
}

OWN = (
    (
        "GpuDoctorDown", 'up{job=~".*gpu-doctor.*"} == 0', "5m", "critical",
        "gpu-doctor on {{ $labels.instance }} does not answer: the node is not watched.",
    ),
    (
        "GpuDoctorBlind", "gpu_doctor_build_info unless on (job, instance) gpu_doctor_verdict", "5m", "critical",
        "gpu-doctor on {{ $labels.instance }} answers, but has no report newer than three intervals.",
    ),
    (
        "GpuDoctorIncomplete", 'gpu_doctor_verdict{verdict="incomplete"} == 1', "15m", "warning",
        "gpu-doctor on {{ $labels.instance }} can't see something essential, or a rule is broken.",
    ),
    (
        "GpuDoctorCollectorFailing",
        'gpu_doctor_collector_success == 0 and on (job, instance, collector) label_replace(gpu_doctor_unseen{reason!~"not-given|not-present|not-supported"}, "collector", "$1", "source", "(.*)")',
        "15m", "warning",
        "gpu-doctor on {{ $labels.instance }}: the collector {{ $labels.collector }} has failed for 15 minutes.",
    ),
    (
        "GpuDoctorWebConfigRefused", "gpu_doctor_web_config_reload_successful == 0", "5m", "warning",
        "gpu-doctor on {{ $labels.instance }} refuses its web configuration; the one before is in force.",
    ),
)  # fmt: skip


def finding_expression(family: str, severity: Severity) -> str:
    """Return the query of a family's alert: one series for each failure mode of a node."""
    return (
        "max without (gpu, uuid, confidence, silenced) (gpu_doctor_finding{"
        f'failure_mode=~"{"|".join(FAMILIES[family])}",severity="{severity.word}",silenced="false"}})'
    )


def page() -> str:
    """Return the file of rules."""
    return "\n".join(_lines()) + "\n"


def _lines() -> Iterator[str]:
    yield "# Generated by `make docs` from docs/alerts.py. What silences say is left out; notices are no alarm."
    yield "# keep_firing_for needs Prometheus 2.42."
    yield "groups:"
    yield "  - name: gpu-doctor-fleet"
    yield "    rules:"
    for name, expression in RECORDINGS.items():
        yield f"      - record: {name}"
        yield f"        expr: {json.dumps(expression)}"
    yield "  - name: gpu-doctor-failure-modes"
    yield "    rules:"
    for family in FAMILIES:
        for severity, hold in HOLD.items():
            yield from _alert(
                family, finding_expression(family, severity), hold, severity.word,
                summary="{{ $labels.instance }}: {{ $labels.failure_mode }}", runbook=RUNBOOK, titles=_titles(family),
            )  # fmt: skip
    yield "  - name: gpu-doctor-itself"
    yield "    rules:"
    for alert, expression, hold, severity, summary in OWN:
        yield from _alert(alert, expression, hold, severity, summary=summary, runbook=OWN_RUNBOOK)


def _alert(
    alert: str, expression: str, hold: str, severity: str, *, summary: str, runbook: str, titles: str = ""
) -> Iterator[str]:
    yield f"      - alert: {alert}"
    yield f"        expr: {json.dumps(expression)}"
    yield f"        for: {hold}"
    if titles:
        yield f"        keep_firing_for: {KEEP}"
    yield f"        labels: {{severity: {severity}}}"
    yield "        annotations:"
    yield f"          summary: {json.dumps(summary)}"
    if titles:
        yield f"          description: {json.dumps(titles, ensure_ascii=False)}"
    yield f"          runbook_url: {json.dumps(runbook)}"


def _titles(family: str) -> str:
    """Return a template that says what the failure mode is."""
    return "".join(
        f'{{{{ if eq $labels.failure_mode "{rule.id}" }}}}{rule.title}{{{{ end }}}}'
        for rule in RULES
        if rule.id in FAMILIES[family]
    )
