"""The words that every form of a report shares: clean text, times, the names of things, the verdict in one line."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from datetime import datetime, timezone

from doctor.report import Report, Verdict, essential_sources
from doctor.rule import Finding, Severity
from doctor.silence import Silence
from doctor.snapshot import Absent, Snapshot, Source, Why, or_none

_ESCAPE = re.compile(
    r"\x1b(?:"
    r"\[[0-?]*[ -/]*[@-~]?"  # a control sequence: colours, cursor
    r"|[\]PX^_](?:[^\x07\x1b\x9c]{0,512}(?:\x07|\x1b\\|\x9c))?"  # a string: titles, links; unended, only its start goes
    r"|[ -/]*[0-~]?"
    r")|\x9b[0-?]*[ -/]*[@-~]?"
)
"""Terminal escapes as ECMA-48 spells them."""

_SEPARATORS = {"Cc", "Zl", "Zp", "Zs"}


def plain(text: str) -> str:
    """Return text from outside as one printable line: no escapes, no control, direction or invisible characters."""
    if text.isprintable():
        return text
    kept: list[str] = []
    for character in _ESCAPE.sub("", text):
        category = unicodedata.category(character)
        if category in _SEPARATORS:
            kept.append(" ")
        elif category == "Cs":
            kept.append("\N{REPLACEMENT CHARACTER}")
        elif category not in {"Cf", "Cn", "Co"}:
            kept.append(character)
    return " ".join("".join(kept).split())


def cut(text: str, width: int) -> str:
    """Return *text* in at most *width* characters; what was cut off shows as an ellipsis."""
    return text if len(text) <= width else text[: max(width - 1, 0)].rstrip() + "…"


def moment(at: float) -> str:
    """Return a Unix time as `2026-11-21 03:12:40 UTC`; a time that no calendar holds stays a number."""
    try:
        return datetime.fromtimestamp(at, timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
    except (OverflowError, ValueError, OSError):
        return f"{at:g} s after 1970"


def counted(number: int, noun: str) -> str:
    """Return `1 finding`, `2 findings`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def listed(words: Iterable[str], most: int | None = None) -> str:
    """Return `a, b and c`; over *most*, `a, b and 7 more`."""
    words = list(words)
    if most is not None and len(words) > most + 1:
        words = [*words[:most], f"{len(words) - most} more"]
    return " and ".join(filter(None, (", ".join(words[:-1]), *words[-1:])))


def ranges(numbers: Iterable[int]) -> str:
    """Return `0-3, 5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(set(numbers)):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def gpu_number(uuid: str, snapshot: Snapshot) -> int | None:
    """Return NVML's index of a GPU, where this visit tells it."""
    gpu = snapshot.gpu(uuid)
    if gpu is not None:
        return gpu.index
    prefix, _, number = uuid.partition(":")
    return int(number) if prefix == "index" and number.isdecimal() else None


def gpu_name(uuid: str, snapshot: Snapshot) -> str:
    """Return `GPU 2 (0000:5d:00.0)`, or what is known of it."""
    number = gpu_number(uuid, snapshot)
    if number is None:
        return plain(uuid)
    gpu = snapshot.gpu(uuid)
    address = or_none(gpu.pci_address) if gpu is not None else None
    return f"GPU {number} ({plain(address)})" if address else f"GPU {number}"


def gpu_names(uuids: Sequence[str], snapshot: Snapshot) -> str:
    """Return up to two GPUs with their addresses, more as `GPUs 0-7`."""
    numbers = [gpu_number(uuid, snapshot) for uuid in uuids]
    known = [n for n in numbers if n is not None]
    if len(uuids) <= 2 or len(known) < len(uuids):  # two with their addresses still fit a line
        return listed([gpu_name(uuid, snapshot) for uuid in uuids], most=4)
    return f"GPUs {ranges(known)}"


def severity_of(finding: Finding) -> Severity:
    """Return the severity that a reported finding was stamped with."""
    return finding.severity or Severity.NOTICE


def silenced(silence: Silence) -> str:
    """Return `until 2026-12-01 00:00:00 UTC by jo: the riser is ordered`."""
    by = f" by {plain(silence.by)}" if silence.by else ""
    return f"until {moment(silence.until)}{by}: {plain(silence.reason)}"


def silence_subject(silence: Silence) -> str:
    """Return what a silence is about: `gpu-lost of GPU 3, vllm.service`."""
    gpus = [f"GPU {name}" if str(name).isdecimal() else plain(str(name)) for name in silence.gpus]
    return plain(silence.rule) + (
        f" of {listed(parts)}" if (parts := [*gpus, *filter(None, [plain(silence.engine)])]) else ""
    )


def who(finding: Finding, snapshot: Snapshot) -> str:
    """Return who a finding is about, in one line; empty where that is the whole node."""
    subject = finding.subject
    parts: list[str] = []
    if subject.gpus:
        parts.append(gpu_names(subject.gpus, snapshot))
    of_gpu: dict[str, list[str]] = {}
    for link in subject.links:
        uuid, _, number = link.rpartition("/")
        of_gpu.setdefault(uuid, []).append(plain(number))
    for uuid, links in of_gpu.items():
        numbers = ranges(map(int, links)) if all(n.isdecimal() for n in links) else ", ".join(links)
        name = gpu_name(uuid, snapshot).partition(" (")[0]
        parts.append(f"NVLink {numbers} of {name}")
    if subject.ranks:
        ranks = ", ".join(map(plain, subject.ranks))
        parts.append(ranks if ranks.startswith("rank") else f"rank {ranks}")
    if subject.engine:
        parts.append(engine_name(subject.engine, snapshot))
    if subject.pids:
        parts.append(f"pid {', '.join(map(str, subject.pids))}")
    return "; ".join(parts)


