"""What the documentation says about the code is what the code says."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def generator() -> object:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs" / "generate.py")
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATED = dict(generator().generated())  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", GENERATED)
def test_a_generated_file_is_up_to_date(name: str) -> None:
    assert (ROOT / name).read_text(encoding="utf-8") == GENERATED[name], "run: make docs"


def test_the_picture_is_of_a_real_run() -> None:
    drawn = (ROOT / "docs" / "terminal.svg").read_text(encoding="utf-8").replace("\u00a0", " ")
    assert "$ gpu-doctor check --simulate" in drawn
    assert "CRITICAL" in drawn
    assert "\x1b" not in drawn


def test_no_page_says_to_install_another_project() -> None:
    """The registry's `gpu-doctor` is not ours."""
    for page in (*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("rules/*.md")):
        assert not re.search(r"pip3? install gpu-doctor", page.read_text(encoding="utf-8")), page


LINK = re.compile(r"\]\((?!https?:)([^)#\s]+)")


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md", "docs/failure-modes.md", "docs/xids.md"]
)
def test_links_lead_somewhere(page: str) -> None:
    path = ROOT / page
    for target in LINK.findall(path.read_text(encoding="utf-8")):
        assert (path.parent / target).exists(), f"{page}: {target}"


def test_every_command_of_the_readme_exists() -> None:
    from doctor.cli import cli

    named = set(re.findall(r"^gpu-doctor ([\w-]+)", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE))
    assert named
    assert named <= set(cli.commands)
