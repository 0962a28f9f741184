"""What the arithmetic of model and machine says about an engine, and what it leaves unsaid."""

from __future__ import annotations

from typing import Any

import nodes
import pytest
from launches import NO_WEIGHTS, starting
from loads import loaded
from nodes import one, quiet

from doctor.rule import AnyRule, Confidence, Severity
from doctor.snapshot import Absent, Snapshot, Source, Why
from rules import RULES, allreduce_dominant, model_does_not_fit, throughput_below_reference, tp_too_wide

MINE = (
    model_does_not_fit.RULE,
    tp_too_wide.RULE,
    allreduce_dominant.RULE,
    throughput_below_reference.RULE,
)

FP8 = {"quantization_method": "fp8", "quantization_weight_bits": 8, "quantization_weight_type": "float"}


def with_model(visits: tuple[Snapshot, ...], **changes: Any) -> tuple[Snapshot, ...]:
    return nodes.each(
        visits, lambda s: nodes.with_engine(s, **{f"model__{name}": value for name, value in changes.items()})
    )


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
@pytest.mark.parametrize("profile", nodes.PROFILES)
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_healthy_node_gets_not_even_a_notice(rule: AnyRule, profile: str, busy: bool) -> None:
    assert nodes.found(rule, nodes.healthy(profile, busy=busy, visits=50)) == ()


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
def test_blindness_is_not_health(rule: AnyRule) -> None:
    blind = nodes.each(
        loaded("hgx-h100-8"),
        lambda s: nodes.unseen(s, Source.NVML, Source.PROCESSES, Source.ENGINE_METRICS, why=Why.NO_PERMISSION),
    )
    assert nodes.found(rule, blind) == ()
    assert nodes.why_blind(rule, blind) is not None


@pytest.mark.parametrize("rule", MINE[1:], ids=lambda r: r.id)
def test_one_visit_is_too_little_for_a_load(rule: AnyRule) -> None:
    visits = loaded("hgx-h100-8", visits=1)
    assert nodes.found(rule, visits) == ()
    why = nodes.why_blind(rule, visits)
    assert why is not None
    assert "judged over minutes" in str(why)


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
def test_a_node_without_an_engine_is_quiet(rule: AnyRule) -> None:
    assert quiet(rule, nodes.each(nodes.healthy("hgx-h100-8"), nodes.without_engine))


# model-does-not-fit


def test_weights_larger_than_the_gpus_cannot_fit() -> None:
    """Llama 3.3 70B in BF16 at TP 1: 141 GB on a card of 85 GB."""
    finding = one(model_does_not_fit.RULE, starting(nodes.healthy("hgx-h100-8", tp=1)))
    assert finding.severity is Severity.CRITICAL
    assert finding.confidence is Confidence.MEDIUM
    assert "141.1 GB of weights" in finding.summary
    assert "cannot" in finding.summary
    assert finding.facts["tensor-parallel-size"] == "4"


def test_weights_that_leave_no_usual_runtime_are_a_warning() -> None:
    """70B in FP8 on one H100 (document 4): 72.7 of 76.2 GB."""
    visits = with_model(starting(nodes.healthy("hgx-h100-8", tp=1)), **FP8, weights_bytes=NO_WEIGHTS)
    visits = nodes.each(visits, lambda s: nodes.with_engine(s, flags__gpu_memory_utilization=0.9))
    finding = one(model_does_not_fit.RULE, visits)
    assert finding.severity is Severity.WARNING
    assert "not expected" in finding.summary


def test_the_engines_own_line_makes_it_sure() -> None:
    visits = nodes.last(
        starting(nodes.healthy("hgx-h100-8", tp=1)),
        lambda s: nodes.with_lines(s, nodes.line("cuda-out-of-memory", "CUDA out of memory.", number=9, at=s.at)),
    )
    finding = one(model_does_not_fit.RULE, visits)
    assert finding.confidence is Confidence.HIGH
    assert finding.evidence[-1].where == "vllm.log:9"


def test_a_model_that_fits_is_quiet_while_it_loads() -> None:
    assert quiet(model_does_not_fit.RULE, starting(nodes.healthy("hgx-h100-8", tp=4)))


