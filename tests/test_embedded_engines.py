"""A program that uses vLLM as a library has an engine core and no server: what it holds is nobody's leavings."""

from __future__ import annotations

from pathlib import Path

import nodes
import pytest
from roots import BOOT, Root

from doctor.collectors.collector import Visit
from doctor.collectors.processes import Processes
from doctor.snapshot import Engine, GpuProcess, Rank, Snapshot
from rules import RULES


def engine_of(root: Root) -> Engine:
    (engine,) = Processes(root.folder).collect(Visit(at=BOOT + 5000.0)).fields["engines"]
    return engine


@pytest.mark.parametrize(
    ("parent", "embedded"),
    [
        (("python3", "batch.py"), True),
        (("/opt/job/bin/python3.12", "-m", "job.batch"), True),
        (("ray::ServeReplica:llm",), True),
        (("/sbin/init",), False),
        (("/usr/bin/tini", "--", "vllm", "serve", "m"), False),
        (("/usr/bin/containerd-shim-runc-v2", "-id", "4f"), False),
        (("/usr/lib/systemd/systemd", "--user"), False),
    ],
    ids=lambda value: value[0].rpartition("/")[2] if isinstance(value, tuple) else None,
)
def test_an_engine_core_below_a_program_is_embedded_and_one_that_was_taken_in_is_left_over(
    tmp_path: Path, parent: tuple[str, ...], embedded: bool
) -> None:
    root = Root(tmp_path)
    root.process(90, parent, name=parent[0].rpartition("/")[2][:15])
    root.process(100, ("VLLM::EngineCore",), parent=90, name="VLLM::EngineCor")
    engine = engine_of(root)
    assert (engine.is_embedded, engine.is_left_over) == (embedded, not embedded)


@pytest.mark.parametrize("embedded", [True, False])
def test_only_what_is_left_over_holds_memory_that_belongs_to_nobody(embedded: bool) -> None:
    core = Rank(pid=77, rank=0, title="VLLM::EngineCore", gpu=nodes.uuid(1), state="running")
    engine = Engine(
        pid=77, started_at=nodes.START - 600, kind="vllm", command_line=("VLLM::EngineCore",), ranks=(core,), is_embedded=embedded
    )  # fmt: skip

    def beside(snapshot: Snapshot) -> Snapshot:
        with_core = nodes.with_gpu(snapshot, 1, processes=(GpuProcess(pid=77, used_bytes=60 << 30, name="python3"),))
        return nodes.put(with_core, engines=(engine,))

    report = nodes.report(nodes.each(nodes.healthy("hgx-h100-4", visits=6), beside), RULES)
    told = [f.finding.summary for f in report.findings if f.finding.failure_mode == "gpu-memory-held"]
    assert bool(told) is not embedded
    assert all("left over of an engine whose server is gone" in summary for summary in told)
