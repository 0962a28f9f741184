"""Other programs that a collector asks: fixed arguments, a deadline, a bounded answer, nothing left behind."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile

from doctor.collectors.collector import CannotSeeError
from doctor.snapshot import Absent, Why

MOST_BYTES = 32 << 20


def answer_of(arguments: list[str], deadline_seconds: float) -> bytes:
    """Return what the program writes to its standard output; of more than MOST_BYTES the end, in whole lines.

    Raises CannotSeeError when there is no such program, or when it fails, or takes too long.
    """
    name = arguments[0]
    if shutil.which(name) is None:
        raise CannotSeeError(Absent(Why.NOT_PRESENT, f"there is no {name} here"))
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as words:
        # Files, not pipes: a program that says more than we read must not wait for us.
        environment = {**os.environ, "LC_ALL": "C", "SYSTEMD_PAGER": "", "SYSTEMD_COLORS": "0"}
        with subprocess.Popen(
            arguments, stdin=subprocess.DEVNULL, stdout=out, stderr=words, env=environment
        ) as process:
            try:
                code = process.wait(deadline_seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                why = Absent(Why.TIMED_OUT, f"{name} did not answer within {deadline_seconds:g} s")
                raise CannotSeeError(why) from None
        begin = max(0, out.seek(0, os.SEEK_END) - MOST_BYTES)
        out.seek(begin)
        answer = out.read(MOST_BYTES)
        if begin:
            answer = answer[answer.find(b"\n") + 1 :]
        if code != 0 and not answer:
            words.seek(0)
            said = words.read(4096).decode("utf-8", "replace").strip().splitlines()
            refused = any("ermission" in line or "not permitted" in line for line in said)
            why = Why.NO_PERMISSION if refused else Why.FAILED
            raise CannotSeeError(Absent(why, f"{name}: {said[-1] if said else f'exit code {code}'}"))
        return answer
