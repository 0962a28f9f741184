"""How load, heat, power and clocks of a simulated node move: a pure function of the drill and its time.

Time goes in cells, in which power is constant: a tenth of a second, as often as the real sensor changes, and a whole
second before the first visit. Within a cell heat follows its exponential exactly, so energy is the integral of power.
Everything is periodic in a minute: far ahead, whole minutes are jumped over once the temperatures have settled.
"""

from __future__ import annotations

import math

import msgspec

from doctor.simulation import faults
from doctor.simulation.faults import KINDS, Fault
from doctor.simulation.profiles import Product, Profile, Workload

BEGIN_SECONDS = -180.0
"""Where the drill's physics begins, in its steady state: before any fault that names no start."""
CELLS_A_SECOND = 10
CELL_SECONDS = 1 / CELLS_A_SECOND
PERIOD_SECONDS = 60
PERIOD_CELLS = PERIOD_SECONDS * CELLS_A_SECOND
COARSE_CELLS = int(-BEGIN_SECONDS)
"""The cells before the first visit are a second long."""

GPU_TAU_SECONDS = 9.0  # guess: a large cold plate follows a step of power within half a minute
MEMORY_TAU_SECONDS = 15.0  # guess: HBM lags behind the die
THROTTLE_FLOOR = 0.25
"""The lowest share of its clock that a slowdown leaves a GPU."""
SETTLED_CELSIUS = 1e-6

IDLE = 0x1
SW_POWER_CAP = 0x4
HW_SLOWDOWN = 0x8
SW_THERMAL = 0x20
HW_THERMAL = 0x40
POWER_BRAKE = 0x80

HUNG_POWER = 0.02
"""Likewise of a kernel that never ends: it issues next to nothing. guess, after the map's "100 % busy at idle power"."""
SPINNING_POWER = 0.12
"""Of the way from idle to busy: a kernel that only polls memory keeps the SMs busy at little power."""

CUDA_OF_BRANCH = (
    (610, "13.3"), (595, "13.2"), (590, "13.1"), (580, "13.0"), (575, "12.9"), (570, "12.8"), (565, "12.7"), (560, "12.6"),
    (555, "12.5"), (550, "12.4"), (545, "12.3"), (535, "12.2"), (530, "12.1"), (525, "12.0"), (520, "11.8"), (515, "11.7"),
    (510, "11.6"), (470, "11.4"),
)  # fmt: skip
"""The newest CUDA by driver branch: the header that first came with each branch."""


class Drill(msgspec.Struct, frozen=True, kw_only=True):
    """What is simulated: a node, its engine, its faults, and when. It travels to the NVML child as JSON."""

    profile: str
    started_at: float
    """Unix time of the drill's second 0: the first visit."""
    faults: tuple[Fault, ...] = ()
    workload: Workload | None = None
    """None: the profile's own."""

    @property
    def node(self) -> Profile:
        """The node. Raises FaultError for an unknown name."""
        return faults.profile(self.profile)

    @property
    def engine(self) -> Workload:
        """The engine that runs on it."""
        return self.workload or self.node.workload

    @property
    def driver(self) -> str:
        """The driver's version: the profile's, or that of an older branch."""
        old = next((fault for fault in self.faults if fault.name == "driver-old"), None)
        return f"{old.params['branch']}.54.03" if old else self.node.driver

    def driver_at(self, seconds: float) -> str | None:
        """Return the version of the driver that is loaded at this time of the drill; None: none is."""
        reloaded = self.active("driver-reloaded", seconds)
        if reloaded is None:
            return self.driver
        if reloaded.elapsed(seconds) < reloaded.number("down"):
            return None
        return f"{reloaded.params['branch']}.54.03"

    def cuda_of(self, driver: str) -> str:
        """Return the newest CUDA that a driver serves."""
        if driver == self.node.driver:
            return self.node.cuda_driver
        branch = int(driver.partition(".")[0])
        return next(cuda for since, cuda in CUDA_OF_BRANCH if since <= branch)

    @property
    def engine_ends_seconds(self) -> float:
        """When the engine dies of a fault; infinity: it lives."""
        ends = (
            fault.start_seconds + after
            for fault in self.faults
            if (after := KINDS[fault.name].ends_engine_after_seconds) is not None
            and self.meets_engine(fault)
            and (fault.end_seconds is None or fault.elapsed(math.inf) >= after)
        )
        return min(ends, default=math.inf)

    def meets_engine(self, fault: Fault) -> bool:
        """Whether a fault is of one of the engine's GPUs, or of none."""
        return fault.params.get("gpu", self.engine.gpus[0]) in self.engine.gpus

    def halted_since(self, seconds: float) -> float | None:
        """Return since when no step advances at this time of the drill; None: the engine works, or there is none."""
        since = (
            fault.start_seconds
            for fault in self.faults
            if KINDS[fault.name].halts_engine and fault.active(seconds) and self.meets_engine(fault)
        )
        return min(since, default=None)

    def active(self, name: str, seconds: float, gpu: int | None = None) -> Fault | None:
        """Return the active fault of this name (on this GPU), or None."""
        return next(
            (f for f in self.faults if f.name == name and f.active(seconds) and (gpu is None or f.hits(gpu))), None
        )


