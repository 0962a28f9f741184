"""The alert rules: each failure mode alarms once, by the right severity and after its time; healthy and silenced nodes never do.

Prometheus' own `promtool` judges what the pages of recordings would have put into a database, minute by minute.
"""

from __future__ import annotations

import json
import re
import runpy
import shutil
import subprocess
from collections import Counter
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import pytest
import reports
from prometheus_client.parser import text_string_to_metric_families
from test_cases import FIRES, HEALTHY, HERE, name_of, replayed

from doctor.diagnose import watch
from doctor.feeds import recording
from doctor.history import History
from doctor.report import Report, Verdict, essential_sources
from doctor.rule import Evidence, Finding, NoLimits, Severity, rule
from doctor.silence import Silence
from doctor.snapshot import Absent, Source, Unseen, Why
from exporters.prometheus import TEXT, Own, Tally, Writer, families
from rules import RULES

ROOT = Path(__file__).parent.parent
FILE = ROOT / "packaging" / "prometheus" / "gpu-doctor.rules.yml"
ALERTS: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "alerts.py"))
FAMILIES: dict[str, tuple[str, ...]] = ALERTS["FAMILIES"]
RUNBOOKS = "https://example.org/gpu-doctor/rules"

ALARMED = sorted({*FAMILIES, ALERTS["SITE"], *(alert.name for alert in ALERTS["OWN"])})
READ = {
    word for text in re.findall(r"expr: .*", FILE.read_text(encoding="utf-8"))
    for word in re.findall(r"\bgpu_doctor_\w+", text)
}  # fmt: skip
"""The metrics that the rules read; what only looks like one does no harm."""

needs_promtool = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="promtool is not on this machine; Debian's package prometheus brings it"
)

ONE_EACH = list({path.parent.name: path for path in FIRES}.values())

COMES, GOES, END = 10, 20, 32
"""Minutes of a story: healthy, then sick, then healthy again."""
HOLD_MINUTES = {"critical": 0, "warning": 5}
KEPT_MINUTES = {"critical": 5, "warning": 8}
"""How long an alert stays after its finding: a warning is bridged first."""


# What Prometheus would hold ----------------------------------------------------------------------------------------


class Page(NamedTuple):
    """A scrape: the samples by their series, without the labels of the target."""

    samples: dict[tuple[str, tuple[tuple[str, str], ...]], float]


@cache
def last(path: Path) -> Report:
    """Return the last report on a recording."""
    return replayed(path)[-1]


@cache
def _healthy() -> Page:
    return page(last(HEALTHY[0]))


def page(report: Report | None, *, read: Container[str] = READ, tally: Tally | None = None, **own: Any) -> Page:
    """Return what is scraped of a daemon with this report; None: it has no fresh one. *read*: what matters of it."""
    own = {"version": "0.0.0", "started_at": 1.0, "web_config_loaded": True} | own
    text = Writer(TEXT).page(families(report, tally or Tally(), Own(**own))).decode()
    return Page(
        {
            (sample.name, tuple(sorted(sample.labels.items()))): sample.value
            for family in text_string_to_metric_families(text)
            for sample in family.samples
            if sample.name in read
        }
    )


def series(instance: str, story: Sequence[Page | None]) -> Iterator[dict[str, str]]:
    """Yield the series of a node, a page a minute; None: it does not answer."""
    target = (("instance", instance), ("job", "gpu-doctor"))
    pages = [{} if each is None else each.samples for each in story]
    scraped = [{("up", ()): float(each is not None)} | samples for each, samples in zip(story, pages, strict=True)]
    for name, labels in dict.fromkeys(key for samples in scraped for key in samples):
        values: list[str] = []
        for samples in scraped:
            value = samples.get((name, labels))
            gone = "stale" if values and values[-1] not in ("_", "stale") else "_"
            values.append(gone if value is None else f"{value:.0f}")
        written = ",".join(f"{label}={json.dumps(text)}" for label, text in (*target, *labels))
        yield {"series": f"{name}{{{written}}}", "values": " ".join(values)}


