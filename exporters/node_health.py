"""The report for who places work on nodes, Slurm or node-problem-detector: is this node fit? One line and an exit code."""

from __future__ import annotations

import enum

from doctor.report import Report, ReportedFinding
from doctor.rule import Confidence, Finding, Severity
from doctor.snapshot import Source, Why
from exporters.wording import SOURCE_NAMES, broken_rules, counted, listed, plain, severity_of

LINE_BYTES = 500
"""node-problem-detector cuts what it is told at `max_output_length`, which its plugin's configuration here sets to 512."""

SOURCES = (Source.NVML, Source.KERNEL_LOG)
"""What a node's own health is read from."""

NODE_FAULTS = (
    "gpu-lost",
    "gpu-hung",
    "driver-unresponsive",
    "gpu-memory-faulty",
    "nvlink-degraded",
    "nvlink-errors",
    "nvswitch-fabric-fault",
    "stack-mismatch",
)
"""Failure modes that stay with the node whatever runs on it, and that work should be kept away from while they are critical.
What the workload does to itself (a bad flag, a model that does not fit, its own crash) makes no node unfit."""

RECOVERY = "recovery-pending"
"""The driver's own word that what starts next can't trust a GPU: counts at any severity."""


class Fitness(enum.IntEnum):
    """Whether work may be placed on a node. The values are exit codes: node-problem-detector's OK, NonOK and Unknown."""

    FIT = 0
    UNFIT = 1
    UNKNOWN = 2


def fitness(report: Report, optional: frozenset[Source] = frozenset()) -> Fitness:
    """Return whether the node is fit; *optional*: sources whose absence is no reason to doubt it."""
    if _faults(report):
        return Fitness.UNFIT
    return Fitness.UNKNOWN if _doubts(report, optional) else Fitness.FIT


def render(report: Report, optional: frozenset[Source] = frozenset()) -> str:
    """Return the reason in one line, at most LINE_BYTES, with a newline at its end."""
    faults, doubts = _faults(report), _doubts(report, optional)
    if faults:
        first = faults[0].finding
        others = list(
            dict.fromkeys(f.finding.failure_mode for f in faults if f.finding.failure_mode != first.failure_mode)
        )
        also = f"; also {listed(others)}" if others else ""
        return _line(f"{first.failure_mode}: {plain(first.summary)}", also)
    if doubts:
        return _line(f"could not be told: {'; '.join(doubts)}")
    judged = counted(len(report.snapshot.gpus), "GPU")
    return _line(f"fit: {judged}, no fault of hardware or driver")


def _faults(report: Report) -> list[ReportedFinding]:
    return [reported for reported in report.open if _is_of_node(reported.finding, report)]


def _is_of_node(finding: Finding, report: Report) -> bool:
    if finding.failure_mode == RECOVERY:
        return True
    if finding.failure_mode == "stack-mismatch" and finding.subject.engine and Source.NVML in report.snapshot.seen:
        return False  # where NVML answers, it is the engine's own environment that does not go with the driver
    return (
        finding.failure_mode in NODE_FAULTS
        and severity_of(finding) is Severity.CRITICAL
        and finding.confidence > Confidence.LOW
    )


def _doubts(report: Report, optional: frozenset[Source]) -> list[str]:
    unseen = [
        f"{SOURCE_NAMES[source]} ({plain(str(why))})"
        for source in SOURCES
        if source not in optional and (why := report.snapshot.why_unseen(source)) is not None
    ]
    doubts = [f"{listed(unseen)} could not be seen"] if unseen else []
    if any(u.failure_mode in (*NODE_FAULTS, RECOVERY) and u.why.why is Why.BROKEN for u in report.unjudged):
        doubts.append(f"{listed(broken_rules(report), most=2)} could not be asked")
    return doubts


def _line(text: str, end: str = "") -> str:
    """Return *text* and *end* in LINE_BYTES bytes, *text* cut where both are too long."""
    room = LINE_BYTES - len(end.encode()) - 1
    head = text.encode()
    if len(head) > room:
        head = head[: room - len("…".encode())].decode(errors="ignore").rstrip().encode() + "…".encode()
    return f"{head.decode()}{end}\n"
