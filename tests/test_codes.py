"""`gpu-doctor explain xid-79`: what is known of one code, for a person."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from doctor.cli import cli
from exporters.codes import code_screen, codes_markdown
from rules.tables.sxids import SXIDS
from rules.tables.xids import XIDS


def explained(name: str) -> str:
    result = CliRunner().invoke(cli, ["explain", name])
    assert result.exit_code == 0, result.output
    return result.output


def test_an_xid_is_explained_with_its_action_its_failure_mode_and_its_sources() -> None:
    screen = explained("xid-79")
    assert "The GPU has fallen off the bus" in screen
    assert "NVIDIA's action    reboot" in screen
    assert "gpu-doctor explain gpu-lost" in screen
    assert "nverror.h" in screen
    assert explained("Xid 79") == screen


def test_who_differs_is_told() -> None:
    assert "k8s-device-plugin: unhealthy" in explained("xid-94")


def test_an_sxid_is_explained() -> None:
    assert "may be fatal" in explained("sxid-20034")


def test_a_code_that_nobody_knows_is_said_to_be_unknown() -> None:
    assert "know this code" in " ".join(explained("xid-4711").split())


def test_what_is_no_code_is_still_looked_for_among_the_failure_modes() -> None:
    result = CliRunner().invoke(cli, ["explain", "gpu-lsot"])
    assert result.exit_code != 0
    assert "did you mean gpu-lost" in result.output


@pytest.mark.parametrize("name", [*(f"xid-{code}" for code in XIDS), *(f"sxid-{code}" for code in SXIDS)])
def test_every_row_of_the_tables_has_a_screen_of_lines_that_fit(name: str) -> None:
    screen = code_screen(name)
    assert screen is not None
    assert all(len(line) <= 80 for line in screen.splitlines())


def test_the_page_has_every_xid() -> None:
    page = codes_markdown("../rules/")
    assert all(f"| {code} | " in page or f"- {code} `" in page for code in XIDS)
