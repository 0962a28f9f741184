"""`nvidia-smi -q -x` and `--query-gpu --format=csv` say what `nvidia-smi -q` says, and no text of theirs hurts."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor.diagnose import watch
from doctor.feeds import evidence
from doctor.readers import nvidia_smi_csv, nvidia_smi_q, nvidia_smi_xml
from doctor.report import Report, Verdict
from doctor.snapshot import GpuProcess, known
from rules import RULES

NOW = 1795300000.0  # 2026-11-21

GPU = """\
	<gpu id="00000000:{bus}:00.0">
		<product_name>NVIDIA H100 80GB HBM3</product_name>
		<product_architecture>Hopper</product_architecture>
		<persistence_mode>Enabled</persistence_mode>
		<mig_mode>
			<current_mig>Disabled</current_mig>
			<pending_mig>Disabled</pending_mig>
		</mig_mode>
		<mig_devices>
			None
		</mig_devices>
		<uuid>GPU-{bus}aa</uuid>
		<gpu_virtualization_mode>
			<virtualization_mode>None</virtualization_mode>
		</gpu_virtualization_mode>
		<pci>
			<pci_device_id>233010DE</pci_device_id>
			<pci_bus_id>00000000:{bus}:00.0</pci_bus_id>
			<pci_gpu_link_info>
				<pcie_gen>
					<max_link_gen>5</max_link_gen>
					<current_link_gen>5</current_link_gen>
				</pcie_gen>
				<link_widths>
					<max_link_width>16x</max_link_width>
					<current_link_width>16x</current_link_width>
				</link_widths>
			</pci_gpu_link_info>
			<replay_counter>3</replay_counter>
		</pci>
		<performance_state>P0</performance_state>
		<clocks_event_reasons>
			<clocks_event_reason_gpu_idle>Not Active</clocks_event_reason_gpu_idle>
			<clocks_event_reason_sw_power_cap>Active</clocks_event_reason_sw_power_cap>
			<clocks_event_reason_hw_thermal_slowdown>{hot}</clocks_event_reason_hw_thermal_slowdown>
		</clocks_event_reasons>
		<fb_memory_usage>
			<total>81559 MiB</total>
			<used>70000 MiB</used>
			<free>11080 MiB</free>
		</fb_memory_usage>
		<compute_mode>Default</compute_mode>
		<utilization>
			<gpu_util>97 %</gpu_util>
			<memory_util>41 %</memory_util>
		</utilization>
		<ecc_mode>
			<current_ecc>Enabled</current_ecc>
		</ecc_mode>
		<ecc_errors>
			<volatile>
				<sram_correctable>0</sram_correctable>
				<sram_uncorrectable_parity>0</sram_uncorrectable_parity>
				<sram_uncorrectable_secded>0</sram_uncorrectable_secded>
				<dram_correctable>5</dram_correctable>
				<dram_uncorrectable>{errors}</dram_uncorrectable>
			</volatile>
		</ecc_errors>
		<remapped_rows>
			<remapped_row_corr>0</remapped_row_corr>
			<remapped_row_unc>0</remapped_row_unc>
			<remapped_row_pending>No</remapped_row_pending>
			<remapped_row_failure>No</remapped_row_failure>
		</remapped_rows>
		<temperature>
			<gpu_temp>61 C</gpu_temp>
			<gpu_temp_tlimit>26 C</gpu_temp_tlimit>
			<gpu_temp_slow_tlimit_threshold>-2 C</gpu_temp_slow_tlimit_threshold>
			<memory_temp>70 C</memory_temp>
		</temperature>
		<gpu_power_readings>
			<average_power_draw>650.10 W</average_power_draw>
			<instant_power_draw>655.00 W</instant_power_draw>
			<current_power_limit>700.00 W</current_power_limit>
			<default_power_limit>700.00 W</default_power_limit>
		</gpu_power_readings>
		<clocks>
			<sm_clock>1755 MHz</sm_clock>
		</clocks>
		<fabric>
			<state>Completed</state>
			<status>Success</status>
		</fabric>
		<supported_clocks>
			<supported_mem_clock><value>2619 MHz</value><supported_graphics_clock>1980 MHz</supported_graphics_clock></supported_mem_clock>
		</supported_clocks>
		<processes>
			<process_info>
				<gpu_instance_id>N/A</gpu_instance_id>
				<pid>4711</pid>
				<type>C</type>
				<process_name>VLLM::Worker_TP0 &amp; co</process_name>
				<used_memory>69000 MiB</used_memory>
			</process_info>
		</processes>
	</gpu>
