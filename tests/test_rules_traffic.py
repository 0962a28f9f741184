"""What an engine's own metrics say about its requests, over a window and with enough of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import nodes
import pytest
from loads import LIVE, histogram, live, loaded
from nodes import one, quiet

from doctor.rule import AnyRule, Confidence, Severity
from doctor.snapshot import Absent, Histogram, Snapshot, Source, Why
from doctor.symptoms.traffic import quantile_at_most, share_above, traffics
from rules import (
    cold_first_request,
    concurrency_ceiling,
    context_overprovisioned,
    kv_cache_saturated,
    prefix_cache_cold,
    queue_capped,
    speculation_ineffective,
    ttft_slow,
)

MINE = (
    kv_cache_saturated.RULE,
    queue_capped.RULE,
    context_overprovisioned.RULE,
    ttft_slow.RULE,
    cold_first_request.RULE,
    concurrency_ceiling.RULE,
    speculation_ineffective.RULE,
    prefix_cache_cold.RULE,
)

FIRST_BOUNDS = (0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 10.0)


def paged(visits: tuple[Snapshot, ...], fields: Callable[[int], dict[str, Any]]) -> tuple[Snapshot, ...]:
    """Return the visits with other metrics, by the visit's number."""
    return tuple(nodes.with_metrics(s, **fields(i)) for i, s in enumerate(visits))


def flagged(visits: tuple[Snapshot, ...], **flags: Any) -> tuple[Snapshot, ...]:
    return nodes.each(visits, lambda s: nodes.with_engine(s, **{f"flags__{n}": v for n, v in flags.items()}))


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
@pytest.mark.parametrize("profile", nodes.PROFILES)
@pytest.mark.parametrize("busy", [True, False], ids=["busy", "idle"])
def test_a_healthy_node_gets_not_even_a_notice(rule: AnyRule, profile: str, busy: bool) -> None:
    assert nodes.found(rule, nodes.healthy(profile, busy=busy, visits=50)) == ()


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
@pytest.mark.parametrize("run", ["normal_small", "tp2_normal"])
def test_a_healthy_live_run_gets_not_even_a_notice(rule: AnyRule, run: str) -> None:
    if not LIVE.is_dir():
        pytest.skip("the live captures are not here")
    assert nodes.found(rule, live(run)) == ()


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
def test_blindness_is_not_health(rule: AnyRule) -> None:
    blind = nodes.each(loaded("hgx-h100-8"), lambda s: nodes.unseen(s, Source.ENGINE_METRICS, why=Why.FAILED))
    assert nodes.found(rule, blind) == ()
    assert nodes.why_blind(rule, blind) is not None


@pytest.mark.parametrize(
    "rule",
    [r for r in MINE if r not in (speculation_ineffective.RULE, concurrency_ceiling.RULE)],
    ids=lambda r: r.id,
)
def test_one_page_is_not_judged(rule: AnyRule) -> None:
    visits = loaded("hgx-h100-8", visits=1)
    assert nodes.found(rule, visits) == ()
    assert nodes.why_blind(rule, visits) is not None


@pytest.mark.parametrize("rule", MINE, ids=lambda r: r.id)
def test_counters_that_begin_anew_in_the_middle_make_no_finding(rule: AnyRule) -> None:
    old, new = loaded("hgx-h100-8", visits=50), loaded("hgx-h100-8", visits=50, already=1.0)
    visits = (*old[:30], *(nodes.put(b, metrics=a.metrics) for a, b in zip(new[:20], old[30:], strict=True)))
    assert nodes.found(rule, visits) == ()


# The symptom


def test_only_the_present_life_of_the_counters_counts() -> None:
    visits = loaded("hgx-h100-8", visits=10)
    reborn = (*visits[:6], *nodes.each(visits[6:], lambda s: nodes.with_metrics(s, generation_tokens_total=5.0)))
    traffic = traffics(nodes.history(reborn), 600)[0]
    assert len(traffic.pages) == 4
    assert traffic.grown(lambda page: page.generation_tokens_total) == 0.0


def test_a_share_above_a_value_counts_what_is_surely_above() -> None:
    times = Histogram(bounds=(0.25, 0.5, 1.0), counts=(50.0, 90.0, 95.0, 100.0), sum=60.0)
    assert share_above(times, 0.5) == pytest.approx(0.10)
    assert share_above(times, 0.6) == pytest.approx(0.05)
    assert share_above(times, 5.0) == 0.0
    assert quantile_at_most(times, 0.95) == 1.0
    assert quantile_at_most(times, 0.99) is None


# kv-cache-saturated

FULL = {"kv_cache_usage_ratio": 0.97, "waiting": 12.0}


