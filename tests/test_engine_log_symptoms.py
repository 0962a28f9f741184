"""The life of an engine, read from its log: what is past, what was asked for, and which error came first."""

from __future__ import annotations

import nodes
import pytest

from doctor.history import History
from doctor.readers import vllm_log
from doctor.snapshot import Snapshot
from doctor.symptoms.engine_log import EngineLog, Incident, engine_logs
from doctor.symptoms.stalls import flat_engines, suspicion, waits

AT = 1_795_254_000.0
HEAD = "(Worker_TP{rank} pid={pid}) ERROR 11-20 08:00:{second:02} [x.py:1] "

STARTED = "INFO 11-20 07:00:00 [api.py:1] vLLM API server version 0.11.2\nINFO:     Application startup complete.\n"
SERVED = 'INFO:     127.0.0.1:5 - "POST /v1/completions HTTP/1.1" 200 OK\n'
STATS = "INFO 11-20 08:10:00 [loggers.py:1] Engine 000: Avg prompt throughput: 0.0 tokens/s, Avg generation throughput: {}.0 tokens/s, Running: 3 reqs, Waiting: 0 reqs\n"
CRASH = (
    "(EngineCore_DP0 pid=9) ERROR 11-20 08:00:00 [core.py:1] Traceback (most recent call last):\n"
    "(EngineCore_DP0 pid=9) ERROR 11-20 08:00:00 [core.py:1]     do()\n"
    "(EngineCore_DP0 pid=9) ERROR 11-20 08:00:00 [core.py:1] KeyError: 'block'\n"
)
DEAD = (
    "(EngineCore_DP0 pid=9) ERROR 11-20 08:00:01 [core.py:1] EngineCore encountered a fatal error.\n"
    "(APIServer pid=1) ERROR 11-20 08:00:01 [async_llm.py:1] vllm.v1.engine.exceptions.EngineDeadError: EngineCore encountered an issue.\n"
)
STOP = "(APIServer pid=1) INFO 11-20 08:20:00 [launcher.py:254] [shutdown] API server: shutdown triggered\n"
WAIT = "(EngineCore_DP0 pid=9) INFO 11-20 08:1{}:00 [shm_broadcast.py:681] No available shared memory broadcast block found in 60 seconds.\n"


def log_of(text: str) -> EngineLog:
    reading = vllm_log.read(text.encode(), "vllm.log", AT)
    logs = engine_logs(History((Snapshot(at=AT, engine_events=reading.events),), 60))
    return logs[0] if logs else EngineLog(log="", engine="", events=(), serving=False, stopped=False, incident=None)


def incident_of(text: str) -> Incident:
    incident = log_of(text).incident
    assert incident is not None
    return incident


def test_the_first_error_is_the_cause_and_the_reports_of_death_are_not() -> None:
    incident = incident_of(STARTED + SERVED + CRASH + DEAD)
    assert incident.cause.text == "KeyError: 'block'"
    assert incident.fatal
    assert incident.serving


def test_a_report_of_death_before_its_traceback_is_not_the_cause() -> None:
    assert incident_of(DEAD + CRASH).cause.text == "KeyError: 'block'"


@pytest.mark.parametrize("after", [STARTED, STARTED + SERVED, STARTED + STATS.format(5)])
def test_an_error_before_a_good_start_is_past(after: str) -> None:
    assert log_of(STARTED + CRASH + DEAD + after).incident is None


def test_a_start_that_is_not_complete_yet_does_not_make_it_past() -> None:
    begun = "INFO 11-20 09:00:00 [api.py:1] vLLM API server version 0.11.2\n"
    assert incident_of(STARTED + CRASH + DEAD + begun).cause.text == "KeyError: 'block'"


@pytest.mark.parametrize("after", [SERVED, STATS.format(7)])
def test_an_error_that_the_engine_outlives_is_no_incident(after: str) -> None:
    assert log_of(STARTED + CRASH + after).incident is None


def test_a_request_answered_after_the_death_does_not_revive_the_engine() -> None:
    assert incident_of(STARTED + CRASH + DEAD + SERVED).fatal


def test_an_error_of_one_request_in_a_serving_engine_is_none_before_it_is_outlived_either() -> None:
    assert log_of(STARTED + SERVED + CRASH).incident is None


def test_the_same_error_where_the_engine_has_not_come_up_is_one() -> None:
    assert incident_of(CRASH).cause.text == "KeyError: 'block'"


def test_what_is_printed_while_the_engine_is_being_stopped_is_no_error() -> None:
    log = log_of(STARTED + SERVED + STOP + DEAD + CRASH)
    assert log.incident is None
    assert log.stopped


def test_a_shutdown_that_follows_a_death_excuses_nothing() -> None:
    assert incident_of(STARTED + CRASH + DEAD + STOP).cause.text == "KeyError: 'block'"


def test_a_cuda_error_on_another_rank_is_the_cause_of_an_nccl_error_printed_first() -> None:
    text = (
        HEAD.format(rank=0, pid=10, second=1)
        + "RuntimeError: NCCL error: unhandled cuda error (run with NCCL_DEBUG=INFO for details)\n"
        + HEAD.format(rank=1, pid=11, second=1)
        + "RuntimeError: CUDA error: an illegal memory access was encountered\n"
    )
    cause = incident_of(text).cause
    assert (cause.signal, cause.rank, cause.pid) == ("cuda-error", 1, 11)


def test_of_two_processes_the_one_that_failed_first_counts() -> None:
    text = "".join(
        HEAD.format(rank=rank, pid=rank, second=rank) + f"RuntimeError: CUDA error: {error}\n"
        for rank, error in ((3, "an illegal memory access was encountered"), (4, "unspecified launch failure"))
    )
    assert incident_of(text).cause.rank == 3


