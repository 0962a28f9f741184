"""A node that does not exist is seen by the same collectors, and nothing of it is left behind."""

from __future__ import annotations

import os
import tempfile
import threading
import time
from itertools import pairwise
from pathlib import Path

import drills
import msgspec
import psutil
import pytest

from doctor.feeds import simulated
from doctor.simulation.faults import HOST_KINDS, FaultError
from doctor.simulation.profiles import PROFILES
from doctor.snapshot import OomKill, Snapshot, Source, Sxid, Why, Xid, known
from doctor.snapshot.source import OF_A_NODE


def visits(profile: str, *faults: str, times: int = 1, every: float = 0.2) -> list[Snapshot]:
    return list(simulated.node(profile, faults, every=every, times=times))


def visit(*faults: str, profile: str = "dgx-h100-4of8") -> Snapshot:
    (snapshot,) = visits(profile, *faults)
    return snapshot


def signals(snapshot: Snapshot) -> list[str]:
    return [event.signal for event in snapshot.engine_events]


def kinds_of_cuda_error(snapshot: Snapshot) -> set[object]:
    return {event.facts.get("kind") for event in snapshot.engine_events if event.signal == "cuda-error"}


@pytest.mark.parametrize("name", PROFILES)
def test_of_a_healthy_node_every_source_is_seen(name: str) -> None:
    profile = PROFILES[name]
    first, second = visits(name, times=2)
    assert set(second.seen) == set(OF_A_NODE)
    assert second.unseen == ()
    assert second.node.simulated
    (engine,) = second.engines
    uuids = tuple(profile.uuid(gpu) for gpu in profile.workload.gpus)
    assert tuple(rank.gpu for rank in engine.ranks) == uuids == engine.visible_gpus
    assert [rank.rank for rank in engine.ranks] == list(range(len(uuids)))
    assert engine.log == "/var/log/vllm/serve.log"
    assert engine.flags.model == profile.workload.model
    assert known(engine.model.layers)
    assert known(engine.model.weights_bytes)
    assert engine.stack.torch_cuda == "13.0"
    assert "startup-complete" in signals(first)
    (before,), (after,) = first.metrics, second.metrics
    assert after.generation_tokens_total > before.generation_tokens_total
    assert after.running > 0
    assert len(second.host.pci_devices) == len(profile.gpus) + len(profile.switches)
    assert second.host.driver_module == second.stack.driver == profile.driver
    assert second.fabric_manager.running is profile.fabric_manager
    if profile.fabric_manager:
        assert second.fabric_manager.version == profile.driver


def test_no_visit_tells_where_the_simulation_keeps_its_files() -> None:
    for snapshot in simulated.node("hgx-h100-4", ("gpu-lost:gpu=1",), every=0.1, times=1):
        assert tempfile.gettempdir().encode() not in msgspec.json.encode(snapshot)


def test_a_lost_gpu_shows_in_every_world() -> None:
    snapshot = visit("gpu-lost:gpu=2")
    assert [event.code for event in snapshot.kernel if isinstance(event, Xid)] == [79, 154]
    assert {"watchdog-timeout", "engine-fatal", "engine-dead"} <= set(signals(snapshot))
    assert {event.rank for event in snapshot.engine_events if event.signal == "watchdog-timeout"} == {0, 1, 3}
    assert snapshot.gpus[2].lost is True
    assert snapshot.gpus[2].pci_address == PROFILES["dgx-h100-4of8"].pci_addresses[2]
    assert snapshot.engines == ()
    gone = next(device for device in snapshot.host.pci_devices if device.address == snapshot.gpus[2].pci_address)
    assert gone.width.why is Why.LOST


def test_a_fault_that_begins_later_is_seen_when_it_begins() -> None:
    first, *later = drills.visits("dgx-h100-4of8", "xid:code=48,gpu=1,start=0.5", seconds=(0, 0.3, 0.6, 0.9))
    assert not [event for event in first.kernel if isinstance(event, Xid)]
    (xid,) = [event for snapshot in later for event in snapshot.kernel if isinstance(event, Xid)]
    assert xid.code == 48
    assert xid.at == pytest.approx(first.at + 0.5, abs=1.1)  # the boot's time is in whole seconds


def test_a_rank_that_does_not_arrive_is_the_one_that_says_nothing() -> None:
    snapshot = visit("nccl-timeout:rank=1")
    assert {event.rank for event in snapshot.engine_events if event.signal == "watchdog-timeout"} == {0, 2, 3}


@pytest.mark.parametrize(
    ("kind", "busy"), [("hardware", [1, 1, 1, 1]), ("collective", [1, 1, 1, 0]), ("software", [0, 0, 0, 0])]
)
def test_a_stalled_engine_has_requests_and_makes_no_step(kind: str, busy: list[int]) -> None:
    first, second = visits("dgx-h100-4of8", f"engine-stalled:kind={kind}", times=2, every=0.5)
    assert first.metrics[0].running == second.metrics[0].running > 0
    assert first.metrics[0].steps_total == second.metrics[0].steps_total
    assert signals(first).count("shm-broadcast-wait") >= 1
    assert [round(gpu.activity.gpu_ratio) for gpu in second.gpus] == busy


