"""The site's configuration: limits are laid over the rules', unknown names are errors that name their place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from doctor import config
from doctor.cli import cli
from doctor.history import History
from doctor.rule import Finding, Rule, Severity
from doctor.snapshot import Source
from exporters import catalogue
from rules import RULES


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


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("until = 2027-01-01", r"missing required field `reason` - at `\$\.silence\[0\]`"),
        ("reason = 'x'", r"missing required field `until` - at `\$\.silence\[0\]`"),
        ("reason = ' '\nuntil = 2027-01-01", r"at `\$\.silence\[0\]\.reason`"),
        ("reason = 'x'\nuntil = 2027-01-01T10:00:00", r"does not tell its zone.* at `\$\.silence\[0\]\.until`"),
        ("reason = 'x'\nuntil = 10:00:00", r"is no date.* at `\$\.silence\[0\]\.until`"),
        ("reason = 'x'\nuntil = 'tomorrow'", r"'tomorrow' is no date"),
        ("reason = 'x'\nuntil = '2027-02-30'", r"'2027-02-30' is no date"),
        ("reason = 'x'\nuntil = 4000000000", r"4000000000 is no date"),
        ("reason = 'x'\nuntil = 2027-01-01\ngpu = 2", r"there is no setting `gpu` - at `\$\.silence\[0\]`"),
        ("reason = 'x'\nuntil = 2027-01-01\ngpus = [1.5]", r"at `\$\.silence\[0\]\.gpus\[0\]`"),
    ],
)
def test_a_wrong_silence_is_refused_with_file_and_place(tmp_path: Path, more: str, says: str) -> None:
    with pytest.raises(config.ConfigError, match=says) as error:
        site(tmp_path, f"[[silence]]\nrule = 'a-rule'\n{more}")
    assert "site.toml" in str(error.value)


def test_a_silence_of_no_rule_is_refused_with_file_and_place(tmp_path: Path) -> None:
    wrong = site(tmp_path, "[[silence]]\nrule = 'b-rule'\nreason = 'x'\nuntil = 2027-01-01")
    with pytest.raises(config.ConfigError, match=r"site\.toml: \[\[silence\]\] 1, rule b-rule: there is no such rule"):
        config.lay_over([RULE], wrong)


@pytest.mark.parametrize(
    ("until", "ends"),
    [
        ("1970-01-01", 86_400.0),
        ("'1970-01-01'", 86_400.0),
        ("1970-01-01T01:00:00Z", 3600.0),
        ("1970-01-01T01:00:00+01:00", 0.0),
        ("'1970-01-01T00:00:30Z'", 30.0),
    ],
)
def test_a_date_means_its_whole_day_and_a_time_its_zone(tmp_path: Path, until: str, ends: float) -> None:
    declared = site(tmp_path, f"[[silence]]\nrule = 'a-rule'\nreason = 'x'\nuntil = {until}")
    assert declared.silence[0].until == ends


def test_a_wrong_log_pattern_is_refused_with_its_place(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match=r"repeats what repeats.* at `\$\.log_patterns\[0\]`"):
        site(
            tmp_path,
            "[[log_patterns]]\nid = 'x'\ntitle = 'x'\nsource = 'engine-log'\ntext = 'abcd'\npattern = '(a+)+'",
        )


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[collectors.stack]\ninterval_seconds = -1", "Expected `float` >= 0"),
        ("[collectors.nvml]\ndeadline_seconds = 2", "at least 5.5"),
        ("[collectors.nvml]\ndeadline_seconds = 3600", "Expected `float` <= 60"),
        ("[collectors.nvml]\ninterval_seconds = 30", "its counters would seem to stand still"),
        ("[collectors.recorder]\ndeadline_seconds = 1", "no collector reads it"),
        ("[collectors.nvlm]\ndeadline_seconds = 1", "'nvlm'"),
        ("[collectors.nvml]\ndeadline = 1", "there is no setting `deadline`"),
    ],
)
def test_a_pace_that_can_not_be_is_refused_with_its_place(text: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match=says) as e:
        site(tmp_path, text)
    assert "collectors" in str(e.value)
    assert "\n" not in str(e.value)


def test_the_example_of_the_documentation_is_read_and_fits_the_rules(tmp_path: Path) -> None:
    page = (Path(__file__).parent.parent / "docs" / "configuration.md").read_text(encoding="utf-8")
    example = page.partition("```toml\n")[2].partition("```")[0]
    read = site(tmp_path, example)
    for section in config.Sections.__struct_fields__:
        assert getattr(read, section), f"the example shows no {section}"
    rules = {rule.id: rule for rule in config.rules_of(RULES, read)}
    assert not rules["kv-cache-saturated"].enabled
    assert rules["pcie-fallback"].severity is Severity.WARNING
    assert rules["storage-evicted"].runbook.advice({"server": "mds-4"})[0] == "Ask for the log of mds-4."
    assert "storage-evicted (critical, kernel-log)" in catalogue.site_screen(read, tuple(rules.values()), 0.0)


LINES = st.sampled_from(
    [
        "[[silence]]", "[silence]", "[rules.a-rule]", "[rules]", "[engine]", "[[log_patterns]]", "rule = 'a-rule'", "until = 2027-01-01",
        "until = 25:00:00", "until = 0001-01-01T00:00:00-23:59", "until = 9999-12-31", "reason = 'x'", "reason = ''", "gpus = [1, 'x', []]",
        "gpus = 3", "enabled = 1", "enabled = false", "severity = []", "severity = 'warning'", "most = 99999999999999999999", "most = nan",
        "window_seconds = -inf", "id = 'x-y'", "id = 'a-rule'", "title = 'x'", "source = 'engine-log'", "text = 'abcd'", "text = '\\n'",
        "pattern = '(('", "pattern = '(a+)+'", "at_least = 0", "window_seconds = 0", "explains = ['x']", "rules_folder = 'x'", "x = " + "[" * 3000,
        "optional = ['nvml']", "optional = ['moon']", "a.b.c = 1", "= 1", "rules = 3", "fix = ['']", "x = 1e999", "until = 1" + "0" * 5000,
    ]
)  # fmt: skip


@given(st.lists(LINES | st.text(max_size=20), max_size=14).map("\n".join) | st.binary(max_size=200))
@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_the_file_holds_it_is_read_or_refused_in_a_sentence(tmp_path: Path, text: str | bytes) -> None:
    path = tmp_path / "site.toml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode("utf-8", "replace"))
    refusals: list[str] = []
    try:
        config.rules_of([RULE], config.read(path))
    except config.ConfigError as refusal:
        refusals.append(str(refusal))
    assert all(refusal.startswith(str(path)) for refusal in refusals)


def test_the_default_file_is_read_and_one_that_may_not_be_read_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "config.toml"
    monkeypatch.setattr(config, "FILE", path)
    assert CliRunner().invoke(cli, ["config"]).output.startswith("no configuration: ")
    path.write_text("[rules.pcie-fallback]\nenabled = false\n")
    told = CliRunner().invoke(cli, ["config"])
    assert (told.exit_code, "pcie-fallback: off" in told.output) == (0, True)
    monkeypatch.setattr("os.access", lambda *_: False)
    assert "may not be read by this user" in CliRunner().invoke(cli, ["config"]).output
    path.unlink()


def test_a_configuration_that_is_wrong_is_refused_with_exit_code_3(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_text("nonsense = 1")
    told = CliRunner().invoke(cli, ["config", str(path)])
    assert told.exit_code == 3
    assert "there is no setting `nonsense`" in told.output
    assert "Traceback" not in told.output


def test_a_file_that_is_not_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "site.toml"
    path.write_bytes(b"\xff\x00")
    with pytest.raises(config.ConfigError, match=r"site\.toml"):
        config.read(path)


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(config.ConfigError, match=r"none\.toml: can't be read: No such file"):
        config.read(tmp_path / "none.toml")
