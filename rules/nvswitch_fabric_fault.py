"""The NVSwitch fabric is not in order: its manager, its registration, its firmware or its multicast."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, EngineEvent, Gpu, Snapshot, Source, Sxid, Why, known
from doctor.symptoms.engine_log import engine_logs, incidents
from doctor.symptoms.names import names_of
from doctor.symptoms.switches import has_switches, standing_messages
from doctor.symptoms.xids import sxids
from rules.tables.products import product_of
from rules.tables.sxids import SXIDS, is_fatal


class Limits(msgspec.Struct, frozen=True):
    """How long the fabric may take."""

    grace_seconds: float = 300.0
    """After boot, or once a driver is loaded again, the fabric manager configures the switches and the GPUs register;
    guess: five minutes."""


class Trouble(msgspec.Struct, frozen=True):
    """One thing that is wrong with the fabric."""

    text: str
    """For the summary."""
    evidence: Evidence
    confidence: Confidence = Confidence.HIGH
    severity: Severity = Severity.CRITICAL
    at: float | None = None
    engine: str = ""


@rule(
    "nvswitch-fabric-fault",
    "The NVSwitch fabric or its manager is at fault",
    severity=Severity.CRITICAL,
    needs=(Source.NVML,),
    explains=(
        "pcie-fallback",
        "nvlink-degraded",
        "nvlink-errors",
        "nccl-timeout",
        "engine-stalled",
        "engine-crashed",
        "application-fault",
        "launch-refused",
        "throughput-below-reference",
    ),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Collect what the manager, the GPUs, the switches and the engine say, worst first, into one finding.

    "Completed" is sticky (a manager dead for five days, every GPU still completed), so it clears nobody; a health
    mask that reports nothing accuses nobody.
    """
    switches = has_switches(history)
    troubles = [*_switch_errors(history), *_engine(history, switches)]
    if switches:
        troubles += [*_manager(history, limits), *_registration(history, limits)]
    elif switches is None:
        troubles += [*_manager_of_some_board(history), *_registration(history, limits)]
    elif _switches_may_be_hidden(history.latest):
        troubles += _registration(history, limits)
    if troubles:
        yield _finding(troubles)
    elif switches and history.latest.why_unseen(Source.FABRIC_MANAGER) is not None:
        yield Absent(Why.NOT_ASKED, "this board has NVSwitches, and its fabric manager was not seen")
    elif switches is None and history.latest.fabric_manager.running is False and _may_need_manager(history.latest):
        yield Absent(Why.NOT_KNOWN, "the fabric manager does not run; whether this board needs it was not seen")


def _may_need_manager(snapshot: Snapshot) -> bool:
    """Whether these GPUs may be linked through NVSwitches: boards that we don't know may."""
    if not snapshot.gpus:  # somebody installed a manager
        return known(snapshot.fabric_manager.unit_state)
    gpus = [gpu for gpu in snapshot.gpus if not (known(gpu.name) and _OF_WORKSTATIONS.search(gpu.name))]
    return any((product := product_of(gpu)) is None or product.has_board_nvlink for gpu in gpus)


_OF_WORKSTATIONS = re.compile(r"\b(?:GeForce|Quadro|RTX|TITAN)\b")
"""NVSwitches are on boards of SXM modules only."""


def _switches_may_be_hidden(snapshot: Snapshot) -> bool:
    """Whether the switches may stand outside this virtual machine or container: then only the registration tells."""
    return any((p := product_of(gpu)) is not None and p.fabric == "completed" for gpu in snapshot.gpus) and not any(
        link.remote == "gpu" for gpu in snapshot.gpus if known(gpu.links) for link in gpu.links
    )


