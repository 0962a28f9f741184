"""A collect-env report of either layout gives versions, GPUs, topology and environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.readers import collect_env
from doctor.snapshot import Absent, Why, known, or_none

SAMPLES = Path(__file__).parent.parent.parent / "shared" / "samples"
needs_samples = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="the folder of public samples is not beside the checkout"
)

FLAT = """\
PyTorch version: 2.6.0+cu124
CUDA used to build PyTorch: 12.4

OS: Ubuntu 22.04.4 LTS (x86_64)
Python version: 3.12.9 (main, Feb  5 2025, 08:49:00) [GCC 11.4.0] (64-bit runtime)
Python platform: Linux-5.15.0-47-generic-x86_64-with-glibc2.35
CUDA runtime version: Could not collect
GPU models and configuration:
GPU 0: NVIDIA H100 80GB HBM3
  MIG 1g.18gb     Device  0:
  MIG 1g.18gb     Device  1:
GPU 1: NVIDIA H100 80GB HBM3

Nvidia driver version: 550.90.07
Architecture:                       x86_64
Hypervisor vendor:                  KVM

Versions of relevant libraries:
[pip3] nvidia-nccl-cu12==2.21.5
[conda] Could not collect
vLLM Version: 0.6.0@COMMIT_HASH_PLACEHOLDER
vLLM Build Flags:
CUDA Archs: Not Set; ROCm: Disabled; Neuron: Disabled
GPU Topology:
GPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID
GPU0\t X \tNV18\t0-47\t0\t\tN/A
GPU1\tNV18\t X \t0-47\t0\t\tN/A

Legend:

  X    = Self

CUDA_VISIBLE_DEVICES=0,1
NCCL_DEBUG=INFO
"""


def index() -> list[dict[str, object]]:
    path = SAMPLES / "collect_env" / "index.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def text_of(name: str) -> str:
    return (SAMPLES / name).read_text(encoding="utf-8", errors="replace")


@needs_samples
@pytest.mark.parametrize("row", index(), ids=lambda row: str(row["file"]))
def test_every_public_report_gives_what_its_index_says(row: dict[str, object]) -> None:
    text = text_of(f"collect_env/{row['file']}")
    ((start, end),) = collect_env.find(text)
    environment = collect_env.read(text[start:end])
    version = str(row["vllm"]).partition("@")[0]
    assert (or_none(environment.engine_stack.engine) or "N/A") == version
    assert or_none(environment.engine_stack.torch) == row["torch"]
    assert (or_none(environment.stack.driver) or "Could") == row["driver"]
    assert {gpu.name for gpu in environment.gpus} == ({row["gpu_model"]} if row["gpu_model"] else set())
    assert len(environment.gpus) == (row["gpus"] if row["gpu_model"] else 0)
    assert (environment.topology is not None) == bool(row["links"])


@needs_samples
def test_the_report_of_a_machine_without_gpus_has_none() -> None:
    environment = collect_env.read(text_of("live/v0.32.0/collect_env.txt"))
    assert environment.gpus == ()
    assert environment.topology is None
    assert environment.engine_stack.engine == "0.32.0"
    assert environment.environment["VLLM_WORKER_MULTIPROC_METHOD"] == "spawn"


def test_a_flat_report_is_read_whole() -> None:
    report = collect_env.read(FLAT)
    stack, engine = report.stack, report.engine_stack
    assert (stack.driver, stack.kernel, stack.os) == ("550.90.07", "5.15.0-47-generic", "Ubuntu 22.04.4 LTS (x86_64)")
    assert (engine.engine, engine.torch, engine.torch_cuda) == ("0.6.0", "2.6.0+cu124", "12.4")
    assert (engine.nccl, engine.python) == ("2.21.5", "3.12.9")
    assert isinstance(stack.cuda_toolkit, Absent)
    assert stack.cuda_toolkit.why is Why.FAILED
    assert report.environment == {"CUDA_VISIBLE_DEVICES": "0,1", "NCCL_DEBUG": "INFO"}
    assert report.virtual_machine is True
    first, second = report.gpus
    assert known(first.mig.devices)
    assert [device.profile for device in first.mig.devices] == ["1g.18gb", "1g.18gb"]
    assert not known(second.mig.devices)
    assert report.topology is not None
    assert report.topology.cell("GPU0", "GPU1") == "NV18"


def test_colours_of_a_terminal_are_no_part_of_a_name() -> None:
    plain = "PyTorch version: 2.8.0\nGPU models and configuration: \nGPU 0: NVIDIA L40S\n"
    coloured = "PyTorch version: \x1b[32m2.8.0\x1b[0m\nGPU models and configuration: \nGPU 0: NVIDIA L40S\x1b[0m\n"
    assert collect_env.read(coloured) == collect_env.read(plain)
    assert collect_env.read(plain).gpus[0].name == "NVIDIA L40S"


def test_a_report_ends_where_other_text_begins() -> None:
    text = "I see this:\n" + FLAT + "\n### How to reproduce\nvllm serve x\n"
    ((start, end),) = collect_env.find(text)
    assert text[start:end] == FLAT


def test_two_reports_in_one_text_are_two() -> None:
    assert len(list(collect_env.find(FLAT + "```\nand the other node:\n" + FLAT))) == 2


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300), st.integers(0, len(FLAT)), st.integers(0, len(FLAT)))
def test_no_text_raises_nor_any_piece_of_a_report(noise: str, start: int, end: int) -> None:
    text = FLAT[:start] + noise + FLAT[end:]
    collect_env.read(text)
    for first, last in collect_env.find(text):
        assert 0 <= first < last <= len(text)
