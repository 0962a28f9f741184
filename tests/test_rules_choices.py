"""Rules about choices: notices with their reasons, never alarms."""

from __future__ import annotations

from typing import Any

import nodes
import pytest
from loads import loaded
from nodes import quiet

from doctor.rule import AnyRule, Confidence, Finding, Severity
from doctor.snapshot import Absent, Engine, EngineFlags, Snapshot, Source, Why
from rules import (
    dtype_unsuited,
    engine_cpu_starved,
    engine_unsupported,
    idle_gpus,
    memory_utilization_risky,
    pipeline_on_one_node,
    runtime_outdated,
    single_point_of_failure,
    stack_unpinned,
)
from rules.tables.known_bugs import KNOWN_BUGS

MINE = (
    idle_gpus.RULE,
    pipeline_on_one_node.RULE,
    dtype_unsuited.RULE,
    memory_utilization_risky.RULE,
    single_point_of_failure.RULE,
    runtime_outdated.RULE,
    stack_unpinned.RULE,
    engine_unsupported.RULE,
    engine_cpu_starved.RULE,
)


def one(rule: AnyRule, visits: tuple[Snapshot, ...]) -> Finding:
    findings = nodes.found(rule, visits)
    assert len(findings) == 1, (findings, nodes.why_blind(rule, visits))
    assert findings[0].severity is Severity.NOTICE
    return findings[0]


def engine(visits: tuple[Snapshot, ...], **changes: Any) -> tuple[Snapshot, ...]:
    return nodes.each(visits, lambda s: nodes.with_engine(s, **changes))


def freed(visits: tuple[Snapshot, ...], gpus: range) -> tuple[Snapshot, ...]:
    """Return the visits with GPUs that nobody uses."""
    return nodes.each(
        visits,
        lambda s: nodes.with_gpu(
            s, gpus, processes=(), memory__used_bytes=600 << 20, activity__gpu_ratio=0.0, activity__memory_ratio=0.0
        ),
    )


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
@pytest.mark.parametrize("profile", nodes.PROFILES)
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_healthy_node_gets_not_even_a_notice(rule: AnyRule, profile: str, busy: bool) -> None:
    assert nodes.found(rule, nodes.healthy(profile, busy=busy, visits=30)) == ()


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
def test_a_node_without_an_engine_is_quiet(rule: AnyRule) -> None:
    assert quiet(rule, nodes.each(nodes.healthy("hgx-h100-8"), nodes.without_engine))


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
def test_blindness_is_not_health(rule: AnyRule) -> None:
    blind = nodes.each(
        nodes.healthy("hgx-h100-8"),
        lambda s: nodes.unseen(s, Source.NVML, Source.PROCESSES, Source.STACK, why=Why.NO_PERMISSION),
    )
    assert nodes.found(rule, blind) == ()
    assert nodes.why_blind(rule, blind) is not None


# single-point-of-failure


def test_a_replica_beside_gpus_that_could_hold_another() -> None:
    finding = one(single_point_of_failure.RULE, freed(nodes.healthy("hgx-h100-8", tp=4), range(4, 8)))
    assert "GPU 4, 5, 6 and 7 could hold a second replica" in finding.summary
    assert "--tensor-parallel-size 4" in finding.advice[0]


def test_a_single_gpu_that_serves() -> None:
    visits = nodes.each(nodes.healthy("h100-pcie-4", tp=1), lambda s: nodes.put(s, gpus=s.gpus[:1], pairs=()))
    assert "second GPU" in one(single_point_of_failure.RULE, visits).summary


