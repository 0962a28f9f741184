"""Alert and recording rules for Prometheus and an example for Alertmanager, from the rules' declarations.

`page()` and `alertmanager_page()` are the files in packaging/prometheus/.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from typing import NamedTuple

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
"""Alert → the failure modes that it is for. One that is missing here has no alert of its own: a test says so."""

SITE = "GpuSiteRules"
"""The alert for what a site's own rules and log patterns find."""

HOLD = {Severity.CRITICAL: "0s", Severity.WARNING: "5m"}
"""How long a finding must stand. The rules judge windows already, so what is critical is told at once.

guess: five minutes, in which an engine restarts and a burst of requests passes, so that nobody gets a ticket for it."""

BRIDGE = "3m"
"""A warning that comes and goes is seen as standing where it was there within this time; one that was there once is too short.

guess: three scrapes of a site that scrapes each minute."""

KEEP = "5m"
"""How long an alert outlives its cause, so that one that comes and goes is one call.

guess: longer than `BRIDGE` and than a daemon takes to be restarted; the price is that the recovery is told as much later."""

ALARMED = tuple(HOLD)

VERDICTS = (Verdict.CLEAR, Verdict.NOTICE, Verdict.INCOMPLETE, Verdict.WARNING, Verdict.CRITICAL)
"""From best to worst; the place is the value of `instance:gpu_doctor_verdict:rank`."""

HERE = 'job=~".*gpu-doctor.*"'
"""The daemons' targets: `up` is all that Prometheus has of one that does not answer."""

RUNBOOK = (
    '{{ with $externalLabels.gpu_doctor_runbooks }}{{ . }}/{{ reReplaceAll "-" "_" $labels.failure_mode }}.md'
    "{{ else }}http://{{ $labels.instance }}/{{ end }}"
)
"""Where the site keeps the runbooks; else the daemon's own page."""

OWN_RUNBOOK = "{{ with $externalLabels.gpu_doctor_runbooks }}{{ . }}/../docs/alerts.md{{ else }}%s{{ end }}"
OWN_PAGE = "http://{{ $labels.instance }}/"
SITE_RUNBOOK = OWN_PAGE
"""The runbook of a site's own rule is on the daemon's page, wherever its file lies."""


def _found(severity: Severity) -> str:
    """Return a template's pipeline: the samples of the finding that is alarmed, one a GPU."""
    # PromQL and templates quote alike, so that what stands within a template's text is written once more.
    labels = ("job", "instance", "failure_mode", "root_cause")
    matchers = ",".join(f"{label}=%q" for label in labels)
    samples = f'gpu_doctor_finding{{{matchers},severity="{severity.word}",silenced="false",uuid!=""}}'
    values = " ".join(f"$labels.{label}" for label in labels)
    return f'printf {json.dumps(_standing(samples, severity))} {values} | query | sortByLabel "gpu"'


def _standing(finding: str, severity: Severity) -> str:
    """Return the query of what counts as there: of warnings also what was there a moment ago."""
    return finding if severity is Severity.CRITICAL else f"max_over_time({finding}[{BRIDGE}])"


def summary(severity: Severity) -> str:
    """Return the template of one line: the node, the failure mode, the GPUs."""
    found = _found(severity)
    return (
        "{{ $labels.instance }}: {{ $labels.failure_mode }}"
        f"{{{{ range $i, $found := {found} }}}}{{{{ if $i }}}}, {{{{ else }}}} (GPU {{{{ end }}}}"
        f'{{{{ or $found.Labels.gpu "?" }}}}{{{{ end }}}}{{{{ if {found} }}}}){{{{ end }}}}'
    )


def description(family: str, severity: Severity) -> str:
    """Return the template of what the failure mode is, of which GPUs, and where to read on."""
    return (
        _titles(family) + f"{{{{ range {_found(severity)} }}}} {{{{ .Labels.uuid }}}}{{{{ end }}}}"
        '{{ if eq $labels.root_cause "false" }} Another finding of this node explains it.{{ end }}'
        " `gpu-doctor explain {{ $labels.failure_mode }}` tells what to do; "
        "http://{{ $labels.instance }}/ shows the evidence."
    )


class Alert(NamedTuple):
    """One alert: when it is raised, for whom, and what it says."""

    name: str
    expression: str
    hold: str
    severity: str
    summary: str
    description: str
    runbook: str


