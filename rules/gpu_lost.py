"""A GPU fell off the bus, or the node shows fewer GPUs than it has."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, facts_of_gpu, rule
from doctor.snapshot import Absent, Gpu, Maybe, NvidiaMessage, Source, Why, Xid, known
from doctor.symptoms.engine_groups import engine_of_gpu
from doctor.symptoms.engine_log import incidents
from doctor.symptoms.xids import answered_since, of_this_boot, xid_events
from rules.tables.xids import codes_of

XIDS = codes_of("gpu-lost")


class Limits(msgspec.Struct, frozen=True):
    """What counts as lost."""

    expected_gpus: int = 0
    """How many GPUs the node should have; 0: as many as its PCI tree and its driver show."""
    recovered_seconds: float = 900.0
    """A GPU that came back is still told of this long, as a warning. guess: the shift that reset it has seen it by then."""


class Loss(msgspec.Struct, frozen=True):
    """One piece of proof that the GPU at an address is gone."""

    pci_address: str
    words: str
    evidence: Evidence
    at: float | None
    confidence: Confidence
    over: bool = False
    """NVML has read the GPU since: it came back, or was reset."""
    unneeded: bool = False
    """Nobody used it, and it left the PCI tree as well: somebody may have taken it out on purpose."""


@rule(
    "gpu-lost",
    "A GPU has fallen off the bus or is missing",
    severity=Severity.CRITICAL,
    needs=(Source.NVML, Source.KERNEL_LOG),
    explains=(
        "nccl-timeout",
        "application-fault",
        "engine-stalled",
        "engine-crashed",
        "worker-killed",
        "driver-unresponsive",
        "gpu-hung",
        "nvlink-degraded",
        "nvlink-errors",
        "nvswitch-fabric-fault",
        "pcie-fallback",
        "recovery-pending",
        "tp-exceeds-visible-gpus",
        "launch-refused",
    ),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    """Join the kernel's word, NVML's, and the GPUs that the PCI tree and the driver show but NVML does not."""
    losses = (*_kernel(history, limits), *_nvml(history), *_missing(history))
    gone = dict.fromkeys(loss.pci_address for loss in losses)
    for pci_address in gone:
        yield _finding(history, tuple(loss for loss in losses if loss.pci_address == pci_address))
    if gone:
        return
    yield from _not_started(history)
    yield from _not_probed(history)
    yield from _none_found(history)
    yield from _too_few(history, limits.expected_gpus)
    yield from _gap_on_board(history)
    yield from _engine_says_so(history)


def _kernel(history: History, limits: Limits) -> Iterator[Loss]:
    said = [(e.pci_address, f"the kernel logged Xid {e.code}", e.first) for e in xid_events(history) if e.code in XIDS]
    said += [
        (message.pci_address, "the driver says that it is lost", message)
        for message in of_this_boot(history)
        if isinstance(message, NvidiaMessage) and message.kind == "gpu-lost" and message.pci_address
    ]
    kernel = [e for e in of_this_boot(history) if isinstance(e, NvidiaMessage)]
    if all(message.kind != "api-mismatch" for message in kernel):  # a module without its firmware can't start any
        read = {gpu.pci_address for gpu in history.latest.gpus}
        said += [
            (message.pci_address, "the driver could not start it", message)
            for message in kernel
            if message.kind == "init-failed" and message.pci_address and message.pci_address not in read
        ]
    for pci_address, words, line in said:
        over = answered_since(history, pci_address, line.at)
        if not over or history.now - (line.at or history.now) <= limits.recovered_seconds:
            proof = Evidence(Source.KERNEL_LOG.value, line.where, line.text)
            yield Loss(pci_address, words, proof, line.at, Confidence.HIGH, over)


def _nvml(history: History) -> Iterator[Loss]:
    for gpu in history.latest.gpus:
        if gpu.lost is True:
            since = next((at for at, past in history.of_gpu(gpu.uuid) if past.lost is True), None)
            proof = Evidence(Source.NVML.value, f"GPU {gpu.index}", "NVML answers GPU_IS_LOST")
            address = gpu.pci_address if known(gpu.pci_address) else gpu.uuid
            yield Loss(address, "NVML answers GPU_IS_LOST", proof, since, Confidence.HIGH)
        elif isinstance(gpu.lost, Absent) and gpu.lost.why is Why.FAILED:
            words = f"nvidia-smi can't read it ({gpu.lost.detail.strip()})" if gpu.lost.detail else "NVML can't read it"
            address = gpu.pci_address if known(gpu.pci_address) else gpu.uuid
            yield Loss(address, words, Evidence(Source.NVML.value, f"GPU {gpu.index}", words), None, Confidence.MEDIUM)


def _missing(history: History) -> Iterator[Loss]:
    """GPUs that the driver holds, the PCI tree shows, or NVML listed before, and that NVML does not list now.

    In a container the PCI tree shows the whole node and the driver's list only what was given: the list decides.
    """
    latest = history.latest
    listed = {gpu.pci_address for gpu in latest.gpus if known(gpu.pci_address)}
    if Source.NVML not in latest.seen or len(listed) < len(latest.gpus):
        return
    devices = latest.host.pci_devices if known(latest.host.pci_devices) else ()
    drivers = {d.address: d.driver for d in devices if d.kind == "gpu"}
    held = latest.host.driver_gpus
    for gpu in held if known(held) else ():
        if (
            gpu.pci_address not in listed
            and gpu.excluded is not True
            and _is_ours(drivers.get(gpu.pci_address, "nvidia"))
        ):
            where = f"/proc/driver/nvidia/gpus/{gpu.pci_address}"
            text = f"the driver holds this GPU, NVML lists {len(latest.gpus)} others and not it"
            yield Loss(gpu.pci_address, text, Evidence(Source.HOST.value, where, text), None, Confidence.HIGH)
    pasted = not known(held) and len(listed) > 1  # of one GPU alone somebody may have pasted that one only
    for address, driver in drivers.items() if listed else ():
        unbound = isinstance(driver, Absent) and driver.why is Why.NOT_PRESENT
        if address not in listed and (unbound or (pasted and _is_ours(driver))):
            bound = "no driver is bound to it" if unbound else "NVML does not list it"
            text = f"the PCI tree shows this GPU, and {bound}"
            yield Loss(address, text, Evidence(Source.HOST.value, address, text), None, Confidence.MEDIUM)
    for address, at in _listed_before(history).items():
        if address not in listed and _is_ours(drivers.get(address, "nvidia")):
            text = f"NVML listed this GPU {latest.at - at:.0f} s ago and does not any more"
            unneeded = known(latest.host.pci_devices) and address not in drivers and not _was_used(history, address, at)
            proof = Evidence(Source.NVML.value, address, text)
            if unneeded:
                text += "; nobody used it, and the PCI tree has it no more: it may have been taken out on purpose"
            yield Loss(address, text, proof, at, Confidence.MEDIUM, unneeded=unneeded)


def _is_ours(driver: Maybe[str]) -> bool:
    """Whether a device is the NVIDIA driver's as far as is known; `vfio-pci` and its like were given it on purpose."""
    return not known(driver) or driver == "nvidia"


