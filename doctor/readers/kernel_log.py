"""The kernel log: dmesg, `/dev/kmsg`, journal or syslog in, the events that some symptom can use out.

The line formats are the driver's own (open kernel modules 595.45.04) and the kernel's (6.18, checked on a real OOM kill).
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Callable, Iterable, Iterator, Sequence

import msgspec

from doctor.readers.patterns import LogPattern
from doctor.snapshot import HostMessage, KernelEvent, NvidiaMessage, OomKill, Sxid, Xid

LINE_MAX_BYTES = 16 << 10
"""Of a longer line only the beginning is read; the kernel's own limit for a record is 8 KiB."""

TEXT_MAX = 600
"""Characters of a line that an event keeps."""

REPEATS = 32
"""Events of one kind about one device that are kept in full; of further ones only every 2^n-th, and one of each `feed`, as
long as each `feed` brings some."""

EVENTS_MAX = 2000
"""Events that a `feed` returns; of further ones only the first of each code on each device, and as many at most."""

KEEP_SECONDS = 90.0
"""Later than this after the last one that was kept, an event is kept: half of the 3 minutes that part two bursts, so that
what is left of one that goes on shows no such gap."""

_NEEDLES = (
    b"NVRM:",
    b"SXid",
    b"nvidia-nvlink:",
    b"oom-kill:",
    b"Killed process",
    b"segfault at",
    b"traps:",
    b" blocked for more than ",
    b"AER:",
    b"PCIe Bus Error",
    b"Machine check",
    b"Linux version ",
    b"-- Boot ",
    b"-- Reboot",
    b"_BOOT_ID=",
    b"__REALTIME_TIMESTAMP=",
)
"""A line without any of these is not looked at."""

_PCI = r"([0-9a-fA-F]{4,8}:[0-9a-fA-F]{2}:[0-9a-fA-F]{2})(?:\.([0-7]))?"

_XID = re.compile(rf"NVRM: Xid \((?:PCI:)?{_PCI}(?: GPU-I:\d+)?(?: GPU-CI:\d+)?\): (\d+)(?:, ?(.*))?$")
# A process name may hold `:`, `[` and `,`; it ends at the first comma that a space follows.
_XID_WHO = re.compile(r"pid='?(?P<pid>\d+|<unknown>)'?(?:, name=(?P<name>.*?))?(?:, (?P<rest>.*))?$")
_XID_CAUSE = re.compile(r"caused by previous Xid (\d+)")
_XID_RECOVERY = re.compile(r"GPU recovery action changed from 0x[0-9a-f]+ \([^)]*\) to 0x([0-9a-f]+)")
_XID_NVLINK5 = re.compile(r"^\w+ +(Fatal|Nonfatal) +XC\d+ +i\d+ +Link (-?\d+)")
_XID_NVLINK = re.compile(r"NVLink: (fatal|non-fatal)? ?error detected on link (\d+)", re.IGNORECASE)
_RECOVERY_ACTIONS = {0: "none", 1: "reset", 2: "reboot", 3: "drain-p2p", 4: "drain-and-reset", 5: "imex"}
"""NVML_GPU_RECOVERY_ACTION_* of nvml.h (CUDA 13.3), which Xid 154 prints."""

_SXID = re.compile(rf"SXid \((?:PCI:)?{_PCI}\): (\d+)(?:, ?(.*))?$")
_SXID_SEVERITY = re.compile(r"^(Fatal|Non-fatal)\b", re.IGNORECASE)
_SXID_LINK = re.compile(r"\bLink (\d+)")
_SXID_FURTHER = re.compile(r"\): \d+, ?(?:Severity \d|Data \{)")
"""The driver prints up to three lines about one error: what, severity and engine, data. They share the code."""

_OOM_LINE = re.compile(r"oom-kill:.*?task_memcg=(?P<cgroup>[^,]*),task=(?P<name>.*),pid=(?P<pid>\d+)")
_OOM_KILLED = re.compile(r"Killed process (?P<pid>\d+),? \((?P<name>[^)]*)\)")
_RSS = re.compile(r"(?:anon|file|shmem)-rss:(\d+)kB")