def sick(report: Report | None, **own: Any) -> list[Page | None]:
    """Return the story of a node that is healthy, shows this for ten minutes, and is healthy again."""
    shown = page(report, **own)
    return [_healthy()] * COMES + [shown] * (GOES - COMES) + [_healthy()] * (END - GOES)


# What it should say of it ------------------------------------------------------------------------------------------


class Raised(NamedTuple):
    """An alert as Alertmanager gets it."""

    name: str
    labels: dict[str, str]
    annotations: dict[str, str]


FAMILY_OF = {failure_mode: family for family, held in FAMILIES.items() for failure_mode in held}


def expected(report: Report, instance: str) -> list[Raised]:
    """Return the alerts that a report's findings should raise, told without the page."""
    index_of = {gpu.uuid: str(gpu.index) for gpu in report.snapshot.gpus}
    titles: dict[tuple[str, str, str], str] = {}
    gpus: dict[tuple[str, str, str], dict[str, str]] = {}
    for reported in report.findings:
        finding, severity = reported.finding, reported.finding.severity
        if reported.silence is None and severity not in (None, Severity.NOTICE):
            key = (finding.failure_mode, severity.word, "true" if reported.depth == 0 else "false")
            titles[key] = finding.title
            gpus.setdefault(key, {}).update({uuid: index_of[uuid] for uuid in finding.subject.gpus})
    return [
        Raised(
            FAMILY_OF[mode],
            {"job": "gpu-doctor", "instance": instance, "failure_mode": mode, "severity": severity, "root_cause": root},
            {
                "summary": f"{instance}: {mode}"
                + (f" (GPU {', '.join(sorted(numbers.values()))})" if (numbers := gpus[mode, severity, root]) else ""),
                "description": f"{title}."
                + "".join(f" {uuid}" for uuid in sorted(numbers, key=lambda uuid: numbers[uuid]))
                + (" Another finding of this node explains it." if root == "false" else "")
                + f" `gpu-doctor explain {mode}` tells what to do; http://{instance}/ shows the evidence.",
                "runbook_url": f"{RUNBOOKS}/{mode.replace('-', '_')}.md",
            },
        )
        for (mode, severity, root), title in titles.items()
    ]


def own(name: str, instance: str, severity: str, summary: str, description: str, **labels: str) -> Raised:
    """Return an alert about the daemon itself."""
    target = {"job": "gpu-doctor", "instance": instance} if instance else {}
    annotations = {"summary": summary, "description": description, "runbook_url": f"{RUNBOOKS}/../docs/alerts.md"}
    return Raised(name, {**target, "severity": severity, **labels}, annotations)


def at(minute: float, raised: Iterable[Raised], names: Iterable[str] = ALARMED) -> Iterator[dict[str, Any]]:
    """Yield the checks that exactly these alerts fire then, with their labels and annotations."""
    raised = list(raised)
    for name in names:
        fires = [{"exp_labels": r.labels, "exp_annotations": r.annotations} for r in raised if r.name == name]
        yield {"eval_time": f"{minute * 60:.0f}s", "alertname": name, "exp_alerts": fires}


