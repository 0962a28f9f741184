"""What control groups let an engine have of the processors, read from the files of both versions."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from roots import CONTAINER, Root

from doctor.collectors.collector import Visit
from doctor.collectors.cpu_share import cpu_share
from doctor.collectors.host import HostState
from doctor.snapshot import Absent, CpuShare, Engine, Why, known

STAT = (
    "usage_usec 900\nuser_usec 500\nsystem_usec 400\nnr_periods {}\nnr_throttled {}\nthrottled_usec {}\nnr_bursts 0\n"
)
PRESSURE = "some avg10=12.00 avg60=42.50 avg300=9.00 total=12345\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n"
POD = "/kubepods.slice/kubepods-pod1.slice"


@pytest.fixture
def root(tmp_path: Path) -> Root:
    return Root(tmp_path)


def share_of(root: Root, pid: int = 100) -> CpuShare:
    return cpu_share(root.folder, pid)


def test_a_quota_and_its_throttling_are_read(root: Root) -> None:
    group = f"/system.slice/docker-{CONTAINER}.scope"
    root.engine(cgroup=group)
    root.put(f"sys/fs/cgroup{group}/cpu.max", "400000 100000\n")
    root.put(f"sys/fs/cgroup{group}/cpu.stat", STAT.format(1000, 620, 98_000_000))
    root.put(f"sys/fs/cgroup{group}/cpu.pressure", PRESSURE)
    assert share_of(root) == CpuShare(
        cgroup=group,
        quota_cores=4.0,
        periods_total=1000,
        throttled_periods_total=620,
        throttled_seconds_total=98.0,
        pressure_ratio=0.425,
    )


def test_the_smallest_quota_above_a_container_is_the_one_that_binds(root: Root) -> None:
    root.engine(cgroup=f"{POD}/cri-{CONTAINER}.scope")
    root.put(f"sys/fs/cgroup{POD}/cri-{CONTAINER}.scope/cpu.max", "1600000 100000\n")
    root.put(f"sys/fs/cgroup{POD}/cpu.max", "250000 100000\n")
    root.put(f"sys/fs/cgroup{POD}/cpu.stat", STAT.format(10, 5, 1000))
    share = share_of(root)
    assert (share.cgroup, share.quota_cores, share.throttled_periods_total) == (POD, 2.5, 5)


def test_groups_of_the_first_version_are_read(root: Root) -> None:
    root.engine()
    root.put("proc/100/cgroup", f"5:cpu,cpuacct:/docker/{CONTAINER}\n3:memory:/elsewhere\n0::/\n")
    folder = f"sys/fs/cgroup/cpu/docker/{CONTAINER}"
    root.put(f"{folder}/cpu.cfs_quota_us", "800000\n")
    root.put(f"{folder}/cpu.cfs_period_us", "100000\n")
    root.put(f"{folder}/cpu.stat", "nr_periods 40\nnr_throttled 30\nthrottled_time 2500000000\n")
    share = share_of(root)
    assert (share.quota_cores, share.throttled_periods_total, share.throttled_seconds_total) == (8.0, 30, 2.5)
    assert isinstance(share.pressure_ratio, Absent)
    assert share.pressure_ratio.why is Why.NOT_SUPPORTED


@pytest.mark.parametrize("limit", [{"cpu.max": "max 100000\n"}, {}], ids=["max", "no controller"])
def test_no_quota_is_told_as_such(root: Root, limit: dict[str, str]) -> None:
    root.engine()
    for name, text in limit.items():
        root.put(f"sys/fs/cgroup/system.slice/vllm.service/{name}", text)
    share = share_of(root)
    assert isinstance(share.quota_cores, Absent)
    assert share.quota_cores.why is Why.NOT_PRESENT
    assert "quota" in share.quota_cores.detail


def test_a_group_outside_of_what_is_shown_is_not_looked_for(root: Root) -> None:
    root.engine(cgroup="/../../etc")
    assert "run on the host" in str(share_of(root).quota_cores)


def test_a_process_that_is_gone_is_said(root: Root) -> None:
    assert not known(share_of(root, 4711).quota_cores)


WORDS = st.one_of(st.text(max_size=60), st.from_regex(r"[-0-9 maxsome=.\n]{0,40}", fullmatch=True))


@given(texts=st.tuples(WORDS, WORDS, WORDS, WORDS))
def test_no_text_stops_the_visit(tmp_path_factory: pytest.TempPathFactory, texts: tuple[str, ...]) -> None:
    root = Root(tmp_path_factory.mktemp("root"))
    for name, text in zip(("cpu.max", "cpu.stat", "cpu.pressure"), texts[1:], strict=True):
        root.put(f"sys/fs/cgroup/a/{name}", text.encode("utf-8", "replace"))
    for cgroup in ("0::/a\n", texts[0]):
        root.put("proc/100/cgroup", cgroup.encode("utf-8", "replace"))
        assert isinstance(cpu_share(root.folder, 100), CpuShare)


def test_the_host_tells_it_for_each_engine_and_its_own_pressure(root: Root) -> None:
    root.engine()
    root.put("sys/fs/cgroup/system.slice/vllm.service/cpu.max", "200000 100000\n")
    root.put("sys/fs/cgroup/system.slice/vllm.service/cpu.stat", STAT.format(1, 0, 0))
    root.put("proc/pressure/cpu", PRESSURE)
    (root.folder / "sys/bus/pci/devices").mkdir(parents=True)
    engine = Engine(pid=100, started_at=1.0, kind="vllm")
    reading = HostState(root.folder).collect(Visit(at=2.0, engines=(engine,)))
    assert reading.engine_fields[engine.id]["cpu_share"].quota_cores == 2.0
    assert reading.fields["host"].cpu_pressure_ratio == 0.425
