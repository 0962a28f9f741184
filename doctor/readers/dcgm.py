"""What `dcgmi diag` and `dcgmi health` print: the tests that failed or warned, as states of GPUs where they tell one.

And `dcgmi nvlink -s`, the state of each link as a letter, and the lines of the host engine's log about health.

The sentences are those of DCGM's error table (dcgm_errors.h); they keep their words over releases, the tables don't.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from doctor.readers.passages import passages
from doctor.snapshot import Clocks, Ecc, Gpu, NvLink, Pcie, Thermal

_CELLS = re.compile(r"^\s*[|]([^|]*)[|]([^|]*)[|]?\s*$")
_RULE = re.compile(r"^\s*(?:\+[-=+]|[|+]-{5})")
_HEALTH = re.compile(r"^\s*(?:->\s*)?(GPU|NvSwitch|CPU)?\s*(\d+)?$")
_STATUS = re.compile(r"^\s*(Pass|Fail|Warn(?:ing)?|Failure|Skip|Healthy|Error)\b(?:\s*-\s*(.*))?", re.IGNORECASE)
_BAD = {"fail", "warn", "warning", "failure", "error"}
_DETAIL = {"Warning", "Error", "Info"}
_TESTS = re.compile(
    r"\b(?:Denylist|NVML Library|CUDA Main Library|Permissions and OS Blocks|Persistence Mode|Environment(?:al)? Variables"
    r"|Page Retirement(?:/Row Remap)?|Graphics Processes|Inforom|PCIe|GPU Memory|Memory|Diagnostic|SM Stress|Pulse Test"
    r"|Targeted (?:Stress|Power)|Memory Bandwidth|Memtest|EUD Test|Overall Health|\w+ system|Deployment)\b"
)

_LINE_MAX = 4096
_ROWS_MAX = 4096


class DcgmReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the tests say."""

    gpus: tuple[Gpu, ...] = ()
    """What they tell of GPUs as a state; an all-clear tells none."""
    unjudged: tuple[str, ...] = ()
    """Failures and warnings that are no state of a GPU, in DCGM's words."""
    tests: int = 0
    """How many results it holds."""


