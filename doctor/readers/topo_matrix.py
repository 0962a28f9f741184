"""The matrix that `nvidia-smi topo -m` prints, in all the forms in which people paste it.

The cells of a row are taken from the left by what they look like, as many as the header has devices, so that tabs, spaces,
headers and cells that a paste has glued together and missing tail columns don't matter.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import msgspec

from doctor.snapshot import Absent, GpuPair, Maybe, Why

TAIL = ("CPU Affinity", "NUMA Affinity", "GPU NUMA ID")
"""The columns that are no devices, in their order; old drivers print only the first, or the first two."""

_DECORATION = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|\[[04]m|^(?:> ?)+")
"""The underline of the header, also where a paste has lost the escape character; the marks of a quotation."""
_GLUED = re.compile(r"(?:GPU\d+|NIC\d+|mlx\d_(?:bond_)?\d+)+", re.ASCII)
"""`GPU0`, `NIC12`, `mlx5_3` in old drivers, and several of them that a paste has glued together."""

_PART = re.compile(r"GPU\d+|NIC\d+|mlx\d_(?:bond_)?\d+", re.ASCII)
_OTHER_NIC = re.compile(r"[a-z][a-z0-9_]{0,30}\d", re.ASCII)
"""`hfi1_0`, `bnxt_re0`, `rdmap16s27`: other network cards in old drivers."""

_CELL = re.compile(r"[ \t]*(X(?=[\s\d]|$|PIX|PXB|PHB|NODE|SYS|SOC|NV\d)|PIX|PXB|PHB|NODE|SYS|SOC|NV\d{1,2})")
_ROW = re.compile(rf"^[ \t]*({_PART.pattern}|{_OTHER_NIC.pattern})(?=[ \t])(?:{_CELL.pattern})", re.ASCII)
_NIC_NAME = re.compile(r"^\s*(NIC\d+): *(\S+)\s*$", re.ASCII)
_GPU = re.compile(r"^GPU(\d+)$", re.ASCII)

_HEADER_MAX = 8192

_DEVICES_MAX = 512
"""More columns than any node has; a header with more is no header."""


class Row(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One device's row."""

    device: str
    cells: tuple[str, ...]
    """One a device of the header, from the left; fewer where the paste was cut."""
    cpu_affinity: str | None = None
    numa_affinity: str | None = None
    gpu_numa_id: str | None = None