def test_a_crash_is_told_by_the_log_alone() -> None:
    snapshot = visit("engine-crashed")
    assert snapshot.engines == ()
    assert {"engine-fatal", "exception", "engine-dead"} <= set(signals(snapshot))
    assert snapshot.why_unseen(Source.ENGINE_METRICS).why is Why.NOT_PRESENT


def test_a_start_that_runs_out_of_memory_never_completes() -> None:
    snapshot = visit("out-of-memory-at-startup")
    assert "cuda-out-of-memory" in signals(snapshot)
    assert "engine-core-init-failed" in signals(snapshot)
    assert "startup-complete" not in signals(snapshot)


def test_an_application_fault_shows_in_kernel_log_and_engine_log() -> None:
    snapshot = visit("application-fault:gpu=1")
    (xid,) = [event for event in snapshot.kernel if isinstance(event, Xid)]
    assert (xid.code, xid.process_name) == (31, "VLLM::Worker_TP")
    assert "illegal-memory-access" in kinds_of_cuda_error(snapshot)


def test_an_fp8_model_falls_back_to_weight_only() -> None:
    snapshot = visit("fp8-not-engaged")
    assert "fp8-weight-only" in signals(snapshot)
    assert snapshot.engines[0].model.quantization_method == "compressed-tensors"
    assert snapshot.gpus[0].compute_capability == (9, 0)


def test_a_single_stream_is_one_request_at_a_time() -> None:
    first, second = visits("dgx-h100-4of8", "single-stream", times=2, every=1.0)
    assert second.metrics[0].running == 1
    tokens = second.metrics[0].generation_tokens_total - first.metrics[0].generation_tokens_total
    assert 10 < tokens < 60


def test_a_driver_too_old_is_older_than_the_engines_cuda() -> None:
    snapshot = visit("driver-too-old")
    assert snapshot.stack.driver == snapshot.host.driver_module
    assert str(snapshot.stack.driver).startswith("550.")
    assert any("too old" in event.text for event in snapshot.engine_events)


def test_upgraded_libraries_do_not_fit_the_loaded_module() -> None:
    snapshot = visit("driver-library-mismatch")
    assert "api-mismatch" in [getattr(event, "kind", "") for event in snapshot.kernel]
    assert kinds_of_cuda_error(snapshot) & {"driver-mismatch"}
    assert snapshot.why_unseen(Source.NVML) is not None


def test_a_dead_fabric_manager_leaves_the_gpus_saying_that_all_is_well() -> None:
    snapshot = visit("fabric-manager-dead")
    assert (snapshot.fabric_manager.running, snapshot.fabric_manager.unit_state) == (False, "inactive")
    assert {gpu.fabric.state for gpu in snapshot.gpus} == {"completed"}


def test_a_fabric_manager_of_another_version_does_not_run() -> None:
    snapshot = visit("fabric-manager-version")
    assert snapshot.fabric_manager.running is False
    assert "version-mismatch" in [message.kind for message in snapshot.fabric_manager.messages]
    assert kinds_of_cuda_error(snapshot) & {"system-not-initialized"}
    assert {gpu.fabric.state for gpu in snapshot.gpus} != {"completed"}


def test_without_links_the_engine_falls_back_to_pcie() -> None:
    snapshot = visit("pcie-fallback")
    assert "custom-allreduce-off-pcie" in signals(snapshot)
    assert {pair.nvlinks for pair in snapshot.pairs} == {0}
    assert snapshot.engines


def test_an_oom_kill_is_counted_in_the_cgroup_and_names_the_worker() -> None:
    first, second = drills.visits("dgx-h100-4of8", "oom-kill:rank=1,start=0.3", seconds=(0, 0.8))
    assert first.engines[0].oom_kills_total == 0
    assert second.engines[0].oom_kills_total == 1
    (kill,) = [event for event in second.kernel if isinstance(event, OomKill)]
    assert kill.pid == PROFILES["dgx-h100-4of8"].workload.rank_pids[1]
    ended = visit("oom-kill:rank=1")
    assert [event.facts["exit_code"] for event in ended.engine_events if event.signal == "worker-died"] == [-9]


def test_a_switch_error_is_logged_as_one_event() -> None:
    (sxid,) = [event for event in visit("sxid:code=12028").kernel if isinstance(event, Sxid)]
    assert (sxid.code, sxid.severity) == (12028, "non-fatal")


