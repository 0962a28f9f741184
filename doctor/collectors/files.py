"""Files below a root: read in bounded pieces, found as a process of that root would find them."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import TypeVar

from doctor.snapshot import Absent, Maybe, Why

MOST_BYTES = 1 << 20
"""No file of /proc, /sys or a configuration that is read here is larger than a few kilobytes."""

PIECE_BYTES = 64 << 10

MOST_LINKS = 40
"""As the kernel's own limit of symbolic links in one path (path_resolution(7))."""

T = TypeVar("T")


def text_of(path: str | Path, most: int = MOST_BYTES) -> str:
    """Return the beginning of a text file, at most *most* bytes; bytes that are no UTF-8 are kept escaped.

    Raises OSError.
    """
    return bytes_of(path, most).decode("utf-8", "backslashreplace")


def bytes_of(path: str | Path, most: int = MOST_BYTES) -> bytes:
    """Return the beginning of a file, at most *most* bytes. Raises OSError.

    A visit reads thousands of small files of /proc, and Python's file objects would cost more than the kernel's work.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        pieces: list[bytes] = []
        while most > 0 and (piece := os.read(descriptor, min(most, PIECE_BYTES))):
            pieces.append(piece)
            most -= len(piece)
    finally:
        os.close(descriptor)
    return b"".join(pieces)


def piece_of(path: str | Path, most: int) -> bytes:
    """Return what one reading of a file brings, at most *most* bytes: all of a small file of a process. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        return os.read(descriptor, most)
    finally:
        os.close(descriptor)


def names_in(folder: str | Path) -> list[str]:
    """Return the names of what is in a folder, in no order. Raises OSError.

    A folder of /proc has thousands of entries; as paths they would cost more than reading them.
    """
    return os.listdir(folder)  # noqa: PTH208 - names, not paths


def word_of(path: Path) -> str:
    """Return the stripped text of a file that holds one word, as files of /sys do. Raises OSError."""
    return text_of(path, 4096).strip()


def maybe(path: Path, meaning: Callable[[str], T]) -> Maybe[T]:
    """Return what *meaning* makes of the file's stripped text, or why that could not be had."""
    try:
        return meaning(word_of(path))
    except OSError as e:
        return why_not(e, path)
    except (ValueError, IndexError):
        return Absent(Why.FAILED, f"{path}: not understood")


def why_not(error: OSError, path: object, remedy: str = "run as root to see it") -> Absent:
    """Return the reason for an absence in the operator's words."""
    if isinstance(error, PermissionError):
        return Absent(Why.NO_PERMISSION, f"{path}: {remedy}")
    if error.errno in {errno.ENOENT, errno.ENOTDIR, errno.ESRCH, errno.ENODEV}:
        return Absent(Why.NOT_PRESENT, f"there is no {path}")
    return Absent(Why.FAILED, f"{path}: {error.strerror or error}")


def informations(folder: Path) -> Maybe[tuple[tuple[str, Maybe[dict[str, str]]], ...]]:
    """Return what the driver tells of each of its devices: a folder a device, named by its address, with a file in it."""
    try:
        devices = sorted(folder.iterdir())
    except OSError as e:
        return why_not(e, folder)
    return tuple((device.name, _information(device / "information")) for device in devices)


def _information(path: Path) -> Maybe[dict[str, str]]:
    try:
        lines = text_of(path).splitlines()
    except OSError as e:
        return why_not(e, path)
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}


def within(root: Path, path: str) -> Path:
    """Return where *path* leads for a process whose root directory is *root*, symbolic links followed.

    An absolute link of a container or of a foreign root points into that root, never into ours.
    Raises OSError when links run in a circle.
    """
    wanted = [part for part in reversed(PurePosixPath(path).parts) if part != "/"]
    found: list[str] = []
    links = 0
    while wanted:
        part = wanted.pop()
        if part == "..":
            del found[-1:]
            continue
        here = root.joinpath(*found, part)
        try:
            target = str(here.readlink())
        except OSError:  # no link, or not there: then the caller's open says so
            found.append(part)
            continue
        links += 1
        if links > MOST_LINKS:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(here))
        if target.startswith("/"):
            found.clear()
        wanted += [part for part in reversed(PurePosixPath(target).parts) if part != "/"]
    return root.joinpath(*found)