def essential(*engines: Engine) -> frozenset[str]:
    """Return the collectors without which a node with these engines can't be judged."""
    return frozenset(source.value for source in essential_sources(Snapshot(at=0.0, engines=engines)))


OF_A_NODE = essential()
OF_AN_ENGINE = essential(Engine(pid=0, started_at=0.0, kind="vllm")) - OF_A_NODE


def _one_of(values: Iterable[str]) -> str:
    return "|".join(sorted(values))


RECORDINGS: dict[str, str] = {
    "instance:gpu_doctor_verdict:rank": "max without (verdict) ("
    + " or ".join(f'gpu_doctor_verdict{{verdict="{verdict.value}"}} * {rank}' for rank, verdict in enumerate(VERDICTS))
    + ")",
    "verdict:gpu_doctor_verdict:sum": "sum by (job, verdict) (gpu_doctor_verdict)",
    "failure_mode:gpu_doctor_finding:count": "count by (job, failure_mode, severity) "
    '(max without (gpu, uuid, confidence, root_cause) (gpu_doctor_finding{silenced="false"}))',
    "instance:gpu_doctor_essential_unseen:sum": "sum without (collector) ("
    f'(gpu_doctor_collector_success{{collector=~"{_one_of(OF_A_NODE)}"}} == bool 0) or '
    f'((gpu_doctor_collector_success{{collector=~"{_one_of(OF_AN_ENGINE)}"}} == bool 0) '
    'and on (job, instance) gpu_doctor_engine_info{kind="vllm"}))',
    "instance:gpu_doctor_gpus_answering:count": "count by (job, instance) (gpu_doctor_gpu_lost == 0)",
    "instance:gpu_doctor_gpus_answering:max1d": "max_over_time(instance:gpu_doctor_gpus_answering:count[1d])",
    "job:gpu_doctor_targets:count": f"count by (job) (up{{{HERE}}})",
}
"""For fleets: what is cheap to ask of many nodes. The order matters where one reads another."""

