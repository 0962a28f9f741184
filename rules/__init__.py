"""The failure modes: one module a rule, with its runbook beside it under the same stem."""

from __future__ import annotations

from doctor.rule import AnyRule

RULES: tuple[AnyRule, ...] = ()
"""Every rule, explicit, one line a rule; `gpu-doctor rules` lists them in this order."""
