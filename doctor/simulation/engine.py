"""The simulated engine's work, and its metrics page on a real port of the loopback interface."""

from __future__ import annotations

import contextlib
import http.server
import math
import threading
from collections.abc import Callable, Iterator
from typing import Any

import msgspec

from doctor.simulation import serving
from doctor.simulation.physics import BEGIN_SECONDS, Drill, Physics
from doctor.simulation.script import READY_SECONDS

TOKEN_SECONDS = 0.025
"""guess: a step of a well-filled batch of a 70B model on four H100."""
MEMORY_SHARE = 0.5
"""Of a step, which waits for the memory, whose clock heat leaves alone; the rest goes with the GPU's. guess."""
FIRST_SECONDS, PREFILL_SECONDS, QUEUE_SECONDS = 0.18, 0.16, 0.01
"""To the first token, at full clock: all of it goes with the clock."""
PCIE_FACTOR = 3.0
"""Of a step, where four ranks or more reduce over PCIe through the host's memory. guess."""
SINGLE_TOKEN_SECONDS = 0.032
"""guess: a single stream whose all-reduces wait for each other."""
MEAN_LOAD = 0.75
"""Of `physics.load`."""
PROMPT_TOKENS, ANSWER_TOKENS = 800.0, 250.0
HIT_RATE = 0.412


class Stretch(msgspec.Struct, frozen=True):
    """What the engine has done at one pace."""

    requests: float
    token_seconds: float
    clock: float


class Work(msgspec.Struct, frozen=True):
    """What the engine has done by one moment."""

    running: int
    steps: float
    generated: float
    prompted: float
    used: float
    """Of the KV cache, 0 to 1."""
    stretches: tuple[Stretch, ...]


class SimulatedEngine:
    """What the engine does in a drill: a function of time."""

    def __init__(self, drill: Drill) -> None:
        self.drill = drill
        self._physics = Physics(drill)
        self._single = any(fault.name == "single-stream" for fault in drill.faults)
        slow = serving.reduces_over_pcie(drill) and drill.engine.tensor_parallel_size > 2
        self._step_seconds = (SINGLE_TOKEN_SECONDS if self._single else TOKEN_SECONDS) * (PCIE_FACTOR if slow else 1.0)
        self._streams = 1 if self._single else drill.engine.requests

    def at(self, seconds: float) -> Work:
        """Return what is done by then."""
        state = self._physics.at(seconds)
        # Before the physics begins the engine has served since it was ready, at its mean load.
        before = max(0.0, min(seconds, BEGIN_SECONDS) - self.drill.engine.started_seconds - READY_SECONDS)
        done = {1.0: before * MEAN_LOAD}
        for clock, served in state.work_seconds.items():
            done[clock] = done.get(clock, 0.0) + served
        running = round(self.drill.engine.requests * state.load)
        if self._single:
            running = min(running, 1)
        stretches = tuple(self._stretch(clock, served) for clock, served in sorted(done.items()))
        generated = sum(stretch.requests for stretch in stretches) * ANSWER_TOKENS
        return Work(
            running=running,
            steps=generated / self._streams,
            generated=generated,
            prompted=generated / ANSWER_TOKENS * PROMPT_TOKENS,
            used=min(1.0, running * (PROMPT_TOKENS + ANSWER_TOKENS / 2) / serving.kv_cache_tokens(self.drill)),
            stretches=stretches,
        )

    def _stretch(self, clock: float, served: float) -> Stretch:
        token_seconds = self._step_seconds * (MEMORY_SHARE + (1 - MEMORY_SHARE) / clock)
        return Stretch(served * self._streams / token_seconds / ANSWER_TOKENS, token_seconds, clock)

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
        finished = sum(stretch.requests for stretch in work.stretches)
        for reason, share in (("stop", 0.9), ("length", 0.1), ("abort", 0.0), ("error", 0.0)):
            count = math.floor(finished * share)
            yield f'vllm:request_success_total{{engine="0",finished_reason="{reason}",{labels[11:]}}} {count:.1f}'

        def histogram(
            name: str, bounds: tuple[float, ...], value: Callable[[Stretch], float], each: float = 1.0
        ) -> Iterator[str]:
            """Yield what the requests took, *each* observations a request."""
            observed = tuple((value(stretch), math.floor(stretch.requests * each)) for stretch in work.stretches)
            yield from _histogram(name, labels, bounds, observed)

        yield from histogram(
            "iteration_tokens_total", STEP_BOUNDS, lambda _: self._streams, ANSWER_TOKENS / self._streams
        )
        yield from histogram("time_to_first_token_seconds", FIRST_BOUNDS, lambda s: FIRST_SECONDS / s.clock)
        yield from histogram(
            "inter_token_latency_seconds", BETWEEN_BOUNDS, lambda s: s.token_seconds, ANSWER_TOKENS - 1
        )
        yield from histogram("request_queue_time_seconds", QUEUE_BOUNDS, lambda s: QUEUE_SECONDS / s.clock)
        yield from histogram("request_prefill_time_seconds", QUEUE_BOUNDS, lambda s: PREFILL_SECONDS / s.clock)
        yield from histogram("request_prompt_tokens", TOKEN_BOUNDS, lambda _: PROMPT_TOKENS)
        yield from histogram("request_generation_tokens", TOKEN_BOUNDS, lambda _: ANSWER_TOKENS)
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


def _histogram(
    name: str, labels: str, bounds: tuple[float, ...], observed: tuple[tuple[float, int], ...]
) -> Iterator[str]:
    """Yield a histogram of observations: values, and how many of each."""
    yield f"# TYPE vllm:{name} histogram"
    for bound in bounds:
        count = sum(number for value, number in observed if value <= bound)
        yield f'vllm:{name}_bucket{{le="{float(bound)}",{labels}}} {count:.1f}'
    count = sum(number for _, number in observed)
    yield f'vllm:{name}_bucket{{le="+Inf",{labels}}} {count:.1f}'
    yield f"vllm:{name}_count{{{labels}}} {count:.1f}"
    yield f"vllm:{name}_sum{{{labels}}} {sum(value * number for value, number in observed):.6f}"


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
                with contextlib.suppress(ConnectionError):  # who asked waits no longer
                    self.end_headers()
                    self.wfile.write(body)

            def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 - the base class's
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(
            target=self._server.serve_forever, args=(0.01,), name="simulated-metrics", daemon=True
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
