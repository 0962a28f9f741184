"""How long the program takes to start: medians of interleaved runs, and the ratios that must hold.

python benchmarks/startup.py
"""

from __future__ import annotations

import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

RUNS = 15
HELP_RATIO = 2.0
"""`gpu-doctor --help` against `python -c "import click"`."""
CHECK_SECONDS = 1.0
"""`check --simulate hgx-h100-8` over its sampling window."""
WINDOW_SECONDS = 1.0

PROGRAM = shutil.which("gpu-doctor", path=Path(sys.executable).parent) or "gpu-doctor"


def seconds(command: list[str]) -> float:
    began = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, check=False)
    took = time.perf_counter() - began
    assert not done.stderr, done.stderr.decode()
    return took


def medians(commands: dict[str, list[str]], runs: int) -> dict[str, float]:
    """Both sides in one run, turn by turn, so that a busy machine is busy for both."""
    for command in commands.values():
        seconds(command)  # warms the page cache and compiles
    taken: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(runs):
        for name, command in commands.items():
            taken[name].append(seconds(command))
    return {name: statistics.median(times) for name, times in taken.items()}


def main() -> int:
    start = medians({"help": [PROGRAM, "--help"], "click": [sys.executable, "-c", "import click"]}, RUNS)
    ratio = start["help"] / start["click"]
    print(
        f"--help {start['help'] * 1e3:.0f} ms, import click {start['click'] * 1e3:.0f} ms: {ratio:.2f}x of {HELP_RATIO}x"
    )
    check = medians({"check": [PROGRAM, "check", "--simulate", "hgx-h100-8"]}, 5)["check"]
    over = check - WINDOW_SECONDS
    print(
        f"check --simulate hgx-h100-8 {check:.2f} s, {over:.2f} s over its window of {WINDOW_SECONDS} s, of {CHECK_SECONDS} s"
    )
    return 0 if ratio <= HELP_RATIO and over <= CHECK_SECONDS else 1


if __name__ == "__main__":
    sys.exit(main())
