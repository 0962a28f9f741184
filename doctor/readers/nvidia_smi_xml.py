"""`nvidia-smi -q -x`: the same log as `nvidia-smi -q`, as XML.

Its elements are turned into the labels of the plain log, and the plain log's reader does the rest: one meaning, one place.
Tags are those of drivers 470 to 580 (nvsmi_device_v11 to v13).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import cast
from xml.etree import ElementTree as ET

from doctor.readers import nvidia_smi_q
from doctor.readers.nvidia_smi_q import SmiReport

DOCUMENT_MAX_CHARACTERS = 2 << 20
"""Of one log; eight GPUs with every supported clock come to less than 300 thousand."""

_DEPTH_MAX = 12
_PIECE_CHARACTERS = 1 << 16
"""Given to the parser at once: a GPU read is let go of before the next."""

_BEGIN = re.compile(r"<nvidia_smi_log\b[^<>]{0,200}>|<gpu id=\"")
_PROLOGUE = re.compile(r"(?:<\?xml[^<>]{0,200}\?>\s*)?(?:<!DOCTYPE nvidia_smi_log[^<>\[]{0,200}>\s*)?\Z")
_END = "</nvidia_smi_log>"

_LABELS = {
    "attached_gpus": "Attached GPUs",
    "driver_version": "Driver Version",
    "cuda_version": "CUDA Version",
    "uuid": "GPU UUID",
    "serial": "Serial Number",
    "vbios_version": "VBIOS Version",
    "img_version": "Image Version",
    "gpu_recovery_action": "GPU Recovery Action",
    # PCI
    "pci": "PCI",
    "pci_device_id": "Device Id",
    "pci_sub_system_id": "Sub System Id",
    "pci_bus_id": "Bus Id",
    "pci_gpu_link_info": "GPU Link Info",
    "pcie_gen": "PCIe Generation",
    "max_link_gen": "Max",
    "current_link_gen": "Current",
    "link_widths": "Link Width",
    "max_link_width": "Max",
    "current_link_width": "Current",
    "replay_counter": "Replays Since Reset",
    "tx_util": "Tx Throughput",
    "rx_util": "Rx Throughput",
    # Modes
    "gpu_virtualization_mode": "GPU Virtualization Mode",
    "mig_mode": "MIG Mode",
    "current_mig": "Current",
    "pending_mig": "Pending",
    "mig_device": "MIG Device",
    "gpu_instance_id": "GPU Instance ID",
    "compute_instance_id": "Compute Instance ID",
    "multiprocessor_count": "Multiprocessor count",
    "ecc_mode": "ECC Mode",
    "current_ecc": "Current",
    "pending_ecc": "Pending",
    # Memory and its errors
    "fb_memory_usage": "FB Memory Usage",
    "bar1_memory_usage": "BAR1 Memory Usage",
    "ecc_errors": "ECC Errors",
    "sram_correctable": "SRAM Correctable",
    "sram_uncorrectable": "SRAM Uncorrectable",
    "sram_uncorrectable_parity": "SRAM Uncorrectable Parity",
    "sram_uncorrectable_secded": "SRAM Uncorrectable SEC-DED",
    "dram_correctable": "DRAM Correctable",
    "dram_uncorrectable": "DRAM Uncorrectable",
    "sram_threshold_exceeded": "SRAM Threshold Exceeded",
    "pending_blacklist": "Pending Page Blacklist",
    "pending_retirement": "Pending Page Blacklist",
    "remapped_row_corr": "Correctable Error",
    "remapped_row_unc": "Uncorrectable Error",
    "remapped_row_pending": "Pending",
    "remapped_row_failure": "Remapping Failure Occurred",
    # Heat, power, clocks
    "gpu_temp": "GPU Current Temp",
    "memory_temp": "Memory Current Temp",
    "gpu_temp_tlimit": "GPU T.Limit Temp",
    "gpu_temp_slow_tlimit_threshold": "GPU Slowdown T.Limit Temp",
    "gpu_temp_max_tlimit_threshold": "GPU Shutdown T.Limit Temp",
    "gpu_temp_slow_threshold": "GPU Slowdown Temp",
    "gpu_temp_max_threshold": "GPU Shutdown Temp",
    "gpu_temp_max_gpu_threshold": "GPU Max Operating Temp",
    "gpu_temp_max_mem_threshold": "Memory Max Operating Temp",
    "gpu_power_readings": "GPU Power Readings",
    "average_power_draw": "Average Power Draw",
    "instant_power_draw": "Instantaneous Power Draw",
    "sm_clock": "SM",
    "mem_clock": "Memory",
    "gpu_util": "GPU",
    "memory_util": "Memory",
    "clocks_event_reasons_counters_sw_power_cap": "SW Power Capping",
    "clocks_event_reasons_counters_sync_boost": "Sync Boost",
    "clocks_event_reasons_counters_sw_therm_slowdown": "SW Thermal Slowdown",
    "clocks_event_reasons_counters_hw_therm_slowdown": "HW Thermal Slowdown",
    "clocks_event_reasons_counters_hw_power_brake": "HW Power Braking",
    **nvidia_smi_q.REASON_LABELS,
    # Processes
    "pid": "Process ID",
    "process_name": "Name",
    "used_memory": "Used GPU Memory",
}
"""Tag → label; every other tag gives its own words, each with a capital (`persistence_mode`: `Persistence Mode`)."""

_REASON = re.compile(r"^clocks_(?:event|throttle)_reason_")
_IN_PROCESS = {"gpu_instance_id": "GPU instance ID", "compute_instance_id": "Compute instance ID"}
"""Within a process the plain log writes these two otherwise."""
_LEFT_OUT = frozenset({"supported_clocks", "accounted_processes", "retired_pagelist"})
"""Long, and asked by nobody."""


def find(text: str) -> Iterator[tuple[int, int]]:
    """Yield start and end of each such log in *text*; a torn one ends where the next begins, or with the text."""
    position = 0
    while begin := _BEGIN.search(text, position):
        prologue = _PROLOGUE.search(text, max(position, begin.start() - 500), begin.start())
        start = prologue.start() if prologue else begin.start()
        end = text.find(_END, begin.end())
        position = min(len(text) if end < 0 else end + len(_END), begin.start() + DOCUMENT_MAX_CHARACTERS)
        yield start, position


def read(text: str) -> SmiReport:
    """Return what the XML says, of a torn one what comes before the tear; a document with entities of its own says nothing."""
    begin = _BEGIN.search(text)
    if begin is None or "<!ENTITY" in text:
        return SmiReport()
    body = text[begin.start() : begin.start() + DOCUMENT_MAX_CHARACTERS]
    lines: list[str] = []
    for element in _elements(body):
        if element.tag == "gpu":
            lines.append(f"GPU {element.get('id', '')}")
            lines += _lines(element, 1)
            element.clear()
        elif element.tag in ("timestamp", "driver_version", "cuda_version", "attached_gpus"):
            lines.insert(0, f"{_label(element.tag)} : {_words(element)}")
    return nvidia_smi_q.read("\n".join(lines))


def _elements(body: str) -> Iterator[ET.Element]:
    """Yield each element that ends, up to the first fault.

    What stands before the root is not in *body*: no document type ever reaches the parser, and so no entities either.
    """
    parser: ET.XMLPullParser[ET.Element] = ET.XMLPullParser(("end",))
    try:
        for start in range(0, len(body), _PIECE_CHARACTERS):
            parser.feed(("" if start else "<paste>") + body[start : start + _PIECE_CHARACTERS])
            for _, element in cast("Iterator[tuple[str, ET.Element]]", parser.read_events()):
                yield element
    except ET.ParseError:
        return


def _lines(element: ET.Element, depth: int) -> Iterator[str]:
    if depth > _DEPTH_MAX:
        return
    for child in element:
        if child.tag in _LEFT_OUT:
            continue
        indent = "    " * depth
        if child.tag in ("mig_devices", "process_info"):  # levels that the plain log has not
            yield from _lines(child, depth)
        elif child.tag == "processes":
            yield f"{indent}Processes" if len(child) else f"{indent}Processes : {_words(child) or 'None'}"
            yield from _process_lines(child, depth + 1)
        else:
            words = _words(child)
            yield (
                f"{indent}{_label(child.tag)} : {words}" if words or not len(child) else f"{indent}{_label(child.tag)}"
            )
            yield from _lines(child, depth + 1)


def _process_lines(processes: ET.Element, depth: int) -> Iterator[str]:
    indent = "    " * depth
    for process in processes:
        for part in process:
            inner = "    " if part.tag in ("type", "process_name", "used_memory") else ""
            yield f"{indent}{inner}{_IN_PROCESS.get(part.tag) or _label(part.tag)} : {_words(part)}"


def _label(tag: str) -> str:
    tag = _REASON.sub("", tag)
    return _LABELS.get(tag) or " ".join(word[:1].upper() + word[1:] for word in tag.split("_"))


def _words(element: ET.Element) -> str:
    return " ".join((element.text or "").split())
