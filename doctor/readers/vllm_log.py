"""A serving engine's log: bytes in, in chunks of any size; events, and how far it was read, out.

It reads every record format of vLLM 0.5 to 0.33 (text and JSON), with what Ray, docker, docker compose, Kubernetes,
the journal, CI systems and terminals put before it, and what PyTorch, NCCL and the interpreter write between. Most
lines of a busy log are access lines and records that nobody needs: they are passed over by their end or by the
beginning of their message, before anything is decoded.
"""

from __future__ import annotations

import re
from calendar import timegm
from collections import deque
from collections.abc import Iterator, Sequence
from typing import cast

import msgspec

from doctor.readers import signals
from doctor.readers.patterns import LogPattern
from doctor.snapshot import EngineEvent, Fact, LogState

LINE_MAX_BYTES = 64 * 1024
"""Of a longer line only the beginning is read."""
TEXT_MAX = 600
"""Characters of a message that an event keeps."""
RECORD_MAX = 8192
"""Characters of a record that are looked at: the head of an engine's configuration line is as long; prompts are longer."""
BLOCK_BYTES = 512 * 1024
"""How much is split into lines at once: bounds the memory, whatever size the chunks have."""
FIRST_KEPT = 24
"""Events of one signal that are kept from the start of one life of the engine: the first error is the most precious."""
LAST_KEPT = 24
"""And from its end."""
LIVES_KEPT = 8
"""Lives of the engine (starts) in one visit of which events are kept: the first two, and the last ones."""
STATS_KEPT = 64
"""Statistics lines kept from the end of a visit: ten minutes at vLLM's interval of 10 s."""


class LogReading(msgspec.Struct, frozen=True):
    """What was read of a log since the last look."""

    events: tuple[EngineEvent, ...]
    state: LogState


class Record(msgspec.Struct):
    """One line, taken apart."""

    text: str
    """The message, with its indentation."""
    level: str = ""
    process: str = ""
    pid: int | None = None
    rank: int | None = None
    at: float | None = None


