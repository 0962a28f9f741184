"""Collectors see what is there on a real root directory, and say why they could not."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.collectors import files, programs, redaction
from doctor.collectors.collector import CannotSeeError, Collector, Reading, Visit
from doctor.collectors.engine_log import EngineLogs
from doctor.collectors.engine_metrics import MetricsPages, page_at
from doctor.collectors.fabric_manager import FabricManagerState
from doctor.collectors.following import FollowedFile
from doctor.collectors.host import HostState
from doctor.collectors.kernel_log import KernelLog
from doctor.collectors.model import ServedModels
from doctor.collectors.placement import identified, placed, visible_gpus
from doctor.collectors.processes import Processes, engine_kind
from doctor.collectors.stack import Versions
from doctor.feeds import live
from doctor.snapshot import (
    Absent,
    DriverGpu,
    Engine,
    Gpu,
    GpuPair,
    GpuProcess,
    Host,
    Rank,
    Snapshot,
    Why,
    Xid,
    known,
)
from tests.roots import BOOT, CONTAINER, POD, Root, as_nobody

NOW = BOOT + 5000.0


@pytest.fixture
def root(tmp_path: Path) -> Root:
    tmp_path.chmod(0o755)
    for parent in tmp_path.parents:  # so that an ordinary user gets down to it
        if os.geteuid() == 0 and parent != Path("/") and "pytest" in str(parent):
            parent.chmod(0o755)
    return Root(tmp_path)


def seen(collector: Collector, *engines: Engine, at: float = NOW) -> Reading:
    return collector.collect(Visit(at=at, engines=engines))


def refusal(collector: Collector, *engines: Engine) -> Absent:
    with pytest.raises(CannotSeeError) as caught:
        seen(collector, *engines)
    return caught.value.why


def engines_of(root: Root) -> tuple[Engine, ...]:
    return seen(Processes(root.folder)).fields["engines"]


def engine_of(root: Root) -> Engine:
    (engine,) = engines_of(root)
    return engine


# Processes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        ("/usr/bin/python3 /usr/local/bin/vllm serve org/model", "vllm"),
        ("vllm serve org/model", "vllm"),
        ("python3.12 -m vllm.entrypoints.openai.api_server --model m", "vllm"),
        ("python -B -X dev -m vllm.entrypoints.cli.main serve m", "vllm"),
        ("python3 /opt/site-packages/vllm/entrypoints/openai/api_server.py --model m", "vllm"),
        ("python3 -m sglang.launch_server --model-path m", "sglang"),
        ("python3 /usr/local/bin/trtllm-serve m", "tensorrt-llm"),
        ("text-generation-launcher --model-id m", "tgi"),
        ("/opt/llama.cpp/build/bin/llama-server -m m.gguf", "llama.cpp"),
        ("grep vllm serve", None),
        ("bash -c vllm serve org/model", None),
        ("sudo vllm serve org/model", None),
        ("docker run vllm/vllm-openai --model m", None),
        ("vllm bench serve --model m", None),
        ("vllm --version", None),
        ("python3 -c import vllm", None),
        ("python3 train.py --vllm", None),
        ("python3 -m vllm.entrypoints.openai.run_batch", None),
        ("python3", None),
        ("", None),
    ],
)
def test_the_program_itself_must_be_the_engine(command: str, kind: str | None) -> None:
    assert engine_kind(command.split()) == kind


def test_workers_are_found_by_their_titles_under_their_front(root: Root) -> None:
    root.engine(arguments=("python3", "/bin/vllm", "serve", "m", "-tp", "2"))
    root.process(110, ("VLLM::EngineCore",), parent=100, name="VLLM::EngineCor", padded=True)
    root.process(121, ("VLLM::Worker_TP1",), parent=110, name="VLLM::Worker_TP", padded=True, state="T")
    root.process(120, ("VLLM::Worker_TP0",), parent=110, name="VLLM::Worker_TP", padded=True, state="R", cpu=77)
    root.process(130, ("python3", "-c", "from multiprocessing.resource_tracker import main"), parent=100)
    engine = engine_of(root)
    assert (engine.pid, engine.kind, engine.started_at) == (100, "vllm", BOOT + 1000)
    assert [(r.pid, r.rank, r.state, r.title) for r in engine.ranks] == [
        (120, 0, "running", "VLLM::Worker_TP0"),
        (121, 1, "stopped", "VLLM::Worker_TP1"),
    ]
    assert engine.ranks[0].cpu_seconds == 77
    assert engine.unit == "vllm.service"
    assert engine.flags.tensor_parallel_size == 2


def test_a_rank_counts_over_pipeline_and_data_parallelism(root: Root) -> None:
    root.engine()
    titles = ["Worker_DP1_PP1_TP1_EP3", "Worker_DP0_PP0_TP0_EP0", "Worker_DP0_PP1_TP0_EP2"]
    for pid, title in enumerate(titles, 120):
        root.process(pid, (f"VLLM::{title}",), parent=100, name="VLLM::Worker_DP")
    assert [(r.rank, r.pid) for r in engine_of(root).ranks] == [(0, 121), (2, 122), (7, 120)]


def test_a_prefix_of_the_sites_own_is_taken_for_what_it_is(root: Root) -> None:
    root.engine(environment={"VLLM_PROCESS_NAME_PREFIX": "chat"})
    root.process(120, ("chat::Worker_TP0",), parent=100, name="chat::Worker_TP0")
    assert [r.rank for r in engine_of(root).ranks] == [0]


def test_a_zombie_worker_is_known_by_its_cut_name(root: Root) -> None:
    root.engine()
    root.process(120, ("VLLM::Worker_TP0",), parent=100, name="VLLM::Worker_TP")
    root.process(121, (), parent=100, name="VLLM::Worker_TP", state="Z")
    root.put("proc/121/cmdline", b"")
    zombie = engine_of(root).ranks[1]
    assert (zombie.pid, zombie.state, known(zombie.rank)) == (121, "zombie", False)


def test_with_one_gpu_the_engine_core_is_the_worker(root: Root) -> None:
    root.engine()
    root.process(110, ("VLLM::EngineCore",), parent=100, name="VLLM::EngineCor")
    assert [(r.pid, r.rank) for r in engine_of(root).ranks] == [(110, 0)]


def test_an_old_engine_without_titles_has_workers_of_unknown_rank(root: Root) -> None:
    front = ("python3", "-m", "vllm.entrypoints.openai.api_server", "--model", "m")
    root.engine(arguments=front, name="python3")
    root.process(120, front, parent=100)
    root.process(121, ("python3", "-c", "from multiprocessing.spawn import spawn_main; spawn_main(3)"), parent=100)
    root.process(122, ("python3", "-c", "from multiprocessing.resource_tracker import main"), parent=100)
    engine = engine_of(root)
    assert [r.pid for r in engine.ranks] == [120, 121]
    assert all(isinstance(r.rank, Absent) for r in engine.ranks)


def test_an_engine_core_whose_front_was_killed_is_still_an_engine(root: Root) -> None:
    root.process(110, ("VLLM::EngineCore",), parent=1, name="VLLM::EngineCor")
    root.process(120, ("VLLM::Worker_TP0",), parent=110, name="VLLM::Worker_TP")
    engine = engine_of(root)
    assert engine.pid == 110
    assert [r.pid for r in engine.ranks] == [120]


def test_a_process_name_with_brackets_and_blanks_is_read(root: Root) -> None:
    root.engine(name="a) (b c")
    assert engine_of(root).pid == 100


def test_containers_and_cgroups_are_told(root: Root) -> None:
    root.engine(cgroup=f"/system.slice/docker-{CONTAINER}.scope")
    root.put(f"sys/fs/cgroup/system.slice/docker-{CONTAINER}.scope/memory.events", "low 0\noom 3\noom_kill 2\n")
    engine = engine_of(root)
    assert engine.container == CONTAINER
    assert engine.oom_kills_total == 2
    assert not known(engine.unit)


def test_cgroups_of_the_first_version_are_read(root: Root) -> None:
    root.engine()
    root.put("proc/100/cgroup", f"9:memory:/docker/{CONTAINER}\n1:name=systemd:/docker/{CONTAINER}\n")
    root.put(
        f"sys/fs/cgroup/memory/docker/{CONTAINER}/memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n"
    )
    assert engine_of(root).oom_kills_total == 1


def test_a_session_of_a_user_is_no_unit(root: Root) -> None:
    root.engine(cgroup="/user.slice/user-1000.slice/user@1000.service/tmux-spawn-1.scope")
    assert not known(engine_of(root).unit)


def test_proc_that_hides_others_is_said(root: Root) -> None:
    shutil.rmtree(root.folder / "proc/1")
    (part,) = seen(Processes(root.folder)).unseen
    assert part.why.why is Why.NO_PERMISSION
    assert "hidepid" in part.why.detail


def test_an_unreadable_environment_is_said_and_the_engine_is_seen(root: Root) -> None:
    root.engine(environment={"CUDA_VISIBLE_DEVICES": "0"})
    (root.folder / "proc/100/environ").chmod(0)
    with as_nobody():
        reading = seen(Processes(root.folder))
    (engine,) = reading.fields["engines"]
    assert engine.visible_gpus.why is Why.NO_PERMISSION
    assert [u.what for u in reading.unseen] == ["environment of engine 100"]


def test_a_process_that_hangs_in_the_kernel_is_known_by_what_was_read_before(root: Root) -> None:
    root.engine(environment={"NCCL_DEBUG": "WARN"})
    collector = Processes(root.folder)
    (before,) = seen(collector).fields["engines"]
    stat = (root.folder / "proc/100/stat").read_text()
    root.put("proc/100/stat", stat.replace(") S ", ") D "))
    for name in ("cmdline", "environ"):  # to read these could hang: here it would fail
        (root.folder / f"proc/100/{name}").unlink()
    (hung,) = seen(collector).fields["engines"]
    assert (hung.command_line, hung.environment) == (before.command_line, before.environment)
    assert engines_of(root) == ()


def test_no_proc_at_all_is_said(tmp_path: Path) -> None:
    assert refusal(Processes(tmp_path)).why is Why.NOT_PRESENT


# Secrets ---------------------------------------------------------------------------------------------------------

SECRETS = {
    "flag": "sesame-open-1",
    "equals": "sesame-open-2",
    "second-key": "sesame-open-3",
    "json": "sesame-open-4",
    "variable": "sesame-open-5",
    "by-look": "hf_abcdefghijklmnopqrstuvwxyz0123",
    "in-url": "sesame-open-6",
    "in-log": "sesame-open-7",
    "elsewhere": "sesame-open-8",
}


def test_secrets_never_leave_the_collectors(root: Root) -> None:
    root.engine(
        arguments=(
            "python3", "/bin/vllm", "serve", "org/model", "--api-key", SECRETS["flag"], SECRETS["second-key"],
            "--max-num-batched-tokens", "4096", f"--hf-token={SECRETS['equals']}",
            "--kv-transfer-config", json.dumps({"kv_connector": "x", "aws_secret_access_key": SECRETS["json"]}),
            "--speculative-config", json.dumps({"model": "draft", "api_key": SECRETS["json"]}),
        ),
        environment={
            "HF_TOKEN": SECRETS["variable"],
            "VLLM_API_KEY": SECRETS["variable"],
            "HF_ENDPOINT": f"https://user:{SECRETS['in-url']}@hub.example.invalid/",
            "VLLM_NOTE": SECRETS["by-look"],
            "DATABASE_URL": SECRETS["elsewhere"],
            "NCCL_DEBUG": "WARN",
        },
    )  # fmt: skip
    log = (
        "(APIServer pid=100) INFO 06-01 10:00:00 [utils.py:253] non-default args: "
        f"{{'model': 'm', 'api_key': ['{SECRETS['in-log']}'], 'hf_token': '{SECRETS['in-log']}'}}\n"
        f"(APIServer pid=100) ERROR 06-01 10:00:01 [a.py:1] RuntimeError: 401 Client Error token={SECRETS['in-log']}\n"
    )
    root.put("var/log/vllm.log", log)
    (snapshot,) = live.every(1, live.without_nvml(root.folder), 1)
    encoded = msgspec.json.encode(snapshot).decode()
    assert "non-default args" in encoded
    for place, secret in SECRETS.items():
        assert secret not in encoded, place
    (engine,) = snapshot.engines
    assert engine.environment["NCCL_DEBUG"] == "WARN"
    assert "DATABASE_URL" not in engine.environment
    assert engine.flags.max_num_batched_tokens == 4096
    assert "4096" in engine.command_line


@pytest.mark.parametrize(
    "name", ["HF_TOKEN", "api_key", "apiKey", "AWS_SECRET_ACCESS_KEY", "ssl_keyfile_password", "hf_hub_token"]
)
def test_names_of_secrets_are_known(name: str) -> None:
    assert redaction.names_secret(name)


@pytest.mark.parametrize(
    "name", ["max_num_batched_tokens", "tokenizer", "NCCL_DEBUG", "VLLM_MAX_TOKENS_PER_EXPERT", "kv_cache_dtype"]
)
def test_ordinary_names_are_no_secrets(name: str) -> None:
    assert not redaction.names_secret(name)


@pytest.mark.parametrize(
    "text", ["generated 17 tokens: 5 a step", "KeyError: 'model.layers.0'", "api_key=None", "max_tokens=4096, top_k: 3"]
)
def test_ordinary_text_is_left_alone(text: str) -> None:
    assert redaction.text_without_secrets(text) == text


@settings(max_examples=150)
@given(st.text(max_size=300))
def test_redaction_takes_any_text(text: str) -> None:
    redaction.text_without_secrets(text)
    redaction.command_line_without_secrets((text, "--api-key", text))


# Which rank on which GPU -----------------------------------------------------------------------------------------

UUIDS = ("GPU-aaaa", "GPU-bbbb", "GPU-cccc", "GPU-dddd")


@pytest.mark.parametrize(
    ("environment", "visible"),
    [
        ({}, UUIDS),
        ({"CUDA_VISIBLE_DEVICES": "2,0"}, ("GPU-cccc", "GPU-aaaa")),
        ({"CUDA_VISIBLE_DEVICES": "GPU-bb"}, ("GPU-bbbb",)),
        ({"CUDA_VISIBLE_DEVICES": "1,9,0"}, ("GPU-bbbb",)),
        ({"CUDA_VISIBLE_DEVICES": ""}, ()),
        ({"NVIDIA_VISIBLE_DEVICES": "2,3", "CUDA_VISIBLE_DEVICES": "1"}, ("GPU-dddd",)),
        ({"NVIDIA_VISIBLE_DEVICES": "all"}, UUIDS),
    ],
)
def test_visible_gpus_follow_the_environment(environment: dict[str, str], visible: tuple[str, ...]) -> None:
    assert visible_gpus(environment, UUIDS, uniform=True) == visible


def test_numbers_tell_nothing_among_unlike_gpus() -> None:
    assert isinstance(visible_gpus({"CUDA_VISIBLE_DEVICES": "0"}, UUIDS, uniform=False), Absent)
    told = visible_gpus({"CUDA_VISIBLE_DEVICES": "0", "CUDA_DEVICE_ORDER": "PCI_BUS_ID"}, UUIDS, uniform=False)
    assert told == ("GPU-aaaa",)


def with_ranks(*holders: int | None) -> Snapshot:
    """Two ranks on four GPUs; *holders* are the pids that NVML sees on each GPU."""
    gpus = tuple(
        Gpu(uuid=uuid, index=i, pci_device_id="10de:2330", processes=(GpuProcess(pid=pid),) if pid else ())
        for i, (uuid, pid) in enumerate(zip(UUIDS, holders, strict=True))
    )
    ranks = (Rank(pid=120, rank=0), Rank(pid=121, rank=1))
    return Snapshot(at=NOW, gpus=gpus, engines=(Engine(pid=100, started_at=BOOT, kind="vllm", ranks=ranks),))


def test_nvml_has_the_last_word_on_a_ranks_gpu() -> None:
    def placed_on(*holders: int | None) -> list[object]:
        return [rank.gpu for rank in placed(with_ranks(*holders)).engines[0].ranks]

    assert placed_on(None, None, None, None) == ["GPU-aaaa", "GPU-bbbb"]
    assert placed_on(None, None, 120, 121) == ["GPU-cccc", "GPU-dddd"]


def test_a_gpu_without_a_name_gets_it_from_the_drivers_list() -> None:
    gpus = (Gpu(uuid="GPU-aaaa", index=0, pci_address="0000:18:00.0"), Gpu(uuid="index:1", index=1, lost=True))
    kept = (
        DriverGpu(pci_address="0000:18:00.0", uuid="GPU-aaaa"),
        DriverGpu(pci_address="0000:2a:00.0", uuid="GPU-bbbb", name="NVIDIA H100"),
    )
    pairs = (GpuPair(first="GPU-aaaa", second="index:1"),)
    named = identified(Snapshot(at=NOW, gpus=gpus, pairs=pairs, host=Host(driver_gpus=kept)))
    lost = named.gpus[1]
    assert (lost.uuid, lost.pci_address, lost.name, lost.lost) == ("GPU-bbbb", "0000:2a:00.0", "NVIDIA H100", True)
    assert named.pairs[0].second == "GPU-bbbb"
    unclear = Snapshot(at=NOW, gpus=gpus, host=Host(driver_gpus=kept[:1]))
    assert identified(unclear) is unclear


# The kernel log --------------------------------------------------------------------------------------------------

XID = "NVRM: Xid (PCI:0000:3a:00): 79, pid='<unknown>', name=<unknown>, GPU has fallen off the bus."


def test_kmsg_is_read_once_and_stamped_from_boot(root: Root) -> None:
    log = root.put("dev/kmsg", f"3,7,1500000,-;{XID}\n")
    collector = KernelLog(root.folder)
    (event,) = seen(collector).fields["kernel"]
    assert isinstance(event, Xid)
    assert (event.code, event.at, event.where) == (79, BOOT + 1.5, "/dev/kmsg:7")
    assert seen(collector).fields["kernel"] == ()
    with log.open("a") as file:
        file.write(f"3,8,2500000,-;{XID}\n")
    assert [e.where for e in seen(collector).fields["kernel"]] == ["/dev/kmsg:8"]
    collector.close()


def test_what_a_program_wrote_into_kmsg_is_not_the_kernels(root: Root) -> None:
    root.put("dev/kmsg", f"11,7,1500000,-;{XID}\n")
    assert seen(KernelLog(root.folder)).fields["kernel"] == ()
    assert len(seen(KernelLog(root.folder, every_facility=True)).fields["kernel"]) == 1


def test_an_xid_of_an_earlier_boot_is_history(root: Root) -> None:
    root.put("var/log/kern.log", f"2026-01-01T00:00:00.000000+00:00 node kernel: {XID}\n")
    (event,) = seen(KernelLog(root.folder)).fields["kernel"]
    assert event.before_boot


def test_a_kernel_log_that_may_not_be_read_says_how_to_change_that(root: Root) -> None:
    root.put("dev/kmsg", f"3,7,1500000,-;{XID}\n").chmod(0)
    with as_nobody():
        why = refusal(KernelLog(root.folder))
    assert why.why is Why.NO_PERMISSION
    assert "CAP_SYSLOG" in why.detail


def test_a_storm_of_one_xid_is_thinned_out(root: Root) -> None:
    storm = "".join(f"3,{n},{n},-;{XID}\n" for n in range(5000))
    root.put("dev/kmsg", storm)
    assert 1 <= len(seen(KernelLog(root.folder)).fields["kernel"]) < 100


def test_no_kernel_log_is_no_health(root: Root) -> None:
    assert refusal(KernelLog(root.folder)).why is Why.NOT_PRESENT


def test_the_kernel_log_of_this_machine_is_seen_or_refused() -> None:
    collector = KernelLog()
    with contextlib.suppress(CannotSeeError):
        assert "kernel" in seen(collector, at=time.time()).fields
    collector.close()


# Following a file ------------------------------------------------------------------------------------------------


def bytes_of(file: FollowedFile) -> bytes:
    return b"".join(piece.data for piece in file.pieces())


def test_a_file_is_followed_across_renames(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\n")
    file = FollowedFile(path)
    assert bytes_of(file) == b"one\n"
    with path.open("ab") as old:
        old.write(b"two\n")
        path.rename(tmp_path / "log.1")
        old.write(b"three\n")
    path.write_bytes(b"four\n")
    pieces = list(file.pieces())
    assert b"".join(piece.data for piece in pieces) == b"two\nthree\nfour\n"
    assert [(piece.joins, piece.line) for piece in pieces] == [(True, 2), (False, 1)]
    file.close()


@pytest.mark.parametrize("after", [b"", b"x\n", b"other\n", b"longer than it was before\n"])
def test_a_file_is_followed_across_copytruncate(tmp_path: Path, after: bytes) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"first\n")
    file = FollowedFile(path)
    assert bytes_of(file) == b"first\n"
    with path.open("r+b") as writer:
        writer.truncate(0)
        writer.write(after)
    assert bytes_of(file) == after
    file.close()


def test_a_hole_that_truncation_leaves_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    with path.open("wb") as writer:  # a writer that does not append goes on where it was
        writer.seek(3 << 30)
        writer.write(b"after the hole\n")
    file = FollowedFile(path, head_bytes=1 << 40)
    began = time.monotonic()
    assert bytes_of(file).strip(b"\0") == b"after the hole\n"
    assert time.monotonic() - began < 2
    file.close()


def test_a_deleted_file_is_held_until_its_name_comes_back(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\n")
    file = FollowedFile(path)
    bytes_of(file)
    path.unlink()
    assert bytes_of(file) == b""
    path.write_bytes(b"two\n")
    assert bytes_of(file) == b"two\n"
    file.close()


def test_of_a_large_file_head_and_tail_are_read(tmp_path: Path) -> None:
    path = tmp_path / "log"
    lines = [b"line %06d\n" % number for number in range(1, 50_001)]
    path.write_bytes(b"".join(lines))
    file = FollowedFile(path, head_bytes=1000, tail_bytes=5000)
    head, *tail = file.pieces()
    assert head.data.startswith(b"line 000001\n")
    assert head.line == 1
    assert tail[0].data.startswith(b"line %06d\n" % tail[0].line)
    assert tail[-1].data.endswith(b"line 050000\n")
    assert len(head.data) + sum(len(piece.data) for piece in tail) < 6100
    with path.open("ab") as writer:
        writer.write(b"more\n")
    assert bytes_of(file) == b"more\n"
    file.close()


def test_the_head_is_the_last_start_of_the_program(tmp_path: Path) -> None:
    path = tmp_path / "log"
    filler = b"x" * 99 + b"\n"
    path.write_bytes(b"START old\n" + filler * 30_000 + b"the START new\n" + filler * 30_000)
    file = FollowedFile(path, head_bytes=500, tail_bytes=1000, marker=b"START")
    head = next(iter(file.pieces()))
    assert head.data.startswith(b"the START new\n")
    file.close()


def test_what_comes_faster_than_the_bound_waits_for_the_next_visit(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"one\ntwo\nthree\n")
    file = FollowedFile(path, most_bytes=8)
    assert [(bytes_of(file), file.behind_bytes) for _ in range(3)] == [(b"one\ntwo\n", 6), (b"three\n", 0), (b"", 0)]
    file.close()


def test_rotation_while_writing_loses_no_line(tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    file = FollowedFile(path)
    reads: list[int] = []

    def write() -> None:
        for batch in range(20):
            with path.open("ab", buffering=0) as writer:
                for number in range(200):
                    writer.write(b"%d\n" % (batch * 200 + number))
            path.rename(tmp_path / f"log.{batch}")
            path.touch()
            enough = len(reads) + 2  # at least one whole reading between two rotations
            while len(reads) < enough:
                time.sleep(0.0005)

    thread = threading.Thread(target=write)
    found = bytes_of(file)  # it follows before the first rotation: what was renamed unseen is another's
    thread.start()
    while thread.is_alive():
        found += bytes_of(file)
        reads.append(len(found))
    thread.join()
    found += bytes_of(file)
    assert [int(line) for line in found.split()] == list(range(4000))
    file.close()


def test_links_of_a_container_lead_into_the_container(tmp_path: Path) -> None:
    root = Root(tmp_path)
    root.put("data/real.txt", "inside")
    root.link("data/absolute", "/data/real.txt")
    root.link("data/relative", "../data/absolute")
    root.link("escape", "../../../../../../etc/hostname")
    root.link("circle", "/circle")
    assert files.within(tmp_path, "/data/relative").read_text() == "inside"
    assert files.within(tmp_path, "/escape") == tmp_path / "etc/hostname"
    with pytest.raises(OSError, match="symbolic links"):
        files.within(tmp_path, "/circle")


# The engine's log ------------------------------------------------------------------------------------------------

READY = "INFO:     Application startup complete.\n"
FATAL = "(EngineCore pid=110) ERROR 05-29 10:00:00 [core.py:1] EngineCore encountered a fatal error.\n"


def signals(reading: Reading) -> list[str]:
    return [event.signal for event in reading.fields["engine_events"]]


def log_of(reading: Reading, engine: Engine) -> object:
    return reading.engine_fields[engine.id]["log"]


def test_standard_output_in_a_file_is_found_and_followed(root: Root) -> None:
    root.engine()
    log = root.put("var/log/vllm.log", READY)
    collector, engine = EngineLogs(root.folder), engine_of(root)
    reading = seen(collector, engine)
    assert signals(reading) == ["startup-complete"]
    assert log_of(reading, engine) == "/var/log/vllm.log"
    assert reading.fields["engine_events"][0].where == "vllm.log:1"
    with log.open("a") as file:
        file.write(FATAL)
    reading = seen(collector, engine)
    assert [(e.signal, e.where) for e in reading.fields["engine_events"]] == [("engine-fatal", "vllm.log:2")]
    collector.close()


def test_the_log_tells_on_when_the_engine_is_gone(root: Root) -> None:
    root.engine()
    log = root.put("var/log/vllm.log", READY)
    collector, engine = EngineLogs(root.folder), engine_of(root)
    seen(collector, engine)
    shutil.rmtree(root.folder / "proc/100")
    with log.open("a") as file:
        file.write(FATAL)
    assert signals(seen(collector)) == ["engine-fatal"]
    root.engine(pid=200)  # it was started again, and goes on in the same file
    with log.open("a") as file:
        file.write(READY)
    again = engine_of(root)
    reading = seen(collector, again)
    assert signals(reading) == ["startup-complete"]
    assert log_of(reading, again) == "/var/log/vllm.log"
    collector.close()


def test_standard_error_in_a_file_of_its_own_counts_to_the_same_log(root: Root) -> None:
    root.engine(output=None)
    root.link("proc/100/fd/1", "/var/log/out.log")
    root.link("proc/100/fd/2", "/var/log/err.log")
    root.put("var/log/out.log", READY)
    root.put("var/log/err.log", FATAL)
    reading = seen(EngineLogs(root.folder), engine_of(root))
    assert sorted((e.signal, e.log, e.where) for e in reading.fields["engine_events"]) == [
        ("engine-fatal", "/var/log/out.log", "err.log:1"),
        ("startup-complete", "/var/log/out.log", "out.log:1"),
    ]


def test_a_docker_log_is_found_by_the_container(root: Root) -> None:
    root.engine(cgroup=f"/system.slice/docker-{CONTAINER}.scope", output="pipe:[4711]")
    line = json.dumps({"log": READY, "stream": "stdout", "time": "2026-05-29T10:00:00.5Z"}) + "\n"
    root.put(f"var/lib/docker/containers/{CONTAINER}/{CONTAINER}-json.log", line)
    engine = engine_of(root)
    reading = seen(EngineLogs(root.folder), engine)
    assert signals(reading) == ["startup-complete"]
    assert log_of(reading, engine) == f"docker:{CONTAINER[:12]}"


@pytest.mark.parametrize("linked", [True, False], ids=["by container id", "by pod id"])
def test_a_pods_log_is_found(root: Root, linked: bool) -> None:
    slice_ = f"kubepods-pod{POD.replace('-', '_')}.slice"
    root.engine(cgroup=f"/kubepods.slice/{slice_}/cri-containerd-{CONTAINER}.scope", output="pipe:[4711]")
    log = f"var/log/pods/serving_vllm-0_{POD}/vllm/0.log"
    root.put(log, f"2026-05-29T10:00:00.5Z stdout F {READY}")
    if linked:
        root.link(f"var/log/containers/vllm-0_serving_vllm-{CONTAINER}.log", f"/{log}")
    reading = seen(EngineLogs(root.folder), engine_of(root))
    assert signals(reading) == ["startup-complete"]


def test_a_units_journal_is_asked(root: Root, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    script = programs / "journalctl"
    script.write_text(
        '#!/bin/sh\necho "$@" >> "$0.calls"\n'
        "case \"$*\" in *after-cursor*) ;; *) echo 'May 29 10:00:00 node vllm[100]: INFO:     Application startup complete.';; esac\n"
        "echo '-- cursor: s=abc;i=1'\n"
    )
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    root.engine(output="socket:[4711]")
    collector, engine = EngineLogs(root.folder), engine_of(root)
    reading = seen(collector, engine)
    assert signals(reading) == ["startup-complete"]
    assert log_of(reading, engine) == "journal:vllm.service"
    assert signals(seen(collector, engine)) == []
    first, second = Path(f"{script}.calls").read_text().splitlines()
    assert "--unit=vllm.service" in first
    assert "--after-cursor=s=abc;i=1" in second


def test_a_log_that_goes_to_a_terminal_is_said_with_the_remedy(root: Root) -> None:
    root.engine(output="/dev/pts/3")
    why = refusal(EngineLogs(root.folder), engine_of(root))
    assert "/dev/pts/3" in why.detail
    assert "[engine] logs" in why.detail


def test_a_named_log_is_read_without_an_engine_and_serves_one_that_has_none(root: Root) -> None:
    root.put("srv/own.log", READY)
    collector = EngineLogs(root.folder, logs=("/srv/own.log",))
    assert signals(seen(collector)) == ["startup-complete"]
    root.engine(output="/dev/pts/3")
    engine = engine_of(root)
    assert log_of(seen(collector, engine), engine) == "/srv/own.log"


def test_a_named_log_that_is_the_engines_own_is_read_once(root: Root) -> None:
    root.engine()
    root.put("var/log/vllm.log", READY)
    reading = seen(EngineLogs(root.folder, logs=("/var/log/vllm.log",)), engine_of(root))
    assert signals(reading) == ["startup-complete"]


def test_no_engine_and_no_log_is_said(root: Root) -> None:
    assert refusal(EngineLogs(root.folder)).why is Why.NOT_PRESENT


def test_stamps_are_in_the_engines_own_zone(root: Root) -> None:
    zone = Path("/usr/share/zoneinfo/Asia/Tokyo")
    if not zone.exists():
        pytest.skip("this machine has no time zone data")
    root.engine()
    root.put("etc/localtime", zone.read_bytes())
    stamp = time.strftime("%m-%d %H:%M:%S", time.gmtime(NOW + 9 * 3600))
    root.put(
        "var/log/vllm.log", f"(EngineCore pid=110) ERROR {stamp} [core.py:1] EngineCore encountered a fatal error.\n"
    )
    (event,) = seen(EngineLogs(root.folder), engine_of(root)).fields["engine_events"]
    assert event.at == NOW


def test_a_real_engine_is_found_and_its_log_followed_through_a_rename(tmp_path: Path) -> None:
    """On this machine's own /proc: a program called vllm that writes to a file."""
    program = tmp_path / "vllm"
    program.write_text("import sys\nfor line in sys.stdin:\n    print(line, end='', flush=True)\n")
    log = tmp_path / "serve.log"
    with log.open("w") as output, subprocess.Popen(
        [sys.executable, str(program), "serve", "org/model", "--api-key", "sesame"],
        stdin=subprocess.PIPE, stdout=output, stderr=output, text=True, env={"CUDA_VISIBLE_DEVICES": "0", "HF_TOKEN": "sesame"},
    ) as child:  # fmt: skip
        assert child.stdin is not None

        def say(line: str) -> None:
            size = log_now.stat().st_size
            child.stdin.write(line)  # type: ignore[union-attr]
            child.stdin.flush()  # type: ignore[union-attr]
            while log_now.stat().st_size == size:
                time.sleep(0.01)

        log_now = log
        say(READY)
        collector = EngineLogs()
        engine = next(e for e in seen(Processes(), at=time.time()).fields["engines"] if e.pid == child.pid)
        assert "sesame" not in repr(engine)
        assert engine.environment == {"CUDA_VISIBLE_DEVICES": "0", "HF_TOKEN": "***"}
        assert abs(engine.started_at - time.time()) < 60
        reading = seen(collector, engine, at=time.time())
        assert log_of(reading, engine) == str(log)
        assert signals(reading) == ["startup-complete"]
        log_now = tmp_path / "serve.log.1"
        log.rename(log_now)  # the program goes on writing to the renamed file
        say(FATAL)
        assert signals(seen(collector, engine, at=time.time())) == ["engine-fatal"]
        child.stdin.close()
        collector.close()