_SEGFAULT = re.compile(r"(?:traps: )?(?P<name>.{1,32}?)\[(?P<pid>\d+)\](?:: segfault at | general protection| trap )")
_SEGFAULT_OURS = re.compile(
    r" in lib(?:nccl|cuda|nvidia|torch|c10|nv)[^ ]*\[|^(?:traps: )?(?:python|vllm|VLLM|sglang|trtllm|ray|nv-|nvidia-)",
    re.ASCII,
)
_HUNG = re.compile(r"task (?P<name>.{1,32}?):(?P<pid>\d+) blocked for more than ")
_ADDRESS = re.compile(_PCI)
_OPENS = re.compile(r"NVRM: (?:API mismatch|The NVIDIA GPU |The NVIDIA probe routine was not called)")
"""How the driver begins a sentence that it breaks over several lines."""
_OTHER_NVRM = re.compile(r"NVRM: (?:Xid |GPU |API mismatch|The NVIDIA |loading )")
_SENTENCE_LINES = 8
_BREAK = re.compile(r"(?:\\x0a|#012)\s*(?:NVRM: )?")
"""How one line holds such a sentence: the breaks as `/dev/kmsg` and rsyslog escape them."""

_NVIDIA = (
    ("api-mismatch", re.compile(r"NVRM: (?:API mismatch|this kernel module has the version)")),
    ("gpu-lost", re.compile(r"NVRM: .*has fallen off the bus")),
    (
        "gsp-timeout",
        re.compile(
            r"NVRM: .*(?:waiting for RPC (?:response )?from .*GSP|rpcRecvPoll timed ?out|Heartbeat timed out|GSP Timeout \*"
            r"|RPC (?:event )?history \(CPU|GSP RPC buffer contains)"  # what it dumps when the processor does not answer
        ),
    ),
    ("reset-required", re.compile(r"NVRM: .*\[NV_ERR_RESET_REQUIRED\]")),
    (
        "init-failed",
        re.compile(
            r"NVRM: .*(?:RmInitAdapter failed|rm_init_adapter failed|No NVIDIA GPU found|None of the NVIDIA devices|probe routine (?:failed|was not called))"
        ),
    ),
    ("module-loaded", re.compile(r"NVRM: loading NVIDIA UNIX")),
    ("module-unloaded", re.compile(r"nvidia-nvlink: Unregistered")),
    ("other", re.compile(r"NVRM: .*GPU crash dump")),
)

_MONTHS = {
    m: i for i, m in enumerate(("Jan", "Feb", "Mar", "Apr", "May", "Jun", "Jul", "Aug", "Sep", "Oct", "Nov", "Dec"), 1)
}
_UTC = datetime.timezone.utc

_KMSG = re.compile(r"^(?P<priority>\d+),(?P<sequence>\d+),(?P<microseconds>\d+),[^;]{0,64};(?P<text>.*)", re.DOTALL)
_LEVEL = re.compile(r"^(?:<\d+>|[a-z]+ *:[a-z]+ *: ?)")
_UPTIME = re.compile(r"^\[ *(\d+(?:\.\d+)?)\](?:\[ *[TC]\d+\])? ?")
_CLOCK = re.compile(r"^\[\w{3} (\w{3}) +(\d+) (\d\d):(\d\d):(\d\d) (\d{4})\] ?")
_ISO = re.compile(
    r"^\[?(?:\w{3} )?(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:[.,](\d{1,9}))? ?(Z|UTC|[+-]\d\d:?\d\d)?\]? "
)
_SYSLOG = re.compile(r"^(\w{3}) +(\d+) (\d\d):(\d\d):(\d\d)(?:\.(\d{1,9}))? ")
_SENDER = re.compile(r"^(?:\S+ )?kernel(?:\[\d+\])?: ?")

