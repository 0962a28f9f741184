"""A segment: a file of frames, each a visit; the first of every group is whole, the rest say what differs from it.

A frame is compressed by itself, with the whole visit of its group as the dictionary: damage to one costs one visit,
damage to a whole one its group, and no more.
"""

from __future__ import annotations

import zlib

import msgspec

from doctor.recorder.changes import changes
from doctor.recorder.frame import Frame, Mark, packed
from doctor.recorder.patch import Patch, difference, patched
from doctor.report import ReportedFinding
from doctor.snapshot import Snapshot

GROUP_VISITS = 60
"""Visits in a group: a whole one takes twice the bytes of another, so every 60th costs 2 %; 10 minutes at 10 s."""

LEVEL = 6
"""zlib's: on an 8-GPU node 5.6 KB a visit in 0.8 ms; 3 gives 6.6 KB in 0.4 ms, 9 gives 5.5 KB in 1.9 ms
(benchmarks/recorder.py)."""

DICTIONARY_BYTES = 32 << 10
"""As far as deflate looks back."""

TOLD_MAX_BYTES = 64 << 20
"""An entry that inflates to more is none of ours."""


class Entry(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One visit, what was found, and what the daemon had counted then."""

    snapshot: Snapshot
    findings: tuple[ReportedFinding, ...] | None = None
    """What was present; None: as at the entry before."""
    counted: bytes = b""
    """The daemon's counters of events, so that they go on after a restart; for the daemon alone."""


class _Difference(msgspec.Struct, frozen=True, omit_defaults=True):
    """An entry by what differs from the whole one of its group."""

    patch: Patch
    findings: tuple[ReportedFinding, ...] | None = None
    counted: bytes = b""


_entry_of = msgspec.json.Decoder(Entry).decode
_difference_of = msgspec.json.Decoder(_Difference).decode


class Writing:
    """Makes frames of entries, in the order of one segment."""

    def __init__(self) -> None:
        self._whole: Snapshot | None = None
        self._whole_number = 0
        self._findings: tuple[ReportedFinding, ...] = ()
        self._primed = _compressor()

    def frame(self, entry: Entry, number: int, *, is_start: bool = False) -> bytes:
        """Return the entry as it is written, without findings that are as they were."""
        is_whole = self._whole is None or number >= self._whole_number + GROUP_VISITS
        if not is_whole and not any(changes(self._findings, entry.findings or ())):
            entry = Entry(snapshot=entry.snapshot, counted=entry.counted)
        self._findings = self._findings if entry.findings is None else entry.findings
        marks = (Mark.START if is_start else Mark(0)) | (Mark(0) if entry.findings is None else Mark.FINDINGS)
        if self._whole is None or is_whole:
            self._whole, self._whole_number = entry.snapshot, number
            told = msgspec.json.encode(entry)
            self._primed = _compressor(told)
            compressor = _compressor()
        else:
            patch = difference(self._whole, entry.snapshot)
            told = msgspec.json.encode(_Difference(patch, entry.findings, entry.counted))
            compressor = self._primed.copy()
        payload = compressor.compress(told) + compressor.flush()
        return packed(Frame(number, self._whole_number, entry.snapshot.at, marks, payload))


class Reading:
    """Makes entries of a segment's frames, which come in order; some may be missing."""

    def __init__(self) -> None:
        self._frame: Frame | None = None
        self._whole: tuple[Entry, bytes] | None = None

    def pass_by(self, frame: Frame) -> None:
        """Take note of a frame that nobody wants told: later ones may differ from it."""
        if frame.is_whole:
            self._frame, self._whole = frame, None

    def entry(self, frame: Frame) -> Entry | None:
        """Return what the frame tells, or None where it can't be told, as when what it differs from is missing."""
        self.pass_by(frame)
        if self._frame is None or self._frame.number != frame.whole:
            return None
        try:
            if self._whole is None:
                told = _inflated(self._frame.payload)
                self._whole = _entry_of(told), told
            whole, told = self._whole
            if frame.is_whole:
                return whole
            change = _difference_of(_inflated(frame.payload, told))
            return Entry(
                snapshot=patched(whole.snapshot, change.patch), findings=change.findings, counted=change.counted
            )
        except (zlib.error, msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return None


def _compressor(dictionary: bytes = b""):
    return zlib.compressobj(LEVEL, zlib.DEFLATED, -zlib.MAX_WBITS, zdict=dictionary[-DICTIONARY_BYTES:])


def _inflated(payload: bytes, dictionary: bytes = b"") -> bytes:
    return zlib.decompressobj(-zlib.MAX_WBITS, zdict=dictionary[-DICTIONARY_BYTES:]).decompress(payload, TOLD_MAX_BYTES)
