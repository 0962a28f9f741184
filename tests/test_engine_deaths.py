"""An engine that dies while the daemon watches it: who it was, what is left of it, and what took it."""

from __future__ import annotations

import msgspec
import nodes
import pytest

from doctor.report import Report
from doctor.rule import Confidence, Finding
from doctor.snapshot import Engine, EngineEvent, EngineFlags, HostMessage, OomKill, Rank, Snapshot, Source
from doctor.symptoms.engine_log import engine_logs
from rules import RULES

CORE = 2100
WORDS = {
    "vLLM 0.32": "[shutdown] MPClient: engine core exited unexpectedly; starting cleanup",
    "vLLM 0.19": "Engine core proc EngineCore_DP0 died unexpectedly, shutting down client.",
}


def with_core(snapshot: Snapshot) -> Snapshot:
    return nodes.with_engine(snapshot, cores=(Rank(pid=CORE, title="VLLM::EngineCore", state="sleeping"),))


def remnants(engine: Engine) -> tuple[Engine, ...]:
    """The workers that outlive their front for some seconds, each the topmost process of its family."""
    return tuple(
        Engine(pid=rank.pid, started_at=engine.started_at + 20, kind="vllm", command_line=(rank.title,), ranks=(rank,), log=engine.log)
        for rank in engine.ranks
    )  # fmt: skip


def killed(words: str = WORDS["vLLM 0.32"]) -> tuple[Snapshot, ...]:
    """A healthy engine, then its death, then what is left of it, then nothing."""
    alive = nodes.each(nodes.healthy("hgx-h100-4", visits=5), with_core)
    (engine,) = alive[0].engines
    death = nodes.line("worker-died", words, number=90, at=alive[2].at - 1)
    report = nodes.line("engine-dead", "EngineDeadError: EngineCore encountered an issue.", number=91, at=alive[2].at)
    return (
        *alive[:2],
        nodes.with_lines(nodes.with_engine(alive[2], ranks=(), cores=()), death, report),
        *(nodes.put(nodes.without_engine(s), engines=left) for s, left in zip(alive[3:], (remnants(engine), ()), strict=True)),
    )  # fmt: skip


def first_of(report: Report) -> Finding:
    return report.findings[0].finding


@pytest.mark.parametrize("words", WORDS.values(), ids=WORDS)
def test_an_engine_core_that_leaves_no_word_was_ended_from_outside(words: str) -> None:
    for number in (3, 4, 5):
        report = nodes.report(killed(words)[:number], RULES)
        finding = first_of(report)
        assert [root.finding.failure_mode for root in report.roots] == ["worker-killed"]
        assert f"The engine core (pid {CORE}) was ended from outside" in finding.summary
        assert "the kernel log tells of no out-of-memory kill" in finding.summary
        assert finding.confidence is Confidence.MEDIUM
        assert finding.subject.pids == (CORE,)
        assert "engine-crashed" not in [f.finding.failure_mode for f in report.findings]


def test_without_the_kernel_log_the_killer_may_be_the_kernel() -> None:
    blind = nodes.each(killed(), lambda s: nodes.unseen(s, Source.KERNEL_LOG))
    finding = first_of(nodes.report(blind[:3], RULES))
    assert finding.failure_mode == "worker-killed"
    assert "by the out-of-memory killer, or by hand" in finding.summary
    assert finding.confidence is Confidence.LOW


@pytest.mark.parametrize(
    ("seconds", "words"), [(-7200.0, "no out-of-memory kill"), (20.0, "the kernel's out-of-memory killer took it")]
)
def test_a_kill_from_before_the_engine_was_started_took_another(seconds: float, words: str) -> None:
    """The engine was started an hour before; of the older kill another engine died."""
    kill = OomKill(text="Out of memory: Killed process 7", where="/dev/kmsg:7", at=nodes.START + seconds, pid=7, process_name="VLLM::EngineCor")  # fmt: skip
    visits = killed()
    report = nodes.report((*visits[:2], nodes.with_kernel(visits[2], kill)), RULES)
    told = [f.finding.summary for f in report.findings if f.finding.subject.engine == visits[0].engines[0].id]
    assert [words in summary for summary in told] == [True]


def test_an_engine_core_that_faulted_crashed() -> None:
    fault = HostMessage(
        text="python3[2100]: segfault at 8", where="/dev/kmsg:1", at=nodes.START, kind="segfault", pid=CORE
    )
    visits = killed()
    faulted = (*visits[:2], nodes.with_kernel(visits[2], fault))
    assert "engine-crashed" in [f.finding.failure_mode for f in nodes.report(faulted, RULES).findings]
    assert "worker-killed" not in [f.finding.failure_mode for f in nodes.report(faulted, RULES).findings]


def test_an_engine_core_that_said_what_was_wrong_crashed() -> None:
    visits = killed()
    said = nodes.line(
        "exception", "KeyError: 'block'", number=80, at=visits[2].at - 1, type="KeyError", message="'block'"
    )
    raised = (*visits[:2], nodes.put(visits[2], engine_events=(said, *visits[2].engine_events)))
    assert first_of(nodes.report(raised, RULES)).failure_mode == "engine-crashed"


def test_a_dead_engine_keeps_its_name_whatever_is_left_of_it() -> None:
    visits = killed()
    (engine,) = visits[0].engines
    names = {first_of(nodes.report(visits[:number], RULES)).subject.engine for number in (3, 4, 5)}
    assert names == {engine.id}
    assert first_of(nodes.report(visits, RULES)).subject.gpus == tuple(rank.gpu for rank in engine.ranks)


