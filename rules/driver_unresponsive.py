"""The NVIDIA driver does not answer: every program that asks it hangs."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, NvidiaMessage, Snapshot, Source, Why, known
from doctor.symptoms.xids import of_this_boot, xid_events

GSP_XIDS = (119, 120)
"""The GPU's system processor failed: NVML blocks in the kernel after it (open-gpu-kernel-modules#446: 45 s a call)."""


class Limits(msgspec.Struct, frozen=True):
    """How long silence is patience."""

    blocked_seconds: float = 5.0
    """A warm NVML answers in milliseconds; a healthy first start with persistence mode took 2 s (aks-gpu#105)."""
    first_start_seconds: float = 60.0
    """Without persistence mode a first client waits for every GPU: 30 s on eight (aks-gpu#105), 25 s on one A100
    (AgentBaker#2829); twice that."""


@rule(
    "driver-unresponsive",
    "The NVIDIA driver does not answer",
    severity=Severity.CRITICAL,
    needs=(Source.NVML,),
    explains=("engine-stalled", "nccl-timeout", "engine-crashed", "worker-killed", "launch-refused"),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding]:
    """Judge NVML's silence; on a node where nothing has used the driver yet, a slow first start is no fault."""
    latest = history.latest
    blocked = latest.nvml_blocked_seconds
    why = latest.why_unseen(Source.NVML)
    timed_out = why is not None and why.why is Why.TIMED_OUT
    if not blocked or (blocked < limits.blocked_seconds and not timed_out):
        return  # it was not the driver that kept the visit waiting, but want of a processor
    if _is_without_driver(latest):
        return  # the child that would ask is slow to come up on a busy node: there is nobody to be silent
    since = _silent_since(history)
    silent = latest.at - since
    evidence = [Evidence(Source.NVML.value, "first call of the visit", f"no answer for {silent:.0f} s")]
    evidence += _kernel(history)
    tasks = latest.host.blocked_tasks if known(latest.host.blocked_tasks) else ()
    evidence += [Evidence(Source.HOST.value, f"/proc/{t.pid}/stat", f"{t.name} is in state D") for t in tasks]
    waking = _may_be_waking(history) and len(evidence) - len(tasks) == 1 and silent < limits.first_start_seconds
    more = f" and {len(tasks) - 1} more hang" if len(tasks) > 1 else " hangs"
    stuck = f"; {tasks[0].name} (pid {tasks[0].pid}){more} in the kernel with it" if tasks else ""
    doubt = (
        "; nothing has used the driver yet, and without persistence mode its first start takes up to 30 s: ask again"
    )
    yield Finding(
        summary=f"NVML has not answered for {silent:.0f} s{doubt if waking else stuck}",
        evidence=tuple(evidence),
        confidence=Confidence.LOW if waking else Confidence.HIGH if len(evidence) > 1 else Confidence.MEDIUM,
        severity=Severity.NOTICE if waking else None,
        subject=Subject(pids=tuple(t.pid for t in tasks)),
        since=since,
        facts={"seconds": f"{silent:.0f}"} | ({"pid": str(tasks[0].pid)} if tasks else {}),
    )


def _is_without_driver(snapshot: Snapshot) -> bool:
    """Whether no NVIDIA driver is loaded."""
    module = snapshot.host.driver_module
    return isinstance(module, Absent) and module.why is Why.NOT_PRESENT


def _silent_since(history: History) -> float:
    """Return when NVML began to be silent: as long ago as the visit waited, or as the visits without it go back."""
    since = history.now
    for snapshot in reversed(history.snapshots):
        if Source.NVML in snapshot.seen or not snapshot.nvml_blocked_seconds:
            break
        since = snapshot.at
    return min(since, history.now - history.latest.nvml_blocked_seconds)


def _may_be_waking(history: History) -> bool:
    """Whether this may be the driver's first start: no engine keeps it awake, and NVML never answered before.

    Or the driver was unloaded, or its GPUs let go of, right before.
    """
    for snapshot in reversed(history.snapshots):
        why = snapshot.why_unseen(Source.NVML)
        if why is None or snapshot.engines:
            return False
        if why.why in (Why.NOT_ASKED, Why.NOT_PRESENT):
            break
    return True


def _kernel(history: History) -> list[Evidence]:
    lines = [e.first for e in xid_events(history) if e.code in GSP_XIDS]
    lines += [e for e in of_this_boot(history) if isinstance(e, NvidiaMessage) and e.kind == "gsp-timeout"]
    return [Evidence(Source.KERNEL_LOG.value, line.where, line.text) for line in lines[:3]]