def test_a_full_cache_with_a_queue_is_saturated() -> None:
    finding = one(kv_cache_saturated.RULE, loaded("hgx-h100-8", visits=12, **FULL))
    assert finding.severity is Severity.WARNING
    assert "12 requests wait" in finding.summary


def test_preemptions_are_counted_within_the_window() -> None:
    visits = paged(
        loaded("hgx-h100-8", visits=12, **(FULL | {"waiting": 0.0})), lambda i: {"preemptions_total": 500.0 + i}
    )
    assert "8 were preempted" in one(kv_cache_saturated.RULE, visits).summary


@pytest.mark.parametrize(
    "visits",
    [
        loaded("hgx-h100-8", visits=12, **(FULL | {"waiting": 0.0})),
        paged(loaded("hgx-h100-8", visits=12, **FULL), lambda i: FULL if i > 8 else {"kv_cache_usage_ratio": 0.5}),
        loaded("hgx-h100-8", visits=12, **(FULL | {"kv_cache_usage_ratio": 0.6})),
    ],
    ids=["full of prefixes", "a peak", "room is left"],
)
def test_a_full_cache_without_victims_is_quiet(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(kv_cache_saturated.RULE, visits)


def test_preemptions_of_an_earlier_life_are_none_of_this_one() -> None:
    visits = loaded("hgx-h100-8", visits=12, **(FULL | {"waiting": 0.0}))
    reborn = paged(visits, lambda i: {"preemptions_total": 500.0} if i < 4 else {"preemptions_total": 0.0})
    assert quiet(kv_cache_saturated.RULE, reborn)


# queue-capped

CAPPED = {"running": 64.0, "waiting": 30.0, "kv_cache_usage_ratio": 0.2}


def test_requests_that_wait_for_a_cap_of_sequences() -> None:
    finding = one(queue_capped.RULE, flagged(loaded("hgx-h100-8", visits=12, **CAPPED), max_num_seqs=64))
    assert finding.severity is Severity.WARNING
    assert "64 requests run, and the cap is 64" in finding.summary
    assert "Raise `--max-num-seqs` above 64" in finding.advice[0]


def test_the_default_cap_is_known() -> None:
    visits = loaded("hgx-h100-8", visits=12, running=256.0, waiting=30.0, kv_cache_usage_ratio=0.2)
    assert "the cap is 256" in one(queue_capped.RULE, visits).summary


def test_requests_that_wait_for_the_token_budget() -> None:
    """32 streams with 1024 tokens in and 256 out: a step takes 32 + 128 tokens."""
    visits = flagged(loaded("hgx-h100-8", visits=12, **CAPPED), max_num_batched_tokens=160, max_num_seqs=512)
    assert "--max-num-batched-tokens" in one(queue_capped.RULE, visits).advice[0]


@pytest.mark.parametrize(
    "visits",
    [
        flagged(loaded("hgx-h100-8", visits=12, **(CAPPED | {"kv_cache_usage_ratio": 0.8})), max_num_seqs=64),
        flagged(loaded("hgx-h100-8", visits=12, **(CAPPED | {"waiting": 0.0})), max_num_seqs=64),
        flagged(loaded("hgx-h100-8", visits=12, **CAPPED), max_num_seqs=512),
        paged(
            flagged(loaded("hgx-h100-8", visits=12, **CAPPED), max_num_seqs=64),
            lambda i: {"waiting": 30.0 if i in (6, 7) else 0.0},
        ),
    ],
    ids=["the cache is full", "nobody waits", "the cap is far", "a burst"],
)
def test_a_queue_that_no_cap_makes_is_quiet(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(queue_capped.RULE, visits)


# ttft-slow


def first_tokens(slow: float, late: float = 2.0, prompt: float = 1024, **more: Any) -> tuple[Snapshot, ...]:
    """Return visits in which a share *slow* of ten requests a second took *late* seconds, the others 0.2."""

    def times(i: int) -> dict[str, Any]:
        count = 1000.0 + i * 150
        fast = histogram(0.2, count * (1 - slow), FIRST_BOUNDS)
        tail = histogram(late, count * slow, FIRST_BOUNDS)
        both = tuple(a + b for a, b in zip(fast.counts, tail.counts, strict=True))
        return {"time_to_first_token_seconds": Histogram(bounds=fast.bounds, counts=both, sum=fast.sum + tail.sum)}

    return paged(loaded("hgx-h100-8", prompt=prompt, **more), times)


def test_one_in_ten_first_tokens_late_is_slow() -> None:
    finding = one(ttft_slow.RULE, first_tokens(0.10))
    assert finding.severity is Severity.WARNING
    assert "10% of 6000 requests waited more than 0.5 s" in finding.summary


def test_queue_and_prefill_are_told_apart() -> None:
    visits = paged(
        first_tokens(0.10),
        lambda i: {
            "queue_seconds": histogram(0.3, 1000.0 + i * 150, FIRST_BOUNDS),
            "prefill_seconds": histogram(0.08, 1000.0 + i * 150, FIRST_BOUNDS),
        },
    )
    finding = one(ttft_slow.RULE, visits)
    assert "0.30 s of it in the queue, 0.08 s in prefill" in finding.summary
    assert finding.facts["larger-part"] == "queue"


def test_long_prompts_are_physics() -> None:
    """Document 3's model reads a prompt of 16,000 tokens in 0.7 s on eight H100."""
    finding = one(ttft_slow.RULE, first_tokens(1.0, late=0.7, prompt=16000))
    assert finding.severity is Severity.NOTICE


def test_a_slow_minority_below_the_p95_is_quiet() -> None:
    assert quiet(ttft_slow.RULE, first_tokens(0.04))


def test_a_slow_past_is_past() -> None:
    """The first requests since the start were slow; within the window none was."""
    old = histogram(8.0, 500.0, FIRST_BOUNDS)
    visits = paged(
        loaded("hgx-h100-8"),
        lambda i: {
            "time_to_first_token_seconds": Histogram(
                bounds=old.bounds,
                counts=tuple(
                    n + (150.0 * i if b >= 0.2 else 0) for n, b in zip(old.counts, (*old.bounds, 99), strict=True)
                ),
                sum=old.sum + 30.0 * i,
            )
        },
    )
    assert quiet(ttft_slow.RULE, visits)


def test_few_requests_have_no_p95() -> None:
    visits = paged(
        loaded("hgx-h100-8"), lambda i: {"time_to_first_token_seconds": histogram(5.0, 1.0 * i, FIRST_BOUNDS)}
    )
    assert nodes.found(ttft_slow.RULE, visits) == ()
    assert "fewer than the 100" in str(nodes.why_blind(ttft_slow.RULE, visits))


# context-overprovisioned


def test_a_promise_that_could_take_the_whole_cache() -> None:
    visits = flagged(loaded("hgx-h100-8", kv_cache_tokens=200_000.0), max_model_len=131072)
    finding = one(context_overprovisioned.RULE, visits)
    assert finding.severity is Severity.NOTICE
    assert "66% of the KV cache" in finding.summary
    assert finding.facts["max-model-len"] == "11000"


@pytest.mark.parametrize(
    "visits",
    [
        flagged(loaded("hgx-h100-8", kv_cache_tokens=2_000_000.0), max_model_len=131072),
        flagged(loaded("hgx-h100-8", kv_cache_tokens=40_000.0), max_model_len=32768),
        flagged(loaded("hgx-h100-8", kv_cache_tokens=200_000.0, prompt=60_000), max_model_len=131072),
    ],
    ids=["the cache holds many such", "hardly longer than the requests", "requests are long"],
)
def test_a_promise_that_harms_nobody_is_quiet(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(context_overprovisioned.RULE, visits)


def test_a_thousand_requests_are_asked_for() -> None:
    visits = flagged(
        loaded("hgx-h100-8", kv_cache_tokens=200_000.0, request_prompt_tokens=histogram(100, 900)), max_model_len=131072
    )
    assert nodes.found(context_overprovisioned.RULE, visits) == ()
    assert "900 requests are fewer" in str(nodes.why_blind(context_overprovisioned.RULE, visits))


# speculation-ineffective


def drafting(share: float, per_token: float = 1.0, **more: Any) -> tuple[Snapshot, ...]:
    """Return visits in which *share* of the generated tokens were accepted drafts, of *per_token* drafted a token."""

    def fields(i: int) -> dict[str, Any]:
        tokens = 1e6 + i * 20_000
        return {
            "generation_tokens_total": tokens,
            "draft_tokens_total": tokens * per_token,
            "accepted_tokens_total": tokens * share,
        }

    return paged(loaded("hgx-h100-8", **more), fields)


def test_drafts_that_are_refused_gain_nothing() -> None:
    """A tenth of the tokens came without a step: 1 / 0.9 = 11 % more a step."""
    finding = one(speculation_ineffective.RULE, drafting(0.10))
    assert finding.severity is Severity.NOTICE
    assert "at most 11% more tokens a step" in finding.summary


def test_drafts_that_are_accepted_are_quiet() -> None:
    assert quiet(speculation_ineffective.RULE, drafting(0.40))


def test_an_engine_that_does_not_speculate_is_quiet() -> None:
    assert quiet(speculation_ineffective.RULE, loaded("hgx-h100-8"))


def test_few_drafts_are_not_judged() -> None:
    visits = drafting(0.0, per_token=0.001)
    assert nodes.found(speculation_ineffective.RULE, visits) == ()
    assert "too few" in str(nodes.why_blind(speculation_ineffective.RULE, visits))


def test_an_engine_that_speculates_without_counters_is_not_judged() -> None:
    visits = flagged(loaded("hgx-h100-8", draft_tokens_total=Absent(Why.NOT_PRESENT)), speculative="mtp")
    assert nodes.why_blind(speculation_ineffective.RULE, visits) is not None


# prefix-cache-cold


def cached(before: float, now: float, per_visit: float = 100_000.0) -> tuple[Snapshot, ...]:
    return paged(
        loaded("hgx-h100-8", visits=41),
        lambda i: {
            "prefix_cache_queries_total": 10e6 + i * per_visit,
            "prefix_cache_hits_total": 10e6 * before + i * per_visit * now,
        },
    )


def test_prompts_that_were_found_and_no_longer_are() -> None:
    finding = one(prefix_cache_cold.RULE, cached(0.8, 0.1))
    assert finding.severity is Severity.NOTICE
    assert "found 10% of the prompt tokens" in finding.summary
    assert "80% before" in finding.summary


@pytest.mark.parametrize(
    "visits", [cached(0.0, 0.0), cached(0.4, 0.1), cached(0.8, 0.6)], ids=["share nothing", "never warm", "still warm"]
)
def test_prompts_that_share_nothing_are_no_fault(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(prefix_cache_cold.RULE, visits)


def test_few_prompts_say_nothing_about_the_cache() -> None:
    assert nodes.why_blind(prefix_cache_cold.RULE, cached(0.8, 0.0, per_visit=100.0)) is not None


# concurrency-ceiling

CROWD = {"running": 48.0, "waiting": 12.0}
INT4 = {
    "quantization_method": "awq",
    "quantization_weight_bits": 4,
    "quantization_group_size": 128,
    "weights_bytes": Absent(Why.NOT_ASKED),
}


def alone(profile: str, tp: int = 1, **more: Any) -> tuple[Snapshot, ...]:
    visits = loaded(profile, tp=tp, **more)
    return nodes.each(visits, lambda s: nodes.with_engine(s, **{f"model__{n}": v for n, v in INT4.items()}))


def test_sixty_users_on_one_gpu_are_too_many() -> None:
    finding = one(concurrency_ceiling.RULE, alone("hgx-h100-8", **CROWD))
    assert finding.severity is Severity.NOTICE
    assert "60 requests at once" in finding.summary


@pytest.mark.parametrize(
    "visits",
    [
        alone("hgx-h100-8", tp=2, **CROWD),
        alone("hgx-h200-8", **CROWD),
        alone("hgx-h100-8", running=40.0, waiting=5.0),
        paged(alone("hgx-h100-8", **CROWD), lambda i: CROWD if i > 40 else {"running": 20.0, "waiting": 0.0}),
        nodes.each(alone("hgx-h100-8", **CROWD), lambda s: nodes.with_engine(s, model__layers=8)),
    ],
    ids=["two GPUs", "an H200", "fewer users", "a peak", "a small model"],
)
def test_what_the_document_does_not_speak_of_is_quiet(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(concurrency_ceiling.RULE, visits)


# cold-first-request


def warming(first: float, later: float, before: float = 0.0, follow: float = 10.0) -> tuple[Snapshot, ...]:
    def times(i: int) -> dict[str, Any]:
        if i == 0:
            return {"time_to_first_token_seconds": histogram(1.0, before, FIRST_BOUNDS)}
        cold = histogram(first, 1.0, FIRST_BOUNDS)
        warm = histogram(later, follow * (i - 1), FIRST_BOUNDS)
        counts = tuple(a + b for a, b in zip(cold.counts, warm.counts, strict=True))
        return {
            "time_to_first_token_seconds": Histogram(
                bounds=FIRST_BOUNDS, counts=counts, sum=cold.sum + warm.sum + before
            )
        }

    return paged(loaded("hgx-h100-8", visits=8), times)


def test_a_first_request_that_took_seconds() -> None:
    finding = one(cold_first_request.RULE, warming(9.0, 0.2))
    assert finding.severity is Severity.NOTICE
    assert finding.confidence is Confidence.HIGH
    assert "The first 1 requests waited 9.0 s" in finding.summary


@pytest.mark.parametrize("visits", [warming(0.9, 0.1), warming(4.0, 2.0)], ids=["not a second", "all alike"])
def test_a_first_request_like_the_rest_is_quiet(visits: tuple[Snapshot, ...]) -> None:
    assert quiet(cold_first_request.RULE, visits)


def test_an_engine_that_was_warm_before_it_was_watched_is_quiet() -> None:
    assert quiet(cold_first_request.RULE, warming(9.0, 0.2, before=500.0))


def test_an_engine_without_a_request_is_not_judged() -> None:
    assert nodes.why_blind(cold_first_request.RULE, warming(9.0, 0.2)[:1]) is not None
