"""The kernel log gives the same events in every form in which it is kept."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.readers import kernel_log
from doctor.readers.kernel_log import KernelLogReader, read
from doctor.snapshot import HostMessage, KernelEvent, NvidiaMessage, OomKill, Sxid, Xid

SAMPLES = Path(__file__).parent.parent.parent / "shared" / "samples"
needs_samples = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="the folder of public samples is not beside the checkout"
)

XID = "NVRM: Xid (PCI:0000:3b:00): 79, pid=1234, name=VLLM::Worker_TP, GPU has fallen off the bus."
AT = 1795246501.0  # 2026-11-21 07:35:01 UTC
BOOTED_AT = AT - 2000.5
NOW = AT + 60


def one(text: str, **options: float) -> KernelEvent:
    events = read(text, "log", **{"booted_at": BOOTED_AT, "now": NOW, **options})
    assert len(events) == 1
    return events[0]


@pytest.mark.parametrize(
    "line",
    [
        f"[ 2000.500000] {XID}",
        f"[2000.500000][ T321] {XID}",
        f"kern  :err   : [ 2000.500000] {XID}",
        f"<3>[ 2000.500000] {XID}",
        f"[Sat Nov 21 07:35:01 2026] {XID}",
        f"3,4711,2000500000,-;{XID}",
        f"3,4711,2000500000,c,caller=T77;{XID}",
        f"Nov 21 07:35:01 node-1 kernel: {XID}",
        f"Nov 21 07:35:01 node-1 kernel: [ 1999.000000] {XID}",
        f"2026-11-21T07:35:01.000000+00:00 node-1 kernel: [ 1999.000000] {XID}",
        f"2026-11-21T08:35:01+0100 node-1 kernel: {XID}",
        f"2026-11-21T07:35:01,000000+00:00 {XID}",
        f"Sat 2026-11-21 07:35:01 UTC node-1 kernel: {XID}",
        f"[ 2000.500000] node-1 kernel: {XID}",
        f"__REALTIME_TIMESTAMP=1795246501000000\n_BOOT_ID=aa\n_TRANSPORT=kernel\nMESSAGE={XID}\n",
        json.dumps({"__REALTIME_TIMESTAMP": "1795246501000000", "_BOOT_ID": "aa", "MESSAGE": XID}),
    ],
)
def test_an_xid_reads_the_same_in_every_form_of_the_log(line: str) -> None:
    event = one(line)
    assert isinstance(event, Xid)
    assert (event.code, event.pci_address, event.pid, event.process_name) == (
        79,
        "0000:3b:00.0",
        1234,
        "VLLM::Worker_TP",
    )
    assert event.at == AT
    assert event.text == XID


@pytest.mark.parametrize(
    ("line", "code", "pid", "name"),
    [
        ("NVRM: Xid (PCI:0000:66:00): 32, pid=7, name=train.3, Channel ID 0000000d intr0 00040000", 32, 7, "train.3"),
        ("NVRM: Xid (PCI:0000:66:00): 119, pid=8, name=nvc:[driver], Timeout after 6s", 119, 8, "nvc:[driver]"),
        ("NVRM: Xid (PCI:0000:66:00): 13, pid=8, name=a,b:c[1], Graphics Exception", 13, 8, "a,b:c[1]"),
        ("NVRM: Xid (PCI:0000:66:00): 13, pid='<unknown>', name=<unknown>, Graphics Exception", 13, None, None),
        ("NVRM: Xid (PCI:0000:66:00): 31, pid=9, Ch 00000008, MMU Fault", 31, 9, None),
        ("NVRM: Xid (PCI:0000:66:00): 79, GPU has fallen off the bus.", 79, None, None),
        ("NVRM: Xid (PCI:0000:66:00 GPU-I:05): 94, pid=7, Contained: CE", 94, 7, None),
        ("NVRM: Xid (PCI:0000:66:00 GPU-I:05 GPU-CI:00): 45, pid=7, name=x, Ch 8", 45, 7, "x"),
        ("NVRM: Xid (0000:66:00): 31, Ch 00000003, engmask 00000101", 31, None, None),
    ],
)
def test_process_and_instance_of_an_xid_are_optional(line: str, code: int, pid: int | None, name: str | None) -> None:
    event = one(line)
    assert isinstance(event, Xid)
    assert (event.code, event.pci_address, event.pid, event.process_name) == (code, "0000:66:00.0", pid, name)


def test_an_xid_tells_its_cause_its_link_and_what_is_due() -> None:
    shadow = one("NVRM: Xid (PCI:0000:66:00): 45, pid=7, name=x, Ch 00000008 caused by previous Xid 31")
    assert isinstance(shadow, Xid)
    assert shadow.caused_by == 31
    due = one("NVRM: Xid (PCI:0008:01:00): 154, GPU recovery action changed from 0x0 (None) to 0x4 (Drain and Reset)")
    assert isinstance(due, Xid)
    assert due.recovery_action == "drain-and-reset"
    link = one(
        "NVRM: Xid (PCI:0018:01:00): 149, NETIR_LINK_EVT  Fatal   XC0 i0 Link 09 (0x025525c6 0x0 0x0 0x0 0x0 0x0)"
    )
    assert isinstance(link, Xid)
    assert (link.severity, link.link) == ("fatal", 9)
    mild = one("NVRM: Xid (PCI:0008:01:00): 145, pid=11, name=y, RLW_SRC_TRACK Nonfatal XC1 i0 Link -1 (0x0 0x0)")
    assert isinstance(mild, Xid)
    assert (mild.severity, mild.link) == ("non-fatal", None)
    old = one(
        "NVRM: Xid (PCI:0003:00:00): 74, pid='<unknown>', name=<unknown>, NVLink: fatal error detected on link 14(0x0)"
    )
    assert isinstance(old, Xid)
    assert (old.severity, old.link) == ("fatal", 14)


def test_the_lines_that_a_switch_prints_about_one_error_are_one_event() -> None:
    event = one(
        "[10.0] nvidia-nvswitch0: SXid (PCI:0000:c3:00.0): 20034, Fatal, Link 30 LTSSM Fault Up\n"
        "[10.1] nvidia-nvswitch0: SXid (PCI:0000:c3:00.0): 20034, Severity 1 Engine instance 00 Sub-engine instance 00\n"
        "[10.2] nvidia-nvswitch0: SXid (PCI:0000:c3:00.0): 20034, Data {0x50610002, 0x10100030}\n"
    )
    assert isinstance(event, Sxid)
    assert (event.code, event.switch, event.severity, event.link) == (20034, "0000:c3:00.0", "fatal", 30)


def test_an_sxid_without_severity_says_so() -> None:
    event = one("nvidia-nvswitch0: SXid (PCI:0004:00:00.0): 26006, SOE HALTED")
    assert isinstance(event, Sxid)
    assert (event.severity, event.link) == (None, None)


OOM = (
    "[50.1] python3 invoked oom-killer: gfp_mask=0xcc0(GFP_KERNEL), order=0\n"
    "[50.2] oom-kill:constraint=CONSTRAINT_MEMCG,nodemask=(null),cpuset=/,mems_allowed=0,oom_memcg=/a,"
    "task_memcg=/a/b,task=VLLM::Worker_TP,pid=15679,uid=0\n"
)
KILLED = (
    "[50.3] Memory cgroup out of memory: Killed process 15679 (VLLM::Worker_TP) total-vm:167916kB, anon-rss:158512kB, "
    "file-rss:6092kB, shmem-rss:0kB, UID:0\n"
)


def test_the_two_lines_of_an_oom_kill_are_one_event() -> None:
    event = one(OOM + KILLED)
    assert isinstance(event, OomKill)
    assert (event.pid, event.process_name, event.cgroup) == (15679, "VLLM::Worker_TP", "/a/b")
    assert event.rss_bytes == (158512 + 6092) * 1024
    assert one(KILLED).text.startswith("Memory cgroup out of memory")


def test_an_oom_kill_whose_second_line_was_cut_off_is_told_all_the_same() -> None:
    event = one(OOM)
    assert isinstance(event, OomKill)
    assert (event.pid, event.rss_bytes) == (15679, None)


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("NVRM: API mismatch: the client has the version 535.104.05, but", "api-mismatch"),
        ("NVRM: GPU 0000:3b:00.0: RmInitAdapter failed! (0x62:0xffff:2351)", "init-failed"),
        ("NVRM: GPU 0000:3b:00.0: GPU has fallen off the bus.", "gpu-lost"),
        ("NVRM: _kgspRpcRecvPoll: Timeout after 45s of waiting for RPC response from GPU0 GSP!", "gsp-timeout"),
        ("NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release Build", "module-loaded"),
        ("NVRM: A GPU crash dump has been created.", "other"),
    ],
)
def test_other_lines_of_the_driver_have_a_kind(line: str, kind: str) -> None:
    event = one(f"[12.5] {line}")
    assert isinstance(event, NvidiaMessage)
    assert (event.kind, event.text) == (kind, line)


@pytest.mark.parametrize(
    ("line", "kind", "name", "address"),
    [
        (
            "python3[77]: segfault at 0 ip 00007f sp 00007f error 4 in libnccl.so.2[7f+1000]",
            "segfault",
            "python3",
            None,
        ),
        (
            "traps: VLLM::Worker_TP[77] general protection fault ip:7f sp:7f error:0 in libcuda.so.570[7f]",
            "segfault",
            "VLLM::Worker_TP",
            None,
        ),
        ("INFO: task VLLM::Worker_TP:77 blocked for more than 120 seconds.", "hung-task", "VLLM::Worker_TP", None),
        ("pcieport 0000:16:01.0: AER: Uncorrected (Fatal) error received: 0000:17:00.0", "aer", None, "0000:17:00.0"),
        ("nvidia 0000:3b:00.0: PCIe Bus Error: severity=Corrected, type=Data Link Layer", "aer", None, "0000:3b:00.0"),
        ("mce: [Hardware Error]: Machine check events logged", "mce", None, None),
    ],
)
def test_lines_of_the_kernel_have_a_kind(line: str, kind: str, name: str | None, address: str | None) -> None:
    event = one(f"[12.5] {line}")
    assert isinstance(event, HostMessage)
    assert (event.kind, event.process_name, event.pci_address) == (kind, name, address)


def test_a_crash_of_somebody_elses_program_is_no_event() -> None:
    assert read("[1.0] firefox[7]: segfault at 0 ip 00007f sp 00007f error 4 in libxul.so[7f+1000]\n") == ()


@pytest.mark.parametrize(
    "boot",
    [
        "[    0.000000] Linux version 6.8.0-31-generic (build@host) (gcc 13)",
        "-- Boot 0123456789abcdef --",
        "-- Reboot --",
        "[    7.100000] NVRM: loading NVIDIA UNIX x86_64 Kernel Module  570.86.15",
    ],
)
def test_events_of_an_earlier_boot_are_marked(boot: str) -> None:
    events = read(f"[ 2000.5] {XID}\n{boot}\n[  900.0] {XID}\n")
    xids = [event for event in events if isinstance(event, Xid)]
    assert [xid.before_boot for xid in xids] == [True, False]


def test_another_boot_id_of_the_journal_is_a_boot() -> None:
    rows = [
        {"__REALTIME_TIMESTAMP": "1795246501000000", "_BOOT_ID": boot, "MESSAGE": XID} for boot in ("aa", "aa", "bb")
    ]
    events = read("\n".join(map(json.dumps, rows)))
    assert [e.before_boot for e in events if isinstance(e, Xid)] == [True, True, False]


def test_a_syslog_stamp_of_december_read_in_january_is_of_last_year() -> None:
    assert one(f"Dec 31 23:59:59 node kernel: {XID}", now=1798765200.0).at == 1798761599.0


def test_places_are_lines_or_sequence_numbers_as_asked() -> None:
    text = f"6,1,1,-;hello\n3,4711,2,-;{XID}\n".encode()
    assert KernelLogReader("kmsg").feed(text)[0].where == "kmsg:2"
    assert KernelLogReader("/dev/kmsg", sequence_numbers=True).feed(text)[0].where == "/dev/kmsg:4711"


def test_a_hundred_thousand_xids_stay_few_and_the_odd_one_is_kept() -> None:
    reader = KernelLogReader("log")
    line = "[ 100.0] NVRM: Xid (PCI:0000:3b:00): 13, pid=7, name=python3, Graphics Exception\n"
    events = reader.feed((line * 60_000 + f"[ 101.0] {XID}\n" + line * 40_000).encode())
    assert len(events) < 100
    assert [event for event in events if isinstance(event, Xid) and event.code == 79]
    assert reader.dropped == 100_001 - len(events)
    assert reader.lines == 100_001


def test_bursts_that_lie_apart_are_each_told() -> None:
    lines = "".join(f"[{second}.0] NVRM: Xid (PCI:0000:3b:00): 13, Graphics\n" for second in range(0, 400_000, 4000))
    assert len(read(lines, booted_at=BOOTED_AT)) == 100


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 200), max_size=8))
def test_it_does_not_matter_how_the_log_is_cut_into_pieces(cuts: list[int]) -> None:
    text = (f"[ 1.0] Linux version 6\n[ 2000.5] {XID}\n" + OOM + KILLED + f"[ 2001.0] {XID}").encode()
    reader = KernelLogReader("log")
    events: list[KernelEvent] = []
    position = 0
    for cut in cuts:
        events += reader.feed(text[position : position + cut])
        position += cut
    events += reader.feed(text[position:])
    events += reader.finish()
    assert tuple(kernel_log.with_boots_marked(events)) == read(text, "log")


def test_a_line_without_end_keeps_its_beginning_and_no_memory() -> None:
    reader = KernelLogReader("log")
    events = reader.feed(f"[1.0] {XID} ".encode())
    for _ in range(64):
        events += reader.feed(b"x" * (1 << 20))
    events += reader.feed(f"\n[2.0] {XID}\n".encode())
    assert len(events) == 2
    assert events[1].where == "log:2"


NOISE = st.sampled_from(
    [
        XID,
        "NVRM: ",
        "SXid (",
        "oom-kill:",
        "Killed process 1 (",
        "__REALTIME_TIMESTAMP=",
        "{",
        "3,1,1,-;",
        "AER:",
        "[1.",
        "\n",
    ]
)


@settings(max_examples=200, deadline=None)
@given(
    st.binary(max_size=400)
    | st.lists(NOISE | st.text(max_size=30), max_size=30).map(lambda parts: "".join(parts).encode("utf-8", "replace"))
)
def test_no_bytes_raise(data: bytes) -> None:
    read(data, now=NOW, booted_at=BOOTED_AT)
    kernel_log.recognises(data)


@needs_samples
@pytest.mark.parametrize("name", ["memcg_oom.dmesg", "memcg_oom.kmsg"])
def test_a_real_oom_kill_is_one_event_in_both_forms(name: str) -> None:
    (event,) = read((SAMPLES / "live" / "kernel" / name).read_bytes(), name)
    assert isinstance(event, OomKill)
    assert (event.pid, event.process_name, event.cgroup) == (15679, "VLLM::Worker_TP", "/gdprobe")


@needs_samples
@pytest.mark.parametrize(("name", "codes"), [
    ("xid-mixed-nvsentinel.txt", [74, 13, 13, 32, 69, 13, 119, 154, 149]),
    ("xid-nvlink5-144-150.txt", [149, 154, 154, 145, 145, 145, 149, 149, 149]),
    ("xid119-old-45s-each.txt", [119] * 5),
    ("sxid-gpud.txt", [20034, 12028, 22013]),
    ("sxid-nvsentinel.txt", [24007, 28006, 12033, 20009, 26006, 26006, 26007, 26008]),
    ("kmsg-nvswitch-open.txt", []),
])  # fmt: skip
def test_public_lines_give_their_codes(name: str, codes: list[int]) -> None:
    data = (SAMPLES / "node" / name).read_bytes()
    assert kernel_log.recognises(data)
    assert [event.code for event in read(data, name) if isinstance(event, Xid | Sxid)] == codes


@needs_samples
def test_no_engine_log_is_taken_for_a_kernel_log() -> None:
    logs = [*(SAMPLES / "live").glob("v*/*/server.log"), *(SAMPLES / "serving").glob("*.txt")]
    assert logs
    assert [log for log in logs if kernel_log.recognises(log.read_bytes())] == []


def test_boots_without_anything_between_them_are_one() -> None:
    events = read("-- Boot aa --\n" * 10_000 + f"[1.0] {XID}\n")
    assert [type(event) for event in events] == [HostMessage, Xid]
