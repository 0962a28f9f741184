"""Tensor-parallel ranks talk over PCIe although their board should have NVLink, or span GPUs that have none."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Absent, EngineEvent, GpuPair, Source, Why, known
from doctor.symptoms.engine_groups import RankGroup, rank_groups
from doctor.symptoms.engine_log import engine_logs
from doctor.symptoms.links import pairs_among, speaks_nvlink, way_between
from doctor.symptoms.names import listed, names_of
from rules.tables.products import product_of

OFF = frozenset({"custom-allreduce-off-pcie", "custom-allreduce-off-p2p"})
"""vLLM's own word that its ranks don't reach each other over NVLink: it asks NVML for every pair's P2P status."""
NO_MULTICAST = "multicast-unsupported"
"""Fatal in some releases: an all-reduce that needs NVSwitch multicast was chosen on GPUs that have none."""

CONSEQUENCES = ("throughput-below-reference", "allreduce-dominant", "ttft-slow", "tp-single-stream-stall")


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A rank group, what its GPUs are, and what speaks against it."""

    engine: str
    size: int
    gpus: tuple[str, ...]
    board: bool | None
    """Whether the product has NVLink on its board; None: not known, or mixed."""
    pairs: tuple[GpuPair, ...]
    """Those that don't use NVLink."""
    lines: tuple[EngineEvent, ...]
    pairs_seen: bool


@rule(
    "pcie-fallback",
    "Tensor-parallel ranks talk over PCIe",
    severity=Severity.WARNING,
    needs=(Source.NVML,),
    explains=CONSEQUENCES,
    limits=NoLimits(),
)
def RULE(history: History, limits: NoLimits) -> Iterator[Finding | Absent]:  # noqa: ARG001 - nothing to set
    """Judge each rank group: on a board with NVLink PCIe is a fault, on PCIe cards it is advice about the flags.

    A 4-GPU HGX board is a mesh of six links a pair, without a switch: healthy. One rank needs no link at all.
    """
    for case in _cases(history):
        if case.board and (case.pairs or any(e.signal in OFF for e in case.lines)):
            yield _fault(history, case)
        elif not case.board and (case.pairs or case.lines):
            yield _advice(history, case)
        elif case.board and not case.pairs_seen:
            yield Absent(Why.NOT_ASKED, "the ways between the engine's GPUs were not seen")


def _cases(history: History) -> Iterator[Case]:
    groups = rank_groups(history)
    for group in groups:
        if group.size > 1:
            yield _case(history, group)
    judged = {group.engine for group in groups if group.size > 1}
    for log in engine_logs(history):
        case = _case(history, RankGroup(engine=log.engine, size=0, gpus=(), exact=False))
        if log.engine not in judged and case.lines:
            yield case
    if not groups and not engine_logs(history):  # nothing tells what runs here: judge the board
        everyone = tuple(gpu.uuid for gpu in history.latest.gpus)
        case = _case(history, RankGroup(engine="", size=len(everyone), gpus=everyone, exact=False))
        if case.board and case.pairs:
            yield case


def _case(history: History, group: RankGroup) -> Case:
    latest = history.latest
    gpus = [gpu for gpu in latest.gpus if gpu.uuid in group.gpus or not group.gpus]
    products = [product_of(gpu) for gpu in gpus]
    boards = {p.has_board_nvlink if p else None for p in products}
    partitioned = any(gpu.mig.enabled is True for gpu in gpus)  # links read as down: mig-misconfigured says so
    pairs = () if partitioned else pairs_among(latest, group.gpus)
    return Case(
        engine=group.engine,
        size=group.size,
        gpus=group.gpus,
        board=boards.pop() if len(boards) == 1 else None,
        pairs=tuple(pair for pair in pairs if _goes_over_pcie(pair)),
        lines=() if partitioned else _lines(history, group),
        pairs_seen=partitioned or any(speaks_nvlink(pair) is not None for pair in pairs),
    )


