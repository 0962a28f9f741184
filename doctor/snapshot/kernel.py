"""What the kernel log said since the last visit."""

from __future__ import annotations

from typing import TypeAlias

import msgspec


class Xid(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="xid"):
    """An `NVRM: Xid` line: the driver reports an error of a GPU."""

    text: str
    where: str
    """`/dev/kmsg:4711` or `dmesg.txt:12`."""
    at: float | None = None
    """Unix time, seconds; None where the evidence does not tell."""
    code: int
    pci_address: str
    """As in `Gpu.pci_address`; the function digit, which the line lacks, is 0."""
    pid: int | None = None
    process_name: str | None = None
    caused_by: int | None = None
    """Xid 45: "caused by previous Xid N", where the driver says so."""
    recovery_action: str | None = None
    """Xid 154: what is due now, in the words of `Gpu.recovery_action`."""
    severity: str | None = None
    """NVLink Xids: `fatal` or `non-fatal`, where the line tells."""
    link: int | None = None
    """NVLink Xids: the link, where the line tells one."""
    count: int = 1
    """Lines that it stands for: in a storm, those like it that were left out after it too."""
    before_boot: bool = False
    """It belongs to an earlier boot: history, not a symptom."""


class Sxid(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="sxid"):
    """An `SXid` line: the NVSwitch driver reports an error of a switch."""

    text: str
    where: str
    at: float | None = None
    code: int
    switch: str
    """PCI address of the switch, as in `Gpu.pci_address`."""
    severity: str | None = None
    """`fatal`, `non-fatal`, or None where the line does not tell."""
    link: int | None = None
    count: int = 1
    """As in `Xid`."""
    before_boot: bool = False


class OomKill(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="oom-kill"):
    """The kernel's or a cgroup's out-of-memory killer took a process."""

    text: str
    where: str
    at: float | None = None
    pid: int
    process_name: str
    """The kernel's `comm`, cut to 15 characters: `VLLM::Worker_TP`."""
    cgroup: str | None = None
    rss_bytes: int | None = None
    before_boot: bool = False


class NvidiaMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="nvidia"):
    """Another line of the NVIDIA driver that some symptom can use."""

    text: str
    where: str
    at: float | None = None
    kind: str
    """`api-mismatch`, `init-failed`, `gpu-lost`, `gsp-timeout`, `reset-required`, `module-loaded`, `module-unloaded`, `other`."""
    pci_address: str | None = None
    before_boot: bool = False


class HostMessage(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, tag="host"):
    """A line of the kernel itself that some symptom can use."""

    text: str
    where: str
    at: float | None = None
    kind: str
    """`segfault`, `hung-task`, `aer`, `mce`, `boot`; `site:ID` for a pattern of the site's own."""
    pci_address: str | None = None
    pid: int | None = None
    process_name: str | None = None
    before_boot: bool = False


KernelEvent: TypeAlias = Xid | Sxid | OomKill | NvidiaMessage | HostMessage
