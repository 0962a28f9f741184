"""NVML, seen from the parent: a spawned child asks it, and the parent waits no longer than it wants to.

A sick driver blocks a caller in the kernel for seconds or for ever, and such a process can't be killed: so the parent
never loads NVML, never waits past its deadline, and starts no second child while one is blocked. That NVML does not
answer is itself what it reports.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

import msgspec

import doctor
from doctor.collectors.collector import CannotSeeError, Reading, Visit
from doctor.collectors.nvml_frames import FRAME_MAX_BYTES, LENGTH, Answer, Ask, frame
from doctor.snapshot import Absent, KernelEvent, Source, Why, Xid, known

CHILD = (sys.executable, "-m", "doctor.collectors.nvml_child")

LATE_LOOK_SECONDS = 0.2
"""How long a visit looks for the answer of a child that kept the last one waiting."""
FEED_MARGIN_SECONDS = 0.5
"""The visit's own deadline is this much later, so that the report of the silence comes from here."""
HANG_UP_SECONDS = 0.5
TERM_SECONDS = 2.0
KILL_SECONDS = 0.5
PROBE_SECONDS = 600.0
"""guess: how long NVML is left alone after Xid 119 or 120 before a fresh child tries again: each call to a GPU whose
GSP is gone blocks for 6 to 45 s (dmesg samples of drivers 525 and later)."""

STILL_OPENING = "; it has not answered at all yet: without persistence mode opening the GPUs takes up to half a minute"

GPU_OFF_THE_BUS = 79
GSP_GONE = (119, 120)
"""Xid codes: GSP RPC timeout, GSP error."""