def engine_name(engine_id: str, snapshot: Snapshot) -> str:
    """Return `vllm, pid 4711, unit vllm.service`; of an engine that is gone, what is known of it."""
    engine = next((e for e in snapshot.engines if e.id == engine_id), None)
    if engine is None:
        pid, _, started = engine_id.partition("@")
        gone = pid.isdecimal() and started.isdecimal()
        return f"engine, pid {pid}" if gone else f"the engine of {plain(engine_id)}"
    unit = or_none(engine.unit)
    return f"{plain(engine.kind)}, pid {engine.pid}" + (f", unit {plain(unit)}" if unit else "")


def headline(report: Report, width: int | None = None) -> str:
    """Return the verdict in one line, without its word; what is cut to fit *width* is a title or a list."""
    leads = report.leads
    silent = len(report.findings) - len(report.open)
    if report.verdict is Verdict.INCOMPLETE:
        fired = f"only {counted(len(report.open), 'notice')}" if leads else "nothing"
        spots, broken = _blind_spots(report), broken_rules(report)
        blind = [f"{listed(spots)} could not be seen"] if spots else []
        blind += [f"{listed(broken, most=2)} could not be asked"] if broken else []
        untold = [plain(unjudged.failure_mode) for unjudged in report.unjudged if unjudged.why.why is Why.NOT_KNOWN]
        blind += [f"{listed(untold, most=2)} could not be judged"] if untold else []
        text = f"{fired} fired, but {listed(blind) or 'an essential source could not be seen'}"
        if _has_no_driver(report):
            others = listed(spot for spot in spots if spot != SOURCE_NAMES[Source.NVML])
            text = "there is no NVIDIA driver here" + (f", and {others} could not be seen" if others else "")
        text += f"; {counted(silent, 'silenced finding')}" if silent else ""
        return text if width is None else cut(text, width)
    if not leads:
        blind = f", {len(report.unjudged)} could not be judged" if report.unjudged else ""
        none = f"none present but {counted(silent, 'silenced finding')}" if silent else "none present"
        return f"{counted(len(report.quiet), 'failure mode')} asked about, {none}{blind}"
    notices = sum(severity_of(lead.finding) is Severity.NOTICE for lead in leads[1:])
    counts = {
        "consequence": len(report.open) - len(leads),
        "further incident": len(leads) - 1 - notices,
        "further notice": notices,
        "silenced finding": silent,
    }
    tail = "".join(f"; {counted(number, noun)}" for noun, number in counts.items() if number)
    title = plain(leads[0].finding.title)
    return (title if width is None else cut(title, width - len(tail))) + tail


def _has_no_driver(report: Report) -> bool:
    why = report.snapshot.why_unseen(Source.NVML)
    return why is not None and why.why is Why.NOT_PRESENT


def _blind_spots(report: Report) -> list[str]:
    essential = essential_sources(report.snapshot)
    whole = [u.source for u in report.unseen if not u.what and u.source not in report.snapshot.seen]
    return [SOURCE_NAMES[source] for source in dict.fromkeys(whole) if source in essential]


def broken_rules(report: Report) -> list[str]:
    """Return the failure modes whose rules were refused or failed."""
    return [plain(unjudged.failure_mode) for unjudged in report.unjudged if unjudged.why.why is Why.BROKEN]


SOURCE_NAMES = {
    Source.NVML: "NVML",
    Source.KERNEL_LOG: "the kernel log",
    Source.PROCESSES: "the processes",
    Source.ENGINE_LOG: "the engine's log",
    Source.ENGINE_METRICS: "the engine's metrics",
    Source.STACK: "the software stack",
    Source.MODEL: "the model's configuration",
    Source.FABRIC_MANAGER: "the fabric manager",
    Source.HOST: "the host",
    Source.RECORDER: "the flight recorder",
}
"""Sources as a sentence names them."""

_ENGINE_HERE = (
    "If an engine runs here all the same, name its log and its page in the configuration: "
    "`[engine] logs`, `[engine] metrics`."
)
_REMEDIES = {
    (Source.NVML, Why.NOT_PRESENT): "No NVIDIA driver answers here. On a GPU node, load it: `nvidia-smi` must work. "
    "Without a GPU, see the demo, a simulated node: `gpu-doctor check --simulate hgx-h100-8 --fault gpu-lost:gpu=2`",
    (Source.NVML, Why.NO_PERMISSION): "Let this user open `/dev/nvidiactl` and `/dev/nvidia*`, or run as root.",
    (Source.NVML, Why.TIMED_OUT): "The driver does not answer; what else is wrong stands above. Look at `dmesg` first.",
    (Source.KERNEL_LOG, Why.NO_PERMISSION): "Run as root, or add this user to the group `systemd-journal` (or `adm`).",
    (Source.KERNEL_LOG, Why.NOT_PRESENT): "In a container, mount `/dev/kmsg` or `/var/log/journal` of the host.",
    (Source.PROCESSES, Why.NO_PERMISSION): "Run as root or as the engine's user.",
    (Source.ENGINE_LOG, Why.NO_PERMISSION): "Run as root or as the engine's user, or name the log: `[engine] logs`.",
    (Source.ENGINE_LOG, Why.NOT_PRESENT): _ENGINE_HERE,
    (Source.ENGINE_METRICS, Why.NOT_PRESENT): _ENGINE_HERE,
    (Source.ENGINE_METRICS, Why.FAILED): "If the engine listens elsewhere, name its page: `[engine] metrics`.",
}


def remedy(source: Source, why: Absent) -> str:
    """Return what the operator can do to have a source seen; empty where nobody knows."""
    return _REMEDIES.get((source, why.why), "")