class LogReader:
    """Reads one log. It keeps what it needs between visits: an unfinished line, open tracebacks, the line number.

    `log` names the log in every event; `name` is what `where` shows, the same if empty. `first_line` is the number of
    the first line fed, `utc_offset_seconds` the time zone of stamps that tell none, `patterns` the site's own.
    """

    def __init__(
        self,
        log: str,
        *,
        name: str = "",
        first_line: int = 1,
        utc_offset_seconds: float = 0.0,
        patterns: Sequence[LogPattern] = (),
    ) -> None:
        self.log = log
        self._patterns = tuple(pattern for pattern in patterns if pattern.source == "engine-log")
        self._name = name or log
        self._utc_offset_seconds = utc_offset_seconds
        self._reference = 0.0
        self._line = first_line
        self._rest = b""
        self._rest_is_long = False
        self._traces: dict[tuple[str, int | None], _Trace] = {}
        self._quiet: set[bytes] = set()
        self._traced_line = 0
        """The last line of an open traceback."""
        self._harmless: tuple[str, int | None] | None = None
        """The process whose last traceback was harmless: so are those chained to it."""
        self._before = b""
        """The end of what was read before the present block."""
        self._row_lasts = False
        """Whether no sign of progress stands between the last event and here: a repetition is one in a row."""
        self._row_position = 0
        self._begin_visit()

    def _begin_visit(self) -> None:
        self._kept = _KeptEvents()
        self._kept_of_site = {pattern.signal: _KeptOfSignal() for pattern in self._patterns}
        self._stats: deque[tuple[int, bytes]] = deque(maxlen=STATS_KEPT)
        self._first_stats: tuple[int, bytes] | None = None
        self._first_served: tuple[int, bytes] | None = None
        self._last_served: _Served | None = None
        self._lines = self._bytes = self._long_lines = self._passed_over = 0

    def feed(self, chunk: bytes, at: float) -> None:
        """Read on. *at* is now, Unix seconds: it tells the year of stamps that have none."""
        self._reference = at
        self._bytes += len(chunk)
        end = chunk.find(b"\n")
        if end < 0:
            self._rest_grows(chunk)
            return
        self._rest_grows(chunk[:end])
        self._end_rest()
        start, stop = end, chunk.rfind(b"\n")
        while start < stop:
            cut = stop if stop - start <= BLOCK_BYTES else chunk.rfind(b"\n", start + 1, start + BLOCK_BYTES)
            if cut < 0:  # one line longer than a block
                cut = chunk.find(b"\n", start + 1)
            self._block(chunk[start:cut])
            start = cut
        self._rest_grows(chunk[stop + 1 :])

    def take(self) -> LogReading:
        """Return what was read since the last call; an unfinished last line waits for its end."""
        of_site = [(kept.place, kept.event) for of in self._kept_of_site.values() for kept in (*of.first, *of.last)]
        events = sorted([*self._kept.events(), *self._counted_events(), *of_site], key=lambda pair: pair[0])
        state = LogState(
            log=self.log,
            lines=self._lines,
            bytes=self._bytes,
            dropped=self._kept.dropped + sum(of_signal.dropped for of_signal in self._kept_of_site.values()),
            last_at=self._last_stamp(),
            long_lines=self._long_lines,
            passed_over_bytes=self._passed_over,
        )
        self._begin_visit()
        return LogReading(tuple(event for _, event in events), state)

    def finish(self) -> LogReading:
        """Return what was read since the last call; the rest counts as a last line."""
        if self._rest:
            self._end_rest()
        return self.take()

    def begin_anew(self) -> None:
        """Say that the log was rotated or truncated: the next byte is the first of line 1."""
        if self._rest:
            self._end_rest()
        self._line = 1
        self._traces.clear()

    def pass_over(self, lines: int, size: int) -> None:
        """Say that *size* bytes with *lines* line ends come next and are not fed: lives of the engine long past.

        The line that was cut by the end of the last chunk goes with them.
        """
        self._rest, self._rest_is_long = b"", False
        self._line += lines
        self._lines += lines
        self._bytes += size
        self._passed_over += size
        self._traces.clear()
        self._before = b""
        self._row_lasts = False

    def _end_rest(self) -> None:
        self._block(b"\n" + self._rest)
        self._rest, self._rest_is_long = b"", False

    def _rest_grows(self, more: bytes) -> None:
        room = LINE_MAX_BYTES - len(self._rest)
        self._rest += more[:room]
        if len(more) > room and not self._rest_is_long:
            self._rest_is_long = True
            self._long_lines += 1

    def _block(self, block: bytes) -> None:
        """Read whole lines, each with a line end before it and none behind."""
        before = number = self._line - 1
        counted = 0
        self._note_served(block, before)
        for pattern in self._patterns:
            self._note_site_lines(pattern, block, before)
        for found in _NOT_PASSED_OVER.finditer(block):
            line = found[1]
            if line.startswith(b"{") and b'"MESSAGE"' in line:
                line = spelled_out(line)
            if line.endswith(_ANSWERED):
                continue
            head = line.find(b"] ", 0, 200)
            message = line[head + 2 : head + 4] if head > 0 else line[:2]
            if message == b"  " and not any(word in line for word in _WORDS_OF_INDENTED_ERRORS):
                continue  # a line of a traceback or of a list
            level = line.find(b"INFO ", 0, head) if head > 0 and not self._traces else -1
            if level >= 0 and line[level + 5 : level + 6] != b"]":  # `[INFO ]` is a wrapper's own level
                if not line.startswith(_INFORMING_STARTS, head + 2) and _STATS_TEXT not in line:
                    continue
            elif not self._traces and self._is_quiet(line, head):
                continue
            number += block.count(b"\n", counted, found.start() + 1)
            counted = found.start() + 1
            if self._traces and number - self._traced_line > _TRACE_MAX_LINES:
                self._traces.clear()  # their processes have fallen silent: an open traceback costs speed
            if _STATS_TEXT in line:
                self._note_stats(number, line)
            else:
                self._look_at(line, number, block, counted)
        self._row_lasts = self._row_lasts and block.find(_POST, self._row_position) < 0
        self._row_position = 0
        number += block.count(b"\n", counted)
        self._line = number + 1
        self._lines += number - before
        self._before = (self._before + block[-_BEFORE_BYTES:])[-_BEFORE_BYTES:]

    def _is_quiet(self, line: bytes, head: int) -> bool:
        """Whether a line holds no literal of the table. Logs repeat themselves: what was found quiet is remembered."""
        if head > 0 and (line.find(b"WARNING ", 0, head) >= 0 or line.find(b"ERROR ", 0, head) >= 0):
            line = line[head + 2 :]
        if line in self._quiet:
            return True
        if holds_literal(line):
            return False
        if len(line) <= _QUIET_LINE_BYTES:
            if len(self._quiet) >= _QUIET_LINES:
                self._quiet.clear()
            self._quiet.add(line)
        return True

    def _note_stats(self, number: int, line: bytes) -> None:
        self._row_lasts = False
        self._stats.append((number, line))
        self._first_stats = self._first_stats or (number, line)

    def _look_at(self, raw: bytes, number: int, block: bytes, position: int) -> None:
        if len(raw) > LINE_MAX_BYTES:
            self._long_lines += 1
        for n, record in enumerate(self._records(raw)):
            found = self._said(record)
            if (record.process, record.pid) in self._traces:
                self._traced_line = number
            if found is None:
                continue
            signal, facts = found
            if signal == "stats":
                self._note_stats(number, raw)
                continue
            if signal.startswith("watchdog-") and record.rank is not None:
                facts.setdefault("rank", record.rank)  # it stands before the message, where PyTorch is newer
            event = EngineEvent(
                signal=signal,
                text=_without_secrets(signal, record.text.strip())[:TEXT_MAX],
                where=f"{self._name}:{number}",
                log=self.log,
                at=record.at,
                level=record.level,
                process=record.process,
                pid=record.pid,
                rank=record.rank if record.rank is not None else _rank_fact(facts),
                facts=facts,
            )
            in_a_row = self._row_lasts and block.find(_POST, self._row_position, position) < 0
            self._row_lasts, self._row_position = True, position
            before = b""
            if signal in _WITH_TRACE:
                before = (self._before + block[max(0, position - _BEFORE_BYTES) : position])[-_BEFORE_BYTES:]
            self._kept.add(_Kept((number, n), event, before), in_a_row=in_a_row)

    def _records(self, raw: bytes) -> Iterator[Record]:
        text = raw[:LINE_MAX_BYTES].decode("utf-8", "replace")
        for piece in text.split("\r") if "\r" in text else (text,):
            if piece and not piece.isspace():
                yield from _records_of(piece, self._reference, self._utc_offset_seconds)

    def _said(self, record: Record) -> tuple[str, dict[str, Fact]] | None:
        """Return the signal and its facts, or None; open and close tracebacks on the way."""
        text = record.text
        key = (record.process, record.pid)
        if " NCCL INFO " in text:
            return None
        if record.level == "INFO":
            match = signals.matched(text, inform=True)
            return None if match is None else (match.name, _facts_of(match, text))
        trace = self._traces.get(key)
        if "Traceback (most recent call last)" in text and len(text) < 400:
            if len(self._traces) < _TRACES_MAX:
                self._traces[key] = trace = trace or _Trace()
                trace.lines = 0
            text = text.partition("Traceback (most recent call last)")[0]
            match = signals.matched(text) if ": " in text else None  # what failed may stand before it
            return None if match is None else (match.name, _facts_of(match, text))
        if text.startswith(_CHAIN):
            if len(self._traces) < _TRACES_MAX:
                self._traces[key] = _Trace(chained=True, harmless=self._harmless == key)
            return None
        if text.startswith(_HARMLESS) and len(self._traces) < _TRACES_MAX:
            self._traces[key] = _Trace(harmless=True)
            return None
        indented = text[:2].isspace()
        if trace is not None:
            trace.lines += 1
            if trace.lines > _TRACE_MAX_LINES:
                del self._traces[key]
            elif (indented or not text.strip()) and not _is_quoted_error(text):
                return None
        exception = None
        if record.level not in ("WARNING", "DEBUG"):
            exception = _EXCEPTION.match(text) or (_EXCEPTION_IN_TRACE.match(text) if trace else None)
        if exception is not None:
            self._traces.pop(key, None)
            self._harmless = key if trace is not None and trace.harmless else None
        if indented and not _is_quoted_error(text):
            return None
        match = signals.matched(text)
        if (
            exception is not None
            and trace is not None
            and trace.harmless
            and (match is None or match.name in _OF_A_REQUEST)
        ):
            return None
        facts = {} if match is None else _facts_of(match, text)
        if exception is not None:
            facts = facts | {"type": exception["type"]} | ({"chained": 1} if trace and trace.chained else {})
            if match is None and (_is_error_type(exception["type"]) or trace is not None):
                return "exception", facts | {"message": (exception["message"] or "")[:TEXT_MAX]}
        return None if match is None else (match.name, facts)

    def _note_served(self, block: bytes, before: int) -> None:
        if self._first_served is None:
            position = block.find(_POST)
            for _ in range(_SERVED_TRIES):
                if position < 0:
                    break
                if _was_served(block, position):
                    self._first_served = _Served(block, position, before).line()
                    break
                position = block.find(_POST, position + 1)
        position = block.rfind(_POST)
        for _ in range(_SERVED_TRIES):
            if position < 0:
                return
            if _was_served(block, position):
                self._last_served = _Served(block, position, before)
                return
            position = block.rfind(_POST, 0, position)

    def _note_site_lines(self, pattern: LogPattern, block: bytes, before: int) -> None:
        """Keep the lines of a site's pattern, which may be of any kind: those that are passed over, too."""
        number, counted = before, 0
        position = block.find(pattern.gate)
        while position >= 0:
            number += block.count(b"\n", counted, position)
            counted = position
            for record in self._records(_line_at(block, position)):
                if pattern.facts_in(record.text) is not None:
                    event = self._event(pattern.signal, number, record, {})
                    self._kept_of_site[pattern.signal].add(_Kept((number, 0), event, b""), in_a_row=False)
            end = block.find(b"\n", position)
            position = block.find(pattern.gate, end) if end >= 0 else -1

    def _counted_events(self) -> Iterator[tuple[tuple[int, int], EngineEvent]]:
        """Yield what is kept as bare lines until now: statistics and served requests."""
        served = [self._first_served]
        if self._last_served is not None:
            served.append(self._last_served.line())
        for number, raw in sorted({line for line in served if line is not None}):
            for record in self._records(raw):
                yield (number, 0), self._event("request-served", number, record, {})
        stats = list(self._stats)
        if self._first_stats is not None and self._first_stats not in stats:
            stats.insert(0, self._first_stats)
        for number, raw in stats:
            for record in self._records(raw):
                facts = stats_facts(record.text)
                if facts:
                    yield (number, 0), self._event("stats", number, record, facts)
                    if facts.get("preemptions"):
                        yield (number, 1), self._event("preemption", number, record, {"count": facts["preemptions"]})

    def _event(self, signal: str, number: int, record: Record, facts: dict[str, Fact]) -> EngineEvent:
        return EngineEvent(
            signal=signal,
            text=record.text.strip()[:TEXT_MAX],
            where=f"{self._name}:{number}",
            log=self.log,
            at=record.at,
            level=record.level,
            process=record.process,
            pid=record.pid,
            facts=facts,
        )

    def _last_stamp(self) -> float | None:
        for raw in reversed(self._before.split(b"\n")[1:]):
            stamps = [record.at for record in self._records(raw) if record.at is not None]
            if stamps:
                return stamps[-1]
        return self._kept.last_at


