"""Record the cases of the rules that read flags, metrics and arithmetic: `python tests/record_load_cases.py [RULE…]`.

The loads are those of the rules' own tests, with fewer visits, so that the files stay small.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import nodes
import test_engine_cpu_starved as starved
import test_rules_capacity as capacity
import test_rules_choices as choices
import test_rules_traffic as traffic
from launches import starting
from loads import loaded
from record_cases import keep

from doctor.snapshot import Engine, EngineFlags, Snapshot

Visits = tuple[Snapshot, ...]


def thin(visits: Visits, step: int = 12) -> Visits:
    """Return every *step*-th visit: counters and gauges are functions of time."""
    return visits[::step]


def beside_another(kind: str) -> Visits:
    other = Engine(
        pid=7, started_at=nodes.START - 60, kind=kind, command_line=(kind, "serve"), flags=EngineFlags(model="m")
    )
    return nodes.each(nodes.healthy("hgx-h100-4", tp=2), lambda s: nodes.put(s, engines=(*s.engines, other)))


def small(**changes: object) -> Visits:
    """Return a load of a small mixture of experts over PCIe."""
    visits = loaded("h100-pcie-4", streams=256, token=0.02, **{"answer": 512} | changes)
    return thin(capacity.with_model(visits, **capacity.SMALL_MIXTURE, **capacity.FP8), 5)[:6]


CASES: dict[str, dict[str, Callable[[], Visits]]] = {
    "model-does-not-fit": {
        "fires-one-gpu": lambda: starting(nodes.healthy("hgx-h100-4", tp=1)),
        "quiet-it-fits": lambda: starting(nodes.healthy("hgx-h100-4")),
        "quiet-it-serves": lambda: nodes.healthy("rtx4090-4"),
    },
    "tp-too-wide": {
        "fires-chat": lambda: thin(capacity.chat()),
        "quiet-long-context": lambda: thin(capacity.chat(max_model_len=131072)),
        "quiet-four-ranks": lambda: thin(loaded("hgx-h100-4")),
    },
    "allreduce-dominant": {
        "fires-without-own-kernels": lambda: thin(capacity.without_own_kernels(), 5)[:6],
        "quiet-prefill": lambda: small(prompt=16000, answer=16),
        "quiet-large-dense": lambda: thin(loaded("hgx-h100-4"), 5)[:6],
    },
    "throughput-below-reference": {
        "fires-three-times": lambda: thin(loaded("hgx-h100-4", token=0.09)),
        "quiet-as-predicted": lambda: thin(loaded("hgx-h100-4", token=0.03)),
        "quiet-small-load": lambda: thin(loaded("hgx-h100-4", token=0.5, streams=1)),
    },
    "kv-cache-saturated": {
        "fires-queue": lambda: thin(loaded("hgx-h100-4", visits=12, **traffic.FULL), 2),
        "quiet-prefixes": lambda: thin(loaded("hgx-h100-4", visits=12, **(traffic.FULL | {"waiting": 0.0})), 2),
        "quiet-peak": lambda: thin(
            traffic.paged(loaded("hgx-h100-4", visits=12), lambda i: traffic.FULL if i > 8 else {}), 2
        ),
    },
    "queue-capped": {
        "fires-sequences": lambda: thin(
            traffic.flagged(loaded("hgx-h100-4", visits=12, **traffic.CAPPED), max_num_seqs=64), 2
        ),
        "quiet-full-cache": lambda: thin(
            traffic.flagged(
                loaded("hgx-h100-4", visits=12, **(traffic.CAPPED | {"kv_cache_usage_ratio": 0.8})), max_num_seqs=64
            ),
            2,
        ),
        "quiet-far-cap": lambda: thin(
            traffic.flagged(loaded("hgx-h100-4", visits=12, **traffic.CAPPED), max_num_seqs=512), 2
        ),
    },
    "context-overprovisioned": {
        "fires-128k": lambda: thin(
            traffic.flagged(loaded("hgx-h100-4", kv_cache_tokens=200_000.0), max_model_len=131072), 2
        )[:4],
        "quiet-large-cache": lambda: thin(
            traffic.flagged(loaded("hgx-h100-4", kv_cache_tokens=2_000_000.0), max_model_len=131072), 2
        )[:4],
        "quiet-long-requests": lambda: thin(
            traffic.flagged(loaded("hgx-h100-4", kv_cache_tokens=200_000.0, prompt=60_000), max_model_len=131072), 2
        )[:4],
    },
    "ttft-slow": {
        "fires-one-in-ten": lambda: thin(traffic.first_tokens(0.10)),
        "quiet-below-p95": lambda: thin(traffic.first_tokens(0.04)),
        "quiet-no-traffic": lambda: thin(nodes.healthy("hgx-h100-4", busy=False, visits=50)),
    },
    "cold-first-request": {
        "fires-nine-seconds": lambda: traffic.warming(9.0, 0.2)[:5],
        "quiet-all-alike": lambda: traffic.warming(4.0, 2.0)[:5],
        "quiet-long-warm": lambda: traffic.warming(9.0, 0.2, before=500.0)[:5],
    },
    "concurrency-ceiling": {
        "fires-sixty": lambda: thin(traffic.alone("hgx-h100-4", **traffic.CROWD)),
        "quiet-two-gpus": lambda: thin(traffic.alone("hgx-h100-4", tp=2, **traffic.CROWD)),
        "quiet-fewer": lambda: thin(traffic.alone("hgx-h100-4", running=40.0, waiting=5.0)),
    },
    "speculation-ineffective": {
        "fires-refused": lambda: thin(traffic.drafting(0.10)),
        "quiet-accepted": lambda: thin(traffic.drafting(0.40)),
        "quiet-none": lambda: thin(loaded("hgx-h100-4")),
    },
    "prefix-cache-cold": {
        "fires-gone-cold": lambda: thin(traffic.cached(0.8, 0.1)),
        "quiet-share-nothing": lambda: thin(traffic.cached(0.0, 0.0)),
        "quiet-still-warm": lambda: thin(traffic.cached(0.8, 0.6)),
    },
    "single-point-of-failure": {
        "fires-room-for-two": lambda: choices.freed(nodes.healthy("hgx-h100-4", tp=2), range(2, 4)),
        "quiet-whole-node": lambda: nodes.healthy("hgx-h100-4"),
        "quiet-others-there": lambda: nodes.healthy("hgx-h100-4", tp=2),
    },
    "idle-gpus": {
        "fires-three-of-four": lambda: thin(choices.freed(nodes.healthy("hgx-h100-4", tp=3, visits=49), range(3, 4))),
        "quiet-no-load": lambda: thin(
            choices.freed(nodes.healthy("hgx-h100-4", tp=3, visits=49, busy=False), range(3, 4))
        ),
        "quiet-another-owner": lambda: thin(nodes.healthy("hgx-h100-4", tp=2, visits=49)),
    },
    "pipeline-on-one-node": {
        "fires-two-stages": lambda: choices.staged("hgx-h100-4", flags__tensor_parallel_size=2),
        "quiet-pcie": lambda: choices.staged("h100-pcie-4", flags__tensor_parallel_size=2),
        "quiet-two-nodes": lambda: choices.staged(
            "hgx-h100-4",
            flags__tensor_parallel_size=2,
            command_line=("vllm", "serve", "m", "--nnodes", "2"),
        ),
    },
    "memory-utilization-risky": {
        "fires-mesh": lambda: choices.engine(nodes.healthy("hgx-h100-4"), flags__gpu_memory_utilization=0.95),
        "quiet-switched": lambda: choices.engine(nodes.healthy("dgx-h100-4of8"), flags__gpu_memory_utilization=0.95),
        "quiet-default": lambda: nodes.healthy("hgx-h100-4"),
    },
    "dtype-unsuited": {
        "fires-half": lambda: choices.engine(nodes.healthy("hgx-h100-4"), flags__dtype="float16"),
        "quiet-stored-so": lambda: choices.engine(
            nodes.healthy("hgx-h100-4"), flags__dtype="float16", model__dtype="float16"
        ),
        "quiet-bfloat16": lambda: choices.engine(nodes.healthy("hgx-h100-4"), flags__dtype="bfloat16"),
    },
    "runtime-outdated": {
        "fires-forty-seconds": lambda: choices.release("0.8.5.post1", "hgx-h100-4"),
        "quiet-later": lambda: choices.release("0.9.0", "hgx-h100-4"),
        "quiet-dense": lambda: choices.release("0.11.0", "hgx-h100-4"),
    },
    "stack-unpinned": {
        "fires-other-release": lambda: choices.restarted(engine="0.23.0"),
        "quiet-same-again": choices.restarted,
        "quiet-one-start": lambda: nodes.healthy("hgx-h100-4"),
    },
    "engine-unsupported": {
        "fires-sglang": lambda: beside_another("sglang"),
        "quiet-vllm": lambda: nodes.healthy("hgx-h100-4"),
        "quiet-no-engine": lambda: nodes.each(nodes.healthy("hgx-h100-4"), nodes.without_engine),
    },
    "engine-cpu-starved": {
        "fires-full-core": lambda: thin(choices.hot(1.0, 0.4), 2),
        "quiet-busy-gpus": lambda: thin(choices.hot(1.0, 0.95), 2),
        "quiet-no-requests": lambda: thin(choices.hot(1.0, 0.1, running=0.0), 2),
        "fires-throttled": lambda: thin(starved.stopped(0.6), 2),
        "fires-crowded": lambda: thin(starved.crowded(0.7), 2),
        "quiet-seldom-throttled": lambda: thin(starved.stopped(0.1), 2),
        "quiet-throttled-at-rest": lambda: thin(starved.stopped(0.6, gpu_ratio=0.1, running=0.0), 2),
    },
}
"""Case → its visits."""


def main(wanted: list[str]) -> None:
    for failure_mode, made in CASES.items():
        for name, visits in made.items() if not wanted or failure_mode in wanted else ():
            keep(visits(), "cases", failure_mode, name)


if __name__ == "__main__":
    main(sys.argv[1:])