@pytest.mark.parametrize(
    "visits",
    [
        nodes.healthy("hgx-h100-8"),
        nodes.healthy("hgx-h100-8", tp=4),
        engine(freed(nodes.healthy("hgx-h100-8", tp=2), range(4, 8)), flags__data_parallel_size=2),
        nodes.each(
            freed(nodes.healthy("hgx-h100-8", tp=4), range(4, 8)),
            lambda s: nodes.with_metrics(s, requests_succeeded_total=12.0),
        ),
    ],
    ids=["it needs the whole node", "others use the rest", "two replicas", "a test"],
)
def test_a_replica_that_nothing_here_could_double_is_quiet(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(single_point_of_failure.RULE, visits)


# pipeline-on-one-node


def staged(profile: str, **changes: Any) -> tuple[Snapshot, ...]:
    flags = {"flags__tensor_parallel_size": 4, "flags__pipeline_parallel_size": 2}
    return engine(nodes.healthy(profile), **(flags | changes))


def test_stages_on_an_nvlink_node_could_be_ranks() -> None:
    finding = one(pipeline_on_one_node.RULE, staged("hgx-h100-8"))
    assert "TP=8" in finding.summary


@pytest.mark.parametrize(
    "visits",
    [
        staged("h100-pcie-4", flags__tensor_parallel_size=2),
        staged("hgx-h100-8", model__attention_heads=60, model__kv_heads=4),
        staged("hgx-h100-8", command_line=("vllm", "serve", "m", "--nnodes", "2")),
        staged("hgx-h100-8", flags__pipeline_parallel_size=4),
    ],
    ids=["PCIe", "heads that 8 does not divide", "two nodes", "more GPUs than are here"],
)
def test_stages_with_a_reason_are_quiet(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(pipeline_on_one_node.RULE, visits)


# memory-utilization-risky


def test_more_than_the_wiring_allows_is_risky() -> None:
    finding = one(
        memory_utilization_risky.RULE, engine(nodes.healthy("h100-pcie-4"), flags__gpu_memory_utilization=0.95)
    )
    assert finding.confidence is Confidence.LOW
    assert "92% is what holds without NVSwitch" in finding.summary


def test_running_out_in_service_makes_it_sure() -> None:
    visits = engine(nodes.healthy("hgx-h100-8"), flags__gpu_memory_utilization=0.98)
    oom = nodes.line("cuda-out-of-memory", "CUDA out of memory.", number=90, at=nodes.START + 20)
    finding = one(memory_utilization_risky.RULE, nodes.last(visits, lambda s: nodes.with_lines(s, oom)))
    assert finding.confidence is Confidence.HIGH


@pytest.mark.parametrize(
    ("profile", "share"), [("hgx-h100-8", 0.95), ("h100-pcie-4", 0.92), ("l40s-4", 0.9), ("hgx-h100-4", 0.5)]
)
def test_a_share_that_holds_is_quiet(profile: str, share: float) -> None:
    assert quiet(memory_utilization_risky.RULE, engine(nodes.healthy(profile), flags__gpu_memory_utilization=share))


# idle-gpus


def test_gpus_that_nobody_took_under_load() -> None:
    visits = freed(nodes.healthy("hgx-h100-4", tp=3, visits=30), range(3, 4))
    finding = one(idle_gpus.RULE, visits)
    assert finding.subject.gpus == (nodes.uuid(3),)
    assert "98% busy" in finding.summary


def test_a_rank_that_works_unlike_the_others() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-4", visits=30), lambda s: nodes.with_gpu(s, 2, activity__gpu_ratio=0.2))
    finding = one(idle_gpus.RULE, visits)
    assert "GPU 2" in finding.summary
    assert finding.confidence is Confidence.LOW


@pytest.mark.parametrize(
    "visits",
    [
        nodes.healthy("hgx-h100-8", tp=4, visits=30),
        freed(nodes.healthy("hgx-h100-8", tp=4, visits=30, busy=False), range(4, 8)),
        nodes.each(
            freed(nodes.healthy("hgx-h100-8", tp=4, visits=30), range(4, 8)),
            lambda s: nodes.with_gpu(s, range(4, 8), memory__used_bytes=40 << 30),
        ),
    ],
    ids=["another process owns them", "no load", "memory is held"],
)
def test_gpus_with_an_owner_or_without_a_load_are_quiet(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(idle_gpus.RULE, visits)


def test_two_visits_are_too_few_to_call_a_gpu_idle() -> None:
    visits = freed(nodes.healthy("hgx-h100-8", tp=4, visits=2), range(4, 8))
    assert nodes.found(idle_gpus.RULE, visits) == ()
    assert nodes.why_blind(idle_gpus.RULE, visits) is not None


# engine-unsupported


@pytest.mark.parametrize("kind", ["sglang", "tensorrt-llm", "tgi", "llama.cpp"])
def test_another_engine_is_named(kind: str) -> None:
    other = Engine(pid=7, started_at=1.0, kind=kind, command_line=(kind, "serve"), flags=EngineFlags(model="m"))
    visits = nodes.each(nodes.healthy("hgx-h100-8"), lambda s: nodes.put(s, engines=(*s.engines, other)))
    assert "pid 7" in one(engine_unsupported.RULE, visits).summary


def test_vllm_is_read() -> None:
    assert quiet(engine_unsupported.RULE, nodes.healthy("hgx-h100-8"))


# engine-cpu-starved


def hot(cores: float, gpu_ratio: float, running: float = 20.0) -> tuple[Snapshot, ...]:
    def busy(i: int, snapshot: Snapshot) -> Snapshot:
        spent = nodes.with_engine(snapshot, cpu_seconds=500.0 + cores * i * nodes.EVERY)
        return nodes.with_metrics(nodes.with_gpu(spent, range(4), activity__gpu_ratio=gpu_ratio), running=running)

    return tuple(busy(i, snapshot) for i, snapshot in enumerate(nodes.healthy("hgx-h100-4", visits=12)))


def test_a_full_core_before_waiting_gpus() -> None:
    finding = one(engine_cpu_starved.RULE, hot(1.0, 0.4))
    assert "filled 1.00 cores" in finding.summary
    assert "40% busy" in finding.summary


@pytest.mark.parametrize(
    "visits",
    [hot(1.0, 0.95), hot(0.5, 0.4), hot(1.0, 0.1, running=0.0), hot(3.0, 0.4)],
    ids=["the GPUs are busy", "half a core", "no requests", "many threads"],
)
def test_a_core_that_is_not_the_bottleneck_is_quiet(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(engine_cpu_starved.RULE, visits)


# dtype-unsuited


def test_bfloat16_before_ampere() -> None:
    visits = nodes.each(
        engine(nodes.healthy("h100-pcie-4"), flags__dtype="bfloat16"),
        lambda s: nodes.with_gpu(s, range(4), compute_capability=(7, 0)),
    )
    assert "compute capability 7.0" in one(dtype_unsuited.RULE, visits).summary


def test_float16_for_a_model_in_bfloat16() -> None:
    finding = one(dtype_unsuited.RULE, engine(nodes.healthy("hgx-h100-8"), flags__dtype="float16"))
    assert finding.confidence is Confidence.LOW
    assert finding.facts["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    "changes",
    [
        {"flags__dtype": "bfloat16"},
        {"flags__dtype": "half", "model__dtype": "float16"},
        {"flags__dtype": "auto"},
        {"flags__dtype": "float16", "model__quantization_method": "awq"},
    ],
)
def test_a_type_that_suits_is_quiet(changes: dict[str, Any]) -> None:
    assert quiet(dtype_unsuited.RULE, engine(nodes.healthy("hgx-h100-8"), **changes))


def test_advice_waits_until_an_incident_is_over() -> None:
    visits = engine(nodes.healthy("hgx-h100-8"), flags__dtype="float16")
    dead = (nodes.line("engine-dead", number=80), nodes.line("cuda-error", number=79, kind="launch-failure"))
    assert nodes.found(dtype_unsuited.RULE, nodes.last(visits, lambda s: nodes.with_lines(s, *dead))) == ()


def test_the_engines_refusal_is_no_advice() -> None:
    text = "Bfloat16 is only supported on GPUs with compute capability of at least 8.0."
    visits = nodes.each(nodes.healthy("hgx-h100-8"), nodes.without_engine)
    refusal = nodes.line("launch-error", text, kind="dtype")
    finding = nodes.found(dtype_unsuited.RULE, nodes.last(visits, lambda s: nodes.with_lines(s, refusal)))[0]
    assert finding.severity is Severity.CRITICAL
    assert finding.confidence is Confidence.HIGH


# runtime-outdated

MIXTURE = {"model__model_type": "qwen3_moe", "model__experts": 128, "model__experts_per_token": 8}
CHANNEL = {
    "model__quantization_method": "compressed-tensors",
    "model__quantization_weight_bits": 8,
    "model__quantization_weight_type": "float",
}


def release(version: str, profile: str = "hgx-h200-8", **changes: Any) -> tuple[Snapshot, ...]:
    return engine(nodes.healthy(profile), stack__engine=version, **changes)


@pytest.mark.parametrize(
    ("visits", "thread"),
    [
        (release("0.8.5.post1"), "17965"),
        (release("0.7.3", **MIXTURE), "13693"),
        (release("0.11.0", **MIXTURE, **CHANNEL), "26720"),
    ],
)
def test_a_known_bug_is_told_with_its_thread(visits: tuple[Snapshot, ...], thread: str) -> None:
    assert thread in one(runtime_outdated.RULE, visits).evidence[1].text


@pytest.mark.parametrize(
    "visits",
    [
        release("0.9.0"),
        release("0.11.0"),
        release("0.11.0", **MIXTURE),
        release("0.11.0", "hgx-a100-8", **MIXTURE, **CHANNEL),
        release("0.8.5", flags__tensor_parallel_size=1, ranks=()),
        release("0.33.0", **MIXTURE, **CHANNEL),
    ],
)
def test_a_bug_that_nothing_here_calls_up_is_quiet(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(runtime_outdated.RULE, visits)


def test_serial_all_reduces_matter_where_they_take_their_share() -> None:
    small = {
        "model__model_type": "qwen3_moe", "model__layers": 48, "model__hidden_size": 2048, "model__kv_heads": 4,
        "model__attention_heads": 32, "model__vocab_size": 151936, "model__experts": 128, "model__experts_per_token": 8,
        "model__moe_intermediate_size": 768, "model__weights_bytes": Absent(Why.NOT_ASKED),
        "model__quantization_method": "fp8", "model__quantization_weight_bits": 8,
    }  # fmt: skip
    visits = engine(loaded("h100-pcie-4", streams=256, answer=512), stack__engine="0.20.2", **small)
    assert "one after the other" in one(runtime_outdated.RULE, visits).summary
    assert quiet(runtime_outdated.RULE, engine(visits, stack__engine="0.22.1"))


def test_an_unknown_release_is_not_judged() -> None:
    visits = nodes.each(release(""), lambda s: nodes.put(s, engine_events=()))
    assert nodes.why_blind(runtime_outdated.RULE, visits) is not None


def test_every_known_bug_names_its_source_and_ends() -> None:
    for bug in KNOWN_BUGS:
        assert bug.source
        assert bug.fixed
        assert bug.is_in(bug.since or "0.5.0")
        assert not bug.is_in(bug.fixed)


# stack-unpinned


def restarted(**stack: str) -> tuple[Snapshot, ...]:
    visits = nodes.healthy("hgx-h100-8", visits=6)
    changes = {"pid": 1500, "started_at": nodes.START + 40} | {f"stack__{name}": value for name, value in stack.items()}
    return (*visits[:3], *nodes.each(visits[3:], lambda s: nodes.with_engine(s, **changes)))


def test_a_restart_with_other_versions_is_a_drift() -> None:
    finding = one(stack_unpinned.RULE, restarted(engine="0.23.0", torch="2.11.1+cu130"))
    assert "vLLM 0.22.1 → 0.23.0" in finding.summary
    assert "PyTorch 2.11.0+cu130 → 2.11.1+cu130" in finding.summary


@pytest.mark.parametrize("image", ["vllm/vllm-openai:latest", "vllm/vllm-openai", "docker.io/vllm/vllm-openai:nightly"])
def test_a_tag_that_moves_is_told(image: str) -> None:
    visits = engine(nodes.healthy("hgx-h100-8"), command_line=("docker", "run", image, "--model", "m"))
    assert image in one(stack_unpinned.RULE, visits).summary


@pytest.mark.parametrize(
    "visits",
    [
        restarted(),
        engine(nodes.healthy("hgx-h100-8"), command_line=("docker", "run", "vllm/vllm-openai:v0.22.1", "--model", "m")),
        engine(restarted(engine="0.23.0"), stack__engine="0.23.0"),
    ],
    ids=["the same again", "a pinned image", "no change seen"],
)
def test_versions_that_stand_are_quiet(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(stack_unpinned.RULE, visits)


def test_another_service_is_no_restart() -> None:
    visits = restarted(engine="0.23.0")
    other = (*visits[:3], *nodes.each(visits[3:], lambda s: nodes.with_engine(s, unit="other.service")))
    assert quiet(stack_unpinned.RULE, other)


def test_one_visit_shows_one_start() -> None:
    assert nodes.why_blind(stack_unpinned.RULE, nodes.healthy("hgx-h100-8", visits=1)) is not None
