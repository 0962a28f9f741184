"""What a visit to NVML costs, against the bare pynvml calls that it makes: both sides in one run, on a simulated node.

The calls of one visit are recorded with their arguments and made again, bare, in the same order. The visit is measured
twice: within one process, and as the collector sees it, with the child, the pipes and both codings in between.

    python benchmarks/visit_cost.py [profile]
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import msgspec
import pynvml

sys.path.insert(0, str(Path(__file__).parent.parent))

from doctor.collectors import nvml_child
from doctor.collectors.collector import Visit
from doctor.collectors.nvml import NvmlCollector
from doctor.collectors.nvml_frames import Ask, frame
from doctor.simulation.nvml import library
from doctor.simulation.physics import Drill

RATIO_MAX = 1.5
ROUNDS = 90
REST_SECONDS = 0.11
"""Between rounds: GPM gives nothing for samples that lie closer together."""


class Recorder:
    """The binding, with its calls noted."""

    def __init__(self) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...]]] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(pynvml, name)
        if not name.startswith("nvml"):
            return function

        def noted(*arguments: Any) -> Any:
            self.calls.append((function, arguments))
            return function(*arguments)

        return noted


def milliseconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return (time.perf_counter() - start) * 1e3


def main() -> int:
    profile = sys.argv[1] if len(sys.argv) > 1 else "hgx-h100-8"
    spec = msgspec.json.encode(Drill(profile=profile, started_at=time.time())).decode()
    pynvml.nvmlLib = library(spec)
    opened = nvml_child.Nvml(None)
    opened.visit(Ask(0))  # the first visit reads what never changes
    time.sleep(REST_SECONDS)
    opened.visit(Ask(0))
    time.sleep(REST_SECONDS)
    recorder = nvml_child.nvml = Recorder()
    opened.visit(Ask(0))
    nvml_child.nvml = pynvml

    def bare() -> None:
        for function, arguments in recorder.calls:
            with suppress(pynvml.NVMLError):
                function(*arguments)

    collector = NvmlCollector(root=None, library="doctor.simulation.nvml", spec=spec)
    first = milliseconds(lambda: collector.collect(Visit(at=time.time())))
    try:
        sides: list[tuple[Callable[[], object], list[float]]] = [
            (bare, bares := []),
            (lambda: frame(opened.visit(Ask(0))), visits := []),
            (lambda: collector.collect(Visit(at=time.time())), collects := []),
        ]
        for _ in range(ROUNDS):
            time.sleep(REST_SECONDS)
            sides.append(sides.pop(0))  # each is the first after the rest as often as the others
            for work, times in sides:
                times.append(milliseconds(work))
    finally:
        collector.close()

    names = Counter(function.__name__ for function, _ in recorder.calls)
    print(
        f"{profile}: {len(recorder.calls)} calls a visit, most often", *(f"{n} {c}," for n, c in names.most_common(3))
    )
    print(f"spawn to first answer    {first:7.1f} ms")
    print(f"bare pynvml calls        {median(bares):7.2f} ms")
    ratios = []
    for what, times in (("visit, in the child", visits), ("visit, seen by the parent", collects)):
        ratios.append(median(times) / median(bares))
        print(f"{what:25}{median(times):7.2f} ms   {ratios[-1]:.2f} times")
    print(f"at most {RATIO_MAX}: {'yes' if max(ratios) <= RATIO_MAX else 'NO'}")
    return max(ratios) > RATIO_MAX


if __name__ == "__main__":
    sys.exit(main())
