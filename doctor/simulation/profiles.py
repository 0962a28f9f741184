"""The nodes that can be simulated: boards, their wiring, and the engine that runs on them.

Figures are from captures of `nvidia-smi -q` (H100, H200, L40S), product briefs and public `topo -m` outputs;
those that no document or capture gives are marked as guesses.
"""

from __future__ import annotations

import uuid

import msgspec

NO_LINK = -1
"""`Profile.peer_of`: nothing is plugged in at the other end."""


class Product(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU product, as NVML describes an idle one."""

    name: str
    pci_device_id: str
    pci_subsystem_id: str
    compute_capability: tuple[int, int]
    architecture: int
    """NVML_DEVICE_ARCH_*: 7 Ampere, 8 Ada, 9 Hopper."""
    vbios: str
    inforom: str
    memory_mib: int
    reserved_mib: int
    bar1_mib: int
    memory_clock_mhz: int
    sm_clock_mhz: int
    sm_clock_idle_mhz: int
    performance_state_idle: int = 0
    pcie_generation: int
    pcie_generation_idle: int
    nvlinks: int = 0
    nvlink_version: int = 0
    """NVML_NVLINK_VERSION_*: 4 is NVLink 3.0, 6 is NVLink 4.0."""
    nvlink_mbps: int = 0
    idle_watts: float
    busy_watts: float
    """Under full decode load, below the limit: serving does not reach the limit."""
    limit_watts: int
    limit_min_watts: int
    limit_max_watts: int
    base_celsius: float
    """Where the GPU would settle at 0 W."""
    celsius_per_watt: float
    memory_celsius_per_watt: float | None
    """Rise of the memory above the GPU's base, plus 8; None: no sensor that NVML can read."""
    thresholds_celsius: tuple[int, int, int, int] | None = None
    """Shutdown, slowdown, GPU max, memory max; None: the board tells margins only."""
    margin: tuple[float, float] | None = None
    """T.Limit as (offset, slope) of the GPU's temperature; None: N/A."""
    margin_thresholds: tuple[int, int, int, int | None] | None = None
    """T.Limit of shutdown, slowdown, GPU max, memory max."""
    ecc: bool = True
    mig_slots: int = 0
    gpm: bool = False
    p2p: bool = True
    """GeForce boards refuse peer access."""

    @property
    def total_bytes(self) -> int:
        """The frame buffer."""
        return self.memory_mib << 20


H100_SXM = Product(
    name="NVIDIA H100 80GB HBM3",
    pci_device_id="10de:2330",
    pci_subsystem_id="10de:16c1",
    compute_capability=(9, 0),
    architecture=9,
    vbios="96.00.A5.00.01",
    inforom="G520.0200.00.05",
    memory_mib=81559,
    reserved_mib=479,
    bar1_mib=131072,
    memory_clock_mhz=2619,
    sm_clock_mhz=1980,
    sm_clock_idle_mhz=345,
    pcie_generation=5,
    pcie_generation_idle=5,
    nvlinks=18,
    nvlink_version=6,
    nvlink_mbps=26562,
    idle_watts=70.0,
    busy_watts=640.0,
    limit_watts=700,
    limit_min_watts=200,
    limit_max_watts=700,
    # Two captures of one H100: 41 C and T.Limit 46 at 70 W, 59 C and T.Limit 26 at 629 W; memory 48 and 55 C.
    base_celsius=38.7,
    celsius_per_watt=0.0322,
    memory_celsius_per_watt=0.0125,
    margin=(91.6, -1.111),
    margin_thresholds=(-8, -2, 0, 0),
    mig_slots=7,
    gpm=True,
)
H200_SXM = msgspec.structs.replace(
    H100_SXM,
    name="NVIDIA H200",
    pci_device_id="10de:2335",
    pci_subsystem_id="10de:18be",
    vbios="96.00.A5.00.03",
    inforom="G520.0280.02.02",
    memory_mib=143771,
    reserved_mib=614,
    bar1_mib=262144,
    memory_clock_mhz=3201,
    idle_watts=77.7,
)
H100_PCIE = msgspec.structs.replace(
    H100_SXM,
    name="NVIDIA H100 PCIe",
    pci_device_id="10de:2331",
    pci_subsystem_id="10de:1626",
    vbios="96.00.30.00.01",  # guess
    inforom="1010.0200.00.02",  # guess
    memory_clock_mhz=1593,
    sm_clock_mhz=1755,
    nvlinks=12,
    idle_watts=48.0,  # guess
    busy_watts=320.0,
    limit_watts=350,
    limit_max_watts=350,
    base_celsius=33.0,
    celsius_per_watt=0.09,
)
H100_NVL = msgspec.structs.replace(
    H100_PCIE,
    name="NVIDIA H100 NVL",
    pci_device_id="10de:2321",
    pci_subsystem_id="10de:1839",
    memory_mib=95830,
    memory_clock_mhz=2619,
    sm_clock_mhz=1785,
    busy_watts=370.0,
    limit_watts=400,
    limit_max_watts=400,
)
A100_SXM = Product(
    name="NVIDIA A100-SXM4-80GB",
    pci_device_id="10de:20b2",
    pci_subsystem_id="10de:1463",
    compute_capability=(8, 0),
    architecture=7,
    vbios="92.00.45.00.03",  # guess
    inforom="G506.0210.00.03",  # guess
    memory_mib=81920,
    reserved_mib=618,  # guess
    bar1_mib=131072,
    memory_clock_mhz=1593,
    sm_clock_mhz=1410,
    sm_clock_idle_mhz=210,
    pcie_generation=4,
    pcie_generation_idle=4,
    nvlinks=12,
    nvlink_version=4,
    nvlink_mbps=25000,
    idle_watts=62.0,  # guess
    busy_watts=365.0,
    limit_watts=400,
    limit_min_watts=100,
    limit_max_watts=400,
    base_celsius=28.0,
    celsius_per_watt=0.085,
    memory_celsius_per_watt=0.09,
    thresholds_celsius=(92, 89, 85, 95),
    mig_slots=7,
)
L40S = Product(
    name="NVIDIA L40S",
    pci_device_id="10de:26b9",
    pci_subsystem_id="10de:1851",
    compute_capability=(8, 9),
    architecture=8,
    vbios="95.02.66.00.02",
    inforom="G133.0242.00.03",
    memory_mib=46068,
    reserved_mib=609,
    bar1_mib=65536,
    memory_clock_mhz=9001,
    sm_clock_mhz=2520,
    sm_clock_idle_mhz=210,
    pcie_generation=4,
    pcie_generation_idle=4,
    idle_watts=36.0,
    busy_watts=310.0,
    limit_watts=350,
    limit_min_watts=100,
    limit_max_watts=350,
    base_celsius=32.0,
    celsius_per_watt=0.11,
    memory_celsius_per_watt=None,
    margin=(88.0, -1.0),  # capture: 64 C, T.Limit 24
    margin_thresholds=(-5, -2, 0, None),
)
RTX_4090 = Product(
    name="NVIDIA GeForce RTX 4090",
    pci_device_id="10de:2684",
    pci_subsystem_id="10de:16f3",
    compute_capability=(8, 9),
    architecture=8,
    vbios="95.02.3C.00.91",  # guess
    inforom="G002.0000.00.03",  # guess
    memory_mib=24564,
    reserved_mib=432,  # guess
    bar1_mib=32768,
    memory_clock_mhz=10501,
    sm_clock_mhz=3105,
    sm_clock_idle_mhz=210,
    performance_state_idle=8,
    pcie_generation=4,
    pcie_generation_idle=1,
    idle_watts=18.0,  # guess
    busy_watts=390.0,
    limit_watts=450,
    limit_min_watts=150,
    limit_max_watts=600,
    base_celsius=31.0,
    celsius_per_watt=0.085,
    memory_celsius_per_watt=None,
    thresholds_celsius=(101, 96, 90, 0),  # capture of a 4080 SUPER
    ecc=False,
    p2p=False,
)


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """The vLLM engine that a simulated node runs: what NVML, `/proc`, log and metrics must agree about."""

    model: str
    gpus: tuple[int, ...]
    """NVML indices, in rank order; as many as the tensor-parallel size."""
    front_pid: int = 2101
    """The API server."""
    core_pid: int = 2188
    """The engine core; with one GPU it does the GPU's work itself."""
    first_worker_pid: int = 2263
    started_seconds: float = -3600.0
    """When the engine started, against the drill's time."""
    port: int = 8000
    memory_utilization: float = 0.9
    requests: int = 64
    """Running requests at full load."""

    @property
    def tensor_parallel_size(self) -> int:
        """One rank a GPU."""
        return len(self.gpus)

    @property
    def rank_pids(self) -> tuple[int, ...]:
        """The process that works on each GPU, in rank order."""
        if len(self.gpus) == 1:
            return (self.core_pid,)
        return tuple(self.first_worker_pid + rank for rank in range(len(self.gpus)))

    def title(self, rank: int) -> str:
        """Return the process title of a rank."""
        return f"VLLM::Worker_TP{rank}" if len(self.gpus) > 1 else "VLLM::EngineCore"


class Profile(msgspec.Struct, frozen=True, kw_only=True):
    """A node that can be simulated."""

    name: str
    text: str
    product: Product
    pci_addresses: tuple[str, ...]
    numa_nodes: tuple[int, ...]
    wiring: str
    """`switch`, `mesh` (each pair directly), `pairs` (bridged), `unbridged` or `none`."""
    switches: tuple[str, ...] = ()
    """PCI addresses of the NVSwitches."""
    switch_device_id: str = ""
    near: str = "NODE"
    """How two GPUs of one NUMA node reach each other by PCIe, in `topo -m`'s words; of different nodes: SYS."""
    fabric: bool = False
    """Whether the GPUs register with an NVLink fabric (Hopper behind NVSwitches)."""
    driver: str = "590.48.01"
    cuda_driver: str = "13.1"
    workload: Workload

    @property
    def gpus(self) -> range:
        """NVML indices."""
        return range(len(self.pci_addresses))

    @property
    def fabric_manager(self) -> bool:
        """Whether this board needs one."""
        return bool(self.switches)

    def uuid(self, gpu: int) -> str:
        """Return the UUID of a GPU: invented, and the same each time."""
        return f"GPU-{uuid.uuid5(uuid.NAMESPACE_DNS, f'{self.name}.{gpu}.gpu-doctor.invalid')}"

    def serial(self, gpu: int) -> str:
        """Return the serial number of a GPU: invented."""
        return f"16500230{gpu:05d}"

    def peer_of(self, gpu: int, link: int) -> int:
        """Return the GPU at the other end of a direct link; NO_LINK where there is none."""
        if self.wiring == "pairs":
            return gpu ^ 1
        if self.wiring == "mesh":
            others = [other for other in self.gpus if other != gpu]
            return others[link * len(others) // self.product.nvlinks]
        return NO_LINK

    def far_end(self, gpu: int, link: int) -> tuple[int, int] | None:
        """Return GPU and link at the other end of a direct link, or None where there is no GPU."""
        peer = self.peer_of(gpu, link)
        if peer == NO_LINK:
            return None
        links = range(self.product.nvlinks)
        mine = [n for n in links if self.peer_of(gpu, n) == peer]
        theirs = [n for n in links if self.peer_of(peer, n) == gpu]
        return peer, theirs[mine.index(link)]

    def switch_of(self, link: int) -> str:
        """Return the PCI address of the NVSwitch at the other end of a link."""
        return self.switches[link % len(self.switches)]

    def ancestor(self, first: int, second: int) -> str:
        """Return how two GPUs reach each other by PCIe, in `topo -m`'s words."""
        return self.near if self.numa_nodes[first] == self.numa_nodes[second] else "SYS"


BUSES = ("18", "2a", "3a", "5d", "9a", "ab", "ba", "db")
HGX_8 = tuple(f"0000:{bus}:00.0" for bus in BUSES)
HGX_4 = HGX_8[::2]
PCIE_4 = ("0000:17:00.0", "0000:31:00.0", "0000:b1:00.0", "0000:ca:00.0")
SWITCHES_4 = tuple(f"0000:{bus}:00.0" for bus in ("05", "06", "07", "08"))
SWITCHES_6 = tuple(f"0000:{bus}:00.0" for bus in ("c1", "c2", "c3", "c4", "c5", "c6"))

LLAMA_405B_FP8 = "meta-llama/Llama-3.1-405B-Instruct-FP8"
LLAMA_70B = "meta-llama/Llama-3.3-70B-Instruct"

PROFILES: dict[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile(
            name="hgx-h100-8",
            text="8× H100 SXM behind four NVSwitches",
            product=H100_SXM,
            pci_addresses=HGX_8,
            numa_nodes=(0, 0, 0, 0, 1, 1, 1, 1),
            wiring="switch",
            switches=SWITCHES_4,
            switch_device_id="10de:22a3",
            fabric=True,
            workload=Workload(model=LLAMA_405B_FP8, gpus=tuple(range(8))),
        ),
        Profile(
            name="hgx-h100-4",
            text="4× H100 SXM, wired pair by pair with six NVLinks (NV6), no NVSwitch",
            product=H100_SXM,
            pci_addresses=HGX_4,
            numa_nodes=(3, 1, 7, 5),
            wiring="mesh",
            workload=Workload(model=LLAMA_70B, gpus=(0, 1, 2, 3)),
        ),
        Profile(
            name="dgx-h100-4of8",
            text="4 GPUs of an 8× H100 SXM board behind NVSwitches: the documents' reference rig",
            product=H100_SXM,
            pci_addresses=HGX_8[:4],
            numa_nodes=(0, 0, 0, 0),
            wiring="switch",
            switches=SWITCHES_4,
            switch_device_id="10de:22a3",
            fabric=True,
            workload=Workload(model=LLAMA_70B, gpus=(0, 1, 2, 3)),
        ),
        Profile(
            name="hgx-h200-8",
            text="8× H200 SXM behind four NVSwitches",
            product=H200_SXM,
            pci_addresses=HGX_8,
            numa_nodes=(0, 0, 0, 0, 1, 1, 1, 1),
            wiring="switch",
            switches=SWITCHES_4,
            switch_device_id="10de:22a3",
            fabric=True,
            workload=Workload(model=LLAMA_405B_FP8, gpus=tuple(range(8))),
        ),
        Profile(
            name="hgx-a100-8",
            text="8× A100 SXM 80 GB behind six NVSwitches",
            product=A100_SXM,
            pci_addresses=tuple(f"0000:{bus}:00.0" for bus in ("07", "0f", "47", "4e", "87", "90", "b7", "bd")),
            numa_nodes=(3, 3, 1, 1, 7, 7, 5, 5),
            wiring="switch",
            switches=SWITCHES_6,
            switch_device_id="10de:1af1",
            near="PXB",
            workload=Workload(model="mistralai/Mistral-Large-Instruct-2411", gpus=tuple(range(8))),
        ),
        Profile(
            name="h100-pcie-4",
            text="4× H100 PCIe without NVLink bridges",
            product=H100_PCIE,
            pci_addresses=PCIE_4,
            numa_nodes=(0, 0, 1, 1),
            wiring="unbridged",
            near="NODE",
            workload=Workload(model=LLAMA_70B, gpus=(0, 1, 2, 3)),
        ),
        Profile(
            name="h100-nvl-4",
            text="4× H100 NVL, bridged in pairs (NV12); the engine runs on the first pair",
            product=H100_NVL,
            pci_addresses=PCIE_4,
            numa_nodes=(0, 0, 1, 1),
            wiring="pairs",
            near="NODE",
            workload=Workload(model="RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic", gpus=(0, 1)),
        ),
        Profile(
            name="l40s-4",
            text="4× L40S: no NVLink",
            product=L40S,
            pci_addresses=PCIE_4,
            numa_nodes=(0, 0, 1, 1),
            wiring="none",
            near="PIX",
            driver="595.80",
            cuda_driver="13.2",
            workload=Workload(model="RedHatAI/Llama-3.3-70B-Instruct-FP8-dynamic", gpus=(0, 1, 2, 3)),
        ),
        Profile(
            name="rtx4090-4",
            text="4× GeForce RTX 4090: no NVLink, no peer access",
            product=RTX_4090,
            pci_addresses=("0000:01:00.0", "0000:41:00.0", "0000:81:00.0", "0000:c1:00.0"),
            numa_nodes=(0, 0, 0, 0),
            wiring="none",
            near="PHB",
            workload=Workload(model="Qwen/Qwen2.5-32B-Instruct", gpus=(0, 1, 2, 3)),
        ),
    )
}
"""All profiles by name."""
