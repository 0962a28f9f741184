"""The site's own rules: run only where nobody but root could have written them, refused aloud, and never in the way."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from doctor import config, drop_ins
from doctor.cli import cli
from doctor.diagnose import judge
from doctor.history import History
from doctor.report import Report, Verdict
from doctor.rule import AnyRule
from doctor.snapshot import Snapshot, Source, Why
from exporters import console, markdown, nagios
from exporters import json as json_report
from rules import RULES

CODE = """
from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Evidence, Finding, Severity, rule
from doctor.snapshot import Source


class Limits(msgspec.Struct, frozen=True):
    most_gpus: int = 0


@rule("too-many-gpus", "More GPUs than the site pays for", severity=Severity.WARNING, needs=(Source.NVML,), limits=Limits())
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    if len(history.latest.gpus) >= limits.most_gpus:
        number = len(history.latest.gpus)
        yield Finding(
            summary=f"{number} GPUs", evidence=(Evidence("nvml", "count", str(number)),), facts={"number": str(number)}
        )
"""
RUNBOOK = "# More GPUs than the site pays for\n\n## Meaning\n\nSo it is.\n\n## Fix\n\n1. Give <number> back.\n"
SEEN = Snapshot(at=1000.0, seen=(Source.NVML, Source.KERNEL_LOG))

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can own a folder that is trusted")


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder of root's, on the way to which nobody else may write but in the sticky /tmp."""
    place = Path(tempfile.mkdtemp(prefix="gpu-doctor-rules-")).resolve()
    place.chmod(0o755)
    rules = place / "rules.d"
    rules.mkdir(mode=0o755)
    yield rules
    shutil.rmtree(place)


def put(folder: Path, code: str = CODE, *, stem: str = "too_many_gpus", runbook: str | None = RUNBOOK) -> Path:
    path = folder / f"{stem}.py"
    path.write_text(code)
    path.chmod(0o644)
    if runbook is not None:
        page = folder / f"{stem}.md"
        page.write_text(runbook)
        page.chmod(0o644)
    return path


def read(folder: Path) -> tuple[AnyRule, ...]:
    return drop_ins.rules_of(str(folder), {rule.id for rule in RULES})


def judged(rules: tuple[AnyRule, ...]) -> Report:
    return judge(History((SEEN,), 60), rules)


def refusal(folder: Path) -> str:
    """Why the only rule in the folder is refused, as each form of the report tells it."""
    (rule,) = read(folder)
    assert drop_ins.is_refused(rule)
    report = judged((rule,))
    (unjudged,) = report.unjudged
    assert unjudged.why.why is Why.BROKEN
    assert report.verdict is Verdict.INCOMPLETE
    for told in (markdown.render(report), json_report.render(report).decode(), console.render(report)):
        assert "refused" in told
    assert "could not be asked" in nagios.render(report)
    return unjudged.why.detail


@as_root
def test_a_rule_of_the_sites_judges_like_ours(folder: Path) -> None:
    put(folder)
    report = judged(read(folder))
    (found,) = report.findings
    assert (found.finding.failure_mode, found.finding.summary) == ("too-many-gpus", "0 GPUs")
    assert found.finding.advice == ("Give 0 back.",)
    assert report.verdict is Verdict.WARNING


@as_root
def test_the_configuration_speaks_of_it_as_of_ours(folder: Path) -> None:
    put(folder)
    site = config.Site(rules_folder=str(folder), rules={"too-many-gpus": {"most_gpus": 9, "severity": "critical"}})
    rules = config.rules_of(RULES, site)
    assert len(rules) == len(RULES) + 1
    assert judged(rules[-1:]).quiet == ("too-many-gpus",)
    with pytest.raises(
        config.ConfigError, match=r"\[rules\.too-many-gpus\] most: there is no such limit; it has most_gpus"
    ):
        config.rules_of(RULES, config.Site(rules_folder=str(folder), rules={"too-many-gpus": {"most": 9}}))


