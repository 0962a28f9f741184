"""What changes on a node is followed without a restart, and only what somebody needs is told as lost.

The nodes are simulated, the clock is turned by hand; tests/test_nvml.py has the same with NVML's child.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterable
from pathlib import Path

import drills

from doctor.diagnose import watch
from doctor.feeds import live, simulated
from doctor.report import Report
from doctor.rule import Severity
from doctor.simulation.profiles import PROFILES
from doctor.snapshot import Source, Why, known
from rules import RULES


def reports(profile: str, *faults: str, seconds: Iterable[float] = (0, 15, 30, 45, 60)) -> list[Report]:
    return list(watch(drills.stepped(profile, *faults, seconds=seconds), RULES, keep=3600))


def alarms(report: Report) -> list[str]:
    severities = {f.finding.failure_mode: f.finding.severity for f in report.findings}
    return [mode for mode, severity in severities.items() if severity is not Severity.NOTICE]


class TestGpus:
    def test_one_that_nobody_used_may_be_taken_out_and_put_back(self) -> None:
        before, gone, back = reports("h100-nvl-4", "gpu-removed:gpu=2,start=20,end=40", seconds=(15, 30, 45))
        uuid = PROFILES["h100-nvl-4"].uuid
        assert [gpu.uuid for gpu in gone.snapshot.gpus] == [uuid(0), uuid(1), uuid(3)]
        assert [gpu.index for gpu in gone.snapshot.gpus] == [0, 1, 2]
        assert before.snapshot.gpus[3].pci_address == gone.snapshot.gpus[2].pci_address
        (told,) = [f.finding for f in gone.findings if f.finding.failure_mode == "gpu-lost"]
        assert told.severity is Severity.NOTICE
        assert "taken out on purpose" in told.summary
        assert "gpu-lost" in back.quiet
        assert len(back.snapshot.gpus) == 4
        assert [alarms(report) for report in (before, gone, back)] == [[], [], []]

    def test_one_that_an_engine_used_is_lost(self) -> None:
        _, gone = reports("hgx-h100-8", "gpu-removed:gpu=3,start=20", seconds=(15, 30))
        assert len(gone.snapshot.gpus) == 7
        (told,) = [f.finding for f in gone.findings if f.finding.failure_mode == "gpu-lost"]
        assert told.severity is Severity.CRITICAL
        assert told.summary.startswith("GPU 3 (0000:5d:00.0) is gone")

    def test_one_that_vanishes_with_an_xid_is_lost_whoever_used_it(self) -> None:
        _, gone = reports("h100-nvl-4", "gpu-removed:gpu=3,start=20", "xid:code=79,gpu=3,start=19", seconds=(15, 30))
        assert "gpu-lost" in alarms(gone)


class TestMig:
    def test_a_mode_that_changes_and_its_instances_are_no_fault(self) -> None:
        before, whole, after = reports("h100-nvl-4", "mig-enabled:gpu=3,start=20,end=40", seconds=(15, 30, 45))
        modes = [report.snapshot.gpus[3].mig.enabled for report in (before, whole, after)]
        assert modes == [False, True, False]
        assert len(whole.snapshot.gpus[3].mig.devices) == 4  # type: ignore[arg-type]
        assert not known(whole.snapshot.gpus[3].links)
        assert len(after.snapshot.gpus[3].links) == len(before.snapshot.gpus[3].links)  # type: ignore[arg-type]
        assert [alarms(report) for report in (before, whole, after)] == [[], [], []]

    def test_instances_that_are_destroyed_are_missed_where_their_memory_is_nobodys(self) -> None:
        whole, cut = reports(
            "h100-nvl-4", "mig-enabled:gpu=3,end=20", "mig-enabled:gpu=3,instances=2,start=20", seconds=(15, 30)
        )
        assert [len(report.snapshot.gpus[3].mig.devices) for report in (whole, cut)] == [4, 2]  # type: ignore[arg-type]
        assert (alarms(whole), alarms(cut)) == ([], ["mig-misconfigured"])


class TestDriver:
    def test_one_that_is_reloaded_in_another_version_is_followed_and_no_alarm(self) -> None:
        told = reports("hgx-h100-8", "driver-reloaded:start=20,down=20")
        assert [alarms(report) for report in told] == [[]] * 5
        versions = [report.snapshot.stack.driver for report in told]
        assert [v if known(v) else v.why for v in versions] == [
            "590.48.01", "590.48.01", Why.NOT_PRESENT, "595.54.03", "595.54.03",
        ]  # fmt: skip
        without = told[2]
        assert without.verdict.value == "incomplete"
        assert without.snapshot.why_unseen(Source.NVML).why is Why.NOT_PRESENT  # type: ignore[union-attr]
        assert without.snapshot.gpus == ()
        assert "gpu-lost" in {unjudged.failure_mode for unjudged in without.unjudged}
        assert told[-1].snapshot.fabric_manager.version == "595.54.03"
        assert told[-1].snapshot.stack.cuda_driver == "13.2"
        assert len(told[-1].snapshot.gpus) == 8


def test_a_fabric_manager_that_is_restarted_is_no_fault() -> None:
    told = reports("hgx-h100-8", "fabric-manager-restarted:start=20")
    assert [report.snapshot.fabric_manager.running for report in told] == [True] * 5
    assert [alarms(report) for report in told] == [[]] * 5
    started = [m.at for r in told for m in r.snapshot.fabric_manager.messages if m.kind == "started"]
    assert started[-1] == drills.BEGINS + 25


def test_an_engine_that_ends_is_gone_and_its_model_with_it() -> None:
    before, after = reports("dgx-h100-4of8", "engine-crashed:start=20", seconds=(15, 45))
    (engine,) = before.snapshot.engines
    assert known(engine.model.layers)
    assert after.snapshot.engines == ()
    assert after.snapshot.why_unseen(Source.MODEL).why is Why.NOT_PRESENT  # type: ignore[union-attr]
    assert "engine-crashed" in alarms(after)


class TestEngines:
    def test_one_that_is_restarted_is_another_one_whose_model_and_versions_are_read_at_once(
        self, tmp_path: Path
    ) -> None:
        drill = simulated.drill_of("dgx-h100-4of8")
        world = simulated.World(drill, tmp_path)
        world.advance()
        now = [drill.started_at]
        clocks = live.Clocks(lambda: now[0], lambda: now[0], lambda seconds: now.append(now.pop() + seconds))
        visits = live.every(15.0, world.collectors, 4, clocks=clocks)
        try:
            first, second = next(visits), next(visits)
            pids = (drill.engine.front_pid, drill.engine.core_pid, *drill.engine.rank_pids)
            for pid in pids:
                rename(tmp_path / "proc", pid, pids)
            restarted = next(visits)
            for pid in pids:
                shutil.rmtree(tmp_path / f"proc/{pid + MOVED}")
            gone = next(visits)
        finally:
            visits.close()  # type: ignore[attr-defined]
            world.close()
        (before,), (same,), (after,) = first.engines, second.engines, restarted.engines
        assert before.id == same.id != after.id
        assert after.pid == before.pid + MOVED
        assert [rank.pid for rank in after.ranks] == [rank.pid + MOVED for rank in before.ranks]
        assert (after.model, after.stack, after.log) == (before.model, before.stack, before.log)
        assert known(after.model.layers)
        ages = {s.at: {run.source: run.age_seconds for run in s.collectors} for s in (second, restarted)}
        assert ages[second.at][Source.MODEL] == ages[second.at][Source.STACK] == 15.0
        assert ages[restarted.at][Source.MODEL] == ages[restarted.at][Source.STACK] == 0.0
        assert gone.engines == ()
        assert gone.why_unseen(Source.MODEL).why is Why.NOT_PRESENT  # type: ignore[union-attr]


MOVED = 10000


def rename(proc: Path, pid: int, pids: Iterable[int]) -> None:
    """Let a process be a later one of the same program: another pid and start."""
    stat = (proc / f"{pid}/stat").read_text()
    head, _, rest = stat.rpartition(") ")
    state, parent, *words = rest.split()
    parent = str(int(parent) + MOVED) if int(parent) in pids else parent
    words[17] = str(int(words[17]) + 100_000)  # starttime
    (proc / str(pid)).rename(proc / str(pid + MOVED))
    text = f"{head.replace(str(pid), str(pid + MOVED), 1)}) {' '.join([state, parent, *words])}\n"
    (proc / f"{pid + MOVED}/stat").write_text(text)
