"""An engine's metrics page is read whichever generation of names it has."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from doctor.readers import vllm_metrics
from doctor.snapshot import EngineMetrics, known

SAMPLES = Path(__file__).parent.parent.parent / "shared" / "samples" / "live"
PAGES = sorted(SAMPLES.glob("v*/**/*.prom"))

OLD = """\
# HELP vllm:num_requests_running Number of requests currently running on GPU.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{model_name="m"} 3.0
vllm:num_requests_waiting{model_name="m"} 1.0
vllm:gpu_cache_usage_perc{model_name="m"} 0.25
vllm:gpu_prefix_cache_queries_total{model_name="m"} 10.0
vllm:gpu_prefix_cache_hits_total{model_name="m"} 4.0
vllm:request_success_total{finished_reason="stop",model_name="m"} 5.0
vllm:request_success_total{finished_reason="abort",model_name="m"} 2.0
vllm:time_per_output_token_seconds_bucket{le="0.01",model_name="m"} 1.0
vllm:time_per_output_token_seconds_bucket{le="+Inf",model_name="m"} 2.0
vllm:time_per_output_token_seconds_sum{model_name="m"} 0.5
vllm:cache_config_info{block_size="16",cache_dtype="auto",num_gpu_blocks="100"} 1.0
"""


def page(text: str) -> EngineMetrics:
    metrics = vllm_metrics.read(text, engine="e", at=1.0)
    assert metrics is not None
    return metrics


def test_the_first_generation_of_names_fills_the_same_fields() -> None:
    metrics = page(OLD)
    assert (metrics.running, metrics.waiting, metrics.kv_cache_usage_ratio) == (3, 1, 0.25)
    assert (metrics.prefix_cache_queries_total, metrics.prefix_cache_hits_total) == (10, 4)
    assert metrics.requests_succeeded_total == 5
    assert (metrics.kv_cache_tokens, metrics.model) == (1600, "m")
    assert known(metrics.inter_token_seconds)
    assert (metrics.inter_token_seconds.bounds, metrics.inter_token_seconds.counts) == ((0.01,), (1, 2))
    assert not known(metrics.draft_tokens_total)


def test_data_parallel_engines_are_summed_and_the_fullest_cache_counts() -> None:
    metrics = page(
        "".join(
            f'vllm:num_requests_running{{engine="{e}",model_name="m"}} {e + 1}.0\n'
            f'vllm:kv_cache_usage_perc{{engine="{e}",model_name="m"}} 0.{e + 1}\n'
            f'vllm:request_queue_time_seconds_bucket{{engine="{e}",le="0.3",model_name="m"}} {e}.0\n'
            f'vllm:request_queue_time_seconds_bucket{{engine="{e}",le="+Inf",model_name="m"}} 5.0\n'
            for e in range(3)
        )
    )
    assert (metrics.running, metrics.kv_cache_usage_ratio) == (6, 0.3)
    assert known(metrics.queue_seconds)
    assert metrics.queue_seconds.counts == (3, 15)


def test_the_present_name_wins_over_the_old_one() -> None:
    both = 'vllm:gpu_cache_usage_perc{model_name="m"} 0.9\nvllm:kv_cache_usage_perc{model_name="m"} 0.1\n'
    assert page(both).kv_cache_usage_ratio == 0.1


def test_broken_lines_cost_only_themselves() -> None:
    metrics = page(
        'vllm:num_requests_running{model_name="m"} three\nvllm:num_requests_waiting{model="\nvllm:num_preemptions_total{} 4\n'
    )
    assert metrics.preemptions_total == 4
    assert not known(metrics.running)


def test_a_page_of_another_program_is_none() -> None:
    assert vllm_metrics.read("# HELP up x\n# TYPE up gauge\nup 1\n", engine="e", at=1.0) is None


@pytest.mark.skipif(not PAGES, reason="the folder of public samples is not beside the checkout")
@pytest.mark.parametrize("path", PAGES[::4], ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_live_page_is_read_as_prometheus_reads_it(path: Path) -> None:
    text = path.read_text()
    if "openmetrics" in path.name:
        pytest.skip("the other parser reads the text format only")
    samples: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.labels.get("finished_reason") not in {"abort", "error"} and "le" not in sample.labels:
                samples[sample.name] = samples.get(sample.name, 0.0) + sample.value
    metrics = page(text)
    assert metrics.running == samples["vllm:num_requests_running"]
    assert metrics.steps_total == samples["vllm:iteration_tokens_total_count"]
    assert metrics.generation_tokens_total == samples["vllm:generation_tokens_total"]
    assert metrics.requests_succeeded_total == samples["vllm:request_success_total"]
    assert known(metrics.time_to_first_token_seconds)
    assert metrics.time_to_first_token_seconds.counts[-1] == samples["vllm:time_to_first_token_seconds_count"]
    assert metrics.time_to_first_token_seconds.sum == samples["vllm:time_to_first_token_seconds_sum"]
    assert list(vllm_metrics.find(text.encode())) == [(0, len(text.encode()))]


@pytest.mark.skipif(not PAGES, reason="the folder of public samples is not beside the checkout")
def test_openmetrics_gives_the_same_as_the_text_format() -> None:
    folder = next(SAMPLES.glob("v*/normal_tiny"))
    plain, open_metrics = (
        page((folder / name).read_text()) for name in ("metrics_idle.prom", "metrics_idle_openmetrics.prom")
    )
    assert plain == open_metrics


LINES = st.sampled_from([*OLD.splitlines(), "vllm:", "vllm:num_requests_running{", '{le="', "} 1e999", "# EOF"])


@settings(max_examples=150, deadline=None)
@given(st.lists(LINES | st.text(max_size=20), max_size=30).map("\n".join))
def test_no_text_raises(text: str) -> None:
    vllm_metrics.read(text, engine="e", at=1.0)
    data = text.encode("utf-8", "replace")
    for start, end in vllm_metrics.find(data):
        assert 0 <= start < end <= len(data)
