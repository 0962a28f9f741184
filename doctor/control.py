"""How a running daemon is told to let go of the GPUs: a socket in its folder, for its own user and root alone.

A socket and not a file with a pid: who asks must hear whether the GPUs are free by now, and a pid may be another
process's. What the folder's rights leave open, the peer's user id closes.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import socket
import struct
import threading
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from doctor.collectors.gpu_access import GpuAccess

NAME = "control.sock"

SERVICE_FOLDER = Path("/run/gpu-doctor")
"""The service's RuntimeDirectory."""

MOST_BYTES = 4096
ASKED_SECONDS = 5.0
"""guess: who connects asks at once."""
ANSWERED_SECONDS = 60.0
"""guess: a visit that waits for NVML ends before, and so does NVML's child, unless the kernel holds it."""

CREDENTIALS = struct.Struct("3i")
"""struct ucred: pid, uid, gid."""


class ControlError(Exception):
    """A daemon could not be told; the message says why, and what to do."""


class Request(msgspec.Struct, frozen=True):
    """What a daemon is asked for."""

    release_seconds: float | None = None
    """How long to let go of the GPUs; None: take them up again."""


class Reply(msgspec.Struct, frozen=True):
    """What a daemon says to it."""

    refusal: str = ""
    """Why not; empty: it is done."""
    was_released: bool = False
    """Whether access had been let go before."""


@contextmanager
def control(folder: Path, access: GpuAccess, log: Any) -> Generator[None]:
    """Answer requests in *folder* meanwhile. Where there can be no socket the log says so, and signals are left."""
    try:
        listener = _listener(folder)
    except OSError as e:
        log.warning("no control socket", folder=str(folder), reason=e.strerror or str(e))
        yield
        return
    threading.Thread(target=_serve, args=(listener, access), name="control", daemon=True).start()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            listener.shutdown(socket.SHUT_RDWR)
        listener.close()
        with contextlib.suppress(OSError):
            (folder / NAME).unlink()


@contextmanager
def _address(folder: Path) -> Generator[str]:
    """Give an address that fits into the 108 bytes of a socket's, however long the folder's name is."""
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{opened}/{NAME}"
    finally:
        os.close(opened)


def _listener(folder: Path) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        (folder / NAME).unlink()  # a daemon that was killed left it; a living one holds the recorder's lock
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with _address(folder) as address:
            listener.bind(address)
        (folder / NAME).chmod(0o600)
        listener.listen(8)
    except OSError:
        listener.close()
        raise
    return listener


def _serve(listener: socket.socket, access: GpuAccess) -> None:
    while True:
        try:
            channel, _ = listener.accept()
        except OSError:
            return
        with channel, contextlib.suppress(OSError):
            channel.settimeout(ASKED_SECONDS)
            channel.sendall(msgspec.json.encode(_reply(channel, access)) + b"\n")


def _reply(channel: socket.socket, access: GpuAccess) -> Reply:
    _, uid, _ = CREDENTIALS.unpack(channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, CREDENTIALS.size))
    if uid not in (0, os.geteuid()):
        return Reply(refusal="only root and the daemon's own user may")
    try:
        request = msgspec.json.decode(_line(channel), type=Request)
    except msgspec.DecodeError as e:
        return Reply(refusal=f"the request is none: {e}")
    by = _name(uid)
    if request.release_seconds is None:
        return Reply(was_released=access.retake(by))
    if not access.is_held:
        return Reply(refusal="this daemon opens no GPU")
    held = access.release(request.release_seconds, by)
    if held is not None:
        return Reply(
            refusal=f"the kernel holds the process that talks to NVML (pid {held}); it ends when its call returns"
        )
    return Reply()


def _name(uid: int) -> str:
    try:
        return pwd.getpwuid(uid).pw_name
    except KeyError:
        return f"user {uid}"


def _line(channel: socket.socket) -> bytes:
    received = b""
    while b"\n" not in received and len(received) < MOST_BYTES:
        piece = channel.recv(MOST_BYTES)
        if not piece:
            break
        received += piece
    return received


def answer_of_daemon(folders: Sequence[Path], request: Request) -> Reply:
    """Ask the daemon that has its socket in one of these folders. Raises ControlError, also where it refuses."""
    for folder in folders:
        try:
            reply = _asked(folder, request)
        except (FileNotFoundError, NotADirectoryError, ConnectionRefusedError):
            continue
        except PermissionError as e:
            msg = f"{folder / NAME}: only root and the daemon's own user may ask it; try with sudo"
            raise ControlError(msg) from e
        except (OSError, msgspec.DecodeError) as e:
            msg = f"the daemon at {folder / NAME} did not answer: {e}"
            raise ControlError(msg) from e
        if reply.refusal:
            msg = f"the daemon at {folder / NAME} could not: {reply.refusal}"
            raise ControlError(msg)
        return reply
    tried = " or ".join(map(str, folders))
    msg = (
        f"no daemon listens in {tried}: name its folder with --state-dir, or, where it has none, send it SIGUSR1 (let go) "
        "or SIGUSR2 (take up)"
    )
    raise ControlError(msg)


def _asked(folder: Path, request: Request) -> Reply:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as channel, _address(folder) as address:
        channel.settimeout(ANSWERED_SECONDS)
        channel.connect(address)
        channel.sendall(msgspec.json.encode(request) + b"\n")
        return msgspec.json.decode(_line(channel), type=Reply)
