"""The fabric manager's log: what some symptom can use, with its time and place."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.readers import fabric_manager_log

SAMPLES = Path(__file__).parent.parent.parent / "shared" / "samples" / "node"


@pytest.mark.parametrize(
    ("text", "kind"),
    [
        (
            "fabric manager NVIDIA GPU driver interface version 595.1 don't match with driver version 590.2.",
            "version-mismatch",
        ),
        ("request to query NVSwitch failed with error:WARNING Nothing to do [NV_WARN_NOTHING_TO_DO]", "nothing-to-do"),
        ("detected NVSwitch fatal error 10003 on fid 0 on NVSwitch pci bus id 00000000:05:00.0", "fatal"),
        ("detected NVSwitch non-fatal error 12028 on fid 0", "non-fatal"),
        ("Successfully configured all the available GPUs and NVSwitches to route NVLink traffic.", "started"),
    ],
)
def test_messages_are_told_apart(text: str, kind: str) -> None:
    (message,) = fabric_manager_log.read(f"[Jun 01 2026 10:00:00] [INFO] [tid 7] {text}\n")
    assert (message.kind, message.text, message.where) == (kind, text, "fabricmanager.log:1")


def test_stamps_are_local_time() -> None:
    line = "[Jan 01 1970 02:00:05] [ERROR] [tid 7] something new went wrong\n"
    (message,) = fabric_manager_log.read(line, utc_offset_seconds=7200.0)
    assert (message.at, message.kind) == (5.0, "other")


def test_ordinary_lines_are_no_messages() -> None:
    text = "[Jun 01 2026 10:00:00] [INFO] [tid 7] multicast group 0 is allocated.\nMessage payload details:Flags:0\n\n"
    assert fabric_manager_log.read(text) == ()


@pytest.mark.parametrize(
    "text",
    ["Fabric Manager version is : 580.95.05", "[x] Fabric Manager version 580.95.05 is running with the following"],
)
def test_the_version_is_read(text: str) -> None:
    assert fabric_manager_log.version(text) == "580.95.05"


def test_a_real_log_holds_one_fault_among_its_chatter() -> None:
    path = SAMPLES / "fabricmanager-log-inband-and-nonfatal.txt"
    if not path.exists():
        pytest.skip("the shared samples are not beside this checkout")
    kinds = [message.kind for message in fabric_manager_log.read(path.read_text())]
    assert set(kinds) == {"non-fatal"}


@settings(max_examples=200)
@given(st.text(max_size=400) | st.from_regex(r"\[(Jan|Foo) \d\d \d{4} \d\d:\d\d:\d\d\] \[ERROR\] .*", fullmatch=True))
def test_any_text_is_taken(text: str) -> None:
    fabric_manager_log.read(text)
    fabric_manager_log.version(text)