class TopoMatrix(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """The matrix as printed."""

    devices: tuple[str, ...]
    """The header's devices, in order."""
    rows: tuple[Row, ...]
    tail: tuple[str, ...] = ()
    """Which of the tail columns the header names."""
    nics: dict[str, str] = {}
    """The NIC legend: `NIC0` → `mlx5_0`."""

    def cell(self, first: str, second: str) -> str | None:
        """Return how *first* reaches *second*, or None where the matrix does not say."""
        if second not in self.devices:
            return None
        column = self.devices.index(second)
        return next((row.cells[column] for row in self.rows if row.device == first and column < len(row.cells)), None)

    def numa_node(self, gpu: int) -> Maybe[int]:
        """Return the NUMA node of a GPU's memory affinity; absent where the matrix tells none, or several."""
        near = next((row.numa_affinity for row in self.rows if row.device == f"GPU{gpu}"), None)
        return int(near) if near is not None and re.fullmatch("[0-9]{1,4}", near) else _NO_NODE

    @property
    def gpus(self) -> tuple[int, ...]:
        """The indexes of the GPUs that the header or a row names."""
        named = (*self.devices, *(row.device for row in self.rows))
        return tuple(sorted({int(gpu[1]) for gpu in map(_GPU.match, named) if gpu}))

    def pairs(self, uuids: Mapping[int, str] | None = None) -> tuple[GpuPair, ...]:
        """Return one `GpuPair` for each two GPUs of which either row tells the way.

        *uuids*: UUIDs by index; a GPU without one is `index:N`.
        The PCIe way of a pair with NVLink is not in the matrix, so its `ancestor` is absent.
        """
        names = uuids or {}
        pairs: list[GpuPair] = []
        for position, first in enumerate(self.gpus):
            for second in self.gpus[position + 1 :]:
                way = self.cell(f"GPU{first}", f"GPU{second}") or self.cell(f"GPU{second}", f"GPU{first}")
                if way is None or way == "X":
                    continue
                links = int(way[2:]) if way.startswith("NV") else 0
                pairs.append(
                    GpuPair(
                        first=names.get(first, f"index:{first}"),
                        second=names.get(second, f"index:{second}"),
                        nvlinks=links,
                        ancestor=_HIDDEN if links else way,
                    )
                )
        return tuple(pairs)


_NO_NODE = Absent(Why.NOT_GIVEN, "topo -m does not tell one")
_HIDDEN = Absent(Why.NOT_GIVEN, "topo -m shows NVLink in its place")


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each matrix in *text*, with its legends."""
    lines = text.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))
    number = 0
    while number < len(lines):
        end = _end(lines, number)
        if end is None:
            number += 1
        else:
            yield starts[number], starts[end]
            number = end


def read(text: str) -> TopoMatrix | None:
    """Return the first matrix in *text*, or None where there is none."""
    lines = text.splitlines()
    for number in range(len(lines)):
        end = _end(lines, number)
        if end is not None:
            return _matrix([_plain(line) for line in lines[number:end]])
    return None


def render(matrix: TopoMatrix) -> str:
    """Return the matrix as a driver of today prints it, without escapes; `read` takes it back unchanged."""
    lines = ["\t" + "\t".join((*matrix.devices, *matrix.tail))]
    for row in matrix.rows:
        cells = [" X " if cell == "X" else cell for cell in row.cells]
        values = [value or "" for value in (row.cpu_affinity, row.numa_affinity, row.gpu_numa_id)][: len(matrix.tail)]
        if len(matrix.tail) == len(TAIL):
            values.insert(2, "")  # the driver prints an empty column here
        lines.append("\t".join((row.device, *cells, *values)).rstrip("\t"))
    if matrix.nics:
        lines += ["", "NIC Legend:", "", *(f"  {nic}: {name}" for nic, name in matrix.nics.items())]
    return "\n".join(lines) + "\n"


def _plain(line: str) -> str:
    return _DECORATION.sub("", line).rstrip("\r\n")


def _header(line: str) -> tuple[list[str], list[str]] | None:
    """Return the devices and the tail columns that a header names, or None where the line is none."""
    if "GPU" not in line or len(line) > _HEADER_MAX:
        return None
    head, affinity, rest = line.partition(TAIL[0])
    devices: list[str] = []
    for word in head.split():
        if _GLUED.fullmatch(word):
            devices += _PART.findall(word)
        elif _OTHER_NIC.fullmatch(word):
            devices.append(word)
        else:
            return None
    return devices, [name for name in TAIL if name in affinity + rest]


def _end(lines: Sequence[str], start: int) -> int | None:
    """Return the number of the line after the matrix whose header begins at *start*; None: none begins there."""
    if "GPU0" not in lines[start] or _header(_plain(lines[start])) is None:
        return None
    number = start + 1
    while number < len(lines) and number < start + 8 and _header(_plain(lines[number])) is not None:
        number += 1  # a header that the paste broke
    rows = number
    while number < len(lines) and _is_row(_plain(lines[number]), number > rows):
        number += 1
    if number == rows:
        return None
    end = number
    while number < len(lines) and _belongs_to_legend(_plain(lines[number])):
        number += 1
        if lines[number - 1].strip():
            end = number
    return end


def _is_row(line: str, may_continue: bool) -> bool:
    """Whether *line* is a row, or the rest of one that a narrow terminal has broken."""
    return _ROW.match(line) is not None or (may_continue and _CELL.match(line) is not None and " = " not in line)


def _belongs_to_legend(line: str) -> bool:
    line = line.strip()
    return (
        not line
        or line in {"Legend:", "NIC Legend:"}
        or re.match(r"(?:X|SYS|SOC|NODE|PHB|PXB|PIX|NV#) += ", line) is not None
        or _NIC_NAME.match(line) is not None
    )


def _matrix(lines: Sequence[str]) -> TopoMatrix | None:
    devices: list[str] = []
    tail: list[str] = []
    rows: list[Row] = []
    nics: dict[str, str] = {}
    whole: list[str] = []
    for line in lines:
        if whole and _ROW.match(whole[-1]) and not _ROW.match(line) and _is_row(line, may_continue=True):
            whole[-1] += " " + line
        else:
            whole.append(line)
    for line in whole:
        row = _ROW.match(line)
        if row:
            found = _row(line, row[1], devices, tail)
            if found is not None:
                rows.append(found)
        elif not rows and (header := _header(line)) is not None:
            devices += header[0]
            tail += header[1]
        else:
            nic = _NIC_NAME.match(line)
            if nic:
                nics[nic[1]] = nic[2]
    if len(devices) > _DEVICES_MAX:
        return None
    return TopoMatrix(devices=tuple(devices), rows=tuple(rows), tail=tuple(tail), nics=nics)


def _row(line: str, device: str, devices: Sequence[str], tail: Sequence[str]) -> Row | None:
    position = line.index(device) + len(device)
    cells: list[str] = []
    while len(cells) < len(devices):
        cell = _CELL.match(line, position)
        if cell is None:
            break
        cells.append("SYS" if cell[1] == "SOC" else cell[1])
        position = cell.end()
    if device in devices:
        own = devices.index(device)
        expected = [own] if own < len(cells) else []
        # A device reaches itself in its own column; a row where that is elsewhere has lost or gained a cell.
        if [place for place, cell in enumerate(cells) if cell == "X"] != expected:
            return None
    values = _tail_values(line[position:], len(tail))
    return Row(device=device, cells=tuple(cells), **dict(zip(_TAIL_FIELDS, values, strict=False)))


_TAIL_FIELDS = ("cpu_affinity", "numa_affinity", "gpu_numa_id")


def _tail_values(text: str, columns: int) -> list[str | None]:
    """Return the values of the tail columns, None where a column is empty."""
    if "\t" in text.strip(" "):
        fields = [field.strip() for field in text.strip(" ").split("\t")]
        fields = fields[1:] if not fields[0] else fields
        if columns == len(TAIL) and len(fields) > columns and not fields[2]:
            del fields[2]
        if len(fields) <= columns:
            return [field or None for field in fields]
    words = text.split()
    if columns == len(TAIL) and words == ["N/A"]:  # a virtual machine or WSL, its empty columns collapsed
        return [None, None, "N/A"]
    return list(words[:columns])