_RECORD = re.compile(
    rb"^(?:(?:<\d+>|[a-z]+ *:[a-z]+ *: ?)?\[ *\d+\.\d{3,6}\](?:\[ *[TC]\d+\])? "
    rb"(?!\S{1,64} (?!kernel)[\w.@-]{1,64}\[\d{1,9}\]: )\S"  # a service in journalctl -o short-monotonic
    rb"|\d+,\d+,\d+,[-cf+][^;\n]{0,64};"
    rb"|(?:[a-z]+ *:[a-z]+ *: ?)?\[\w{3} \w{3} +\d+ \d\d:\d\d:\d\d \d{4}\] "
    rb"|(?:\w{3} +\d+ [\d:.]{8,15}|(?:\w{3} )?\d{4}-\d\d-\d\d[T ]\d\d:[^\s]{2,20}(?: \w{3,5})?) (?:\S+ )?kernel: "
    rb"|kernel: \["
    rb"|_TRANSPORT=kernel"
    rb"|[^\n]*\"_TRANSPORT\" ?: ?\"kernel\""
    rb"|[^\n]{0,64}NVRM: (?:Xid|API mismatch|GPU|loading)"
    rb"|[^\n]{0,64}nvidia-nvswitch\d+: SXid)",
    re.MULTILINE,
)


def recognises(text: bytes) -> bool:
    """Whether *text* holds a line of a kernel log, in any of its forms."""
    return _RECORD.search(text) is not None


class _Line(msgspec.Struct):
    """A line taken apart."""

    message: str
    at: float | None = None
    uptime: float | None = None
    sequence: str | None = None
    boot: str | None = None


class _Sentence(msgspec.Struct):
    """A sentence of the driver of which further lines may follow."""

    text: str
    where: str
    at: float | None
    last_line: int
    lines: int = 1


class _JournalRecord(msgspec.Struct):
    """The fields of `journalctl -o json` that matter."""

    message: str | list[int] | None = msgspec.field(name="MESSAGE", default=None)
    realtime: str = msgspec.field(name="__REALTIME_TIMESTAMP", default="")
    boot: str = msgspec.field(name="_BOOT_ID", default="")
    log: str = ""
    """What Docker and its like wrap a line in."""


_journal_record = msgspec.json.Decoder(_JournalRecord).decode


class _Kept(msgspec.Struct):
    """What is kept of the events that are alike."""

    seen: int = 0
    last_at: float | None = None
    """Of the last one that was kept."""
    place: int | None = None
    """Which of the events that wait that is."""


