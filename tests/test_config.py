"""The site's configuration: limits are laid over the rules', unknown names are errors that name their place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from doctor import config
from doctor.history import History
from doctor.rule import Finding, Rule, Severity
from doctor.snapshot import Source


class Limits(msgspec.Struct, frozen=True):
    window_seconds: float = 60.0
    most: int = 3


def judgement(history: History, limits: Limits) -> Iterator[Finding]:
    yield from ()


RULE = Rule(judgement, id="a-rule", title="A", severity=Severity.CRITICAL, needs=(), explains=("x",), limits=Limits())


def site(tmp_path: Path, text: str) -> config.Site:
    path = tmp_path / "site.toml"
    path.write_text(text)
    return config.read(path)


def test_a_site_changes_a_limit_and_leaves_the_others(tmp_path: Path) -> None:
    (rule,) = config.lay_over([RULE], site(tmp_path, "[rules.a-rule]\nwindow_seconds = 5\nseverity = 'warning'"))
    assert rule.limits == Limits(window_seconds=5.0)
    assert (rule.severity, rule.id, rule.explains) == (Severity.WARNING, "a-rule", ("x",))
    assert RULE.limits == Limits()


def test_a_site_can_switch_a_rule_off(tmp_path: Path) -> None:
    (rule,) = config.lay_over([RULE], site(tmp_path, "[rules.a-rule]\nenabled = false"))
    assert not rule.enabled
    assert RULE.enabled


def test_optional_sources_go_by_their_names(tmp_path: Path) -> None:
    assert site(tmp_path, "optional = ['kernel-log']").optional == (Source.KERNEL_LOG,)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("nonsense = 1", "there is no setting `nonsense`"),
        ("optional = ['moon']", "moon"),
        ("rules = 'all'", r"Expected `object`, got `str` - at `\$.rules`"),
        ("[engine]\nlog = ['x']", r"there is no setting `log` - at `\$\.engine`"),
        ("= broken", "site.toml"),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_place(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(config.ConfigError, match=says) as error:
        site(tmp_path, text)
    assert "site.toml" in str(error.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[rules.b-rule]\nmost = 1", r"\[rules\.b-rule\]: there is no such rule"),
        ("[rules.a-rule]\nleast = 1", r"\[rules\.a-rule\] least: .*it has window_seconds, most"),
        ("[rules.a-rule]\nmost = 'many'", r"\[rules\.a-rule\]: Expected `int`"),
        ("[rules.a-rule]\nseverity = 'dire'", r"severity: 'dire' is none of notice, warning, critical"),
    ],
)
def test_a_wrong_rule_section_is_refused_with_its_place(tmp_path: Path, text: str, says: str) -> None:
    with pytest.raises(config.ConfigError, match=says):
        config.lay_over([RULE], site(tmp_path, text))


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_bytes(b"\xff\x00")
    with pytest.raises(config.ConfigError, match=r"site\.toml"):
        config.read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match=r"none\.toml: can't be read: No such file"):
        config.read(tmp_path / "none.toml")