class GpuState(msgspec.Struct):
    """One GPU at one time."""

    activity: str = "idle"
    """`idle`, `working`, `spinning`, `hung` or `lost`."""
    load: float = 0.0
    """How much of its speed the work asks for, 0 to 1."""
    power_watts: float = 0.0
    """Of this cell: instant power."""
    energy_joules: float = 0.0
    gpu_celsius: float = 0.0
    memory_celsius: float = 0.0
    margin_celsius: float = 0.0
    throttle: float = 1.0
    """Share of the clock that heat leaves."""
    clock: float = 1.0
    """Share of the clock that heat, brake and limit leave."""
    sm_mhz: int = 0
    reasons: int = 0
    """Clocks event reasons, NVML's bits."""
    sw_power_cap_seconds: float = 0.0
    sw_thermal_seconds: float = 0.0
    hw_thermal_seconds: float = 0.0
    power_brake_seconds: float = 0.0
    nvlink_bytes_per_second: float = 0.0
    pcie_bytes_per_second: float = 0.0
    limit_watts: float = 0.0
    recent_watts: tuple[float, ...] = ()
    """Of the last second's cells."""

    @property
    def average_watts(self) -> float:
        """Mean of the last second."""
        return sum(self.recent_watts) / len(self.recent_watts) if self.recent_watts else self.power_watts


COUNTERS = (
    "energy_joules", "sw_power_cap_seconds", "sw_thermal_seconds", "hw_thermal_seconds", "power_brake_seconds",
)  # fmt: skip
"""What only grows."""


class NodeState(msgspec.Struct, frozen=True):
    """The node at one time."""

    seconds: float
    load: float
    """Of the engine, 0 to 1; 0 when it is gone."""
    work_seconds: dict[float, float]
    """Integral of the load by the share of its clock at which the slowest GPU of the engine then worked."""
    gpus: tuple[GpuState, ...]


def load(seconds: float) -> float:
    """Return how busy the users keep the engine, 0 to 1."""
    return 0.75 + 0.15 * math.sin(math.tau * seconds / PERIOD_SECONDS) + 0.05 * math.sin(math.tau * seconds / 12)


def _jitter(gpu: int, cell: int) -> float:
    """Return the instant power's noise: a few per cent, as in the captures; the same for the same cell."""
    mixed = (cell % PERIOD_CELLS * 2654435761 + gpu * 40503 + 12345) & 0xFFFFFFFF
    mixed ^= mixed >> 15
    return 1 + ((mixed * 2246822519 & 0xFFFFFFFF) / 0xFFFFFFFF - 0.5) * 0.07