def read(text: bytes, log: str, at: float, utc_offset_seconds: float = 0.0) -> LogReading:
    """Read a whole log that is in memory. *at* is now, or when the log was written, Unix seconds."""
    reader = LogReader(log, utc_offset_seconds=utc_offset_seconds)
    reader.feed(text, at)
    return reader.finish()


# What is kept of a visit.


class _KeptEvents:
    """The first and the last events of each signal, in each life of the engine."""

    def __init__(self) -> None:
        self._lives: list[dict[str, _KeptOfSignal]] = [{}]
        self._has_run = False
        self.dropped = 0
        self.last_at: float | None = None
        self._latest: _KeptOfSignal | None = None

    def add(self, kept: _Kept, *, in_a_row: bool) -> None:
        """Keep an event, or count it with the one before it that says the same."""
        signal = kept.event.signal
        if signal in _IDENTITY_SIGNALS:
            if self._has_run:
                self._begin_life()
        else:
            self._has_run = self._has_run or signal not in _BEFORE_RUNNING
        self.last_at = kept.event.at or self.last_at
        of_signal = self._lives[-1].get(signal)
        if of_signal is None:
            of_signal = self._lives[-1][signal] = _KeptOfSignal()
        of_signal.add(kept, in_a_row=in_a_row and self._latest is of_signal)
        self._latest = of_signal

    def _begin_life(self) -> None:
        self._has_run = False
        if len(self._lives) == LIVES_KEPT:
            self.dropped += sum(kept.seen for kept in self._lives[2].values())
            del self._lives[2]
        self._lives.append({})

    def events(self) -> Iterator[tuple[tuple[int, int], EngineEvent]]:
        for life in self._lives:
            for of_signal in life.values():
                self.dropped += of_signal.dropped
                for kept in (*of_signal.first, *of_signal.last):
                    trace = _trace_in(kept.before, kept.event) if kept.before else []
                    yield kept.place, _with_trace(kept.event, trace)


class _Kept(msgspec.Struct):
    """An event in its place, with what stands before it, from which its traceback is read when somebody asks."""

    place: tuple[int, int]
    event: EngineEvent
    before: bytes