class KernelLogReader:
    """Reads a kernel log as it grows, in pieces of any size; holds the unfinished last line, and events until `take`.

    *name* is how events refer to the log. *booted_at*: what uptime stamps count from, where it is known.
    *now*: Unix time at which the log was read, which gives syslog stamps their year; their zone is taken for UTC.
    *sequence_numbers*: name places by the record's number rather than by line, for `/dev/kmsg`. *patterns*: the site's own.
    """

    def __init__(
        self,
        name: str,
        *,
        booted_at: float | None = None,
        now: float | None = None,
        sequence_numbers: bool = False,
        patterns: Sequence[LogPattern] = (),
    ) -> None:
        self.name = name
        self.booted_at = booted_at
        self.now = now
        self.sequence_numbers = sequence_numbers
        self.patterns = tuple(pattern for pattern in patterns if pattern.source == "kernel-log")
        self._needles = (*_NEEDLES, *(pattern.gate for pattern in self.patterns))
        self.lines = 0
        """Whole lines read so far."""
        self.dropped = 0
        """Events left out because they repeat others, or are over the bound."""
        self.events_max = EVENTS_MAX
        """For the next `feed`; a log that is followed for months has less to tell at each visit than a whole one."""
        self.last_at: float | None = None
        """The newest stamp of a line that was looked at."""
        self._rest: bytes = b""
        self._skipping = False
        self._uptime: float | None = None
        self._boot: str | None = None
        self._record_at: float | None = None
        self._oom: dict[int, OomKill] = {}
        self._sxid: int | None = None
        self._sentence: _Sentence | None = None
        self._kept: dict[object, _Kept] = {}
        self._waiting: list[KernelEvent] = []
        self._left_out: dict[int, int] = {}
        """By place of the event that waits: how many that are like it were left out after it."""

    def feed(self, data: bytes) -> list[KernelEvent]:
        """Return the events of the lines that *data* completes."""
        self.follow(data)
        return self.take()

    def follow(self, data: bytes) -> None:
        """Read on. What repeats itself is thinned out from one `take` to the next."""
        if self._skipping:
            end = data.find(b"\n")
            if end < 0:
                return
            data = data[end:]
            self._skipping = False
        data = self._rest + data
        end = data.rfind(b"\n") + 1
        self._rest = data[end : end + LINE_MAX_BYTES]
        self._skipping = len(data) - end > LINE_MAX_BYTES
        self._read_lines(data[:end])
        if self._sentence is not None and _is_whole(self._sentence.text):
            self._waiting += self._ended()  # of a log that is followed, nothing may come behind it for hours

    def take(self) -> list[KernelEvent]:
        """Return the events since the last call; an Xid or SXid counts those like it that were left out after it."""
        events, left_out = self._waiting, self._left_out
        self._waiting, self._left_out = [], {}
        self._kept = {
            key: _Kept(kept.seen, kept.last_at)
            for key, kept in self._kept.items()
            if kept.seen > REPEATS and kept.place is not None
        }
        for place, number in left_out.items():
            event = events[place]
            if isinstance(event, Xid | Sxid):
                events[place] = msgspec.structs.replace(event, count=event.count + number)
        return events

    def finish(self) -> list[KernelEvent]:
        """Return what the unfinished last line and an OOM kill without its second line hold."""
        self._skipping = False
        data, self._rest = self._rest, b""
        if data:
            self._read_lines(data + b"\n")
        self._waiting += self._ended()
        self._waiting += self._oom.values()
        self._oom = {}
        return self.take()

    def _read_lines(self, data: bytes) -> None:
        number = self.lines + 1
        counted = 0
        for start, end in _candidates(data, self._needles):
            number += data.count(b"\n", counted, start)
            counted = start
            line = data[start : min(end, start + LINE_MAX_BYTES)].decode("utf-8", "replace")
            for event in self._of_line(line.rstrip("\r"), number):
                if self._keeps(event):
                    self._waiting.append(event)
                else:
                    self.dropped += 1
        self.lines += data.count(b"\n")

    def _keeps(self, event: KernelEvent) -> bool:
        if _is_boot(event):
            self._kept = {}
            return not self._waiting or not _is_boot(self._waiting[-1])
        key, most = _likeness(event), self.events_max
        kept = self._kept.get(key)
        if len(self._waiting) >= most and (kept is None or kept.place is None):
            key = _kind(event)
            kept = self._kept.get(key)
            most = 2 * most if kept is None or kept.place is None else 0
        kept = self._kept.setdefault(key, _Kept())
        kept.seen += 1
        later = event.at is not None and kept.last_at is not None and event.at - kept.last_at > KEEP_SECONDS
        keeps = kept.place is None or kept.seen <= REPEATS or kept.seen & (kept.seen - 1) == 0 or later
        if keeps and len(self._waiting) < most:
            kept.last_at, kept.place = event.at, len(self._waiting)
            return True
        if kept.place is not None:
            self._left_out[kept.place] = self._left_out.get(kept.place, 0) + 1
        return False

    def _of_line(self, text: str, number: int) -> Iterator[KernelEvent]:
        if text.startswith("__REALTIME_TIMESTAMP="):
            self._record_at = _seconds(text.partition("=")[2])
            return
        if text.startswith("_BOOT_ID="):
            yield from self._booted(text.partition("=")[2], text, f"{self.name}:{number}", None)
            return
        line = self._taken_apart(text)
        where = f"{self.name}:{line.sequence if self.sequence_numbers and line.sequence else number}"
        if line.at is not None:
            self.last_at = line.at if self.last_at is None else max(self.last_at, line.at)
        if line.boot:
            yield from self._booted(line.boot, line.message, where, line.at)
        if line.uptime is not None:
            # A grep of the log lacks the kernel's banner; a clock that starts again tells the boot too.
            if self._uptime is not None and line.uptime < 60 < self._uptime - line.uptime:
                yield HostMessage(text=line.message[:TEXT_MAX], where=where, at=line.at, kind="boot")
            self._uptime = line.uptime
        message = _BREAK.sub(" ", line.message[:LINE_MAX_BYTES])[:TEXT_MAX]
        for pattern in self.patterns:
            if pattern.facts_in(message) is not None:
                yield HostMessage(text=message, where=where, at=line.at, kind=pattern.signal)
        if self._goes_on(message, number, stamped=line.at is not None or line.uptime is not None):
            return
        yield from self._ended()
        if _OPENS.search(message):
            self._sentence = _Sentence(message, where, line.at, number)
            if _is_whole(message):
                yield from self._ended()
            return
        yield from self._read(message, where, line.at)

    def _goes_on(self, message: str, number: int, *, stamped: bool) -> bool:
        """Add *message* to the driver's unfinished sentence, and return whether it is part of it."""
        sentence = self._sentence
        more = message.lstrip()
        if (
            sentence is None
            or number != sentence.last_line + 1
            or sentence.lines >= _SENTENCE_LINES
            or not more.startswith("NVRM: ")
            or _OTHER_NVRM.match(more)
            or (stamped and _is_whole(sentence.text))
        ):
            return False
        sentence.text = f"{sentence.text} {more.removeprefix('NVRM: ').strip()}"[:TEXT_MAX]
        sentence.last_line = number
        sentence.lines += 1
        return True

    def _ended(self) -> Iterator[KernelEvent]:
        """Yield what the driver's sentence says that has come to its end."""
        sentence, self._sentence = self._sentence, None
        if sentence is not None:
            yield from self._read(sentence.text, sentence.where, sentence.at)

    def _read(self, message: str, where: str, at: float | None) -> Iterator[KernelEvent]:
        for reads in _READERS:
            event = reads(message, where, at)
            if event is not None:
                yield from self._joined(event)
                return

    def _booted(self, boot: str, text: str, where: str, at: float | None) -> Iterator[KernelEvent]:
        if self._boot is not None and boot != self._boot:
            self._uptime = None
            yield HostMessage(text=text[:TEXT_MAX], where=where, at=at, kind="boot")
        self._boot = boot

    def _joined(self, event: KernelEvent) -> Iterator[KernelEvent]:
        """Make one event of the lines that the kernel prints about one thing."""
        if isinstance(event, OomKill):
            if event.cgroup is not None:  # the first line of two: wait for the second, which has the sizes
                yield from self._oom.values()
                self._oom = {event.pid: event}
                return
            first = self._oom.pop(event.pid, None)
            if first is not None:
                event = msgspec.structs.replace(event, cgroup=first.cgroup)
        elif isinstance(event, Sxid):
            previous, self._sxid = self._sxid, event.code
            if previous == event.code and _SXID_FURTHER.search(event.text):
                return
        yield event

    def _taken_apart(self, text: str) -> _Line:
        if text.startswith("{"):
            wrapped = _wrapped(text)
            return _of_json(text) if wrapped is None else self._taken_apart(wrapped)
        if text.startswith("MESSAGE="):
            return _Line(text[8:], at=self._record_at)
        kmsg = _KMSG.match(text)
        if kmsg:
            uptime = int(kmsg["microseconds"]) / 1e6
            return _Line(kmsg["text"], self._since_boot(uptime), uptime, kmsg["sequence"])
        if text.startswith(("-- Boot ", "-- Reboot")):
            return _Line(text, boot=text)
        text = _LEVEL.sub("", text, count=1)
        at, text = self._clock(text)
        text = _SENDER.sub("", text, count=1)
        uptime = _UPTIME.match(text)
        if uptime is None:
            return _Line(text, at)
        seconds = float(uptime[1])
        return _Line(text[uptime.end() :], self._since_boot(seconds) if at is None else at, seconds)

    def _clock(self, text: str) -> tuple[float | None, str]:
        """Return the wall-clock stamp at the beginning, Unix seconds, and what follows it."""
        clock = _CLOCK.match(text)
        if clock:
            month, day, hour, minute, second, year = clock.groups()
            return _unix(int(year), _MONTHS.get(month, 0), int(day), int(hour), int(minute), int(second)), text[
                clock.end() :
            ]
        iso = _ISO.match(text)
        if iso:
            *date, fraction, zone = iso.groups()
            at = _unix(*(int(part) for part in date))
            if at is not None:
                at += float(f"0.{fraction or 0}") - _offset_seconds(zone)
            return at, text[iso.end() :]
        syslog = _SYSLOG.match(text)
        if syslog:
            return self._without_year(syslog), text[syslog.end() :]
        return None, text

    def _without_year(self, stamp: re.Match[str]) -> float | None:
        if self.now is None:
            return None
        month, day, hour, minute, second, fraction = stamp.groups()
        year = datetime.datetime.fromtimestamp(self.now, _UTC).year
        for candidate in (year, year - 1):
            at = _unix(candidate, _MONTHS.get(month, 0), int(day), int(hour), int(minute), int(second))
            if at is not None and at <= self.now + 86400:
                return at + float(f"0.{fraction or 0}")
        return None

    def _since_boot(self, uptime: float) -> float | None:
        return None if self.booted_at is None else self.booted_at + uptime


