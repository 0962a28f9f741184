"""One replica serves all requests, where a second could stand beside it or the node has a single GPU."""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, Severity, Subject, rule
from doctor.snapshot import Absent, Source, Why, known, or_none
from doctor.symptoms.names import names_of
from doctor.symptoms.served import Served, served, spare_gpus


class Limits(msgspec.Struct, frozen=True):
    """What counts as production."""

    requests_min: float = 1000.0
    """Served since the engine started. guess: a test serves fewer."""


@rule(
    "single-point-of-failure",
    "One replica serves everything",
    severity=Severity.NOTICE,
    needs=(Source.PROCESSES, Source.NVML, Source.ENGINE_METRICS),
    limits=Limits(),
)
def RULE(history: History, limits: Limits) -> Iterator[Finding | Absent]:
    """Speak only where something can be done on the node, or where the node is one GPU.

    A replica that needs all GPUs is a single point of failure too, and another node is the only remedy: no news.
    """
    everyone = served(history)
    if len(everyone) != 1 or len(history.latest.engines) != 1 or not history.latest.gpus:
        return
    one = everyone[0]
    replicas = or_none(one.engine.flags.data_parallel_size) or 1
    if one.group is None or replicas > 1:
        return
    spare = spare_gpus(history)
    only_gpu = len(history.latest.gpus) == 1
    if not only_gpu and len(spare) < one.group.size:
        return
    page = next((page for page in history.latest.metrics if page.engine == one.engine.id), None)
    if page is None or not known(page.requests_succeeded_total):
        yield Absent(Why.NOT_ASKED, "how many requests the engine has served was not seen")
    elif page.requests_succeeded_total >= limits.requests_min:
        remedy = (
            "and a second GPU with a replica is the next step"
            if only_gpu
            else f"and {names_of(history.latest, [gpu.uuid for gpu in spare])} could hold a second replica"
        )
        yield _finding(one, page.requests_succeeded_total, remedy)


def _finding(one: Served, requests: float, remedy: str) -> Finding:
    assert one.group is not None
    ranks = one.group.size
    width = f"{ranks} GPUs" if ranks > 1 else "one GPU"
    return Finding(
        summary=f"One replica on {width} has served {requests:.0f} requests: if it stops, nobody is served, {remedy}",
        evidence=(
            Evidence(Source.PROCESSES.value, f"pid {one.engine.pid}", f"the only engine, TP={ranks}"),
            Evidence(Source.ENGINE_METRICS.value, "vllm:request_success_total", f"{requests:.0f} since it started"),
        ),
        confidence=Confidence.MEDIUM,
        subject=Subject(engine=one.engine.id),
        facts={"tensor-parallel-size": str(ranks)},
    )
