"""What judging costs: all rules, a visit every 10 s, over the hour that the daemon remembers of an eight-GPU node.

The node is healthy and under load: 144 NVLinks with counters, ten power samples a second of each GPU, a statistics line
of the engine at each visit. Nothing is read or sent; the time is that of the rules, and of a history one visit longer.

    python benchmarks/rules_cost.py [profile]
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import nodes

from doctor.history import History
from doctor.snapshot import Snapshot
from rules import RULES

MILLISECONDS_MAX = 25.0
EVERY_SECONDS = 10.0
KEEP_SECONDS = 3600.0
VISITS = 9
"""Judged and timed, each with the hour before it."""
DEAREST = 8


def hour_and_more(profile: str) -> list[Snapshot]:
    """Return the visits of an hour, and those to be timed."""
    count = int(KEEP_SECONDS / EVERY_SECONDS) + VISITS
    return [
        nodes.with_lines(snapshot, nodes.line("stats", at=snapshot.at, running=24, generation_tokens_per_second=900.0))
        for snapshot in nodes.healthy(profile, visits=count, every=EVERY_SECONDS)
    ]


def main() -> int:
    profile = sys.argv[1] if len(sys.argv) > 1 else "hgx-h100-8"
    visits = hour_and_more(profile)
    history = History(tuple(visits[:-VISITS]), KEEP_SECONDS)
    whole: list[float] = []
    each: dict[str, list[float]] = defaultdict(list)
    for snapshot in visits[-VISITS:]:
        begun = before = time.perf_counter()
        history = history.after(snapshot)
        for rule in RULES:  # what several rules share falls to the first that asks
            rule.judge(history)
            each[rule.id].append((time.perf_counter() - before) * 1e3)
            before = time.perf_counter()
        whole.append((before - begun) * 1e3)
    print(f"{profile}: {len(RULES)} rules over {len(history.snapshots)} visits")
    for cost, name in sorted(((median(times), name) for name, times in each.items()), reverse=True)[:DEAREST]:
        print(f"  {name:28}{cost:7.2f} ms")
    print(f"a visit{'':23}{median(whole):7.2f} ms, at most {MILLISECONDS_MAX:.0f}", end=": ")
    print("yes" if median(whole) <= MILLISECONDS_MAX else "NO")
    return median(whole) > MILLISECONDS_MAX


if __name__ == "__main__":
    sys.exit(main())