def read(
    text: bytes | str, name: str = "kernel log", *, booted_at: float | None = None, now: float | None = None
) -> tuple[KernelEvent, ...]:
    """Return the events of a whole log; those before its last boot are marked as such."""
    reader = KernelLogReader(name, booted_at=booted_at, now=now)
    data = text.encode("utf-8", "replace") if isinstance(text, str) else text
    return with_boots_marked([*reader.feed(data), *reader.finish()])


def with_boots_marked(events: Iterable[KernelEvent]) -> tuple[KernelEvent, ...]:
    """Return the events, those before the last boot marker with `before_boot` set."""
    events = tuple(events)
    last = max((i for i, event in enumerate(events) if _is_boot(event)), default=0)
    return tuple(msgspec.structs.replace(e, before_boot=True) for e in events[:last]) + events[last:]


def _candidates(data: bytes, needles: Iterable[bytes]) -> list[tuple[int, int]]:
    """Return start and end of each line that holds a needle, in order."""
    found: dict[int, int] = {}
    for needle in needles:
        at = data.find(needle)
        while at >= 0:
            end = data.find(b"\n", at)
            end = len(data) if end < 0 else end
            found[data.rfind(b"\n", 0, at) + 1] = end
            at = data.find(needle, end)
    return sorted(found.items())


