"""The simulated engine's work, and its metrics page on a real port of the loopback interface."""

from __future__ import annotations

import http.server
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from doctor.simulation import serving
from doctor.simulation.physics import BEGIN_SECONDS, Drill, Physics
from doctor.simulation.script import READY_SECONDS

STOPPING = ("gpu-lost", "nccl-timeout", "engine-stalled")
"""Faults in which requests go on running while no step advances."""

TOKEN_SECONDS = 0.025
"""guess: a step of a well-filled batch of a 70B model on four H100."""
SINGLE_TOKEN_SECONDS = 0.032
"""guess: a single stream whose all-reduces wait for each other."""
MEAN_LOAD = 0.75
"""Of `physics.load`."""
PROMPT_TOKENS, ANSWER_TOKENS = 800.0, 250.0
HIT_RATE = 0.412


class Work(msgspec.Struct, frozen=True):
    """What the engine has done by one moment."""

    running: int
    steps: float
    generated: float
    prompted: float
    finished: float
    token_seconds: float
    used: float
    """Of the KV cache, 0 to 1."""


class SimulatedEngine:
    """What the engine does in a drill: a function of time."""

    def __init__(self, drill: Drill) -> None:
        self.drill = drill
        self._physics = Physics(drill)
        self._single = any(fault.name == "single-stream" for fault in drill.faults)
        halts = [fault.start_seconds for fault in drill.faults if fault.name in (*STOPPING, "idle")]
        self._halts = min(halts, default=math.inf)
        self._idle = any(fault.name == "idle" for fault in drill.faults)

    def at(self, seconds: float) -> Work:
        """Return what is done by then."""
        until = min(seconds, self._halts)
        state = self._physics.at(until)
        # Before the physics begins the engine has served since it was ready, at its mean load.
        before = max(0.0, min(until, BEGIN_SECONDS) - self.drill.engine.started_seconds - READY_SECONDS)
        served = before * MEAN_LOAD + state.work_seconds
        running = round(self.drill.engine.requests * state.load)
        if self._idle and seconds >= self._halts:
            running = 0
        token_seconds = TOKEN_SECONDS
        if self._single:
            running, token_seconds = min(running, 1), SINGLE_TOKEN_SECONDS
        streams = 1 if self._single else self.drill.engine.requests
        generated = served * streams / token_seconds
        finished = generated / ANSWER_TOKENS
        used = min(1.0, running * (PROMPT_TOKENS + ANSWER_TOKENS / 2) / serving.kv_cache_tokens(self.drill))
        return Work(
            running=running,
            steps=served / token_seconds,
            generated=generated,
            prompted=finished * PROMPT_TOKENS,
            finished=finished,
            token_seconds=token_seconds,
            used=used,
        )

    def page(self, seconds: float) -> str:
        """Return the metrics page at one moment."""
        return "\n".join(self._page(self.at(seconds))) + "\n"

    def _page(self, work: Work) -> Iterator[str]:
        labels = f'engine="0",model_name="{self.drill.engine.model}"'
        yield f"vllm:num_requests_running{{{labels}}} {work.running:.1f}"
        yield f"vllm:num_requests_waiting{{{labels}}} 0.0"
        yield f"vllm:kv_cache_usage_perc{{{labels}}} {work.used:.6f}"
        for name, value in (
            ("num_preemptions", 0.0),
            ("prompt_tokens", work.prompted),
            ("generation_tokens", work.generated),
            ("prefix_cache_queries", work.prompted),
            ("prefix_cache_hits", work.prompted * HIT_RATE),
        ):
            yield f"# TYPE vllm:{name} counter"
            yield f"vllm:{name}_total{{{labels}}} {math.floor(value):.1f}"
        for reason, share in (("stop", 0.9), ("length", 0.1), ("abort", 0.0), ("error", 0.0)):
            count = math.floor(work.finished * share)
            yield f'vllm:request_success_total{{engine="0",finished_reason="{reason}",{labels[11:]}}} {count:.1f}'
        requests = math.floor(work.finished)
        per_step = work.generated / work.steps if work.steps else 0.0
        yield from _histogram("iteration_tokens_total", labels, STEP_BOUNDS, math.floor(work.steps), per_step)
        yield from _histogram("time_to_first_token_seconds", labels, FIRST_BOUNDS, requests, 0.18)
        between = math.floor(work.generated - work.finished)
        yield from _histogram("inter_token_latency_seconds", labels, BETWEEN_BOUNDS, between, work.token_seconds)
        yield from _histogram("request_queue_time_seconds", labels, QUEUE_BOUNDS, requests, 0.01)
        yield from _histogram("request_prefill_time_seconds", labels, QUEUE_BOUNDS, requests, 0.16)
        yield from _histogram("request_prompt_tokens", labels, TOKEN_BOUNDS, requests, PROMPT_TOKENS)
        yield from _histogram("request_generation_tokens", labels, TOKEN_BOUNDS, requests, ANSWER_TOKENS)
        tokens = serving.kv_cache_tokens(self.drill)
        yield (
            f'vllm:cache_config_info{{block_size="16",cache_dtype="auto",engine="0",gpu_memory_utilization='
            f'"{self.drill.engine.memory_utilization}",kv_cache_size_tokens="{tokens}",num_gpu_blocks="{tokens // 16}"}} 1.0'
        )


STEP_BOUNDS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
FIRST_BOUNDS = (
    0.001,
    0.005,
    0.01,
    0.02,
    0.04,
    0.06,
    0.08,
    0.1,
    0.25,
    0.5,
    0.75,
    1,
    2.5,
    5,
    7.5,
    10,
    20,
    40,
    80,
    160,
    640,
    2560,
)
BETWEEN_BOUNDS = (0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
QUEUE_BOUNDS = (0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 50, 60, 120, 240, 480, 960, 1920, 7680)
TOKEN_BOUNDS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000)
"""vLLM's own bounds."""


def _histogram(name: str, labels: str, bounds: tuple[float, ...], count: int, value: float) -> Iterator[str]:
    """Yield a histogram of *count* observations, all near *value*."""
    yield f"# TYPE vllm:{name} histogram"
    for bound in bounds:
        yield f'vllm:{name}_bucket{{le="{float(bound)}",{labels}}} {count if value <= bound else 0:.1f}'
    yield f'vllm:{name}_bucket{{le="+Inf",{labels}}} {count:.1f}'
    yield f"vllm:{name}_count{{{labels}}} {count:.1f}"
    yield f"vllm:{name}_sum{{{labels}}} {count * value:.6f}"


class MetricsServer:
    """An HTTP server on the loopback interface that can fall silent and come back on the same port."""

    def __init__(self, page: Callable[[], str]) -> None:
        self._page = page
        self._server: http.server.ThreadingHTTPServer | None = None
        self._thread: threading.Thread | None = None
        self.port = 0
        self.open()

    def open(self) -> None:
        """Listen, if it does not."""
        if self._server is not None:
            return
        page = self._page

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                body = page().encode()
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=1.0.0")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.05,), name="simulated-metrics", daemon=True
        )
        self._thread.start()

    def close(self) -> None:
        """Stop listening."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
        if self._thread is not None:
            self._thread.join()
            self._thread = None