class _Complaint(msgspec.Struct):
    test: str
    gpu: str = ""
    cells: list[str] = []

    def words(self, pad: int) -> str:
        """Return the sentence, which is cut at the cell's width, inside of words too; *pad* spaces end the widest cell."""
        parts = (cell[1 : len(cell) - pad] if pad else f"{cell[1:]} " for cell in self.cells)
        return " ".join("".join(parts).split())


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each table of results in *text*, also of one that lost its head."""
    for start, end in passages(text, _belongs, _belongs):
        if _TESTS.search(text, start, end) and read(text[start:end]).tests:
            yield start, end


def _belongs(line: str) -> bool:
    return len(line) < _LINE_MAX and (_RULE.match(line) is not None or _CELLS.match(line) is not None)


def read(text: str) -> DcgmReport:
    """Return what the tables in *text* say; what is no part of one is passed over."""
    complaints, tests, pad = _complaints(text)
    states: dict[int, Gpu] = {}
    unjudged: list[str] = []
    for complaint in complaints:
        words = complaint.words(pad)
        # Where a widest cell ends with the space between two words, the padding looks wider by one than it is.
        if not _told(states, words) and not (pad > 1 and _told(states, complaint.words(pad - 1))):
            unjudged.append(f"{complaint.test}: {words or complaint.gpu or 'fails'}"[:300])
    return DcgmReport(gpus=tuple(states[index] for index in sorted(states)), unjudged=tuple(unjudged), tests=tests)


def _complaints(text: str) -> tuple[list[_Complaint], int, int]:
    """Return the failures and warnings, how many results there are, and the padding of the widest cell."""
    complaints: list[_Complaint] = []
    current: _Complaint | None = None
    test, tests = "", 0
    rows = [_CELLS.match(line[:_LINE_MAX]) for line in text.splitlines()[:_ROWS_MAX]]
    pad = min((len(row[2]) - len(row[2].rstrip(" ")) for row in rows if row is not None), default=0)
    for cells in rows:
        if cells is None:
            current = None
            continue
        label, value = cells[1].strip().removeprefix("->").strip(), cells[2]
        status = _STATUS.match(value)
        if label in _DETAIL and complaints and complaints[-1].test == test:
            current = complaints[-1]
            current.cells.append(value)
        elif label in ("Warning", "Error") and not status:  # the result that it belongs to was cut off
            tests += 1
            current = _Complaint(test or "dcgmi", cells=[value])
            complaints.append(current)
        elif status and (label or not current or not current.cells):
            test, tests = label or test, tests + 1
            current = None
            bad = status[1].lower() in _BAD and not (label and _HEALTH.match(label)) and label != "Overall Health"
            if bad:
                current = _Complaint(test, gpu=" ".join(value.split()))
                complaints.append(current)
        elif not label and current is not None:
            current.cells.append(value)
        elif label:
            test, current = label, None
    return complaints, tests, pad


_LINK_DOWN = re.compile(r"GPU (\d{1,3})'s NvLink link (\d{1,3}) is currently down")
_DBE = re.compile(
    r"(?:Detected (\d{1,18}) volatile double-bit ECC|double-bit ECC error has occur+ed on).*?GPU (\d{1,3})"
)
_FAILED = re.compile(r"GPU (\d{1,3}) ha[ds] uncorrectable memory errors and row remappings? (?:has |have )?failed")
_ROWS = re.compile(r"GPU (\d{1,3}) ha[ds] uncorrectable memory errors and (\d{1,9}) rows were remapped")
_PENDING = re.compile(
    r"GPU (\d{1,3}) ha[ds] (?:uncorrectable )?memory errors and row remapping(?:s are| is) pending"
    r"|[Pp]ending (?:retired page has been detected in|page retirements .*on) GPU (\d{1,3})"
)
_OFF = re.compile(
    r"GPU (\d{1,3})\b.{0,40}\b(?:fallen off the bus|GPU is lost)|Detected XID 79 for GPU (\d{1,3})", re.IGNORECASE
)
_UNPERSISTENT = re.compile(r"Persistence mode for GPU (\d{1,3}) is (?:currently )?disabled")
_WIDTH = re.compile(
    r"GPU (\d{1,3}) is running at PCI link width (\d{1,2})X, which is below the minimum allowed link \w+ of (\d{1,2})"
)

_HEAT = re.compile(
    r"[Tt]hermal violations (?:totaling|of) (?P<seconds>\d{1,9}(?:\.\d{1,6})?) ?s(?:econds?)?\b.{0,80}?GPU (?P<gpu>\d{1,3})"
    r"|(?P<span>\d{1,9}(?:\.\d{1,6})?) ?s(?:econds?)? of thermal violations .{0,80}?GPU (?P<of>\d{1,3})"
)
_TOO_HOT = re.compile(
    r"Temperature (\d{1,3})(?: ?C)? of GPU (\d{1,3}) exceeded (?:user-specified )?maximum allowed temperature (\d{1,3})"
)
_HEATED = re.compile(r"clocks? (?:event|throttling) due to thermal violation (?:in|on|for) GPU (\d{1,3})")
_THROTTLED = re.compile(r"GPU (\d{1,3})\b[^.]{0,120}clocks_(?:event|throttle)_reasons?_(sw|hw)_thermal_slowdown")


def _told(states: dict[int, Gpu], words: str) -> bool:
    """Add what *words* say of a GPU's state, and return whether they say any."""
    found = False
    for match in _LINK_DOWN.finditer(words):
        gpu = _state(states, match[1])
        links = gpu.links if isinstance(gpu.links, tuple) else ()
        down = NvLink(link=int(match[2]), active=False)
        _put(states, msgspec.structs.replace(gpu, links=(*(each for each in links if each.link != down.link), down)))
        found = True
    for pattern, field in (
        (_FAILED, "remap_failed"),
        (_PENDING, "remap_pending"),
        (_DBE, "uncorrected_volatile"),
        (_ROWS, "rows_remapped_uncorrected"),
    ):
        for match in pattern.finditer(words):
            gpu, value = _state(states, _index(pattern, match)), _count(pattern, match)
            _put(states, msgspec.structs.replace(gpu, ecc=msgspec.structs.replace(gpu.ecc, **{field: value})))
            found = True
    for match in _OFF.finditer(words):
        _put(states, msgspec.structs.replace(_state(states, match[1] or match[2]), lost=True))
        found = True
    for match in _UNPERSISTENT.finditer(words):
        _put(states, msgspec.structs.replace(_state(states, match[1]), persistence_mode=False))
        found = True
    for match in _WIDTH.finditer(words):
        pcie = Pcie(width=int(match[2]), width_max=int(match[3]), told_by="dcgmi")
        _put(states, msgspec.structs.replace(_state(states, match[1]), pcie=pcie))
        found = True
    for match in _HEAT.finditer(words):
        if float(match["seconds"] or match["span"]) > 0:
            _put(states, _slowed(_state(states, match["gpu"] or match["of"]), "sw"))  # DCGM adds up both kinds
        found = True
    for match in _HEATED.finditer(words):
        _put(states, _slowed(_state(states, match[1]), "sw"))
        found = True
    for match in _THROTTLED.finditer(words):
        _put(states, _slowed(_state(states, match[1]), match[2]))
        found = True
    for match in _TOO_HOT.finditer(words):
        heat = Thermal(gpu_celsius=float(match[1]), gpu_max_celsius=float(match[3]))
        _put(states, msgspec.structs.replace(_state(states, match[2]), thermal=heat))
        found = True
    return found