@pytest.mark.parametrize(
    ("fault", "source", "why"),
    [
        ("kernel-log-denied", Source.KERNEL_LOG, Why.NO_PERMISSION),
        ("engine-log-missing", Source.ENGINE_LOG, Why.NOT_PRESENT),
        ("metrics-down", Source.ENGINE_METRICS, Why.FAILED),
        ("no-engine", Source.ENGINE_LOG, Why.NOT_PRESENT),
    ],
)
def test_what_can_t_be_seen_is_said(fault: str, source: Source, why: Why) -> None:
    absent = visit(fault).why_unseen(source)
    assert absent is not None
    assert absent.why is why


def test_an_idle_engine_serves_nobody() -> None:
    first, second = visits("dgx-h100-4of8", "idle", times=2, every=0.4)
    assert second.metrics[0].running == 0
    assert first.metrics[0].generation_tokens_total == second.metrics[0].generation_tokens_total
    assert set(second.seen) == set(OF_A_NODE)


def test_no_drill_shows_the_secret_in_its_environment() -> None:
    (engine,) = visit().engines
    assert engine.environment["HF_TOKEN"] == "***"


@pytest.mark.parametrize("faults", [("nothing",), ("gpu-lost",), ("nccl-timeout:rank=9",), ("gpu-lost:gpu=77",)])
def test_a_fault_that_is_none_is_refused_at_once(faults: tuple[str, ...]) -> None:
    with pytest.raises(FaultError):
        simulated.node("dgx-h100-4of8", faults)


def test_a_fault_of_the_engine_is_on_a_gpu_of_the_engine() -> None:
    with pytest.raises(FaultError, match="does not use GPU 3"):
        simulated.node("h100-nvl-4", ("application-fault:gpu=3",))


def test_faults_of_switches_need_switches() -> None:
    for fault in ("fabric-manager-dead", "sxid:code=12028", "pcie-fallback"):
        with pytest.raises(FaultError):
            simulated.node("l40s-4", (fault,))


@pytest.mark.parametrize("fault", [kind.name for kind in HOST_KINDS])
def test_every_fault_is_one_that_a_drill_can_have(fault: str) -> None:
    parameters = {
        "nccl-timeout": ":rank=0",
        "application-fault": ":gpu=0",
        "xid": ":code=94,gpu=0",
        "sxid": ":code=20034",
        "rank-stopped": ":rank=1",
        "rank-blocked": ":rank=1",
        "kernel-hung": ":gpu=1",
        "gpu-memory-fault": ":gpu=1",
        "gpu-memory-held": ":gpu=1",
    }
    assert simulated.drill_of("hgx-a100-8", (fault + parameters.get(fault, ""),)).faults


@pytest.mark.parametrize("faults", [(), ("driver-hung",), ("gpu-lost:gpu=0",)])
def test_nothing_of_a_node_is_left_behind(
    faults: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    threads = set(threading.enumerate())
    node = simulated.node("dgx-h100-4of8", faults, every=0.2, patience_seconds=0.5)
    next(node)
    assert list(tmp_path.iterdir())
    assert psutil.Process().children()
    node.close()  # type: ignore[attr-defined]
    assert list(tmp_path.iterdir()) == []
    assert psutil.Process().children() == []
    deadline = time.monotonic() + 2
    while set(threading.enumerate()) - threads and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(threading.enumerate()) <= threads


def test_a_visit_of_eight_gpus_costs_well_under_a_second() -> None:
    began = sum(
        os.times()[:4]
    )  # this process and its children, which are gone by the end: a busy machine takes no more
    visits("hgx-h100-8", times=2, every=1.0)
    assert sum(os.times()[:4]) - began < 3.0


def test_page_and_files_belong_to_one_address_only() -> None:
    (metrics,) = visit().metrics
    assert metrics.url.startswith("http://127.0.0.1:")


def test_a_lost_gpu_that_the_engine_does_not_use_leaves_it_at_work() -> None:
    first, second = visits("h100-nvl-4", "gpu-lost:gpu=3", times=2, every=0.6)
    assert second.gpus[3].lost is True
    (engine,) = second.engines
    assert [rank.state for rank in engine.ranks] == ["running", "running"]
    assert second.metrics[0].generation_tokens_total > first.metrics[0].generation_tokens_total
    assert "watchdog-timeout" not in signals(first)


def test_a_hot_gpu_slows_the_engine_and_the_page_never_runs_backwards() -> None:
    cool, *hot = drills.visits("hgx-h100-4", "overheating:factor=16,start=10", seconds=(0, 60, 120, 180))
    tokens = [page.metrics[0].generation_tokens_total for page in (cool, *hot)]
    gained = [later - earlier for earlier, later in pairwise(tokens)]
    assert gained[0] > 1.2 * gained[-1] > 0
    for before, after in pairwise((cool, *hot)):
        pairs = zip(
            before.metrics[0].inter_token_seconds.counts, after.metrics[0].inter_token_seconds.counts, strict=True
        )
        assert all(earlier <= later for earlier, later in pairs)
