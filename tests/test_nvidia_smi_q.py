"""What nvidia-smi prints becomes the values that NVML gives, with a reason for each that is missing."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.readers import lspci, nvidia_smi_list, nvidia_smi_q, nvidia_smi_table, systemctl_status
from doctor.snapshot import Absent, Gpu, Why, known

SAMPLES = Path(__file__).parent.parent.parent / "shared" / "samples" / "node"
needs_samples = pytest.mark.skipif(
    not SAMPLES.is_dir(), reason="the folder of public samples is not beside the checkout"
)

MIB = 1 << 20


def text_of(name: str) -> str:
    return (SAMPLES / name).read_text(encoding="utf-8")


def gpu_of(name: str) -> Gpu:
    (gpu,) = nvidia_smi_q.read(text_of(name)).gpus
    return gpu


def why(value: object) -> Why:
    assert isinstance(value, Absent)
    return value.why


@needs_samples
def test_an_h100_under_load_is_read_whole() -> None:
    report = nvidia_smi_q.read(text_of("smi-q-h100-load.txt"))
    (gpu,) = report.gpus
    assert (report.stack.driver, report.stack.cuda_driver) == ("590.48.01", "13.1")
    assert report.at == 1784016773.0
    assert (gpu.name, gpu.pci_address, gpu.pci_device_id) == ("NVIDIA H100 80GB HBM3", "0000:00:09.0", "10de:2330")
    assert (gpu.compute_capability, gpu.persistence_mode, gpu.compute_mode) == ((9, 0), True, "default")
    assert (gpu.recovery_action, gpu.lost, gpu.vbios_version) == ("none", False, "96.00.A5.00.01")
    assert (gpu.memory.total_bytes, gpu.memory.used_bytes) == (81559 * MIB, 19818 * MIB)
    assert (gpu.thermal.gpu_celsius, gpu.thermal.margin_celsius, gpu.thermal.memory_celsius) == (59, 26, 55)
    assert (gpu.thermal.slowdown_margin_celsius, gpu.thermal.shutdown_margin_celsius) == (-2, -8)
    assert (gpu.power.average_watts, gpu.power.instant_watts, gpu.power.limit_watts) == (629.45, 588.39, 700)
    assert (gpu.activity.gpu_ratio, gpu.activity.memory_ratio) == (1.0, 0.11)
    assert (gpu.pcie.generation, gpu.pcie.generation_max, gpu.pcie.width, gpu.pcie.replays_total) == (5, 5, 16, 9)
    assert (gpu.ecc.enabled, gpu.ecc.uncorrected_aggregate, gpu.ecc.remap_pending) == (True, 0, False)
    assert (gpu.fabric.state, gpu.fabric.status, gpu.fabric.health) == ("completed", "Success", "not-reported")
    assert (gpu.mig.enabled, gpu.mig.enabled_after_reset, gpu.mig.devices) == (False, False, ())
    assert (gpu.clocks.performance_state, gpu.clocks.event_reasons, gpu.clocks.sm_mhz) == (0, (), 1980)
    assert known(gpu.processes)
    assert next((p.pid, p.used_bytes) for p in gpu.processes) == (11327, 2566 * MIB)
    assert why(gpu.links) is Why.NOT_GIVEN


@needs_samples
def test_mig_devices_have_their_own_memory_and_processes() -> None:
    gpu = gpu_of("smi-q-h100mig-load.txt")
    assert gpu.mig.enabled is True
    assert known(gpu.mig.devices)
    assert [(d.gpu_instance, d.multiprocessors, d.memory_total_bytes) for d in gpu.mig.devices] == [
        (2, 60, 40448 * MIB), (3, 32, 20096 * MIB), (9, 16, 9984 * MIB), (10, 16, 9984 * MIB),
    ]  # fmt: skip
    assert [len(d.processes) for d in gpu.mig.devices if known(d.processes)] == [3, 0, 0, 0]
    assert why(gpu.activity.gpu_ratio) is Why.NOT_SUPPORTED
    assert why(gpu.ecc.remap_pending) is Why.NOT_SUPPORTED


@needs_samples
def test_the_labels_of_driver_610_are_understood() -> None:
    report = nvidia_smi_q.read(text_of("smi-q-rtx2080s_610-load.txt"))
    (gpu,) = report.gpus
    assert (report.stack.driver, report.stack.cuda_driver) == ("610.57.04", "13.3")
    assert (gpu.power.limit_watts, gpu.power.limit_default_watts, gpu.power.instant_watts) == (250, 250, 97.75)
    assert (gpu.thermal.slowdown_celsius, gpu.thermal.fan_percent) == (97, 38)
    assert (gpu.clocks.performance_state, gpu.clocks.sw_power_cap_seconds) == (2, 15820.333506)
    for value in (
        gpu.ecc.enabled,
        gpu.fabric.state,
        gpu.mig.enabled,
        gpu.thermal.margin_celsius,
        gpu.power.average_watts,
    ):
        assert why(value) is Why.NOT_SUPPORTED


@needs_samples
def test_an_excerpt_without_its_gpu_is_of_the_first_one() -> None:
    gpu = gpu_of("smi-temperature-a100-sxm.txt")
    assert (gpu.index, gpu.thermal.gpu_celsius, gpu.thermal.slowdown_celsius, gpu.thermal.memory_max_celsius) == (
        0,
        28,
        89,
        95,
    )
    assert why(gpu.name) is Why.NOT_GIVEN


@needs_samples
@pytest.mark.parametrize("path", sorted(SAMPLES.glob("smi-q-*-*.txt")), ids=lambda path: path.stem)
def test_nothing_in_a_public_capture_failed_to_be_understood(path: Path) -> None:
    def failures(value: object, place: str) -> list[str]:
        if isinstance(value, Absent):
            return [f"{place}: {value}"] if value.why is Why.FAILED else []
        fields = getattr(value, "__struct_fields__", ())
        return [failure for field in fields for failure in failures(getattr(value, field), f"{place}.{field}")]

    for gpu in nvidia_smi_q.read(path.read_text()).gpus:
        assert failures(gpu, "gpu") == []


def test_a_lost_gpu_between_two_others_is_lost_and_they_are_not() -> None:
    report = nvidia_smi_q.read(
        "==============NVSMI LOG==============\n\nGPU 00000000:18:00.0\n    Product Name : NVIDIA H100 80GB HBM3\n"
        "Unable to determine the device handle for GPU0000:3B:00.0: GPU is lost.  Reboot the system to recover this GPU\n"
        "GPU 00000000:5D:00.0\n    Product Name : NVIDIA H100 80GB HBM3\n    Temperature\n        GPU Current Temp : [GPU is lost]\n"
    )
    assert [(gpu.index, gpu.pci_address, gpu.lost) for gpu in report.gpus] == [
        (0, "0000:18:00.0", False), (1, "0000:3b:00.0", True), (2, "0000:5d:00.0", False),
    ]  # fmt: skip
    assert why(report.gpus[2].thermal.gpu_celsius) is Why.LOST


def test_a_log_of_one_gpu_among_several_knows_which() -> None:
    (gpu,) = nvidia_smi_q.read("Attached GPUs : 8\nGPU 00000000:18:00.0\n    Minor Number : 5\n").gpus
    assert (gpu.index, gpu.uuid) == (5, "index:5")


def test_active_reasons_and_an_unhealthy_fabric_are_told_by_their_names() -> None:
    (gpu,) = nvidia_smi_q.read(
        "GPU 00000000:18:00.0\n    Clocks Throttle Reasons\n        Idle : Not Active\n        HW Slowdown : Active\n"
        "            HW Thermal Slowdown : Active\n        SW Power Cap : Active\n"
        "    Fabric\n        State : Completed\n        Status : Insufficient Resources\n        Health\n"
        "            Summary : Unhealthy\n            Bandwidth : Degraded\n            Route Unhealthy : False\n"
    ).gpus
    assert gpu.clocks.event_reasons == ("hw-slowdown", "hw-thermal-slowdown", "sw-power-cap")
    assert (gpu.fabric.status, gpu.fabric.health) == ("Insufficient Resources", "unhealthy")
    assert gpu.fabric.unhealthy == ("Bandwidth: Degraded",)


def test_counters_of_old_drivers_are_summed_like_those_of_new_ones() -> None:
    (gpu,) = nvidia_smi_q.read(
        "GPU 00000000:18:00.0\n    ECC Errors\n        Volatile\n            Single Bit\n                Device Memory : 1\n"
        "                Total : 3\n            Double Bit\n                Total : 2\n"
        "        Aggregate\n            SRAM Uncorrectable Parity : 1\n            SRAM Uncorrectable SEC-DED : 2\n"
        "            DRAM Uncorrectable : 4\n            DRAM Correctable : 8\n"
    ).gpus
    ecc = gpu.ecc
    assert (ecc.corrected_volatile, ecc.uncorrected_volatile) == (3, 2)
    assert (ecc.corrected_aggregate, ecc.uncorrected_aggregate) == (8, 7)


@pytest.mark.parametrize(
    ("printed", "reason"),
    [
        ("N/A", Why.NOT_SUPPORTED),
        ("[Unknown Error]", Why.FAILED),
        ("Insufficient Permissions", Why.NO_PERMISSION),
        ("banana", Why.FAILED),
    ],
)
def test_what_stands_in_place_of_a_value_says_why_it_is_missing(printed: str, reason: Why) -> None:
    (gpu,) = nvidia_smi_q.read(f"GPU 00000000:18:00.0\n    Temperature\n        GPU Current Temp : {printed}\n").gpus
    assert why(gpu.thermal.gpu_celsius) is reason


def test_masked_identities_are_no_identities() -> None:
    listing = "".join(
        f"GPU {i}: NVIDIA H100 (UUID: GPU-00000000-0000-0000-0000-00000000000{i // 2})\n" for i in range(4)
    )
    assert [gpu.uuid for gpu in nvidia_smi_list.read(listing)] == ["index:0", "index:1", "index:2", "index:3"]
    (real,) = nvidia_smi_list.read("GPU 0: NVIDIA H100 (UUID: GPU-4f1c2b3a-0000-1111-2222-333344445555)\n")
    assert real.uuid == "GPU-4f1c2b3a-0000-1111-2222-333344445555"


@needs_samples
@pytest.mark.parametrize(
    ("name", "active", "down"),
    [
        ("nvlink-s-h100.txt", [18], [0]),
        ("nvlink-s-a100-sxm80-8gpu.txt", [12] * 8, [0] * 8),
        ("nvlink-s-v100-inactive.txt", [4], [2]),
    ],
)
def test_links_are_counted(name: str, active: list[int], down: list[int]) -> None:
    gpus = nvidia_smi_list.read(text_of(name))
    links = [gpu.links for gpu in gpus if known(gpu.links)]
    assert [sum(link.active is True for link in of_gpu) for of_gpu in links] == active
    assert [sum(link.active is False for link in of_gpu) for of_gpu in links] == down


@needs_samples
def test_links_that_were_refused_or_cut_are_absent_not_down() -> None:
    (mig,) = nvidia_smi_list.read(text_of("nvlink-s-h100mig.txt"))
    assert why(mig.links) is Why.NOT_SUPPORTED
    (cut,) = nvidia_smi_list.read(text_of("nvlink-e-and-status.txt"))
    assert why(cut.links) is Why.NOT_GIVEN


def test_errors_and_far_ends_join_the_links() -> None:
    (gpu,) = nvidia_smi_list.read(
        "GPU 0: NVIDIA H100 (UUID: GPU-1)\n\t Link 0: 26.562 GB/s\n\t Link 1: <inactive>\n"
        "GPU 0: NVIDIA H100 (UUID: GPU-1)\n\t Link 0: Replay Errors: 4\n\t Link 0: Recovery Errors: 1\n\t Link 0: CRC Errors: 9\n"
        "GPU 0: NVIDIA H100 (UUID: GPU-1)\n\t Link 0: Remote Device 00000000:8B:00.0: Link 16\n"
    )
    assert known(gpu.links)
    link = gpu.links[0]
    assert (link.speed_bytes_per_second, link.replay_errors_total, link.recovery_errors_total) == (26.562e9, 4, 1)
    assert (link.crc_errors_total, link.remote_pci_address, gpu.links[1].active) == (9, "0000:8b:00.0", False)


@needs_samples
def test_a_list_names_mig_devices_by_profile() -> None:
    (gpu,) = nvidia_smi_list.read(text_of("smi-L-h200mig.txt"))
    assert gpu.mig.enabled is True
    assert known(gpu.mig.devices)
    assert [device.profile for device in gpu.mig.devices] == [
        "1c.3g.71gb",
        "2c.3g.71gb",
        "2g.35gb",
        "1g.18gb",
        "1g.18gb",
    ]


@needs_samples
def test_the_table_gives_what_it_shows() -> None:
    report = nvidia_smi_table.read(text_of("smi-table-h200-load.txt"))
    (gpu,) = report.gpus
    assert (report.stack.driver, gpu.name, gpu.pci_address) == ("590.48.01", "NVIDIA H200", "0000:83:00.0")
    assert (gpu.thermal.gpu_celsius, gpu.power.average_watts, gpu.power.limit_enforced_watts) == (52, 628, 700)
    assert (gpu.memory.used_bytes, gpu.activity.gpu_ratio, gpu.mig.enabled) == (32362 * MIB, 1.0, False)
    assert known(gpu.processes)
    assert [process.pid for process in gpu.processes] == [10291, 10293, 10309]
    (mig,) = nvidia_smi_table.read(text_of("smi-table-h100mig-load.txt")).gpus
    assert known(mig.mig.devices)
    assert [device.gpu_instance for device in mig.mig.devices] == [2, 3, 9, 10]


@needs_samples
def test_lspci_counts_gpus_and_switches() -> None:
    devices = lspci.read(text_of("lspci-nn-a100-nvswitch.txt"))
    assert [d.kind for d in devices].count("gpu") == 8
    assert [d.kind for d in devices].count("nvswitch") == 6
    first = lspci.read(text_of("lspci-h100-nvswitch-vm.txt"))[0]
    assert (first.address, first.device_id, first.kind) == ("0000:09:00.0", "10de:22a3", "nvswitch")


@needs_samples
@pytest.mark.parametrize(
    "name", ["fabricmanager-systemd-active-h100.txt", "fabricmanager-systemd-active-b300-nvlsm.txt"]
)
def test_an_active_fabric_manager_runs(name: str) -> None:
    manager = systemctl_status.read(text_of(name))
    assert (manager.unit_state, manager.running) == ("active", True)
    assert [message.kind for message in manager.messages] == ["started"]


def test_a_failed_fabric_manager_does_not_run() -> None:
    failed = systemctl_status.read(
        "× nvidia-fabricmanager.service - NVIDIA fabric manager service\n     Loaded: loaded\n"
        "     Active: failed (Result: exit-code) since Tue 2026-11-17 02:10:15 UTC; 4 days ago\n"
        "   Main PID: 2116 (code=exited, status=1/FAILURE)\n"
    )
    assert (failed.unit_state, failed.running) == ("failed", False)
    assert (
        systemctl_status.read("× nvidia-fabricmanager.service - NVIDIA fabric manager service\n").unit_state == "failed"
    )
    assert (
        known(systemctl_status.read("● nvidia-fabricmanager.service - NVIDIA fabric manager service\n").running)
        is False
    )
    nowhere = systemctl_status.read("Unit nvidia-fabricmanager.service could not be found.\n")
    assert why(nowhere.unit_state) is Why.NOT_PRESENT


WORDS = st.sampled_from(
    ["GPU 00000000:18:00.0", "    Temperature", "        GPU Current Temp : 9", "    Processes", "        Process ID : 7", "MIG Device", " : ",
     "GPU 0: x (UUID: GPU-1)", "\t Link 0: 1.1.1 GB/s", "| NVIDIA-SMI 1 Driver Version: 1 CUDA Version: 1 |", "[10de:2330]", "\n", "N/A"]
)  # fmt: skip


@settings(max_examples=200, deadline=None)
@given(st.text(max_size=300) | st.lists(WORDS | st.text(max_size=12), max_size=40).map("\n".join))
def test_no_text_raises_and_every_span_lies_in_the_text(text: str) -> None:
    for reader in (nvidia_smi_q, nvidia_smi_list, nvidia_smi_table, lspci, systemctl_status):
        reader.read(text)
        for start, end in reader.find(text):
            assert 0 <= start <= end <= len(text)
