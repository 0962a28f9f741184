"""The compatibility table against its source, and what becomes of it: versions that go together, and that do not."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import msgspec
import nodes
import pytest
from hypothesis import given
from hypothesis import strategies as st
from roots import Root

from doctor.collectors.collector import Visit
from doctor.collectors.stack import Versions
from doctor.rule import Finding, Severity
from doctor.snapshot import Absent, Engine, Snapshot, known
from rules import stack_mismatch
from rules.tables.known_bugs import KNOWN_BUGS
from rules.tables.stacks import admits_python, cuda_release, engine_release, numbers, own_release

REFERENCE = Path(__file__).parent.parent.parent / "shared" / "reference"
TABLE = Path(__file__).parent.parent / "rules" / "tables" / "stack_compatibility.toml"
HAVE = pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference material is not here")

COLUMNS = {
    "version": "vllm_version",
    "torch": "torch_pin",
    "cuda": "torch_pypi_cuda",
    "wheel_cuda": "vllm_wheel_cuda_build",
    "image_cuda": "docker_image_cuda",
    "nccl": "nccl_from_torch_pin",
    "image_nccl": "nccl_docker_override",
    "driver_min": "min_driver_linux_x86_64",
    "capability_min": "min_compute_capability",
    "python": "python_requires",
}
"""Column of the table → column of its source, where a cell is the same text."""


def rows(name: str) -> list[dict[str, str]]:
    with (REFERENCE / name).open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def table(name: str) -> list[dict[str, Any]]:
    return msgspec.toml.decode(TABLE.read_bytes())[name]


# The table


@HAVE
def test_every_cell_of_a_release_is_that_of_its_source() -> None:
    ours, theirs = table("vllm"), rows("stack_compatibility.csv")
    assert [row["version"] for row in ours] == [row["vllm_version"] for row in theirs]
    for mine, source in zip(ours, theirs, strict=True):
        for column, theirs_column in COLUMNS.items():
            assert mine.get(column, "") == source[theirs_column], (mine["version"], column)
        wheel = source["cmake_arch_lists"].partition("|")[0].strip()
        assert mine["architectures"] == [each for each in wheel.split(";") if each], mine["version"]
        assert mine["released"] == source["sdist_date"].split()[0], mine["version"]


@HAVE
def test_every_cell_of_a_cuda_release_is_that_of_its_source() -> None:
    theirs = {row["cuda"]: row for row in rows("cuda_drivers.csv") if "x" not in row["cuda"]}
    assert {row["version"] for row in table("cuda")} == set(theirs)
    for row in table("cuda"):
        source = theirs[row["version"]]
        assert row["driver_of_toolkit"] == source["toolkit_driver_linux_x86_64"]
        assert row["driver_min"] == source["min_driver_minor_version_compat"]


def test_the_rows_agree_among_each_other() -> None:
    for row in table("vllm"):
        cuda = cuda_release(row["cuda"])
        assert cuda is not None
        assert cuda.driver_min == row["driver_min"], row["version"]
        assert row["source"]
    versions = [numbers(row["version"]) for row in table("vllm")]
    assert versions == sorted(versions)


def test_a_release_is_looked_up_exactly_or_by_the_newest_before_it() -> None:
    assert own_release("0.22.1") is not None
    assert own_release("0.22.1+cu129") is None
    assert own_release("0.22.2.dev3") is None
    nearest = engine_release("0.22.2")
    assert nearest is not None
    assert nearest.version == "0.22.1"
    assert engine_release("0.99.0") is None
    unread = cuda_release("13.7")
    assert unread is not None
    assert unread.driver_min == "580.65.06"


@pytest.mark.parametrize(
    ("specifier", "version", "admitted"),
    [
        ("<3.13,>=3.9", "3.12.4", True),
        ("<3.13,>=3.9", "3.13.0", False),
        (">=3.10,<3.14", "3.9", False),
        (">=3.8", "3.8", True),
        (">=3.8", "unknown", True),
    ],
)
def test_what_a_wheel_asks_of_python(specifier: str, version: str, admitted: bool) -> None:
    assert admits_python(specifier, version) is admitted


@given(st.text(max_size=40), st.text(max_size=40))
def test_no_version_raises(one: str, other: str) -> None:
    numbers(one)
    admits_python(one, other)
    engine_release(one)
    cuda_release(one)


def test_every_known_bug_has_a_thread_and_a_release_without_it() -> None:
    for bug in KNOWN_BUGS:
        assert bug.source
        assert numbers(bug.since) < numbers(bug.fixed)
        assert not bug.is_in(bug.fixed)
        assert not bug.is_in("no version")


# What does not go together


def starting(profile: str = "hgx-h100-8", **changes: Any) -> tuple[Snapshot, ...]:
    """Return visits of an engine that starts: no page, no line."""

    def change(snapshot: Snapshot) -> Snapshot:
        driver = changes.pop("driver", None) or "580.95.05"
        snapshot = nodes.put(
            snapshot,
            metrics=(),
            engine_events=(),
            host__driver_module=driver,
            stack__driver=driver,
            stack__nvml=f"13.{driver}",
            stack__cuda_driver="13.0",
        )
        return nodes.with_engine(snapshot, **{f"stack__{name}": value for name, value in changes.items()})

    return (change(nodes.healthy(profile, visits=1)[0]),)


def found(profile: str = "hgx-h100-8", **changes: Any) -> tuple[Finding, ...]:
    return nodes.found(stack_mismatch.RULE, starting(profile, **changes))


def test_the_release_as_it_comes_fits() -> None:
    assert found() == ()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"torch": "2.9.1+cu130"}, "PyTorch 2.9.1 is installed, and vLLM 0.22.1 is built against 2.11.0"),
        ({"nccl": "2.21.5"}, "NCCL 2.21.5 is installed"),
        ({"python": "3.9.18"}, "needs Python <3.15,>=3.10"),
    ],
)
def test_what_a_release_pins_and_does_not_find_is_a_warning(changes: dict[str, str], words: str) -> None:
    (finding,) = found(**changes)
    assert words in finding.summary
    assert finding.severity is Severity.WARNING


@pytest.mark.parametrize(
    "changes",
    [
        {"torch": "2.11.3+cu130"},
        {"torch": "2.9.0a0+nv25.10"},
        {"nccl": "2.31.2"},
        {"nccl": "2.28.3"},
        {"engine": "0.22.1+local", "torch": "2.9.1"},
        {"engine": "0.22.2.dev7", "torch": "2.9.1", "python": "3.9.18"},
    ],
    ids=["patch", "vendor's build", "newer NCCL", "patch of NCCL", "own build", "development"],
)
def test_what_only_looks_like_a_wrong_pin(changes: dict[str, str]) -> None:
    assert found(**changes) == ()


def test_a_gpu_newer_than_the_wheel_has_no_kernels_in_it() -> None:
    visits = starting(engine="0.7.3", torch="2.5.1", torch_cuda="12.4", nccl="2.21.5", python="3.12.1")
    blackwell = nodes.each(visits, lambda s: nodes.with_gpu(s, range(8), compute_capability=(10, 0)))
    (finding,) = nodes.found(stack_mismatch.RULE, blackwell)
    assert "compute capability 10.0, newer than any that vLLM 0.7.3" in finding.summary
    assert nodes.found(stack_mismatch.RULE, visits) == ()


@pytest.mark.parametrize(("driver", "fits"), [("525.60.13", True), ("525.53", False), ("570.86.10", True)])
def test_the_floor_of_minor_version_compatibility(driver: str, fits: bool) -> None:
    older = {"engine": "0.19.1", "torch": "2.10.0", "torch_cuda": "12.8", "nccl": "2.27.5"}
    assert (found(driver=driver, **older) == ()) is fits


def test_forward_compatibility_carries_data_center_gpus_only() -> None:
    assert found(driver="550.54.15", cuda_compat="580.95.05") == ()
    assert found(driver="550.54.15", cuda_compat="575.57.08") != ()  # older than CUDA 13 needs
    (finding,) = found("rtx4090-4", driver="550.54.15", cuda_compat="580.95.05")
    assert "does not work on NVIDIA GeForce RTX 4090" in finding.summary


# Reading it


@pytest.mark.parametrize("folder", ["usr/local/cuda/compat", "usr/local/cuda-13.0/compat"])
def test_the_compatibility_library_of_an_engine_is_read(tmp_path: Path, folder: str) -> None:
    root = Root(tmp_path)
    root.engine()
    root.put("opt/e/lib/python3.12/site-packages/vllm-0.22.1.dist-info/METADATA", "")
    root.put(f"{folder}/libcuda.so.580.95.05", "")
    root.put(f"{folder}/libcuda.so.1", "")
    if "13.0" in folder:
        root.link("usr/local/cuda", "/usr/local/cuda-13.0")
    engine = Engine(pid=100, started_at=1.0, kind="vllm", command_line=("/opt/e/bin/python3", "/opt/e/bin/vllm"))
    stack = Versions(tmp_path).collect(Visit(at=1.0, engines=(engine,))).engine_fields[engine.id]["stack"]
    assert stack.cuda_compat == "580.95.05"
    assert known(stack.engine)


def test_an_engine_without_one_says_so(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.engine()
    root.put("opt/e/lib/python3.12/site-packages/vllm-0.22.1.dist-info/METADATA", "")
    engine = Engine(pid=100, started_at=1.0, kind="vllm", command_line=("/opt/e/bin/python3", "/opt/e/bin/vllm"))
    stack = Versions(tmp_path).collect(Visit(at=1.0, engines=(engine,))).engine_fields[engine.id]["stack"]
    assert isinstance(stack.cuda_compat, Absent)
