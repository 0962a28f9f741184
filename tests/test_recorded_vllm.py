"""What the daemon saw of a real vLLM 0.32 on the CPU, judged again: `tests/real_vllm` made the recordings."""

from __future__ import annotations

from pathlib import Path

import nodes
import pytest

from doctor.diagnose import watch
from doctor.feeds import recording
from doctor.report import Report, Verdict
from doctor.rule import Severity
from doctor.snapshot import GpuProcess, Snapshot, Source
from rules import RULES

RECORDINGS = Path(__file__).parent / "real_vllm" / "recordings"
OPTIONAL = frozenset((Source.NVML, Source.KERNEL_LOG))
"""A node without a GPU, and perhaps in a container."""

TOLD: dict[str, list[tuple[str, ...]]] = {
    "loads-and-serves": [()],
    "stopped-worker": [(), ("engine-stalled",), ()],
    "killed-engine-core": [(), ("worker-killed",)],
    "replaced-engine": [(), ("worker-killed",), ()],
    "killed-server": [(), ("worker-killed",), ()],
}
"""What is found over the visits of a recording, one after the other."""


def visits_of(name: str) -> tuple[Snapshot, ...]:
    return tuple(recording.read(RECORDINGS / f"{name}.rec"))


def reports_of(visits: tuple[Snapshot, ...]) -> list[Report]:
    return list(watch(visits, RULES, keep=3600, optional=OPTIONAL))


@pytest.mark.parametrize("name", TOLD)
def test_each_visit_is_told_rightly_and_nothing_beside_it(name: str) -> None:
    found = [tuple(f.finding.failure_mode for f in report.findings) for report in reports_of(visits_of(name))]
    changes = [each for i, each in enumerate(found) if i == 0 or each != found[i - 1]]
    assert changes == TOLD[name]


def test_an_engine_that_loads_is_incomplete_until_its_metrics_come_and_then_clear() -> None:
    verdicts = [report.verdict for report in reports_of(visits_of("loads-and-serves"))]
    assert set(verdicts) == {Verdict.INCOMPLETE, Verdict.CLEAR}
    assert verdicts == sorted(verdicts, key=lambda verdict: verdict is Verdict.CLEAR)


def test_an_engine_whose_worker_was_stopped_names_it() -> None:
    stalled = next(report for report in reports_of(visits_of("stopped-worker")) if report.findings)
    (finding,) = [f.finding for f in stalled.findings]
    assert finding.severity is Severity.CRITICAL
    assert "VLLM::Worker_TP1 (pid " in finding.summary
    assert "is stopped, by a signal or a debugger" in finding.summary
    (engine,) = stalled.snapshot.engines
    assert finding.subject.pids == (engine.ranks[1].pid,)


def test_a_server_that_is_gone_leaves_a_gpus_memory_held() -> None:
    """The same on a node with a GPU: what NVML would say of the engine core is added to what was seen."""
    visits = visits_of("killed-server")
    core = visits[0].engines[0].cores[0].pid
    gpu = nodes.put(nodes.healthy("h100-nvl-4")[0].gpus[0], processes=(GpuProcess(pid=core, used_bytes=70 << 30),))
    on_gpu = tuple(nodes.put(s, gpus=(gpu,), seen=(*s.seen, Source.NVML), unseen=()) for s in visits)
    chains = [[(f.depth, f.finding.failure_mode) for f in report.findings] for report in reports_of(on_gpu)]
    assert [(0, "worker-killed"), (1, "gpu-memory-held")] in [chain[:2] for chain in chains]
