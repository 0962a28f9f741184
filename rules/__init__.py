"""The failure modes: one module a rule, with its runbook beside it under the same stem."""

from __future__ import annotations

from doctor.rule import AnyRule
from rules import (
    cooling_insufficient,
    driver_unresponsive,
    gpu_lost,
    mig_misconfigured,
    nvlink_degraded,
    nvswitch_fabric_fault,
    pcie_fallback,
    power_transient,
    tp_single_stream_stall,
)

RULES: tuple[AnyRule, ...] = (
    pcie_fallback.RULE,
    nvlink_degraded.RULE,
    nvswitch_fabric_fault.RULE,
    tp_single_stream_stall.RULE,
    cooling_insufficient.RULE,
    power_transient.RULE,
    mig_misconfigured.RULE,
    gpu_lost.RULE,
    driver_unresponsive.RULE,
)
"""Every rule, explicit, one line a rule; `gpu-doctor rules` lists them in this order."""
