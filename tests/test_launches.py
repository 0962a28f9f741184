"""What an engine will refuse is told before it does; what it has shown to work is never contradicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import launches
import nodes
import pytest
from launches import AWQ, BLOCK_FP8, QWEN_72B, Visits, changed, died, gone, launch
from nodes import one, quiet

from doctor.diagnose import watch
from doctor.feeds import evidence
from doctor.report import Report
from doctor.rule import AnyRule, Confidence, Severity
from doctor.snapshot import Absent, Source, Why
from rules import (
    RULES,
    context_does_not_fit,
    fp8_block_misaligned,
    model_does_not_fit,
    quantization_mismatch,
    tp_heads_indivisible,
)

REFUSED: dict[str, tuple[AnyRule, Visits]] = {
    "heads": (tp_heads_indivisible.RULE, launch(tp=6)),
    "KV heads": (tp_heads_indivisible.RULE, launch(tp=6, attention_heads=96, kv_heads=8, intermediate_size=28680)),
    "blocks": (fp8_block_misaligned.RULE, launch(tp=4, **QWEN_72B | BLOCK_FP8)),
    "flag": (quantization_mismatch.RULE, launch(flags={"quantization": "gptq"}, **AWQ)),
    "context": (context_does_not_fit.RULE, launch(tp=2, flags={"gpu_memory_utilization": 0.9})),
    "weights": (model_does_not_fit.RULE, launch(tp=1)),
}
REFUSALS = pytest.mark.parametrize(("rule", "visits"), REFUSED.values(), ids=REFUSED)


@REFUSALS
def test_a_launch_that_must_fail_is_told_before_it_fails(rule: AnyRule, visits: Visits) -> None:
    finding = one(rule, visits)
    assert finding.severity is Severity.CRITICAL
    assert finding.confidence is Confidence.MEDIUM
    places = [piece.where for piece in finding.evidence if piece.source == Source.MODEL.value]
    assert places
    assert all(place.startswith(launches.FOLDER) for place in places)


@REFUSALS
def test_one_launch_has_one_root_cause(rule: AnyRule, visits: Visits) -> None:
    report = nodes.report(visits, RULES)
    assert [root.finding.failure_mode for root in report.roots if root.finding.severity is Severity.CRITICAL] == [
        rule.id
    ]


@REFUSALS
def test_an_engine_that_serves_refutes_the_prediction(rule: AnyRule, visits: Visits) -> None:
    came_up = nodes.last(visits, lambda s: nodes.with_lines(s, nodes.line("startup-complete", number=5)))
    assert quiet(rule, came_up)
    page = nodes.healthy("hgx-h100-8")[0].metrics
    answered = (nodes.put(visits[0], metrics=page), *visits[1:])
    assert quiet(rule, answered)


@REFUSALS
def test_an_engine_that_has_run_for_hours_refutes_it(rule: AnyRule, visits: Visits) -> None:
    assert quiet(rule, nodes.each(visits, lambda s: nodes.with_engine(s, started_at=nodes.START - 8000.0)))


@REFUSALS
def test_the_same_command_that_has_served_refutes_it(rule: AnyRule, visits: Visits) -> None:
    """A service that is started again with what ran before."""
    first = nodes.put(visits[0], metrics=nodes.healthy("hgx-h100-8")[0].metrics, engine_events=())
    again = [nodes.with_engine(s, pid=4000, started_at=s.at - 20, log="/var/log/other.log") for s in visits[1:]]
    assert nodes.found(rule, (first, *again)) == ()


@REFUSALS
def test_an_engine_that_died_without_saying_why_is_told_all_the_same(rule: AnyRule, visits: Visits) -> None:
    report = nodes.report(gone(visits, died()), RULES)
    causes = {f.finding.failure_mode: f.caused_by for f in report.findings}
    assert causes[rule.id] == ()
    assert causes["engine-crashed"] == (rule.id,)


@REFUSALS
def test_an_engine_that_was_stopped_is_past(rule: AnyRule, visits: Visits) -> None:
    stop = nodes.line("shutdown", "Shutting down", number=98, at=nodes.START + 30)
    assert nodes.found(rule, gone(visits, stop)) == ()


@REFUSALS
def test_an_engine_that_died_of_something_else_is_not_told_twice(rule: AnyRule, visits: Visits) -> None:
    words = nodes.line("launch-error", "Address already in use", number=98, at=nodes.START + 30, kind="port-in-use")
    report = nodes.report(gone(visits, words), RULES)
    assert [root.finding.failure_mode for root in report.roots if root.finding.severity is Severity.CRITICAL] == [
        "launch-refused"
    ]


@REFUSALS
def test_an_engine_that_was_replaced_is_past(rule: AnyRule, visits: Visits) -> None:
    """The unit started another command, which serves."""
    replaced = nodes.last(
        changed(nodes.healthy("hgx-h100-8")),
        lambda s: nodes.with_metrics(nodes.with_engine(s, pid=7, started_at=s.at - 5), engine=f"7@{s.at - 5:.0f}"),
    )
    assert nodes.found(rule, (*visits[:-1], replaced[-1])) == ()


@pytest.mark.parametrize("rule", [rule for rule, _ in REFUSED.values()], ids=list(REFUSED))
def test_a_config_that_was_not_seen_is_no_answer(rule: AnyRule) -> None:
    unseen = Absent(Why.NO_PERMISSION, "config.json could not be read")
    fields = ("attention_heads", "quantization_method", "model_type", "max_position_embeddings")
    visits = launch(flags={"quantization": "fp8"}, **dict.fromkeys(fields, unseen))
    assert nodes.found(rule, visits) == ()
    assert nodes.why_blind(rule, visits) is not None


@pytest.mark.parametrize("rule", {rule.id: rule for rule, _ in REFUSED.values()}.values(), ids=lambda r: r.id)
@pytest.mark.parametrize("profile", nodes.PROFILES)
def test_a_healthy_node_is_quiet(rule: AnyRule, profile: str) -> None:
    assert nodes.found(rule, nodes.healthy(profile)) == ()


# The numbers


def test_the_sizes_that_would_do_are_named() -> None:
    """64 heads, 8 KV heads and 28672 = 2¹² × 7: one to four ranks in powers of two, and 8."""
    assert one(tp_heads_indivisible.RULE, launch(tp=6)).summary.endswith("1, 2, 4, 8 would do")


def test_the_heads_are_told_of_a_model_that_the_arithmetic_does_not_know() -> None:
    assert (
        "40 attention heads"
        in one(tp_heads_indivisible.RULE, launch(model_type="other", attention_heads=40, tp=3)).summary
    )
    assert (
        "40 attention heads"
        in one(tp_heads_indivisible.RULE, launch(model_type="other", attention_heads=40, tp=6)).summary
    )


def test_an_assertion_without_words_is_explained_by_the_heads() -> None:
    last = nodes.line("exception", "AssertionError", number=98, at=nodes.START + 30, type="AssertionError", message="")
    finding = one(tp_heads_indivisible.RULE, gone(launch(tp=6), last))
    assert finding.evidence[-1].where == "vllm.log:98"


def test_the_narrower_size_that_keeps_whole_blocks_is_named() -> None:
    """Document 3: 29568 = 231 × 128 is whole on one GPU only."""
    finding = one(fp8_block_misaligned.RULE, launch(tp=4, **QWEN_72B | BLOCK_FP8))
    assert "29568 / 4 GPUs = 7392, which is not a multiple of 128" in finding.summary
    assert finding.facts["tensor-parallel-size"] == "1"


def test_groups_are_a_warning_since_later_kernels_may_take_them() -> None:
    finding = one(fp8_block_misaligned.RULE, launch(tp=4, **QWEN_72B | AWQ))
    assert (finding.severity, finding.confidence) == (Severity.WARNING, Confidence.LOW)


@pytest.mark.parametrize(
    "visits",
    [
        launch(tp=4, **QWEN_72B | {"quantization_method": "fp8", "quantization_weight_bits": 8}),
        launch(tp=1, profile="hgx-h200-8", **QWEN_72B | BLOCK_FP8),
        launch(tp=4, **BLOCK_FP8),
        launch(tp=4, **QWEN_72B | {"intermediate_size": 29696} | AWQ),
    ],
    ids=["per tensor", "one rank", "28672", "padded"],
)
def test_whole_blocks_are_quiet(visits: Visits) -> None:
    assert quiet(fp8_block_misaligned.RULE, visits)


def test_a_context_that_needs_more_than_is_left() -> None:
    """70B in BF16 on 2 × H100: 131072 × 163,840 bytes = 20 GiB a GPU; 76.2 − 70.6 − 1.5 GB = 3.9 GiB at best."""
    finding = one(context_does_not_fit.RULE, launch(tp=2, flags={"gpu_memory_utilization": 0.9}))
    assert "needs 20.0 GiB of KV cache a GPU" in finding.summary
    assert "leave 3.9 GiB at best" in finding.summary
    assert finding.facts["max-model-len"] == "12288"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"max_model_len": 16384}, "too close to tell"),  # 4,000 are expected to fit, 25,000 at best
        ({"kv_cache_dtype": "turbo"}, "KV cache type turbo"),
        ({"pipeline_parallel_size": 2}, "pipeline"),
    ],
)
def test_what_the_runtime_decides_can_not_be_told(flags: dict[str, Any], words: str) -> None:
    visits = launch(tp=2, flags={"gpu_memory_utilization": 0.9} | flags)
    assert nodes.found(context_does_not_fit.RULE, visits) == ()
    assert words in str(nodes.why_blind(context_does_not_fit.RULE, visits))


@pytest.mark.parametrize("arguments", [("--decode-context-parallel-size", "2"), ("--kv-cache-memory-bytes=9G",)])
def test_flags_beyond_the_arithmetic_can_not_be_told(arguments: tuple[str, ...]) -> None:
    visits = nodes.each(launch(tp=2), lambda s: nodes.with_engine(s, command_line=("vllm", "serve", "m", *arguments)))
    assert nodes.found(context_does_not_fit.RULE, visits) == ()
    assert nodes.why_blind(context_does_not_fit.RULE, visits) is not None


@pytest.mark.parametrize(
    "visits",
    [
        launch(tp=4),
        launch(tp=2, flags={"max_model_len": 2048, "gpu_memory_utilization": 0.9}),
        launch(tp=2, flags={"max_model_len": -1}),
        nodes.each(
            launch(tp=2, flags={"max_model_len": Absent(Why.NOT_GIVEN)}),
            lambda s: nodes.with_engine(s, command_line=("vllm", "serve", "m", "--max-model-len", "auto")),
        ),
    ],
    ids=["four ranks", "short", "-1", "auto"],
)
def test_a_context_that_fits_is_quiet(visits: Visits) -> None:
    assert quiet(context_does_not_fit.RULE, visits)


@pytest.mark.parametrize(
    ("flag", "model", "fires"),
    [
        ("awq_marlin", AWQ, False),
        ("moe_wna16", AWQ, False),
        ("awq", AWQ, False),
        ("fp8", AWQ, True),
        ("fp8", BLOCK_FP8, False),
        ("fp8", {}, False),
        ("fp8", {"quantization_method": "compressed-tensors"}, True),
        ("gptq", {}, True),
        ("bitsandbytes", {}, False),
        ("a-plugin-s-own", AWQ, False),
    ],
)
def test_the_flag_is_compared_with_the_checkpoint(flag: str, model: dict[str, Any], fires: bool) -> None:
    found = nodes.found(quantization_mismatch.RULE, launch(flags={"quantization": flag}, **model))
    assert bool(found) is fires


def test_a_pasted_config_does_not_show_the_files_beside_it() -> None:
    finding = one(quantization_mismatch.RULE, launch(flags={"quantization": "awq"}, weights_bytes=launches.NO_WEIGHTS))
    assert (finding.severity, finding.confidence) == (Severity.WARNING, Confidence.LOW)


# The engine's own words: each refusal has one reason

WORKER = "(Worker_TP0 pid=100) ERROR 11-20 08:00:00 [multiproc_executor.py:500] "
CORE = "(EngineCore pid=9) ERROR 11-20 08:00:00 [core.py:700] "
FRONT = "(APIServer pid=1)   Value error, "
DEAD = (
    CORE + "EngineCore failed to start.\n(APIServer pid=1) RuntimeError: Engine core initialization failed. "
    "See root cause above. Failed core proc(s): {'EngineCore': 1}\n"
)
MARLIN = (
    "(EngineCore pid=9) WARNING 11-20 08:00:00 [marlin_utils_fp8.py:1] Your GPU does not have native support for FP8 "
    "computation but FP8 quantization is being used. Weight-only FP8 compression will be used leveraging the Marlin kernel.\n"
)


def triaged(tmp_path: Path, log: str) -> Report:
    path = tmp_path / "vllm.log"
    path.write_text("INFO 11-20 07:59:00 [api_server.py:900] vLLM API server version 0.22.1\n" + log)
    return list(watch(evidence.read([path], now=1795254000.0), RULES, keep=3600))[-1]


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (WORKER + "RuntimeError: size_n = 2736 is not divisible by tile_n_size = 64\n" + DEAD, "tp-heads-indivisible"),
        (CORE + "RuntimeError: size_n = 2 is not divisible by tile_n_size = 64\n" + DEAD, "quantization-mismatch"),
        (MARLIN + CORE + "RuntimeError: size_n = 2 is not divisible by tile_n_size = 64\n" + DEAD, "quantization-mismatch"),
        (
            WORKER + "ValueError: Weight input_size_per_partition = 7392 is not divisible by min_thread_k = 128.\n" + DEAD,
            "tp-heads-indivisible",
        ),
        (
            WORKER + "ValueError: Weight output_size_per_partition = 4304 is not divisible by  min_thread_n = 64.\n" + DEAD,
            "tp-heads-indivisible",
        ),
        (
            WORKER + "ValueError: Weight input_size_per_partition = 7392 is not divisible by group_size = 128.\n" + DEAD,
            "fp8-block-misaligned",
        ),
        (
            WORKER + "ValueError: The input size is not aligned with the quantized weight shape.\n" + DEAD,
            "fp8-block-misaligned",
        ),
        (
            WORKER + "ValueError: Weight output_partition_size = 80 is not divisible by weight quantization block_n = 128.\n"
            + DEAD,
            "fp8-block-misaligned",
        ),
        (FRONT + "torch.bfloat16 is not supported for quantization method awq. Supported dtypes: [torch.float16]\n", "dtype-unsuited"),
        (CORE + "ValueError: torch.bfloat16 is not supported for quantization method gptq.\n" + DEAD, "dtype-unsuited"),
        (FRONT + "The model type 'gemma3' does not support float16. Reason: Numerical instability.\n", "dtype-unsuited"),
        (FRONT + "Bfloat16 is only supported on GPUs with compute capability of at least 8.0.\n", "dtype-unsuited"),
        (FRONT + "Unknown quantization method: mxfp9. Must be one of ['awq'].\n", "quantization-mismatch"),
        (FRONT + "User-specified max_model_len (9000) is greater than the derived max_model_len\n", "launch-refused"),
    ],
)  # fmt: skip
def test_a_refusal_is_told_by_one_rule(tmp_path: Path, log: str, expected: str) -> None:
    roots = [root.finding for root in triaged(tmp_path, log).roots if root.finding.severity is not Severity.NOTICE]
    assert [finding.failure_mode for finding in roots] == [expected]


@pytest.mark.parametrize(
    ("dtype", "words", "better"),
    [
        ("bfloat16", "torch.bfloat16 is not supported for quantization method awq.", "float16"),
        ("float16", "torch.float16 is not supported for quantization method x.", "bfloat16"),
    ],
)
def test_the_other_type_is_what_helps(tmp_path: Path, dtype: str, words: str, better: str) -> None:
    finding = triaged(tmp_path, FRONT + words + "\n").findings[0].finding
    assert f"refuses {dtype} " in finding.summary
    assert finding.facts["dtype"] == better


def test_a_command_and_a_config_are_judged_before_there_is_a_log(tmp_path: Path) -> None:
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 5120, "intermediate_size": 13824,
        "num_hidden_layers": 40, "num_attention_heads": 40, "num_key_value_heads": 40, "vocab_size": 32000,
    }  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "command.txt").write_text("vllm serve meta-llama/Llama-2-13b-hf --tensor-parallel-size 3\n")
    files = [tmp_path / "config.json", tmp_path / "command.txt"]
    report = list(watch(evidence.read(files, now=1795254000.0), RULES, keep=3600))[-1]
    first = report.findings[0].finding
    assert first.failure_mode == "tp-heads-indivisible"
    assert "40 attention heads can't be divided among 3 GPUs" in first.summary
