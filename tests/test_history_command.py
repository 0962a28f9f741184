"""The recorded past: told by `history`, judged again by `triage --at`, gone on with after a restart."""

from __future__ import annotations

import datetime
import json
import time
import zoneinfo
from collections.abc import Sequence
from pathlib import Path

import msgspec
import nodes
import pytest
from click.testing import CliRunner, Result

from doctor.cli import KEEP_SECONDS, cli
from doctor.diagnose import watch
from doctor.recorder.flight import FlightRecorder
from doctor.recorder.folder import Bounds, Folder, RecorderError, Shelf
from doctor.recorder.moment import moment, moment_or_span, span
from doctor.recorder.segment import Entry
from doctor.recorder.timeline import timeline
from doctor.report import Report
from doctor.snapshot import Snapshot
from exporters import json as json_report
from rules import RULES

BOUNDS = Bounds(max_bytes=64 << 20, max_age_seconds=7 * 86400.0)
EVERY = 10.0


def shifted(visits: Sequence[Snapshot], seconds: float) -> list[Snapshot]:
    return [msgspec.structs.replace(visit, at=visit.at + seconds) for visit in visits]


def day(now: float) -> list[Snapshot]:
    """Return ten minutes that ended just now: healthy, a lost link from the third to the fifth, healthy."""
    visits = shifted(nodes.healthy("hgx-h100-4", visits=60, every=EVERY), now - 600.0 - nodes.START)
    return [
        nodes.links_down(visit, gpu=2, links=range(4)) if 18 <= number < 30 else visit
        for number, visit in enumerate(visits)
    ]


def judged(visits: Sequence[Snapshot], past: Sequence[Snapshot] = ()) -> list[Report]:
    return list(watch(visits, RULES, KEEP_SECONDS, past=past))


def recorded(directory: Path, reports: Sequence[Report]) -> None:
    shelf = Shelf(directory, BOUNDS)
    last = Folder(directory).tail(0)[0] if directory.exists() else 0
    for number, report in enumerate(reports, last + 1):
        entry = Entry(snapshot=report.snapshot, findings=report.findings)
        shelf.write(entry, number, is_start=number == last + 1)
    shelf.close()


def asked(*arguments: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in arguments])


def written(at: float) -> str:
    return datetime.datetime.fromtimestamp(at, datetime.timezone.utc).isoformat()


@pytest.fixture(scope="module")
def now() -> float:
    return float(int(time.time()))


@pytest.fixture(scope="module")
def state(tmp_path_factory: pytest.TempPathFactory, now: float) -> Path:
    directory = tmp_path_factory.mktemp("state")
    recorded(directory, judged(day(now)))
    return directory


def test_reports_after_a_restart_are_those_without_one_to_the_byte(tmp_path: Path, now: float) -> None:
    visits = day(now)
    whole = judged(visits)
    recorded(tmp_path, whole[:25])
    recorder = FlightRecorder(tmp_path, BOUNDS, keep_seconds=KEEP_SECONDS, simulated=True)
    recorder.close()
    resumed = judged(visits[25:], [entry.snapshot for entry in recorder.past])
    assert [json_report.render(r) for r in resumed] == [json_report.render(r) for r in whole[25:]]


def test_history_tells_when_a_finding_came_and_went(state: Path, now: float) -> None:
    told = json.loads(asked("history", "--state-dir", state, "--format", "json").output)
    (links,) = [f for f in told["findings"] if f["failure_mode"] == "nvlink-degraded"]
    assert links["appeared_at"] == now - 600.0 + 18 * EVERY
    assert links["cleared_at"] == now - 600.0 + 30 * EVERY
    assert told["visits"] == 60
    assert told["gaps"] == []


def test_history_on_a_terminal_tells_the_same(state: Path) -> None:
    told = asked("history", "--state-dir", state)
    assert told.exit_code == 0
    assert "nvlink-degraded (cleared after 2 min" in told.output


def test_gaps_are_told_with_their_reason(tmp_path: Path, now: float) -> None:
    reports = judged(day(now))
    recorded(tmp_path, reports[:10])
    recorded(tmp_path, reports[20:30])
    shelf = Shelf(tmp_path, BOUNDS)
    for number, report in enumerate(reports[30:40], 23):
        shelf.write(Entry(snapshot=report.snapshot, findings=report.findings), number)
    shelf.close()
    gaps = timeline(Folder(tmp_path)).gaps
    assert [(gap.why, gap.end - gap.begin, gap.visits) for gap in gaps] == [
        ("daemon started", 110.0, 0),
        ("visits lost", 10.0, 2),
    ]


def test_a_pause_and_a_clock_that_was_put_back_are_told_apart(tmp_path: Path, now: float) -> None:
    visits = day(now)[:12]
    visits = [*visits[:4], *shifted(visits[4:8], 300.0), *shifted(visits[8:], -500.0)]
    recorded(tmp_path, judged(visits))
    assert [gap.why for gap in timeline(Folder(tmp_path)).gaps] == ["no visits", "clock put back"]