def test_an_engine_that_serves_has_proved_that_it_fits() -> None:
    """A 24 GB card can't hold a quarter of 141 GB; this engine serves, so the arithmetic is what is wrong."""
    assert quiet(model_does_not_fit.RULE, nodes.healthy("rtx4090-4"))


def test_weights_in_host_memory_are_beyond_the_arithmetic() -> None:
    visits = nodes.each(
        starting(nodes.healthy("hgx-h100-8", tp=1)),
        lambda s: nodes.with_engine(s, command_line=("vllm", "serve", "m", "--cpu-offload-gb=80")),
    )
    assert nodes.found(model_does_not_fit.RULE, visits) == ()
    assert nodes.why_blind(model_does_not_fit.RULE, visits) is not None


def test_an_unknown_model_is_not_judged() -> None:
    visits = with_model(starting(nodes.healthy("hgx-h100-8", tp=1)), model_type="mamba")
    assert "no arithmetic for model type mamba" in str(nodes.why_blind(model_does_not_fit.RULE, visits))


# tp-too-wide


def chat(**flags: Any) -> tuple[Snapshot, ...]:
    visits = loaded("hgx-h100-8", token=0.0135, kv_cache_usage_ratio=0.05)
    return nodes.each(
        visits,
        lambda s: nodes.with_engine(s, **{f"flags__{n}": v for n, v in ({"max_model_len": 32768} | flags).items()}),
    )


def test_a_chat_load_on_eight_ranks_is_told_the_gain() -> None:
    finding = one(tp_too_wide.RULE, chat())
    assert finding.severity is Severity.NOTICE
    assert finding.confidence is Confidence.LOW
    assert "two replicas of TP=4" in finding.summary
    assert finding.facts["tensor-parallel-size"] == "4"


def test_the_lengths_of_requests_stand_for_a_flag_that_is_not_given() -> None:
    finding = one(tp_too_wide.RULE, chat(max_model_len=Absent(Why.NOT_GIVEN)))
    assert "at most 11000 tokens" in finding.summary


