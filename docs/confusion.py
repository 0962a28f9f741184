"""Score the public samples: what was expected of each, and what the first finding named.

The samples are no part of the repository. Where their folder is not beside the checkout, nothing is scored.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from doctor.diagnose import watch
from doctor.feeds import evidence
from doctor.report import Report, Verdict
from rules import RULES

SAMPLES = Path(__file__).resolve().parent.parent.parent / "shared" / "samples"
AT = 1795254000.0
"""The day after the captures, Unix seconds: it gives stamps without a year theirs."""

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
"""What each live run is to be called; the others are healthy, see `is_healthy`."""

NO_EVIDENCE = {"011"}
"""Excerpts that hold no line of their diagnosis: 011 ends before the warning that its thread is about."""

HEALTHY = "healthy"


def report_of(*files: Path) -> Report:
    """Return the last report on what the files show."""
    return list(watch(evidence.read(files, now=AT), RULES, keep=3600))[-1]


def first_of(report: Report) -> str:
    """Return the failure mode of the first finding, else the verdict."""
    return report.findings[0].finding.failure_mode if report.findings else report.verdict.value


def is_quiet(report: Report) -> bool:
    """Whether nothing in it is more than a notice."""
    return report.verdict in (Verdict.CLEAR, Verdict.NOTICE)


def is_healthy(run: str) -> bool:
    """Whether a live run of this name is one that nothing is wrong with."""
    return (
        "normal" in run
        or run.startswith("ok_")
        or run in ("term_drain", "debug_logs", "apiservers2", "tp2_stall_worker_resume")
    )


def excerpts() -> Iterator[tuple[str, str, Path]]:
    """Yield id, label and file of each public excerpt."""
    for line in (SAMPLES / "serving" / "index.jsonl").read_text(encoding="utf-8").splitlines():
        sample = json.loads(line)
        yield sample["id"], sample["label"], SAMPLES / "serving" / sample["file"]


def runs() -> list[Path]:
    """Return the folder of each live run."""
    return sorted(path.parent for path in (SAMPLES / "live").glob("v*/*/server.log"))


Outcome = tuple[str, tuple[str, ...], str, bool]
"""Label, accepted names, the name that was given, and whether it was right."""


def serving() -> Iterator[Outcome]:
    """Yield what became of each excerpt of an engine that something was wrong with."""
    for name, label, file in excerpts():
        if label.startswith(HEALTHY) or name in NO_EVIDENCE:
            continue
        first = first_of(report_of(file))
        yield label, ACCEPTED[label], first, first in ACCEPTED[label]


def live() -> Iterator[Outcome]:
    """Yield what became of each live run that something was wrong with."""
    for run in runs():
        if not is_healthy(run.name):
            first = first_of(report_of(run / "server.log"))
            yield LIVE[run.name], (LIVE[run.name],), first, first == LIVE[run.name]


def quiet() -> Iterator[tuple[str, str]]:
    """Yield where each healthy sample is from, and the verdict on it."""
    for _, label, file in excerpts():
        if label.startswith(HEALTHY):
            yield "public excerpts", report_of(file).verdict.value
    for run in runs():
        if is_healthy(run.name):
            yield "live runs", report_of(run / "server.log").verdict.value


def page() -> str | None:
    """Return the page with the confusion tables, or None where the samples are missing."""
    if not SAMPLES.is_dir():
        return None
    verdicts = Counter(quiet())
    alarms = sum(n for (_, verdict), n in verdicts.items() if verdict not in ("clear", "notice"))
    total = sum(verdicts.values())
    columns = sorted({verdict for _, verdict in verdicts})
    rows = [
        [where, *(str(verdicts[where, column] or "") for column in columns)]
        for where in sorted({where for where, _ in verdicts})
    ]
    return (
        "# Confusion\n\nGenerated by `make docs` where the samples are beside the checkout, and kept where they are not. Rows: what a\n"
        "sample deserves. Columns: the failure mode of the first finding. **Bold** is right; some classes accept two names.\n\n"
        f"## Public excerpts of engines' logs\n\n{_matrix(list(serving()))}\n"
        f"## Live runs\n\n{_matrix(list(live()))}\n"
        f"## Healthy samples\n\nNot more than a notice: {total - alarms} of {total}.\n\n{_table(['from', *columns], rows)}"
    )


def _matrix(outcomes: list[Outcome]) -> str:
    counts = Counter((label, first) for label, _, first, _ in outcomes)
    right_names = {(label, first) for label, _, first, right in outcomes if right}
    names = sorted({first for _, first in counts})
    labels = sorted({label for label, _ in counts})
    right = sum(right for *_, right in outcomes)

    def cell(label: str, name: str) -> str:
        count = counts[label, name]
        if not count:
            return ""
        return f"**{count}**" if (label, name) in right_names else str(count)

    rows = [[f"`{label}`", *(cell(label, name) for name in names)] for label in labels]
    rows.append(["all", *(str(sum(counts[label, name] for label in labels)) for name in names)])
    return f"Right: {right} of {len(outcomes)}.\n\n{_table(['expected', *(f'`{name}`' for name in names)], rows)}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