OWN = (
    Alert(
        "GpuDoctorDown", f"up{{{HERE}}} == 0",
        "5m",  # guess: a reboot of a node takes longer, and is to be told; a restart of the daemon takes seconds
        "critical",
        "gpu-doctor on {{ $labels.instance }} does not answer: the node is not watched.",
        "No scrape has succeeded for 5 minutes. Is the node up (`ping`), and the service (`systemctl status gpu-doctor`)?",
        OWN_RUNBOOK % OWN_PAGE,
    ),
    Alert(
        "GpuDoctorStale", "gpu_doctor_build_info unless on (job, instance) gpu_doctor_verdict",
        "5m",  # guess: the first visit of a node whose driver wakes up takes a minute
        "critical",
        "gpu-doctor on {{ $labels.instance }} answers, and has no fresh report: the node is not watched.",
        "No report is newer than three intervals. `journalctl -u gpu-doctor` says what holds its visits up.",
        OWN_RUNBOOK % OWN_PAGE,
    ),
    Alert(
        "GpuDoctorBlind",
        "max by (job, instance) (gpu_doctor_collector_success"
        f'{{collector=~"{_one_of(OF_A_NODE | OF_AN_ENGINE)}"}}) == 0',
        "5m",  # guess: as long as a reload of the driver takes, while the kernel log is read anyway
        "critical",
        "gpu-doctor on {{ $labels.instance }} sees nothing of what matters: the node is not watched.",
        "NVML, the kernel log and the engines are all unseen; http://{{ $labels.instance }}/healthz says why.",
        OWN_RUNBOOK % OWN_PAGE,
    ),
    Alert(
        "GpuDoctorVanished",
        "max_over_time(job:gpu_doctor_targets:count[1h]) - "
        "(job:gpu_doctor_targets:count or max_over_time(job:gpu_doctor_targets:count[1h]) * 0) > 0",
        "15m",  # guess: nodes that are replaced by others are fewer for minutes
        "warning",
        "{{ $labels.job }}: {{ $value }} fewer nodes are scraped than within the last hour.",
        "They are not down, they are no targets any more: taken out on purpose, or lost by the service discovery. "
        "The alert ends an hour after they went.",
        OWN_RUNBOOK % "",
    ),
    Alert(
        "GpuDoctorAbsent", f"absent(up{{{HERE}}})",
        "15m",  # guess: Prometheus itself was restarted
        "critical",
        "Prometheus scrapes no gpu-doctor at all: no node is watched.",
        "These rules are loaded, and no job whose name contains gpu-doctor has a target.",
        OWN_RUNBOOK % "",
    ),
    Alert(
        "GpuDoctorRestarting", "changes(gpu_doctor_process_start_time_seconds[30m]) > 3",
        "0s",  # four starts are no accident
        "warning",
        "gpu-doctor on {{ $labels.instance }} was started {{ $value }} times in 30 minutes.",
        "It dies, or systemd's watchdog ends it: `journalctl -u gpu-doctor`.",
        OWN_RUNBOOK % OWN_PAGE,
    ),
    Alert(
        "GpuDoctorIncomplete", 'gpu_doctor_verdict{verdict="incomplete"} == 1',
        "15m",  # guess: an engine that starts has no page and no log for up to ten minutes
        "warning",
        "gpu-doctor on {{ $labels.instance }} can't see something essential, or a rule is broken.",
        "Nothing that it sees is wrong, and that says little. "
        f'{{{{ range printf "gpu_doctor_collector_success{{job=%q,instance=%q,collector=~\\"'
        f'{_one_of(OF_A_NODE | OF_AN_ENGINE)}\\"}} == 0" $labels.job $labels.instance | query | sortByLabel "collector" }}}}'
        "Unseen: {{ .Labels.collector }}. {{ end }}http://{{ $labels.instance }}/ says why.",
        OWN_RUNBOOK % OWN_PAGE,
    ),
    Alert(
        "GpuDoctorCollectorFailing",
        "gpu_doctor_collector_success == 0 and on (job, instance, collector) label_replace("
        'gpu_doctor_unseen{reason!~"not-given|not-present|not-supported"} unless on (job, instance, source) gpu_doctor_optional, "collector", "$1", "source", "(.*)")',
        "15m",  # guess: as for GpuDoctorIncomplete
        "warning",
        "gpu-doctor on {{ $labels.instance }}: the collector {{ $labels.collector }} has failed for 15 minutes.",
        "What it reads is there and can't be read; http://{{ $labels.instance }}/ says why.",
        OWN_RUNBOOK % OWN_PAGE,
    ),
    Alert(
        "GpuDoctorRuleBroken", 'gpu_doctor_unjudged{reason="broken"} == 1',
        "15m",  # guess: a value that breaks a rule may be gone at the next visit
        "warning",
        "gpu-doctor on {{ $labels.instance }}: the rule {{ $labels.failure_mode }} is broken and judges nothing.",
        "A site's own rule that fails or was refused, or a defect of gpu-doctor; http://{{ $labels.instance }}/ says how it failed.",
        OWN_RUNBOOK % OWN_PAGE,
    ),
    Alert(
        "GpuDoctorWebConfigRefused", "gpu_doctor_web_config_reload_successful == 0",
        "5m",  # guess: somebody is editing the file, or its certificates are being renewed one by one
        "warning",
        "gpu-doctor on {{ $labels.instance }} refuses its web configuration; the one before is in force.",
        "Its log says in which line; a certificate that was to be renewed will expire.",
        OWN_RUNBOOK % OWN_PAGE,
    ),
)  # fmt: skip
"""The alerts about the daemon itself."""


def finding_expression(family: str, severity: Severity) -> str:
    """Return the query of a family's alert: one series for each failure mode of a node."""
    if family == SITE:
        which = f'failure_mode!~"{_one_of(rule.id for rule in RULES)}"'
    else:
        which = f'failure_mode=~"{"|".join(FAMILIES[family])}"'
    found = f'gpu_doctor_finding{{{which},severity="{severity.word}",silenced="false"}}'
    return f"max without (gpu, uuid, confidence, silenced) ({_standing(found, severity)})"


def of_failure_modes() -> Iterator[Alert]:
    """Yield two alerts a family: what is critical, and what is a warning."""
    for family in (*FAMILIES, SITE):
        for severity, hold in HOLD.items():
            yield Alert(
                family, finding_expression(family, severity), hold, severity.word,
                summary(severity), description(family, severity), SITE_RUNBOOK if family == SITE else RUNBOOK,
            )  # fmt: skip


