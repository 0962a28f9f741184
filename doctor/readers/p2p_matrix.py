"""The matrices that `nvidia-smi topo -p2p r|w|n|a` prints: which GPUs may reach each other's memory, and why not."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

import msgspec

from doctor.readers.passages import passages
from doctor.snapshot import GpuPair

STATES = {
    "OK": "ok",
    "CNS": "chipset-not-supported",
    "GNS": "gpu-not-supported",
    "TNS": "topology-not-supported",
    "DR": "disabled-by-regkey",
    "NS": "not-supported",
    "U": "unknown",
}
"""nvidia-smi's abbreviations (its own legend) → `GpuPair.p2p_read`."""

_FIELDS = {"r": "p2p_read", "w": "p2p_write", "n": "p2p_nvlink", "a": "p2p_atomics"}
"""Argument of `-p2p` → field; without the command in the paste it is taken for the usual `r`."""

_DECORATION = re.compile(r"\x1b\[[0-9;]*[A-Za-z]|^(?:> ?)+")
_HEADER = re.compile(r"^\s*GPU\d{1,3}(?:\s+GPU\d{1,3})*\s*$", re.ASCII)
_COMMAND = re.compile(r"\btopo\s+(?:-p2p|--p2p)[ =]*([rwna]|rw)?\b")
_CELL = "(?:X|OK|CNS|GNS|TNS|DR|NS|U)"
_ROW = re.compile(rf"^\s*GPU(\d{{1,3}})((?:\s+{_CELL})+)\s*$", re.ASCII)
_LEGEND = re.compile(rf"^\s*(?:Legend:|{_CELL} += .*)$")
_GPUS_MAX = 64


class P2pMatrix(msgspec.Struct, frozen=True, kw_only=True):
    """One matrix."""

    field: str
    """The field of `GpuPair` that it tells."""
    cells: dict[tuple[int, int], str]
    """By the indexes of both GPUs."""

    def pairs(self, uuids: Mapping[int, str]) -> tuple[GpuPair, ...]:
        """Return one pair for each two GPUs, the worse of both directions. *uuids*: by index, else `index:N`."""
        pairs: list[GpuPair] = []
        for first, second in sorted({(min(cell), max(cell)) for cell in self.cells}):
            ways = [self.cells[cell] for cell in ((first, second), (second, first)) if cell in self.cells]
            state = next((way for way in ways if way != "ok"), "ok")
            names = [uuids.get(gpu, f"index:{gpu}") for gpu in (first, second)]
            pair = GpuPair(first=names[0], second=names[1])
            pairs.append(msgspec.structs.replace(pair, **{self.field: state}))
        return tuple(pairs)

    @property
    def refused(self) -> tuple[tuple[int, int], ...]:
        """The pairs that may not reach each other."""
        return tuple(sorted({(min(c), max(c)) for c, state in self.cells.items() if state not in ("ok", "unknown")}))


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each such matrix in *text*, with its command and legend."""
    for start, end in passages(text, _begins, _belongs, divides=_divides):
        if read(text[start:end]) is not None:
            yield start, end


def read(text: str) -> P2pMatrix | None:
    """Return the first matrix in *text*, or None where there is none."""
    field, columns = "p2p_read", list[int]()
    cells: dict[tuple[int, int], str] = {}
    for line in map(_plain, text.splitlines()):
        if command := _COMMAND.search(line):
            field = _FIELDS.get(command[1] or "r", "p2p_read")
        elif not columns and len(line) < 8192 and _HEADER.match(line):
            columns = [int(number) for number in re.findall(r"\d+", line)][:_GPUS_MAX]
        elif columns and (row := _ROW.match(line)):
            for column, word in zip(columns, row[2].split(), strict=False):
                if word in STATES and column != int(row[1]):
                    cells[int(row[1]), column] = STATES[word]
    return P2pMatrix(field=field, cells=cells) if cells else None


def _plain(line: str) -> str:
    return _DECORATION.sub("", line)


def _begins(line: str) -> bool:
    return _divides(line) or (len(line) < 8192 and _HEADER.match(_plain(line)) is not None)


def _divides(line: str) -> bool:
    return _COMMAND.search(line) is not None


def _belongs(line: str) -> bool:
    plain = _plain(line)
    return not plain.strip() or any(pattern.match(plain) for pattern in (_HEADER, _ROW, _LEGEND))