def _listed_before(history: History) -> dict[str, float]:
    """Return when each GPU was last listed, by its address."""
    return {gpu.pci_address: s.at for s in history.snapshots[:-1] for gpu in s.gpus if known(gpu.pci_address)}


def _was_used(history: History, pci_address: str, at: float) -> bool:
    """Whether a process or an engine had the GPU when it was last listed, as far as was seen."""
    last = next(s for s in reversed(history.snapshots) if s.at == at)
    gpu = next(gpu for gpu in last.gpus if gpu.pci_address == pci_address)
    ranks = {rank.gpu for engine in last.engines for rank in engine.ranks if known(rank.gpu)}
    return not known(gpu.processes) or bool(gpu.processes) or gpu.uuid in ranks


def _finding(history: History, losses: tuple[Loss, ...]) -> Finding:
    pci_address = losses[0].pci_address
    gpu = _gpu_at(history, pci_address)
    who = f"GPU {gpu.index} ({pci_address})" if gpu else f"the GPU at {pci_address}"
    uuid = gpu.uuid if gpu else ""
    engine = engine_of_gpu(history, uuid) if uuid else ""
    words = list(dict.fromkeys(loss.words for loss in losses))[:2]
    rank = next((r.title for s in history.snapshots for e in s.engines for r in e.ranks if uuid and r.gpu == uuid), "")
    over = all(loss.over for loss in losses)
    unneeded = all(loss.unneeded for loss in losses)
    state = "fell off the bus and answers again" if over else "is gone"
    return Finding(
        summary=f"{who} {state}: {' and '.join(words)}" + (f"; {rank} ran on it" if rank else ""),
        evidence=tuple(loss.evidence for loss in losses),
        confidence=max(loss.confidence for loss in losses),
        severity=Severity.WARNING if over else Severity.NOTICE if unneeded else None,
        subject=Subject(gpus=(uuid,) if uuid else (), engine=engine),
        since=min((loss.at for loss in losses if loss.at is not None), default=None),
        facts=dict(facts_of_gpu(gpu.index, pci_address, uuid)) if gpu else {"pci-address": pci_address},
    )


def _gpu_at(history: History, pci_address: str) -> Gpu | None:
    for snapshot in reversed(history.snapshots):
        for gpu in snapshot.gpus:
            if pci_address in (gpu.pci_address, gpu.uuid):
                return gpu
    return None