def test_a_timed_out_call_gives_way_to_a_cause_beside_it_but_not_to_any_exception() -> None:
    timeout = HEAD.format(rank=0, pid=1, second=1) + "TimeoutError: RPC call to execute_model timed out.\n"
    oom = (
        HEAD.format(rank=1, pid=2, second=2)
        + "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 1.00 GiB.\n"
    )
    assert incident_of(timeout + oom).cause.signal == "cuda-out-of-memory"
    assert incident_of(timeout + CRASH).cause.signal == "rpc-timeout"


def test_a_worker_ended_by_a_signal_is_a_cause_and_one_that_just_ended_is_none() -> None:
    died = "(EngineCore pid=9) ERROR 11-20 08:00:00 [m.py:1] Worker proc VllmWorker-0 died unexpectedly (exit code: {}), shutting down executor.\n"
    cancelled = "(EngineCore pid=9) ERROR 11-20 08:00:09 [m.py:1] RuntimeError: cancelled\n"
    assert incident_of(STARTED + died.format(-9) + cancelled + DEAD).cause.signal == "worker-died"
    assert incident_of(died.format(1) + CRASH).cause.signal == "exception"


def test_a_debug_line_is_the_reason_of_a_vague_failure_and_none_by_itself() -> None:
    debug = (
        "DEBUG 11-20 08:00:00 [__init__.py:103] CUDA platform is not available because: NVML Shared Library Not Found\n"
    )
    assert log_of(debug).incident is None
    assert log_of(debug + STARTED).incident is None
    assert incident_of(debug + "OSError: [Errno 98] Address already in use\n").cause.signal == "launch-error"
    assert incident_of(debug + "RuntimeError: Failed to infer device type\n").cause.signal == "nvml-error"


def test_of_a_chain_the_error_with_a_plain_meaning_is_the_cause() -> None:
    text = (
        "Traceback (most recent call last):\n  x\njson.decoder.JSONDecodeError: Expecting value\n"
        "During handling of the above exception, another exception occurred:\n"
        "Traceback (most recent call last):\n  y\nOSError: the config file is not a valid JSON file.\n"
    )
    assert incident_of(text).cause.facts["kind"] == "bad-model-files"


def test_a_cause_without_a_stamp_takes_the_last_one_before_it() -> None:
    text = "ERROR 11-20 08:00:00 [core.py:1] EngineCore failed to start.\nKeyError: 'x'\n"
    incident = incident_of(text)
    assert incident.cause.at is None
    assert incident.at == vllm_log.stamp_time([11, 20, 8, 0, 0], AT)


def test_the_present_life_begins_at_the_last_start() -> None:
    log = log_of(
        STARTED + "INFO 11-20 07:00:00 [c.py:1] Available KV cache memory: 1.00 GiB\n" + CRASH + DEAD + STARTED
    )
    assert not log.having("kv-cache-memory")
    assert log.fact("version") == "0.11.2"


def test_waits_after_the_last_progress_count_and_those_before_do_not() -> None:
    text = STARTED + WAIT.format(1) + STATS.format(3) + WAIT.format(2) + WAIT.format(3)
    waited = waits(log_of(text))
    assert (waited.count, waited.serving, waited.running) == (2, True, 3)


def test_the_line_of_a_stream_that_begins_ends_no_wait_where_statistics_tell() -> None:
    served = STARTED + STATS.format(9) + WAIT.format(1) + SERVED + WAIT.format(2) + SERVED
    assert waits(log_of(served)).count == 2
    assert waits(log_of(served + STATS.format(9))).count == 0
    assert waits(log_of(STARTED + WAIT.format(1) + SERVED)).count == 0


def test_waits_while_the_engine_starts_are_told_apart() -> None:
    text = "INFO 11-20 08:00:00 [m.py:1] Starting to load model x...\n" + WAIT.format(1) * 3
    assert waits(log_of(text)).starting


def test_a_debug_wait_is_none() -> None:
    assert waits(log_of(STARTED + WAIT.format(1).replace("INFO", "DEBUG"))).count == 0


def test_counters_that_stand_still_while_requests_run_are_a_stall() -> None:
    visits = nodes.healthy("hgx-h100-4")
    still = nodes.each(
        visits,
        lambda s: nodes.with_metrics(
            s, running=4.0, steps_total=9.0, generation_tokens_total=5.0, prompt_tokens_total=1.0
        ),
    )
    (flat,) = flat_engines(nodes.history(still), 30.0)
    assert flat.running == 4
    assert flat.seconds == visits[-1].at - visits[0].at
    idle = nodes.each(still, lambda s: nodes.with_metrics(s, running=0.0))
    assert flat_engines(nodes.history(idle), 30.0) == ()
    assert flat_engines(nodes.history(visits), 30.0) == ()


@pytest.mark.parametrize(
    ("busy", "memory", "kind"),
    [
        ((0.0, 0.0, 0.0, 0.0), 0.0, "software"),
        ((0.0, 1.0, 1.0, 1.0), 0.0, "collective"),
        ((1.0, 1.0, 1.0, 1.0), 0.0, "hardware"),
        ((1.0, 1.0, 1.0, 1.0), 0.5, "unknown"),
    ],
)
def test_what_gpus_do_tells_the_kind_of_a_stall(busy: tuple[float, ...], memory: float, kind: str) -> None:
    snapshot = nodes.healthy("hgx-h100-4")[-1]
    for gpu, ratio in enumerate(busy):
        snapshot = nodes.with_gpu(snapshot, gpu, activity__gpu_ratio=ratio, activity__memory_ratio=memory)
    assert suspicion(nodes.history((snapshot,)), snapshot.engines[0]).kind == kind
