"""A rule recognises one failure mode; a finding is that failure mode, present, with its evidence."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from importlib import resources
from typing import Any, Generic, TypeVar

import msgspec

from doctor.history import History
from doctor.readers import runbook
from doctor.snapshot import Absent, Source, Why


class Severity(enum.IntEnum):
    """How bad a failure mode is for the service."""

    NOTICE = 1
    """A choice or a hint: never an alarm, exit code 0."""
    WARNING = 2
    """The service is worse than it could be, or will be."""
    CRITICAL = 3
    """The service is down, wrong, or about to be."""

    @property
    def word(self) -> str:
        """The name in reports and metrics."""
        return self.name.lower()


class Confidence(enum.IntEnum):
    """How sure the judgement is."""

    LOW = 1
    """One indirect piece of evidence, or a prediction."""
    MEDIUM = 2
    """Direct evidence from one source."""
    HIGH = 3
    """The component's own word, or two sources that agree."""

    @property
    def word(self) -> str:
        """The name in reports and metrics."""
        return self.name.lower()


class Evidence(msgspec.Struct, frozen=True):
    """One piece of proof."""

    source: str
    """Which collector or reader: a `Source` value, e.g. `nvml`."""
    where: str
    """Place within it: an NVML field, `vllm.log:120`, a flag."""
    text: str
    """What it says there, with its value and unit, or the line itself."""


class Subject(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """Who a finding is about. Empty: the node."""

    gpus: tuple[str, ...] = ()
    """UUIDs."""
    links: tuple[str, ...] = ()
    """`UUID/link`."""
    ranks: tuple[str, ...] = ()
    """As the engine names them: `TP2`."""
    engine: str = ""
    """`Engine.id`, or the log file in triage."""
    pids: tuple[int, ...] = ()

    def overlaps(self, other: Subject) -> bool:
        """Whether both may be about the same thing: a part that only one of them names does not separate them."""
        pairs = (
            (set(self.gpus), set(other.gpus)),
            ({self.engine} - {""}, {other.engine} - {""}),
        )
        return all(not mine or not theirs or mine & theirs for mine, theirs in pairs)


class Finding(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """A failure mode that is present. A rule fills the first block; `Rule.judge` stamps the second."""

    summary: str
    """One sentence: who and what, with the numbers in it."""
    evidence: tuple[Evidence, ...]
    """At least one piece, the strongest first."""
    confidence: Confidence = Confidence.HIGH
    subject: Subject = Subject()
    since: float | None = None
    """When it began, Unix seconds, where the evidence tells."""
    facts: dict[str, str] = {}
    """What fills the runbook's placeholders: `gpu-index`, `pci-address`, `unit`, …"""
    severity: Severity | None = None
    """None: the rule's own."""
    explains: tuple[str, ...] = ()
    """What follows from this finding; empty: what the rule says."""

    failure_mode: str = ""
    title: str = ""
    advice: tuple[str, ...] = ()


class Unjudged(msgspec.Struct, frozen=True):
    """A failure mode that could not be judged, and why. A rule may yield one itself."""

    failure_mode: str
    why: Absent


L = TypeVar("L")

Judgement = Callable[[History, L], Iterator["Finding | Absent"]]
"""A rule's function: it yields findings, or an `Absent` for a part that it could not judge."""


class Rule(Generic[L]):
    """One failure mode: what it is, what it needs, and the function that judges."""

    def __init__(
        self,
        judgement: Judgement[L],
        *,
        id: str,  # noqa: A002 - the word that documents, metrics and configuration use
        title: str,
        severity: Severity,
        needs: tuple[Source, ...],
        explains: tuple[str, ...],
        limits: L,
    ) -> None:
        self.judgement = judgement
        self.id = id
        self.title = title
        self.severity = severity
        self.needs = needs
        self.explains = explains
        self.limits = limits
        self.enabled = True
        """False: the site does not want it asked."""
        self.module = judgement.__module__
        self.page: str | None = None
        """The runbook's text; None: it lies beside the module."""

    def __repr__(self) -> str:
        return f"<Rule {self.id}>"

    def judge(self, history: History) -> tuple[tuple[Finding, ...], Absent | None]:
        """Return the findings and, where there are none and something needed was unseen, the reason.

        A rule is asked even when a source that it needs is missing: what it finds in the others counts.
        Only its silence does not, unless everything that it needs was seen.
        """
        findings: list[Finding] = []
        blind: Absent | None = None
        for answer in self.judgement(history, self.limits):
            if isinstance(answer, Absent):
                blind = blind or answer
            else:
                findings.append(self._stamp(answer))
        if findings:
            return tuple(findings), None
        return (), blind or self.why_blind(history)

    def why_blind(self, history: History) -> Absent | None:
        """Return why a source that the rule needs is missing from the last visit, or None."""
        for source in self.needs:
            why = history.latest.why_unseen(source)
            if why is not None:
                if why.why is Why.NOT_GIVEN:
                    return why
                return Absent(why.why, f"{source.value} {why.detail or why.why.value.replace('-', ' ')}")
        return None

    def _stamp(self, finding: Finding) -> Finding:
        return msgspec.structs.replace(
            finding,
            failure_mode=self.id,
            title=self.title,
            severity=finding.severity or self.severity,
            advice=self.runbook.advice(finding.facts),
            explains=finding.explains or self.explains,
        )

    @cached_property
    def runbook(self) -> runbook.Runbook:
        """The runbook: that of a site's own rule, else the Markdown file beside the rule's module, with its stem."""
        if self.page is not None:
            return runbook.read(self.page)
        package, _, stem = self.module.rpartition(".")
        return runbook.read(resources.files(package).joinpath(f"{stem}.md").read_text(encoding="utf-8"))

    def but(self, **changes: Any) -> Rule[L]:
        """Return this rule with other `limits`, another `severity`, or not `enabled`: a site's own choice."""
        made = type(self)(
            self.judgement,
            id=self.id,
            title=self.title,
            severity=changes.get("severity", self.severity),
            needs=self.needs,
            explains=self.explains,
            limits=changes.get("limits", self.limits),
        )
        made.enabled = changes.get("enabled", self.enabled)
        made.module = self.module
        made.page = self.page
        return made


AnyRule = Rule[Any]


def rule(
    id: str,  # noqa: A002 - as above
    title: str,
    *,
    severity: Severity,
    needs: tuple[Source, ...],
    limits: L,
    explains: tuple[str, ...] = (),
) -> Callable[[Judgement[L]], Rule[L]]:
    """Declare a rule. *title* says what is wrong; *explains* names the failure modes that follow from it.

    *needs* are the sources without which the rule's silence says nothing; a rule that can use further ones
    where they are seen does so without naming them here.
    """

    def declare(judgement: Judgement[L]) -> Rule[L]:
        return Rule(judgement, id=id, title=title, severity=severity, needs=needs, explains=explains, limits=limits)

    return declare


class NoLimits(msgspec.Struct, frozen=True):
    """The limits of a rule that has none."""


def facts_of_gpu(index: int, pci_address: str | None = None, uuid: str | None = None) -> Mapping[str, str]:
    """Return the runbook facts that name a GPU: `gpu-index`, `pci-address`, `gpu-uuid`."""
    facts = {"gpu-index": str(index)}
    if pci_address:
        facts["pci-address"] = pci_address
    if uuid:
        facts["gpu-uuid"] = uuid
    return facts
