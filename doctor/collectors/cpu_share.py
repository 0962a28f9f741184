"""What control groups let a process have of the processors, of both versions: quota, throttling, pressure."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import msgspec

from doctor.collectors import files
from doctor.snapshot import Absent, CpuShare, Maybe, Why

CGROUPS = "sys/fs/cgroup"
GROUPS_MAX = 64
"""Levels that are looked at; real trees have under ten."""

_NO_QUOTA = Absent(Why.NOT_PRESENT, "no control group of the engine has a CPU quota")


class _Quota(msgspec.Struct, frozen=True):
    """A control group that may not have all processors."""

    path: str
    folder: Path
    cores: float


def cpu_share(root: Path, pid: int) -> CpuShare:
    """Return what the control groups of a process let it have.

    A quota of any group above the process binds it too, and only that group counts its throttling: a pod's, a slice's.
    """
    try:
        path, second = _place(files.text_of(root / f"proc/{pid}/cgroup"))
        if ".." in PurePosixPath(path).parts:
            msg = "it stands outside of the control groups that are shown here: run on the host"
            return _absent(Absent(Why.NOT_PRESENT, msg))
        pressure = _pressure(root, path) if second else Absent(Why.NOT_SUPPORTED, "cgroup 1 knows no pressure")
        quotas = list(_quotas(root, path, second))
    except OSError as e:
        return _absent(files.why_not(e, "the engine's control group"))
    except (ValueError, IndexError, ZeroDivisionError):
        return _absent(Absent(Why.FAILED, "the engine's control group: not understood"))
    tightest = min((q for q in quotas if isinstance(q, _Quota)), key=lambda quota: quota.cores, default=None)
    if tightest is None:
        share = _absent(next((q for q in quotas if isinstance(q, Absent)), _NO_QUOTA))
    else:
        share = files.maybe(tightest.folder / "cpu.stat", lambda text: _counted(text, tightest))
        share = _absent(share) if isinstance(share, Absent) else share
    return msgspec.structs.replace(share, pressure_ratio=pressure)


def pressure_ratio(text: str) -> float:
    """Return PSI's `some avg60`, 0 to 1. Raises ValueError."""
    some = next((line for line in text.splitlines() if line.startswith("some ")), "")
    words = dict(word.split("=") for word in some.split()[1:])
    return round(float(words.get("avg60", "")) / 100, 4)


def _absent(why: Absent) -> CpuShare:
    return CpuShare(
        cgroup=why,
        quota_cores=why,
        periods_total=why,
        throttled_periods_total=why,
        throttled_seconds_total=why,
        pressure_ratio=why,
    )


def _place(text: str) -> tuple[str, bool]:
    """Return the path of the group that has the CPU controller, and whether it is of version 2."""
    found = ""
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        if "cpu" in controllers.split(","):
            return path, False
        if not controllers:
            found = path
    return found or "/", True


def _quotas(root: Path, path: str, second: bool) -> Iterator[Maybe[_Quota]]:
    """Yield the groups with a quota, from the process' own to the root; a group without the controller has none."""
    here = PurePosixPath(path)
    for group in [here, *here.parents][:GROUPS_MAX]:
        folder = _folder(root, str(group), second)
        cores = files.maybe(folder / "cpu.max", _cores) if second else _cores_of_first(folder)
        if isinstance(cores, Absent):
            if cores.why is not Why.NOT_PRESENT:
                yield cores
        elif cores > 0:
            yield _Quota(str(group), folder, cores)


def _folder(root: Path, path: str, second: bool) -> Path:
    mounted = root / CGROUPS if second else root / CGROUPS / "cpu"
    if second and not (mounted / "cgroup.controllers").exists() and (mounted / "unified").is_dir():
        mounted /= "unified"
    return mounted / path.lstrip("/")


def _cores(text: str) -> float:
    """Return the cores of `cpu.max` (`400000 100000`); 0 for `max`."""
    quota, period = text.split()
    return 0.0 if quota == "max" else int(quota) / int(period)


def _cores_of_first(folder: Path) -> Maybe[float]:
    quota, period = (files.maybe(folder / name, int) for name in ("cpu.cfs_quota_us", "cpu.cfs_period_us"))
    if isinstance(quota, Absent):
        return quota
    if isinstance(period, Absent):
        return period
    return quota / period if quota > 0 else 0.0


def _counted(text: str, quota: _Quota) -> CpuShare:
    counters = {name: int(value) for name, value in (line.split() for line in text.splitlines())}
    microseconds = counters.get("throttled_usec", counters.get("throttled_time", 0) / 1000)
    return CpuShare(
        cgroup=quota.path,
        quota_cores=round(quota.cores, 3),
        periods_total=counters.get("nr_periods", 0),
        throttled_periods_total=counters.get("nr_throttled", 0),
        throttled_seconds_total=round(microseconds / 1e6, 6),
    )


def _pressure(root: Path, path: str) -> Maybe[float]:
    return files.maybe(_folder(root, path, second=True) / "cpu.pressure", pressure_ratio)
