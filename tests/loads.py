"""Engines under a load that never changes, for the rules that read metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nodes

from doctor.readers import vllm_metrics
from doctor.snapshot import Histogram, Snapshot

LIVE = Path(__file__).parent.parent.parent / "shared" / "samples" / "live" / "v0.32.0"


def histogram(value: float, count: float, bounds: tuple[float, ...] = (1000, 10000, 100000)) -> Histogram:
    counts = tuple(count if value <= bound else 0.0 for bound in (*bounds, float("inf")))
    return Histogram(bounds=tuple(map(float, bounds)), counts=counts, sum=value * count)


def loaded(
    profile: str,
    *,
    tp: int | None = None,
    visits: int = 50,
    streams: float = 32,
    token: float = 0.02,
    prompt: float = 1024,
    answer: float = 256,
    already: float = 3600.0,
    **page: Any,
) -> tuple[Snapshot, ...]:
    """Return visits of a node whose engine decodes *streams* requests, *token* seconds a step."""

    def work(snapshot: Snapshot) -> Snapshot:
        seconds = already + snapshot.at - nodes.START
        steps = seconds / token
        tokens = steps * streams
        requests = tokens / answer
        fields = {
            "running": streams,
            "steps_total": steps,
            "generation_tokens_total": tokens,
            "prompt_tokens_total": requests * prompt,
            "requests_succeeded_total": requests,
            "inter_token_seconds": nodes.inter_token(token, tokens),
            "request_prompt_tokens": histogram(prompt, requests),
            "request_generation_tokens": histogram(answer, requests),
        }
        return nodes.with_metrics(snapshot, **(fields | page))

    return nodes.each(nodes.healthy(profile, visits=visits, tp=tp), work)


def live(run: str) -> tuple[Snapshot, ...]:
    """Return the visits of a live run whose pages were read every two seconds, on a node of which nothing else is known."""
    pages = sorted((LIVE / run).glob("metrics_load*.prom"))
    visits = nodes.healthy("hgx-h100-8", visits=len(pages), every=2.0)
    return tuple(
        nodes.put(visit, metrics=() if page is None else (page,))
        for visit, path in zip(visits, pages, strict=True)
        for page in (vllm_metrics.read(path.read_text(), engine=visit.engines[0].id, at=visit.at),)
    )