def _slowed(gpu: Gpu, kind: str) -> Gpu:
    reasons = gpu.clocks.event_reasons if isinstance(gpu.clocks.event_reasons, tuple) else ()
    told = tuple(sorted({*reasons, f"{kind}-thermal-slowdown"}))
    return msgspec.structs.replace(gpu, clocks=Clocks(event_reasons=told))


def _index(pattern: re.Pattern[str], match: re.Match[str]) -> str:
    if pattern is _DBE:
        return match[2]
    return match[1] or match[2]


def _count(pattern: re.Pattern[str], match: re.Match[str]) -> int | bool:
    """Return the number that the sentence gives; CUDA's word for one error gives none."""
    if pattern is _DBE:
        return int(match[1] or 1)
    return int(match[2]) if pattern is _ROWS else True


def _state(states: dict[int, Gpu], index: str) -> Gpu:
    return states.get(int(index)) or Gpu(uuid=f"index:{int(index)}", index=int(index), ecc=Ecc())


def _put(states: dict[int, Gpu], gpu: Gpu) -> None:
    states[gpu.index] = gpu


# The host engine's own log.

_HEALTH_LINE = re.compile(
    r"\[\[Health\]\] Detected an? (?P<level>\w+) in health system (?P<system>[\w ]{1,40}): '?(?P<words>[^\n]*)"
)


def find_log(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each line of nv-hostengine's log that reports a health system."""
    for match in _HEALTH_LINE.finditer(text):
        yield text.rfind("\n", 0, match.start()) + 1, match.end()


def read_log(text: str) -> DcgmReport:
    """Return what such lines say."""
    states: dict[int, Gpu] = {}
    unjudged: list[str] = []
    found = 0
    for match in _HEALTH_LINE.finditer(text):
        found += 1
        words = match["words"].strip(" '")
        if not _told(states, words):
            unjudged.append(f"{match['system']}: {words}"[:300])
    return DcgmReport(gpus=tuple(states[index] for index in sorted(states)), unjudged=tuple(unjudged), tests=found)


# `dcgmi nvlink -s`.

_LINKS_OF = re.compile(r"^[ \t]*gpuId (\d{1,3}):[ \t]*\n[ \t]+([UDX_](?: [UDX_]){0,63})[ \t]*$", re.MULTILINE)
_LINK_TABLE = re.compile(
    r"^[^\n]*NvLink Link Status[^\n]*\n(?:[^\n]*\n){0,3}?GPUs:[ \t]*\n(?:[ \t]+[^\n]*(?:\n|\Z))+", re.MULTILINE
)


def find_links(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each table of link states in *text*."""
    for match in _LINK_TABLE.finditer(text):
        yield match.span()


def read_links(text: str) -> tuple[Gpu, ...]:
    """Return the GPUs with their links: up, or down; those that are disabled or not there are left out."""
    return tuple(
        Gpu(
            uuid=f"index:{int(match[1])}",
            index=int(match[1]),
            links=tuple(
                NvLink(link=number, active=letter == "U")
                for number, letter in enumerate(match[2].split())
                if letter in "UD"
            ),
        )
        for match in _LINKS_OF.finditer(text)
    )