class _KeptOfSignal:
    def __init__(self) -> None:
        self.first: list[_Kept] = []
        self.last: deque[_Kept] = deque()
        self.seen = self.dropped = 0

    def add(self, kept: _Kept, *, in_a_row: bool) -> None:
        self.seen += 1
        end = self.last or self.first
        if in_a_row and _same(end[-1].event, kept.event):
            end[-1].event = msgspec.structs.replace(end[-1].event, count=end[-1].event.count + 1)
        elif len(self.first) < FIRST_KEPT:
            self.first.append(kept)
        else:
            if len(self.last) == LAST_KEPT:
                self.dropped += self.last.popleft().event.count
            self.last.append(kept)


def _same(one: EngineEvent, other: EngineEvent) -> bool:
    return (one.process, one.pid, one.rank, one.text) == (other.process, other.pid, other.rank, other.text)


class _Served(msgspec.Struct, frozen=True):
    """A served request, as its place in a block: its line is counted only when somebody asks."""

    block: bytes
    position: int
    before: int
    """Lines of the log before the block."""

    def line(self) -> tuple[int, bytes]:
        return self.before + self.block.count(b"\n", 0, self.position), _line_at(self.block, self.position)


class _Trace(msgspec.Struct):
    """An open traceback of a process."""

    chained: bool = False
    """It follows from the one before it."""
    harmless: bool = False
    """It tells of one request, or of something that the engine does without."""
    lines: int = 0


_TRACES_MAX = 256
_QUIET_LINES = 4096
_QUIET_LINE_BYTES = 400
_TRACE_MAX_LINES = 400
_BEFORE_BYTES = 8 * 1024
"""How far back the traceback of an error is looked for, and the last stamp of a log."""
_SERVED_TRIES = 100

_IDENTITY_SIGNALS = frozenset({"engine-version", "engine-config", "non-default-args"})
_BEFORE_RUNNING = frozenset(row.name for row in (*signals.IDENTITY, *signals.ALL_REDUCE, *signals.PRECISION)) | {
    "load-started", "weights-loaded", "kv-cache-memory", "kv-cache-size", "graphs-captured",
}  # fmt: skip
_WITH_TRACE = frozenset({"exception", "cuda-error", "cuda-out-of-memory", "nccl-error", "rpc-timeout", "launch-error", "nvml-error", "library-mismatch"})  # fmt: skip

# Access lines of uvicorn end with the answer; with ANSI colours and CRLF too.
_STATUS = ("200 OK", "404 Not Found", "400 Bad Request", "401 Unauthorized", "422 Unprocessable Entity", "500 Internal Server Error", "503 Service Unavailable")  # fmt: skip
_ANSWERED = tuple(status.encode() + end for end in (b"", b"\x1b[0m", b"\r") for status in _STATUS)
_POST = b"POST /"
_STATS_TEXT = b"Avg prompt throughput: "
_INFORMING_STARTS = tuple(start.encode() for start in signals.INFORMING_STARTS)
_UNWANTED_RECORD = (
    rb" \d\d-\d\d \d\d:\d\d:\d\d \[?[\w./]{1,100}:\d+\] (?!\d|"
    + b"|".join(re.escape(start) for start in _INFORMING_STARTS)
    + rb")"
)
_NOT_PASSED_OVER = re.compile(
    rb"\n(?!(?:INFO|DEBUG)(?:: {5}\d|" + _UNWANTED_RECORD + rb")"
    rb"|\([A-Za-z][^)\n]{0,60}\) (?:INFO|DEBUG)(?:: {5}\d|" + _UNWANTED_RECORD + rb"))([^\n]+)"
)
"""Lines, but for access lines and INFO and DEBUG records whose message begins like none that is wanted."""
_LITERALS = (*(row.literal for row in signals.SIGNALS), *signals.EXCEPTION_LITERALS)
_BY_WORD = {
    word.encode(): tuple(literal.encode() for literal in literals)
    for word, literals in signals.by_word(_LITERALS).items()
}
_WORDS = frozenset(_BY_WORD)
_BY_TOKEN = tuple(
    (token.encode(), tuple(literal.encode() for literal in literals))
    for token, literals in signals.by_token(
        tuple(set(_LITERALS).difference(*signals.by_word(_LITERALS).values()))
    ).items()
)
"""The literals without such a word, asked for only where a token of theirs is there."""


def holds_literal(line: bytes) -> bool:
    """Whether a line holds one of the table's literals, and so must be looked at."""
    words = line.split()
    if not _WORDS.isdisjoint(words):
        for word in words:
            for literal in _BY_WORD.get(word, ()):
                if literal in line:
                    return True
    for token, literals in _BY_TOKEN:
        if token in line:
            for literal in literals:
                if literal in line:
                    return True
    return False


_WORDS_OF_INDENTED_ERRORS = (
    b"rror: ",
    b"xception: ",
    b"Value error, ",
    b"NCCL WARN ",
    b"what(): ",
    b"OOMKilled",
    b"(CUDA_ERROR_",
)


def _was_served(block: bytes, position: int) -> bool:
    """Whether the POST access line at *position* was answered with 2xx."""
    end = block.find(b"\n", position, position + 300)
    line = block[position : end if end >= 0 else position + 300]
    return b'HTTP/1.1" 2' in line or b'HTTP/1.0" 2' in line or _SERVED_COLOURED.search(line) is not None


_SERVED_COLOURED = re.compile(rb'HTTP/[\d.]+(?:\x1b\[\d*m)?" ?(?:\x1b\[\d*m)?2\d\d')


def _line_at(block: bytes, position: int) -> bytes:
    start = block.rfind(b"\n", 0, position) + 1
    end = block.find(b"\n", position)
    return block[start : end if end >= 0 else None][:LINE_MAX_BYTES]


# What one line says of itself.