def _manager(history: History, limits: Limits) -> Iterator[Trouble]:
    manager, driver = history.latest.fabric_manager, history.latest.stack.driver
    unit = manager.unit_state
    mismatch = known(manager.version) and known(driver) and manager.version != driver
    if mismatch:
        text = f"fabric manager {manager.version}, driver {driver}"
        running = manager.running is True
        yield Trouble(
            f"the fabric manager is version {manager.version} and the driver {driver}: they must be equal"
            + ("; it will not come up again after a restart" if running else ""),
            Evidence(Source.FABRIC_MANAGER.value, "version", text),
            severity=Severity.WARNING if running else Severity.CRITICAL,
        )
    if manager.running is False and not _just_started(history, limits):
        state = f"its unit is {unit}" if known(unit) else "it has no unit" if unit.why is Why.NOT_PRESENT else str(unit)
        proof = Evidence(Source.FABRIC_MANAGER.value, "nvidia-fabricmanager.service", f"no process; {state}")
        yield Trouble("the fabric manager is not running", proof)
    elif unit == "failed":
        proof = Evidence(Source.FABRIC_MANAGER.value, "nvidia-fabricmanager.service", "ActiveState=failed")
        yield Trouble("the fabric manager has failed", proof)
    for message in standing_messages(history):
        if message.kind in ("fatal", "version-mismatch", "link-failure"):
            proof = Evidence(Source.FABRIC_MANAGER.value, message.where, message.text)
            yield Trouble(f"its manager reports: {message.text}", proof, at=message.at)


def _manager_of_some_board(history: History) -> Iterator[Trouble]:
    """Yield a manager that does not run where nothing tells whether this board needs one; "nothing to do" says that it does not."""
    manager = history.latest.fabric_manager
    gpus = history.latest.gpus
    # A virtual machine with one GPU of a board: the manager runs outside it.
    linked = [gpu for gpu in gpus if (product := product_of(gpu)) is not None and product.has_board_nvlink]
    if len(linked) > 1 and manager.running is False and manager.unit_state != "failed":
        state = f"its unit is {manager.unit_state}" if known(manager.unit_state) else "there is no such unit"
        yield Trouble(
            "the fabric manager does not run, and a board of these GPUs with NVSwitches (HGX, DGX) needs it",
            Evidence(Source.FABRIC_MANAGER.value, "nvidia-fabricmanager.service", f"no process; {state}"),
            Confidence.LOW,
            Severity.WARNING,
        )
    needed = len(gpus) != 1 and _may_need_manager(history.latest)
    if manager.unit_state == "failed" and needed and all(m.kind != "nothing-to-do" for m in standing_messages(history)):
        yield Trouble(
            "the fabric manager has failed; whether this board has NVSwitches, and so needs it, was not seen",
            Evidence(Source.FABRIC_MANAGER.value, "nvidia-fabricmanager.service", "ActiveState=failed"),
            Confidence.LOW,
            Severity.WARNING,
        )
    for message in standing_messages(history):
        if message.kind == "version-mismatch":  # it found the driver and refused to start
            proof = Evidence(Source.FABRIC_MANAGER.value, message.where, message.text)
            yield Trouble(
                f"its manager reports: {message.text}", proof, Confidence.MEDIUM, Severity.WARNING, at=message.at
            )


def _just_started(history: History, limits: Limits) -> bool:
    """Whether the node has just booted, or there was no driver until just now: without one nothing of this can run."""
    booted_at = history.latest.node.booted_at
    booted = known(booted_at) and history.now - booted_at < limits.grace_seconds
    return booted or any(_has_no_driver(visit) for visit in history.window(limits.grace_seconds))


def _has_no_driver(snapshot: Snapshot) -> bool:
    module = snapshot.host.driver_module
    return isinstance(module, Absent) and module.why is Why.NOT_PRESENT


def _registration(history: History, limits: Limits) -> Iterator[Trouble]:
    latest = history.latest
    sick = {gpu.uuid: ill for gpu in latest.gpus if (ill := _ill(gpu, waits=not _just_started(history, limits)))}
    if not sick:
        return
    where, text = next(iter(sick.values()))
    first = latest.gpu(next(iter(sick)))
    yield Trouble(
        f"{names_of(latest, sick)}: {text}",
        Evidence(Source.NVML.value, f"GPU {first.index if first else '?'}: {where}", text),
        severity=Severity.WARNING if "limited" in text else Severity.CRITICAL,
    )


