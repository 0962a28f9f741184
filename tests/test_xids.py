"""The Xid and SXid tables, and what becomes of each code: from a line of the kernel log to a finding."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import nodes
import pytest

from doctor.readers import kernel_log
from doctor.report import Report
from doctor.rule import Severity
from doctor.snapshot import Absent, KernelEvent, NvidiaMessage, Snapshot, Sxid, Why
from doctor.symptoms.xids import XidEvent, xid_events
from rules import RULES
from rules.tables.sxids import SXID_SOURCES, SXIDS, is_fatal
from rules.tables.xids import XID_SOURCES, XIDS

REFERENCE = Path(__file__).parent.parent.parent / "shared" / "reference"
TABLES = Path(__file__).parent.parent / "rules" / "tables"

PROFILES = {"A100": "hgx-a100-8", "H100": "hgx-h100-8"}
"""Node of each product of the catalogue that a profile shows; the others are judged on GPUs of no known product."""

DETAILS = {
    154: "GPU recovery action changed from 0x0 (None) to 0x1 (GPU Reset Required)",
    **dict.fromkeys(range(144, 151), "NETIR_LINK_EVT Fatal   XC0 i0 Link 03 (0x004505c6 0x00000000)"),
}
"""What a line of a code must say to be a fault."""


def text_of(code: int, gpu: int = 1, *, uptime: float = nodes.START - nodes.BOOT, detail: str = "") -> str:
    """Return a line as dmesg prints it."""
    what = detail or DETAILS.get(code, "something happened")
    return f"[{uptime:.6f}] NVRM: Xid (PCI:{nodes.address(gpu)[:-2]}): {code}, pid=2001, name=VLLM::Worker_TP, {what}\n"


def read(text: str) -> tuple[KernelEvent, ...]:
    return kernel_log.read(text, "dmesg", booted_at=nodes.BOOT)


def node(product: str = "H100") -> tuple[Snapshot, ...]:
    visits = nodes.healthy(PROFILES.get(product, "hgx-h100-8"))
    if product in PROFILES:
        return visits
    unheard = {"pci_device_id": "10de:ffff", "name": f"NVIDIA {product}"}
    return nodes.each(visits, lambda s: nodes.with_gpu(s, range(8), **unheard))


def judged(text: str, product: str = "H100") -> Report:
    """Return the report on a node whose kernel log says this."""
    return nodes.report(nodes.last(node(product), lambda s: nodes.with_kernel(s, *read(text))), RULES)


def told(report: Report) -> list[tuple[str, Severity | None]]:
    """Return the failure modes that are present, other than those of every healthy node."""
    usual = {f.finding.failure_mode for f in nodes.report(node(), RULES).findings}
    return [
        (f.finding.failure_mode, f.finding.severity) for f in report.findings if f.finding.failure_mode not in usual
    ]


def events(text: str) -> tuple[XidEvent, ...]:
    return xid_events(nodes.history(nodes.last(node(), lambda s: nodes.with_kernel(s, *read(text)))))


# The tables


@pytest.mark.parametrize(("name", "sources"), [("xid", XID_SOURCES), ("sxid", SXID_SOURCES)])
def test_every_cell_has_a_source(name: str, sources: dict[str, str]) -> None:
    rows = msgspec.toml.decode((TABLES / f"{name}.toml").read_bytes())[name]
    columns = {column for row in rows for column in row} - {"code"}
    assert columns == set(sources)
    assert len({row["code"] for row in rows}) == len(rows)
    assert [row["code"] for row in rows] == sorted(row["code"] for row in rows)


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference material is not here")
def test_every_name_of_the_drivers_source_is_in_the_tables() -> None:
    words = [line.split() for line in (REFERENCE / "xid-codes.txt").read_text(encoding="utf-8").splitlines()]
    names = {int(code): name for code, name in reversed(words) if not name.startswith("ROBUST_CHANNEL_ERROR_RECOVERY")}
    assert {code: row.symbol for code, row in XIDS.items() if row.symbol} == names
    words = [line.split() for line in (REFERENCE / "sxid-codes.txt").read_text(encoding="utf-8").splitlines()]
    assert {row.symbol: code for code, row in SXIDS.items()} == {
        name.removeprefix("NVSWITCH_ERR_HW_"): int(code) for name, code in words
    }


@pytest.mark.skipif(not REFERENCE.is_dir(), reason="the reference material is not here")
def test_the_catalogue_says_of_the_h100_what_the_comparison_of_peers_read_there() -> None:
    actions = {
        "RESTART_APP": "restart-app", "RESET_GPU": "reset-gpu", "IGNORE": "ignore", "CONTACT_SUPPORT": "contact-support",
        "RESTART_BM": "reboot", "WORKFLOW_XID_45": "see-previous", "WORKFLOW_XID_48": "reset-gpu", "None": "",
        "WORKFLOW_NVLINK_ERR": "decode-and-reset", "WORKFLOW_NVLINK5_ERR": "decode", "XID_154": "do-what-the-line-says",
    }  # fmt: skip
    text = (REFERENCE / "peers.md").read_text(encoding="utf-8").partition("### 5.3")[2]
    rows = [[cell.strip() for cell in line.split("|")[1:]] for line in text.splitlines() if line.startswith("| ")]
    compared = [row for row in rows if row[0].isdigit()]
    assert len(compared) > 40
    for code, _, applies, action, *_ in compared:
        row = XIDS[int(code)]
        assert ("H100" in (row.applies or ())) is (applies == "YES"), code
        assert row.action == actions[action], code
    assert sum("H100" in (row.applies or ()) for row in XIDS.values()) == 78


# Each code


@pytest.mark.parametrize("code", [code for code, row in XIDS.items() if row.judged_by and not row.informational])
def test_a_code_of_a_failure_mode_gives_that_failure_mode(code: int) -> None:
    for product in XIDS[code].applies or ("H100",):
        visits = nodes.last(node(product), lambda s: nodes.with_kernel(s, *read(text_of(code))))
        if code == 154:  # what NVML says goes before it
            visits = nodes.each(visits, lambda s: nodes.with_gpu(s, 1, recovery_action=Absent(Why.MISSING_SYMBOL)))
        report = nodes.report(visits, RULES)
        assert [root.finding.failure_mode for root in report.roots][:1] == [XIDS[code].judged_by], product
        assert (report.roots[0].finding.severity or Severity.NOTICE) >= Severity.WARNING, product


@pytest.mark.parametrize("code", [code for code, row in XIDS.items() if row.informational])
def test_a_code_that_is_informational_alone_is_silent(code: int) -> None:
    assert told(judged(text_of(code))) == []


@pytest.mark.parametrize("code", [code for code, row in XIDS.items() if not row.judged_by])
def test_any_other_code_is_told_and_is_an_alarm_only_where_nvidia_asks_for_something(code: int) -> None:
    severity = Severity.NOTICE if XIDS[code].is_mild else Severity.WARNING
    assert told(judged(text_of(code))) == [("xid-unclassified", severity)]


@pytest.mark.parametrize("code", XIDS)
def test_a_code_from_before_the_boot_is_history(code: int) -> None:
    boot = "[    0.000000] Linux version 6.8.0-79-generic\n"
    assert told(judged(text_of(code, uptime=90_000.0) + boot)) == []


@pytest.mark.parametrize("code", range(144, 151))
def test_a_link_error_that_calls_itself_nonfatal_is_none(code: int) -> None:
    line = text_of(code, detail="RLW_REMAP   Nonfatal XC1 i0 Link 03 (0x00000084 0x00000001)")
    assert told(judged(line, "GB200")) == []


@pytest.mark.parametrize("code", SXIDS)
def test_an_sxid_weighs_what_its_line_says_and_else_what_the_table_says(code: int) -> None:
    def line(severity: str | None) -> Sxid:
        return Sxid(text="SXid", where="k:1", code=code, switch=nodes.switch_address(0), severity=severity)

    assert is_fatal(line("fatal"))
    assert not is_fatal(line("non-fatal"))
    assert is_fatal(line(None)) is (SXIDS[code].weight == "always-fatal")


# Bursts, shadows, lifecycle


def test_a_burst_is_one_event_and_later_lines_are_another() -> None:
    start = nodes.START - nodes.BOOT - 7200
    burst = "".join(text_of(31, uptime=start + i * 100) for i in range(5))
    (event,) = events(burst)
    assert event.count == 5
    assert len(events(burst + text_of(31, uptime=start + 400 + 181))) == 2
    assert len(events(burst + text_of(31, 2, uptime=start + 50))) == 2


def test_an_xid_45_is_a_shadow_of_its_own_gpus_last_xid_or_of_the_nodes() -> None:
    start = nodes.START - nodes.BOOT - 3600
    on_all = "".join(text_of(45, gpu, uptime=start + 2 + gpu) for gpu in range(8))
    (event,) = events(text_of(79, 1, uptime=start) + on_all)
    assert (event.code, event.shadows) == (79, 8)


def test_a_long_tail_of_shadows_stays_one_event() -> None:
    start = nodes.START - nodes.BOOT - 3600
    tail = "".join(text_of(45, uptime=start + i * 60) for i in range(50))
    (event,) = events(text_of(79, uptime=start) + tail)
    assert event.shadows > 32  # the reader leaves out some of what repeats


def test_an_xid_45_that_names_its_cause_stands_for_it_where_the_log_has_it_not() -> None:
    named = "Ch 00000010, errorString CTX SWITCH TIMEOUT, Info 0x1, caused by previous Xid 109"
    late = text_of(45, uptime=80_000.0, detail=named)
    assert [event.code for event in events(late)] == [109]
    assert [event.code for event in events(text_of(109, uptime=70_000.0) + late)] == [109]


def test_an_xid_45_long_after_another_is_a_question_of_its_own() -> None:
    text = text_of(13, uptime=70_000.0) + text_of(45, uptime=71_000.0)
    assert [event.code for event in events(text)] == [13, 45]


def test_the_driver_loaded_anew_ends_what_was() -> None:
    loaded = "[86000.0] NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  590.48.01\n"
    assert told(judged(text_of(48, uptime=85_000.0) + loaded)) == []
    assert told(judged(loaded + text_of(48))) != []


@pytest.mark.parametrize("code", [48, 62, 95, 109, 140])
def test_a_reset_that_the_driver_asked_for_and_took_back_ends_its_cause(code: int) -> None:
    """The line says so, or NVML does after a line or a visit at which it asked."""
    ago = nodes.START - nodes.BOOT - 3000
    asked = text_of(code, uptime=ago) + text_of(154, uptime=ago + 1)
    done = text_of(
        154, uptime=ago + 60, detail="GPU recovery action changed from 0x1 (GPU Reset Required) to 0x0 (None)"
    )
    assert told(judged(asked + done)) == []
    assert told(judged(asked)) == []  # NVML answers "none" at the visit
    unsaid = nodes.each(node(), lambda s: nodes.with_gpu(s, 1, recovery_action="reset"))
    still = nodes.last(unsaid, lambda s: nodes.with_kernel(s, *read(asked)))
    assert XIDS[code].judged_by in [f.finding.failure_mode for f in nodes.report(still, RULES).findings]


def test_a_driver_that_asks_for_nothing_has_not_cleared_what_it_never_asked_about() -> None:
    assert told(judged(text_of(48, uptime=nodes.START - nodes.BOOT - 3000))) != []


def test_a_reset_just_now_is_still_told_as_a_warning() -> None:
    ago = nodes.START - nodes.BOOT - 300
    asked = text_of(95, uptime=ago) + text_of(154, uptime=ago + 1)
    assert ("gpu-memory-faulty", Severity.WARNING) in told(judged(asked))


# The same GPU, or several


def summary(text: str) -> str:
    (finding,) = [f.finding for f in judged(text).findings if f.finding.failure_mode == "application-fault"]
    return finding.summary


def test_the_same_application_xid_again_on_one_gpu_points_to_it() -> None:
    assert "suspect that GPU" in summary(text_of(31, uptime=70_000.0) + text_of(31, uptime=80_000.0))


def test_on_several_gpus_it_points_to_the_application() -> None:
    assert "suspect the application" in summary(text_of(31, 1, uptime=70_000.0) + text_of(31, 3, uptime=80_000.0))


@pytest.mark.parametrize(
    "text",
    [
        text_of(13, uptime=80_000.0) + text_of(43, uptime=80_001.0),
        text_of(13, uptime=80_000.0) * 20,
        text_of(13, uptime=70_000.0) + text_of(31, uptime=80_000.0),
    ],
    ids=["one fault, two codes", "one burst", "different faults"],
)
def test_one_fault_accuses_nobody(text: str) -> None:
    assert "suspect" not in summary(text)


# Floods


def test_a_flood_of_one_xid_is_one_finding_and_costs_little() -> None:
    start = nodes.START - nodes.BOOT - 100
    flood = "".join(text_of(95, uptime=start + i / 1000) for i in range(100_000))
    lines = read(flood)
    assert len(lines) < 100
    began = time.perf_counter()
    report = nodes.report(nodes.last(node(), lambda s: nodes.with_kernel(s, *lines)), RULES)
    assert time.perf_counter() - began < 2.0
    assert [name for name, _ in told(report)] == ["gpu-memory-faulty"]


def test_a_flood_of_unlike_xids_is_grouped_in_time_that_grows_with_its_length() -> None:
    lines = tuple(
        nodes.xid(1000 + i, i % 8, at=nodes.START - 80_000 + i)
        if i % 2
        else nodes.xid(45, i % 8, at=nodes.START - 80_000 + i)
        for i in range(40_000)
    )
    began = time.perf_counter()
    found = xid_events(nodes.history(nodes.last(node(), lambda s: nodes.with_kernel(s, *lines))))
    assert time.perf_counter() - began < 5.0
    assert len(found) >= 20_000


def test_other_lines_of_the_driver_are_no_xids() -> None:
    message = NvidiaMessage(text="NVRM: GPU crash dump", where="k:1", kind="other")
    assert xid_events(nodes.history(nodes.last(node(), lambda s: nodes.with_kernel(s, message)))) == ()
