"""NVML through the real pynvml in the real child process, on nodes that do not exist."""

from __future__ import annotations

import csv
import itertools
import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import psutil
import pynvml
import pytest
from daemons import await_true
from hypothesis import given, settings
from hypothesis import strategies as st
from switched_nvml import Spec

from doctor.collectors import nvml
from doctor.collectors.collector import CannotSeeError, Reading, Visit
from doctor.collectors.nvml import FEED_MARGIN_SECONDS, NvmlCollector
from doctor.collectors.nvml_words import fabric_faults
from doctor.simulation import faults
from doctor.simulation.physics import Drill
from doctor.simulation.profiles import PROFILES
from doctor.snapshot import Absent, Gpu, GpuPair, Host, NvLink, PciDevice, Snapshot, Source, Why, Xid, known

SINCE = Path(__file__).parent.parent.parent / "shared" / "reference" / "nvml-since.csv"
PRODUCTS = Path(__file__).parent.parent.parent / "shared" / "reference" / "products.csv"

Node = Callable[..., NvmlCollector]


Switched = Callable[..., tuple[NvmlCollector, Path]]


@pytest.fixture
def made() -> Iterator[list[NvmlCollector]]:
    """Collectors of this test; when it is over, no child of theirs is left, alive or as a zombie."""
    collectors: list[NvmlCollector] = []
    yield collectors
    pids = [collector.child_pid for collector in collectors]
    for collector in collectors:
        collector.close()
    for pid in pids:
        assert pid is None or not Path(f"/proc/{pid}").exists()


@pytest.fixture
def node(made: list[NvmlCollector]) -> Node:
    """Simulated nodes."""

    def make(profile: str, *texts: str, patience: float = 20.0, root: Path | None = None) -> NvmlCollector:
        spec = msgspec.json.encode(drill_of(profile, *texts)).decode()
        made.append(NvmlCollector(root=root, library="doctor.simulation.nvml", spec=spec, patience_seconds=patience))
        return made[-1]

    return make