_ANSI = re.compile(r"(?:\x1b|#033|←|\ufffd\[|\^\[)\[?[0-9;]*m|\x1b\[[0-9;?]*[A-Za-z]|\[[0-9]{1,2}(?:;[0-9]{1,3})*m")
_ANSI_BARE = re.compile(r"\[[0-9]{1,2}(?:;[0-9]{1,3})*m")
"""The last of these: where the text holds none of what the others begin with, it is found ten times as fast alone."""
_ZONED = re.compile(
    r"\s*[\[(]?(\d{4})-(\d\d)-(\d\d)[T ](\d\d):(\d\d):(\d\d)(?:[.,](\d+))?(?: (DP\d+ TP\d+|TP\d+|DP\d+))?"
    r"(Z| ?[+-]\d\d:?\d\d| [A-Z]{3,4}(?= ))?[\])]?(?: std(?:out|err) [FP])?"
    r"(?: [\w.-]{1,64} [\w.@/\\-]{1,64}\[\d{1,9}\]: ?|(?= \w{0,60}[\d.-]) [\w.-]{1,64} [\w.@/\\-]{1,64}: ?"  # host, service
    r"| [\w.-]{1,64} [\w.@/\\-]{1,64} (?:\d{1,9}|-) \S{1,32} (?:-|\[[^\]]{0,200}\]) |[ \t]?)"  # RFC 5424
)
_JOURNAL = re.compile(r"([A-Z][a-z]{2}) ([ \d]\d) (\d\d):(\d\d):(\d\d)(?:\.\d{1,9})? \S+ [\w.@/\\:-]+(?:\[\d+\])?: ?")
_WRAPPING = re.compile(
    r"[\w.@-]{2,80}\s{1,12}\| ?"  # docker compose, docker service logs
    r"|[\w.@-]{1,64}\[\d{1,9}\]: |<\d{1,3}>1 (?=\d{4}-)"  # a service's tag, RFC 5424
    r"|\[[a-z][\w.]{0,60}-[\w.-]{1,60}\] "  # a pod's
    r"|\[rank(?P<rank>\d+)\]: ?"  # torch.distributed's excepthook
    r"|(?:> ?)+|E {3,}|#+ |[-*] (?=[A-Z(\[])"  # a quotation, pytest, Markdown
    r"|\s{0,8}\|(?:\s{0,4}\|){0,8}(?: |$)"  # a column of a build system
    r"|\d{1,4}: (?=[A-Z(\[])"  # srun --label
    r"|(?:\[ {0,8}\d{1,9}\.\d{6}\]|\d{10}\.\d{6}) [\w.-]{1,64} [\w.@/\\:-]{1,64}\[\d{1,9}\]: ?"  # journalctl -o short-monotonic, -unix
    r"|[A-Z][a-z]{2} (?=\d{4}-\d\d-\d\d \d\d:)"  # and -o short-full, with-unit: the day of the week
    r"|\s{0,8}MESSAGE="  # and -o export, verbose
    r"|\[(?:TRACE|DEBUG|INFO|WARN|ERROR|FATAL) {0,2}\] \S{1,80} \S{1,80} - ?"  # a Java server's, around its worker's output
    r"|\[\d+,\d+\]<std(?:out|err)>:"  # mpirun --tag-output
    r"|\[(?:pod/[\w./-]{1,200}\]|[a-z][\w.-]{0,60}\]:) "  # kubectl logs --prefix, an init system's tag
    r"|\d{1,7}\.\ds \d{1,7} "  # a notebook service's seconds and line number
    r"|\[\d{1,7}\] (?=\S)|\s{0,7}\d{1,7}(?:\t| {2}(?=\S))|[\w./-]{1,120}\.(?:log|txt|out|err):\d{1,9}:"  # line numbers: of a paste, cat -n, grep -n
    r"|\s+(?=(?:DEBUG|INFO|WARNING|ERROR|CRITICAL)(?: \d\d-\d\d |: )|\((?:APIServer|EngineCore|V?llm|Worker|Ray)\w*[^()]{0,40} pid=|\[rank\d+\]: )"
)
_PROCESS = re.compile(
    r"\(?(?P<process>[A-Za-z][\w-]*?)(?: rank=(?P<rank>\d+))?(?: (?P<ranks>[A-Z]+\d+(?:_[A-Z]+\d+)*))?"
    r" pid=(?P<pid>\d{1,9})(?:, ip=[^)]{1,60})?\) ?"
)
_STAMPED = re.compile(
    r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL) (?P<month>\d\d)-(?P<day>\d\d) (?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d)"
    r"(?:[.,]\d{1,6})? \[?[\w./<>-]+:\d+\](?: |$)"
)
_GLUED = re.compile(r"(?:\([A-Za-z][\w-]*[^()]{0,40} pid=\d{1,9}[^)]{0,60}\) ?)?" + _STAMPED.pattern)
_UVICORN = re.compile(r"(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL): {2,}")
_PLACE = re.compile(r"\[?[\w./-]*\.py:\d+\] ")
_GLOG = re.compile(
    r"\[(?P<level>[EWIF])(?P<month>\d{1,2})(?P<day>\d\d) (?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d)\.\d+ [\w.]+:\d+\] "
    r"(?:\[(?:PG [^\]]*?)?[Rr]ank (?P<rank>\d+)\] )?"
)
_NCCL = re.compile(
    r"(?:\[(\d{4})-(\d\d)-(\d\d) (\d\d):(\d\d):(\d\d)\] )?[\w.-]+:(?P<pid>\d+):\d+ (?:\[(?P<device>\d+)\] )?"
    r"(?P<text>(?:\S+ )?NCCL (?P<level>WARN|INFO|TRACE) .*)"
)
_RANK_OF_NAME = re.compile(r"(?:^|_|TP)(?:Worker_)?TP(\d+)(?:_EP\d+)?$")
_GLOG_LEVELS = {"E": "ERROR", "W": "WARNING", "I": "INFO", "F": "CRITICAL"}
_MONTHS = {
    "Jan": 1, "Feb": 2, "Mar": 3, "Apr": 4, "May": 5, "Jun": 6, "Jul": 7, "Aug": 8, "Sep": 9, "Oct": 10, "Nov": 11, "Dec": 12,
}  # fmt: skip


