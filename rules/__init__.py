"""The failure modes: one module a rule, with its runbook beside it under the same stem."""

from __future__ import annotations

from doctor.rule import AnyRule
from rules import (
    application_fault,
    context_does_not_fit,
    cooling_insufficient,
    driver_unresponsive,
    engine_crashed,
    engine_stalled,
    fp8_block_misaligned,
    fp8_not_engaged,
    gpu_lost,
    launch_refused,
    mig_misconfigured,
    nccl_timeout,
    nvlink_degraded,
    nvswitch_fabric_fault,
    out_of_memory_at_startup,
    pcie_fallback,
    power_transient,
    quantization_mismatch,
    stack_mismatch,
    tp_exceeds_visible_gpus,
    tp_heads_indivisible,
    tp_single_stream_stall,
)

RULES: tuple[AnyRule, ...] = (
    pcie_fallback.RULE,
    nvlink_degraded.RULE,
    nvswitch_fabric_fault.RULE,
    nccl_timeout.RULE,
    engine_stalled.RULE,
    tp_single_stream_stall.RULE,
    tp_heads_indivisible.RULE,
    tp_exceeds_visible_gpus.RULE,
    fp8_not_engaged.RULE,
    fp8_block_misaligned.RULE,
    quantization_mismatch.RULE,
    out_of_memory_at_startup.RULE,
    context_does_not_fit.RULE,
    cooling_insufficient.RULE,
    power_transient.RULE,
    stack_mismatch.RULE,
    mig_misconfigured.RULE,
    gpu_lost.RULE,
    driver_unresponsive.RULE,
    application_fault.RULE,
    engine_crashed.RULE,
    launch_refused.RULE,
)
"""Every rule, explicit, one line a rule; `gpu-doctor rules` lists them in this order."""
