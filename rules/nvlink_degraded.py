"""A GPU has fewer active NVLinks than its board gives it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Absent, Gpu, GpuPair, Snapshot, Source, Why, known
from doctor.symptoms.links import link_counts, went_down
from doctor.symptoms.names import listed, names_of
from rules.tables.products import product_of

LEAST_SWITCHED = 4
"""A GPU with two or more peers at this many links each sits on a switch or in an even mesh (HGX A100 4-GPU: NV4;
HGX H100 4-GPU: NV6; switches: NV8 and more). Bridged pairs have one such peer; V100 cube meshes stay at NV2."""


class Shortfall(msgspec.Struct, frozen=True, kw_only=True):
    """A GPU with fewer links than it should have."""

    gpu: str
    active: int
    expected: int
    down: tuple[int, ...] = ()
    far_ends: tuple[str, ...] = ()
    evidence: Evidence
    confidence: Confidence


@rule(
    "nvlink-degraded",
    "A GPU has fewer active NVLinks than its board gives it",
    severity=Severity.CRITICAL,
    needs=(Source.NVML,),
    explains=(
        "pcie-fallback",
        "nccl-timeout",
        "engine-stalled",
        "engine-crashed",
        "throughput-below-reference",
        "allreduce-dominant",
    ),
    limits=NoLimits(),
)
def RULE(history: History, limits: NoLimits) -> Iterator[Finding | Absent]:  # noqa: ARG001 - nothing to set
    """Count each GPU's active links against its product; where only the matrix was seen, its cells against each other."""
    counted = {count.gpu for count in link_counts(history)}
    short = (*_by_link(history), *_by_matrix(history.latest, counted))
    if short:
        yield _finding(history, short)
    elif partly := _partly_linked(history):
        yield Absent(
            Why.NOT_KNOWN,
            f"{names_of(history.latest, partly)}: NVLinks are down, and how many this product has is not known here",
        )
    elif not counted and not history.latest.pairs and any(_should_have_links(g) for g in history.latest.gpus):
        yield Absent(Why.NOT_ASKED, "neither the links of the GPUs nor the matrix between them was seen")


def _partly_linked(history: History) -> list[str]:
    """Return the GPUs of no product that we know which have links of both kinds, or are nameless and have some down."""
    return [
        count.gpu
        for count in link_counts(history)
        if count.down
        and (gpu := history.latest.gpu(count.gpu)) is not None
        and product_of(gpu) is None
        and (count.active or not known(gpu.name))
    ]


def _should_have_links(gpu: Gpu) -> bool:
    product = product_of(gpu)
    return gpu.mig.enabled is not True and gpu.lost is not True and product is not None and product.has_board_nvlink


def _by_link(history: History) -> Iterator[Shortfall]:
    fallen = went_down(history)
    for count in link_counts(history):
        gpu = history.latest.gpu(count.gpu)
        product = product_of(gpu) if gpu else None
        if gpu is None or not count.down:
            continue
        full = product.nvlinks if product is not None and product.has_board_nvlink else 0
        confidence = Confidence.HIGH
        if count.active < full and not _is_slice_of_mesh(history.latest, count.active, full):
            down, expected = count.down, full
        elif product is None and 0 < count.active < (most := _most_of_its_kind(history, gpu)):
            down, expected, confidence = count.down, most, Confidence.MEDIUM
        elif count.gpu in fallen:  # a bridge that worked at an earlier visit
            down = fallen[count.gpu]
            expected = count.active + len(down)
        else:
            continue
        text = f"{count.active} of {expected} links active; down: {listed(map(str, down), 18)}"
        proof = Evidence(Source.NVML.value, f"GPU {gpu.index}: nvmlDeviceGetNvLinkState", text)
        yield Shortfall(
            gpu=gpu.uuid,
            active=count.active,
            expected=expected,
            down=down,
            far_ends=count.far_ends,
            evidence=proof,
            confidence=confidence,
        )


def _most_of_its_kind(history: History, gpu: Gpu) -> int:
    """Return the most links that a GPU of this name has here; no board that we know gives its GPUs different numbers."""
    alike = {g.uuid for g in history.latest.gpus if known(g.name) and g.name == gpu.name}
    return max((count.active for count in link_counts(history) if count.gpu in alike), default=0)