"""

SAME_AS_TEXT = """\
GPU 00000000:18:00.0
    Product Name : NVIDIA H100 80GB HBM3
    Product Architecture : Hopper
    Persistence Mode : Enabled
    MIG Mode
        Current : Disabled
        Pending : Disabled
    GPU UUID : GPU-18aa
    PCI
        Device Id : 0x233010DE
        GPU Link Info
            PCIe Generation
                Max : 5
                Current : 5
            Link Width
                Max : 16x
                Current : 16x
        Replays Since Reset : 3
    Performance State : P0
    Clocks Event Reasons
        Idle : Not Active
        SW Power Cap : Active
        HW Slowdown : Not Active
            HW Thermal Slowdown : Not Active
    FB Memory Usage
        Total : 81559 MiB
        Used : 70000 MiB
        Free : 11080 MiB
    Compute Mode : Default
    Utilization
        GPU : 97 %
        Memory : 41 %
    ECC Mode
        Current : Enabled
    ECC Errors
        Volatile
            SRAM Correctable : 0
            SRAM Uncorrectable Parity : 0
            SRAM Uncorrectable SEC-DED : 0
            DRAM Correctable : 5
            DRAM Uncorrectable : 0
    Remapped Rows
        Correctable Error : 0
        Uncorrectable Error : 0
        Pending : No
        Remapping Failure Occurred : No
    Temperature
        GPU Current Temp : 61 C
        GPU T.Limit Temp : 26 C
        GPU Slowdown T.Limit Temp : -2 C
        Memory Current Temp : 70 C
    GPU Power Readings
        Average Power Draw : 650.10 W
        Instantaneous Power Draw : 655.00 W
        Current Power Limit : 700.00 W
        Default Power Limit : 700.00 W
    Clocks
        SM : 1755 MHz
    Fabric
        State : Completed
        Status : Success
    Processes
        Process ID : 4711
            Type : C
            Name : VLLM::Worker_TP0 & co
            Used GPU Memory : 69000 MiB