_PRETTY = ('\t"MESSAGE" : ', '        "MESSAGE" : ')


def _records_of(text: str, reference: float | None, utc_offset_seconds: float) -> Iterator[Record]:
    """Take one line apart; a wrapped one (docker's JSON) may hold several. *reference* None: stamps are left out."""
    if text.startswith(_PRETTY):  # journalctl -o json-pretty
        text = "{" + text.strip().rstrip(",") + "}"
    if text.startswith("{"):
        wrapped = _wrapped(text)
        if wrapped is not None:
            yield from _of_json(wrapped, reference, utc_offset_seconds)
            return
    text = text[:RECORD_MAX]
    record = Record(_uncoloured(text).rstrip())
    if _strip(record, reference, utc_offset_seconds):
        yield record
        return
    glued = _GLUED.search(record.text)  # a progress bar before it on the same line
    if glued is not None:
        record = Record(record.text[glued.start() :], at=record.at)
        _strip(record, reference, utc_offset_seconds)
    yield record


def _uncoloured(text: str) -> str:
    begun = "\x1b" in text or "←" in text or "\ufffd[" in text or "^[" in text or "#033[" in text
    return (_ANSI if begun else _ANSI_BARE).sub("", text)


def _strip(record: Record, reference: float | None, utc_offset_seconds: float) -> bool:
    """Take off what stands before the message and note what it says; whether a record's level was found."""
    for _ in range(_PREFIXES_MAX):
        text = record.text
        if (found := _STAMPED.match(text)) is not None:
            record.level = found["level"]
            record.at = record.at or _stamp(found, reference, utc_offset_seconds)
        elif (found := _PROCESS.match(text)) is not None:
            _note_process(record, found)
        elif (found := _GLOG.match(text)) is not None:
            record.level = _GLOG_LEVELS[found["level"]]
            record.at = record.at or _stamp(found, reference, utc_offset_seconds)
            record.rank = int(found["rank"]) if found["rank"] else record.rank
        elif (found := _NCCL.match(text)) is not None:
            record.pid = int(found["pid"])
            record.level = {"WARN": "WARNING"}.get(found["level"], "DEBUG")
            if found[1]:
                record.at = record.at or _unix([int(part) for part in found.groups()[:6]], utc_offset_seconds)
            record.text = found["text"]
            return True
        elif (found := _UVICORN.match(text)) is not None:
            record.level = found["level"]
        elif (found := _ZONED.match(text)) is not None:
            zone = _zone_seconds(found[9]) if found[9] else utc_offset_seconds
            record.at = _unix([int(part) for part in found.groups()[:6]], zone)
            if found[8]:
                record.process = found[8].replace(" ", "_")
                tensor = re.search(r"TP(\d+)", found[8])
                record.rank = int(tensor[1]) if tensor else record.rank
        elif (found := _JOURNAL.match(text)) is not None and found[1] in _MONTHS:
            stamp = [_MONTHS[found[1]], *(int(part) for part in found.groups()[1:5])]
            record.at = None if reference is None else stamp_time(stamp, reference, utc_offset_seconds)
        elif (found := _WRAPPING.match(text)) is not None and found.end():
            rank = found["rank"]
            record.rank = int(rank) if rank else record.rank
        elif (found := _PLACE.match(text)) is not None:
            pass
        else:
            return bool(record.level)
        record.text = text[found.end() :]
    return bool(record.level)


_PREFIXES_MAX = 8


def _note_process(record: Record, found: re.Match[str]) -> None:
    name = found["process"]
    if found["ranks"]:
        name = f"{name}_{found['ranks']}"
    elif found["rank"]:
        name = f"{name}_{found['rank']}"
    if not record.process or name.startswith(("Worker", "EngineCore", "APIServer", "VllmWorker")):
        record.process, record.pid = name, int(found["pid"])
    if found["rank"]:
        record.rank = int(found["rank"])
    elif (of_name := _RANK_OF_NAME.search(name)) is not None:
        record.rank = int(of_name[1])


def _stamp(found: re.Match[str], reference: float | None, utc_offset_seconds: float) -> float | None:
    if reference is None:
        return None
    parts = [int(found[name]) for name in ("month", "day", "hour", "minute", "second")]
    return stamp_time(parts, reference, utc_offset_seconds)