class Physics:
    """The drill's physics, stepped forward as it is asked; going back starts it anew."""

    def __init__(self, drill: Drill) -> None:
        self.drill = drill
        self.node = drill.node
        self.engine = drill.engine
        self._engine_ends = drill.engine_ends_seconds
        self._edges = sorted(
            edge
            for fault in drill.faults
            for edge in (fault.start_seconds, fault.end_seconds, self._engine_ends, self.engine.started_seconds)
            if edge is not None and math.isfinite(edge)
        )
        self._reset()

    def _reset(self) -> None:
        self._cell = -COARSE_CELLS
        self._work: dict[float, float] = {}
        self._wanted = 0.0
        product = self.node.product
        self._gpus = [GpuState(limit_watts=product.limit_watts) for _ in self.node.gpus]
        for index, gpu in enumerate(self._gpus):
            watts = _power_watts(product, self._activity(index, [], BEGIN_SECONDS), load(BEGIN_SECONDS), 1.0)
            gpu.gpu_celsius = product.base_celsius + watts * product.celsius_per_watt
            gpu.memory_celsius = _memory_celsius(product, watts)
            gpu.energy_joules = 1e8 + index * 1e6
        self._step(0.0, self._cell)

    def at(self, seconds: float) -> NodeState:
        """Return the node at this time of the drill; the state is good until the next call."""
        cell = math.floor(seconds * CELLS_A_SECOND) if seconds >= 0 else max(math.floor(seconds), -COARSE_CELLS)
        if cell < self._cell:
            self._reset()
        while self._cell < cell:
            if self._cell >= 0 and self._cell % PERIOD_CELLS == 0 and cell - self._cell >= 2 * PERIOD_CELLS:
                self._leap(cell)
            coarse = self._cell < 0
            self._cell += 1
            self._step(1.0 if coarse else CELL_SECONDS, self._cell)
        return NodeState(seconds, self._load(seconds), dict(self._work), tuple(self._gpus))

    def _load(self, seconds: float) -> float:
        if not self.engine.started_seconds <= seconds < self._engine_ends or self.drill.active("idle", seconds):
            return 0.0
        halted = self.drill.halted_since(seconds)
        return load(seconds if halted is None else halted)

    def _leap(self, cell: int) -> None:
        """Jump over as many whole minutes as are alike: no fault begins or ends in them, and the heat has settled."""
        here = self._cell / CELLS_A_SECOND
        next_edge = next((edge for edge in self._edges if edge > here), math.inf)
        before = [msgspec.structs.asdict(gpu) for gpu in self._gpus]
        work = dict(self._work)
        last = min(cell, math.floor(next_edge * CELLS_A_SECOND) if math.isfinite(next_edge) else cell)
        if last - self._cell < 2 * PERIOD_CELLS:
            return
        for _ in range(PERIOD_CELLS):
            self._cell += 1
            self._step(CELL_SECONDS, self._cell)
        if any(
            abs(gpu.gpu_celsius - old["gpu_celsius"]) > SETTLED_CELSIUS
            or abs(gpu.memory_celsius - old["memory_celsius"]) > SETTLED_CELSIUS
            or gpu.throttle != old["throttle"]
            for gpu, old in zip(self._gpus, before, strict=True)
        ):
            return
        periods = (last - self._cell) // PERIOD_CELLS
        self._cell += periods * PERIOD_CELLS
        for clock, done in self._work.items():
            self._work[clock] = done + periods * (done - work.get(clock, 0.0))
        for gpu, old in zip(self._gpus, before, strict=True):
            for name in COUNTERS:
                setattr(gpu, name, getattr(gpu, name) + periods * (getattr(gpu, name) - old[name]))

    def _step(self, cell_seconds: float, cell: int) -> None:
        """Let the cell before pass, and say what the new one is like."""
        seconds = _seconds(cell)
        product = self.node.product
        active = [fault for fault in self.drill.faults if fault.active(seconds)]
        self._wanted = self._load(seconds)
        if self.drill.halted_since(seconds) is None:
            clock = round(min(self._gpus[index].clock for index in self.engine.gpus), 2)
            self._work[clock] = self._work.get(clock, 0.0) + self._wanted * cell_seconds
        gpu_decay = math.exp(-cell_seconds / GPU_TAU_SECONDS)
        memory_decay = math.exp(-cell_seconds / MEMORY_TAU_SECONDS)
        for index, gpu in enumerate(self._gpus):
            mine = [
                fault
                for fault in active
                if fault.hits(index) or (KINDS[fault.name].spares_gpu and self.drill.meets_engine(fault))
            ]
            resistance = product.celsius_per_watt
            for fault in mine:
                if fault.name == "overheating":
                    resistance *= fault.number("factor")
            self._pass(gpu, cell_seconds, resistance, gpu_decay, memory_decay)
            self._judge(gpu, index, mine, cell)

    def _pass(
        self, gpu: GpuState, cell_seconds: float, resistance: float, gpu_decay: float, memory_decay: float
    ) -> None:
        product = self.node.product
        watts = gpu.power_watts
        settles = product.base_celsius + watts * resistance
        gpu.energy_joules += watts * cell_seconds
        gpu.gpu_celsius = settles + (gpu.gpu_celsius - settles) * gpu_decay
        memory_settles = _memory_celsius(product, watts) + watts * (resistance - product.celsius_per_watt)
        gpu.memory_celsius = memory_settles + (gpu.memory_celsius - memory_settles) * memory_decay
        gpu.sw_power_cap_seconds += cell_seconds if gpu.reasons & SW_POWER_CAP else 0.0
        gpu.sw_thermal_seconds += cell_seconds if gpu.reasons & SW_THERMAL else 0.0
        gpu.hw_thermal_seconds += cell_seconds if gpu.reasons & HW_THERMAL else 0.0
        gpu.power_brake_seconds += cell_seconds if gpu.reasons & POWER_BRAKE else 0.0
        if gpu.activity != "lost":
            margin = _margin_celsius(product, gpu.gpu_celsius)
            # A governor that looks once a second: five per cent slower while too hot, faster again when it is cool.
            rate = -0.05 if margin < 0 else 0.02 if margin > 2 else 0.0
            gpu.throttle = min(1.0, max(THROTTLE_FLOOR, gpu.throttle + rate * cell_seconds))
            gpu.margin_celsius = margin

    def _judge(self, gpu: GpuState, index: int, mine: list[Fault], cell: int) -> None:
        product = self.node.product
        seconds = _seconds(cell)
        gpu.activity = self._activity(index, mine, seconds)
        gpu.load = self._wanted if gpu.activity == "working" else 1.0 if gpu.activity in {"spinning", "hung"} else 0.0
        gpu.limit_watts = product.limit_watts
        clock = gpu.throttle
        reasons = IDLE if gpu.activity == "idle" else 0
        transient = None
        for fault in mine:
            if fault.name == "power-cap":
                gpu.limit_watts = min(gpu.limit_watts, fault.number("watts"))
            elif fault.name == "power-brake":
                clock = min(clock, 0.5)
                reasons |= POWER_BRAKE | HW_SLOWDOWN
            elif fault.name == "power-transient":
                transient = fault
        busy = gpu.activity in {"working", "spinning", "hung"}
        if gpu.throttle < 1.0 and busy:
            reasons |= SW_THERMAL
            if gpu.margin_celsius < (product.margin_thresholds or (0, -2))[1]:
                reasons |= HW_THERMAL | HW_SLOWDOWN
        watts = _power_watts(product, gpu.activity, gpu.load, clock) * _jitter(index, cell)
        if transient is not None and gpu.activity == "working":
            # At once: a fifth of the time far above the limit, then waiting for each other.
            period = round(transient.number("period") * CELLS_A_SECOND)
            high = cell % period < max(1, round(period * 0.2))
            peak = transient.number("peak")
            watts = gpu.limit_watts * ((0.2 * peak + 0.8 * 0.4) if cell < 0 else peak if high else 0.4)
        elif watts > gpu.limit_watts:
            reasons |= SW_POWER_CAP
            clock = min(clock, clock * gpu.limit_watts / watts)
            watts = gpu.limit_watts
        gpu.reasons = reasons
        gpu.clock = clock
        gpu.power_watts = watts
        gpu.recent_watts = (*gpu.recent_watts[-9:], watts)
        gpu.sm_mhz = (
            round(product.sm_clock_mhz * clock) if busy else product.sm_clock_idle_mhz if gpu.activity == "idle" else 0
        )
        linked = (
            self.node.wiring not in {"none", "unbridged"} and gpu.activity == "working" and len(self.engine.gpus) > 1
        )
        # guess: two all-reduces a layer at a few thousand tokens a second move some tens of GB/s.
        gpu.nvlink_bytes_per_second = 40e9 * gpu.load if linked else 0.0
        gpu.pcie_bytes_per_second = (2e9 if linked else 12e9) * gpu.load if gpu.activity == "working" else 0.0

    def _activity(self, index: int, mine: list[Fault], seconds: float) -> str:
        if any(fault.name in {"gpu-lost", "gpu-removed"} and fault.hits(index) for fault in mine):
            return "lost"
        if index not in self.engine.gpus or seconds >= self._engine_ends or seconds < self.engine.started_seconds:
            return "idle"
        for fault in mine:
            kind = KINDS[fault.name]
            if kind.activity:
                return "idle" if kind.spares_gpu and fault.params.get("gpu") == index else kind.activity
        return "working"


def _seconds(cell: int) -> float:
    return cell / CELLS_A_SECOND if cell >= 0 else float(cell)


def _power_watts(product: Product, activity: str, share: float, clock: float) -> float:
    if activity == "lost":
        return 0.0
    if activity == "idle":
        return product.idle_watts
    span = product.busy_watts - product.idle_watts
    # Dynamic power goes with clock times voltage squared; between half and full clock that is about its square.
    share = {"spinning": SPINNING_POWER, "hung": HUNG_POWER}.get(activity, share)
    return product.idle_watts + span * share * clock * clock


def _memory_celsius(product: Product, watts: float) -> float:
    return product.base_celsius + 8 + watts * (product.memory_celsius_per_watt or 0.0)


def _margin_celsius(product: Product, celsius: float) -> float:
    if product.margin is not None:
        offset, slope = product.margin
        return offset + slope * celsius
    assert product.thresholds_celsius is not None
    return product.thresholds_celsius[2] - celsius