def test_triage_at_a_moment_judges_the_worst_visit_of_its_window(state: Path, now: float) -> None:
    at = written(now - 300.0)
    told = asked("triage", "--at", at, "--window", "4m", "--state-dir", state, "--format", "json")
    report = json.loads(told.output)
    assert told.exit_code == 2
    assert report["findings"][0]["failure_mode"] == "nvlink-degraded"
    after = written(now - 60.0)
    assert asked("triage", "--at", after, "--window", "1m", "--state-dir", state).exit_code == 0


def test_where_the_clock_was_put_back_both_times_are_judged_as_they_came(tmp_path: Path, now: float) -> None:
    visits = day(now)  # the lost link is there from the 18th visit to the 30th
    back = shifted(visits[30:], -250.0)  # and the time of its loss comes again, without it
    recorded(tmp_path, judged([*visits[:30], *back]))
    at = visits[24].at
    told = asked("triage", "--at", written(at), "--window", "2m", "--state-dir", tmp_path, "--format", "json")
    report = json.loads(told.output)
    assert report["findings"][0]["failure_mode"] == "nvlink-degraded"
    history = json.loads(asked("history", "--state-dir", tmp_path, "--format", "json").output)
    assert [gap["why"] for gap in history["gaps"]] == ["clock put back"]
    assert history["visits"] == 60


def test_a_damaged_recording_is_judged_and_says_so(tmp_path: Path, state: Path, now: float) -> None:
    (segment,) = Folder(state).segments()
    data = bytearray(segment.read_bytes())
    data[len(data) // 2] ^= 0xFF
    (tmp_path / segment.name).write_bytes(bytes(data))
    at = written(now - 300.0)
    told = json.loads(asked("triage", "--at", at, "--state-dir", tmp_path, "--format", "json").output)
    (unseen,) = [u for u in told["unseen"] if u["source"] == "recorder"]
    assert "could not be read: 1" in json.dumps(unseen)


def test_a_recorder_folder_is_replayed_like_a_recording(state: Path) -> None:
    told = asked("check", "--replay", state, "--format", "json")
    assert json.loads(told.output)["verdict"] in {"clear", "notice"}


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["triage"], "give one of them"),
        (["triage", "--at", "25:10"], "'25:10' is no moment"),
        (["triage", "--at", "2001-01-01T00:00"], "no visit was recorded in that window"),
        (["triage", "--at", "02:10", "--window", "half an hour"], "is no span of time"),
        (["history", "--since", "yesterday"], "'yesterday' is no moment"),
    ],
)
def test_what_can_not_be_answered_is_one_sentence(state: Path, arguments: list[str], sentence: str) -> None:
    told = asked(*arguments, "--state-dir", state)
    assert told.exit_code in {2, 3}
    assert sentence in told.output
    assert "Traceback" not in told.output


BERLIN = zoneinfo.ZoneInfo("Europe/Berlin")


def local(text: str) -> float:
    return datetime.datetime.fromisoformat(text).timestamp()


@pytest.mark.parametrize(
    ("text", "now", "wanted"),
    [
        ("02:10", "2026-11-21T09:00+01:00", "2026-11-21T02:10+01:00"),
        ("23:50", "2026-11-21T09:00+01:00", "2026-11-20T23:50+01:00"),
        ("2:10:30", "2026-11-21T02:10:30+01:00", "2026-11-21T02:10:30+01:00"),
        ("02:30", "2026-10-25T09:00+01:00", "2026-10-25T02:30+01:00"),  # twice that night: the later
        ("02:30", "2026-10-25T02:40+02:00", "2026-10-25T02:30+02:00"),  # the later is still to come
        ("02:30", "2026-03-29T09:00+02:00", "2026-03-28T02:30+01:00"),  # left out that night
        ("2026-11-20 02:10", "2026-11-21T09:00+01:00", "2026-11-20T02:10+01:00"),
        ("2026-11-20T02:10Z", "2026-11-21T09:00+01:00", "2026-11-20T02:10+00:00"),
    ],
)
def test_a_clock_time_is_the_most_recent_such(text: str, now: str, wanted: str) -> None:
    assert moment(text, local(now), BERLIN) == local(wanted)


@pytest.mark.parametrize("text", ["", "24:00", "2:1", "2026-11-20", "2026-13-01T00:00", "2026-03-29T02:30"])
def test_what_is_no_moment_is_refused(text: str) -> None:
    with pytest.raises(RecorderError):
        moment(text, local("2026-11-21T09:00+01:00"), BERLIN)


def test_spans_are_read() -> None:
    assert [span(text) for text in ("90s", "30m", "2h", "7d", "1.5 h")] == [90, 1800, 7200, 604800, 5400]
    assert moment_or_span("30m", 10_000.0) == 8_200.0