def _is_slice_of_mesh(snapshot: Snapshot, active: int, full: int) -> bool:
    """Whether a virtual machine holds some GPUs of a 4-GPU mesh: the links to the others end outside it."""
    return snapshot.host.virtual_machine is True and active == full // 3 * (len(snapshot.gpus) - 1)


def _by_matrix(snapshot: Snapshot, counted: set[str]) -> Iterator[Shortfall]:
    """Judge GPUs whose links were not counted by the `NVn` between them: on a switch or in a mesh all are alike."""
    pairs = [
        pair
        for pair in snapshot.pairs
        if known(pair.nvlinks) and all((gpu := snapshot.gpu(u)) and _judgeable(gpu) for u in (pair.first, pair.second))
    ]
    alike = _links_of_a_pair(snapshot, pairs)
    if not alike:
        return
    full = Counter(u for p in pairs for u in (p.first, p.second) if p.nvlinks == alike)
    poor = {u: p for p in pairs if p.nvlinks != alike for u in (p.first, p.second)}
    few = min((full[u] for u in poor), default=0)
    for uuid, pair in poor.items():
        gpu = snapshot.gpu(uuid)
        if uuid in counted or gpu is None or (full[uuid] > few):  # its peer is the one that lacks links
            continue
        way = f"NV{pair.nvlinks}" if pair.nvlinks else (pair.ancestor if known(pair.ancestor) else "no NVLink")
        other = pair.second if uuid == pair.first else pair.first
        text = f"{way} to {names_of(snapshot, (other,))}, where this board gives NV{alike}"
        yield Shortfall(
            gpu=uuid,
            active=pair.nvlinks if known(pair.nvlinks) else 0,
            expected=alike,
            evidence=Evidence(Source.NVML.value, f"topology matrix, GPU {gpu.index}", text),
            confidence=Confidence.MEDIUM,
        )


def _judgeable(gpu: Gpu) -> bool:
    product = product_of(gpu)
    return gpu.mig.enabled is not True and gpu.lost is not True and (product is None or product.has_board_nvlink)


def _links_of_a_pair(snapshot: Snapshot, pairs: list[GpuPair]) -> int:
    """Return how many links any two GPUs of this board share when all is well; 0 where that can't be told."""
    most = max((p.nvlinks for p in pairs if known(p.nvlinks)), default=0)
    peers = Counter(u for p in pairs if p.nvlinks == most for u in (p.first, p.second))
    products = [product_of(gpu) for gpu in snapshot.gpus]
    boards = {p.nvlinks for p in products if p is not None and p.has_board_nvlink}
    if len(boards) == 1:
        full = boards.pop()
        shares = (full, full // 3)  # through switches; in a mesh of four
        return next((share for share in sorted(shares) if share >= most), 0) if most else 0
    return most if most >= LEAST_SWITCHED and max(peers.values(), default=0) >= 2 else 0


def _finding(history: History, short: tuple[Shortfall, ...]) -> Finding:
    latest = history.latest
    worst = min(short, key=lambda s: s.active / s.expected)
    lost = [g.uuid for g in latest.gpus if g.lost is True]
    ends = [g.uuid for g in latest.gpus if g.pci_address in {end for s in short for end in s.far_ends}]
    who = tuple(dict.fromkeys((*(s.gpu for s in short), *ends, *lost)))
    gpu = latest.gpu(worst.gpu)
    alike = [s.gpu for s in short if (s.active, s.expected) == (worst.active, worst.expected)]
    others = f"; {len(short) - len(alike)} more GPUs lack some" if len(short) > len(alike) else ""
    return Finding(
        summary=f"{names_of(latest, alike)}: {worst.active} of {worst.expected} NVLinks are up{others}",
        evidence=tuple(s.evidence for s in short),
        confidence=max(s.confidence for s in short),
        subject=Subject(gpus=who, links=tuple(f"{s.gpu}/{link}" for s in short for link in s.down)),
        since=_since(history, short),
        facts={"gpu-index": str(gpu.index)} if gpu else {},
    )


def _since(history: History, short: tuple[Shortfall, ...]) -> float | None:
    """Return the first visit at which the links were down, where an earlier visit saw them up."""
    fallen = went_down(history)
    for snapshot in history.snapshots if fallen else ():
        for s in short:
            gpu = snapshot.gpu(s.gpu)
            if (
                gpu
                and known(gpu.links)
                and any(n.active is False and n.link in fallen.get(s.gpu, ()) for n in gpu.links)
            ):
                return snapshot.at
    return None