def _not_started(history: History) -> Iterator[Finding]:
    """Take the driver's word that it could not start a GPU where it does not say which (before 450), and none was read."""
    kernel = [e for e in of_this_boot(history) if isinstance(e, NvidiaMessage)]
    said = [e for e in kernel if e.kind == "init-failed" and not e.pci_address and _ADAPTER.search(e.text)]
    if said and not history.latest.gpus and all(e.kind != "api-mismatch" for e in kernel):
        yield Finding(
            summary="The driver could not start a GPU, and does not say which",
            evidence=(Evidence(Source.KERNEL_LOG.value, said[0].where, said[0].text),),
            confidence=Confidence.MEDIUM,
            since=said[0].at,
        )


_ADAPTER = re.compile(r"(?:RmInitAdapter|rm_init_adapter) failed")


def _not_probed(history: History) -> Iterator[Finding]:
    """Take the driver's word that other drivers hold the GPUs, as long as it has none itself."""
    latest = history.latest
    said = [
        e for e in of_this_boot(history) if isinstance(e, NvidiaMessage) and "probe routine was not called" in e.text
    ]
    if said and not latest.gpus and not any(isinstance(e, Xid) for e in of_this_boot(history)):
        yield Finding(
            summary="NVIDIA's driver was not given all GPUs: another one (nouveau, vfio-pci) holds them",
            evidence=(Evidence(Source.KERNEL_LOG.value, said[-1].where, said[-1].text),),
            confidence=Confidence.MEDIUM,
            severity=Severity.WARNING,  # a host that gives its GPUs to virtual machines does so on purpose
            since=said[-1].at,
        )


def _none_found(history: History) -> Iterator[Finding]:
    """Take nvidia-smi's word that the driver answers and has no GPU at all."""
    why = history.latest.why_unseen(Source.NVML)
    if why is not None and "No devices were found" in why.detail and not history.latest.gpus:
        yield Finding(
            summary="nvidia-smi finds no GPU although the driver answers: it could not start any, or none is left on the bus",
            evidence=(Evidence(Source.NVML.value, "nvidia-smi", why.detail),),
            confidence=Confidence.MEDIUM,
        )


def _too_few(history: History, expected: int) -> Iterator[Finding]:
    seen = len(history.latest.gpus)
    if Source.NVML in history.latest.seen and seen < expected:
        text = f"NVML lists {seen} GPUs, the configuration expects {expected}"
        yield Finding(
            summary=f"{text}: {expected - seen} are missing",
            evidence=(Evidence(Source.NVML.value, "nvmlDeviceGetCount", text),),
            confidence=Confidence.MEDIUM,
        )


def _gap_on_board(history: History) -> Iterator[Finding]:
    """Take the PCI tree's word where nothing was there to be missed: a board with NVSwitches has no place for seven GPUs.

    HGX boards carry 8 or 16, and what a guest is given of one is half of it, or half of that.
    """
    latest = history.latest
    devices = latest.host.pci_devices if known(latest.host.pci_devices) else ()
    gpus = sum(device.kind == "gpu" for device in devices)
    switches = sum(device.kind == "nvswitch" for device in devices)
    if switches and gpus == len(latest.gpus) and gpus & (gpus - 1):
        text = f"the PCI tree shows {gpus} GPUs beside {switches} NVSwitches"
        yield Finding(
            summary=f"A GPU is missing since before the first look: {text}, and such boards carry 4, 8 or 16",
            evidence=(Evidence(Source.HOST.value, "/sys/bus/pci/devices", text),),
            confidence=Confidence.MEDIUM,
            severity=Severity.WARNING,  # somebody may have taken it out, and told nobody
        )


def _engine_says_so(history: History) -> Iterator[Finding]:
    """NVML's "GPU is lost" in an engine's log; or its "unknown error" after CUDA's, which is how engines meet an Xid 79.

    One "unknown error" alone proves nothing: containers get it after `systemctl daemon-reload`
    (nvidia-container-toolkit#1227), when NVML itself does not start. Where it started and can't open one GPU, that one is gone.
    """
    kernel = (
        "has no Xid 79" if Source.KERNEL_LOG in history.latest.seen else "was not there to read: look for an Xid 79"
    )
    for log, incident in incidents(history):
        lost = incident.having("nvml-error", kinds=("gpu-lost",))
        unknown = incident.having("cuda-error", "nvml-error", kinds=("unknown",))
        both = {event.signal: event for event in reversed(unknown)}
        handle = tuple(
            e for e in unknown if "nvmlDeviceGetHandle" in f"{e.facts.get('code', '')} {e.facts.get('within', '')}"
        )
        proof = lost[:1] or (tuple(sorted(both.values(), key=incident.events.index)) if len(both) == 2 else handle[:1])
        if not proof:
            continue
        yield Finding(
            summary=f"the engine met a GPU that no longer answers ({proof[0].text}); the kernel log {kernel}",
            evidence=tuple(Evidence(Source.ENGINE_LOG.value, e.where, e.text) for e in proof),
            confidence=Confidence.MEDIUM if lost else Confidence.LOW,
            subject=Subject(engine=log.engine),
            since=incident.at,
        )
