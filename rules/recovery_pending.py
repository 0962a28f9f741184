"""The driver says that a GPU must be reset, or the node rebooted, before it is used again."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, facts_of_gpu, rule
from doctor.snapshot import Gpu, NvidiaMessage, Source, known
from doctor.symptoms.names import gpu_at, name_at
from doctor.symptoms.xids import of_this_boot, xid_events

WORDS = {
    "reset": "a reset of the GPU",
    "reboot": "a reboot of the node",
    "drain-p2p": "its peer traffic drained",
    "drain-and-reset": "to be drained and reset",
}
"""NVML's GPU recovery action (since driver 570), and the same word in Xid 154."""

REMEDIES = {
    "reset": "drain the GPU, then `nvidia-smi -r -i {index}`",
    "reboot": "drain the node and reboot it",
    "drain-p2p": "stop the engines whose ranks use this GPU together with others",
    "drain-and-reset": "drain the GPU, then `nvidia-smi -r -i {index}`",
}


@rule(
    "recovery-pending",
    "The driver asks for a reset or a reboot",
    severity=Severity.WARNING,
    needs=(Source.NVML,),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Take NVML's word; where NVML can't say, the last Xid 154 of the GPU, or the driver's refusals. A reboot or "none" since then ends it."""
    asked: dict[str, tuple[str, Evidence, float | None]] = {}
    for event in xid_events(history):
        if event.code == 154 and event.first.recovery_action is not None:
            proof = Evidence(Source.KERNEL_LOG.value, event.first.where, event.first.text)
            asked[event.pci_address] = (event.first.recovery_action, proof, event.at)
    for gpu in history.latest.gpus:
        if known(gpu.recovery_action) and known(gpu.pci_address):
            proof = Evidence(Source.NVML.value, f"GPU {gpu.index}: recovery action", gpu.recovery_action)
            before = asked.get(gpu.pci_address)
            asked[gpu.pci_address] = (gpu.recovery_action, proof, before[2] if before else None)
    if not asked:
        yield from _refused(history)
    for pci_address, (action, proof, at) in asked.items():
        if action == "none":
            continue
        gpu = gpu_at(history.latest, pci_address)
        yield Finding(
            summary=f"{name_at(history.latest, pci_address)} needs {WORDS.get(action, action)}: the driver asks for it",
            evidence=(proof,),
            subject=Subject(gpus=(gpu.uuid,) if gpu else ()),
            since=at,
            facts=_facts(gpu, pci_address, action),
        )


def _refused(history: History) -> Iterator[Finding]:
    """Take the driver's refusals to work on a GPU before it is reset, where neither NVML nor an Xid 154 tells of any."""
    said = [e for e in of_this_boot(history) if isinstance(e, NvidiaMessage) and e.kind == "reset-required"]
    if said:
        yield Finding(
            summary="The driver refuses work on a GPU until it is reset (NV_ERR_RESET_REQUIRED), and does not say on which",
            evidence=(Evidence(Source.KERNEL_LOG.value, said[-1].where, said[-1].text),),
            confidence=Confidence.MEDIUM,
            since=said[0].at,
        )


def _facts(gpu: Gpu | None, pci_address: str, action: str) -> dict[str, str]:
    facts = dict(facts_of_gpu(gpu.index, pci_address, gpu.uuid)) if gpu else {"pci-address": pci_address}
    remedy = REMEDIES.get(action, "").format(index=gpu.index if gpu else "<gpu-index>")
    return facts | ({"remedy": remedy} if remedy else {})
