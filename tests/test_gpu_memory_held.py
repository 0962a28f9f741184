"""Who holds an engine's GPU: strangers, left-overs, and those that belong there."""

from __future__ import annotations

import nodes
import pytest
from record_cases import holding, not_empty, second_engine

from doctor.rule import Confidence, Finding, Severity
from doctor.snapshot import Absent, Snapshot, Source, Why
from rules import RULES
from rules.gpu_memory_held import RULE

HEALTHY = nodes.healthy("hgx-h100-4")


def beside(gib: float, name: str = "python3", gpu: int = 1) -> tuple[Snapshot, ...]:
    return nodes.each(HEALTHY, lambda s: holding(s, gpu, 4000, gib, name))


def one(visits: tuple[Snapshot, ...]) -> Finding:
    findings = nodes.found(RULE, visits)
    assert len(findings) == 1, findings
    return findings[0]


def quiet(visits: tuple[Snapshot, ...]) -> bool:
    return RULE.judge(nodes.history(visits)) == ((), None)


def test_a_stranger_beside_a_running_engine_is_a_notice() -> None:
    finding = one(beside(20.0))
    assert finding.summary == "python3 (pid 4000) holds 20.0 GiB of GPU 1 (0000:21:00.0) and belongs to no engine"
    assert finding.severity is Severity.NOTICE
    assert finding.confidence is Confidence.HIGH
    assert finding.subject.pids == (4000,)
    assert "kill 4000" in finding.advice[0]


def test_it_is_the_cause_of_a_refusal_to_start() -> None:
    report = nodes.report(not_empty(), RULES)
    chain = [(f.depth, f.finding.failure_mode, f.finding.severity) for f in report.findings]
    assert chain == [
        (0, "gpu-memory-held", Severity.WARNING),
        (1, "out-of-memory-at-startup", Severity.CRITICAL),
    ]


def test_what_is_left_of_an_engine_is_named_so() -> None:
    assert "whose server is gone" in one(nodes.each(HEALTHY, lambda s: second_engine(s, "VLLM::EngineCore"))).summary


@pytest.mark.parametrize(
    "visits",
    [
        HEALTHY,
        beside(0.2, "/usr/lib/xorg/Xorg"),
        beside(3.0, "nvidia-cuda-mps-server"),
        nodes.each(HEALTHY, lambda s: second_engine(s, "vllm", "serve", "org/embedder")),
        nodes.each(nodes.healthy("hgx-h100-4", tp=2), lambda s: holding(nodes.with_gpu(s, 3, processes=()), 3, 9, 40, "job")),
        nodes.last(HEALTHY, lambda s: holding(s, 1, 4000, 20.0, "just-now")),
        nodes.each(HEALTHY, nodes.without_engine),
    ],
    ids=["healthy", "desktop", "mps", "second-engine", "no-engine's-gpu", "just-now", "no-engine"],
)  # fmt: skip
def test_those_that_belong_there_or_harm_nobody(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(visits)


def test_pids_of_another_namespace_accuse_nobody() -> None:
    """Every rank is a stranger to a doctor that sees other pids than the driver."""

    def renumbered(snapshot: Snapshot) -> Snapshot:
        return nodes.with_engine(
            snapshot, pid=7, ranks=tuple(nodes.put(r, pid=10 + i) for i, r in enumerate(snapshot.engines[0].ranks))
        )

    visits = nodes.each(HEALTHY, renumbered)
    assert nodes.found(RULE, visits) == ()
    assert nodes.why_blind(RULE, visits) is not None


def test_an_engine_that_dies_leaves_no_stranger_at_once() -> None:
    assert quiet(nodes.last(HEALTHY, lambda s: nodes.put(s, engines=())))


def test_beside_an_engine_whose_processes_are_not_known_nobody_is_accused() -> None:
    other = nodes.each(beside(20.0), lambda s: nodes.put(s, engines=(*s.engines, nodes.put(s.engines[0], pid=1, kind="sglang", ranks=()))))  # fmt: skip
    found, blind = RULE.judge(nodes.history(other))
    assert found == ()
    assert blind is not None


def test_blindness_is_not_health() -> None:
    hidden = nodes.each(HEALTHY, lambda s: nodes.with_gpu(s, range(4), processes=Absent(Why.NO_PERMISSION)))
    assert nodes.why_blind(RULE, hidden) is not None
    for source in (Source.NVML, Source.PROCESSES):
        blind = nodes.each(beside(20.0), lambda s, source=source: nodes.unseen(s, source))
        assert nodes.found(RULE, blind) == ()
        assert nodes.why_blind(RULE, blind) is not None
