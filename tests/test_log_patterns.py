"""A site's log patterns: kept by the readers, carried by recordings, judged on the one path, and never a way to hang."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor import config
from doctor.cli import cli
from doctor.diagnose import judge
from doctor.history import History
from doctor.log_patterns import rule_of
from doctor.readers.kernel_log import KernelLogReader
from doctor.readers.patterns import LogPattern
from doctor.readers.vllm_log import LogReader
from doctor.report import Report
from doctor.snapshot import Snapshot, Source

LOG = b"""INFO 11-21 10:00:00 [api_server.py:10] vLLM API server version 0.11.0
INFO 11-21 10:00:01 [storage.py:7] Lease of volume models-3 renewed
(EngineCore_DP0 pid=7) WARNING 11-21 10:00:02 [storage.py:9] Lease of volume models-3 was lost after 40 s
INFO:     10.0.0.1:4242 - "POST /v1/completions HTTP/1.1" 200 OK
"""
KERNEL = b"""[   12.000000] LustreError: 11-0: home-OST0003: evicted by server mds-4
[   13.000000] NVRM: Xid (PCI:0000:38:00): 79, pid=1, name=x, GPU has fallen off the bus.
"""


def pattern(**more: object) -> LogPattern:
    told = {"id": "lease-lost", "title": "A volume's lease was lost", "source": "engine-log", "text": "Lease of volume"}
    return msgspec.convert(told | more, LogPattern)


def engine_visit(*patterns: LogPattern, log: bytes = LOG) -> Snapshot:
    reader = LogReader("vllm.log", patterns=patterns)
    reader.feed(log, 1_790_000_000.0)
    reading = reader.finish()
    return Snapshot(at=1_790_000_000.0, seen=tuple(Source), engine_events=reading.events, logs=(reading.state,))


def report_of(visit: Snapshot, *patterns: LogPattern) -> Report:
    return judge(History((visit,), 3600), [rule_of(p) for p in patterns])


def test_lines_that_no_table_knows_are_kept_under_the_patterns_own_signal() -> None:
    lease = pattern()
    events = [e for e in engine_visit(lease).engine_events if e.signal == "site:lease-lost"]
    assert [(e.where, e.text) for e in events] == [
        ("vllm.log:2", "Lease of volume models-3 renewed"),
        ("vllm.log:3", "Lease of volume models-3 was lost after 40 s"),
    ]
    assert (events[1].process, events[1].level) == ("EngineCore_DP0", "WARNING")


def test_a_pattern_narrows_the_text_and_its_groups_fill_the_fix() -> None:
    lease = pattern(pattern=r"volume (?P<volume>\S+) was lost", fix=["Mount <volume> again."], severity="critical")
    (found,) = report_of(engine_visit(lease), lease).findings
    assert found.finding.advice == ("Mount models-3 again.",)
    assert found.finding.evidence[0].where == "vllm.log:3"
    assert found.finding.subject.engine == "vllm.log"


def test_even_access_lines_can_be_asked_for() -> None:
    access = pattern(text="/v1/completions")
    assert [e.where for e in engine_visit(access).engine_events if e.signal == access.signal] == ["vllm.log:4"]


def test_what_the_table_reads_stays_as_it_was() -> None:
    lease = pattern(text="vLLM API server")
    with_it = [e for e in engine_visit(lease).engine_events if e.signal != lease.signal]
    assert with_it == list(engine_visit().engine_events)


@pytest.mark.parametrize(("at_least", "found"), [(1, 1), (2, 1), (3, 0)])
def test_so_many_lines_make_a_finding(at_least: int, found: int) -> None:
    lease = pattern(at_least=at_least)
    assert len(report_of(engine_visit(lease), lease).findings) == found


def test_lines_before_the_window_do_not_count() -> None:
    lease = pattern(window_seconds=60)
    visit = engine_visit(lease)
    later = msgspec.structs.replace(visit, at=max(e.at or 0 for e in visit.engine_events) + 61)
    assert report_of(later, lease).quiet == ("lease-lost",)


def test_without_its_log_a_pattern_could_not_be_judged() -> None:
    assert report_of(Snapshot(at=1.0), pattern()).unjudged[0].failure_mode == "lease-lost"


def test_the_kernel_log_is_searched_too_and_its_own_events_stay() -> None:
    evicted = pattern(id="evicted", source="kernel-log", text="evicted by", pattern=r"server (?P<server>\S+)")
    reader = KernelLogReader("dmesg", booted_at=1000.0, patterns=(evicted, pattern()))
    events = (*reader.feed(KERNEL), *reader.finish())
    visit = Snapshot(at=1100.0, seen=tuple(Source), kernel=events)
    (found,) = report_of(visit, evicted).findings
    assert found.finding.facts == {"server": "mds-4"}
    assert found.finding.since == 1012.0
    bare = KernelLogReader("dmesg", booted_at=1000.0)
    assert [e for e in events if getattr(e, "kind", "") != evicted.signal] == [*bare.feed(KERNEL), *bare.finish()]


@given(st.lists(st.integers(1, len(LOG)), max_size=6))
def test_pieces_of_any_size_give_the_same_lines(cuts: list[int]) -> None:
    lease = pattern()
    reader = LogReader("vllm.log", patterns=(lease,))
    edges = [0, *sorted(cuts), len(LOG)]
    for begin, end in itertools.pairwise(edges):
        reader.feed(LOG[begin:end], 1_790_000_000.0)
    assert reader.finish().events == engine_visit(lease).engine_events


@given(st.binary(max_size=500), st.sampled_from(["engine-log", "kernel-log"]))
def test_no_bytes_make_a_reader_with_patterns_raise(data: bytes, source: str) -> None:
    any_line = pattern(source=source, text="aaaa", pattern="a+b?")
    data = data.replace(b"\0", b"aaaa")
    reader = LogReader("x", patterns=(any_line,))
    reader.feed(data, 0.0)
    reader.finish()
    KernelLogReader("x", patterns=(any_line,)).feed(data + b"\n")


def test_a_flood_is_bounded_and_what_is_left_out_is_counted() -> None:
    lease = pattern()
    visit = engine_visit(
        lease, log=b"".join(b"INFO 11-21 10:00:01 [a.py:7] Lease of volume %d\n" % n for n in range(9000))
    )
    kept = [e for e in visit.engine_events if e.signal == lease.signal]
    assert len(kept) == 48
    assert visit.logs[0].dropped == 9000 - 48


@pytest.mark.parametrize(
    "wrong",
    [
        "(a+)+$", "(a*)*", "(a|a)*b", "(a|b?)+", "((a{1,9})){2,}", "(a?){20}b", "a?" * 20 + "a" * 20, "(a|aa)" * 12 + "b",
        ".*.*.*x", r"(\w+)\1", "(?=x)y", "(?<!x)y", "(?i)x", "(?x) a #", "(?>a)", "a**", "(", "[", "a{5,2}", "x" * 600,
        "a{0,5000}a{0,5000}a{0,5000}b", "(?P<n>a)(?P=n)", r"\8",
    ],
)  # fmt: skip
def test_a_pattern_that_could_hang_a_reader_is_refused(wrong: str) -> None:
    with pytest.raises(msgspec.ValidationError):
        pattern(pattern=wrong)


@pytest.mark.parametrize(
    "right",
    [
        r"lost after (?P<seconds>\d+) s", r"volume (\S+) was (?:lost|taken)", "[^]a]+]", r"\[\d{1,3}\]", "a.*?b", "^x$",
        r"(?:eth|ib)[0-9]{1,2}: link (?P<state>up|down)", r"\.", "a{,3}b", "{x}", "(?:ab){3}", "(a?)?b",
    ],
)  # fmt: skip
def test_ordinary_patterns_are_taken(right: str) -> None:
    pattern(pattern=right)


PIECES = st.sampled_from(["a", "b", ".", "[ab]", "(a)", "(a|b)", "(?:ab)", "a*", "a+", ".*", "a?", "a{1,3}", "(a+)", "(a*)*", "(b|a)+", r"\w+", "$"])  # fmt: skip


@given(st.lists(PIECES, min_size=1, max_size=8).map("".join), st.sampled_from(["a" * 600, "ab" * 300, "a" * 599 + "c"]))
@settings(max_examples=150, deadline=None)
def test_whatever_pattern_is_taken_a_line_is_searched_in_bounded_time(text: str, line: str) -> None:
    try:
        taken = pattern(text="aaaa", pattern=f"{text}Z")
    except msgspec.ValidationError:
        return
    began = time.process_time()
    taken.facts_in(f"aaaa{line}")
    assert time.process_time() - began < 4.0


def test_a_recording_replays_a_patterns_finding_and_triage_gives_it_too(tmp_path: Path) -> None:
    site, rec, log = tmp_path / "site.toml", tmp_path / "a.rec", tmp_path / "vllm.log"
    site.write_text(
        '[[log_patterns]]\nid = "engine-up"\ntitle = "The engine is up"\nsource = "engine-log"\n'
        'text = "Application startup"\nseverity = "warning"\n'
    )
    log.write_bytes(LOG + b"INFO:     Application startup complete.\n")
    with_site = ["--config", str(site)]
    CliRunner().invoke(cli, ["record", *with_site, "--simulate", "hgx-h100-4", "--for", "1", "-o", str(rec)])
    check = ["check", *with_site, "--format", "json", "--replay", str(rec)]
    one, other = CliRunner().invoke(cli, check), CliRunner().invoke(cli, check)
    assert one.stdout == other.stdout
    triage = CliRunner().invoke(cli, ["triage", *with_site, "--format", "json", str(log)])
    for result in (one, triage):
        assert result.exit_code == 1
        assert "engine-up" in [f["failure_mode"] for f in json.loads(result.stdout)["findings"]]


def test_an_id_is_taken_once_and_what_it_explains_exists() -> None:
    (rule,) = [rule_of(pattern())]
    with pytest.raises(config.ConfigError, match=r"\[\[log_patterns\]\] 1: there is a rule lease-lost already"):
        config.rules_of([rule], config.Site(log_patterns=(pattern(),)))
    with pytest.raises(config.ConfigError, match=r"\[\[log_patterns\]\] 2: there is a rule lease-lost already"):
        config.rules_of([], config.Site(log_patterns=(pattern(), pattern())))
    with pytest.raises(config.ConfigError, match="explains nothing-known: there is no such rule"):
        config.rules_of([], config.Site(log_patterns=(pattern(explains=["nothing-known"]),)))
