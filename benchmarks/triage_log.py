"""`gpu-doctor triage` of a large engine log, against `LC_ALL=C grep -F` with the same literals, on one core each.

    python benchmarks/triage_log.py [SIZE_MB] [ROUNDS]

The log is made in a temporary directory: a day of a busy vLLM 0.32 server, access lines and statistics mostly, with request
logging on for a tenth of it, and a few errors near the end. The medians of both sides come from the same run, in turns. The
peak memory is that of the whole command.
"""

from __future__ import annotations

import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from doctor.readers import signals


def records(seed: int) -> str:
    """A few megabytes of what a busy server writes."""
    chance = random.Random(seed)
    lines: list[str] = []
    second = 0
    while sum(map(len, lines[-2000:])) * len(lines) < 4_000_000 * min(len(lines), 2000) or len(lines) < 2000:
        second += 1
        stamp = f"11-21 {second // 3600 % 24:02}:{second // 60 % 60:02}:{second % 60:02}"
        for _ in range(chance.randrange(4, 40)):
            host = f"10.0.{chance.randrange(256)}.{chance.randrange(256)}:{chance.randrange(30000, 60000)}"
            path = chance.choice(("POST /v1/chat/completions", "POST /v1/completions", "GET /health", "GET /metrics"))
            status = "200 OK" if chance.random() > 0.005 else "400 Bad Request"
            lines.append(f'INFO:     {host} - "{path} HTTP/1.1" {status}')
            if chance.random() < 0.1:
                words = " ".join(
                    chance.choices(("the", "model", "answers", "a", "long", "question", "about", "memory"), k=60)
                )
                lines.append(
                    f"(APIServer pid=77) INFO {stamp} [logger.py:72] Received request chatcmpl-{chance.getrandbits(64):x}: "
                    f"prompt: '{words}', params: SamplingParams(n=1, temperature=0.7, top_p=0.9, max_tokens=512)."
                )
        if second % 10 == 0:
            lines.append(
                f"(APIServer pid=77) INFO {stamp} [loggers.py:335] Engine 000: Avg prompt throughput: {chance.random() * 9000:.1f} "
                f"tokens/s, Avg generation throughput: {chance.random() * 2000:.1f} tokens/s, Running: {chance.randrange(1, 99)} reqs, "
                f"Waiting: {chance.randrange(9)} reqs, GPU KV cache usage: {chance.random() * 80:.1f}%, Prefix cache hit rate: 41.0%"
            )
        if second % 97 == 0:
            lines.append(
                f"(EngineCore pid=99) WARNING {stamp} [jit.py:135] Triton kernel JIT compilation during inference: k{second}."
            )
    return "\n".join(lines) + "\n"


def make_log(path: Path, size_mb: int) -> None:
    parts = [records(seed).encode() for seed in range(4)]
    written = 0
    with path.open("wb") as file:
        while written < size_mb << 20:
            written += file.write(parts[(written >> 20) % len(parts)])
        file.write(
            b"(Worker_TP2 pid=402) ERROR 11-21 23:59:59 [multiproc_executor.py:1063] Traceback (most recent call last):\n"
            b"(Worker_TP2 pid=402) ERROR 11-21 23:59:59 [multiproc_executor.py:1063] RuntimeError: CUDA error: an illegal memory "
            b"access was encountered\n(EngineCore pid=99) ERROR 11-21 23:59:59 [core.py:1512] EngineCore encountered a fatal error.\n"
        )


def grep_seconds(path: Path, literals: Path) -> float:
    started = time.perf_counter()
    subprocess.run(
        ["grep", "-F", "-c", "-f", str(literals), str(path)],
        env={**os.environ, "LC_ALL": "C"},
        capture_output=True,
        check=False,
    )
    return time.perf_counter() - started


def triage_run(path: Path) -> tuple[float, int]:
    """Seconds and peak KiB of the whole command, which must find the fault at the log's end."""
    started = time.perf_counter()
    command = [sys.executable, "-m", "doctor", "triage", "--format", "json", str(path)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status) != 2:
        sys.exit("triage has not called the log critical")
    return seconds, usage.ru_maxrss


def main() -> int:
    size_mb = int(sys.argv[1]) if len(sys.argv) > 1 else 1024
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    with tempfile.TemporaryDirectory() as folder:
        log, patterns = Path(folder) / "vllm.log", Path(folder) / "literals"
        make_log(log, size_mb)
        literals = sorted({*(row.literal for row in signals.SIGNALS), *signals.EXCEPTION_LITERALS})
        patterns.write_text("\n".join(literals) + "\n")
        size = log.stat().st_size / 1e6
        grep, ours, peak = [], [], 0
        for _ in range(rounds):
            grep.append(grep_seconds(log, patterns))
            seconds, rss_kib = triage_run(log)
            ours.append(seconds)
            peak = max(peak, rss_kib)
    theirs, mine = statistics.median(grep), statistics.median(ours)
    print(f"log: {size:.0f} MB, {len(literals)} literals")
    print(f"grep -F: {theirs:.2f} s, {size / theirs:.0f} MB/s")
    print(f"triage:  {mine:.2f} s, {size / mine:.0f} MB/s, peak memory {peak / 1024:.0f} MiB")
    print(f"ratio triage/grep: {mine / theirs:.2f} (at most 1 is wanted)")
    return 0 if mine <= theirs and peak < 150 * 1024 else 1


if __name__ == "__main__":
    sys.exit(main())