def _is_boot(event: KernelEvent) -> bool:
    return isinstance(event, HostMessage) and event.kind == "boot"


def _likeness(event: KernelEvent) -> object:
    if isinstance(event, Xid):
        return event.code, event.pci_address, event.process_name
    if isinstance(event, Sxid):
        return event.code, event.switch, event.severity
    if isinstance(event, OomKill):
        return "oom-kill"
    return event.kind, event.pci_address


def _kind(event: KernelEvent) -> object:
    """Return what an event is like, whichever process it happened to: devices and their codes are few."""
    if isinstance(event, Xid):
        return event.code, event.pci_address
    if isinstance(event, Sxid):
        return event.code, event.switch
    return _likeness(event)


def _seconds(microseconds: str) -> float | None:
    return (
        int(microseconds) / 1e6
        if microseconds.isascii() and microseconds.isdigit() and len(microseconds) < 20
        else None
    )


def _is_whole(sentence: str) -> bool:
    """Whether nothing is missing of a sentence of the driver."""
    return sentence.rstrip().endswith(("have the same version.", "respond to commands.", "responding to commands."))


def _wrapped(text: str) -> str | None:
    """Return the line that Docker's JSON holds; None where *text* is something else."""
    try:
        line = _journal_record(text).log.strip()
    except (msgspec.DecodeError, ValueError, RecursionError):
        return None
    return line if line and not line.startswith("{") else None


def _of_json(text: str) -> _Line:
    try:
        record = _journal_record(text)
    except (msgspec.DecodeError, ValueError, RecursionError):
        return _Line(text)
    message = record.message
    if isinstance(message, list):
        message = bytes(b for b in message if 0 <= b < 256).decode("utf-8", "replace")
    return _Line(message or "", at=_seconds(record.realtime), boot=record.boot or None)


def _unix(*date: int) -> float | None:
    """Return the Unix time of year, month, day, hour, minute and second; None where there is no such date."""
    try:
        return datetime.datetime(*date, tzinfo=_UTC).timestamp()
    except (TypeError, ValueError, OverflowError):
        return None


def _offset_seconds(zone: str | None) -> int:
    if zone is None or zone in {"Z", "UTC"}:
        return 0
    sign = -1 if zone[0] == "-" else 1
    return sign * (int(zone[1:3]) * 3600 + int(zone[-2:]) * 60)


