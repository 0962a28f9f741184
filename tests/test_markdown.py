"""The report as a ticket."""

from __future__ import annotations

import golden
import pytest
import reports

from exporters import markdown


@pytest.mark.parametrize("name", ["lost_gpu", "links_down", "no_driver", "hostile"])
def test_a_ticket_is_as_it_was_approved(name: str) -> None:
    golden.check(f"{name}.md", markdown.render(reports.ALL[name]()))


def test_a_ticket_tells_the_root_cause_first_and_the_versions() -> None:
    ticket = markdown.render(reports.lost_gpu())
    assert ticket.startswith("# Critical: A GPU has fallen off the bus")
    assert ticket.index("(`gpu-lost`)") < ticket.index("### Consequence: A collective operation timed out")
    assert "driver 580.65.06" in ticket
    assert "vllm 0.11.0, PyTorch 2.8.0+cu128, NCCL 2.27.3" in ticket


def test_text_from_a_log_can_not_end_its_fence_or_become_markup() -> None:
    ticket = markdown.render(reports.hostile())
    fences = [line for line in ticket.splitlines() if line.startswith("`````")]
    assert fences == ["`````text", "`````"], "a fence longer than any run of backquotes within"
    outside = ticket.partition(fences[0])[0]
    assert "<b>" not in outside.replace("\\<b\\>", "")
    assert all(line.isprintable() for line in ticket.splitlines())


def test_names_of_fields_stay_readable() -> None:
    assert markdown.prose("GPU_IS_LOST and _this_ *that*") == r"GPU_IS_LOST and \_this\_ \*that\*"


def test_a_placeholder_that_was_not_filled_in_stays_visible() -> None:
    assert markdown.advice_of("Reset <gpu-index>: `nvidia-smi -i <gpu-index>`") == (
        r"Reset \<gpu-index>: `nvidia-smi -i <gpu-index>`"
    )