def _ill(gpu: Gpu, *, waits: bool) -> tuple[str, str] | None:
    """Return where and what is wrong with a GPU's registration, or None."""
    fabric = gpu.fabric
    if fabric.state == "completed":
        if known(fabric.status) and fabric.status.lower() not in ("success", "n/a"):
            return "fabric status", f"registered with the fabric, with status {fabric.status}"
        if fabric.health in ("unhealthy", "limited") or fabric.unhealthy:
            what = ", ".join(fabric.unhealthy) or "no detail"
            return "fabric health", f"fabric health is {fabric.health if known(fabric.health) else 'bad'} ({what})"
    elif fabric.state in ("in-progress", "not-started") and waits:
        return "fabric state", f"registration with the fabric is {fabric.state}, not completed"
    return None


def _switch_errors(history: History) -> Iterator[Trouble]:
    fatal = [s for s in sxids(history) if is_fatal(s)]
    for code in dict.fromkeys(s.code for s in fatal):
        lines = [s for s in fatal if s.code == code]
        first = lines[0]
        name = SXIDS[code].symbol if code in SXIDS else "a code without a row in our table"
        times = f", {len(lines)} times" if len(lines) > 1 else ""
        link = f" on link {first.link}" if first.link is not None else ""
        yield Trouble(
            f"the switch at {first.switch} reports a fatal SXid {code}{link} ({name}){times}",
            Evidence(Source.KERNEL_LOG.value, first.where, first.text),
            confidence=_weight(first),
            at=first.at,
        )


def _weight(sxid: Sxid) -> Confidence:
    row = SXIDS.get(sxid.code)
    return Confidence.MEDIUM if row is not None and row.weight == "may-be-fatal" else Confidence.HIGH


def _engine(history: History, switches: bool | None) -> Iterator[Trouble]:
    for log, incident in incidents(history):
        for event in incident.having("cuda-error", kinds=("system-not-initialized",))[:1]:
            yield Trouble(
                "CUDA can't start (802, system not yet initialized): the driver waits for the fabric",
                Evidence(Source.ENGINE_LOG.value, event.where, event.text),
                Confidence.MEDIUM,
                at=incident.at,
                engine=log.engine,
            )
    for log in engine_logs(history):
        failed = [
            event for event in log.having("nccl-nvls-failed") if _is_binding(event) or "out of memory" not in event.text
        ]
        missing = log.having("symm-mem-no-multicast", "multicast-unsupported") if switches else ()
        for event in failed[:1]:
            why = (
                "the switches have no multicast slot left (128 on Hopper's): too many communicators"
                if "out of memory" in event.text
                else "manager, switches or IMEX are not in order"
            )
            yield Trouble(
                f"NCCL can't bind NVLink SHARP multicast memory: {why}",
                Evidence(Source.ENGINE_LOG.value, event.where, event.text),
                Confidence.MEDIUM,
                at=event.at,
                engine=log.engine,
            )
        for event in missing[:1]:
            yield Trouble(
                "the engine finds no multicast on a board with NVSwitches",
                Evidence(Source.ENGINE_LOG.value, event.where, event.text),
                Confidence.LOW,
                Severity.WARNING,
                event.at,
                log.engine,
            )


def _is_binding(event: EngineEvent) -> bool:
    """Whether NCCL's own sentence about multicast memory stands there: its "out of memory" is not the GPU's.

    The NVSwitches of eight H200 had 128 multicast slots, and a 129th communicator met this error (NVIDIA/nccl issue 2077).
    """
    return "Multicast memory" in event.text


def _finding(troubles: list[Trouble]) -> Finding:
    worst = sorted(troubles, key=lambda t: (-t.severity, -t.confidence))
    engines = {t.engine for t in troubles}
    texts = list(dict.fromkeys(t.text for t in worst))
    more = f" (and {len(texts) - 2} further signs)" if len(texts) > 2 else ""
    return Finding(
        summary="; ".join(texts[:2]) + more,
        evidence=tuple(t.evidence for t in worst),
        confidence=max(t.confidence for t in worst) if len(worst) == 1 else Confidence.HIGH,
        severity=worst[0].severity,
        subject=Subject(engine=engines.pop() if len(engines) == 1 else ""),
        since=min((t.at for t in troubles if t.at is not None), default=None),
        facts={"unit": "nvidia-fabricmanager"},
    )