def _titles(family: str) -> str:
    """Return a template that says what the failure mode is."""
    if family == SITE:
        return "A rule of this site fired."
    return "".join(
        f'{{{{ if eq $labels.failure_mode "{rule.id}" }}}}{rule.title}.{{{{ end }}}}'
        for rule in RULES
        if rule.id in FAMILIES[family]
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
    for group, alerts in (("failure-modes", of_failure_modes()), ("itself", OWN)):
        yield f"  - name: gpu-doctor-{group}"
        yield "    rules:"
        for alert in alerts:
            yield f"      - alert: {alert.name}"
            yield f"        expr: {json.dumps(alert.expression)}"
            yield f"        for: {alert.hold}"
            yield f"        keep_firing_for: {KEEP}"
            yield f"        labels: {{severity: {alert.severity}}}"
            yield "        annotations:"
            yield f"          summary: {json.dumps(alert.summary)}"
            yield f"          description: {json.dumps(alert.description, ensure_ascii=False)}"
            yield f"          runbook_url: {json.dumps(alert.runbook)}"


def inhibitions() -> Iterator[tuple[dict[str, str], dict[str, str], tuple[str, ...]]]:
    """Yield which alerts keep which others quiet: the labels of both, and those that must be equal.

    Label names end in `~` where the value is a pattern.
    """
    for rule in RULES:
        if rule.explains:
            consequences = {"failure_mode~": "|".join(rule.explains), "root_cause": "false"}
            cause = {"failure_mode": rule.id, "root_cause~": "true|false"}  # and not the alert for a broken rule
            yield cause, consequences, ("job", "instance", "severity")
    critical = Severity.CRITICAL.word
    yield (
        {"root_cause": "true", "severity": critical},
        {"root_cause": "false", "severity": Severity.WARNING.word},
        ("job", "instance"),
    )
    for cause in ("GpuDoctorStale", "GpuDoctorBlind"):
        effects = {"alertname~": "GpuDoctorIncomplete|GpuDoctorCollectorFailing|GpuDoctorRuleBroken"}
        yield {"alertname": cause}, effects, ("job", "instance")
    yield (
        {"failure_mode": "driver-unresponsive", "root_cause~": "true|false"},
        {"alertname": "GpuDoctorCollectorFailing", "collector": "nvml"},
        ("job", "instance"),
    )
    yield (
        {"alertname": "GpuDoctorCollectorFailing", "collector~": _one_of(OF_A_NODE | OF_AN_ENGINE)},
        {"alertname": "GpuDoctorIncomplete"},
        ("job", "instance"),
    )
    yield {"alertname": "GpuDoctorRuleBroken"}, {"alertname": "GpuDoctorIncomplete"}, ("job", "instance")


def alertmanager_page() -> str:
    """Return an example of Alertmanager's configuration."""
    return "\n".join((*_ROUTES, *_inhibition_lines())) + "\n"


_ROUTES = (
    "# Generated by `make docs` from docs/alerts.py: a page for what is critical, a ticket for warnings, one call an incident.",
    "# Put in the receivers of the site; the inhibitions can be taken as they are.",
    "route:",
    "  receiver: tickets",
    "  group_by: [job, instance]",
    "  group_wait: 30s        # guess: causes and consequences show up within two visits",
    "  group_interval: 5m",
    "  repeat_interval: 12h",
    "  routes:",
    "    - matchers: ['severity=\"critical\"']",
    "      receiver: pager",
    "      repeat_interval: 4h",
    "receivers:",
    "  - name: pager          # pagerduty_configs, opsgenie_configs, webhook_configs, …",
    "  - name: tickets        # email_configs, slack_configs, webhook_configs, …",
)


def _inhibition_lines() -> Iterator[str]:
    yield "# A cause keeps what it explains quiet, as far as it is told as loudly: a ticket never hides a page."
    yield "inhibit_rules:"
    for source, target, equal in inhibitions():
        yield f"  - source_matchers: [{_matchers(source)}]"
        yield f"    target_matchers: [{_matchers(target)}]"
        yield f"    equal: [{', '.join(equal)}]"


def _matchers(labels: dict[str, str]) -> str:
    return ", ".join(
        f"""'{name.removesuffix("~")}{"=~" if name.endswith("~") else "="}"{value}"'"""
        for name, value in labels.items()
    )
