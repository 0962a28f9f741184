"""The report at a terminal."""

from __future__ import annotations

import io
import unicodedata

import golden
import msgspec
import pytest
import reports
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.readers.runbook import read
from doctor.report import Verdict
from doctor.rule import Evidence, Finding, Severity, Subject, Unjudged
from doctor.snapshot import Absent, Node, Source, Unseen, Why
from exporters import console, markdown, nagios, runbook
from exporters import json as json_report
from exporters.terminal import Terminal, terminal_of, wrapped
from exporters.wording import cut, listed, moment, plain, ranges


@pytest.mark.parametrize("name", reports.ALL)
def test_a_screen_is_as_it_was_approved(name: str) -> None:
    golden.check(f"{name}.txt", console.render(reports.ALL[name]()))


@pytest.mark.parametrize("width", [60, 80, 100])
@pytest.mark.parametrize("name", reports.ALL)
def test_no_line_is_wider_than_the_terminal(name: str, width: int) -> None:
    screen = console.render(reports.ALL[name](), Terminal(width=width))
    assert max(map(len, screen.splitlines())) <= width


@pytest.mark.parametrize("name", reports.ALL)
def test_the_first_line_is_the_verdict(name: str) -> None:
    report = reports.ALL[name]()
    first, second, *_ = console.render(report).splitlines()
    assert first.startswith(report.verdict.value.upper() + "  ")
    assert not second.startswith(" "), "the verdict takes one line"


def test_a_root_cause_stands_above_its_consequences() -> None:
    screen = console.render(reports.lost_gpu())
    assert screen.index("1. gpu-lost") < screen.index("└─ nccl-timeout") < screen.index("└─ engine-crashed")
    assert "2. " not in "".join(line[:3] for line in screen.splitlines()), "one incident, not three"


def test_a_pipe_gets_no_colour_and_a_terminal_does() -> None:
    report = reports.lost_gpu()
    assert "\x1b" not in console.render(report)
    coloured = console.render(report, Terminal(colour=True))
    assert "\x1b[1;31mCRITICAL\x1b[0m" in coloured
    assert words(coloured) == words(console.render(report))


def words(screen: str) -> list[list[str]]:
    return [plain(line).split() for line in screen.splitlines()]


