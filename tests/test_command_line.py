"""A command line says what an engine was asked for, in every way in which people write it."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.readers import command_line
from doctor.readers.vllm_flags import ALIASES, FLAGS, SWITCHES
from doctor.snapshot import Absent, EngineFlags, Why, known

SAMPLES = Path(__file__).parent.parent.parent / "shared" / "samples" / "live"
COMMANDS = sorted(SAMPLES.glob("v*/*/cmd.txt"))


def flags(line: str) -> EngineFlags:
    return command_line.read(shlex.split(line))


@pytest.mark.parametrize(
    "line",
    [
        "vllm serve org/model --tensor-parallel-size 4",
        "vllm serve org/model --tensor-parallel-size=4",
        "vllm serve org/model --tensor_parallel_size 4",
        "vllm serve org/model -tp 4",
        "vllm serve org/model -tp=4",
        "vllm serve --tensor-parallel 4 org/model",
        "vllm serve org/model -tp 2 -tp 4",
        "vllm serve --enforce-eager org/model -tp 4",
        "/opt/venv/bin/python3 /opt/venv/bin/vllm serve org/model -tp 4",
        "python -m vllm.entrypoints.openai.api_server --model org/model -tp 4",
        "docker run --gpus all -p 8000:8000 vllm/vllm-openai:v0.11.0 --model org/model -tp 4",
    ],
)
def test_the_same_wish_is_read_in_every_spelling(line: str) -> None:
    read = flags(line)
    assert (read.model, read.tensor_parallel_size, read.unknown) == ("org/model", 4, ())


def test_values_have_their_types() -> None:
    read = flags(
        "vllm serve m --max-model-len 16k --max-num-seqs 1K --max-num-batched-tokens 8192 --gpu-memory-utilization .95 --port 8000 "
        "--no-enable-prefix-caching -ep --quantization fp8 --kv-cache-dtype fp8_e4m3 --dtype bfloat16 --disable-custom-all-reduce "
        """--speculative-config '{"method": "mtp", "num_speculative_tokens": 1}' --host 0.0.0.0"""
    )
    assert (read.max_model_len, read.max_num_seqs, read.max_num_batched_tokens) == (16000, 1024, 8192)
    assert (read.gpu_memory_utilization, read.port, read.host) == (0.95, 8000, "0.0.0.0")
    assert (read.enable_prefix_caching, read.expert_parallel, read.disable_custom_all_reduce) == (False, True, True)
    assert (read.quantization, read.kv_cache_dtype, read.dtype, read.speculative) == (
        "fp8",
        "fp8_e4m3",
        "bfloat16",
        "mtp",
    )


def test_what_was_not_asked_for_is_not_given_and_what_a_file_may_set_is_not_known() -> None:
    left_out = flags("vllm serve m").tensor_parallel_size
    assert isinstance(left_out, Absent)
    assert left_out.why is Why.NOT_GIVEN
    in_file = flags("vllm serve m --config serve.yaml").tensor_parallel_size
    assert isinstance(in_file, Absent)
    assert in_file.why is Why.NOT_ASKED
    assert "serve.yaml" in in_file.detail


def test_a_flag_of_no_release_is_told() -> None:
    assert flags("vllm serve m --frobnicate 3 --compilation-config.mode 3 -O3 --served-model-name a b").unknown == (
        "--frobnicate",
    )


def test_a_value_that_is_no_number_is_absent() -> None:
    assert not known(flags("vllm serve m -tp many").tensor_parallel_size)


@pytest.mark.parametrize(
    ("line", "kind", "size", "length"),
    [
        ("python -m sglang.launch_server --model-path m --tp 8 --context-length 32768", "sglang", 8, 32768),
        ("trtllm-serve m --tp_size 4 --max_seq_len 8192", "tensorrt-llm", 4, 8192),
        ("text-generation-launcher --model-id m --num-shard 2 --max-total-tokens 4096", "tgi", 2, 4096),
        ("llama-server -m m -c 4096", "llama.cpp", None, 4096),
    ],
)
def test_other_engines_are_named_and_read_as_far_as_their_flags_mean_the_same(
    line: str, kind: str, size: int | None, length: int
) -> None:
    command = command_line.read_shell(line)
    assert command is not None
    assert (command.kind, command.flags.model, command.flags.max_model_len) == (kind, "m", length)
    assert command.flags.tensor_parallel_size == size or not known(command.flags.tensor_parallel_size)
    assert command.flags.unknown == ()


@pytest.mark.parametrize(
    "line", ["vllm bench serve --model m", "vllm collect-env", "nvidia-smi -q", "python train.py", ""]
)
def test_a_command_that_serves_nothing_is_no_engine(line: str) -> None:
    assert command_line.read_shell(line) is None


def test_a_command_is_found_in_a_text_with_its_variables_and_continued_lines() -> None:
    text = b"we run\n$ CUDA_VISIBLE_DEVICES=0,1 NCCL_DEBUG=INFO vllm serve org/m \\\n    -tp 2 \\\n    --max-model-len 4096\nand it hangs\n"
    ((start, end),) = command_line.find(text)
    command = command_line.read_shell(text[start:end].decode())
    assert command is not None
    assert command.environment == {"CUDA_VISIBLE_DEVICES": "0,1", "NCCL_DEBUG": "INFO"}
    assert (command.flags.tensor_parallel_size, command.flags.max_model_len) == (2, 4096)


def test_variables_that_docker_sets_count() -> None:
    command = command_line.read_shell("docker run -e NCCL_P2P_DISABLE=1 --env VLLM_USE_V1=0 vllm/vllm-openai --model m")
    assert command is not None
    assert command.environment == {"NCCL_P2P_DISABLE": "1", "VLLM_USE_V1": "0"}


def test_the_table_of_flags_is_consistent() -> None:
    assert SWITCHES < FLAGS
    assert set(ALIASES.values()) <= FLAGS
    assert not [flag for flag in FLAGS if flag.startswith(("-", "no-")) or "_" in flag]


@pytest.mark.skipif(not COMMANDS, reason="the folder of public samples is not beside the checkout")
@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.parent.name)
def test_every_live_command_is_read_and_only_the_wrong_one_has_an_unknown_flag(path: Path) -> None:
    text = path.read_bytes()
    ((start, end), *_) = command_line.find(text)
    command = command_line.read_shell(text[start:end].decode())
    assert command is not None
    assert command.kind == "vllm"
    assert str(command.flags.model).startswith(("/srv/", "/models/"))
    assert command.flags.unknown == (("--frobnicate",) if path.parent.name == "err_unknown_flag" else ())


WORDS = st.sampled_from(
    [
        "vllm",
        "serve",
        "-tp",
        "--port",
        "=",
        "--speculative-config",
        "{",
        "'",
        '"',
        "\\",
        "--no-",
        "--config",
        "1e9k",
        "-",
        "--",
    ]
)


@settings(max_examples=200, deadline=None)
@given(st.lists(WORDS | st.text(max_size=8), max_size=20))
def test_no_arguments_raise(arguments: list[str]) -> None:
    command_line.read(arguments)
    command_line.read_shell("vllm serve " + " ".join(arguments))
    for start, end in command_line.find(" ".join(arguments).encode("utf-8", "replace")):
        assert start < end