def _address(match: re.Match[str], first: int = 1) -> str:
    """Return the PCI address as in `Gpu.pci_address`."""
    return f"{match[first][-10:].lower()}.{match[first + 1] or 0}"


def _xid(text: str, where: str, at: float | None) -> Xid | None:
    line = _XID.search(text)
    if line is None:
        return None
    detail = line[4] or ""
    who = _XID_WHO.match(detail)
    if who:
        detail = who["rest"] or ""
    cause = _XID_CAUSE.search(text)
    recovery = _XID_RECOVERY.search(detail)
    nvlink = _XID_NVLINK5.match(detail) or _XID_NVLINK.search(detail)
    return Xid(
        text=text[line.start() :].rstrip(),
        where=where,
        at=at,
        code=int(line[3]),
        pci_address=_address(line),
        pid=int(who["pid"]) if who and who["pid"].isdigit() else None,
        process_name=who["name"] if who and who["name"] not in {None, "<unknown>"} else None,
        caused_by=int(cause[1]) if cause else None,
        recovery_action=_RECOVERY_ACTIONS.get(int(recovery[1], 16), "other") if recovery else None,
        severity=_severity(nvlink[1]) if nvlink else None,
        link=int(nvlink[2]) if nvlink and int(nvlink[2]) >= 0 else None,
    )


def _severity(word: str | None) -> str | None:
    return None if word is None else "fatal" if word.lower() == "fatal" else "non-fatal"


def _sxid(text: str, where: str, at: float | None) -> Sxid | None:
    line = _SXID.search(text)
    if line is None:
        return None
    detail = line[4] or ""
    severity = _SXID_SEVERITY.match(detail)
    link = _SXID_LINK.search(detail)
    return Sxid(
        text=text.rstrip(),
        where=where,
        at=at,
        code=int(line[3]),
        switch=_address(line),
        severity=_severity(severity[1]) if severity else None,
        link=int(link[1]) if link else None,
    )


def _oom(text: str, where: str, at: float | None) -> OomKill | None:
    killed = _OOM_KILLED.search(text)
    if killed:
        rss = sum(int(kib) for kib in _RSS.findall(text)) * 1024
        return OomKill(
            text=text.rstrip(), where=where, at=at, pid=int(killed["pid"]), process_name=killed["name"], rss_bytes=rss
        )
    line = _OOM_LINE.search(text)
    if line is None:
        return None
    return OomKill(
        text=text.rstrip(), where=where, at=at, pid=int(line["pid"]), process_name=line["name"], cgroup=line["cgroup"]
    )


def _nvidia(text: str, where: str, at: float | None) -> NvidiaMessage | None:
    for kind, pattern in _NVIDIA:
        line = pattern.search(text)
        if line:
            address = _ADDRESS.search(text)
            return NvidiaMessage(
                text=text[line.start() :].rstrip(),
                where=where,
                at=at,
                kind=kind,
                pci_address=_address(address) if address else None,
            )
    return None


def _host(text: str, where: str, at: float | None) -> HostMessage | None:
    def message(kind: str, task: re.Match[str] | None = None, address: re.Match[str] | None = None) -> HostMessage:
        return HostMessage(
            text=text.rstrip(),
            where=where,
            at=at,
            kind=kind,
            pid=int(task["pid"]) if task else None,
            process_name=task["name"] if task else None,
            pci_address=_address(address) if address else None,
        )

    if text.startswith(("Linux version ", "-- Boot ", "-- Reboot")):
        return message("boot")
    hung = _HUNG.search(text)
    if hung:
        return message("hung-task", hung)
    fault = _SEGFAULT.search(text)
    if fault:
        return message("segfault", fault) if _SEGFAULT_OURS.search(text) else None
    if "AER:" in text or "PCIe Bus Error" in text:
        return message("aer", None, _ADDRESS.search(text.rpartition("received:")[2]) or _ADDRESS.search(text))
    if "Machine check" in text and "[Hardware Error]" in text:
        return message("mce")
    return None


_READERS: tuple[Callable[[str, str, float | None], KernelEvent | None], ...] = (_xid, _sxid, _oom, _nvidia, _host)
