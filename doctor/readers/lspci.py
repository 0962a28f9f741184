"""`lspci -nn`: the GPUs and NVSwitches that the PCI bus has, whoever drives them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from doctor.snapshot import PciDevice

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
