"""An engine's log that is written at full speed and rotated meanwhile in every way: is each matching line told once?

As a program, the whole drill: `nice python tests/torrent.py [SECONDS [MB-PER-SECOND]]` (30 s at 50 MB/s by default).
The suite runs it for a moment.
"""

from __future__ import annotations

import contextlib
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import msgspec

sys.path.insert(0, str(Path(__file__).parent.parent))

from doctor.collectors.collector import Visit
from doctor.collectors.engine_log import EngineLogs

BLOCK_BYTES = 1 << 18
MATCHES_A_SECOND = 8
"""Lines that matter: of six seconds of them a visit keeps all, however late a busy machine lets it come."""

_NUMBER = re.compile(rb"fatal error\. #(\d+)")

SERVED = 'INFO:     127.0.0.1:{} - "POST /v1/chat/completions HTTP/1.1" 200 OK\n'
FATAL = "(EngineCore_DP0 pid=110) ERROR 05-29 10:00:00 [core.py:1] EngineCore encountered a fatal error. #{}\n"


class Outcome(msgspec.Struct):
    """What became of the lines that matter."""

    written: int
    mb: float
    rotations: int
    seen: list[int]
    held: set[int]
    """Those that stood in some file when its writer had left it."""
    dropped: int
    """Told to be over the visit's bound."""
    longest_visit_seconds: float
    lagged: int
    """Visits that said that they lag."""
    mb_in_memory: float


def write(log: Path, mb_per_second: float, seconds: float) -> None:
    """Write the log as an engine does that reopens it when it is told to; say how many lines mattered."""
    file = log.open("ab", buffering=0)
    wanted = False

    def reopen(*_: object) -> None:
        nonlocal wanted
        wanted = True

    signal.signal(signal.SIGUSR1, reopen)
    block = "".join(SERVED.format(port) for port in range(10000, 13000)).encode()[:BLOCK_BYTES]
    block = block[: block.rfind(b"\n") + 1]
    dice = random.Random()
    print("ready", flush=True)
    began = time.monotonic()
    blocks = matches = 0
    while time.monotonic() < began + seconds:
        if wanted:
            wanted = False
            file.close()
            file = log.open("ab", buffering=0)
        ahead = blocks * BLOCK_BYTES / (mb_per_second * 1e6) - (time.monotonic() - began)
        if ahead > 0:
            time.sleep(ahead)
        data = block
        if matches < (time.monotonic() - began) * MATCHES_A_SECOND:
            data = block + b"x" * dice.randrange(200) + b"\n" + FATAL.format(matches).encode()
            matches += 1
        while data:
            data = data[file.write(data) :]
        blocks += 1
    print(matches, blocks * BLOCK_BYTES / 1e6, flush=True)


class Rotation:
    """Rotates a log by turns in every way, and takes down which lines its files hold."""

    def __init__(self, log: Path, writer: subprocess.Popen[str], dice: random.Random) -> None:
        self.log = log
        self.writer = writer
        self.dice = dice
        self.held: set[int] = set()
        self.rotations = 0

    def rotate(self) -> None:
        kind = self.dice.choice(("rename", "rename and compress", "copytruncate", "copytruncate and compress", "twice"))
        if kind == "twice":
            self._rename()
            self._rename()
        elif kind.startswith("rename"):
            self._rename()
        else:
            self._shift()
            shutil.copyfile(self.log, self._old(1))
            with self.log.open("r+b") as file:
                file.truncate(0)
        self.rotations += 1
        self.take_down(self._old(1))
        if kind.endswith("compress"):
            subprocess.run(["gzip", "-1", str(self._old(1))], check=True)

    def _rename(self) -> None:
        self._shift()
        self.log.rename(self._old(1))
        self.log.touch()
        time.sleep(self.dice.uniform(0, 0.2))  # the writer is told late
        self.writer.send_signal(signal.SIGUSR1)
        time.sleep(0.1)  # and what it has begun to write, it ends
        self.take_down(self._old(1))

    def _old(self, number: int, end: str = "") -> Path:
        return self.log.with_name(f"{self.log.name}.{number}{end}")

    def _shift(self) -> None:
        for number in range(5, 0, -1):
            for end in ("", ".gz"):
                with contextlib.suppress(FileNotFoundError):
                    self._old(number, end).replace(self._old(number + 1, end))

    def take_down(self, file: Path) -> None:
        with file.open("rb") as lines:
            self.held |= {int(found[1]) for line in lines if (found := _NUMBER.search(line))}


def run(
    folder: Path, seconds: float, mb_per_second: float, seed: int = 0, visits: tuple[float, float] = (0.2, 1.0)
) -> Outcome:
    """Write, rotate and read for so long; a visit each 0.2 to 1 s."""
    dice = random.Random(seed)
    log = folder / "vllm.log"
    log.touch()
    logs = EngineLogs(folder, logs=("/vllm.log",))
    seen: list[int] = []
    dropped = lagged = 0
    longest = 0.0

    def visit() -> bool:
        nonlocal dropped, lagged, longest
        began = time.monotonic()
        reading = logs.collect(Visit(at=time.time()))
        longest = max(longest, time.monotonic() - began)
        events = [event for event in reading.fields["engine_events"] if event.signal == "engine-fatal"]
        seen.extend(int(event.text.rpartition("#")[2]) for event in events)
        dropped += sum(state.dropped for state in reading.fields["logs"])
        lags = any(unseen.what.startswith("end of") for unseen in reading.unseen)
        lagged += lags
        return lags

    visit()
    arguments = [sys.executable, __file__, "write", str(log), str(mb_per_second), str(seconds)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as writer:
        assert writer.stdout is not None
        writer.stdout.readline()
        rotation = Rotation(log, writer, dice)

        def rotate() -> None:
            while writer.poll() is None and time.monotonic() < until - 0.5:
                time.sleep(seconds / 20)
                rotation.rotate()

        until = time.monotonic() + seconds
        rotator = threading.Thread(target=rotate)
        rotator.start()
        while rotator.is_alive() or writer.poll() is None:
            time.sleep(dice.uniform(*visits))
            visit()
        written, mb = writer.stdout.readline().split()
    rotation.take_down(log)
    while visit():
        pass
    logs.close()
    return Outcome(
        written=int(written),
        mb=float(mb),
        rotations=rotation.rotations,
        seen=seen,
        held=rotation.held,
        dropped=dropped,
        longest_visit_seconds=longest,
        lagged=lagged,
        mb_in_memory=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def main() -> None:
    if sys.argv[1:2] == ["write"]:
        write(Path(sys.argv[2]), float(sys.argv[3]), float(sys.argv[4]))
        return
    seconds, speed = (float(word) for word in (*sys.argv[1:3], *("30", "50")[len(sys.argv) - 1 :]))
    with tempfile.TemporaryDirectory() as folder:
        done = run(Path(folder), seconds, speed)
    missed, twice = done.held - set(done.seen), len(done.seen) - len(set(done.seen))
    print(
        f"{done.mb:.0f} MB in {seconds:.0f} s, {done.rotations} rotations: {done.written} lines that matter, "
        f"{len(done.seen)} told, {len(missed)} of those that a file held were not ({done.dropped} over the bound), "
        f"{twice} were told twice, {done.written - len(done.held | set(done.seen))} stood in no file any more; "
        f"longest visit {done.longest_visit_seconds:.2f} s, {done.lagged} lagged, {done.mb_in_memory:.0f} MB of memory"
    )
    sys.exit(len(missed) > done.dropped or twice > 0)


if __name__ == "__main__":
    main()