"""


def xml(*gpus: str, head: str = "") -> str:
    return (
        f'<?xml version="1.0" ?>\n<!DOCTYPE nvidia_smi_log SYSTEM "nvsmi_device_v12.dtd">\n{head}<nvidia_smi_log>\n'
        "\t<timestamp>Sat Nov 21 10:00:00 2026</timestamp>\n\t<driver_version>570.86.15</driver_version>\n"
        f"\t<cuda_version>12.8</cuda_version>\n\t<attached_gpus>{len(gpus)}</attached_gpus>\n{''.join(gpus)}</nvidia_smi_log>\n"
    )


def gpu(bus: str = "18", *, hot: str = "Not Active", errors: int = 0) -> str:
    return GPU.format(bus=bus, hot=hot, errors=errors)


def judged(tmp_path: Path, text: str) -> Report:
    path = tmp_path / "paste.txt"
    path.write_text(text)
    return list(watch(evidence.read([path], now=NOW), RULES, keep=3600))[-1]


def modes(report: Report) -> list[str]:
    return [found.finding.failure_mode for found in report.roots]


def test_xml_gives_the_values_that_the_plain_log_gives() -> None:
    (of_xml,), (of_text,) = nvidia_smi_xml.read(xml(gpu())).gpus, nvidia_smi_q.read(SAME_AS_TEXT).gpus
    assert of_xml == of_text
    assert of_xml.processes == (
        GpuProcess(pid=4711, used_bytes=69000 << 20, kind="compute", name="VLLM::Worker_TP0 & co"),
    )
    report = nvidia_smi_xml.read(xml(gpu()))
    assert (report.at, report.stack.driver, report.stack.cuda_driver) == (1795255200.0, "570.86.15", "12.8")


def test_a_pasted_xml_is_judged_like_the_plain_log(tmp_path: Path) -> None:
    assert judged(tmp_path, "$ nvidia-smi -q -x\n" + xml(gpu(), gpu("2a"))).verdict is Verdict.CLEAR
    assert modes(judged(tmp_path, xml(gpu(), gpu("2a", errors=2)))) == ["gpu-memory-faulty"]
    assert modes(judged(tmp_path, xml(gpu(hot="Active")))) == ["cooling-insufficient"]
    assert evidence.kinds(tmp_path / "paste.txt", now=NOW) == ("smi-xml",)


def test_a_torn_xml_gives_the_gpus_before_the_tear() -> None:
    text = xml(gpu(), gpu("2a"))
    torn = text[: text.rindex("<temperature>")]
    assert [g.uuid for g in nvidia_smi_xml.read(torn).gpus] == ["GPU-18aa"]
    headless = text[text.index("\t<gpu ") :]
    assert [g.uuid for g in nvidia_smi_xml.read(headless).gpus] == ["GPU-18aa", "GPU-2aaa"]


BOMB = (
    '<!DOCTYPE nvidia_smi_log [<!ENTITY a "ha"><!ENTITY b "&a;&a;&a;&a;&a;&a;&a;&a;"><!ENTITY c "&b;&b;&b;&b;&b;&b;">]>'
)


def test_an_xml_with_entities_of_its_own_says_nothing() -> None:
    text = xml(gpu().replace("NVIDIA H100", "&c;"), head=BOMB)
    assert nvidia_smi_xml.read(text).gpus == ()
    assert nvidia_smi_xml.read(text.replace(BOMB, "")).gpus == ()
    outside = xml(gpu(), head='<!DOCTYPE x [<!ENTITY f SYSTEM "file:///etc/passwd">]>')
    assert nvidia_smi_xml.read(outside.replace("NVIDIA H100", "&f;")).gpus == ()


def test_deep_and_long_xml_is_bounded() -> None:
    assert nvidia_smi_xml.read("<nvidia_smi_log>" + "<a>" * 100_000).gpus == ()
    deep = xml(f'<gpu id="00000000:18:00.0">{"<a>" * 5000}{"</a>" * 5000}</gpu>')
    assert len(nvidia_smi_xml.read(deep).gpus) == 1
    ((_, end), *_) = nvidia_smi_xml.find("<nvidia_smi_log>" + " " * (nvidia_smi_xml.DOCUMENT_MAX_CHARACTERS + 9))
    assert end == nvidia_smi_xml.DOCUMENT_MAX_CHARACTERS


PIECES = st.sampled_from(
    [*GPU.splitlines(keepends=True), "<gpu id=\"00000000:18:00.0\">", "</gpu>", "<nvidia_smi_log>", "</nvidia_smi_log>", "&x;", "\x00", "<!--"]
)  # fmt: skip


@given(st.one_of(st.text(), st.lists(PIECES, max_size=60).map("".join)))
def test_no_text_makes_the_xml_reader_raise(text: str) -> None:
    nvidia_smi_xml.read(text)
    spans = list(nvidia_smi_xml.find(text))
    assert all(0 <= start < end <= len(text) for start, end in spans)
    assert all(one[1] <= other[0] for one, other in itertools.pairwise(spans))


# Tables.

TABLE = (
    "index, name, pci.bus_id, uuid, memory.used [MiB], temperature.gpu, utilization.gpu [%], power.draw [W], "
    "clocks_throttle_reasons.active, ecc.errors.uncorrected.volatile.total, remapped_rows.pending, pcie.link.width.current, "
    "pcie.link.width.max, fabric.state\n"
    "0, NVIDIA H100 80GB HBM3, 00000000:18:00.0, GPU-1, 70000 MiB, 61, 97 %, 650.10 W, 0x0000000000000004, 0, No, 16, 16, Completed\n"
    "1, NVIDIA H100 80GB HBM3, 00000000:2A:00.0, GPU-2, 70001 MiB, 62, 98 %, 651.10 W, {reasons}, {errors}, {pending}, {width}, 16, [N/A]\n"
)


def table(*, reasons: str = "0x0000000000000001", errors: str = "0", pending: str = "No", width: str = "16") -> str:
    return TABLE.format(reasons=reasons, errors=errors, pending=pending, width=width)


def test_a_table_gives_the_values_of_its_columns() -> None:
    (report,) = nvidia_smi_csv.reports(table(errors="[N/A]"))
    first, second = report.gpus
    assert (first.index, first.uuid, first.pci_address, first.name) == (0, "GPU-1", "0000:18:00.0", "NVIDIA H100 80GB HBM3")  # fmt: skip
    assert (first.memory.used_bytes, first.activity.gpu_ratio, first.power.average_watts) == (70000 << 20, 0.97, 650.1)
    assert first.clocks.event_reasons == ("sw-power-cap",)
    assert (first.pcie.width, first.pcie.width_max, first.fabric.state) == (16, 16, "completed")
    assert second.index == 1
    assert not known(second.ecc.uncorrected_volatile)
    assert not known(second.fabric.state)


@pytest.mark.parametrize(
    ("changes", "mode"),
    [
        ({}, ""),
        ({"errors": "3"}, "gpu-memory-faulty"),
        ({"pending": "Yes"}, "gpu-memory-faulty"),
        ({"reasons": "0x0000000000000040"}, "cooling-insufficient"),
        ({"width": "8"}, "pcie-link-degraded"),
    ],
)
def test_a_table_is_judged(tmp_path: Path, changes: dict[str, str], mode: str) -> None:
    assert modes(judged(tmp_path, table(**changes))) == ([mode] if mode else [])


def test_a_table_without_head_has_the_columns_of_its_command() -> None:
    text = "$ nvidia-smi --query-gpu=index,gpu_name,memory.total,power.draw --format=csv,noheader,nounits\n3, NVIDIA H200, 143771, 77.1\n"
    ((start, end),) = nvidia_smi_csv.find("before\n" + text + "after it all\n")
    (report,) = nvidia_smi_csv.reports(("before\n" + text)[start:end])
    (gpu,) = report.gpus
    assert (gpu.index, gpu.name, gpu.memory.total_bytes, gpu.power.average_watts) == (3, "NVIDIA H200", 143771 << 20, 77.1)  # fmt: skip


def test_a_table_that_goes_on_is_one_report_a_look() -> None:
    text = "timestamp, name, pci.bus_id, temperature.gpu\n" + "".join(
        f"2026/11/21 10:00:{second:02}.000, NVIDIA H100 80GB HBM3, 00000000:{bus}:00.0, {40 + second}\n"
        for second in (0, 10, 20)
        for bus in ("18", "2A")
    )
    looks = nvidia_smi_csv.reports(text)
    assert [(look.at, len(look.gpus)) for look in looks] == [(1795255200.0, 2), (1795255210.0, 2), (1795255220.0, 2)]


def test_sentences_with_commas_are_no_table(tmp_path: Path) -> None:
    for text in ("name, address, and so on\nthis, that, other\n", "index, of, names\n1, 2, 3\n", "memory\nfoo\n"):
        assert list(nvidia_smi_csv.find(text)) == []


CELLS = st.sampled_from(
    ["index", "name", "uuid", "timestamp", "memory.used [MiB]", "0", "1", "GPU is lost", '"', "0x41", "[N/A]"]
)


@given(st.one_of(st.text(), st.lists(st.lists(CELLS, max_size=6).map(", ".join), max_size=12).map("\n".join)))
def test_no_text_makes_the_reader_of_tables_raise(text: str) -> None:
    nvidia_smi_csv.reports(text)
    for start, end in nvidia_smi_csv.find(text):
        assert 0 <= start < end <= len(text)
