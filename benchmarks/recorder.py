"""What the flight recorder costs: bytes a day, CPU a visit, and the time to read an hour and a day back.

The node has eight GPUs under load, 144 NVLinks and an engine; each GPU brings ten power samples a second with the noise of a real
sensor. A visit is encoded, compressed, written and synced, as the daemon does it; the day is that of visits every 10 s.

    python benchmarks/recorder.py [profile]
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))

import msgspec
import nodes

from doctor.recorder.folder import Bounds, Folder, Shelf
from doctor.recorder.segment import Entry
from doctor.recorder.timeline import timeline
from doctor.snapshot import Sample, Snapshot

EVERY_SECONDS = 10.0
HOUR_VISITS = 360
DAY_VISITS = 24 * HOUR_VISITS
CORE_SHARE_MAX = 0.001
"""Of one core: a tenth of what the whole daemon may take."""
MEGABYTES_A_DAY_MAX = 64.0


def noisy(snapshot: Snapshot, chance: random.Random) -> Snapshot:
    gpus: list[nodes.Gpu] = []
    for gpu in snapshot.gpus:
        samples = tuple(Sample(s.at, round(s.value + chance.gauss(0, 12), 3)) for s in gpu.power.samples)
        gpus.append(nodes.put(gpu, power=nodes.put(gpu.power, samples=samples, instant_watts=samples[-1].value)))
    return nodes.put(snapshot, gpus=tuple(gpus))


def main() -> int:
    profile = sys.argv[1] if len(sys.argv) > 1 else "hgx-h100-8"
    chance = random.Random(1)
    hour = [noisy(s, chance) for s in nodes.healthy(profile, visits=HOUR_VISITS, every=EVERY_SECONDS)]
    with tempfile.TemporaryDirectory() as folder:
        shelf = Shelf(Path(folder), Bounds(max_bytes=1 << 30, max_age_seconds=14 * 86400.0))
        cpu: list[float] = []
        whole: list[float] = []
        for number in range(DAY_VISITS):
            at = hour[0].at + number * EVERY_SECONDS
            entry = Entry(snapshot=msgspec.structs.replace(hour[number % HOUR_VISITS], at=at), findings=())
            begun, began = time.thread_time(), time.perf_counter()
            shelf.write(entry, number + 1)
            cpu.append(time.thread_time() - begun)
            whole.append(time.perf_counter() - began)
        shelf.close()
        reader = Folder(Path(folder))
        size = sum(path.stat().st_size for path in reader.segments())
        began = time.perf_counter()
        _, past = reader.tail(3600.0)
        tail_seconds = time.perf_counter() - began
        began = time.perf_counter()
        read = sum(1 for _ in reader.entries())
        day_seconds = time.perf_counter() - began
        began = time.perf_counter()
        timeline(reader)
        history_seconds = time.perf_counter() - began
    share = sum(cpu) / len(cpu) / EVERY_SECONDS
    megabytes = size / 1e6
    ok = share <= CORE_SHARE_MAX and megabytes <= MEGABYTES_A_DAY_MAX and read == DAY_VISITS
    print(f"{profile}, a visit every {EVERY_SECONDS:.0f} s")
    print(f"  bytes of a visit    {len(msgspec.json.encode(hour[9])):8} as JSON, {size / DAY_VISITS:.0f} on disk")
    print(f"  a day               {megabytes:8.1f} MB, at most {MEGABYTES_A_DAY_MAX:.0f}")
    print(f"  CPU of a visit      {median(cpu) * 1e3:8.2f} ms: {share:.4%} of a core, at most {CORE_SHARE_MAX:.2%}")
    print(f"  with its fdatasync  {median(whole) * 1e3:8.2f} ms")
    print(f"  an hour read back   {tail_seconds:8.2f} s, {len(past)} visits")
    print(f"  a day read back     {day_seconds:8.2f} s; its history {history_seconds:.2f} s")
    print("yes" if ok else "NO")
    return not ok


if __name__ == "__main__":
    sys.exit(main())
