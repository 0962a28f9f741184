"""What people paste of a sick node in a line or two is read, and what nobody looked at is not called healthy."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor.diagnose import watch
from doctor.feeds import evidence
from doctor.readers import dcgm, kernel_log, lspci, nvidia_smi_table, p2p_matrix
from doctor.report import Report, Verdict
from doctor.snapshot import NvidiaMessage
from rules import RULES

NOW = 1795300000.0  # 2026-11-21


def judged(tmp_path: Path, text: str) -> Report:
    path = tmp_path / "paste.txt"
    path.write_text(text)
    return list(watch(evidence.read([path], now=NOW), RULES, keep=3600))[-1]


def first(tmp_path: Path, text: str) -> str:
    report = judged(tmp_path, text)
    return report.roots[0].finding.failure_mode if report.roots else report.verdict.value


@pytest.mark.parametrize(
    "line",
    [
        "Unable to determine the device handle for GPU 0000:3B:00.0: Unknown Error",
        "Unable to determine the device handle for GPU0000:3B:00.0: GPU is lost.  Reboot the system to recover this GPU",
        "Unable to determine the device handle for GPU2: 0000:3B:00.0: Unknown Error",
    ],
)
def test_a_gpu_that_nvidia_smi_cannot_open_is_gone_also_where_that_line_stands_alone(tmp_path: Path, line: str) -> None:
    assert first(tmp_path, f"$ nvidia-smi\n{line}\n") == "gpu-lost"


def test_a_gpu_whose_values_say_that_it_is_lost_is_gone(tmp_path: Path) -> None:
    text = (
        "==============NVSMI LOG==============\n\nAttached GPUs : 2\n"
        "GPU 00000000:18:00.0\n    Product Name : NVIDIA H100 80GB HBM3\n    GPU UUID : GPU-1\n"
        "GPU 00000000:3B:00.0\n    Product Name : GPU is lost\n    GPU UUID : GPU is lost\n"
    )
    assert first(tmp_path, text) == "gpu-lost"


@pytest.mark.parametrize(
    "part",
    [
        "    Remapped Rows\n        Uncorrectable Error : 3\n        Pending : Yes\n",
        "    Retired Pages\n        Double Bit ECC : 1\n        Pending Page Blacklist : Yes\n",
        "    ECC Errors\n        Volatile\n            DRAM Correctable : 0\n            DRAM Uncorrectable : 2\n",
    ],
)
def test_a_part_of_the_query_is_read_without_its_heading(tmp_path: Path, part: str) -> None:
    assert first(tmp_path, part) == "gpu-memory-faulty"


def table(
    cell: str = "0", values: str = "| N/A   31C    P0    71W / 700W |      4MiB / 81559MiB |      0%      Default |"
) -> str:
    return (
        "+-----------------------------------------------------------------------------+\n"
        "| NVIDIA-SMI 535.104.05   Driver Version: 535.104.05   CUDA Version: 12.2     |\n"
        "|-------------------------------+----------------------+----------------------+\n"
        f"|   0  NVIDIA H100 80G...  On   | 00000000:18:00.0 Off | {cell:>20} |\n"
        f"{values}\n"
        "|                               |                      |             Disabled |\n"
        "+-------------------------------+----------------------+----------------------+\n"
    )


def test_the_tables_column_of_uncorrected_errors_is_read(tmp_path: Path) -> None:
    assert first(tmp_path, table("2")) == "gpu-memory-faulty"
    assert judged(tmp_path, table("0")).verdict is Verdict.CLEAR
    assert judged(tmp_path, table("Off")).verdict is Verdict.CLEAR


def test_a_row_of_errors_is_a_gpu_that_does_not_answer_and_a_single_error_is_not(tmp_path: Path) -> None:
    silent = "|ERR!  ERR! ERR!    N/A / ERR!  |      4MiB / 81559MiB |    ERR!      Default |"
    assert first(tmp_path, table("ERR!", silent)) == "gpu-lost"
    fan = "|ERR!   31C    P0    71W / 700W |      4MiB / 81559MiB |      0%      Default |"
    assert judged(tmp_path, table("0", fan)).verdict is Verdict.CLEAR


def test_mig_without_instances_is_told_from_a_table_that_lists_none() -> None:
    text = table().replace("            Disabled |", "             Enabled |")
    (unlisted,) = nvidia_smi_table.read(text).gpus
    (listed,) = nvidia_smi_table.read(text + "|  No MIG devices found                                     |\n").gpus
    assert unlisted.mig.devices != ()
    assert listed.mig.devices == ()


MISMATCH = (
    "NVRM: API mismatch: the client has the version 550.90.07, but",
    "NVRM: this kernel module has the version 550.54.15.  Please",
    "NVRM: make sure that this kernel module and all NVIDIA driver",
    "NVRM: components have the same version.",
)


@pytest.mark.parametrize(
    "text",
    [
        "[  10.500000] " + "\n               ".join(MISMATCH),
        "\n".join(MISMATCH),
        "Nov 21 07:35:01 node kernel: " + "#012".join(MISMATCH),
        "4,77,10500000,-;" + "\\x0a".join(MISMATCH),
        "\n".join(f"[  10.50000{n}] {line}" for n, line in enumerate(MISMATCH)),
    ],
)
def test_a_sentence_of_the_driver_over_several_lines_is_one_event(tmp_path: Path, text: str) -> None:
    events = kernel_log.read(f"{text}\n[  11.000000] NVRM: GPU 0000:18:00.0: RmInitAdapter failed! (0x61:0x56:1)\n")
    assert [event.kind for event in events if isinstance(event, NvidiaMessage)] == ["api-mismatch", "init-failed"]
    assert "550.90.07" in events[0].text
    assert "550.54.15" in events[0].text
    report = judged(tmp_path, text + "\n")
    assert report.roots[0].finding.failure_mode == "stack-mismatch"
    assert "550.54.15" in report.roots[0].finding.summary


def test_a_gpu_that_left_before_the_driver_took_it_is_named_with_its_address() -> None:
    text = (
        "[ 1.0] NVRM: The NVIDIA GPU 0000:b3:00.0\n"
        "       NVRM: (PCI ID: 10de:26b5) installed in this system has\n"
        "       NVRM: fallen off the bus and is not responding to commands.\n"
    )
    (event,) = kernel_log.read(text)
    assert isinstance(event, NvidiaMessage)
    assert (event.kind, event.pci_address) == ("gpu-lost", "0000:b3:00.0")


def test_a_line_in_dockers_wrapping_is_read() -> None:
    line = "[   9.000001] NVRM: Xid (PCI:0000:61:00): 79, pid=1, GPU has fallen off the bus."
    (event,) = kernel_log.read('{"log":"' + line + '\\n","stream":"stdout","time":"2026-03-06T21:34:31.1Z"}\n')
    assert getattr(event, "code", None) == 79


def test_nvml_that_does_not_start_is_no_crash_of_an_engine(tmp_path: Path) -> None:
    report = judged(tmp_path, "root@box:/# nvidia-smi\nFailed to initialize NVML: Unknown Error\n")
    assert not report.roots
    assert report.verdict is Verdict.INCOMPLETE


@pytest.mark.parametrize("verb", ["don't", "don’t", "doesn't"])
def test_a_fabric_manager_that_refuses_the_driver_is_told_on_any_board(tmp_path: Path, verb: str) -> None:
    text = f"it says: fabric manager NVIDIA GPU driver interface version 550.90.07 {verb} match with driver version 550.54.15.\n"
    assert first(tmp_path, text) == "nvswitch-fabric-fault"


PEERS = "$ nvidia-smi topo -p2p r\n \tGPU0\tGPU1\t\n GPU0\tX\t{0}\t\n GPU1\t{0}\tX\t\n\nLegend:\n\n  X    = Self\n  OK   = Status Ok\n"
BOARD = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-{0}0)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-{0}1)\n".format(
    "1111-2222-3333-4444-"
)


@pytest.mark.parametrize("word", ["CNS", "TNS", "DR", "NS"])
def test_gpus_of_a_board_that_may_not_reach_each_other_are_blocked(tmp_path: Path, word: str) -> None:
    assert first(tmp_path, PEERS.format(word) + BOARD) == "p2p-blocked"


def test_peers_that_may_reach_each_other_are_not_blocked_and_unknown_boards_are_not_called_healthy(
    tmp_path: Path,
) -> None:
    assert judged(tmp_path, PEERS.format("OK") + BOARD).verdict is Verdict.CLEAR
    report = judged(tmp_path, PEERS.format("CNS"))
    assert not report.roots
    assert report.verdict is Verdict.INCOMPLETE


LINK = (
    "3b:00.0 3D controller{id}: NVIDIA Corporation GH100 [H100 SXM5 80GB]{number} (rev a1)\n"
    "\tSubsystem: NVIDIA Corporation Device\n\t\tLnkCap:\tPort #0, Speed 32GT/s, Width x16, ASPM not supported\n"
    "\t\tLnkSta:\tSpeed {speed}GT/s{slow}, Width x{width} (x)\n\tKernel driver in use: nvidia\n"
)
PORT = (
    "3a:00.0 PCI bridge: Example Corp Switch (prog-if 00 [Normal decode])\n"
    "\tBus: primary=39, secondary=3b, subordinate=3b, sec-latency=0\n"
    "\t\tLnkCap:\tPort #1, Speed 32GT/s, Width x8, ASPM not supported\n\t\tLnkSta:\tSpeed 32GT/s, Width x8\n"
)


@pytest.mark.parametrize("numbers", [(" [0302]", " [10de:2330]"), ("", "")])
def test_lspci_shows_a_link_with_too_few_lanes(tmp_path: Path, numbers: tuple[str, str]) -> None:
    text = LINK.format(id=numbers[0], number=numbers[1], speed="32", slow="", width=8)
    report = judged(tmp_path, text)
    assert report.roots[0].finding.failure_mode == "pcie-link-degraded"
    assert "8 of 16 lanes" in report.roots[0].finding.summary


def test_a_slow_idle_link_and_a_narrow_slot_are_no_faults_of_the_link(tmp_path: Path) -> None:
    idle = LINK.format(id="", number="", speed="2.5", slow=" (downgraded)", width=16)
    assert not judged(tmp_path, idle).roots
    narrow = LINK.format(id="", number="", speed="32", slow="", width=8)
    assert not judged(tmp_path, PORT + "\n" + narrow).roots


def diag(test: str, *words: str, status: str = "Fail - GPU: 1") -> str:
    rows = [f"| {'Denylist':<25} | {'Pass':<46} |", f"| {test:<25} | {status:<46} |"]
    sentence = " ".join(words)
    cut = [sentence[at : at + 46] for at in range(0, len(sentence), 46)]
    rows += [f"| {'Warning' if number == 0 else '':<25} | {part:<46} |" for number, part in enumerate(cut)]
    rule = f"+{'-' * 27}+{'-' * 48}+"
    return "\n".join((rule, *rows, rule)) + "\n"


@pytest.mark.parametrize(
    ("text", "mode"),
    [
        (
            diag("Page Retirement/Row Remap", "GPU 1 had uncorrectable memory errors and row remapping failed."),
            "gpu-memory-faulty",
        ),
        (diag("Memory", "GPU 1 had memory errors and row remappings are pending"), "gpu-memory-faulty"),
        (
            diag("PCIe", "GPU 1 is running at PCI link width 8X, which is below the minimum allowed link width of 16"),
            "pcie-link-degraded",
        ),
    ],
)
def test_a_test_of_dcgm_that_failed_stands_for_its_failure_mode(tmp_path: Path, text: str, mode: str) -> None:
    assert first(tmp_path, text) == mode


@pytest.mark.parametrize("status", ["Fail - GPU: 1", "Warn - GPU: 1", "Fail - All"])
def test_a_test_of_dcgm_that_no_rule_knows_is_not_called_healthy(tmp_path: Path, status: str) -> None:
    report = judged(tmp_path, diag("Targeted Stress", "Something went wrong on GPU 1", status=status) + table("0"))
    assert report.verdict is Verdict.INCOMPLETE
    assert any("Targeted Stress: Something went wrong" in unseen.why.detail for unseen in report.unseen)


def test_a_health_report_of_dcgm_that_warns_is_not_called_healthy(tmp_path: Path) -> None:
    text = (
        "| Overall Health            | Warning                       |\n| GPU                       |                   |\n"
        "| -> 3                      | Warning                       |\n|    -> Errors              |                   |\n"
        "|       -> Thermal system   | Warning                       |\n|                           | Too hot for GPU 3 |\n"
    )
    assert judged(tmp_path, text).verdict is Verdict.INCOMPLETE


@given(
    st.one_of(
        st.text(),
        st.lists(
            st.sampled_from(
                (*PEERS.splitlines(), *LINK.splitlines(), *PORT.splitlines(), *diag("PCIe", "GPU 1's").splitlines())
            )
        ).map("\n".join),
    )
)
def test_the_readers_of_peers_links_and_tests_take_any_text(text: str) -> None:
    for reader in (p2p_matrix, dcgm):
        reader.read(text)
        assert all(start < end for start, end in reader.find(text))
    lspci.read_links(text)
    assert all(start < end for start, end in lspci.find_links(text))


LOADING = "[ 12.5] NVRM: loading NVIDIA UNIX Open Kernel Module for x86_64  570.1.1  Release Build\n"


def test_what_the_driver_says_of_its_own_probing_is_not_forgotten_when_it_says_that_it_loads(tmp_path: Path) -> None:
    gone = "[ 12.3] NVRM: The NVIDIA GPU 0000:b3:00.0 (PCI ID: 10de:2330) installed in this system has fallen off the bus\n"
    failed = "[ 12.4] NVRM: The NVIDIA probe routine failed for 1 device(s).\n"
    assert first(tmp_path, gone + failed + LOADING) == "gpu-lost"
    xid = "[ 9.1] NVRM: Xid (PCI:0000:b3:00): 79, GPU has fallen off the bus.\n"
    assert not judged(tmp_path, xid + LOADING).roots


def test_a_driver_that_was_given_no_gpu_is_told(tmp_path: Path) -> None:
    text = "[ 12.4] NVRM: The NVIDIA probe routine was not called for 8 device(s).\n"
    assert first(tmp_path, text) == "gpu-lost"
    assert not judged(tmp_path, text + table()).roots


def test_a_large_python_that_the_kernel_took_is_an_engine_where_none_is_seen(tmp_path: Path) -> None:
    line = "[ 99.1] Out of memory: Killed process 41 (python3) total-vm:5kB, anon-rss:{}kB, file-rss:0kB\n"
    assert first(tmp_path, line.format(400 << 20)) == "worker-killed"
    assert not judged(tmp_path, line.format(1 << 20)).roots


LINKS = "GPU {n}: Tesla V100-SXM2-32GB (UUID: GPU-{n})\n" + "".join(f"\t Link {i}: {{{i}}}\n" for i in range(6))
UP, OFF = "25.781 GB/s", "<inactive>"


def links(n: int, *states: str) -> str:
    return LINKS.replace("{n}", str(n)).format(*states)


def test_links_that_are_off_on_a_board_that_we_do_not_know_are_never_clear(tmp_path: Path) -> None:
    report = judged(tmp_path, links(3, UP, UP, UP, OFF, UP, OFF))
    assert report.verdict is Verdict.INCOMPLETE
    assert any("NVLinks are down" in unjudged.why.detail for unjudged in report.unjudged)
    assert judged(tmp_path, links(3, *[UP] * 6)).verdict is Verdict.CLEAR
    assert judged(tmp_path, links(3, *[OFF] * 6)).verdict is Verdict.CLEAR  # a card without a bridge


def test_a_gpu_with_fewer_links_than_its_neighbours_is_degraded_whatever_it_is(tmp_path: Path) -> None:
    assert first(tmp_path, links(0, *[UP] * 6) + links(1, UP, UP, OFF, OFF, UP, UP)) == "nvlink-degraded"


def test_dcgms_table_of_links_is_read(tmp_path: Path) -> None:
    def shown(letters: str, count: int) -> str:
        row = " ".join(letters * count)
        return f"|  NvLink Link Status  |\n+---+\nGPUs:\n    gpuId 0:\n        {row}\n    gpuId 1:\n        {row}\n"

    smi = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)\nGPU 1: NVIDIA H100 80GB HBM3 (UUID: GPU-1)\n"
    assert judged(tmp_path, shown("D", 18)).verdict is Verdict.INCOMPLETE
    assert judged(tmp_path, shown("U", 18)).verdict is Verdict.CLEAR
    assert first(tmp_path, shown("D", 18) + smi) == "nvlink-degraded"


@pytest.mark.parametrize(
    ("line", "severity"),
    [
        ("NVRM: GPU3 _kgspIsHeartbeatTimedOut: Heartbeat timed out, diff 6001 timeout 5200", "WARNING"),
        ("NVRM: GPU3 _kgspLogRpcTimeout: ****************** GSP Timeout ******************", "CRITICAL"),
        ("NVRM: GPU3 RPC event history (CPU <- GSP):", "CRITICAL"),
    ],
)
def test_a_silent_system_processor_without_an_xid_is_a_hang(tmp_path: Path, line: str, severity: str) -> None:
    report = judged(tmp_path, f"[   24.302465] {line}\n")
    assert [r.finding.failure_mode for r in report.roots] == ["gpu-hung"]
    assert report.verdict.name == severity
    assert "GPU 3" in report.roots[0].finding.summary


STOPPED = "○ nvidia-fabricmanager.service - NVIDIA fabric manager service\n     Active: inactive (dead)\n"


@pytest.mark.parametrize(
    ("name", "gpus", "verdict"),
    [
        ("NVIDIA Q900 SXM9", 8, Verdict.INCOMPLETE),
        ("NVIDIA A100-SXM4-80GB", 8, Verdict.WARNING),
        ("NVIDIA A100-SXM4-80GB", 1, Verdict.INCOMPLETE),
        ("NVIDIA L40S", 4, Verdict.CLEAR),
        ("", 0, Verdict.INCOMPLETE),
    ],
)
def test_a_fabric_manager_that_does_not_run_is_clear_only_where_no_board_needs_it(
    tmp_path: Path, name: str, gpus: int, verdict: Verdict
) -> None:
    smi = "".join(f"GPU {n}: {name} (UUID: GPU-{n})\n" for n in range(gpus))
    report = judged(tmp_path, STOPPED + smi)
    assert report.verdict is verdict, [r.finding.summary for r in report.findings]


RUNNING = (
    STOPPED.replace("○", "●").replace("inactive (dead)", "active (running)") + "   Main PID: 2116 (nv-fabricmanage)\n"
)
REFUSED_START = "Nov 20 10:00:0{} node1 systemd[1]: {} NVIDIA fabric manager service.\n"


@pytest.mark.parametrize(
    ("lines", "verdict"),
    [
        (REFUSED_START.format(1, "Failed to start"), Verdict.WARNING),
        (REFUSED_START.format(1, "Failed to start") + REFUSED_START.format(2, "Started"), Verdict.CLEAR),
        (REFUSED_START.format(1, "Started") + REFUSED_START.format(2, "Stopped"), Verdict.CLEAR),
        (
            "Job for nvidia-fabricmanager.service failed because a timeout was exceeded.\n# journalctl -u nvidia-fabricmanager\n"
            + REFUSED_START.format(1, "Started"),
            Verdict.WARNING,
        ),
        (
            "Job for nvidia-fabricmanager.service failed because a timeout was exceeded.\n" + RUNNING,
            Verdict.CLEAR,
        ),
    ],
)
def test_a_fabric_manager_that_could_not_be_started_is_told_by_systemd(
    tmp_path: Path, lines: str, verdict: Verdict
) -> None:
    manager = "Nov 20 10:00:00 node1 nv-fabricmanager[2116]: Connected to 1 node.\n"
    report = judged(tmp_path, manager + lines)
    assert report.verdict is verdict, [r.finding.summary for r in report.findings]


@pytest.mark.parametrize(
    ("name", "gpus", "verdict"),
    [
        ("NVIDIA GeForce GTX 1650", 2, Verdict.CLEAR),
        ("NVIDIA L40S", 2, Verdict.CLEAR),
        ("NVIDIA H100 80GB HBM3", 2, Verdict.WARNING),
        ("NVIDIA H100 80GB HBM3", 1, Verdict.INCOMPLETE),
        ("NVIDIA Q900 SXM9", 8, Verdict.WARNING),
    ],
)
def test_a_manager_that_failed_is_no_fault_where_no_switch_can_be(
    tmp_path: Path, name: str, gpus: int, verdict: Verdict
) -> None:
    failed = "Job for nvidia-fabricmanager.service failed because the control process exited with error code.\n"
    report = judged(tmp_path, failed + "".join(f"GPU {n}: {name} (UUID: GPU-{n})\n" for n in range(gpus)))
    assert report.verdict is verdict, [r.finding.summary for r in report.findings]


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ("Thermal violations totaling 4.2 seconds started at 9.7 seconds into the test for GPU 2", "cooling-insufficient"),
        ("Detected 1.5 seconds of thermal violations in the last minute for GPU 2.", "cooling-insufficient"),
        ("Temperature 96 of GPU 2 exceeded user-specified maximum allowed temperature 90", "cooling-insufficient"),
        ("There were thermal violations totaling 0.0 seconds for GPU 2", "clear"),
        ("Thermal violations on this host", "incomplete"),
    ],
)  # fmt: skip
def test_what_dcgm_says_of_heat_is_judged_where_it_names_a_gpu(tmp_path: Path, words: str, mode: str) -> None:
    assert first(tmp_path, diag("Targeted Stress", words)) == mode


def test_a_complaint_of_dcgm_without_its_result_is_read(tmp_path: Path) -> None:
    row = "| Error                     | GPU 3 has uncorrectable memory errors and row  |\n|                           |  remappings are pending                        |\n"
    assert first(tmp_path, "|-----  Deployment  --------+----------------|\n" + row) == "gpu-memory-faulty"


def test_a_gpu_passed_through_to_a_virtual_machine_is_not_blamed_for_half_a_slot_alone(tmp_path: Path) -> None:
    def report(mode: str, *widths: int) -> Report:
        gpus = "".join(
            f"GPU 00000000:0{n}:1E.0\n    Product Name : NVIDIA A10G\n    GPU UUID : GPU-{n}\n    GPU Virtualization Mode\n"
            f"        Virtualization Mode : {mode}\n    PCI\n        GPU Link Info\n            Link Width\n"
            f"                Max : 16x\n                Current : {width}x\n"
            for n, width in enumerate(widths)
        )
        return judged(tmp_path, f"==============NVSMI LOG==============\n\nAttached GPUs : {len(widths)}\n{gpus}")

    assert report("Pass-Through", 8, 8).verdict is Verdict.NOTICE
    assert report("Pass-Through", 16, 8).verdict is Verdict.WARNING
    assert report("None", 8, 8).verdict is Verdict.WARNING


def test_what_lspci_tells_of_a_link_is_lspcis_evidence(tmp_path: Path) -> None:
    text = (
        "18:00.0 3D controller [0302]: NVIDIA Corporation GH100 [H100] [10de:2330] (rev a1)\n"
        "\tLnkCap:\tPort #0, Speed 32GT/s, Width x16, ASPM not supported\n"
        "\tLnkSta:\tSpeed 32GT/s, Width x8 (downgraded)\n"
    )
    (found,) = judged(tmp_path, text).findings
    assert found.finding.failure_mode == "pcie-link-degraded"
    assert {(e.source, e.where) for e in found.finding.evidence} == {("host", "lspci, 0000:18:00.0: PCIe link width")}


def test_a_gpu_that_an_old_driver_could_not_start_is_missing_though_it_does_not_say_which(tmp_path: Path) -> None:
    lines = "[  87.1] NVRM: RmInitAdapter failed! (0x26:0xffff:1290)\n[  87.2] NVRM: rm_init_adapter failed for device bearing minor number 0\n"
    assert first(tmp_path, lines.replace("87.", "87.00000")) == "gpu-lost"
    healthy = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)\n"
    assert judged(tmp_path, lines.replace("87.", "87.00000") + healthy).verdict is Verdict.CLEAR
    nothing = "[  87.000001] NVRM: No NVIDIA graphics adapter found!\n[  87.000002] NVRM: NVIDIA init module failed!\n"
    assert judged(tmp_path, nothing).verdict is Verdict.CLEAR  # a machine without any


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ("Thermal: 'Detected clocks event due to thermal violation in GPU 2. Verify that the fans turn.", "cooling-insufficient"),
        ("NVLink: 'GPU 2's NvLink link 4 is currently down", "incomplete"),
        ("Memory: 'GPU 2 had uncorrectable memory errors and row remapping failed.'", "gpu-memory-faulty"),
        ("InfoROM: 'A corrupt InfoROM has been detected in GPU 2.'", "incomplete"),
    ],
)  # fmt: skip
def test_what_dcgms_host_engine_logs_of_health_is_judged_like_its_tables(tmp_path: Path, words: str, mode: str) -> None:
    line = f"2026-11-21 10:00:00.000 ERROR [15:17] [[Health]] Detected a WARNING in health system {words}\n"
    assert first(tmp_path, line) == mode


def test_a_part_of_the_query_that_lost_its_indentation_is_read(tmp_path: Path) -> None:
    part = "Fabric\n    State : Completed\n    Status : {}\n"
    assert first(tmp_path, part.format("Insufficient Resources")) == "nvswitch-fabric-fault"
    assert judged(tmp_path, part.format("Success")).verdict is Verdict.CLEAR
    assert first(tmp_path, "Remapped Rows\n    Pending : Yes\n") == "gpu-memory-faulty"


def test_a_gpu_that_the_driver_refuses_until_it_is_reset_waits_for_its_reset(tmp_path: Path) -> None:
    line = "[Sun Jan 11 09:52:01 2026] NVRM: nvAssertOkFailedNoLog: Assertion failed: {} returned from status @ channel.c:2874\n"
    assert first(tmp_path, line.format("Reset required [NV_ERR_RESET_REQUIRED] (0x00000062)")) == "recovery-pending"
    assert judged(tmp_path, line.format("Object not found [NV_ERR_OBJECT_NOT_FOUND] (0x57)")).verdict is Verdict.CLEAR