@pytest.fixture
def switched(made: list[NvmlCollector], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Switched:
    """Simulated nodes that were seen once, and the folder of their switches (`switched_nvml`)."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parent))

    def make(profile: str, *texts: str, root: Path | None = None) -> tuple[NvmlCollector, Path]:
        (tmp_path / "library").touch()
        spec = msgspec.json.encode(Spec(drill_of(profile, *texts), str(tmp_path))).decode()
        made.append(NvmlCollector(root=root, library="switched_nvml", spec=spec, patience_seconds=20.0))
        look(made[-1])
        return made[-1], tmp_path

    return make


def drill_of(profile: str, *texts: str) -> Drill:
    return Drill(profile=profile, started_at=time.time(), faults=faults.parse_all(texts, faults.profile(profile)))


def look(collector: NvmlCollector) -> Reading:
    return collector.collect(Visit(at=time.time()))


def gpus(collector: NvmlCollector) -> tuple[Gpu, ...]:
    return look(collector).fields["gpus"]


def pairs(collector: NvmlCollector) -> tuple[GpuPair, ...]:
    return look(collector).fields["pairs"]


def unseen(collector: NvmlCollector) -> CannotSeeError:
    with pytest.raises(CannotSeeError) as e:
        look(collector)
    return e.value


def seen_again(collector: NvmlCollector) -> Reading:
    """Look until there is something to see."""
    collector.deadline_seconds = 20.0

    def again() -> Reading | None:
        try:
            return look(collector)
        except CannotSeeError:
            return None

    reading = await_true(again)
    assert isinstance(reading, Reading)
    return reading


def links(gpu: Gpu) -> tuple[NvLink, ...]:
    assert known(gpu.links)
    return gpu.links


def heed(collector: NvmlCollector, *events: Xid) -> None:
    collector.heed(Snapshot(at=time.time(), kernel=events))


def why(value: object) -> Why:
    assert isinstance(value, Absent), value
    return value.why


def flip(switch: Path, text: str) -> None:
    """Write a switch whole at once: the child looks at it ten times a second."""
    unfinished = switch.with_suffix(".unfinished")
    unfinished.write_text(text)
    unfinished.rename(switch)


class TestHealthyNodes:
    @pytest.mark.parametrize("profile", PROFILES)
    def test_a_node_is_what_its_product_sheet_says(self, profile: str, node: Node) -> None:
        if not PRODUCTS.is_file():
            pytest.skip("the reference tables are not on this machine")
        seen = gpus(node(profile))
        rows = {row["pci_device_id"]: row for row in csv.DictReader(PRODUCTS.read_text().splitlines())}
        assert len(seen) == int(profile.rsplit("-", maxsplit=1)[-1].partition("of")[0])
        for gpu in seen:
            assert known(gpu.pci_device_id)
            row = rows[gpu.pci_device_id]
            assert gpu.name == row["nvml_name"]
            assert gpu.memory.total_bytes == int(row["memory_mib_nvml"]) << 20
            assert gpu.clocks.memory_max_mhz == int(row["mem_clock_max_mhz"])
            assert gpu.clocks.sm_max_mhz == int(row["sm_clock_max_mhz"])
            assert gpu.power.limit_default_watts == int(row["power_default_w"])
            assert gpu.power.limit_min_watts == int(row["power_min_w"])
            assert (gpu.pcie.generation, gpu.pcie.width) == (int(row["pcie_gen"]), int(row["pcie_width"]))
            assert gpu.compute_capability == tuple(map(int, row["compute_capability"].split(".")))
            expected = row["nvlink_links"].split()[0]
            assert len(links(gpu)) == (0 if expected == "0" else int(expected))
            assert gpu.lost is False

    @pytest.mark.parametrize(
        ("profile", "expected"),
        [
            ("hgx-h100-8", {18}),
            ("dgx-h100-4of8", {18}),
            ("hgx-h200-8", {18}),
            ("hgx-a100-8", {12}),
            ("hgx-h100-4", {6}),
            ("h100-nvl-4", {12, 0}),
            ("h100-pcie-4", {0}),
            ("l40s-4", {0}),
            ("rtx4090-4", {0}),
        ],
    )
    def test_nvlinks_of_a_pair_are_those_of_the_topology_matrix(
        self, profile: str, expected: set[int], node: Node
    ) -> None:
        seen = pairs(node(profile))
        count = len(PROFILES[profile].gpus)
        assert len(seen) == count * (count - 1) // 2
        assert {pair.nvlinks for pair in seen} == expected

    def test_links_behind_switches_end_at_switches(self, node: Node) -> None:
        gpu = gpus(node("hgx-h100-8"))[3]
        assert {link.remote for link in links(gpu)} == {"switch"}
        assert {link.version for link in links(gpu)} == {"4.0"}
        assert {link.speed_bytes_per_second for link in links(gpu)} == {26.562e9}

    def test_links_of_a_mesh_end_at_the_other_gpus(self, node: Node) -> None:
        seen = gpus(node("hgx-h100-4"))
        assert {link.remote for link in links(seen[0])} == {"gpu"}
        assert {link.remote_pci_address for link in links(seen[0])} == {gpu.pci_address for gpu in seen[1:]}

    def test_an_unbridged_card_has_links_that_are_down_and_tell_no_other_end(self, node: Node) -> None:
        gpu = gpus(node("h100-pcie-4"))[0]
        assert {link.active for link in links(gpu)} == {False}
        assert {why(link.remote) for link in links(gpu)} == {Why.NOT_SUPPORTED}

    def test_the_fabric_is_completed_and_its_health_not_reported(self, node: Node) -> None:
        fabric = gpus(node("hgx-h100-8"))[0].fabric
        assert (fabric.state, fabric.status, fabric.health, fabric.unhealthy) == (
            "completed", "Success", "not-reported", (),
        )  # fmt: skip
        assert why(gpus(node("hgx-a100-8"))[0].fabric.state) is Why.NOT_SUPPORTED

    def test_what_a_board_does_not_have_is_not_supported_and_never_zero(self, node: Node) -> None:
        gpu = gpus(node("rtx4090-4"))[0]
        for value in (
            gpu.serial, gpu.mig.enabled, gpu.ecc.enabled, gpu.ecc.uncorrected_volatile, gpu.thermal.margin_celsius,
            gpu.thermal.slowdown_margin_celsius, gpu.activity.sm_ratio, gpu.fabric.state,
        ):  # fmt: skip
            assert why(value) is Why.NOT_SUPPORTED
        assert gpu.thermal.slowdown_celsius == 96

    def test_ga100_has_instant_power_and_no_average(self, node: Node) -> None:
        power = gpus(node("hgx-a100-8"))[0].power
        assert why(power.average_watts) is Why.NOT_SUPPORTED
        assert known(power.instant_watts)

    def test_thresholds_are_margins_on_hopper_and_degrees_before(self, node: Node) -> None:
        hopper, ampere = gpus(node("hgx-h100-8"))[0].thermal, gpus(node("hgx-a100-8"))[0].thermal
        assert (hopper.slowdown_margin_celsius, hopper.shutdown_margin_celsius) == (-2, -8)
        assert why(hopper.slowdown_celsius) is Why.NOT_SUPPORTED
        assert (ampere.slowdown_celsius, ampere.shutdown_celsius, ampere.memory_max_celsius) == (89, 92, 95)
        assert why(ampere.margin_celsius) is Why.NOT_SUPPORTED

    def test_power_is_sampled_between_visits_and_rates_come_with_the_second(self, node: Node) -> None:
        collector = node("hgx-h100-8")
        assert why(gpus(collector)[0].activity.sm_ratio) is Why.NOT_ASKED

        def sampled() -> Gpu | None:
            time.sleep(0.65)
            gpu = gpus(collector)[5]
            return gpu if len(gpu.power.samples) >= 4 else None

        gpu = await_true(sampled)
        assert isinstance(gpu, Gpu)
        assert all(70 < sample.value < 700 for sample in gpu.power.samples)
        gaps = [b.at - a.at for a, b in zip(gpu.power.samples, gpu.power.samples[1:], strict=False)]
        assert min(gaps) > 0.05
        assert known(gpu.activity.sm_ratio)
        assert 0.3 < gpu.activity.sm_ratio < 1
        assert known(gpu.activity.nvlink_tx_bytes_per_second)
        assert gpu.activity.nvlink_tx_bytes_per_second > 1e9

    def test_processes_are_the_ranks_of_the_engine(self, node: Node) -> None:
        workload = PROFILES["hgx-h100-8"].workload
        seen = gpus(node("hgx-h100-8"))
        found = [process.pid for gpu in seen if known(gpu.processes) for process in gpu.processes]
        assert found == list(workload.rank_pids)

    def test_versions_are_told(self, node: Node) -> None:
        stack = look(node("l40s-4")).fields["stack"]
        assert (stack.driver, stack.nvml, stack.cuda_driver) == ("595.80", "13.595.80", "13.2")


class TestFaultyNodes:
    def test_a_link_that_is_down_is_seen_at_its_gpu_alone(self, node: Node) -> None:
        collector = node("hgx-h100-8", "nvlink-down:gpu=2,link=5")
        reading = look(collector)
        down = [(g.index, k.link) for g in reading.fields["gpus"] for k in links(g) if k.active is False]
        assert down == [(2, 5)]
        second = reading.fields["gpus"][2].uuid
        assert {p.nvlinks for p in reading.fields["pairs"] if second in (p.first, p.second)} == {17}
        assert {p.nvlinks for p in reading.fields["pairs"] if second not in (p.first, p.second)} == {18}

    def test_a_link_of_a_mesh_is_down_at_both_ends(self, node: Node) -> None:
        collector = node("hgx-h100-4", "nvlink-down:gpu=0,link=0")
        reading = look(collector)
        assert sum(k.active is False for g in reading.fields["gpus"] for k in links(g)) == 2
        assert sorted(p.nvlinks for p in reading.fields["pairs"]) == [5, 6, 6, 6, 6, 6]

    def test_all_links_down_leave_pcie(self, node: Node) -> None:
        seen = pairs(node("dgx-h100-4of8", "nvlinks-all-down"))
        assert {p.nvlinks for p in seen} == {0}
        assert {p.p2p_nvlink for p in seen} == {"not-supported"}

    @pytest.mark.parametrize("profile", ["hgx-h100-8", "hgx-a100-8"])
    def test_errors_of_a_link_grow(self, profile: str, node: Node) -> None:
        collector = node(profile, "nvlink-errors:gpu=1,link=3,rate=50")
        before = links(gpus(collector)[1])[3].replay_errors_total
        time.sleep(0.3)
        seen = gpus(collector)
        after = links(seen[1])[3]
        assert known(before)
        assert known(after.replay_errors_total)
        assert after.replay_errors_total >= before + 10
        assert known(after.recovery_errors_total)
        assert after.recovery_errors_total > 0
        assert links(seen[1])[2].replay_errors_total == 0

    def test_a_gpu_lost_on_the_way_keeps_its_name_and_says_why_the_rest_is_missing(self, switched: Switched) -> None:
        collector, switches = switched("hgx-h100-8")
        before = gpus(collector)[2]
        assert before.lost is False
        flip(switches / "lost", "2")
        reading = look(collector)
        gone = reading.fields["gpus"][2]
        assert gone.lost is True
        assert (gone.uuid, gone.pci_address, gone.name) == (before.uuid, before.pci_address, before.name)
        assert {why(v) for v in (gone.links, gone.power.instant_watts, gone.processes, gone.ecc.enabled)} == {Why.LOST}
        assert {g.lost for g in reading.fields["gpus"] if g.index != 2} == {False}
        assert {why(p.p2p_read) for p in reading.fields["pairs"] if gone.uuid in (p.first, p.second)} == {Why.LOST}
        assert len(reading.fields["pairs"]) == 28

    def test_a_gpu_lost_before_has_an_index_only(self, node: Node) -> None:
        gone = gpus(node("dgx-h100-4of8", "gpu-lost:gpu=2"))[2]
        assert (gone.uuid, gone.lost, why(gone.pci_address)) == ("index:2", True, Why.LOST)

    def test_pcie_trained_down_is_seen(self, node: Node) -> None:
        seen = gpus(node("hgx-h100-8", "pcie-width:gpu=1,width=4", "pcie-generation:gpu=3,generation=3"))
        assert (seen[1].pcie.width, seen[1].pcie.width_max) == (4, 16)
        assert (seen[3].pcie.generation, seen[3].pcie.generation_max) == (3, 5)

    def test_an_idle_geforce_rests_at_generation_one(self, node: Node) -> None:
        gpu = gpus(node("rtx4090-4", "gpu-idle:gpu=2"))[2]
        assert (gpu.pcie.generation, gpu.clocks.performance_state, gpu.clocks.event_reasons) == (1, 8, ("idle",))

    def test_blocked_peers_say_so(self, node: Node) -> None:
        assert {p.p2p_read for p in pairs(node("h100-pcie-4", "p2p-blocked"))} == {"chipset-not-supported"}
        assert {p.p2p_read for p in pairs(node("rtx4090-4"))} == {"gpu-not-supported"}

    def test_mig_instances_are_listed_and_what_mig_hides_is_not_supported(self, node: Node) -> None:
        seen = gpus(node("hgx-h100-8", "mig-enabled:gpu=1"))
        gpu = seen[1]
        assert known(gpu.mig.devices)
        assert [d.profile for d in gpu.mig.devices] == ["3g.40gb", "2g.20gb", "1g.10gb", "1g.10gb"]
        assert [d.gpu_instance for d in gpu.mig.devices] == [2, 3, 9, 10]
        assert gpu.mig.devices[0].memory_total_bytes == 40448 << 20
        assert all(d.uuid.startswith("MIG-") for d in gpu.mig.devices)
        assert known(gpu.mig.devices[0].processes)
        assert gpu.mig.devices[0].processes[0].pid == PROFILES["hgx-h100-8"].workload.rank_pids[1]
        for value in (gpu.links, gpu.activity.gpu_ratio, gpu.ecc.remap_pending, gpu.ecc.uncorrected_volatile):
            assert why(value) is Why.NOT_SUPPORTED
        assert seen[0].mig.devices == ()

    def test_a_mig_mode_that_waits_for_a_reset_is_pending(self, node: Node) -> None:
        mig = gpus(node("hgx-h100-8", "mig-pending:gpu=6"))[6].mig
        assert (mig.enabled, mig.enabled_after_reset) == (False, True)

    def test_heat_and_limits_show_in_reasons_and_durations(self, node: Node) -> None:
        texts = ("overheating:gpu=3", "power-cap:gpu=1,watts=300", "power-brake:gpu=5")
        seen = gpus(node("hgx-h100-8", *texts))
        assert known(seen[3].clocks.sw_thermal_seconds)
        assert seen[3].clocks.sw_thermal_seconds > 10
        assert seen[3].clocks.event_reasons == ("sw-thermal-slowdown",)
        assert seen[1].clocks.event_reasons == ("sw-power-cap",)
        assert (seen[1].power.limit_watts, seen[1].power.limit_default_watts) == (300, 700)
        assert seen[5].clocks.event_reasons == ("hw-power-brake", "hw-slowdown")
        assert known(seen[5].clocks.power_brake_seconds)
        assert seen[5].clocks.power_brake_seconds > 60
        assert seen[0].clocks.event_reasons == ()

    def test_memory_faults_are_told(self, node: Node) -> None:
        texts = ("ecc-uncorrected:gpu=0,count=3", "remap-pending:gpu=4", "recovery-action:gpu=4,action=drain-and-reset")
        seen = gpus(node("hgx-h100-8", *texts))
        assert (seen[0].ecc.uncorrected_volatile, seen[0].ecc.uncorrected_aggregate) == (3, 3)
        assert seen[4].ecc.remap_pending is True
        assert seen[4].recovery_action == "drain-and-reset"
        assert seen[1].recovery_action == "none"
        assert seen[1].ecc.remap_pending is False

    def test_a_fabric_that_is_not_well_says_how(self, node: Node) -> None:
        incomplete = node("hgx-h100-8", "fabric-incomplete")
        assert {gpu.fabric.state for gpu in gpus(incomplete)} == {"in-progress"}
        assert {p.p2p_nvlink for p in pairs(incomplete)} == {"not-supported"}
        seen = gpus(node("hgx-h200-8", "fabric-unhealthy:gpu=7"))
        assert (seen[7].fabric.health, seen[7].fabric.unhealthy) == ("unhealthy", ("degraded bandwidth",))
        assert seen[6].fabric.health == "not-reported"

    def test_a_serial_that_is_not_text_costs_only_itself(self, node: Node) -> None:
        seen = gpus(node("hgx-h100-8", "nvml-garbage-serial:gpu=1"))
        assert why(seen[1].serial) is Why.FAILED
        assert seen[0].serial == PROFILES["hgx-h100-8"].serial(0)
        assert known(seen[1].name)

    def test_another_process_on_a_gpu_is_listed_with_its_memory(self, node: Node) -> None:
        gpu = gpus(node("hgx-h100-8", "foreign-process:gpu=2,gib=3"))[2]
        assert known(gpu.processes)
        assert [(p.name, p.used_bytes) for p in gpu.processes][1] == ("/usr/bin/python3", 3 << 30)


class TestOldDriversAndRights:
    def test_what_an_old_driver_lacks_is_missing_and_the_rest_is_there(self, node: Node) -> None:
        reading = look(node("hgx-h100-8", "driver-old:branch=535"))
        gpu = reading.fields["gpus"][0]
        for value in (
            gpu.thermal.margin_celsius, gpu.fabric.health, gpu.ecc.sram_threshold_exceeded, gpu.recovery_action,
            gpu.clocks.hw_thermal_seconds,
        ):  # fmt: skip
            assert why(value) is Why.MISSING_SYMBOL
        assert known(gpu.thermal.gpu_celsius)
        assert known(gpu.power.average_watts)
        assert gpu.fabric.state == "completed"
        assert len(links(gpu)) == 18
        assert reading.fields["stack"].driver == "535.54.03"
        assert reading.fields["stack"].cuda_driver == "12.2"
        assert reading.unseen == ()

    def test_a_driver_before_the_link_fields_answers_by_its_getters(self, node: Node) -> None:
        gpu = gpus(node("hgx-a100-8", "driver-old:branch=470", "nvlink-errors:gpu=0,link=1,rate=1"))[0]
        assert [link.active for link in links(gpu)] == [True] * 12
        errors = links(gpu)[1].replay_errors_total
        assert known(errors)
        assert errors > 100
        assert known(gpu.processes)
        assert len(gpu.processes) == 1
        assert known(gpu.clocks.event_reasons)
        assert known(gpu.power.instant_watts)

    @pytest.mark.parametrize(
        "symbol", ["nvmlDeviceGetUUID", "nvmlDeviceGetFieldValues", "nvmlDeviceGetPciInfo_v3", "nvmlGpmSampleGet"]
    )
    def test_no_missing_symbol_stops_a_visit(self, symbol: str, node: Node) -> None:
        collector = node("h100-nvl-4", f"symbol-missing:name={symbol}")
        look(collector)
        seen = gpus(collector)
        assert len(seen) == 4
        assert all(known(gpu.memory.total_bytes) for gpu in seen)

    def test_every_symbol_can_be_missing(self, node: Node) -> None:
        names = (
            "nvmlDeviceGetName", "nvmlDeviceGetSerial", "nvmlDeviceGetTemperature", "nvmlDeviceGetTemperatureV",
            "nvmlDeviceGetMarginTemperature", "nvmlDeviceGetMemoryInfo_v2", "nvmlDeviceGetMemoryInfo",
            "nvmlDeviceGetMigMode", "nvmlDeviceGetP2PStatus", "nvmlDeviceGetTopologyCommonAncestor",
            "nvmlDeviceGetComputeRunningProcesses_v3", "nvmlDeviceGetComputeRunningProcesses_v2",
            "nvmlDeviceGetMemoryAffinity", "nvmlSystemGetDriverVersion", "nvmlDeviceGetGpuFabricInfoV",
            "nvmlDeviceGetGpuFabricInfo",
        )  # fmt: skip
        reading = look(node("hgx-h100-8", *(f"symbol-missing:name={name}" for name in names)))
        gpu, pair = reading.fields["gpus"][0], reading.fields["pairs"][0]
        for value in (
            gpu.name, gpu.serial, gpu.thermal.gpu_celsius, gpu.thermal.margin_celsius, gpu.memory.total_bytes,
            gpu.mig.enabled, pair.p2p_read, pair.ancestor, gpu.processes, gpu.numa_node, gpu.fabric.state,
            reading.fields["stack"].driver,
        ):  # fmt: skip
            assert why(value) is Why.MISSING_SYMBOL

    def test_calls_for_root_only_become_one_unseen_part(self, node: Node) -> None:
        reading = look(node("hgx-h100-8", "permission-denied"))
        assert [(u.source, u.why.why, u.what) for u in reading.unseen] == [
            (Source.NVML, Why.NO_PERMISSION, "SRAM error threshold")
        ]
        assert why(reading.fields["gpus"][0].ecc.sram_threshold_exceeded) is Why.NO_PERMISSION

    def test_no_right_to_the_device_is_said(self, node: Node) -> None:
        e = unseen(node("hgx-h100-8", "permission-denied:calls=all"))
        assert e.why == Absent(Why.NO_PERMISSION, "this user may not open /dev/nvidiactl")

    def test_libraries_of_another_version_than_the_module_are_said(self, node: Node) -> None:
        collector = node("hgx-h100-8", "driver-library-mismatch")
        e = unseen(collector)
        assert e.why.why is Why.FAILED
        assert "of different versions" in e.why.detail
        assert collector.child_pid is None


class TestNoDriver:
    def test_a_machine_without_a_driver_says_so_and_no_child_is_started(self, tmp_path: Path) -> None:
        collector = NvmlCollector(root=tmp_path, child=("/nowhere/child",))
        try:
            e = unseen(collector)
        finally:
            collector.close()
        assert e.why == Absent(Why.NOT_PRESENT, "no NVIDIA driver is loaded")
        assert collector.child_pid is None

    def test_a_driver_without_its_library_says_so(self, tmp_path: Path) -> None:
        if Path("/proc/driver/nvidia").exists():
            pytest.skip("this machine has the library")
        (tmp_path / "sys/module/nvidia").mkdir(parents=True)
        collector = NvmlCollector(root=tmp_path)
        try:
            e = unseen(collector)
        finally:
            collector.close()
        assert e.why.why is Why.NOT_PRESENT
        assert "libnvidia-ml.so.1" in e.why.detail


class TestSilence:
    def test_a_child_without_a_processor_says_nothing_of_the_driver(
        self, switched: Switched, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        collector, switches = switched("hgx-h100-8")
        collector.deadline_seconds = 0.4 + FEED_MARGIN_SECONDS
        waited = itertools.count(0.0, 3600.0)

        def starved(_pid: int) -> float:
            return next(waited)

        monkeypatch.setattr(nvml, "_starved_seconds", starved)
        (switches / "hang").touch()
        e = unseen(collector)
        assert e.why.why is Why.TIMED_OUT
        assert "this machine is overloaded" in e.why.detail
        assert e.fields == {}

    def test_a_hung_driver_is_answered_within_the_deadline_and_counted_on(self, switched: Switched) -> None:
        collector, switches = switched("hgx-h100-8")
        pid = collector.child_pid
        (switches / "hang").touch()
        collector.deadline_seconds = 0.4 + FEED_MARGIN_SECONDS
        began = time.monotonic()
        e = unseen(collector)
        assert e.fields["nvml_blocked_seconds"] <= time.monotonic() - began + 0.1
        assert e.why.why is Why.TIMED_OUT
        assert e.why.detail.startswith("NVML has not answered for ")
        assert e.fields["nvml_blocked_seconds"] >= 0.4
        time.sleep(0.5)
        later = unseen(collector)
        assert later.fields["nvml_blocked_seconds"] >= e.fields["nvml_blocked_seconds"] + 0.5
        assert collector.child_pid == pid

    def test_a_driver_that_hangs_from_the_start_leaves_no_child_behind(self, node: Node) -> None:
        collector = node("hgx-h100-8", "driver-hung", patience=0.8)
        e = unseen(collector)
        assert "persistence mode" in e.why.detail
        pid = collector.child_pid
        began = time.monotonic()
        collector.close()
        assert time.monotonic() - began < 1
        assert pid is not None
        assert not Path(f"/proc/{pid}").exists()

    def test_a_driver_that_comes_back_is_asked_afresh_and_its_late_answer_dropped(self, switched: Switched) -> None:
        collector, switches = switched("hgx-h100-8")
        pid = collector.child_pid
        (switches / "hang").touch()
        collector.deadline_seconds = 0.4 + FEED_MARGIN_SECONDS
        unseen(collector)
        (switches / "hang").unlink()
        back = time.time()
        reading = seen_again(collector)
        assert collector.child_pid == pid
        assert reading.fields["nvml_blocked_seconds"] == 0.0
        samples = reading.fields["gpus"][0].power.samples
        assert all(sample.at >= back - 0.2 for sample in samples)

    def test_a_child_that_is_killed_is_one_absence_and_then_replaced(self, node: Node) -> None:
        collector = node("l40s-4")
        look(collector)
        assert collector.child_pid is not None
        os.kill(collector.child_pid, signal.SIGKILL)
        e = unseen(collector)
        assert e.why == Absent(Why.FAILED, "the NVML child was killed by SIGKILL; the next visit starts a fresh one")
        assert len(gpus(collector)) == 4

    @pytest.mark.parametrize(
        "program",
        [
            "import os; os.read(0, 99); os.write(1, b'not a frame at all')",
            "import os; os.read(0, 99); os.write(1, bytes([0, 0, 0, 3]) + b'abc'); os.read(0, 1)",
            "import os; os.read(0, 99); os.write(1, bytes([255] * 8)); os.read(0, 1)",
        ],
    )
    def test_garbage_on_the_pipe_is_one_clear_absence(self, program: str) -> None:
        collector = NvmlCollector(root=None, child=(sys.executable, "-c", program))
        try:
            e = unseen(collector)
            assert e.why.why is Why.FAILED
            assert "bytes that are no answer; the next visit starts a fresh one" in e.why.detail
            assert collector.child_pid is None
        finally:
            collector.close()

    def test_an_end_is_told(self) -> None:
        collector = NvmlCollector(root=None, child=(sys.executable, "-c", "raise SystemExit(7)"))
        try:
            assert "ended with status 7" in unseen(collector).why.detail
        finally:
            collector.close()

    def test_a_child_that_can_not_be_started_is_said(self) -> None:
        collector = NvmlCollector(root=None, child=("/nonexistent/python",))
        assert "can't be started: No such file" in unseen(collector).why.detail

    def test_a_parent_that_is_killed_leaves_no_child_even_in_a_hang(self, tmp_path: Path) -> None:
        import subprocess

        drill = Drill(
            profile="l40s-4", started_at=time.time(), faults=faults.parse_all(["driver-hung"], PROFILES["l40s-4"])
        )
        program = (
            "import sys, time\n"
            "from doctor.collectors.collector import CannotSeeError, Visit\n"
            "from doctor.collectors.nvml import NvmlCollector\n"
            "c = NvmlCollector(root=None, library='doctor.simulation.nvml', spec=sys.argv[1], patience_seconds=0.6)\n"
            "try:\n    c.collect(Visit(at=0.0))\nexcept CannotSeeError:\n    print(c.child_pid, flush=True)\n"
            "time.sleep(60)\n"
        )
        spec = msgspec.json.encode(drill).decode()
        root = Path(__file__).parent.parent
        with subprocess.Popen(
            [sys.executable, "-c", program, spec], stdout=subprocess.PIPE, cwd=root, text=True
        ) as parent:
            assert parent.stdout is not None
            pid = int(parent.stdout.readline())
            parent.kill()
        until = time.monotonic() + 20
        while Path(f"/proc/{pid}").exists() and time.monotonic() < until:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                break  # its new parent, in a container perhaps a careless one, has yet to reap it
            time.sleep(0.05)
        else:
            assert not Path(f"/proc/{pid}").exists()

    def test_after_a_gsp_timeout_nvml_is_left_alone(self, node: Node) -> None:
        collector = node("hgx-h100-8")
        look(collector)
        heed(collector, xid(119, "0000:18:00.0", at=time.time() + 1))
        assert collector.child_pid is None
        e = unseen(collector)
        assert e.why.why is Why.NOT_ASKED
        assert "Xid 119" in e.why.detail
        assert collector.child_pid is None

    @pytest.mark.parametrize("answered", [True, False])
    def test_a_clock_that_is_set_makes_no_old_xid_new_and_no_new_one_old(self, answered: bool, node: Node) -> None:
        collector = node("l40s-4")
        address = gpus(collector)[1].pci_address
        assert known(address)
        at = time.time() - 7200  # the clock is set back by two hours
        if answered:
            collector.collect(Visit(at=at))
        collector.heed(Snapshot(at=at, clock_stepped_seconds=-7200.0))
        heed(collector, xid(79, address, at=at - 60))
        assert gpus(collector)[1].lost is False
        collector.collect(Visit(at=at + 1))
        heed(collector, xid(79, address, at=at + 60))
        assert gpus(collector)[1].lost is not False

    def test_a_gsp_timeout_before_a_good_answer_is_past(self, node: Node) -> None:
        collector = node("hgx-h100-8")
        look(collector)
        heed(collector, xid(119, "0000:18:00.0", at=time.time() - 600), xid(120, "0000:18:00.0", at=None))
        assert len(gpus(collector)) == 8

    def test_a_gpu_that_fell_off_the_bus_is_not_asked_any_more(self, node: Node) -> None:
        collector = node("hgx-h100-8")
        before = gpus(collector)[3]
        assert known(before.pci_address)
        heed(collector, xid(79, before.pci_address, at=time.time() + 1))
        reading = look(collector)
        gpu = reading.fields["gpus"][3]
        assert gpu.uuid == before.uuid
        assert why(gpu.lost) is Why.NOT_ASKED
        assert why(gpu.links) is Why.NOT_ASKED
        assert reading.fields["gpus"][2].lost is False
        assert [u.what for u in reading.unseen] == ["GPU 3"]

    def test_a_fresh_child_does_not_even_open_a_gpu_that_is_left_alone(self, node: Node, tmp_path: Path) -> None:
        addresses = PROFILES["dgx-h100-4of8"].pci_addresses
        for address in addresses:
            (tmp_path / "proc/driver/nvidia/gpus" / address).mkdir(parents=True)
        collector = node("dgx-h100-4of8", root=tmp_path)
        heed(collector, xid(79, addresses[1], at=time.time()))
        assert [gpu.lost is False for gpu in gpus(collector)] == [True, False, True, True]

    def test_what_nvml_called_lost_stays_lost_when_it_is_left_alone(self, switched: Switched) -> None:
        collector, switches = switched("hgx-h100-8")
        flip(switches / "lost", "3")
        lost = gpus(collector)[3]
        assert known(lost.pci_address)
        heed(collector, xid(79, lost.pci_address, at=time.time() - 0.3))
        reading = look(collector)
        assert reading.fields["gpus"][3].lost is True
        assert why(reading.fields["gpus"][3].links) is Why.NOT_ASKED
        assert reading.unseen == ()


class TestRenewal:
    """A child that has outlived its driver is replaced within the same visit."""

    def test_a_driver_that_was_reloaded_is_seen_by_a_fresh_child(self, switched: Switched) -> None:
        collector, switches = switched("l40s-4")
        pid = collector.child_pid
        flip(switches / "status", str(pynvml.NVML_ERROR_UNINITIALIZED))
        assert "reloaded since NVML was opened" in unseen(collector).why.detail
        (switches / "status").unlink()
        assert len(gpus(collector)) == 4
        assert collector.child_pid != pid

    @pytest.mark.parametrize(
        ("status", "reason"),
        [
            (pynvml.NVML_ERROR_DRIVER_NOT_LOADED, "no NVIDIA driver is loaded"),
            (pynvml.NVML_ERROR_LIB_RM_VERSION_MISMATCH, "of different versions"),
        ],
    )
    def test_a_driver_that_is_gone_is_one_reason_and_no_gpu(self, status: int, reason: str, switched: Switched) -> None:
        collector, switches = switched("l40s-4")
        flip(switches / "status", str(status))
        for _ in range(2):
            assert reason in unseen(collector).why.detail
            assert collector.child_pid is None
        (switches / "status").unlink()
        assert len(gpus(collector)) == 4

    def test_a_gpu_that_is_taken_out_and_put_back_is_followed_in_the_same_visit(self, switched: Switched) -> None:
        collector, switches = switched("l40s-4")
        uuids = [gpu.uuid for gpu in gpus(collector)]
        flip(switches / "gone", "1")
        assert [gpu.uuid for gpu in gpus(collector)] == [uuids[0], *uuids[2:]]
        assert [gpu.lost for gpu in gpus(collector)] == [False] * 3
        (switches / "gone").unlink()
        assert [gpu.uuid for gpu in gpus(collector)] == uuids

    def test_the_drivers_own_list_tells_of_a_gpu_that_came_too(self, switched: Switched, tmp_path: Path) -> None:
        root = tmp_path / "root"
        for address in PROFILES["l40s-4"].pci_addresses[:3]:
            (root / "proc/driver/nvidia/gpus" / address).mkdir(parents=True)
        collector, _ = switched("l40s-4", root=root)
        pid = collector.child_pid
        (root / "proc/driver/nvidia/gpus" / PROFILES["l40s-4"].pci_addresses[3]).mkdir()
        assert len(gpus(collector)) == 4
        assert collector.child_pid != pid

    def test_a_library_that_was_replaced_is_taken_where_it_goes_with_the_module(self, switched: Switched) -> None:
        collector, switches = switched("l40s-4")
        pid = collector.child_pid
        assert len(gpus(collector)) == 4
        assert collector.child_pid == pid
        replace(switches / "library")
        assert len(gpus(collector)) == 4
        assert collector.child_pid not in {pid, None}
        assert pid is not None
        assert not Path(f"/proc/{pid}").exists()

    def test_where_it_does_not_the_child_that_has_the_old_one_goes_on(self, switched: Switched) -> None:
        """As after an unattended upgrade, until the node is rebooted."""
        collector, switches = switched("l40s-4")
        pid = collector.child_pid
        replace(switches / "library")
        (switches / "mismatch").touch()
        for _ in range(3):
            assert len(gpus(collector)) == 4
            assert collector.child_pid == pid

    def test_a_gpu_that_fell_off_the_bus_is_asked_again_once_it_was_seen_gone_and_back(
        self, switched: Switched
    ) -> None:
        collector, _ = switched("l40s-4")
        address = PROFILES["l40s-4"].pci_addresses[1]

        def tree(*addresses: str) -> Snapshot:
            devices = tuple(PciDevice(address=a, device_id="10de:26b9", kind="gpu", width=16) for a in addresses)
            return Snapshot(at=time.time(), host=Host(pci_devices=devices))

        heed(collector, xid(79, address, at=time.time() + 1))
        collector.heed(tree(address))
        assert gpus(collector)[1].lost is not False, "it was never seen gone: the driver's word stands"
        collector.heed(tree())
        assert gpus(collector)[1].lost is not False
        collector.heed(tree(address))
        assert [gpu.lost for gpu in gpus(collector)] == [False] * 4


def replace(path: Path) -> None:
    """Put another file in its place, as a package manager does."""
    fresh = path.with_suffix(".new")
    fresh.touch()
    fresh.rename(path)


READS = "import os, signal, time; os.read(0, 99); "
CHAOS = {
    "killed in the middle of its answer": READS + "os.write(1, bytes([0, 0, 1, 0]) + b'abc'); os.kill(os.getpid(), 9)",
    "fell silent in the middle of its answer": READS + "os.write(1, bytes([0, 0, 1, 0]) + b'abc'); time.sleep(60)",
    "was stopped (SIGSTOP)": READS + "os.kill(os.getpid(), signal.SIGSTOP)",
    "bytes that are no answer": READS + "os.write(1, os.urandom(4096) + bytes([255] * 9)); time.sleep(60)",
    "are no answer": READS + "os.write(1, bytes([127] * 4)); time.sleep(60)",
    "ended with status 7": "raise SystemExit(7)",
}
"""What a child does, by what is told of it."""


class TestChaos:
    @pytest.mark.parametrize("told", CHAOS)
    def test_a_child_gone_mad_is_one_absence(self, told: str) -> None:
        collector = NvmlCollector(root=None, child=(sys.executable, "-SIc", CHAOS[told]), patience_seconds=20.0)
        if "silent" in told or "stopped" in told:  # silence is known by its length alone
            collector.deadline_seconds = 0.5 + FEED_MARGIN_SECONDS
        try:
            e = unseen(collector)
            while e.why.why is Why.TIMED_OUT:  # it has yet to begin
                e = unseen(collector)
        finally:
            collector.close()
        assert e.why.why is Why.FAILED
        assert told.replace("killed in the middle of its answer", "killed by SIGKILL") in e.why.detail
        assert e.why.detail.endswith("the next visit starts a fresh one")
        assert collector.child_pid is None

    @pytest.mark.parametrize("number", [signal.SIGSTOP, signal.SIGKILL, signal.SIGTERM])
    def test_a_signal_from_somebody_costs_one_visit(self, number: int, switched: Switched) -> None:
        collector, _ = switched("l40s-4")
        assert collector.child_pid is not None
        os.kill(collector.child_pid, number)
        collector.deadline_seconds = 1.0 + FEED_MARGIN_SECONDS
        unseen(collector)
        assert len(seen_again(collector).fields["gpus"]) == 4

    def test_a_child_that_hangs_outside_the_kernel_is_given_up_in_the_end(
        self, switched: Switched, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        collector, switches = switched("l40s-4")
        monkeypatch.setattr(nvml, "PROBE_SECONDS", 0.5)
        (switches / "hang").touch()
        collector.deadline_seconds = 0.2 + FEED_MARGIN_SECONDS
        while collector.child_pid is not None:
            assert unseen(collector).why.why is Why.TIMED_OUT
        (switches / "hang").unlink()
        assert len(seen_again(collector).fields["gpus"]) == 4

    def test_no_descriptor_left_costs_the_visits_without_one(self, switched: Switched) -> None:
        collector, _ = switched("l40s-4")
        collector.let_go()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
        try:
            for _ in range(3):
                assert "can't be started: Too many open files" in unseen(collector).why.detail
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        assert len(gpus(collector)) == 4

    def test_fifty_mad_children_leave_nothing_behind(self) -> None:
        def held() -> tuple[int, int, int]:
            children = psutil.Process().children(recursive=True)
            return sum(1 for _ in Path("/proc/self/fd").iterdir()), threading.active_count(), len(children)

        before = held()
        for number, program in enumerate(itertools.islice(itertools.cycle(CHAOS.values()), 50)):
            child = (sys.executable, "-SIc", program) if number % 10 else ("/nonexistent/python",)
            collector = NvmlCollector(root=None, child=child, patience_seconds=0.1)
            with pytest.raises(CannotSeeError):
                look(collector)
            collector.close()
        assert held() == before


def xid(code: int, pci_address: str, at: float | None) -> Xid:
    return Xid(text=f"NVRM: Xid (PCI:{pci_address}): {code}", where="kmsg:1", at=at, code=code, pci_address=pci_address)


def test_the_first_answer_comes_soon(node: Node) -> None:
    """A budget, not a measurement: benchmarks/visit_cost.py measures."""
    collector = node("hgx-h100-8")
    began = time.monotonic()
    look(collector)
    assert time.monotonic() - began < 2


def test_symbols_of_the_simulation_came_with_the_drivers_that_the_reference_tells() -> None:
    from doctor.simulation.nvml import SYMBOLS

    if not SINCE.is_file():
        pytest.skip("the reference tables are not on this machine")
    since = {row["symbol"]: int(row["driver_branch_leq"]) for row in csv.DictReader(SINCE.read_text().splitlines())}
    wrong = {name: (branch, since[name]) for name, (branch, _) in SYMBOLS.items() if branch != since.get(name, branch)}
    assert wrong == {}


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=200)
def test_any_health_mask_is_read(mask: int) -> None:
    assert all(fabric_faults(mask))


def test_a_mask_of_fields_that_are_false_or_not_reported_is_no_fault() -> None:
    assert fabric_faults(0) == ()
    assert fabric_faults(0b10101010 | 1 << 8) == ()
    assert fabric_faults(1 | 5 << 8) == ("degraded bandwidth", "insufficient NVLinks")
