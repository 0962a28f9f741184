"""The simulated node's files: a real root with /proc, /sys, logs, the engine's environment and its model."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Iterator
from pathlib import Path

import msgspec

from doctor.simulation import script, serving
from doctor.simulation.engine import SimulatedEngine, Work
from doctor.simulation.faults import Fault
from doctor.simulation.physics import Drill, Physics
from doctor.simulation.script import UPTIME_SECONDS, EngineScript, Line

TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
SPEEDS = {1: "2.5", 2: "5.0", 3: "8.0", 4: "16.0", 5: "32.0"}
"""GT/s by PCI Express generation, as sysfs writes them."""

FABRIC_MANAGER_PID = 1633
HUNG_PID = 4711
SNAPSHOT = "0f1e2d3c4b5a69788796a5b4c3d2e1f001234567"
"""An invented revision of the model."""


class _Process(msgspec.Struct, frozen=True):
    """A process of the simulated node."""

    pid: int
    parent: int
    name: str
    """The kernel's `comm`."""
    arguments: tuple[str, ...]
    started_seconds: float
    cpu_seconds: float
    state: str = "S"


class SimulatedRoot:
    """The files of a drill, written once and then kept up with its time."""

    def __init__(self, folder: Path, drill: Drill, port: int) -> None:
        self.folder = folder
        self.drill = drill
        self.node = drill.node
        self.engine = SimulatedEngine(drill)
        self._port = port
        self._physics = Physics(drill)
        self._boot = int(drill.started_at - UPTIME_SECONDS)
        self.absent = self.has("no-engine")
        self._script = EngineScript(drill, port)
        self._engine_lines: list[Line] = [] if self.absent else self._script.lines()
        self._kernel_lines = script.kernel_lines(drill)
        self._manager_lines = script.fabric_manager_lines(drill) if self.node.fabric_manager else []
        self._sequence = 0
        self._last_work: Work | None = None
        self._moved = False
        self._links: dict[str, tuple[int, int, int, int]] = {}
        self._driver: str | None = None
        """The version that is loaded by now."""
        self._there = set(self.node.gpus)
        """The GPUs that are on the bus by now."""
        self._next_statistics = drill.engine.started_seconds + script.READY_SECONDS + script.STATS_SECONDS

    def has(self, name: str) -> bool:
        """Whether the drill has this fault, now or at another time."""
        return any(fault.name == name for fault in self.drill.faults)

    def _active(self, name: str, seconds: float, gpu: int | None = None) -> Fault | None:
        return self.drill.active(name, seconds, gpu)

    # Once.

    def write(self) -> None:
        """Write everything as it stands at the beginning."""
        self._write_system()
        self._write_pci()
        self._write_driver()
        if not self.absent:
            self._write_environment()
            self._write_model()
        self.advance(0.0)

    def _put(self, path: str, text: str | bytes) -> None:
        """Write a file as a whole: a reader sees the old one or the new one."""
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        part = target.with_name(f".{target.name}.part")
        part.write_bytes(text.encode() if isinstance(text, str) else text)
        part.replace(target)

    def _link(self, path: str, target: str) -> None:
        link = self.folder / path
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(target)

    def _write_system(self) -> None:
        self._put("proc/stat", f"cpu  1 0 1 1 0 0 0 0 0 0\nbtime {self._boot}\n")
        self._put("proc/sys/kernel/osrelease", "6.8.0-60-generic\n")
        self._put("etc/os-release", 'PRETTY_NAME="Ubuntu 24.04.2 LTS"\nID=ubuntu\n')
        self._put("proc/meminfo", "MemTotal:       2113382400 kB\nMemAvailable:   1690705920 kB\n")
        self._put(
            "proc/pressure/memory",
            "some avg10=0.00 avg60=0.00 avg300=0.00 total=0\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=0\n",
        )
        self._put("proc/cpuinfo", "processor\t: 0\nflags\t\t: fpu vme sse2 avx512f amx_tile\n")
        (self.folder / "sys/kernel/iommu_groups").mkdir(parents=True)
        self._put_process(_Process(1, 0, "systemd", ("/sbin/init",), -UPTIME_SECONDS, 12.0))

    def _write_pci(self) -> None:
        acs = 0x1D if self.has("p2p-blocked") else 0
        for gpu, address in enumerate(self.node.pci_addresses):
            self._pci(address, self.node.product.pci_device_id, "0x030200", self.node.numa_nodes[gpu], acs)
        for address in self.node.switches:
            self._pci(address, self.node.switch_device_id, "0x068000", self.node.numa_nodes[0], acs)

    def _pci(self, address: str, device_id: str, kind: str, numa: int, acs: int) -> None:
        here = self._pci_place(address)
        above = here.removesuffix(f"/{address}")
        port = above.rpartition("/")[2]
        for place, vendor, device, form in (
            (above, "0x8086", "0x352a", "0x060400"),
            (here, f"0x{device_id[:4]}", f"0x{device_id[5:]}", kind),
        ):
            self._put(f"{place}/vendor", f"{vendor}\n")
            self._put(f"{place}/device", f"{device}\n")
            self._put(f"{place}/class", f"{form}\n")
            self._put(f"{place}/numa_node", f"{numa}\n")
        space = bytearray(4096)
        struct.pack_into("<IHH", space, 0x100, 0x0001_000D, 0x5F, acs)  # ACS capability, what it can do, what is on
        self._put(f"{above}/config", bytes(space))
        self._link(f"sys/bus/pci/devices/{port}", f"../../../../{above}")
        self._link(f"sys/bus/pci/devices/{address}", f"../../../../{here}")
        driver = "nvidia-nvswitch" if kind == "0x068000" else "nvidia"
        (self.folder / f"sys/bus/pci/drivers/{driver}").mkdir(parents=True, exist_ok=True)
        self._link(f"{here}/driver", f"../../../../bus/pci/drivers/{driver}")
        generation = self.node.product.pcie_generation if driver == "nvidia" else 4
        width = 16 if driver == "nvidia" else 2
        self._pcie(here, generation, generation, width, width)
        self._pcie(above, generation, generation, width, width)

    @staticmethod
    def _pci_place(address: str) -> str:
        """Return where a device stands in the tree, below its port."""
        bus = int(address[5:7], 16)
        return f"sys/devices/pci{address[:5]}{bus - 1:02x}/{address[:5]}{bus - 1:02x}:01.0/{address}"

    def _pcie(self, place: str, generation: int, generation_max: int, width: int, width_max: int) -> None:
        link = (generation, generation_max, width, width_max)
        if self._links.get(place) == link:
            return
        self._links[place] = link
        self._put(f"{place}/current_link_speed", f"{SPEEDS[generation]} GT/s PCIe\n" if generation else "Unknown\n")
        self._put(f"{place}/current_link_width", f"{width}\n")
        self._put(f"{place}/max_link_speed", f"{SPEEDS[generation_max]} GT/s PCIe\n")
        self._put(f"{place}/max_link_width", f"{width_max}\n")

    def _write_driver(self) -> None:
        node = self.node
        if not node.fabric_manager:
            return
        for number, address in enumerate(node.switches):
            text = f"Physical Id: \t {number}\nUUID: \t SWX-{number:08X}\nBIOS Version: \t 96.10.57.00.01\n"
            self._put(f"proc/driver/nvidia-nvswitch/devices/{address}/information", text)
        self._put(
            "usr/lib/systemd/system/nvidia-fabricmanager.service", "[Service]\nExecStart=/usr/bin/nv-fabricmanager\n"
        )

    def _install_fabric_manager(self, version: str) -> None:
        branch = version.partition(".")[0]
        package = (
            f"Package: nvidia-fabricmanager-{branch}\nStatus: install ok installed\nArchitecture: amd64\n"
            f"Version: {version}-1\n\n"
        )
        self._put("var/lib/dpkg/status", package)

    def _write_environment(self) -> None:
        site = f"{serving.ENVIRONMENT[1:]}/lib/python3.12/site-packages"
        self._put(f"{serving.ENVIRONMENT[1:]}/pyvenv.cfg", f"home = /usr/bin\nversion = {serving.PYTHON}\n")
        for name, version in (("vllm", serving.VLLM), ("torch", serving.TORCH), ("nvidia_nccl_cu13", serving.NCCL)):
            self._put(
                f"{site}/{name}-{version}.dist-info/METADATA",
                f"Metadata-Version: 2.4\nName: {name}\nVersion: {version}\n",
            )
        text = f"from typing import Optional\n__version__ = '{serving.TORCH}'\ndebug = False\ncuda: Optional[str] = '{serving.CUDA}'\n"
        self._put(f"{site}/torch/version.py", text)

    def _write_model(self) -> None:
        model = serving.model_of(self.drill)
        repository = f"{serving.HUB[1:]}/hub/models--{self.drill.engine.model.replace('/', '--')}"
        self._put(f"{repository}/refs/main", SNAPSHOT)
        self._put(f"{repository}/snapshots/{SNAPSHOT}/config.json", json.dumps(model.config, indent=2))
        weights = self.folder / repository / "snapshots" / SNAPSHOT / "model.safetensors"
        weights.touch()
        os.truncate(weights, model.weights_bytes)  # a hole: it takes no space

    # As time passes.

    def advance(self, seconds: float) -> None:
        """Bring every file up to this time of the drill."""
        self._append_logs(seconds)
        self._bring_driver(seconds)
        self._bring_pci(seconds)
        self._bring_processes(seconds)

    def _append_logs(self, seconds: float) -> None:
        kernel: list[str] = []
        while self._kernel_lines and self._kernel_lines[0].seconds <= seconds:
            line = self._kernel_lines.pop(0)
            uptime = max(0.0, line.seconds + UPTIME_SECONDS)
            kernel.append(f"3,{self._sequence},{round(uptime * 1e6)},-;{line.text}\n")
            self._sequence += 1
        self._append("dev/kmsg", "".join(kernel))
        manager: list[str] = []
        while self._manager_lines and self._manager_lines[0].seconds <= seconds:
            manager.append(self._manager_lines.pop(0).text + "\n")
        if self.node.fabric_manager:
            self._append("var/log/fabricmanager.log", "".join(manager))
        if not self.absent:
            self._append(serving.LOG[1:], "".join(f"{line.text}\n" for line in self._engine_news(seconds)))

    def _append(self, path: str, text: str) -> None:
        target = self.folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("a", encoding="utf-8") as file:
            file.write(text)

    def _engine_news(self, seconds: float) -> list[Line]:
        """Return the engine's lines up to then, scripted ones and statistics, in order."""
        news: list[Line] = []
        while self._engine_lines and self._engine_lines[0].seconds <= seconds:
            news.append(self._engine_lines.pop(0))
        ends = min(self.drill.engine_ends_seconds, seconds)
        while self._next_statistics <= ends:
            at = self._next_statistics
            self._next_statistics += script.STATS_SECONDS
            news += self._statistics(at)
        return sorted(news, key=lambda line: line.seconds)

    def _statistics(self, at: float) -> Iterator[Line]:
        """Yield the statistics line of one interval; of a silent engine one more, then none (seen live on 0.32.0)."""
        now, before = self.engine.at(at), self._last_work
        self._last_work = now
        moved = before is not None and now.generated > before.generated
        if before is not None and (moved or self._moved):
            generated = (now.generated - before.generated) / script.STATS_SECONDS
            prompted = (now.prompted - before.prompted) / script.STATS_SECONDS
            yield self._script.statistics(at, now.running, generated, prompted, now.used)
        if moved:
            yield self._script.served(at)
        self._moved = moved

    def _bring_driver(self, seconds: float) -> None:
        """Load and unload the driver, and take GPUs off the bus and put them back."""
        driver = self.drill.driver_at(seconds)
        there = {gpu for gpu in self.node.gpus if not self._active("gpu-removed", seconds, gpu)}
        if (driver, there) == (self._driver, self._there):
            return
        for folder in ("sys/module/nvidia", "proc/driver/nvidia") if driver != self._driver else ():
            shutil.rmtree(self.folder / folder, ignore_errors=True)
        if driver is not None and driver != self._driver:
            self._put("sys/module/nvidia/version", f"{driver}\n")
            banner = f"NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  {driver}  Release Build\n"
            self._put("proc/driver/nvidia/version", banner)
            if self.node.fabric_manager:
                self._install_fabric_manager(script.fabric_manager_version(self.drill, seconds))
        for gpu, address in enumerate(self.node.pci_addresses):
            self._bring_gpu(gpu, address, driver, gpu in there)
        self._driver, self._there = driver, there

    def _bring_gpu(self, gpu: int, address: str, driver: str | None, there: bool) -> None:
        node = self.node
        told = f"proc/driver/nvidia/gpus/{address}"
        if driver is None or not there:
            shutil.rmtree(self.folder / told, ignore_errors=True)
        else:
            text = (
                f"Model: \t\t {node.product.name}\nIRQ:   \t\t {100 + gpu}\nGPU UUID: \t {node.uuid(gpu)}\n"
                f"Video BIOS: \t {node.product.vbios}\nBus Type: \t PCIe\nBus Location: \t {address}\n"
                f"Device Minor: \t {gpu}\nGPU Firmware: \t {driver}\nGPU Excluded:\t No\n"
            )
            self._put(f"{told}/information", text)
        seen, bound = self.folder / f"sys/bus/pci/devices/{address}", self.folder / f"{self._pci_place(address)}/driver"
        for link, wanted, target in (
            (seen, there, f"../../../../{self._pci_place(address)}"),
            (bound, driver is not None, "../../../../bus/pci/drivers/nvidia"),
        ):
            if not wanted:
                link.unlink(missing_ok=True)
            elif not link.is_symlink():
                link.symlink_to(target)

    def _bring_pci(self, seconds: float) -> None:
        product = self.node.product
        state = self._physics.at(seconds)
        for gpu, address in enumerate(self.node.pci_addresses):
            if gpu not in self._there:
                continue
            here = (self.folder / f"sys/bus/pci/devices/{address}").resolve().relative_to(self.folder.resolve())
            busy = state.gpus[gpu].activity != "idle"
            generation = product.pcie_generation if busy else product.pcie_generation_idle
            width = 16
            if fault := self._active("pcie-generation", seconds, gpu):
                generation = min(generation, int(fault.params["generation"]))
            if fault := self._active("pcie-width", seconds, gpu):
                width = int(fault.params["width"])
            if state.gpus[gpu].activity == "lost":
                generation, width = 0, 63
            self._pcie(str(here), generation, product.pcie_generation, width, 16)

    def _bring_processes(self, seconds: float) -> None:
        manager_gone = self._active("fabric-manager-dead", seconds) or self.has("fabric-manager-version")
        if self.node.fabric_manager:
            name = ("/usr/bin/nv-fabricmanager", "-c", "/usr/share/nvidia/nvswitch/fabricmanager.cfg")
            if manager_gone:
                self._gone(FABRIC_MANAGER_PID)
            else:
                self._bring_fabric_manager(name, seconds)
        if self._active("driver-hung", seconds):
            self._put_process(_Process(HUNG_PID, 1, "nvidia-smi", ("nvidia-smi",), seconds - 60, 0.1, state="D"))
        else:
            self._gone(HUNG_PID)
        self._bring_engine(seconds)

    def _bring_fabric_manager(self, command: tuple[str, ...], seconds: float) -> None:
        """Let it run: since the boot, or since its last restart under another pid."""
        again = [f.start_seconds for f in self.drill.faults if f.name == "fabric-manager-restarted"]
        again += [f.start_seconds + f.number("down") for f in self.drill.faults if f.name == "driver-reloaded"]
        since = max((start for start in again if start <= seconds), default=-UPTIME_SECONDS + 30)
        pid = FABRIC_MANAGER_PID + sum(start <= seconds for start in again)
        for old in range(FABRIC_MANAGER_PID, pid):
            self._gone(old)
        if self.drill.driver_at(seconds) is None:
            self._gone(pid)
        else:
            self._put_process(_Process(pid, 1, "nv-fabricmanage", command, since, 60.0))

    def _bring_engine(self, seconds: float) -> None:
        engine = self.drill.engine
        pids = (engine.front_pid, engine.core_pid, *engine.rank_pids)
        if self.absent or not engine.started_seconds <= seconds < self.drill.engine_ends_seconds:
            for pid in pids:
                self._gone(pid)
            return
        lived = seconds - engine.started_seconds
        state = self._physics.at(seconds)
        started = engine.started_seconds
        group = f"/system.slice/{serving.UNIT}"
        kills = sum(1 for fault in self.drill.faults if fault.name == "oom-kill" and fault.start_seconds <= seconds)
        self._put(f"sys/fs/cgroup{group}/memory.events", f"low 0\nhigh 0\nmax {kills}\noom {kills}\noom_kill {kills}\n")
        arguments = serving.command_line(self.drill, self._port)
        self._put_process(_Process(engine.front_pid, 1, "vllm", arguments, started, lived * 0.3))
        self._surroundings(engine.front_pid, group)
        halted = self.drill.halted_since(seconds)
        computes = self._active("engine-core-busy", seconds) is not None
        worked = lived if halted is None else halted - started
        core_seconds = worked * 0.5 + (lived - worked if computes else 0.0)
        self._put_process(
            _Process(
                engine.core_pid,
                engine.front_pid,
                "VLLM::EngineCor",
                ("VLLM::EngineCore",),
                started + 10,
                core_seconds,
                state="R" if computes else "S",
            )
        )
        if engine.tensor_parallel_size == 1:
            return
        for rank, pid in enumerate(engine.rank_pids):
            # A worker polls while there is work, also in a collective; on an idle GPU of a halted engine it stands still.
            polls = halted is None or state.gpus[engine.gpus[rank]].activity in {"working", "spinning", "hung"}
            title = engine.title(rank)
            self._put_process(
                _Process(
                    pid,
                    engine.core_pid,
                    title[:15],
                    (title,),
                    started + 15,
                    (lived if polls else worked) * 0.95,
                    state=self._state_of(rank, seconds, polls),
                )
            )

    def _state_of(self, rank: int, seconds: float, polls: bool) -> str:
        for name, state in (("rank-stopped", "T"), ("rank-blocked", "D")):
            fault = self._active(name, seconds)
            if fault is not None and fault.params["rank"] == rank:
                return state
        return "R" if polls else "S"

    def _put_process(self, process: _Process) -> None:
        ticks = round((self.drill.started_at + process.started_seconds - self._boot) * TICKS_PER_SECOND)
        cpu = round(process.cpu_seconds * TICKS_PER_SECOND)
        place = f"{process.state} {process.parent} {process.pid} {process.pid} 0 -1 4194560 0 0 0 0"
        self._put(
            f"proc/{process.pid}/stat", f"{process.pid} ({process.name}) {place} {cpu} 0 0 0 20 0 1 0 {ticks} 0 0\n"
        )
        if not (self.folder / f"proc/{process.pid}/cmdline").exists():
            self._put(f"proc/{process.pid}/cmdline", "\0".join(process.arguments) + "\0")

    def _surroundings(self, pid: int, group: str) -> None:
        """Write what else /proc tells of the engine's front."""
        if (self.folder / f"proc/{pid}/environ").exists():
            return
        visible = ",".join(str(gpu) for gpu in self.drill.engine.gpus)
        environment = {
            "PATH": f"{serving.ENVIRONMENT}/bin:/usr/bin:/bin",
            "HOME": "/root",
            "CUDA_VISIBLE_DEVICES": visible,
            "HF_HOME": serving.HUB,
            "HF_TOKEN": "hf_" + "x" * 34,
            "NCCL_DEBUG": "WARN",
        }
        self._link(f"proc/{pid}/root", "../..")
        self._link(f"proc/{pid}/cwd", "/root")
        self._link(f"proc/{pid}/exe", f"{serving.ENVIRONMENT}/bin/python3.12")
        output = "/dev/pts/0" if self.has("engine-log-missing") else serving.LOG
        self._link(f"proc/{pid}/fd/1", output)
        self._link(f"proc/{pid}/fd/2", output)
        self._put(f"proc/{pid}/cgroup", f"0::{group}\n")
        self._put(f"proc/{pid}/environ", "\0".join(f"{name}={value}" for name, value in environment.items()) + "\0")

    def _gone(self, pid: int) -> None:
        folder = self.folder / f"proc/{pid}"
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