def stamp_time(stamp: list[int], reference: float, utc_offset_seconds: float = 0.0) -> float | None:
    """Return the Unix time of [month, day, hour, minute, second]: the last such moment before *reference* plus a day.

    None where there is no such moment (month 13).
    """
    year = 1970 + int(reference // 31_556_952)  # the mean Gregorian year, seconds
    for candidate in range(year + 1, year - 9, -1):
        at = _unix([candidate, *stamp], utc_offset_seconds)
        if at is not None and at <= reference + 86_400:
            return at
    return None


_DAYS = (0, 31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31)


def _unix(parts: list[int], utc_offset_seconds: float) -> float | None:
    year, month, day, hour, minute, second = parts
    leap = year % 4 == 0 and (year % 100 != 0 or year % 400 == 0)
    if not (
        1 <= month <= 12 and 1 <= day <= _DAYS[month] and hour < 24 and minute < 60 and second < 62 and year >= 1970
    ):
        return None
    if month == 2 and day == 29 and not leap:
        return None
    return timegm((year, month, day, hour, minute, second, 0, 0, 0)) - utc_offset_seconds


def _zone_seconds(zone: str) -> float:
    zone = zone.strip().replace(":", "")
    if zone[0] not in "+-":  # Z, or an abbreviation, which only its country can tell from others
        return 0.0
    return (1 if zone[0] == "+" else -1) * (int(zone[1:3]) * 3600 + int(zone[3:5]) * 60)


class _Wrapped(msgspec.Struct):
    """A line of docker's json-file driver, of `journalctl -o json` or of a log store, or a JSON record of Python's logging."""

    log: object = None
    journal: object = msgspec.field(name="MESSAGE", default=None)
    """Text, or its bytes where it holds colours."""
    line: object = None
    text_payload: object = msgspec.field(name="textPayload", default=None)
    body: object = None
    message: object = None
    msg: object = None
    exc_info: object = None
    time: object = None
    asctime: object = None
    timestamp: object = None
    at_timestamp: object = msgspec.field(name="@timestamp", default=None)
    realtime: object = msgspec.field(name="__REALTIME_TIMESTAMP", default=None)
    """Microseconds."""
    levelname: object = None
    process_name: object = msgspec.field(name="processName", default=None)
    process: object = None

    def texts(self) -> Iterator[str]:
        """Yield what is wrapped, the one that other programs wrap first."""
        for value in (self.log, self.journal, self.message, self.msg, self.line, self.text_payload, self.body):
            if isinstance(value, str):
                yield value
            elif isinstance(value, list):
                numbers = cast("list[object]", value)
                yield bytes(n for n in numbers if isinstance(n, int) and 0 <= n < 256).decode("utf-8", "replace")


_decoded = msgspec.json.Decoder(_Wrapped).decode


def _wrapped(text: str) -> _Wrapped | None:
    try:
        return _decoded(text)
    except (msgspec.DecodeError, UnicodeError, RecursionError):
        return None


def _of_json(wrapped: _Wrapped, reference: float | None, utc_offset_seconds: float) -> Iterator[Record]:
    at = _stamp_of_json(wrapped, utc_offset_seconds) if reference is not None else None
    process = wrapped.process_name if isinstance(wrapped.process_name, str) else ""
    pid = wrapped.process if isinstance(wrapped.process, int) else None
    lines = next(wrapped.texts(), "").splitlines()
    if isinstance(wrapped.exc_info, str):
        lines += wrapped.exc_info.splitlines()
    for line in lines:
        if wrapped.levelname is not None:  # Python's own logging: the message as it is
            record = Record(line[:RECORD_MAX], str(wrapped.levelname).upper(), process, pid, None, at)
            if (of_name := re.search(r"VllmWorker-(\d+)$", process)) is not None:
                record.rank = int(of_name[1])
            yield record
            continue
        inner = () if line.startswith("{") else _records_of(line, reference, utc_offset_seconds)
        for unwrapped in inner:
            unwrapped.at = at or unwrapped.at
            yield unwrapped


def _stamp_of_json(wrapped: _Wrapped, utc_offset_seconds: float) -> float | None:
    if isinstance(wrapped.realtime, str) and wrapped.realtime.isascii() and wrapped.realtime[:18].isdecimal():
        return int(wrapped.realtime[:18]) / 1e6
    words = wrapped.time or wrapped.asctime or wrapped.timestamp or wrapped.at_timestamp or ""
    stamp = _ZONED.match(str(words))
    if stamp is None:
        return None
    zone = _zone_seconds(stamp[9]) if stamp[9] else utc_offset_seconds
    return _unix([int(part) for part in stamp.groups()[:6]], zone)


_OF_BYTES = re.compile(rb'^\{[^\n]*"MESSAGE" ?: ?\[[^\n]*$', re.MULTILINE)


def spelled_out(data: bytes) -> bytes:
    """Return the text, with the records of `journalctl -o json` that hold bytes in place of words (for their colours) in words."""
    return _OF_BYTES.sub(lambda match: _in_words(match[0]), data) if b'"MESSAGE"' in data else data


def _in_words(line: bytes) -> bytes:
    wrapped = _wrapped(line.decode("utf-8", "replace"))
    text = next(wrapped.texts(), None) if wrapped is not None else None
    if wrapped is None or text is None:
        return line
    return msgspec.json.encode({"MESSAGE": _uncoloured(text), "__REALTIME_TIMESTAMP": wrapped.realtime})


def is_record(line: bytes) -> bool:
    """Whether a line can be taken apart: it says a level, begins a traceback, or is an error in Python's words."""
    text = line[:LINE_MAX_BYTES].decode("utf-8", "replace")
    return any(
        record.level or record.text.startswith("Traceback (most recent call last)") or _EXCEPTION.match(record.text)
        for record in _records_of(text, None, 0.0)
    )


def ends_in_traceback(text: bytes) -> bool:
    """Whether *text* breaks off within a traceback: what it would have ended with is not known."""
    for raw in reversed(text[-TRACEBACK_MAX_BYTES:].split(b"\n")):
        for record in reversed(list(_records_of(raw[:1000].decode("utf-8", "replace"), None, 0.0))):
            if "Traceback (most recent call last)" in record.text:
                return True
            if record.text.strip("`\r ") and not _IN_TRACEBACK.match(record.text):
                return False
    return False


TRACEBACK_MAX_BYTES = 16 << 10
_IN_TRACEBACK = re.compile(r"\s{2}|File |Cell In|-{2,}> ")
"""Notebooks do not indent all of it."""


# What a message says.


def _trace_in(before: bytes, event: EngineEvent) -> list[str]:
    """Return the traceback lines of the event's process at the end of what stands *before* it, oldest first."""
    found: list[str] = []
    for raw in reversed(before.split(b"\n")[1:]):
        text = raw[:1000].decode("utf-8", "replace")
        for record in _records_of(text, None, 0.0):
            if (record.process, record.pid) != (event.process, event.pid) or record.level == "INFO":
                continue
            if "Traceback (most recent" in record.text or _EXCEPTION.match(record.text):
                return found[::-1]
            if record.text[:2].isspace():
                found.append(record.text.strip())
    return found[::-1]


_EXCEPTION = re.compile(
    r"(?P<type>(?:[A-Za-z_]\w*\.){0,8}[A-Z]\w{2,60})(?:\([\w., ]{1,80}\))?(?:: ?(?P<message>.*))?$", re.DOTALL
)
_EXCEPTION_IN_TRACE = re.compile(
    r"(?P<type>(?:[A-Za-z_]\w*\.){0,8}[A-Za-z_]\w{2,60})(?:: (?P<message>.*))?$", re.DOTALL
)
_QUOTED_ERROR = re.compile(
    r"\s+(?:(?:\w+\.)*[A-Z]\w*(?:Error|Exception): |Value error, |what\(\): |Reason: +OOMKilled|.{0,80}NCCL WARN |\(CUDA_ERROR_[A-Z_]+\): )"
)
_HARMLESS = (
    "NVLink detection failed",
    "NVLink detection not possible",
    "Exception in ASGI application",
    "Error in preprocessing prompt inputs",
    "Error in applying chat template",
    "Error in chat completion stream generator",
    "Error in completion stream generator",
    "Error with model error=",
)
"""What vLLM and uvicorn say before a traceback that is no failure of the engine."""
_OF_A_REQUEST = frozenset({"nvml-error", "launch-error"})
_CHAIN = ("The above exception was the direct cause", "During handling of the above exception")


def _is_quoted_error(text: str) -> bool:
    """Whether an indented line is an error all the same: pydantic's second line, or an indented paste."""
    return _QUOTED_ERROR.match(text) is not None


def _is_error_type(name: str) -> bool:
    return name.endswith(("Error", "Exception", "Interrupt", "Failure", "Failed", "Timeout", "Died", "Unsupported"))


def _rank_fact(facts: dict[str, Fact]) -> int | None:
    rank = facts.get("rank")
    return rank if isinstance(rank, int) else None


_FRAME = re.compile(r'File "(?P<file>[^"]{1,300})", line \d+, in (?P<function>[\w<>.]{1,80})')


def _with_trace(event: EngineEvent, trace: list[str]) -> EngineEvent:
    """Return the event with `within` (the innermost functions, outermost first) and `code` (the last line of code)."""
    frames = [found for line in trace if (found := _FRAME.match(line)) is not None]
    code = [line for line in trace if not line.startswith("File ") and line.strip("^~ ")]
    facts = dict(event.facts)
    if frames:
        facts["within"] = " > ".join(found["function"] for found in frames[-8:])
        facts["file"] = frames[-1]["file"].rpartition("site-packages/")[2].rpartition("dist-packages/")[2][-120:]
    if code:
        facts["code"] = code[-1][:160]
    return msgspec.structs.replace(event, facts=facts) if len(facts) > len(event.facts) else event


_CONFIG = re.compile(
    r"\b(model|tensor_parallel_size|pipeline_parallel_size|data_parallel_size|quantization|dtype|kv_cache_dtype"
    r"|max_seq_len|enforce_eager|disable_custom_all_reduce)=('[^']{0,300}'|[\w./-]{1,120})"
)
_ARGUMENT = re.compile(r"'([a-z]\w{1,60})': ('[^']{0,300}'|\"[^\"]{0,300}\"|-?[\w.]{1,60})")
_SECRET = re.compile(
    r"((?:key|token|secret|password|passwd|credential)\w{0,40}'?[:=] ?)(?:'[^']*'|\"[^\"]*\"|\[[^\]]*\])", re.IGNORECASE
)


def _without_secrets(signal: str, text: str) -> str:
    return _SECRET.sub(r"\1'***'", text) if signal in _IDENTITY_SIGNALS else text


def _facts_of(match: signals.Match, text: str) -> dict[str, Fact]:
    facts = dict(match.facts)
    if match.name == "engine-config":
        for name, value in _CONFIG.findall(text):
            facts.setdefault(name, signals.number_or_text(value.strip("'")))
    elif match.name == "non-default-args":
        for name, value in _ARGUMENT.findall(_without_secrets(match.name, text)):
            facts.setdefault(name, signals.number_or_text(value.strip("'\"")))
    elif match.name == "cuda-out-of-memory":
        facts |= _holders(text)
    return facts


_HOLDER = re.compile(r"Process (\d+) has ([\d.]+ ?[KMG]?i?B) memory in use")


def _holders(text: str) -> dict[str, Fact]:
    """Return which other processes hold memory, as torch names them: `process_pids`, and `process_bytes` of the largest."""
    held = {pid: size for pid, text_size in _HOLDER.findall(text) if (size := signals.bytes_of(text_size)) is not None}
    if not held:
        return {}
    facts: dict[str, Fact] = {"process_pids": ",".join(held), "process_bytes": max(held.values())}
    own = re.search(r"this process has ([\d.]+ ?[KMG]?i?B) memory in use", text)
    if own is not None and (size := signals.bytes_of(own[1])) is not None:
        facts["own_bytes"] = size
    allocated = re.search(r"allocated memory ([\d.]+ ?[KMG]?i?B) is allocated by PyTorch", text)
    if allocated is not None and (size := signals.bytes_of(allocated[1])) is not None:
        facts["allocated_bytes"] = size
    return facts


_STATS = re.compile(
    r"Avg prompt throughput: (?P<prompt>[\d.]+) tokens/s, Avg generation throughput: (?P<generation>[\d.]+) tokens/s, "
    r"Running: (?P<running>\d+) reqs(?:, Swapped: (?P<swapped>\d+) reqs)?, (?:Waiting|Pending): (?P<waiting>\d+) reqs"
    r"(?:.*?Preemptions: (?P<preemptions>\d+))?(?:.*?KV cache usage: (?P<usage>[\d.]+)%)?"
)


def stats_facts(text: str) -> dict[str, Fact]:
    """Return the numbers of a statistics line (V0 or V1), or nothing."""
    found = _STATS.search(text)
    if found is None:
        return {}
    facts: dict[str, Fact] = {
        "running": int(found["running"]),
        "waiting": int(found["waiting"]),
        "prompt_tokens_per_second": _decimal(found["prompt"]),
        "generation_tokens_per_second": _decimal(found["generation"]),
    }
    if found["usage"] is not None:
        facts["kv_cache_usage_ratio"] = round(_decimal(found["usage"]) / 100, 4)
    if found["preemptions"] is not None:
        facts["preemptions"] = int(found["preemptions"])
    return facts


def _decimal(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return 0.0