class NvmlCollector:
    """NVML through a child process. It keeps the child between visits."""

    source = Source.NVML
    after_engines = False

    def __init__(
        self,
        *,
        root: Path | None = Path("/"),
        library: str = "",
        spec: str = "",
        patience_seconds: float = 5.0,
        child: Sequence[str] = CHILD,
    ) -> None:
        """Prepare; the first visit starts the child.

        *root*: where `/sys` and `/proc` are, to see whether there is a driver; None: don't look.
        *library* and *spec*: a module whose `library(spec)` stands in for `libnvidia-ml.so.1`.
        """
        self.deadline_seconds = patience_seconds + FEED_MARGIN_SECONDS
        self._patience_seconds = patience_seconds
        self._command = [*child]
        if root is not None:
            self._command += ["--root", str(root)]
        if library:
            self._command += ["--library", library, "--spec", spec]
        self._child: subprocess.Popen[bytes] | None = None
        self._received = bytearray()
        self._decoder = msgspec.msgpack.Decoder(Answer)
        self._asked: Ask | None = None
        self._asked_at = 0.0
        self._number = 0
        self._answered_visit = -math.inf
        """`Visit.at` of the last visit that got an answer."""
        self._answering: frozenset[str] = frozenset()
        """PCI addresses of the GPUs that answered then."""
        self._left_alone: set[str] = set()
        self._silence: Absent | None = None
        self._probe_at = 0.0

    @property
    def child_pid(self) -> int | None:
        """The child's pid, while there is one."""
        return self._child.pid if self._child else None

    def collect(self, visit: Visit) -> Reading:
        """Ask for one look at all GPUs. Raises CannotSeeError."""
        if self._silence is not None and self._asked is None:
            if time.monotonic() < self._probe_at:
                raise CannotSeeError(self._silence)
            self._probe_at = time.monotonic() + PROBE_SECONDS
        answer = self._answer()
        if answer.failure is not None:
            self._end()
            raise CannotSeeError(answer.failure)
        self._silence = None
        self._answered_visit = visit.at
        self._answering = frozenset(
            gpu.pci_address for gpu in answer.gpus if known(gpu.thermal.gpu_celsius) and known(gpu.pci_address)
        )
        return Reading(
            fields={"gpus": answer.gpus, "pairs": answer.pairs, "stack": answer.stack, "nvml_blocked_seconds": 0.0},
            unseen=answer.unseen,
        )

    def heed(self, events: Iterable[KernelEvent]) -> None:
        """Take note of a visit's kernel events: what the driver says is gone is left alone from now on.

        An Xid from before NVML's last good answer is past: what answered after it is not gone.
        """
        for event in events:
            if not isinstance(event, Xid) or event.before_boot:
                continue
            past = event.at is None or event.at <= self._answered_visit
            if past and event.pci_address in self._answering:
                continue
            if event.code == GPU_OFF_THE_BUS:
                self._left_alone.add(event.pci_address)
            elif event.code in GSP_GONE and self._silence is None:
                self._silence = Absent(
                    Why.NOT_ASKED,
                    f"Xid {event.code}: the GSP of GPU {event.pci_address} does not answer; NVML is left alone, "
                    f"and tried again every {PROBE_SECONDS / 60:.0f} minutes",
                )
                self._probe_at = time.monotonic() + PROBE_SECONDS
                if self._asked is None:  # A blocked child is not touched.
                    self._end()

    def close(self) -> None:
        """End the child gently, and leave none behind that can end."""
        self._end()

    # One question, one answer.

    def _answer(self) -> Answer:
        """Return the answer to a question of this visit; one to an earlier visit's is thrown away when it comes."""
        while True:
            child = self._child or self._start()
            patience = LATE_LOOK_SECONDS
            if self._asked is None:
                self._put(child)
                patience = self._patience_seconds
            answer = self._next(child, time.monotonic() + patience)
            late = answer.number != self._number or time.monotonic() - self._asked_at > self._patience_seconds
            self._asked = None
            if not late or answer.failure is not None:
                return answer

    def _start(self) -> subprocess.Popen[bytes]:
        """Start a child. It inherits no working directory, where a stray file could shadow one of its modules."""
        home = str(Path(doctor.__file__).parent.parent)
        paths = [home, *filter(None, [os.environ.get("PYTHONPATH")])]
        try:
            child = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                cwd="/",
                env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )
        except OSError as e:
            raise CannotSeeError(Absent(Why.FAILED, f"the NVML child can't be started: {e.strerror}")) from e
        assert child.stdout is not None
        os.set_blocking(child.stdout.fileno(), False)
        self._child = child
        self._received.clear()
        return child

    def _put(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None
        self._number += 1
        self._asked = Ask(self._number, tuple(sorted(self._left_alone)))
        self._asked_at = time.monotonic()
        with contextlib.suppress(BrokenPipeError):  # It is gone: reading says so, and how.
            child.stdin.write(frame(self._asked))
            child.stdin.flush()

    def _next(self, child: subprocess.Popen[bytes], deadline: float) -> Answer:
        """Return the next answer that comes out of the pipe."""
        assert child.stdout is not None
        poll = select.poll()
        poll.register(child.stdout, select.POLLIN)
        while (body := self._frame()) is None:
            patience = deadline - time.monotonic()
            if patience <= 0 or not poll.poll(patience * 1000):
                raise self._blocked()
            piece = os.read(child.stdout.fileno(), 1 << 20)
            if not piece:
                raise self._gone(child)
            self._received += piece
        try:
            return self._decoder.decode(body)
        except msgspec.DecodeError as e:
            raise self._garbage() from e

    def _frame(self) -> bytes | None:
        """Return the body of the next whole frame received, or None."""
        if len(self._received) < LENGTH.size:
            return None
        (length,) = LENGTH.unpack_from(self._received)
        if length > FRAME_MAX_BYTES:
            raise self._garbage()
        end = LENGTH.size + length
        if len(self._received) < end:
            return None
        body = bytes(self._received[LENGTH.size : end])
        del self._received[:end]
        return body

    # What can go wrong.

    def _blocked(self) -> CannotSeeError:
        seconds = time.monotonic() - self._asked_at
        opening = "" if self._answered_visit > -math.inf else STILL_OPENING
        return CannotSeeError(
            Absent(Why.TIMED_OUT, f"NVML has not answered for {seconds:.0f} s{opening}"),
            fields={"nvml_blocked_seconds": round(seconds, 1)},
        )

    def _gone(self, child: subprocess.Popen[bytes]) -> CannotSeeError:
        self._end()
        status = child.returncode
        if status is not None and status < 0:
            how = f"was killed by {signal.Signals(-status).name}"
        else:
            how = f"ended with status {status}"
        return CannotSeeError(Absent(Why.FAILED, f"the NVML child {how}; the next visit starts a fresh one"))

    def _garbage(self) -> CannotSeeError:
        self._end()
        what = "the NVML child answered with bytes that are no answer; the next visit starts a fresh one"
        return CannotSeeError(Absent(Why.FAILED, what))

    def _end(self) -> None:
        """End the child: hang up, then SIGTERM, then wait.

        Killing an NVML client in the middle of a call has frozen GPUs, so SIGKILL is the last resort, and never for a
        child that the kernel holds (state D): that one can't die before its call returns, and then finds us gone.
        """
        child, self._child = self._child, None
        busy, self._asked = self._asked is not None, None
        if child is None:
            return
        for pipe in (child.stdin, child.stdout):
            with contextlib.suppress(BrokenPipeError):
                if pipe is not None:
                    pipe.close()
        if not busy and _ended(child, HANG_UP_SECONDS):
            return
        child.terminate()
        if _ended(child, TERM_SECONDS) or _held_by_kernel(child.pid):
            return
        child.kill()
        _ended(child, KILL_SECONDS)


def _ended(child: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _held_by_kernel(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[:1] == ["D"]