# Other programs --------------------------------------------------------------------------------------------------


@pytest.fixture
def program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Make a program of a line of shell, and return how to start it."""

    def make(shell: str) -> list[str]:
        path = tmp_path / "asked"
        path.write_text(f"#!/bin/sh\n{shell}\n")
        path.chmod(0o755)
        monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
        return ["asked"]

    return make


@pytest.mark.parametrize(
    ("shell", "why", "words"),
    [
        ("echo 'Failed to open: Permission denied' >&2; exit 1", Why.NO_PERMISSION, "Permission denied"),
        ("echo 'the bus is down' >&2; exit 1", Why.FAILED, "asked: the bus is down"),
        ("exit 3", Why.FAILED, "exit code 3"),
        ("exec sleep 30", Why.TIMED_OUT, "within 0.2 s"),
    ],
)
def test_a_program_that_does_not_answer_says_why(
    program: Callable[[str], list[str]], shell: str, why: Why, words: str
) -> None:
    with pytest.raises(CannotSeeError) as caught:
        programs.answer_of(program(shell), 0.2 if why is Why.TIMED_OUT else 5)
    assert caught.value.why.why is why
    assert words in caught.value.why.detail


def test_a_program_that_is_not_there_is_said() -> None:
    with pytest.raises(CannotSeeError, match="there is no no-such-program"):
        programs.answer_of(["no-such-program"], 1)


def test_of_a_long_answer_the_end_is_read(program: Callable[[str], list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(programs, "MOST_BYTES", 30)
    assert programs.answer_of(program("seq 1 1000"), 5) == b"994\n995\n996\n997\n998\n999\n1000\n"


# The engine's metrics --------------------------------------------------------------------------------------------


@pytest.fixture
def page() -> Iterator[tuple[int, list[bytes]]]:
    """A server of metrics: its port, and its pages, the last one served."""
    pages = [b'vllm:num_requests_running{engine="0",model_name="m"} 7.0\n']

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(pages[-1])

        def log_message(self, *args: object) -> None:
            pass

    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server.server_address[1], pages
    server.shutdown()
    thread.join()
    server.server_close()


def test_an_engines_page_is_found_by_its_port(root: Root, page: tuple[int, list[bytes]]) -> None:
    root.engine(arguments=("python3", "/bin/vllm", "serve", "m", "--port", str(page[0]), "--host", "0.0.0.0"))
    engine = engine_of(root)
    (metrics,) = seen(MetricsPages(root.folder), engine).fields["metrics"]
    assert (metrics.engine, metrics.running) == (engine.id, 7)
    assert metrics.url == f"http://127.0.0.1:{page[0]}/metrics"


def test_a_silent_engine_is_said_with_its_address(root: Root) -> None:
    root.engine(arguments=("python3", "/bin/vllm", "serve", "m", "--port", "1"))
    why = refusal(MetricsPages(root.folder), engine_of(root))
    assert "nothing listens at http://127.0.0.1:1/metrics" in why.detail


def test_a_page_of_another_program_is_not_taken_for_the_engines(root: Root, page: tuple[int, list[bytes]]) -> None:
    page[1].append(b"go_goroutines 12\n")
    root.engine(arguments=("python3", "/bin/vllm", "serve", "m", "--port", str(page[0])))
    assert "not the metrics page" in refusal(MetricsPages(root.folder), engine_of(root)).detail


def test_only_this_node_is_asked(root: Root) -> None:
    urls = ("http://203.0.113.7:8000/metrics",)
    why = refusal(MetricsPages(root.folder, urls=urls))
    assert "not an address of this node" in why.detail


def test_a_named_page_is_read_for_the_engine_with_its_port(root: Root, page: tuple[int, list[bytes]]) -> None:
    root.engine(arguments=("python3", "/bin/vllm", "serve", "m"))
    engine = engine_of(root)
    urls = (f"http://127.0.0.1:{page[0]}/metrics",)
    (metrics,) = seen(MetricsPages(root.folder, urls=urls), engine).fields["metrics"]
    assert metrics.engine == engine.id


def test_an_engine_in_its_own_network_is_asked_at_its_address(root: Root, page: tuple[int, list[bytes]]) -> None:
    root.engine(arguments=("python3", "/bin/vllm", "serve", "m", "--port", str(page[0])))
    root.link("proc/100/ns/net", "net:[2]")
    root.link("proc/self/ns/net", "net:[1]")
    root.put(
        "proc/100/net/fib_trie",
        "Main:\n  |-- 127.0.0.1\n     /32 host LOCAL\n  |-- 198.51.100.9\n     /32 host LOCAL\n",
    )
    collector = MetricsPages(root.folder)
    assert [urls for _, urls in collector._wanted((engine_of(root),))] == [[f"http://198.51.100.9:{page[0]}/metrics"]]


def test_an_engine_that_is_not_vllm_is_said_to_be_unread(root: Root) -> None:
    root.engine(arguments=("python3", "-m", "sglang.launch_server", "--model-path", "m"))
    assert refusal(MetricsPages(root.folder), engine_of(root)).why is Why.NOT_SUPPORTED


@pytest.mark.parametrize("url", ["ftp://127.0.0.1/metrics", "127.0.0.1:8000", "http:///metrics", ""])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="URL"):
        page_at(url)


# Stack and model -------------------------------------------------------------------------------------------------


def put_environment(root: Root, site: str = "opt/e/lib/python3.12/site-packages") -> None:
    root.put(f"{site}/vllm-0.32.0.dist-info/METADATA", "")
    root.put(f"{site}/torch-2.13.0.dist-info/METADATA", "")
    root.put(f"{site}/nvidia_nccl_cu13-2.29.7.dist-info/METADATA", "")
    root.put(f"{site}/torch/version.py", "__version__ = '2.13.0+cu130'\ncuda: Optional[str] = '13.0'\nhip = None\n")


def test_versions_come_from_the_engines_own_environment(root: Root) -> None:
    root.engine()
    put_environment(root)
    root.put("opt/e/pyvenv.cfg", "version = 3.12.3\n")
    root.put("sys/module/nvidia/version", "590.48.01\n")
    engine = engine_of(root)
    reading = seen(Versions(root.folder), engine)
    stack = reading.engine_fields[engine.id]["stack"]
    assert (stack.python, stack.engine, stack.torch, stack.torch_cuda, stack.nccl) == (
        "3.12.3", "0.32.0", "2.13.0+cu130", "13.0", "2.29.7",
    )  # fmt: skip
    assert reading.fields["stack"].driver == "590.48.01"


def test_the_environment_of_an_image_without_a_venv_is_found(root: Root) -> None:
    root.engine(arguments=("/usr/bin/python3", "/usr/local/bin/vllm", "serve", "m"))
    put_environment(root, "usr/local/lib/python3.12/dist-packages")
    engine = engine_of(root)
    stack = seen(Versions(root.folder), engine).engine_fields[engine.id]["stack"]
    assert (stack.engine, stack.python) == ("0.32.0", "3.12")


def test_an_environment_that_is_not_found_is_said(root: Root) -> None:
    root.engine()
    engine = engine_of(root)
    reading = seen(Versions(root.folder), engine)
    assert reading.engine_fields[engine.id]["stack"].torch.why is Why.NOT_PRESENT
    assert len(reading.unseen) == 1


@pytest.mark.parametrize(
    "line",
    [
        "NVRM version: NVIDIA UNIX x86_64 Kernel Module  590.48.01  Mon Dec  8 13:05:12 UTC 2025",
        "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  595.45.04  Release Build  (builder@host)",
    ],
)
def test_the_drivers_version_is_read_from_proc_where_sys_lacks_it(root: Root, line: str) -> None:
    root.put("proc/driver/nvidia/version", line + "\nGCC version:  gcc 12\n")
    assert seen(Versions(root.folder)).fields["stack"].driver in line.split()


CONFIG = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 100,
}  # fmt: skip


def test_a_model_in_a_folder_is_read_with_the_size_of_its_weights(root: Root) -> None:
    root.engine(arguments=("python3", "/bin/vllm", "serve", "/models/llama"))
    root.put("models/llama/config.json", json.dumps(CONFIG))
    root.put("models/llama/a.safetensors", b"x" * 100)
    root.put("models/llama/b.safetensors", b"x" * 50)
    root.put("models/llama/consolidated.pth", b"x" * 7)
    engine = engine_of(root)
    model = seen(ServedModels(root.folder), engine).engine_fields[engine.id]["model"]
    assert (model.layers, model.weights_bytes) == (2, 150)


def test_a_model_of_the_hub_is_found_in_the_engines_cache(root: Root) -> None:
    root.engine(environment={"HF_HOME": "/cache"})
    repository = "cache/hub/models--org--model"
    root.put(f"{repository}/refs/main", "abc123")
    root.put(f"{repository}/blobs/config", json.dumps(CONFIG))
    root.put(f"{repository}/snapshots/0old/config.json", json.dumps(CONFIG | {"num_hidden_layers": 1}))
    root.link(f"{repository}/snapshots/abc123/config.json", "../../blobs/config")
    engine = engine_of(root)
    model = seen(ServedModels(root.folder), engine).engine_fields[engine.id]["model"]
    assert model.layers == 2
    assert not known(model.weights_bytes)


@pytest.mark.parametrize(
    ("text", "why"), [(None, Why.NOT_PRESENT), ("{not json", Why.FAILED)], ids=["missing", "broken"]
)
def test_a_model_that_can_t_be_read_is_said(root: Root, text: str | None, why: Why) -> None:
    root.engine(arguments=("python3", "/bin/vllm", "serve", "/models/llama"))
    if text is not None:
        root.put("models/llama/config.json", text)
    assert refusal(ServedModels(root.folder), engine_of(root)).why is why


# Host and fabric manager -----------------------------------------------------------------------------------------


def put_device(root: Root, address: str, *, device: str = "0x2330", kind: str = "0x030200", acs: int = 0) -> str:
    above = "sys/devices/pci0000:17/0000:17:01.0"
    here = f"{above}/{address}"
    space = bytearray(4096)
    struct.pack_into("<I", space, 0x100, (0x140 << 20) | 0x0001_0001)  # another capability, then ACS
    struct.pack_into("<IHH", space, 0x140, 0x0001_000D, 0, acs)
    root.put(f"{above}/config", bytes(space))
    for place, speed, width in ((above, "32.0 GT/s PCIe", "16"), (here, "16.0 GT/s PCIe", "8")):
        root.put(f"{place}/current_link_speed", f"{speed}\n")
        root.put(f"{place}/current_link_width", f"{width}\n")
        root.put(f"{place}/max_link_speed", "32.0 GT/s PCIe\n")
        root.put(f"{place}/max_link_width", "16\n")
    root.put(f"{here}/vendor", "0x10de\n")
    root.put(f"{here}/device", f"{device}\n")
    root.put(f"{here}/class", f"{kind}\n")
    root.put(f"{here}/numa_node", "1\n")
    root.link(f"sys/bus/pci/devices/{address}", f"../../../../{here}")
    return here


def host_of(root: Root, *engines: Engine) -> Host:
    return seen(HostState(root.folder), *engines).fields["host"]


def test_gpus_and_switches_of_the_pci_tree_are_seen(root: Root) -> None:
    here = put_device(root, "0000:18:00.0", acs=0x1D)
    put_device(root, "0000:05:00.0", device="0x22a3", kind="0x068000", acs=0x1D)
    put_device(root, "0000:18:00.4", device="0x1111", kind="0x0c0330", acs=0x1D)
    root.link(f"{here}/driver", "../../../../bus/pci/drivers/vfio-pci")
    switch, gpu = host_of(root).pci_devices
    assert (switch.kind, switch.device_id) == ("nvswitch", "10de:22a3")
    assert (gpu.kind, gpu.driver, gpu.numa_node) == ("gpu", "vfio-pci", 1)
    assert (gpu.generation, gpu.generation_max, gpu.width, gpu.width_max) == (4, 5, 8, 16)
    assert (gpu.upstream, gpu.upstream_generation, gpu.upstream_width) == ("0000:17:01.0", 5, 16)
    assert gpu.acs_enabled is True


def test_acs_without_root_is_unknown(root: Root) -> None:
    put_device(root, "0000:18:00.0", acs=0x1D)
    root.put("sys/devices/pci0000:17/0000:17:01.0/config", b"\0" * 64)
    (gpu,) = host_of(root).pci_devices
    assert gpu.acs_enabled.why is Why.NO_PERMISSION


def test_a_device_that_does_not_answer_has_no_link(root: Root) -> None:
    here = put_device(root, "0000:18:00.0")
    root.put(f"{here}/current_link_speed", "Unknown\n")
    root.put(f"{here}/current_link_width", "63\n")
    (gpu,) = host_of(root).pci_devices
    assert gpu.generation.why is Why.LOST
    assert gpu.width.why is Why.LOST


@pytest.mark.parametrize(("types", "word"), [((), "off"), (("identity",), "passthrough"), (("DMA-FQ",), "translated")])
def test_the_iommus_mode_is_told(root: Root, types: tuple[str, ...], word: str) -> None:
    here = put_device(root, "0000:18:00.0")
    (root.folder / "sys/kernel/iommu_groups").mkdir(parents=True)
    for kind in types:
        root.put("sys/kernel/iommu_groups/7/type", f"{kind}\n")
        root.link(f"{here}/iommu_group", "../../../../kernel/iommu_groups/7")
    assert host_of(root).iommu == word


def test_blocked_tasks_are_those_of_the_driver_and_of_engines(root: Root) -> None:
    root.process(40, ("nvidia-smi",), name="nvidia-smi", state="D")
    root.process(41, (), name="nvme-wq", state="D")
    root.process(42, ("cp",), name="cp", state="D")
    root.engine()
    root.process(101, (), name="vllm", state="D")
    (root.folder / "proc/100/task").mkdir()
    (root.folder / "proc/101").rename(root.folder / "proc/100/task/101")
    assert [(task.pid, task.name) for task in host_of(root, engine_of(root)).blocked_tasks] == [
        (40, "nvidia-smi"),
        (100, "vllm"),
    ]


def test_the_drivers_own_list_of_gpus_is_read(root: Root) -> None:
    text = "Model: \t\t NVIDIA H100\nGPU UUID: \t GPU-aaaa\nBus Location: \t 0000:18:00.0\nGPU Excluded:\t Yes\n"
    root.put("proc/driver/nvidia/gpus/0000:18:00.0/information", text)
    (gpu,) = host_of(root).driver_gpus
    assert (gpu.pci_address, gpu.uuid, gpu.excluded) == ("0000:18:00.0", "GPU-aaaa", True)


def test_memory_and_pressure_are_read(root: Root) -> None:
    root.put("proc/meminfo", "MemTotal:  2048 kB\nMemAvailable:  1024 kB\n")
    root.put(
        "proc/pressure/memory",
        "some avg10=0.00 avg60=9.00 avg300=0.00 total=1\nfull avg10=0.00 avg60=2.50 avg300=0.00 total=1\n",
    )
    root.put("proc/cpuinfo", "flags\t\t: fpu hypervisor\n")
    host = host_of(root)
    assert (host.memory_total_bytes, host.memory_available_bytes, host.memory_pressure_ratio) == (
        2 << 20,
        1 << 20,
        0.025,
    )
    assert host.virtual_machine is True


def test_a_node_without_driver_says_so(root: Root) -> None:
    host = host_of(root)
    assert host.driver_module.why is Why.NOT_PRESENT
    assert host.driver_gpus.why is Why.NOT_PRESENT


def manager_of(root: Root) -> object:
    return seen(FabricManagerState(root.folder)).fields["fabric_manager"]


def test_a_node_without_switches_has_no_fabric_manager(root: Root) -> None:
    state = manager_of(root)
    assert state.running is False
    assert state.unit_state.why is Why.NOT_PRESENT
    assert state.switches.why is Why.NOT_PRESENT


def test_a_running_fabric_manager_tells_its_version_in_its_log(root: Root) -> None:
    root.process(50, ("/usr/bin/nv-fabricmanager", "-c", "x"), name="nv-fabricmanage")
    root.put(
        "var/log/fabricmanager.log",
        "[May 29 2026 10:00:00] [INFO] [tid 5] Fabric Manager version 580.95.05 is running with the following configuration options\n"
        "[May 29 2026 10:00:01] [INFO] [tid 5] multicast group 0 is allocated.\n"
        "[May 29 2026 10:00:02] [ERROR] [tid 9] detected NVSwitch non-fatal error 12028 on fid 0 on NVSwitch pci bus id 00000000:86:00.0 physical id 3 port 61\n",
    )
    root.put(
        "proc/driver/nvidia-nvswitch/devices/0000:86:00.0/information",
        "Physical Id: 3\nUUID: SWX-1\nBIOS Version: 96.10\n",
    )
    state = manager_of(root)
    assert (state.unit_state, state.running, state.version) == ("active", True, "580.95.05")
    assert [(m.kind, m.where) for m in state.messages] == [
        ("started", "fabricmanager.log:1"),
        ("non-fatal", "fabricmanager.log:3"),
    ]
    assert [(s.pci_address, s.bios_version) for s in state.switches] == [("0000:86:00.0", "96.10")]


def test_a_dead_fabric_manager_is_told_from_one_that_is_not_installed(root: Root) -> None:
    root.put("usr/lib/systemd/system/nvidia-fabricmanager.service", "[Service]\n")
    root.put(
        "var/lib/dpkg/status",
        "Package: bash\nStatus: install ok installed\nVersion: 5.2-1\n\n"
        "Package: nvidia-fabricmanager-580\nStatus: install ok installed\nPriority: optional\nVersion: 580.95.05-0ubuntu1\n\n",
    )
    state = manager_of(root)
    assert (state.unit_state, state.running, state.version) == ("inactive", False, "580.95.05")


# All together ----------------------------------------------------------------------------------------------------


def test_every_collector_on_an_empty_root_says_why(tmp_path: Path) -> None:
    (snapshot,) = live.every(1, live.without_nvml(tmp_path), 1)
    assert len(snapshot.seen) + len(snapshot.unseen) >= 8
    assert all(part.why.detail for part in snapshot.unseen)


def test_a_snapshot_of_this_machine_travels_through_a_recording() -> None:
    (snapshot,) = live.every(1, live.without_nvml(Path("/")), 1)
    encoded = msgspec.json.encode(snapshot)
    assert msgspec.json.decode(encoded, type=Snapshot) == snapshot


# Real process tables ---------------------------------------------------------------------------------------------

SAMPLES = Path(__file__).parent.parent.parent / "shared" / "samples" / "live" / "v0.32.0"


@pytest.mark.parametrize(
    ("run", "ranks"),
    [("normal_small", ["Worker"]), ("tp2_normal", ["Worker_TP0", "Worker_TP1"]), ("apiservers2", ["Worker"])],
)
def test_the_process_table_of_a_real_engine_is_one_engine(root: Root, run: str, ranks: list[str]) -> None:
    table = SAMPLES / run / "ps_ready.txt"
    if not table.exists():
        pytest.skip("the shared samples are not beside this checkout")
    for line in table.read_text().splitlines()[1:]:
        pid, parent, _, state, _, _, name, *arguments = line.split()
        root.process(int(pid), tuple(arguments), parent=int(parent), name=name, state=state[0])
    engine = engine_of(root)
    assert engine.kind == "vllm"
    assert [rank.title for rank in engine.ranks] == [f"VLLM::{name}" for name in ranks]
    assert [rank.rank for rank in engine.ranks] == list(range(len(ranks)))