@as_root
@pytest.mark.parametrize(
    ("code", "says"),
    [
        ("RULE = ", "SyntaxError"),
        ("raise RuntimeError('no')", "RuntimeError: no"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("import no_such_module", "ModuleNotFoundError"),
        ("x = 1", "declares no RULE"),
        ("RULE = 'gpu-lost'", "declares no RULE"),
        (CODE.replace("too-many-gpus", "other"), "must have the id too-many-gpus, as its file"),
        (CODE.replace('"More GPUs than the site pays for"', "None"), "must have a title"),
        (CODE.replace("Severity.WARNING", "2"), "must have a Severity"),
        (CODE.replace("(Source.NVML,)", "('nvml',)"), "must have a tuple of Sources"),
        (CODE.replace("limits=Limits()", "limits={}"), "must have a struct as limits"),
        ("#" * ((1 << 20) + 1), "larger than 1 MiB"),
        ("\0", "null byte"),
    ],
)
def test_what_is_no_rule_is_refused_with_the_reason(folder: Path, code: str, says: str) -> None:
    put(folder, code)
    why = refusal(folder)
    assert says in why
    assert str(folder / "too_many_gpus.py") in why


@as_root
@pytest.mark.parametrize("runbook", [None, "", "# only a title\n", "## Meaning\n\nx\n"])
def test_a_rule_without_a_runbook_is_refused(folder: Path, runbook: str | None) -> None:
    put(folder, runbook=runbook)
    assert "too_many_gpus.md" in refusal(folder)


@as_root
def test_a_rule_cannot_take_the_place_of_ours(folder: Path) -> None:
    put(folder, CODE.replace("too-many-gpus", "gpu-lost"), stem="gpu_lost")
    (rule,) = read(folder)
    assert rule.id == "gpu_lost.py", "under the id gpu-lost it would say that ours could not be judged"
    assert "there is a rule gpu-lost already" in refusal(folder)


@as_root
@pytest.mark.parametrize("stem", ["too-many-gpus", "TooMany", "__init__", "a b", "x\ny"])
def test_a_file_whose_name_is_none_of_a_rule_is_refused(folder: Path, stem: str) -> None:
    put(folder, stem=stem)
    assert "no name for a rule" in refusal(folder)


@as_root
def test_files_of_editors_and_packages_are_passed_over(folder: Path) -> None:
    for name in (".too_many_gpus.py.swp", ".hidden.py", "too_many_gpus.py~", "too_many_gpus.py.rpmsave", "README"):
        (folder / name).write_text("raise SystemExit")
    assert read(folder) == ()


@as_root
@pytest.mark.parametrize("mode", [0o664, 0o646, 0o666])
@pytest.mark.parametrize("name", ["too_many_gpus.py", "too_many_gpus.md"])
def test_a_file_that_others_may_write_is_refused(folder: Path, name: str, mode: int) -> None:
    put(folder)
    (folder / name).chmod(mode)
    assert f"{name}: may be written by" in refusal(folder)


@as_root
@pytest.mark.parametrize("name", ["too_many_gpus.py", "too_many_gpus.md"])
def test_a_file_of_another_user_is_refused(folder: Path, name: str) -> None:
    put(folder)
    os.chown(folder / name, 65534, 0)
    assert f"{name}: belongs to user 65534, not to root" in refusal(folder)


@as_root
@pytest.mark.parametrize("sick", ["folder", "parent"])
def test_a_folder_that_others_can_change_is_refused_whole_wherever_on_the_way(folder: Path, sick: str) -> None:
    put(folder)
    place = folder if sick == "folder" else folder.parent
    place.chmod(0o775)
    assert f"{place}: may be written by its group" in refusal(folder)
    place.chmod(0o755)
    os.chown(place, 65534, 65534)
    assert f"{place}: belongs to user 65534" in refusal(folder)


@as_root
def test_a_sticky_folder_is_good_enough_on_the_way_and_not_as_the_place(folder: Path) -> None:
    put(folder)
    folder.parent.chmod(0o1777)
    assert not drop_ins.is_refused(read(folder)[0])
    folder.chmod(0o1777)
    assert "may be written by others than root" in refusal(folder)


@as_root
@pytest.mark.parametrize("linked", ["file", "folder", "parent"])
def test_no_link_is_followed_anywhere(folder: Path, linked: str) -> None:
    put(folder)
    if linked == "file":
        real = folder / "elsewhere"
        (folder / "too_many_gpus.py").rename(real)
        (folder / "too_many_gpus.py").symlink_to(real)
        assert "symbolic link" in refusal(folder)
        return
    named = folder.parent / "link"
    named.symlink_to(folder if linked == "folder" else folder.parent)
    assert "symbolic link" in refusal(named if linked == "folder" else named / "rules.d")


@as_root
def test_a_pipe_does_not_hold_the_program_up(folder: Path) -> None:
    put(folder)
    (folder / "too_many_gpus.py").unlink()
    os.mkfifo(folder / "too_many_gpus.py", 0o644)
    assert "no regular file" in refusal(folder)


def test_a_folder_of_a_user_is_refused(tmp_path: Path) -> None:
    """Whoever runs this: what is not root's is not run."""
    put(tmp_path)
    if os.geteuid() == 0:
        os.chown(tmp_path, 65534, 65534)
    assert "belongs to user" in refusal(tmp_path)


@pytest.mark.parametrize("path", ["rules.d", "/etc/../etc/rules.d", "/no/such/folder", "/dev/null"])
def test_a_folder_that_can_not_be_opened_is_refused(path: str) -> None:
    (rule,) = drop_ins.rules_of(path, ())
    assert drop_ins.is_refused(rule)


def test_without_a_folder_there_is_nothing_to_say(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drop_ins.rules_of("", ()) == ()
    monkeypatch.setattr(drop_ins, "FOLDER", "/no/such/folder")
    assert drop_ins.rules_of("/no/such/folder", ()) == (), "the default may be missing"


def test_a_refused_folder_takes_no_configuration_down_with_it() -> None:
    text = {"fan-stopped": {"least": 3}}
    rules = config.rules_of(RULES, config.Site(rules_folder="/no/such/folder", rules=text))
    assert [rule.id for rule in rules if drop_ins.is_refused(rule)] == ["folder", "fan-stopped"]


@as_root
def test_a_refused_rule_can_be_switched_off(folder: Path) -> None:
    put(folder, "x")
    rules = config.rules_of((), config.Site(rules_folder=str(folder), rules={"too-many-gpus": {"enabled": False}}))
    report = judged(rules)
    assert (report.verdict, report.switched_off) == (Verdict.CLEAR, ("too-many-gpus",))


@as_root
@pytest.mark.rules_may_fail
@pytest.mark.parametrize(
    ("body", "says"),
    [
        ("yield 1 / 0", "ZeroDivisionError"),
        ("raise SystemExit", "would have ended the program"),
        ("yield 'text'", "yields a str, not a Finding"),
        ("return 7", "TypeError"),
        ("yield Finding(summary=None, evidence=())", "ValidationError"),
        ("yield Finding(summary='x', evidence=('y',))", "ValidationError"),
        ("yield Finding(summary='x', evidence=(), facts={'a': 1})", "ValidationError"),
        ("RULE.judge(history)", "RecursionError"),
    ],
)
def test_a_rule_that_fails_while_judging_stops_no_other(folder: Path, body: str, says: str) -> None:
    head = CODE.partition("    if len(")[0]
    put(folder, f"{head}    {body}\n    yield from ()\n" if "return" not in body else f"{head}    {body}\n")
    report = judged((*read(folder), *RULES))
    (broken,) = [u for u in report.unjudged if u.why.why is Why.BROKEN]
    assert broken.failure_mode == "too-many-gpus"
    assert says in broken.why.detail
    assert len(report.quiet) + len(report.unjudged) == len(RULES) + 1
    assert report.verdict is Verdict.INCOMPLETE
    console.render(report)


@as_root
def test_every_command_knows_the_sites_rules(folder: Path) -> None:
    put(folder)
    put(folder, "x", stem="bad_one")
    site = folder.parent / "site.toml"
    site.write_text(f'rules_folder = "{folder}"\noptional = ["kernel-log"]\n[rules.pcie-fallback]\nenabled = false\n')

    def say(*words: str) -> tuple[int, str]:
        result = CliRunner().invoke(cli, [words[0], "--config", str(site), *words[1:]])
        return result.exit_code, result.stdout

    assert say("explain", "too-many-gpus")[1].startswith("too-many-gpus\nMore GPUs than the site pays for")
    _, rules = say("rules", "--simulate", "hgx-h100-4")
    assert "too-many-gpus" in rules
    assert "pcie-fallback" in rules.partition(" off ")[0]
    code, checked = say("check", "--simulate", "hgx-h100-4", "--format", "json", "--for", "0")
    told = json.loads(checked)
    assert code == 1
    assert [f["failure_mode"] for f in told["findings"]] == ["too-many-gpus"]
    assert "bad-one" in [u["failure_mode"] for u in told["unjudged"]]
    assert told["switched_off"] == ["pcie-fallback"]
    result = CliRunner().invoke(cli, ["config", str(site)])
    assert result.exit_code == 3, "a rule that is refused is no good configuration"
    assert "bad-one: " in result.stdout
