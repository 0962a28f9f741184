"""Runbooks: what a person reads at three in the morning has the same shape each time, and its advice can be done."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.readers import runbook
from doctor.rule import AnyRule
from rules import RULES


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.id)
def test_a_runbook_has_its_rule_s_title_and_every_heading_in_order(rule: AnyRule) -> None:
    assert rule.runbook.title == rule.title
    assert tuple(rule.runbook.sections) == runbook.HEADINGS
    assert all(rule.runbook.sections.values())


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.id)
def test_the_advice_is_there_and_names_something_to_run_or_set(rule: AnyRule) -> None:
    advice = rule.runbook.advice({})
    assert 1 <= len(advice) <= 3
    assert any("`" in line for line in advice)


@pytest.mark.parametrize("rule", RULES, ids=lambda r: r.id)
def test_what_a_rule_explains_and_names_exists(rule: AnyRule) -> None:
    """A failure mode of the map that has no rule yet may be named; a slip of the pen may not."""
    planned = {"gpu-memory-held"}
    assert set(rule.explains) <= {r.id for r in RULES} | planned


def test_an_item_goes_on_over_indented_lines_and_ends_at_a_paragraph() -> None:
    text = "# T\n\n## Fix\n\n1. one\n   goes on\n2. two\n\nNot an item.\n3. no more\n"
    assert runbook.read(text).advice({}) == ("one goes on", "two")


def test_placeholders_are_filled_where_the_finding_tells() -> None:
    text = "# T\n\n## Fix\n\n- reset <gpu-index> at <pci-address>\n"
    assert runbook.read(text).advice({"gpu-index": "3"}) == ("reset 3 at <pci-address>",)


def test_a_heading_inside_a_fence_is_no_heading() -> None:
    assert tuple(runbook.read("# T\n\n## Fix\n\n```\n## not this\n```\n").sections) == ("Fix",)


@given(st.text(max_size=300))
@settings(max_examples=200, deadline=None)
def test_no_text_raises(text: str) -> None:
    assert len(runbook.read(text).advice({})) <= 3
