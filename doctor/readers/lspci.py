"""`lspci -nn`, `lspci -vv`: the GPUs and NVSwitches that the PCI bus has, whoever drives them, and their links."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from doctor.snapshot import NOT_GIVEN, Gpu, Maybe, PciDevice, Pcie

_DEVICE = re.compile(
    r"^(?:([0-9a-f]{4}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) [^\n\[]*\[([0-9a-f]{4})\]: .*?\[([0-9a-f]{4}:[0-9a-f]{4})\](?: \(rev [0-9a-f]{2}\))?[^\[\]]*$",
    re.MULTILINE,
)

_NVIDIA = "10de:"
_KINDS = {"0300": "gpu", "0302": "gpu", "0680": "nvswitch"}
"""PCI class → kind, for devices of NVIDIA: VGA and 3D controllers; bridges of the class `other` are NVSwitches."""


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of `lspci -nn` lines in *text*."""
    start = end = -1
    for line in _DEVICE.finditer(text):
        if start >= 0 and text[end : line.start()].strip():
            yield start, end
            start = -1
        if start < 0:
            start = line.start()
        end = line.end()
    if start >= 0:
        yield start, end


def read(text: str) -> tuple[PciDevice, ...]:
    """Return the GPUs and NVSwitches, in the order of the text."""
    return tuple(
        PciDevice(address=f"{line[1] or '0000'}:{line[2]}", device_id=line[4], kind=_KINDS[line[3]])
        for line in _DEVICE.finditer(text)
        if line[4].startswith(_NVIDIA) and line[3] in _KINDS
    )


# What `-vv` adds.

_BLOCK = re.compile(
    r"^(?:([0-9a-f]{4}):)?([0-9a-f]{2}:[0-9a-f]{2}\.[0-7]) ([^\n]*)\n((?:(?:[ \t]+[^\n]*|[ \t]*)(?:\n|\Z))+)",
    re.MULTILINE,
)
_CLASS = re.compile(
    r"^(3D controller|VGA compatible controller|Display controller)(?: \[03\d\d\])?: NVIDIA Corporation"
)
_ID = re.compile(r"\[(10de:[0-9a-f]{4})\]")
_LINK = re.compile(r"\bLnk(Cap|Sta):[^\n]*?Speed ([0-9.]+)GT/s[^\n]*?Width x(\d{1,2})\b")
_BUS = re.compile(r"\bBus: primary=[0-9a-f]{2}, secondary=([0-9a-f]{2}),")
_DRIVER = re.compile(r"Kernel driver in use: (\S+)")

_GENERATIONS = {"2.5": 1, "5": 2, "8": 3, "16": 4, "32": 5, "64": 6}
"""Speed in GT/s → generation of PCI Express."""


class Link(msgspec.Struct, frozen=True, kw_only=True):
    """One NVIDIA GPU of `lspci -vv`."""

    device: PciDevice | None
    """None where the text has no device ids: it was asked without `-nn`."""
    address: str
    pcie: Pcie

    def gpu(self, index: int) -> Gpu:
        """Return the GPU as far as lspci shows it."""
        return Gpu(uuid=f"index:{index}", index=index, pci_address=self.address, pcie=self.pcie)


def find_links(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each run of blocks of `lspci -v` and beyond in *text* that has a link in it."""
    start = end = -1
    linked = False
    for block in _BLOCK.finditer(text):
        if start >= 0 and text[end : block.start()].strip():
            if linked:
                yield start, end
            start, linked = -1, False
        start = block.start() if start < 0 else start
        end = block.end()
        linked = linked or _LINK.search(block[4]) is not None
    if start >= 0 and linked:
        yield start, end


def read_links(text: str) -> tuple[Link, ...]:
    """Return NVIDIA's GPUs with their links, by PCI address, which is the order of NVML's indexes.

    A width that the port above can't do either is no shortfall; where the text has that port, its width counts too.
    """
    blocks = list(_BLOCK.finditer(text))
    above: dict[str, str] = {}
    for block in blocks:
        if bus := _BUS.search(block[4]):
            above[f"{block[1] or '0000'}:{bus[1]}"] = block[4]
    links: list[Link] = []
    for block in blocks:
        if not _CLASS.match(block[3]):
            continue
        address = f"{block[1] or '0000'}:{block[2]}"
        now, full = _speed_and_width(block[4], "Sta"), _speed_and_width(block[4], "Cap")
        port = _speed_and_width(above.get(address[:7], ""), "Cap")
        pcie = Pcie(
            generation=now[0],
            width=now[1],
            generation_max=_lesser(full[0], port[0]),
            width_max=_lesser(full[1], port[1]),
            told_by="lspci",
        )
        driver, number = _DRIVER.search(block[4]), _ID.search(block[3])
        device = PciDevice(
            address=address,
            device_id=number[1] if number else "",
            kind="gpu",
            driver=driver[1] if driver else NOT_GIVEN,
            generation=now[0],
            generation_max=full[0],
            width=now[1],
            width_max=full[1],
            upstream_generation_max=port[0],
            upstream_width_max=port[1],
        )
        links.append(Link(device=device if number else None, address=address, pcie=pcie))
    return tuple(sorted(links, key=lambda link: link.address))


def _speed_and_width(block: str, which: str) -> tuple[Maybe[int], Maybe[int]]:
    found = next((link for link in _LINK.finditer(block) if link[1] == which), None)
    if found is None:
        return NOT_GIVEN, NOT_GIVEN
    return _GENERATIONS.get(found[2].removesuffix(".0"), NOT_GIVEN), int(found[3])


def _lesser(one: Maybe[int], other: Maybe[int]) -> Maybe[int]:
    values = [value for value in (one, other) if isinstance(value, int)]
    return min(values) if values else one