def restarted(*lines: EngineEvent) -> tuple[Snapshot, ...]:
    """The same, and a new engine with the same log that loads, and says *lines*."""
    visits = killed()
    (engine,) = visits[0].engines
    new = msgspec.structs.replace(engine, pid=3000, started_at=visits[-1].at + 3, ranks=(), cores=())
    loads = nodes.put(visits[-1], at=visits[-1].at + 15, engines=(new,))
    return (*visits, nodes.with_lines(loads, nodes.line("non-default-args", number=200, at=loads.at - 5), *lines))


def test_what_the_old_engine_died_of_is_not_the_new_ones_while_it_loads() -> None:
    visits = restarted()
    assert first_of(nodes.report(visits, RULES)).subject.engine == visits[0].engines[0].id


def test_a_new_engine_that_serves_ends_what_the_old_one_died_of() -> None:
    visits = restarted(nodes.line("startup-complete", "Application startup complete.", number=250))
    assert "worker-killed" not in [f.finding.failure_mode for f in nodes.report(visits, RULES).findings]
    assert [log.engine for log in engine_logs(nodes.history(visits))] == [visits[-1].engines[0].id]


def replaced(**changes: object) -> tuple[Snapshot, ...]:
    """The same, and a new engine that writes another log, and serves."""
    visits = restarted()
    (new,) = visits[-1].engines
    heir = msgspec.structs.replace(new, log="/var/log/other.log", **changes)
    page = msgspec.structs.replace(nodes.healthy("hgx-h100-4")[0].metrics[0], engine=heir.id)
    return (*visits[:-1], nodes.put(visits[-1], engines=(heir,), engine_events=(), metrics=(page,)))


def test_an_engine_that_serves_in_the_place_of_the_dead_one_ends_that_incident() -> None:
    assert "worker-killed" not in [f.finding.failure_mode for f in nodes.report(replaced(), RULES).findings]


def test_an_incident_that_was_over_does_not_come_back_with_the_next() -> None:
    visits = replaced()
    later = nodes.put(nodes.without_engine(visits[-1]), at=visits[-1].at + 15)
    assert "worker-killed" not in [f.finding.failure_mode for f in nodes.report((*visits, later), RULES).findings]


@pytest.mark.parametrize(
    "changes",
    [
        {"flags": EngineFlags(model="org/other", port=8000)},
        {"started_at": 1.0},
        {"visible_gpus": ("GPU-of-another-slot",)},
    ],
    ids=["another-model", "older", "other-gpus"],
)
def test_an_engine_beside_the_dead_one_ends_nothing(changes: dict[str, object]) -> None:
    assert "worker-killed" in [f.finding.failure_mode for f in nodes.report(replaced(**changes), RULES).findings]


def headless(*, visits: int = 5) -> tuple[Snapshot, ...]:
    """A healthy engine whose server vanishes at the third visit, without a line in its log; its processes run on."""
    alive = nodes.each(nodes.healthy("hgx-h100-4", visits=visits), with_core)
    (engine,) = alive[0].engines
    (core,) = engine.cores
    left = Engine(
        pid=core.pid, started_at=engine.started_at + 9, kind="vllm", command_line=(core.title,), ranks=engine.ranks, cores=(core,), log=engine.log
    )  # fmt: skip
    return (*alive[:2], *(nodes.put(nodes.without_engine(s), engines=(left,)) for s in alive[2:]))


def test_a_server_that_is_killed_leaves_its_engine_core_and_that_is_told() -> None:
    visits = headless()
    report = nodes.report(visits, RULES)
    finding = first_of(report)
    assert [root.finding.failure_mode for root in report.roots] == ["worker-killed"]
    assert finding.summary == (
        "The engine's server (pid 1000) was ended by SIGKILL: by hand, or by a supervisor: the kernel log tells of no "
        f"out-of-memory kill; its engine core (pid {CORE}) lives on without it and keeps all memory"
    )
    assert finding.subject.engine == visits[0].engines[0].id
    assert finding.subject.gpus
    assert finding.since == visits[2].at
    assert any("pgrep -af VLLM::" in step for step in finding.advice)


def test_the_kernel_that_took_the_server_is_named_once() -> None:
    kill = OomKill(text="Out of memory: Killed process 1000 (vllm)", where="/dev/kmsg:7", at=nodes.START, pid=1000, process_name="vllm", rss_bytes=40 << 30)  # fmt: skip
    visits = headless()
    report = nodes.report((*visits[:2], nodes.with_kernel(visits[2], kill), *visits[3:]), RULES)
    told = [f.finding.summary for f in report.findings if f.finding.failure_mode == "worker-killed"]
    assert len(told) == 1
    assert "the kernel's out-of-memory killer took it at 40.0 GiB" in told[0]


@pytest.mark.parametrize(
    "visits",
    [
        headless()[:3],
        headless()[2:],
        (
            *headless()[:2],
            nodes.with_lines(headless()[2], nodes.line("shutdown", "shutdown triggered")),
            *headless()[3:],
        ),
    ],
    ids=["just-now", "a-library's", "asked-to-stop"],
)
def test_an_engine_core_alone_is_not_always_left_over(visits: tuple[Snapshot, ...]) -> None:
    assert "worker-killed" not in [f.finding.failure_mode for f in nodes.report(visits, RULES).findings]