class Tty(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(
    ("environment", "colour"),
    [({}, True), ({"NO_COLOR": "1"}, False), ({"NO_COLOR": ""}, True), ({"TERM": "dumb"}, False)],
)
def test_no_color_and_dumb_terminals_are_respected(environment: dict[str, str], colour: bool) -> None:
    assert terminal_of(Tty(), environment).colour is colour
    assert terminal_of(io.StringIO(), environment) == Terminal(width=80, colour=False)


@pytest.mark.parametrize(("columns", "width"), [("20", 40), ("70", 70), ("300", 100)])
def test_the_width_is_the_terminals_within_reason(columns: str, width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", columns)
    assert terminal_of(Tty(), {}).width == width


def test_quiet_rules_are_one_counted_line() -> None:
    report = msgspec.structs.replace(reports.notice(), quiet=tuple(f"mode-{i}" for i in range(40)))
    screen = console.render(report)
    assert "mode-7" not in screen
    assert "Asked about and not present: 40 other failure modes." in screen


def test_the_matrix_shows_where_links_are_missing_and_only_then() -> None:
    screen = console.render(reports.links_down())
    assert "   *GPU1  NV16     X  NV16  NV16" in screen
    assert "Topology" not in console.render(reports.lost_gpu())


def test_a_matrix_that_does_not_fit_is_left_out() -> None:
    assert "Topology" not in console.render(reports.links_down(), Terminal(width=20))


def test_the_same_advice_is_given_once() -> None:
    again = msgspec.structs.replace(
        reports.DEGRADED, subject=msgspec.structs.replace(reports.DEGRADED.subject, gpus=(reports.uuid(3),), links=())
    )
    screen = console.render(reports.report(reports.snapshot(reports.FOUR), reports.DEGRADED, again))
    assert screen.count("nvidia-smi --gpu-reset") == 1
    assert "as for 1." in screen


def test_a_node_without_driver_is_told_so_and_shown_the_demo() -> None:
    screen = console.render(reports.no_driver())
    assert reports.no_driver().verdict is Verdict.INCOMPLETE
    assert "No NVIDIA driver answers here." in screen
    assert "`gpu-doctor check --simulate" in screen
    assert screen.startswith("INCOMPLETE  there is no NVIDIA driver here, and the kernel log could not be seen\n")
    assert "Judged by that and not present:\nengine-crashed." in screen


def test_what_nobody_can_change_is_not_listed_as_unseen() -> None:
    gaps = (
        Unseen(Source.NVML, Absent(Why.NOT_SUPPORTED), "GPM of GPU 0"),
        Unseen(Source.NVML, Absent(Why.NO_PERMISSION), "serial of GPU 0"),
    )
    screen = console.render(reports.report(reports.snapshot(reports.FOUR, unseen=gaps)))
    assert "GPM of GPU 0" not in screen
    assert "serial of GPU 0" in screen


def test_triage_says_once_which_files_would_tell_more() -> None:
    screen = console.render(reports.pasted_log())
    assert screen.count("not given: add the output of `nvidia-smi -q`: nvlink-degraded") == 1
    assert "Not seen" not in screen


def test_a_command_that_fits_a_line_is_never_broken() -> None:
    command = "`nvidia-smi --gpu-reset -i 1`"
    for width in range(40, 90):
        assert command in "\n".join(wrapped(f"{'word ' * 9}{command} and more words", width, first="   "))


ODD = st.text(alphabet=st.characters(), max_size=200) | st.from_regex(r"\x1b[\[\]P_^X].{0,20}", fullmatch=False)


@settings(max_examples=200)
@given(ODD)
def test_clean_text_holds_nothing_that_moves_a_cursor_or_turns_a_line(text: str) -> None:
    clean = plain(text)
    assert not [c for c in clean if unicodedata.category(c) in {"Cc", "Cf", "Cs", "Zl", "Zp"}]
    assert plain(clean) == clean
    clean.encode()


def test_an_escape_that_never_ends_hides_no_evidence() -> None:
    assert plain("\x1b]0;Xid 79 on GPU 2") == "0;Xid 79 on GPU 2"
    assert plain("\x1b[4mGPU0\x1b[0m\tNV18") == "GPU0 NV18"


@settings(max_examples=100)
@given(ODD, ODD, st.integers(40, 100))
def test_any_text_can_be_told_in_every_form(one: str, other: str, width: int) -> None:
    finding = Finding(
        failure_mode="application-fault",
        title="A kernel of the workload faulted",
        severity=Severity.CRITICAL,
        summary=one,
        evidence=(Evidence("engine-log", other, one), Evidence(other, "", "")),
        subject=Subject(gpus=(one, other), links=(one, f"{other}/x"), ranks=(other,), engine=one),
        advice=(other,),
    )
    report = reports.report(
        reports.snapshot(reports.FOUR, node=Node(name=other)),
        finding,
        unjudged=(Unjudged("gpu-lost", Absent(Why.FAILED, one)),),
    )
    for told in (
        console.render(report, Terminal(width=width)),
        markdown.render(report),
        nagios.render(report),
        json_report.render(report).decode(),
    ):
        assert all(line.isprintable() for line in told.split("\n"))


def test_a_long_chain_of_causes_is_told_on_a_narrow_terminal() -> None:
    chain = [
        msgspec.structs.replace(reports.CRASHED, failure_mode=f"mode-{n}", explains=(f"mode-{n + 1}",))
        for n in range(20)
    ]
    screen = console.render(reports.report(reports.snapshot(reports.FOUR), *chain), Terminal(width=40))
    assert "└─ mode-19" in screen


def test_small_words() -> None:
    assert ranges([0, 1, 2, 3, 5]) == "0-3, 5"
    assert listed(["a", "b", "c"]) == "a, b and c"
    assert listed(["a", "b", "c", "d"], most=2) == "a, b and 2 more"
    assert cut("abcdef", 4) == "abc…"
    assert moment(reports.AT) == "2026-09-21 14:13:20 UTC"
    assert moment(1e300) == "1e+300 s after 1970"


RUNBOOK = """# A GPU is gone

## Meaning
The GPU **fell off** the bus: see [NVIDIA's list](https://docs.nvidia.com/deploy/xid-errors/). It does not answer any
more.

## Fix
1. Drain the node, so that no request is routed to it while it is being looked at by anybody.
2. Reset it:

   ```
   nvidia-smi --gpu-reset -i <gpu-index>
   ```

- a list
  that goes on
| a | table |
"""


def test_a_runbook_is_laid_out_for_a_terminal() -> None:
    golden.check("runbook.txt", runbook.render("gpu-lost", read(RUNBOOK)))
    assert "\x1b[1mgpu-lost\x1b[0m" in runbook.render("gpu-lost", read(RUNBOOK), Terminal(colour=True))


@settings(max_examples=100)
@given(st.text(alphabet="#`-*1. |ab[]()\n ", max_size=200))
def test_any_markdown_can_be_laid_out(markdown: str) -> None:
    assert runbook.render("x", read("## Fix\n" + markdown)).endswith("\n")