@pytest.mark.parametrize(
    "visits",
    [
        chat(max_model_len=131072),
        nodes.each(chat(), lambda s: nodes.with_metrics(s, kv_cache_usage_ratio=0.9)),
        loaded("hgx-h100-8", tp=4),
        loaded("hgx-h100-8", streams=1, token=0.0125),
    ],
    ids=["long context", "the cache is in use", "four ranks", "one stream"],
)
def test_a_width_that_is_needed_is_quiet(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(tp_too_wide.RULE, visits)


# allreduce-dominant

SMALL_MIXTURE = {
    "model_type": "qwen3_moe",
    "layers": 48,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "attention_heads": 32,
    "kv_heads": 4,
    "vocab_size": 151936,
    "experts": 128,
    "experts_per_token": 8,
    "moe_intermediate_size": 768,
    "weights_bytes": NO_WEIGHTS,
}
"""Qwen3-30B-A3B: little to read, two all-reduces a layer all the same."""


def test_a_small_mixture_over_pcie_mostly_talks() -> None:
    """4 × H100 PCIe, 256 streams: 96 all-reduces of 1 MiB, each 20 µs and 1.6 MB at 31.5 GB/s: 6.7 ms of 21."""
    visits = with_model(loaded("h100-pcie-4", streams=256, token=0.02, answer=512), **SMALL_MIXTURE, **FP8)
    finding = one(allreduce_dominant.RULE, visits)
    assert finding.severity is Severity.NOTICE
    assert finding.confidence is Confidence.LOW
    assert "all-reduces over pcie" in finding.summary


def without_own_kernels() -> tuple[Snapshot, ...]:
    """Return the load of document 3 on 8 × H200 in FP8, with the engine's own all-reduce kernels off."""
    visits = with_model(loaded("hgx-h200-8", token=0.0115, answer=1024), **FP8, weights_bytes=NO_WEIGHTS)
    return nodes.each(
        visits, lambda s: nodes.with_engine(s, flags__disable_custom_all_reduce=True, flags__max_model_len=131072)
    )


def test_nccl_takes_a_third_of_a_step_that_reads_little() -> None:
    """docs/arithmetic.md: 70B in FP8 on 8 × H200 spends 17 % in the engine's own kernels, 33 % in NCCL's."""
    finding = one(allreduce_dominant.RULE, without_own_kernels())
    assert "33% of it" in finding.summary
    assert "TP=4 would spend" in finding.summary


@pytest.mark.parametrize("profile", ["hgx-h100-8", "hgx-h100-4", "h100-pcie-4", "l40s-4", "hgx-a100-8"])
def test_a_large_dense_model_mostly_reads(profile: str) -> None:
    assert quiet(allreduce_dominant.RULE, loaded(profile))


def test_prefill_heavy_work_is_what_a_wide_group_is_for() -> None:
    visits = with_model(loaded("h100-pcie-4", streams=256, token=0.02, prompt=16000, answer=16), **SMALL_MIXTURE)
    assert quiet(allreduce_dominant.RULE, visits)


def test_one_rank_has_nobody_to_talk_to() -> None:
    assert quiet(allreduce_dominant.RULE, loaded("h100-pcie-4", tp=1))


# throughput-below-reference


def test_a_token_that_takes_three_times_its_time_is_below_reference() -> None:
    """Document 3's load on 4 × H100 should take 30 ms a token."""
    finding = one(throughput_below_reference.RULE, loaded("hgx-h100-8", tp=4, token=0.09))
    assert finding.severity is Severity.WARNING
    assert finding.confidence is Confidence.MEDIUM
    assert "90 ms" in finding.summary
    assert "30 ms are predicted" in finding.summary


def test_eager_mode_is_a_choice() -> None:
    visits = nodes.each(
        loaded("hgx-h100-8", tp=4, token=0.09), lambda s: nodes.with_engine(s, flags__enforce_eager=True)
    )
    assert one(throughput_below_reference.RULE, visits).severity is Severity.NOTICE


@pytest.mark.parametrize(
    "visits",
    [
        loaded("hgx-h100-8", tp=4, token=0.030),
        loaded("hgx-h100-8", tp=4, token=0.055),
        loaded("hgx-h100-8", tp=4, token=0.060, prompt=4000),
        loaded("hgx-h100-8", tp=4, token=0.025, streams=1),
    ],
    ids=["as predicted", "not quite twice", "long prompts between the tokens", "a single stream"],
)
def test_what_the_arithmetic_explains_is_quiet(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(throughput_below_reference.RULE, visits)


def test_links_that_are_gone_are_no_excuse() -> None:
    """Eight H100 that talk over PCIe: a token takes twice what their board would give."""

    def unlinked(snapshot: Snapshot) -> Snapshot:
        return nodes.with_pairs(snapshot, nvlinks=0, p2p_nvlink="not-supported")

    visits = loaded("hgx-h100-8", token=0.045)
    told = one(throughput_below_reference.RULE, nodes.each(visits, unlinked)).summary
    assert told == one(throughput_below_reference.RULE, visits).summary
    report = nodes.report(nodes.each(visits, unlinked), RULES)
    causes = {f.finding.failure_mode: f.caused_by for f in report.findings}
    assert causes["throughput-below-reference"] == ("pcie-fallback",)


def test_a_small_load_is_not_measurable() -> None:
    visits = loaded("hgx-h100-8", tp=4, token=0.5, streams=1)
    assert nodes.found(throughput_below_reference.RULE, visits) == ()
    assert "too small a load" in str(nodes.why_blind(throughput_below_reference.RULE, visits))


def test_a_restart_within_the_window_is_no_slowdown() -> None:
    visits = loaded("hgx-h100-8", tp=4, token=0.03)
    zero = {"steps_total": 0.0, "generation_tokens_total": 0.0, "prompt_tokens_total": 0.0}
    restarted = (*visits[:-1], nodes.with_metrics(visits[-1], **zero))
    assert nodes.found(throughput_below_reference.RULE, restarted) == ()
    assert nodes.why_blind(throughput_below_reference.RULE, restarted) is not None


def test_speculation_is_beyond_the_arithmetic() -> None:
    visits = nodes.each(
        loaded("hgx-h100-8", tp=4, token=0.09),
        lambda s: nodes.with_engine(s, command_line=("vllm", "serve", "m", "--speculative-config", "{}")),
    )
    assert nodes.found(throughput_below_reference.RULE, visits) == ()
    assert nodes.why_blind(throughput_below_reference.RULE, visits) is not None
