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
import threading
import time
from collections import deque
from collections.abc import Sequence
from pathlib import Path

import msgspec

import doctor
from doctor.collectors.collector import CannotSeeError, Reading, Visit
from doctor.collectors.gpu_access import GpuAccess
from doctor.collectors.nvml_frames import FRAME_MAX_BYTES, LENGTH, Answer, Ask, frame
from doctor.collectors.tasks import task_of
from doctor.snapshot import Absent, Snapshot, Source, Why, Xid, known, or_none

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
GSP is gone blocks for 6 to 45 s (dmesg samples of drivers 525 and later). So long, too, a silent child is waited for that
the kernel does not hold, and a library that a fresh child could not use is left alone."""

STILL_OPENING = "; it has not answered at all yet: without persistence mode opening the GPUs takes up to half a minute"

DRIVER_SIGNS = ("sys/module/nvidia", "proc/driver/nvidia")

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
        access: GpuAccess | None = None,
    ) -> None:
        """Prepare; the first visit starts the child.

        *root*: where `/sys` and `/proc` are, to see whether there is a driver; None: don't look.
        *library* and *spec*: a module whose `library(spec)` stands in for `libnvidia-ml.so.1`.
        *access*: who may tell it to let go of the GPUs.
        """
        self.deadline_seconds = patience_seconds + FEED_MARGIN_SECONDS
        self._root = root
        self._command = [*child]
        if root is not None:
            self._command += ["--root", str(root)]
        if library:
            self._command += ["--library", library, "--spec", spec]
        self._lock = threading.Lock()
        """Held while the child is spoken to: whoever lets go of it may be another thread."""
        self._closed = False
        self._child: subprocess.Popen[bytes] | None = None
        self._given_up: list[subprocess.Popen[bytes]] = []
        """Children that were told to end and could not yet."""
        self._proven = False
        """Whether the child has answered."""
        self._received = bytearray()
        self._decoder = msgspec.msgpack.Decoder(Answer)
        self._asked: Ask | None = None
        self._asked_at = 0.0
        self._starved_before = 0.0
        self._number = 0
        self._answered_visit = -math.inf
        """`Visit.at` of the last visit that got an answer."""
        self._answering: frozenset[str] = frozenset()
        """PCI addresses of the GPUs that answered then."""
        self._left_alone: dict[str, bool] = {}
        """GPUs that fell off the bus; True: the PCI tree has shown them gone."""
        self._unheeded: deque[Snapshot] = deque()
        self._silence: Absent | None = None
        self._probe_at = 0.0
        self._renew_at = -math.inf
        """When a fresh child may try another library."""
        self._access = access or GpuAccess()
        self._access.held_by(self.let_go)

    @property
    def child_pid(self) -> int | None:
        """The child's pid, while there is one."""
        return self._child.pid if self._child else None

    @property
    def _patience_seconds(self) -> float:
        return max(0.1, self.deadline_seconds - FEED_MARGIN_SECONDS)

    def collect(self, visit: Visit) -> Reading:
        """Ask for one look at all GPUs. Raises CannotSeeError."""
        with self._lock:
            return self._collected(visit)

    def _collected(self, visit: Visit) -> Reading:
        if self._closed:
            raise CannotSeeError(Absent(Why.NOT_ASKED, "the program ends"))
        self._given_up = [child for child in self._given_up if child.poll() is None]
        self._heed()
        why = self._access.why_not()
        if why is not None:
            self._end()
            raise CannotSeeError(why)
        if self._access.was_retaken():  # what was done meanwhile was done to cure it
            self._left_alone.clear()
            self._silence = None
        if self._silence is not None and self._asked is None:
            if time.monotonic() < self._probe_at:
                raise CannotSeeError(self._silence)
            self._probe_at = time.monotonic() + PROBE_SECONDS
        until = time.monotonic() + LATE_LOOK_SECONDS + self._patience_seconds
        proven = self._proven
        answer = self._answer(until)
        if answer.failure is not None and proven:  # it has outlived its driver: a fresh one sees what is there now
            self._end()
            answer = self._answer(until)
        if answer.failure is not None:
            self._end()
            raise CannotSeeError(answer.failure)
        self._proven = True
        if answer.outdated and time.monotonic() >= self._renew_at:
            answer = self._renewed(until) or answer
        self._silence = None
        self._answered_visit = visit.at
        self._answering = frozenset(
            gpu.pci_address for gpu in answer.gpus if known(gpu.thermal.gpu_celsius) and known(gpu.pci_address)
        )
        return Reading(
            fields={"gpus": answer.gpus, "pairs": answer.pairs, "stack": answer.stack, "nvml_blocked_seconds": 0.0},
            unseen=answer.unseen,
        )

    def heed(self, snapshot: Snapshot) -> None:
        """Take note of a visit: what the kernel log says is gone is left alone from now on, until it is there again.

        An Xid from before NVML's last good answer is past: what answered after it is not gone.
        """
        self._unheeded.append(snapshot)
        if self._lock.acquire(blocking=False):  # else it is still busy with a visit, and heeds at the next one
            try:
                self._heed()
            finally:
                self._lock.release()

    def _heed(self) -> None:
        while self._unheeded:
            snapshot = self._unheeded.popleft()
            if self._answered_visit != snapshot.at:  # else it is of after the step
                self._answered_visit += snapshot.clock_stepped_seconds
            self._look_for_returned(snapshot)
            for event in snapshot.kernel:
                if isinstance(event, Xid) and not event.before_boot:
                    self._heed_xid(event)

    def _heed_xid(self, event: Xid) -> None:
        past = event.at is None or event.at <= self._answered_visit
        if past and event.pci_address in self._answering:
            return
        if event.code == GPU_OFF_THE_BUS:
            self._left_alone.setdefault(event.pci_address, False)
        elif event.code in GSP_GONE and self._silence is None:
            self._silence = Absent(
                Why.NOT_ASKED,
                f"Xid {event.code}: the GSP of GPU {event.pci_address} does not answer; NVML is left alone, "
                f"and tried again every {PROBE_SECONDS / 60:.0f} minutes",
            )
            self._probe_at = time.monotonic() + PROBE_SECONDS
            if self._asked is None:  # A blocked child is not touched.
                self._end()

    def _look_for_returned(self, snapshot: Snapshot) -> None:
        """End the leaving alone of GPUs that the PCI tree showed gone and shows alive again: they were put back."""
        devices = or_none(snapshot.host.pci_devices)
        if devices is None or not self._left_alone:
            return
        alive = {device.address for device in devices if known(device.width)}
        for address, gone in [*self._left_alone.items()]:
            if address not in alive:
                self._left_alone[address] = True
            elif gone:
                del self._left_alone[address]
                if self._asked is None:  # its handle is that of the GPU that fell off
                    self._end()

    def let_go(self) -> int | None:
        """End the child, so that nothing of this program has a GPU open. Return its pid where it could not be ended."""
        with self._lock:
            self._end()
            self._given_up = [child for child in self._given_up if child.poll() is None]
            return self._given_up[0].pid if self._given_up else None

    def close(self) -> None:
        """End the child gently, and leave none behind that can end."""
        held = self._lock.acquire(timeout=self.deadline_seconds)
        self._closed = True
        self._end()
        if held:
            self._lock.release()

    # One question, one answer.

    def _answer(self, until: float) -> Answer:
        """Return the answer to a question of this visit; one to an earlier visit's is thrown away when it comes."""
        while True:
            child = self._child or self._start()
            earlier = self._asked is not None
            if not earlier:
                self._put(child)
            patience = LATE_LOOK_SECONDS if earlier else self._patience_seconds
            answer = self._next(child, min(until, time.monotonic() + patience))
            late = earlier or time.monotonic() - self._asked_at > self._patience_seconds
            self._asked = None
            if not late or answer.failure is not None:
                return answer

    def _renewed(self, until: float) -> Answer | None:
        """Return the answer of a fresh child that takes the place of this one; None: it can't, and this one stays.

        NVML's library was replaced on disk. Where the module goes with the new one, all is well; where it does not,
        only who has the old one open can still ask.
        """
        old, self._child = self._child, None
        answer: Answer | None = None
        with contextlib.suppress(CannotSeeError):
            answer = self._answer(until)
        if answer is None or answer.failure is not None:
            self._end()
            self._child, self._proven = old, True
            self._received.clear()
            self._renew_at = time.monotonic() + PROBE_SECONDS
            return None
        new, self._child = self._child, old
        self._end()
        self._child = new
        self._proven = True
        return answer

    def _start(self) -> subprocess.Popen[bytes]:
        """Start a child. It inherits no working directory, where a stray file could shadow one of its modules.

        Not where no driver is loaded: the real nvmlInit makes device nodes then, when root calls it.
        """
        if self._root is not None and not any((self._root / sign).exists() for sign in DRIVER_SIGNS):
            raise CannotSeeError(Absent(Why.NOT_PRESENT, "no NVIDIA driver is loaded"))
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
        self._proven = False
        self._received.clear()
        return child

    def _put(self, child: subprocess.Popen[bytes]) -> None:
        assert child.stdin is not None
        self._number += 1
        self._asked = Ask(self._number, tuple(sorted(self._left_alone)))
        self._asked_at = time.monotonic()
        self._starved_before = _starved_seconds(child.pid)
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
                raise self._silent(child)
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

    def _silent(self, child: subprocess.Popen[bytes]) -> CannotSeeError:
        """Return what the silence of a child means; one that does not hang in NVML is ended."""
        seconds = time.monotonic() - self._asked_at
        state = _state(child.pid)
        if state == "T":
            self._end()
            what = "the NVML child was stopped (SIGSTOP); the next visit starts a fresh one"
            return CannotSeeError(Absent(Why.FAILED, what))
        if self._received and state != "D":
            self._end()
            what = "the NVML child fell silent in the middle of its answer; the next visit starts a fresh one"
            return CannotSeeError(Absent(Why.FAILED, what))
        if seconds > PROBE_SECONDS and state != "D":
            self._end()
        starved = _starved_seconds(child.pid) - self._starved_before
        if starved > seconds / 2:  # nothing is said of the driver: `nvml_blocked_seconds` is left out
            what = f"the NVML child waited {starved:.0f} of {seconds:.0f} s for a processor: this machine is overloaded"
            return CannotSeeError(Absent(Why.TIMED_OUT, what))
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
        if _state(child.pid) != "T" and (_ended(child, TERM_SECONDS) or _state(child.pid) == "D"):
            if child.returncode is None:
                self._given_up.append(child)
            return
        child.kill()
        if not _ended(child, KILL_SECONDS):
            self._given_up.append(child)


def _ended(child: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        child.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _starved_seconds(pid: int) -> float:
    """Return how long a process was ready to run and had no processor (proc(5), `schedstat`); 0 where nobody knows."""
    try:
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    except (OSError, ValueError, IndexError):
        return 0.0


def _state(pid: int) -> str:
    """Return the letter of a process's state; empty: there is none."""
    task = task_of(f"/proc/{pid}")
    return task.state if task else ""
