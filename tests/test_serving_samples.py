"""Public log excerpts and live captures: the first finding is the diagnosis that the thread reached; health is no alarm."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from doctor.diagnose import watch
from doctor.feeds import evidence
from doctor.report import Report, Verdict
from rules import RULES

SAMPLES = Path(__file__).parent.parent.parent / "shared" / "samples"
if not SAMPLES.is_dir():
    pytest.skip("the samples are not beside this checkout", allow_module_level=True)

AT = 1795254000.0  # the day after the captures

ACCEPTED: dict[str, tuple[str, ...]] = {
    "nccl_timeout": ("nccl-timeout",),
    "nccl_error_after_cuda_fault": ("application-fault",),
    "nccl_remote_error": ("nccl-timeout", "engine-crashed"),
    "nccl_shm_too_small": ("shared-memory-too-small", "nccl-timeout"),
    "nccl_graph_capture_misuse": ("engine-crashed",),
    "nccl_invalid_usage": ("engine-crashed",),
    "nvls_multicast_failure": ("nvswitch-fabric-fault",),
    "fabric_manager_802": ("nvswitch-fabric-fault",),
    "xid_gpu_lost": ("gpu-lost",),
    "gpu_fault_launch_failure": ("application-fault",),
    "engine_dead_other": ("engine-crashed",),
    "pcie_fallback_custom_allreduce": ("pcie-fallback",),
    "symm_mem_pcie_crash": ("engine-crashed", "pcie-fallback"),
    "flashinfer_multicast_unsupported": ("engine-crashed", "pcie-fallback", "nvswitch-fabric-fault"),
    "peer_access_unsupported": ("p2p-blocked",),
    "fp8_not_engaged": ("fp8-not-engaged",),
    "fp8_block_alignment": ("fp8-block-misaligned",),
    "oom_startup": ("out-of-memory-at-startup",),
    "kv_cache_too_small": ("context-does-not-fit",),
    "kv_preemption": ("kv-cache-saturated",),
    "no_kernel_image": ("stack-mismatch",),
    "cuda_compat_lib_803": ("stack-mismatch",),
    "driver_too_old": ("stack-mismatch",),
    "driver_library_mismatch": ("stack-mismatch",),
    "world_size_gt_gpus": ("tp-exceeds-visible-gpus",),
    "tp_heads_mismatch": ("tp-heads-indivisible",),
    "shm_broadcast_stall": ("engine-stalled",),
    "mig_problem": ("mig-misconfigured",),
}
"""What each label of the public threads means in our words; a label that begins with `healthy` accepts no warning."""

LIVE = {
    "err_bad_config_json": "launch-refused",
    "err_batched_tokens": "launch-refused",
    "err_kv_blocks_override": "context-does-not-fit",
    "err_kvspace_gt_ram": "out-of-memory-at-startup",
    "err_max_model_len": "launch-refused",
    "err_model_path_missing": "launch-refused",
    "err_no_weights": "launch-refused",
    "err_port_busy": "launch-refused",
    "err_quant_fp8_cpu": "engine-crashed",
    "err_quant_mismatch": "quantization-mismatch",
    "err_tp4_two_cpus": "launch-refused",
    "err_tp_nondivisible": "tp-heads-indivisible",
    "err_truncated_weights": "launch-refused",
    "err_unknown_flag": "launch-refused",
    "err_unsupported_arch": "launch-refused",
    "kill9_enginecore": "engine-crashed",
    "orphan_after_enginecore_sigkill": "engine-crashed",
    "pp2_crash_keyerror": "engine-crashed",
    "tp2_kill9_worker": "worker-killed",
}

INDEX = [json.loads(line) for line in (SAMPLES / "serving" / "index.jsonl").read_text().splitlines()]
NO_EVIDENCE = {"011"}
"""Excerpts that hold no line of their diagnosis: 011 ends before the warning that its thread is about."""


def report_of(*files: Path) -> Report:
    return list(watch(evidence.read(files, now=AT), RULES, keep=3600))[-1]


def first_of(report: Report) -> str:
    return report.findings[0].finding.failure_mode if report.findings else report.verdict.value


def test_the_first_finding_is_the_diagnosis_of_the_thread() -> None:
    have = {rule.id for rule in RULES}
    table: Counter[tuple[str, str, bool]] = Counter()
    for sample in INDEX:
        label = sample["label"]
        if label.startswith("healthy") or sample["id"] in NO_EVIDENCE:
            continue
        first = first_of(report_of(SAMPLES / "serving" / sample["file"]))
        table[label, first, first in ACCEPTED[label]] += 1
    for (label, first, right), count in sorted(table.items()):
        judged = "" if set(ACCEPTED[label]) & have else "  (no rule yet)"
        print(f"{'ok ' if right else 'NOT'} {count} {label:34} -> {first}{judged}")
    scored = {key: n for key, n in table.items() if set(ACCEPTED[key[0]]) & have}
    right = sum(n for key, n in scored.items() if key[2])
    total = sum(scored.values())
    print(f"{right} of {total} right")
    assert right >= 0.9 * total


@pytest.mark.parametrize("sample", [s for s in INDEX if s["label"].startswith("healthy")], ids=lambda s: s["id"])
def test_a_healthy_excerpt_raises_no_alarm(sample: dict[str, str]) -> None:
    report = report_of(SAMPLES / "serving" / sample["file"])
    assert report.verdict in (Verdict.CLEAR, Verdict.NOTICE), [f.finding.summary for f in report.findings]


def is_healthy(name: str) -> bool:
    return (
        "normal" in name
        or name.startswith("ok_")
        or name in ("term_drain", "debug_logs", "apiservers2", "tp2_stall_worker_resume")
    )


RUNS = sorted(path.parent for path in (SAMPLES / "live").glob("v*/*/server.log"))


@pytest.mark.parametrize("run", [r for r in RUNS if is_healthy(r.name)], ids=lambda r: r.name)
def test_a_healthy_run_raises_no_alarm(run: Path) -> None:
    report = report_of(run / "server.log")
    assert report.verdict in (Verdict.CLEAR, Verdict.NOTICE), [f.finding.summary for f in report.findings]


@pytest.mark.parametrize("run", [r for r in RUNS if r.name in LIVE], ids=lambda r: r.name)
def test_a_broken_run_is_called_by_its_name(run: Path) -> None:
    expected = LIVE[run.name]
    if expected not in {rule.id for rule in RULES}:
        pytest.skip(f"no rule {expected} yet")
    report = report_of(run / "server.log")
    assert first_of(report) == expected, [f.finding.summary for f in report.findings]


def test_every_live_run_is_expected_to_be_something() -> None:
    assert {run.name for run in RUNS if not is_healthy(run.name)} <= set(LIVE)