def group(stories: Mapping[str, Sequence[Page | None]], **checks: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a part of promtool's file: nodes, and what is to be checked on them."""
    return {
        "interval": "1m",
        "external_labels": {"gpu_doctor_runbooks": RUNBOOKS},
        "input_series": [each for instance, story in stories.items() for each in series(instance, story)],
        **checks,
    }


def run(folder: Path, *tests: dict[str, Any]) -> None:
    order = ["gpu-doctor-fleet", "gpu-doctor-failure-modes", "gpu-doctor-itself"]  # else by chance
    told = {"rule_files": [str(FILE)], "group_eval_order": order, "evaluation_interval": "1m", "tests": tests}
    (folder / "alerts.test.yml").write_text(json.dumps(told))  # JSON is YAML
    done = subprocess.run(
        ["promtool", "test", "rules", str(folder / "alerts.test.yml")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[:6000]


# The file ----------------------------------------------------------------------------------------------------------


def test_every_failure_mode_belongs_to_exactly_one_alert() -> None:
    held = Counter(failure_mode for family in FAMILIES.values() for failure_mode in family)
    assert held == Counter(each.id for each in RULES)


def test_a_failure_mode_that_fires_without_alarm_is_a_notice() -> None:
    assert set(ALERTS["HOLD"]) == set(Severity) - {Severity.NOTICE}


def test_the_runbooks_are_files_of_this_repository() -> None:
    for each in RULES:
        assert (ROOT / "rules" / f"{each.id.replace('-', '_')}.md").is_file()
    assert (ROOT / "rules" / "../docs/alerts.md").is_file()


def test_every_alert_about_the_daemon_is_documented() -> None:
    told = (ROOT / "docs" / "alerts.md").read_text(encoding="utf-8")
    for name in (*(alert.name for alert in ALERTS["OWN"]), ALERTS["SITE"], *ALERTS["RECORDINGS"]):
        assert f"`{name}`" in told, name


@needs_promtool
def test_promtool_accepts_the_rules() -> None:
    done = subprocess.run(["promtool", "check", "rules", str(FILE)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


# Failure modes -----------------------------------------------------------------------------------------------------


@needs_promtool
def test_alerts_fire_on_their_recordings_after_their_time_and_end(tmp_path: Path) -> None:
    """One run for all nodes, each an instance of its own: which alerts fire, minute by minute, and what they say."""
    stories: dict[str, Sequence[Page | None]] = {}
    alerts: list[Raised] = []
    for path in ONE_EACH:
        report = last(path)
        stories[name_of(path)] = sick(report)
        wanted = expected(report, name_of(path))
        worst = report.findings[0].finding.severity
        assert worst is Severity.NOTICE or path.parent.name in {raised.labels["failure_mode"] for raised in wanted}
        alerts += wanted
    for path in HEALTHY:
        stories[f"healthy/{path.stem}"] = [page(last(path))] * END
    silence = Silence(rule="gpu-lost", until=reports.AT + 3600, reason="the riser is ordered")
    lost = reports.lost_gpu()
    hushed = tuple(msgspec.structs.replace(f, silence=silence) for f in lost.findings)
    stories["silenced"] = sick(msgspec.structs.replace(lost, findings=hushed))
    checks: list[dict[str, Any]] = []
    for severity, hold in HOLD_MINUTES.items():
        mine = [raised for raised in alerts if raised.labels["severity"] == severity]
        comes, goes = COMES + hold, GOES + KEPT_MINUTES[severity]
        others = [r for r in alerts if r.labels["severity"] != severity]
        for minute, there in ((comes - 1, []), (comes, mine), (goes - 1, mine), (goes, [])):
            theirs = others if COMES + HOLD_MINUTES[others[0].labels["severity"]] <= minute < (
                GOES + KEPT_MINUTES[others[0].labels["severity"]]
            ) else []  # fmt: skip
            checks += at(minute, [*there, *theirs], names=(*FAMILIES, ALERTS["SITE"]))
    run(tmp_path, group(stories, alert_rule_test=checks))


FLAPS = {"critical": "gpu-lost/fires-under-load", "warning": "cooling-insufficient/"}


@needs_promtool
def test_a_finding_that_comes_and_goes_is_one_alert_and_a_short_warning_none(tmp_path: Path) -> None:
    stories: dict[str, Sequence[Page | None]] = {}
    checks = []
    for severity, case in FLAPS.items():
        (path, *_) = (path for path in FIRES if name_of(path).startswith(case))
        report = last(path)
        shown = page(report)
        assert severity in {raised.labels["severity"] for raised in expected(report, "")}
        stories[f"{severity}-flaps"] = [shown, _healthy()] * 15
        stories[f"{severity}-once"] = [_healthy()] * 10 + [shown] + [_healthy()] * 19
        mode = report.findings[0].finding.failure_mode
        raised = f'{{instance="{severity}-flaps",failure_mode="{mode}",root_cause="true",severity="{severity}"}}'
        firing = raised.replace("}", ',alertstate="firing"}')
        hold = HOLD_MINUTES[severity]
        checks += [
            {"expr": f"count_over_time(ALERTS{firing}[{29 - hold}m])", "eval_time": "29m",
             "exp_samples": [{"labels": f'{{alertname="{FAMILY_OF[mode]}",job="gpu-doctor",{firing[1:]}', "value": 30 - hold}]},
            {"expr": f"changes(ALERTS_FOR_STATE{raised}[29m])", "eval_time": "29m",
             "exp_samples": [{"labels": f'{{alertname="{FAMILY_OF[mode]}",job="gpu-doctor",{raised[1:]}', "value": 0}]},
        ]  # fmt: skip
    checks.append(
        {"expr": 'count(count_over_time(ALERTS{instance="warning-once",alertstate="firing"}[30m]))', "eval_time": "29m",
         "exp_samples": []}
    )  # fmt: skip
    run(tmp_path, group(stories, promql_expr_test=checks))


@rule("rack-door-open", "The rack's door is open", severity=Severity.CRITICAL, needs=(), limits=NoLimits())
def door(history: History, limits: NoLimits) -> Iterator[Finding]:
    yield Finding(summary="the door is open", evidence=(Evidence("host", "door", "open"),))


@rule("broken-rule", "This rule does not work", severity=Severity.CRITICAL, needs=(), limits=NoLimits())
def broken(history: History, limits: NoLimits) -> Iterator[Finding]:
    yield Finding(summary=str(1 / 0), evidence=())


door.page = broken.page = "## Fix\n1. Close it.\n"


# The daemon itself -------------------------------------------------------------------------------------------------


def blinded(path: Path) -> Report:
    """Return the report on a recorded node of which nothing essential could be seen."""
    *_, seen = recording.read(path)
    essential = essential_sources(seen)
    visit = msgspec.structs.replace(
        seen,
        seen=tuple(source for source in seen.seen if source not in essential),
        unseen=tuple(Unseen(source, Absent(Why.NO_PERMISSION)) for source in essential),
        collectors=tuple(
            msgspec.structs.replace(each, succeeded=each.source not in essential) for each in seen.collectors
        ),
        gpus=(),
    )
    (report,) = watch([visit], RULES, keep=3600)
    return report


FAILED_SCRAPE = HERE / "cases" / "engine-stalled" / "quiet-failed-scrape.rec"
NO_LIBRARY = HERE / "cases" / "stack-mismatch" / "fires-library.rec"


@pytest.mark.rules_may_fail
@needs_promtool
def test_alerts_about_the_daemon_fire_after_their_time_and_end(tmp_path: Path) -> None:
    """Each story begins at minute 10 and ends at minute 30."""
    scrape, seen = last(FAILED_SCRAPE), last(HEALTHY[0])
    assert scrape.verdict is Verdict.INCOMPLETE
    (cracked,) = watch([seen.snapshot], (*RULES, broken), keep=3600)
    (site,) = watch([seen.snapshot], (*RULES, door), keep=3600)
    without = frozenset({Source.ENGINE_METRICS})
    (does_without,) = watch([scrape.snapshot], RULES, keep=3600, optional=without)
    sees_nothing = blinded(HEALTHY[0])
    shown: dict[str, Page | None] = {
        "down": None,
        "stale": page(None),
        "blind": page(sees_nothing),
        "incomplete": page(scrape),
        "optional": page(does_without, optional=without),
        "no-library": page(last(NO_LIBRARY)),
        "broken": page(cracked),
        "refused": page(seen, web_config_loaded=False),
        "site": page(site),
        "healthy": page(seen),
    }
    stories: dict[str, Sequence[Page | None]] = {
        name: [_healthy()] * 10 + [each] * 20 + [_healthy()] * 10 for name, each in shown.items()
    }
    starts = [1, *range(2, 6), *[5] * 35]
    stories["restarting"] = [page(seen, started_at=float(start)) for start in starts]
    checks = []
    for raised, hold, ends in OF_THE_DAEMON:
        mine = [other for other, its_hold, its_end in OF_THE_DAEMON if other.name == raised.name]
        for minute, there in ((10 + hold - 1, []), (10 + hold, mine), (ends - 1, mine), (ends, [])):
            checks += at(minute, there, names=[raised.name])
    checks += at(4, [RESTARTING], names=["GpuDoctorRestarting"])
    checks += at(3, [], names=["GpuDoctorRestarting"])
    checks += at(39, [], names=["GpuDoctorRestarting"])
    checks += at(25, [], names=["GpuDoctorAbsent", "GpuDoctorVanished"])
    run(tmp_path, group(stories, alert_rule_test=checks))


NOT_WATCHED = "the node is not watched."
WHY = "http://{}/ says why."
NOTHING_SEEN = "NVML, the kernel log and the engines are all unseen; http://blind/healthz says why."
UNREADABLE = "What it reads is there and can't be read; "
LITTLE = "Nothing that it sees is wrong, and that says little. "


def failing(instance: str, collector: str) -> Raised:
    summary = f"gpu-doctor on {instance}: the collector {collector} has failed for 15 minutes."
    return own("GpuDoctorCollectorFailing", instance, "warning", summary, UNREADABLE + WHY.format(instance), collector=collector)  # fmt: skip


def incomplete(instance: str, *unseen: str, **labels: str) -> Raised:
    summary = f"gpu-doctor on {instance} can't see something essential, or a rule is broken."
    text = LITTLE + "".join(f"Unseen: {each}. " for each in unseen) + WHY.format(instance)
    return own("GpuDoctorIncomplete", instance, "warning", summary, text, verdict="incomplete")


OF_THE_DAEMON = (
    (own("GpuDoctorDown", "down", "critical", f"gpu-doctor on down does not answer: {NOT_WATCHED}",
         "No scrape has succeeded for 5 minutes. Is the node up (`ping`), and the service (`systemctl status gpu-doctor`)?"), 5, 35),
    (own("GpuDoctorStale", "stale", "critical", f"gpu-doctor on stale answers, and has no fresh report: {NOT_WATCHED}",
         "No report is newer than three intervals. `journalctl -u gpu-doctor` says what holds its visits up.", version="0.0.0"), 5, 35),
    (own("GpuDoctorBlind", "blind", "critical", f"gpu-doctor on blind sees nothing of what matters: {NOT_WATCHED}", NOTHING_SEEN), 5, 35),
    *((incomplete(*each), 15, 35) for each in (
        ("blind", "engine-log", "engine-metrics", "kernel-log", "nvml"), ("incomplete", "engine-metrics"), ("broken",))),
    *((failing(*each), 15, 35) for each in (
        ("incomplete", "engine-metrics"), ("no-library", "nvml"),
        *(("blind", collector) for collector in ("engine-log", "engine-metrics", "kernel-log", "nvml")))),
    (own("GpuDoctorRuleBroken", "broken", "warning",
         "gpu-doctor on broken: the rule broken-rule is broken and judges nothing.",
         "A site's own rule that fails or was refused, or a defect of gpu-doctor; http://broken/ says how it failed.",
         failure_mode="broken-rule", reason="broken"), 15, 35),
    (own("GpuDoctorWebConfigRefused", "refused", "warning",
         "gpu-doctor on refused refuses its web configuration; the one before is in force.",
         "Its log says in which line; a certificate that was to be renewed will expire."), 5, 35),
    (Raised("GpuSiteRules",
            {"job": "gpu-doctor", "instance": "site", "failure_mode": "rack-door-open", "severity": "critical", "root_cause": "true"},
            {"summary": "site: rack-door-open", "runbook_url": "http://site/",
             "description": "A rule of this site fired. `gpu-doctor explain rack-door-open` tells what to do; http://site/ shows the evidence."}),
     0, 35),
)  # fmt: skip
"""What is raised, after how many minutes, and at which minute it is gone."""

RESTARTING = own(
    "GpuDoctorRestarting", "restarting", "warning", "gpu-doctor on restarting was started 4 times in 30 minutes.",
    "It dies, or systemd's watchdog ends it: `journalctl -u gpu-doctor`.",
)  # fmt: skip


def test_every_alert_about_the_daemon_is_shown_to_fire() -> None:
    shown = {raised.name for raised, _, _ in OF_THE_DAEMON} | {"GpuDoctorRestarting"}
    assert {alert.name for alert in ALERTS["OWN"]} - shown == {"GpuDoctorVanished", "GpuDoctorAbsent"}, "these are next"


@needs_promtool
def test_nodes_that_are_no_targets_any_more_are_missed(tmp_path: Path) -> None:
    """Their `up` is gone: nothing is left to be 0."""
    stories = {f"node-{n}": [_healthy()] * 120 for n in range(3)}
    some, none = list(series_until(stories, {"node-1": 10})), list(series_until(stories, dict.fromkeys(stories, 10)))
    gone = "They are not down, they are no targets any more: taken out on purpose, or lost by the service discovery. The alert ends an hour after they went."

    def vanished(number: int) -> Raised:
        summary = f"gpu-doctor: {number} fewer nodes are scraped than within the last hour."
        return own("GpuDoctorVanished", "", "warning", summary, gone, job="gpu-doctor")

    absent = own(
        "GpuDoctorAbsent", "", "critical", "Prometheus scrapes no gpu-doctor at all: no node is watched.",
        "These rules are loaded, and no job whose name contains gpu-doctor has a target.",
    )  # fmt: skip
    names = ("GpuDoctorVanished", "GpuDoctorAbsent", "GpuDoctorDown", "GpuDoctorStale")
    fewer = [*at(24, [], names), *at(25, [vanished(1)], names), *at(60, [vanished(1)], names), *at(80, [], names)]
    nobody = [*at(24, [], names), *at(25, [vanished(3), absent], names), *at(90, [absent], names)]
    never = [*at(14, [], names), *at(15, [absent], names)]
    empty: dict[str, Any] = {"interval": "1m", "input_series": [], "external_labels": {"gpu_doctor_runbooks": RUNBOOKS}}
    run(
        tmp_path,
        {**empty, "input_series": some, "alert_rule_test": fewer},
        {**empty, "input_series": none, "alert_rule_test": nobody},
        {**empty, "alert_rule_test": never},
    )


def series_until(stories: dict[str, list[Page]], ends: dict[str, int]) -> Iterator[dict[str, str]]:
    """Yield the series of targets, some of which are taken away at a minute."""
    for instance, story in stories.items():
        for each in series(instance, story):
            values = each["values"].split()
            if (end := ends.get(instance)) is not None:
                values[end:] = ["stale"]
            yield {**each, "values": " ".join(values)}


# Fleets ------------------------------------------------------------------------------------------------------------


@needs_promtool
def test_recordings_tell_of_a_fleet_what_the_reports_say(tmp_path: Path) -> None:
    chosen = [*(path for path in ONE_EACH if last(path).snapshot.collectors), *HEALTHY, FAILED_SCRAPE]
    fleet = {name_of(path): last(path) for path in chosen}
    fleet["all-blind"] = blinded(HEALTHY[0])
    stories: dict[str, Sequence[Page | None]] = {instance: [page(report)] * 3 for instance, report in fleet.items()}
    stories["down"] = [page(last(HEALTHY[0])), None, None]
    words = [verdict.value for verdict in ALERTS["VERDICTS"]]
    rank = {instance: words.index(report.verdict.value) for instance, report in fleet.items()}
    assert set(rank.values()) == set(range(len(words))), "the fleet has a node of each verdict"
    modes = Counter(
        key for report in fleet.values()
        for key in {(f.finding.failure_mode, f.finding.severity.word) for f in report.findings if f.finding.severity}
    )  # fmt: skip
    unseen = {
        instance: sum(report.snapshot.why_unseen(source) is not None for source in essential_sources(report.snapshot))
        for instance, report in fleet.items()
    }
    answering = {instance: sum(gpu.lost is False for gpu in report.snapshot.gpus) for instance, report in fleet.items()}
    lost = {instance: report for instance, report in fleet.items() if "gpu-lost" in instance}
    assert all(answering[each] < len(report.snapshot.gpus) for each, report in lost.items())

    def by_instance(name: str, values: dict[str, int]) -> list[dict[str, Any]]:
        return [
            {"labels": f'{name}{{job="gpu-doctor",instance="{instance}"}}', "value": value}
            for instance, value in values.items()
        ]

    def is_recorded(name: str, samples: list[dict[str, Any]], query: str = "") -> dict[str, Any]:
        return {"expr": query or name, "eval_time": "2m", "exp_samples": samples}

    most = {instance: number for instance, number in answering.items() if number}
    checks = [
        is_recorded(name := "instance:gpu_doctor_verdict:rank", by_instance(name, rank)),
        is_recorded(name := "instance:gpu_doctor_essential_unseen:sum", by_instance(name, unseen)),
        is_recorded(name := "instance:gpu_doctor_gpus_answering:count", by_instance(name, most)),
        is_recorded(name := "instance:gpu_doctor_gpus_answering:max1d",
                    by_instance(name, most | {"down": len(last(HEALTHY[0]).snapshot.gpus)})),
        is_recorded(name := "verdict:gpu_doctor_verdict:sum", [
            {"labels": f'{name}{{job="gpu-doctor",verdict="{word}"}}', "value": number}
            for word, number in Counter(report.verdict.value for report in fleet.values()).items()]),
        is_recorded(name := "failure_mode:gpu_doctor_finding:count", [
            {"labels": f'{name}{{job="gpu-doctor",failure_mode="{mode}",severity="{severity}"}}', "value": number}
            for (mode, severity), number in modes.items()]),
        is_recorded(name := "job:gpu_doctor_targets:count", [
            {"labels": f'{name}{{job="gpu-doctor"}}', "value": len(stories)}]),
    ]  # fmt: skip
    run(tmp_path, group(stories, promql_expr_test=checks))


FLEET_QUERY = re.compile(r"^\| `(.+?)` \|", re.MULTILINE)


@needs_promtool
def test_the_documented_queries_of_fleets_answer(tmp_path: Path) -> None:
    """Six nodes: one lost a GPU an hour ago, one sees no engine, one is blind, one is down, two are well."""
    text = (ROOT / "docs" / "alerts.md").read_text(encoding="utf-8")
    queries = [found.replace("\\|", "|") for found in FLEET_QUERY.findall(text) if "gpu_doctor" in found]
    lost = last(HERE / "cases" / "gpu-lost" / "fires-under-load.rec")
    well = page(last(HERE / "healthy" / "hgx-h100-8.rec"))
    stories: dict[str, Sequence[Page | None]] = {
        "lost": [well] * 10 + [page(lost)] * 10,
        "no-page": [page(last(FAILED_SCRAPE))] * 20,
        "blind": [page(blinded(HEALTHY[0]))] * 20,
        "down": [well] * 10 + [None] * 10,
        "well": [well] * 20,
        "well-too": [well] * 20,
    }
    assert len(queries) >= 6
    checks = [
        {"expr": f"count({query}) > bool 0", "eval_time": "19m", "exp_samples": [{"labels": "{}", "value": 1}]}
        for query in queries
    ]
    run(tmp_path, group(stories, promql_expr_test=checks))
