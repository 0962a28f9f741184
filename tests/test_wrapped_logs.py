"""What journals, containers and log stores put around an engine's lines, and mails between its words, changes no verdict."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from doctor.diagnose import watch
from doctor.feeds import evidence
from doctor.readers import model_config, vllm_log
from doctor.report import Report, Verdict
from rules import RULES

NOW = 1795300000.0  # 2026-11-21


def judged(tmp_path: Path, *texts: str) -> Report:
    paths = [tmp_path / f"{n}.txt" for n in range(len(texts))]
    for path, text in zip(paths, texts, strict=True):
        path.write_text(text)
    return list(watch(evidence.read(paths, now=NOW), RULES, keep=3600))[-1]


def first(report: Report) -> str:
    return report.findings[0].finding.failure_mode if report.findings else report.verdict.value


def as_json(**fields: object) -> str:
    return json.dumps(fields)


COLOURED = "\x1b[1;36m{}\x1b[0;0m"

WRAPPINGS: dict[str, Callable[[str], str]] = {
    "journalctl": lambda line: f"Nov 20 10:00:00 node1 vllm[123]: {line}",
    "journalctl -o short-precise": lambda line: f"Nov 20 10:00:00.123456 node1 python3[123]: {line}",
    "journalctl -o short-iso": lambda line: f"2026-11-20T10:00:00+0100 node1 vllm[123]: {line}",
    "journalctl -o short-iso-precise": lambda line: f"2026-11-20T10:00:00.123456+01:00 node1 vllm[123]: {line}",
    "journalctl -o short-full": lambda line: f"Fri 2026-11-20 10:00:00 CET node1 vllm[123]: {line}",
    "journalctl -o short-monotonic": lambda line: f"[12345.678901] node1 vllm[123]: {line}",
    "journalctl -o short-unix": lambda line: f"1763719200.123456 node1 vllm[123]: {line}",
    "journalctl -o cat": lambda line: line,
    "journalctl -o json": lambda line: as_json(_TRANSPORT="stdout", __REALTIME_TIMESTAMP="1763719200000000", MESSAGE=line),
    "journalctl -o json, coloured": lambda line: as_json(_PID="1", MESSAGE=list(COLOURED.format(line).encode())),
    "journalctl -o json-pretty": lambda line: '{\n\t"_PID" : "1",\n\t"MESSAGE" : ' + json.dumps(line) + ',\n\t"PRIORITY" : "6"\n}',
    "journalctl -o export": lambda line: f"__REALTIME_TIMESTAMP=1763719200123456\n_TRANSPORT=stdout\nMESSAGE={line}\n",
    "docker's json-file": lambda line: as_json(log=line + "\n", stream="stderr", time="2026-11-20T10:00:00.123456789Z"),
    "docker compose": lambda line: f"vllm-1  | {line}",
    "docker compose -t": lambda line: f"vllm-1  | 2026-11-20T10:00:00.123456789Z {line}",
    "docker service logs": lambda line: f"vllm_vllm.1.x8d0@node1    | {line}",
    "containerd": lambda line: f"2026-11-20T10:00:00.123456789Z stderr F {line}",
    "kubectl logs --timestamps": lambda line: f"2026-11-20T10:00:00.123456789Z {line}",
    "kubectl logs --prefix": lambda line: f"[pod/vllm-0/vllm] {line}",
    "stern": lambda line: f"vllm-0 vllm {line}",
    "kubetail": lambda line: f"[vllm-0] {line}",
    "syslog": lambda line: f"2026-11-20T10:00:00.123456+00:00 node1 vllm: {line}",
    "syslog, coloured": lambda line: "Nov 20 10:00:00 node1 vllm[123]: " + COLOURED.format(line).replace("\x1b", "#033"),
    "RFC 5424": lambda line: f"<14>1 2026-11-20T10:00:00.123Z node1 vllm 123 - - {line}",
    "Google Cloud": lambda line: as_json(textPayload=line, timestamp="2026-11-20T10:00:00.1Z", severity="ERROR"),
    "fluent-bit": lambda line: as_json(**{"@timestamp": "2026-11-20T10:00:00.1Z"}, message=line, level="info", kubernetes={}),
    "Loki": lambda line: as_json(line=line, timestamp="2026-11-20T10:00:00.1Z", fields={}),
    "cat -n": lambda line: f"    12  {line}",
}  # fmt: skip

HEALTHY = (
    "(APIServer pid=1) INFO 11-20 10:00:00 [api_server.py:1000] vLLM API server version 0.11.0",
    "(APIServer pid=1) INFO:     Application startup complete.",
    '(APIServer pid=1) INFO:     10.0.0.1:4000 - "POST /v1/chat/completions HTTP/1.1" 200 OK',
)
BROKEN = {
    "context-does-not-fit": (
        "(EngineCore_DP0 pid=10) ERROR 11-20 10:00:02 [core.py:708] EngineCore failed to start.",
        "(EngineCore_DP0 pid=10) ERROR 11-20 10:00:02 [core.py:708] Traceback (most recent call last):",
        '(EngineCore_DP0 pid=10) ERROR 11-20 10:00:02 [core.py:708]   File "/x/vllm/v1/core/kv_cache_utils.py", line 699, in check',
        "(EngineCore_DP0 pid=10) ERROR 11-20 10:00:02 [core.py:708] ValueError: No available memory for the cache blocks.",
    ),
    "tp-heads-indivisible": (
        "Traceback (most recent call last):",
        '  File "/x/vllm/config.py", line 6, in verify',
        "ValueError: Total number of attention heads (14) must be divisible by tensor parallel size (4).",
    ),
    "application-fault": (
        *HEALTHY,
        "(EngineCore_DP0 pid=10) ERROR 11-20 10:00:02 [core.py:708] torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
        "(EngineCore_DP0 pid=10) ERROR 11-20 10:00:03 [core.py:708] EngineCore encountered a fatal error.",
    ),
    "worker-killed": ("INFO 11-20 10:45:55 model_runner.py:680] Starting to load model /models/m...", "Killed"),
}  # fmt: skip


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_a_wrapped_log_is_judged_like_the_bare_one(tmp_path: Path, wrapping: str) -> None:
    wrap = WRAPPINGS[wrapping]
    found = {mode: first(judged(tmp_path, "\n".join(map(wrap, lines)) + "\n")) for mode, lines in BROKEN.items()}
    assert found == {mode: mode for mode in BROKEN}
    assert judged(tmp_path, "\n".join(map(wrap, HEALTHY)) + "\n").verdict is Verdict.CLEAR


def test_the_journals_stamp_is_the_events_stamp() -> None:
    line = as_json(__REALTIME_TIMESTAMP="1763719200000000", MESSAGE="ValueError: bad luck")
    (event,) = vllm_log.read(line.encode(), "a.log", NOW).events
    assert event.at == 1763719200.0


def test_what_only_looks_like_an_engines_log_is_not_called_clear(tmp_path: Path) -> None:
    text = "<row><cell>ERROR 11-20 10:00:02 something went wrong</cell></row>\n" * 3
    with pytest.raises(evidence.EvidenceError, match=r"0\.txt: nothing in it is evidence"):
        judged(tmp_path, text)


SMI = "GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-0)\n"


def test_a_complaint_that_nobody_understands_is_never_clear(tmp_path: Path) -> None:
    report = judged(tmp_path, SMI + "acme-agent: FATAL: device 0 did not come back, request 17 failed to finish\n")
    assert report.verdict is Verdict.INCOMPLETE
    assert any("0.txt:2: nothing here understands" in unseen.why.detail for unseen in report.unseen)
    assert (
        judged(tmp_path, SMI + "Errors: 0, failed: 0\nWe look for errors when something fails.\n").verdict
        is Verdict.CLEAR
    )


MAIL = (
    "(EngineCore_DP0 pid=31) INFO 03-04 05:06:07 [gpu_worker.py:298] Available KV cache memory: 1.71 GiB",
    ("(EngineCore_DP0 pid=31) ERROR 03-04 05:06:08 [core.py:708] ValueError: To serve at least one request with the model's max seq"
    " len (131072), (4.50 GiB KV cache is needed, which is larger than the available KV cache memory (1.71 GiB). Based on the"
    " available memory, the estimated maximum model length is 49808."),
    "(APIServer pid=7) RuntimeError: Engine core initialization failed. See root cause above. Failed core proc(s): {}",
)  # fmt: skip


def folded(line: str, width: int) -> str:
    rows = [""]
    for word in line.split(" "):
        if rows[-1] and len(rows[-1]) + 1 + len(word) > width:
            rows.append(word)
        else:
            rows[-1] = f"{rows[-1]} {word}".lstrip()
    return "\n".join(rows)


@pytest.mark.parametrize("width", [66, 72, 78, 80])
def test_a_log_that_a_mail_program_wrapped_between_words_says_what_it_said(tmp_path: Path, width: int) -> None:
    report = judged(tmp_path, "\n".join(folded(line, width) for line in MAIL) + "\n")
    assert first(report) == "context-does-not-fit"
    assert "131072" in report.findings[0].finding.summary
    assert "4.50 GiB KV cache is needed" in report.findings[0].finding.evidence[0].text


CONFIG = json.dumps(
    {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "num_hidden_layers": 4,
        "hidden_size": 896,
        "num_attention_heads": 14,
        "num_key_value_heads": 2,
        "intermediate_size": 4864,
        "vocab_size": 32000,
    },
    indent=2,
)


def test_a_configuration_is_read_behind_the_command_that_shows_it(tmp_path: Path) -> None:
    text = f"$ cat /models/odd-14b/config.json\n{CONFIG}\n$ vllm serve /models/odd-14b --tensor-parallel-size 4\n"
    report = judged(tmp_path, text)
    assert evidence.kinds(tmp_path / "0.txt", now=NOW) == ("command-line", "model-config")
    assert first(report) == "tp-heads-indivisible"


def test_a_log_and_a_configuration_are_an_engine_without_its_command(tmp_path: Path) -> None:
    log = (
        "(APIServer pid=1) INFO 11-20 10:00:00 [utils.py:233] non-default args: {'model': '/models/odd-14b', 'tensor_parallel_size': 4, "
        "'gpu_memory_utilization': 0.92}\n"
    )
    report = judged(tmp_path, log, CONFIG)
    (engine,) = report.snapshot.engines
    assert (engine.flags.model, engine.flags.tensor_parallel_size, engine.flags.gpu_memory_utilization) == ("/models/odd-14b", 4, 0.92)  # fmt: skip
    assert engine.model.attention_heads == 14
    assert first(report) == "tp-heads-indivisible"


@given(
    st.one_of(
        st.text(), st.lists(st.sampled_from(['{\n"model_type": "x"', "}", "{ ", '"a": [', "]", "\n"])).map("".join)
    )
)
def test_looking_for_configurations_never_raises(text: str) -> None:
    for start, end in model_config.find(text):
        assert model_config.recognises(text[start:end].encode("utf-8", "replace"))


@pytest.mark.parametrize("wrap", [WRAPPINGS["journalctl -o cat"], WRAPPINGS["docker compose"]])
def test_one_line_of_the_argument_parser_is_a_refusal(tmp_path: Path, wrap: Callable[[str], str]) -> None:
    line = "vllm serve: error: argument --dtype: invalid choice: 'fp4' (choose from auto, half, float16)"
    assert first(judged(tmp_path, wrap(line) + "\n")) == "launch-refused"


def test_a_width_that_the_stand_in_for_fp8_refuses_is_a_matter_of_fp8(tmp_path: Path) -> None:
    log = (
        "(Worker_TP0 pid=20) WARNING 11-20 10:00:00 [marlin_utils_fp8.py:54] Your GPU does not have native support for FP8 computation but "
        "FP8 quantization is being used. Weight-only FP8 compression will be used leveraging the Marlin kernel.\n"
        "(Worker_TP0 pid=20) ERROR 11-20 10:00:01 [multiproc_executor.py:703] RuntimeError: size_n = 352 is not divisible by tile_n_size = 64\n"
        "(EngineCore_DP0 pid=10) ERROR 11-20 10:00:02 [core.py:708] EngineCore failed to start.\n"
    )
    report = judged(tmp_path, log)
    assert [found.finding.failure_mode for found in report.roots] == ["fp8-not-engaged"]
    assert report.verdict is Verdict.CRITICAL
    without = log.partition("\n")[2]
    assert first(judged(tmp_path, without)) == "tp-heads-indivisible"


@pytest.mark.parametrize(
    ("words", "mode"),
    [
        ("No devices were found", "gpu-lost"),
        ("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver. Make sure …", "stack-mismatch"),
        ("Failed to initialize NVML: Unknown Error", "incomplete"),
    ],
)
def test_what_nvidia_smi_says_in_place_of_a_table_is_judged(tmp_path: Path, words: str, mode: str) -> None:
    assert first(judged(tmp_path, f"$ nvidia-smi\n{words}\n")) == mode


@pytest.mark.parametrize(
    ("line", "mode"),
    [
        (("(VllmWorkerProcess pid=71) ERROR 08-23 08:25:25 multiproc_worker_utils.py:226] Exception in worker while processing method "
        "init_device: NCCL error: unhandled system error (run with NCCL_DEBUG=INFO for details), Traceback (most recent call last):"), "nccl-timeout"),
        ("nvidia-container-cli: requirement error: unsatisfied condition: cuda>=12.9, please update your driver", "stack-mismatch"),
        ("Fatal Error: call to cuCtxCreate returned error 214\n  (CUDA_ERROR_ECC_UNCORRECTABLE): uncorrectable ECC error encountered", "gpu-memory-faulty"),
        ("CRITICAL 04-08 04:00:01 [core_client.py:361] Got fatal signal from worker processes, shutting down. See stack trace above.", "engine-crashed"),
        ("WARNING 06-13 11:42:20 _custom_ops.py:11] Failed to import from vllm._C with ImportError('/x/vllm/_C.abi3.so: undefined symbol: _ZN5torch7L')", "stack-mismatch"),
        ("2026-11-20T10:00:00,498 [INFO ] W-9000-model_1.0-stdout MODEL_LOG - huggingface_hub.errors.GatedRepoError: 401 Client Error.", "launch-refused"),
    ],
)  # fmt: skip
def test_a_line_by_itself_tells_what_broke(tmp_path: Path, line: str, mode: str) -> None:
    assert first(judged(tmp_path, line + "\n")) == mode


TORN = """INFO 11-20 10:00:00 llm_engine.py:70] Initializing an LLM engine with config: model='m', tensor_parallel_size=4
{}
  File "/opt/vllm/engine/llm_engine.py", line 12, in __init__
    self._run_workers("profile")
"""


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        (TORN.format("Traceback (most recent call last):"), Verdict.INCOMPLETE),
        (TORN.format("MemoryError        Traceback (most recent call last)\nCell In[2], line 1\n----> 1 llm = LLM()"), Verdict.INCOMPLETE),
        (TORN.format("Traceback (most recent call last):") + "INFO 11-20 10:00:01 [launcher.py:30] Route: /health\n", Verdict.CLEAR),
        (TORN.format("Traceback (most recent call last):") + "RuntimeError: no such worker\n", Verdict.CRITICAL),
    ],
)  # fmt: skip
def test_a_log_that_breaks_off_within_a_traceback_is_not_clear(tmp_path: Path, text: str, verdict: Verdict) -> None:
    assert judged(tmp_path, text).verdict is verdict
