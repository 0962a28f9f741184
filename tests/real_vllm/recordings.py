"""Cut recordings for the ordinary tests out of a night's flight recorder: `python recordings.py NIGHT`.

NIGHT is the folder that pytest made for it (`--basetemp`). What is this machine's own (paths, names, versions of its
kernel, its kernel log) is taken out; every other value is as it was seen.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from doctor.feeds import recording
from doctor.recorder.folder import Folder
from doctor.snapshot import Absent, Host, Node, Snapshot, Stack, Why

HERE = Path(__file__).parent / "recordings"

NOT_HERE = Absent(Why.NOT_PRESENT, "the nvidia kernel module is not loaded")


LAST = 5
"""Visits at the end of a recording that are all kept."""


def thinned(visits: Iterable[Snapshot], step: int) -> Iterator[Snapshot]:
    """Yield every *step*-th visit and the last ones, each with what the logs told since the one before."""
    told: tuple[Snapshot, ...] = ()
    every = tuple(visits)
    for number, visit in enumerate(every):
        told = (*told, visit)
        if number % step == 0 or number >= len(every) - LAST:
            events = tuple(event for snapshot in told for event in snapshot.engine_events)
            yield msgspec.structs.replace(visit, engine_events=events)
            told = ()


def without_this_machine(visit: Snapshot, night: Path, environment: str) -> Snapshot:
    """Return a visit as it would have been anywhere else."""
    text = msgspec.json.encode(visit).decode()
    for ours, anywhere in ((str(night), "/srv/night"), (environment, "/opt/vllm")):
        text = text.replace(ours, anywhere)
    told = msgspec.json.decode(text, type=Snapshot)
    engines = tuple(msgspec.structs.replace(engine, cgroup="/night") for engine in told.engines)
    return msgspec.structs.replace(
        told,
        node=Node(name="cpu-node"),
        engines=engines,
        collectors=(),
        positions=(),
        kernel=(),
        stack=Stack(driver=NOT_HERE),
        host=Host(driver_module=NOT_HERE),
        recorder=type(told.recorder)(),
    )


def keep(name: str, visits: Iterable[Snapshot], step: int = 1) -> None:
    """Write one recording."""
    HERE.mkdir(exist_ok=True)
    path = HERE / f"{name}.rec"
    number = sum(1 for _ in recording.write(thinned(visits, step), path, "tests/real_vllm/recordings.py"))
    print(f"{path.name}: {number} visits, {path.stat().st_size} bytes")


def cut(night: Path) -> None:
    """Write every recording of a night."""
    raw = [entry.snapshot for entry in Folder(night / "state").entries()]
    environment = next(e.command_line[0] for s in raw for e in s.engines).removesuffix("/bin/python")
    visits = [without_this_machine(visit, night, environment) for visit in raw]
    pids = list(dict.fromkeys(e.pid for s in visits for e in s.engines if not e.is_left_over))
    first = [s for s in visits if any(e.pid == pids[0] for e in s.engines)]
    states = [{rank.state for e in s.engines for rank in e.ranks} for s in first]
    stopped = next(i for i, seen in enumerate(states) if "stopped" in seen)
    went_on = next(i for i, seen in enumerate(states) if i > stopped and "stopped" not in seen)
    keep("loads-and-serves", first[:stopped], 12)
    keep("stopped-worker", first[stopped - 2 : went_on + 2], 4)
    end = visits.index(first[-1])
    served_again = next(i for i, s in enumerate(visits) if i > end and s.metrics)
    keep("killed-engine-core", visits[end - 3 : served_again], 6)
    keep("replaced-engine", visits[end - 3 : served_again + 2], 6)
    left = next(i for i, s in enumerate(visits) if i > served_again and not s.metrics)
    keep("killed-server", visits[left - 3 :])


if __name__ == "__main__":
    cut(Path(sys.argv[1]))
