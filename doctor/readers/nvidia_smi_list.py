"""What `nvidia-smi` lists GPU by GPU: `-L`, `nvlink -s`, `nvlink -e` and `nvlink -R`, alone or one after the other."""

from __future__ import annotations

import re
from collections.abc import Iterator

import msgspec

from doctor.readers.nvidia_smi_q import is_masked, with_known_uuids
from doctor.readers.passages import passages
from doctor.snapshot import Absent, Gpu, Maybe, Mig, MigDevice, NvLink, Why

_GPU = re.compile(r"^GPU (\d{1,4}): (.+?) \(UUID: (.*?)\)\s*$")
_MIG = re.compile(r"^\s+MIG (\S+)\s+Device\s+(\d+): \(UUID: (.*?)\)")
_LINK = re.compile(r"^\s+Link (\d{1,3}): (?:(<inactive>)|([\d.]{1,12}) GB/s)", re.IGNORECASE)
_ERRORS = re.compile(r"^\s+Link (\d{1,3}): (Replay|Recovery|CRC)[\w ]* Errors?: (\d{1,19})")
_REMOTE = re.compile(r"^\s+Link (\d{1,3}): Remote Device ([0-9A-Fa-f]{4,8}:[0-9A-Fa-f]{2}:[0-9A-Fa-f]{2}\.\d)")
_REFUSED = re.compile(r"^\s*Nvlink queries are not supported", re.IGNORECASE)
_ALL_INACTIVE = re.compile(r"all links are inactive", re.IGNORECASE)
_CUT = re.compile(r"^\s*(?:\[?\.\.\.\]?|…)\s*$")
_OTHER = re.compile(r"^\s+(?:Link \d|NVLE:|Firmware Version|\w[\w ]*: *(?:\S.*)?$)")

_ERROR_FIELDS = {"Replay": "replay_errors_total", "Recovery": "recovery_errors_total", "CRC": "crc_errors_total"}

_CUT_LISTING = Absent(Why.NOT_GIVEN, "the listing of NVLinks is cut")


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each listing in *text*."""
    return passages(text, _GPU.match, _belongs)


def read(text: str) -> tuple[Gpu, ...]:
    """Return the GPUs that the listings name, each once, by index."""
    gpus: dict[int, _Listed] = {}
    current: _Listed | None = None
    for line in text.splitlines():
        header = _GPU.match(line)
        if header:
            current = gpus.setdefault(int(header[1]), _Listed(int(header[1]), header[2], header[3]))
        elif current is not None:
            current.take(line)
    return with_known_uuids([gpus[index].gpu() for index in sorted(gpus)])


def _belongs(line: str) -> bool:
    return (
        not line.strip()
        or _GPU.match(line) is not None
        or _REFUSED.match(line) is not None
        or _CUT.match(line) is not None
        or _OTHER.match(line) is not None
        or _MIG.match(line) is not None
        or _ALL_INACTIVE.search(line) is not None
    )


class _Listed:
    """What was said of one GPU so far."""

    def __init__(self, index: int, name: str, uuid: str) -> None:
        self.index = index
        self.name = name
        self.uuid = uuid
        self.links: dict[int, NvLink] = {}
        self.devices: list[MigDevice] = []
        self.why: Absent | None = None

    def take(self, line: str) -> None:
        link, errors, remote, device = _LINK.match(line), _ERRORS.match(line), _REMOTE.match(line), _MIG.match(line)
        if link:
            speed = None if link[2] else _speed(link[3])
            self._set(int(link[1]), active=not link[2], **({} if speed is None else {"speed_bytes_per_second": speed}))
        elif errors:
            self._set(int(errors[1]), **{_ERROR_FIELDS[errors[2]]: int(errors[3])})
        elif remote:
            domain, _, rest = remote[2].lower().partition(":")
            self._set(int(remote[1]), remote_pci_address=f"{int(domain, 16):04x}:{rest}")
        elif device:
            uuid = f"index:{self.index}/mig:{device[2]}" if is_masked(device[3]) else device[3]
            self.devices.append(MigDevice(uuid=uuid, profile=device[1]))
        elif _REFUSED.match(line):
            self.why = Absent(Why.NOT_SUPPORTED, "the GPU is in MIG mode")
        elif _ALL_INACTIVE.search(line):
            self._set(0, active=False)  # how many there are it does not say; one there is
        elif _CUT.match(line):
            self.why = _CUT_LISTING

    def gpu(self) -> Gpu:
        links: Maybe[tuple[NvLink, ...]] = Absent(Why.NOT_GIVEN, "no nvidia-smi nvlink -s was given")
        if self.why is not None:
            links = self.why
        elif self.links:
            links = tuple(self.links[number] for number in sorted(self.links))
        mig = Mig(enabled=True, devices=tuple(self.devices)) if self.devices else Mig()
        uuid = f"index:{self.index}" if is_masked(self.uuid) else self.uuid
        return Gpu(uuid=uuid, index=self.index, name=self.name, links=links, mig=mig)

    def _set(self, number: int, **fields: float | str | bool) -> None:
        link = self.links.get(number) or NvLink(link=number)
        self.links[number] = msgspec.structs.replace(link, **fields)


def _speed(text: str) -> float | None:
    try:
        return float(text) * 1e9
    except ValueError:
        return None