def _goes_over_pcie(pair: GpuPair) -> bool:
    blocked = known(pair.p2p_read) and pair.p2p_read not in ("ok", "unknown")
    return speaks_nvlink(pair) is False or (blocked and speaks_nvlink(pair) is not None)


def _lines(history: History, group: RankGroup) -> tuple[EngineEvent, ...]:
    said = [e for log in engine_logs(history) if log.engine == group.engine for e in log.having(*OFF, NO_MULTICAST)]
    return tuple({event.signal: event for event in reversed(said)}.values())


def _fault(history: History, case: Case) -> Finding:
    latest = history.latest
    product = next((p.model for gpu in latest.gpus if (p := product_of(gpu)) is not None), "this board")
    if case.pairs:
        total = len(pairs_among(latest, case.gpus))
        ways = listed(dict.fromkeys(way_between(pair) for pair in case.pairs))
        reach = (
            "have no NVLink way between them" if any(not speaks_nvlink(p) for p in case.pairs) else "may not use theirs"
        )
        what = f"{len(case.pairs)} of {total} pairs of {names_of(latest, case.gpus)} {reach} ({ways})"
    else:
        what = "the engine found no NVLink between its GPUs when it started, and NVML shows it now: restart the engine"
    who = f"{case.size} tensor-parallel ranks" if case.engine else "tensor-parallel ranks would"
    return Finding(
        summary=f"{what}, where every pair of {product} should: {who} fall back to PCIe",
        evidence=_evidence(history, case),
        confidence=Confidence.HIGH if case.pairs else Confidence.MEDIUM,
        subject=Subject(gpus=case.gpus, engine=case.engine),
        since=min((e.at for e in case.lines if e.at is not None), default=None),
    )


def _advice(history: History, case: Case) -> Finding:
    ranks = f"{case.size} tensor-parallel ranks" if case.size else "the tensor-parallel ranks"
    fatal = any(e.signal == NO_MULTICAST for e in case.lines)
    if fatal:
        what = f"{ranks} were given an all-reduce that needs NVSwitch multicast, on GPUs that have none"
    elif case.board is False:
        model = next(p.model for gpu in history.latest.gpus if (p := product_of(gpu)) is not None)
        what = f"{ranks} talk over PCIe: {model} has no NVLink between all of them, so this is expected; fewer ranks, or replicas, waste less"
    else:
        what = f"{ranks} talk over PCIe: expected on PCIe boards, a fault on SXM boards, and the evidence does not tell which this is"
    return Finding(
        summary=what,
        evidence=_evidence(history, case),
        confidence=Confidence.LOW if case.board is None else Confidence.HIGH,
        severity=Severity.NOTICE,
        subject=Subject(gpus=case.gpus, engine=case.engine),
        since=min((e.at for e in case.lines if e.at is not None), default=None),
        explains=(*CONSEQUENCES, "engine-crashed") if fatal else (),
    )


def _evidence(history: History, case: Case) -> tuple[Evidence, ...]:
    lines = tuple(Evidence(Source.ENGINE_LOG.value, event.where, event.text) for event in case.lines)
    alike: dict[str, list[GpuPair]] = {}
    for pair in case.pairs:
        read, nvlink = (word if known(word) else "not seen" for word in (pair.p2p_read, pair.p2p_nvlink))
        alike.setdefault(f"{way_between(pair)}; P2P read {read}, NVLink {nvlink}", []).append(pair)
    pairs = tuple(
        Evidence(Source.NVML.value, f"topology matrix, {_named(history, group)}", text) for text, group in alike.items()
    )
    return pairs + lines


def _named(history: History, pairs: list[GpuPair]) -> str:
    gpus = tuple(dict.fromkeys(uuid for pair in pairs for uuid in (pair.first, pair.second)))
    whole = len(pairs) == len(gpus) * (len(gpus) - 1) // 2
    return names_of(history.latest, gpus) if whole else f"{len(pairs)} pairs of {names_of(history.latest, gpus)}"
