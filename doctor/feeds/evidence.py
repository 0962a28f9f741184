"""Pasted evidence: any mix of files in, what they show of a node out.

What a file is, is told by what stands in it, never by its name; one file may hold several things, a bug report say.
Files are streamed: documents (a topology, `nvidia-smi -q`, collect-env, …) are cut out of the text, and what is left goes
to the readers of logs.
"""

from __future__ import annotations

import contextlib
import gzip
import itertools
import re
import zlib
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, TypeVar, cast

import msgspec

from doctor.collectors.redaction import (
    command_line_without_secrets,
    environment_without_secrets,
    snapshot_without_secrets,
)
from doctor.feeds import recording
from doctor.readers import (
    collect_env,
    command_line,
    dcgm,
    fabric_manager_log,
    kernel_log,
    lspci,
    model_config,
    nvidia_smi_csv,
    nvidia_smi_list,
    nvidia_smi_q,
    nvidia_smi_table,
    nvidia_smi_xml,
    p2p_matrix,
    systemctl_status,
    topo_matrix,
    vllm_metrics,
)
from doctor.readers.patterns import LogPattern
from doctor.readers.vllm_log import LogReader, ends_in_traceback, is_record, spelled_out
from doctor.readers.wrapping import unwrapped
from doctor.snapshot import (
    OF_A_NODE,
    Absent,
    Engine,
    EngineEvent,
    EngineFlags,
    EngineMetrics,
    EngineStack,
    FabricManager,
    FabricMessage,
    Gpu,
    GpuPair,
    Host,
    KernelEvent,
    LogState,
    Maybe,
    ModelConfig,
    NvidiaMessage,
    NvLink,
    PciDevice,
    Snapshot,
    Source,
    Stack,
    Unseen,
    Why,
    known,
    or_none,
)

FIRST_BYTES = 8 << 20
"""Read at once from the beginning of a file: a bug report with all its documents fits."""

CHUNK_BYTES = 4 << 20
"""Read at once from there on."""

LOG_CHUNK_BYTES = 1 << 20
"""Read at once of an engine's log: stays in the processor's cache, a fifth faster than 4 MiB."""

LAST_LIVES_BYTES = 32 << 20
"""The end of a large engine log, which is always read."""

LAST_LIVES = 64
"""Where an engine started so often within that end, the lives between the first ones and these are passed over: an engine
that crashes and starts again for days says the same thing each time, and what was wrong before its last lives is past."""

_LIFE_BEGINS = (b"LLM engine (v", b"non-default args: ", b"vLLM API server version")
"""What an engine says once a start, the first once for each data-parallel engine; some starts fail before some of them."""

PART_MAX_BYTES = 256 << 10
"""In a larger file a part of `nvidia-smi -q` without its heading is not looked for."""

KERNEL_EVENTS_MAX = 4000
"""Kernel events kept of one file; of further ones only those of the end."""

FABRIC_MESSAGES_MAX = 1000
"""Messages of the fabric manager kept of one file."""

DOCUMENTS_MAX = 256
"""Documents of one kind taken from one piece of a file: a day of `nvidia-smi -q` every five minutes."""

DAY_SECONDS = 86400.0


class EvidenceError(Exception):
    """A file can't be used; the message names it and says why."""


def read(paths: Sequence[Path], *, now: float, patterns: Sequence[LogPattern] = ()) -> Iterator[Snapshot]:
    """Yield what the files show: one visit, or one for each `nvidia-smi -q` of another time, oldest first.

    A visit's time is the newest stamp in the evidence, else *now*, Unix seconds. Stamps without a zone are taken for UTC.
    *patterns* are of lines that the site wants kept. A single recording is replayed. Raises EvidenceError.
    """
    if len(paths) == 1 and _is_recording(paths[0]):
        try:
            yield from recording.read(paths[0])
        except recording.RecordingError as e:
            raise EvidenceError(str(e)) from e
        return
    gathered = _Gathered(now, patterns)
    names = [path.name for path in paths]
    for path in paths:
        name = path.name if names.count(path.name) == 1 else str(path)
        if not gathered.take(path, name):
            msg = f"{path}: nothing in it is evidence that this program reads: {READABLE}"
            raise EvidenceError(msg)
    yield from map(snapshot_without_secrets, gathered.visits())


READABLE = (
    "an engine's log, its /metrics page or command line, collect-env, config.json, dmesg or the journal, nvidia-smi "
    "(-q, -q -x, --query-gpu, topo -m, topo -p2p r, nvlink -s, -L), lspci -nn or -vv, dcgmi diag, health or nvlink -s, the fabric "
    "manager's log or state"
)


def kinds(path: Path, *, now: float) -> tuple[str, ...]:
    """Return what a file was taken for, in the words of the readers, sorted. Raises EvidenceError."""
    gathered = _Gathered(now)
    gathered.take(path, path.name)
    return tuple(sorted(gathered.kinds))


# Files.

_COMPRESSED = (
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"BZh", "bzip2"),
    (b"PK\x03\x04", "zip"),
)

_RECORDING = b'{"recording":'

_TEXT_SAMPLE_BYTES = 64 << 10
_UTF_16 = {b"\xff\xfe": "utf-16-le", b"\xfe\xff": "utf-16-be"}


@contextlib.contextmanager
def _opened(path: Path) -> Generator[BinaryIO, None, None]:
    """Open a file for reading, decompressed if it is a gzip file. Raises EvidenceError."""
    if path.is_dir():
        msg = f"{path}: is a directory: name the files in it"
        raise EvidenceError(msg)
    try:
        raw = path.open("rb")
    except OSError as e:
        msg = f"{path}: can't be read: {e.strerror or e}"
        raise EvidenceError(msg) from e
    with raw:
        magic = raw.peek(6)[:6]
        for signature, program in _COMPRESSED:
            if magic.startswith(signature):
                msg = f"{path}: is compressed with {program}: decompress it first"
                raise EvidenceError(msg)
        if magic.startswith(b"\x1f\x8b"):
            with gzip.GzipFile(fileobj=raw) as plain:
                yield cast("BinaryIO", plain)
        else:
            yield raw


def _is_recording(path: Path) -> bool:
    """Whether the file is a recording, whole or torn. A pipe is none: what is looked at would be gone."""
    if not path.is_file():
        return False
    try:
        with path.open("rb") as raw:
            head = raw.read(512)
    except OSError:  # reading it will say why
        return False
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(head, len(_RECORDING)) == _RECORDING
    except zlib.error:
        return head.startswith(_RECORDING)


def _read(file: BinaryIO, size: int, path: Path) -> bytes:
    try:
        return file.read(size)
    except (OSError, EOFError, ValueError) as e:  # a gzip file that is cut or damaged, too
        reason = (e.strerror if isinstance(e, OSError) else None) or str(e)
        msg = f"{path}: can't be read to its end: {reason}"
        raise EvidenceError(msg) from e


_INDENT = re.compile(rb"^([ \t]*)[^\s]", re.MULTILINE)


_QUOTED = re.compile(rb"(?:>[^\n]*\n|\s*\n)*>[^\n]*\s*")


def _unquoted(data: bytes) -> bytes:
    """Return the text without the quotation marks of a mail or an issue, where all its lines have one."""
    while data.startswith(b">") and _QUOTED.fullmatch(data):
        data = re.sub(rb"^> ?", b"", data, flags=re.MULTILINE)
    return data


def _dedented(data: bytes) -> bytes:
    """Return the text without the indentation that all its lines share: it was cut out of an issue or a manifest."""
    if data[:1] not in (b" ", b"\t"):
        return data
    indents = {found[1] for found in _INDENT.finditer(data)}
    shared = min(indents, key=len, default=b"")
    if not all(indent.startswith(shared) for indent in indents):
        return data
    return re.sub(rb"^" + shared, b"", data, flags=re.MULTILINE)


def _is_binary(data: bytes) -> bool:
    sample = data[: 1 << 20].strip(b"\0")[:_TEXT_SAMPLE_BYTES]  # a log that was truncated while open begins with zeros
    if not sample:
        return True
    control = len(sample.translate(None, bytes(range(0x20, 0x100)) + b"\t\n\r\x0b\x0c\x1b\x08"))
    strange = sample.decode("utf-8", "replace").count("�")
    # guess: a twentieth of the bytes. Logs hold a stray byte here and there, no program writes one so dense.
    return control > len(sample) / 20 or strange > len(sample) / 20


# Documents: what is cut out of a text before the logs are read.

_Spans = Iterator[tuple[int, int]]


class _Kind(msgspec.Struct, frozen=True):
    """A kind of document."""

    name: str
    anchors: tuple[bytes, ...]
    """No document of this kind is without one of them; they are cheap to look for."""
    find: Callable[[str], _Spans]


def _commands(text: str) -> _Spans:
    return command_line.find(text.encode("latin-1", "replace"))


def _pages(text: str) -> _Spans:
    return vllm_metrics.find(text.encode("latin-1", "replace"))


def _matches(pattern: str) -> Callable[[str], _Spans]:
    compiled = re.compile(pattern, re.MULTILINE)
    return lambda text: (match.span() for match in compiled.finditer(text))


_CSV_ANCHORS = tuple(
    column.encode()
    for column in (
        *("uuid, ", "name, ", "index, ", "timestamp, ", "driver_version", "memory.", "temperature.", "utilization."),
        *(
            "power.",
            "clocks",
            "ecc.",
            "remapped_rows.",
            "retired_pages.",
            "pcie.link.",
            "fabric.",
            "pstate",
            "--query-gpu",
        ),
    )
)

_KINDS = (
    _Kind("model-config", (b'"model_type"', b'"architectures"'), model_config.find),
    _Kind("collect-env", (b"PyTorch version", b"System Info"), collect_env.find),
    _Kind(
        "smi-q",
        (
            b"NVSMI LOG",
            b"GPU 0000",
            b"device handle for",
            *(b"    " + part for part in (b"Temperature", b"Fabric", b"ECC ", b"Remapped ", b"Retired ", b"PCI\n")),
            *(b"    " + part for part in (b"Clocks", b"MIG Mode", b"FB Memory", b"Power Readings", b"GPU Power")),
        ),
        nvidia_smi_q.find,
    ),
    _Kind("smi-part", (b" : ",), nvidia_smi_q.find_bare),
    _Kind("smi-xml", (b"<nvidia_smi_log", b'<gpu id="'), nvidia_smi_xml.find),
    _Kind("p2p", (b"GPU0",), p2p_matrix.find),
    _Kind("topo", (b"GPU0",), topo_matrix.find),
    _Kind("smi-table", (b"| NVIDIA-SMI ",), nvidia_smi_table.find),
    _Kind("smi-list", (b"(UUID: ",), nvidia_smi_list.find),
    _Kind("lspci-links", (b"LnkSta:",), lspci.find_links),
    _Kind("lspci", (b"[10de:",), lspci.find),
    _Kind("engine-metrics", (b"# HELP ", b"# TYPE ", b"vllm:"), _pages),
    _Kind("fabricmanager-status", (b"nvidia-fabricmanager.service",), systemctl_status.find),
    _Kind(
        "command-line",
        (
            b"vllm serve",
            b"-m vllm.",
            b"sglang",
            b"trtllm-serve",
            b"text-generation-launcher",
            b"llama-server",
            b"vllm-openai",
        ),
        _commands,
    ),
    _Kind(
        "smi-help",
        (b'"--query-gpu"',),
        _matches(r'^List of valid properties to query for the switch "--query-gpu(?:.*\n)*'),
    ),
    _Kind("smi-csv", _CSV_ANCHORS, nvidia_smi_csv.find),
    _Kind(
        "smi-lists",
        (b"pid, ", b", pid", b"used_gpu_memory", b"retired_pages.address"),
        _matches(
            r"^(?:timestamp|gpu_\w+|pid|process_name|used_(?:gpu_)?memory), "
            r"[^\n]*(?:pid|used_gpu_memory|retired_pages)[^\n]*\n(?:[^\n]*, [^\n]*\n?)*"
        ),
    ),
    _Kind(
        "smi-refusal",
        (b"NVIDIA-SMI has failed", b"No devices were found", b"Failed to initialize NVML"),
        _matches(
            r"^(?:NVIDIA-SMI has failed|No devices were found"
            r"|Failed to initialize NVML: (?!Driver/library version mismatch))[^\n]*"
        ),
    ),
    _Kind("dmon", (b"# gpu ",), _matches(r"^# gpu +(?:\w+ +)+\n(?:(?:#|\s+\d)[^\n]*\n?)*")),
    _Kind("dcgm-log", (b"[[Health]]",), dcgm.find_log),
    _Kind("dcgm-links", (b"NvLink Link Status",), dcgm.find_links),
    _Kind("dcgm", (b"| Pass", b"| Fail", b"| Warn", b"| Error", b"Overall Health"), dcgm.find),
    _Kind("gpud", (b"fabric state: GPU ",), _matches(r"^.*\bfabric state: GPU \S+: state=[^\n]*")),
)
"""In the order in which they are cut out: a collect-env holds a topology."""

_SMI_REPORTS: Mapping[str, Callable[[str], tuple[nvidia_smi_q.SmiReport, ...]]] = {
    "smi-q": lambda text: (nvidia_smi_q.read(text),),
    "smi-part": lambda text: (nvidia_smi_q.read_bare(text),),
    "smi-xml": lambda text: (nvidia_smi_xml.read(text),),
    "smi-table": lambda text: (nvidia_smi_table.read(text),),
    "smi-csv": nvidia_smi_csv.reports,
}
"""Kind → what nvidia-smi says of the GPUs there, one report a look."""

_UNREAD = {
    "smi-help": "nvidia-smi --help",
    "smi-lists": "nvidia-smi --query-compute-apps or --query-retired-pages",
    "dmon": "nvidia-smi dmon",
    "gpud": "gpud",
}
"""Known, and of no use to any symptom yet: kind → the program."""

_LONG_LINE = re.compile(rb"^[^\n]{16384}", re.MULTILINE)
"""No document has lines this long; text that does is left to the readers of logs, which are bounded."""

_ENGINE_RECORD = re.compile(
    rb"(?:INFO|WARNING|ERROR|DEBUG|CRITICAL) \d\d-\d\d[ T]\d\d:\d\d:\d\d|(?:INFO: {5}|WARNING: {2}|ERROR: {4})\S"
    rb"|Traceback \(most recent call last\)|\"levelname\": ?\"",
    re.MULTILINE,
)
"""Records of vLLM and of its web server, and what Python prints when it fails."""

_ENGINE_TRACE = re.compile(
    rb"nvml error: |nvidia-container-cli: |NCCL (?:INFO|WARN|ERROR)|ProcessGroupNCCL|\[rank\d+\]|CUDA error|CUDA out of memory|Failed to initialize NVML"
    rb"|^(?:\w+Error|\w*Exception): ",
    re.MULTILINE,
)
"""What an excerpt shows of an engine that has none of its records."""

_SAMPLE_LINES = 256

_ALARMING = re.compile(
    rb"^[^\n]*(?:\b(?:ERROR|FATAL|CRITICAL|FAILED)\b|\b[Ee]rror: (?!0\b|[Nn]one)|\b[Ff]ailed (?:to|with|because|due)\b|\b[Ff]ailure: "
    rb"|[Ee]xception: |\b[Tt]imed out\b|\bXid\b|\b[Uu]nhealthy\b|\bpanic\b|\bcore dumped\b|\bnot responding\b|\b[Uu]nable to )[^\n]*",
    re.MULTILINE,
)
"""What programs say of a fault. guess: whatever else a text holds, with one of these it is no proof of health."""

_DRIVER_LINE = re.compile(rb"^[^\n]*(?:NVRM: |SXid \()[^\n]*$", re.MULTILINE)
"""Where a file holds both logs, the engine's reader is spared what the driver says of lost GPUs and exceptions."""

_FABRIC_LINE = re.compile(
    rb"^[^\n]*(?:\] \[tid \d+\]|nv-fabricmanager\[|nvidia-fabricmanager\.service:|Fabric Manager version"
    rb"|fabric manager NVIDIA GPU driver interface version)[^\n]*$",
    re.MULTILINE,
)


class _Gathered:
    """What the files hold so far."""

    def __init__(self, now: float, patterns: Sequence[LogPattern] = ()) -> None:
        self.now = now
        self.patterns = patterns
        self.kinds: set[str] = set()
        self.reports: list[nvidia_smi_q.SmiReport] = []
        self.listed: list[tuple[Gpu, ...]] = []
        self.matrices: list[topo_matrix.TopoMatrix] = []
        self.environments: list[collect_env.Environment] = []
        self.commands: list[command_line.CommandLine] = []
        self.models: list[ModelConfig] = []
        self.metrics: list[tuple[str, EngineMetrics]] = []
        self.pci: list[PciDevice] = []
        self.manager = FabricManager()
        self.kernel: list[KernelEvent] = []
        self.events: list[EngineEvent] = []
        self.logs: list[LogState] = []
        self.stamps: list[float] = []
        self.p2p: list[p2p_matrix.P2pMatrix] = []
        self.pci_links: list[lspci.Link] = []
        self.dcgm: list[dcgm.DcgmReport] = []
        self.complaints: list[str] = []
        """What speaks of a fault, and no symptom reads."""
        self.unread: list[str] = []
        self.refusals: list[str] = []
        """What nvidia-smi printed when it could not answer."""

    def take(self, path: Path, name: str) -> bool:
        """Take what the file holds, and return whether it holds anything. Raises EvidenceError."""
        before, self.kinds = self.kinds, set()
        with _opened(path) as file:
            first = _read(file, FIRST_BYTES, path)
            if not first:
                msg = f"{path}: the file is empty"
                raise EvidenceError(msg)
            if first.startswith(_RECORDING):
                msg = f"{path}: is a recording; a recording is judged by itself: gpu-doctor check --replay {path}"
                raise EvidenceError(msg)
            coding = _UTF_16.get(first[:2])
            if coding and len(first) == FIRST_BYTES:
                msg = f"{path}: is UTF-16 and longer than {FIRST_BYTES >> 20} MiB: convert it to UTF-8 first"
                raise EvidenceError(msg)
            if coding:  # PowerShell writes so
                first = first.decode(coding, "replace").encode()
            elif _is_binary(first):
                msg = f"{path}: is not text"
                raise EvidenceError(msg)
            first = first.removeprefix(b"\xef\xbb\xbf")
            if len(first) < FIRST_BYTES:
                first = _unquoted(first)
            self._text(file, first, path, name)
        found = bool(self.kinds)
        self.kinds |= before
        return found

    def _text(self, file: BinaryIO, first: bytes, path: Path, name: str) -> None:
        if len(first) < FIRST_BYTES and model_config.recognises(first):
            self._model(first)
            return
        data = self._without_documents(first, name)
        if len(first) < FIRST_BYTES and (bare := _dedented(data)) != data:
            data = self._without_documents(
                bare, name
            )  # a part of `nvidia-smi -q` is indented by nature, others are not
        data = unwrapped(_untagged(data) if len(first) < FIRST_BYTES else data)
        is_kernel = kernel_log.recognises(data)
        is_engine = _is_engine_log(data, is_kernel=is_kernel)
        rest = data
        only_engine = is_engine and not is_kernel
        kernel = kernel_log.KernelLogReader(name, now=self.now, patterns=() if only_engine else self.patterns)
        engine = LogReader(name, patterns=self.patterns)
        events: list[KernelEvent] = []
        begins = goes_on = True
        while goes_on:
            following = _read(file, LOG_CHUNK_BYTES if only_engine else CHUNK_BYTES, path)
            goes_on = bool(following)
            if not only_engine or begins or not goes_on:
                events = _bounded([*events, *kernel.feed(data)])
            elif kernel.lines:
                # A busy engine log is read at the speed of the disk: the kernel is looked for at its two ends only.
                events = _bounded([*events, *kernel.finish()])
                kernel = kernel_log.KernelLogReader(f"{name} (last part)", now=self.now)
            if is_engine or not is_kernel:
                engine.feed(_DRIVER_LINE.sub(_blanked, data) if is_kernel else data, self.now)
            if begins and only_engine and (last := _last_lives(path)) > FIRST_BYTES:
                engine.pass_over(_line_ends(file, FIRST_BYTES, last), last - FIRST_BYTES)
                following = _read(file, LOG_CHUNK_BYTES, path)
            begins = False
            data = following if only_engine else self._without_documents(following, name)
        self._kernel(_bounded([*events, *kernel.finish()]), kernel, is_kernel=is_kernel)
        self._engine(engine, is_engine=is_engine)
        if is_engine and len(first) < FIRST_BYTES and ends_in_traceback(rest):
            self.complaints.append(f"{name}: it breaks off within a traceback, before the error is named")
        if not self.kinds & {"kernel-log", "engine-log", "fabricmanager"}:
            self._leftover(rest, name)

    def _leftover(self, rest: bytes, name: str) -> None:
        """Note a line that speaks of a fault and that no reader took: beside it, silence is no health."""
        found = _ALARMING.search(rest)
        if found is not None:
            line = rest.count(b"\n", 0, found.start()) + 1
            words = found[0].decode("utf-8", "replace").strip()[:160]
            self.complaints.append(f"{name}:{line}: nothing here understands what it says: {words}")

    def _kernel(self, events: list[KernelEvent], reader: kernel_log.KernelLogReader, *, is_kernel: bool) -> None:
        if is_kernel or events:
            self.kinds.add("kernel-log")
            self.kernel += kernel_log.with_boots_marked(events)
            if reader.last_at is not None:
                self.stamps.append(reader.last_at)

    def _engine(self, reader: LogReader, *, is_engine: bool) -> None:
        reading = reader.finish()
        if is_engine or reading.events:
            self.kinds.add("engine-log")
            self.events += reading.events
            self.logs.append(reading.state)
            if reading.state.last_at is not None:
                self.stamps.append(reading.state.last_at)

    def _model(self, text: bytes) -> None:
        model = model_config.read(text)
        if model is not None:
            self.kinds.add("model-config")
            self.models.append(model)

    def _without_documents(self, data: bytes, name: str) -> bytes:
        """Take the documents out of *data*, and return it with blank lines in their place."""
        if _LONG_LINE.search(data):
            self._fabric_manager(data, name)
            return data
        rest = bytearray(data)
        for kind in _KINDS:
            if not any(anchor in rest for anchor in kind.anchors) or (
                kind.name == "smi-q" and not _may_hold_report(data)
            ):
                continue
            text = rest.decode("latin-1")  # one character a byte: places in the text are places in the data
            for start, end in itertools.islice(kind.find(text), DOCUMENTS_MAX):
                line = rest.count(b"\n", 0, start) + 1
                if self._document(kind.name, data[start:end].decode("utf-8", "replace"), name, line):
                    self.kinds.add(kind.name)
                    rest[start:end] = data[start:end].translate(_BLANK)
        self._fabric_manager(bytes(rest), name)
        return bytes(rest)

    def _document(self, kind: str, text: str, name: str, line: int) -> bool:
        """Take one document, and return whether its reader found anything in it."""
        if kind in _UNREAD:
            self.unread.append(f"{name}:{line}: what {_UNREAD[kind]} prints is not used")
        elif kind == "smi-refusal":
            self.refusals.append(f"{name}:{line}: {text.strip()}")
        elif kind == "model-config":
            self._model(text.encode())
        elif kind == "collect-env":
            environment = collect_env.read(text)
            self.environments.append(environment)
            if environment.topology is not None:
                self.kinds.add("topo")
        elif kind == "topo":
            matrix = topo_matrix.read(text)
            if matrix is None:
                return False
            self.matrices.append(matrix)
        elif kind == "p2p":
            peers = p2p_matrix.read(text)
            if peers is None:
                return False
            self.p2p.append(peers)
        elif kind in {"dcgm", "dcgm-log"}:
            tests = dcgm.read(text) if kind == "dcgm" else dcgm.read_log(text)
            self.dcgm.append(tests)
            self.complaints += [f"{name}:{line}: DCGM says what no rule judges: {words}" for words in tests.unjudged]
        elif kind == "dcgm-links":
            gpus = dcgm.read_links(text)
            if not gpus:
                return False
            self.listed.append(gpus)
        elif kind == "lspci-links":
            links = lspci.read_links(text)
            if not links:
                return False
            self.pci_links += links
            self.pci += [link.device for link in links if link.device is not None]
        elif kind in _SMI_REPORTS:
            reports = [r for r in _SMI_REPORTS[kind](text) if r.gpus or known(r.stack.driver)]
            if not reports:
                return False
            self.reports += reports
        elif kind == "smi-list":
            self.listed.append(nvidia_smi_list.read(text))
        elif kind == "lspci":
            self.pci += lspci.read(text)
        elif kind == "engine-metrics":
            page = vllm_metrics.read(text, engine=name, at=self.now)
            if page is None:
                return False
            self.metrics.append((name, page))
        elif kind == "fabricmanager-status":
            status = systemctl_status.read(text, name, line)
            self.manager = systemctl_status.with_more(self.manager, status)
        elif kind == "command-line":
            command = command_line.read_shell(text)
            if command is None or not any(word.startswith("-") or "/" in word for word in command.arguments[1:]):
                return False  # a sentence that begins with the words
            self.commands.append(command)
        return True

    def _fabric_manager(self, data: bytes, name: str) -> None:
        if not any(anchor in data for anchor in (b"abricmanager", b"Fabric Manager", b"fabric manager", b"[tid ")):
            return
        lines = [(match.start(), match[0]) for match in _FABRIC_LINE.finditer(data)]
        text = data.decode("latin-1")
        failed = systemctl_status.start_failed(text)
        if not lines and not failed:
            return
        self.kinds.add("fabricmanager")
        messages: list[FabricMessage] = []
        number, counted = 1, 0
        for start, line in lines:
            number += data.count(b"\n", counted, start)
            counted = start
            messages += fabric_manager_log.read(line.decode("utf-8", "replace"), name, first_line=number)
        version = fabric_manager_log.version(text)
        more = FabricManager(
            unit_state="failed" if failed else _NOT_GIVEN,
            running=False if failed else _NOT_GIVEN,
            version=version or _NOT_GIVEN,
            messages=tuple(messages[-FABRIC_MESSAGES_MAX:]),
        )
        self.manager = systemctl_status.with_more(self.manager, more)
        self.stamps += [message.at for message in messages if message.at is not None]

    # What it comes to.

    def visits(self) -> Iterator[Snapshot]:
        """Yield the visits that the evidence amounts to, oldest first; everything but GPU states is in the last."""
        stamps = [
            at
            for at in (*self.stamps, *(r.at for r in self.reports if r.at is not None))
            if at <= self.now + DAY_SECONDS
        ]
        at = max(stamps, default=self.now)
        times = sorted({report.at for report in self.reports if report.at is not None and report.at <= at})
        for time in times[:-1]:
            gpus = self._gpus(time)
            yield Snapshot(
                at=time,
                seen=(Source.NVML,),
                unseen=self._unseen({Source.NVML}),
                gpus=gpus,
                pairs=self._pairs(gpus),
                stack=self._stack(),
            )
        yield self._last_visit(at, self._gpus(times[-1] if times else None))

    def _last_visit(self, at: float, gpus: tuple[Gpu, ...]) -> Snapshot:
        engines = self._engines(gpus)
        host = self._host()
        seen = self._seen()
        return Snapshot(
            at=at,
            seen=tuple(source for source in OF_A_NODE if source in seen),
            unseen=self._unseen(seen),
            gpus=gpus,
            pairs=self._pairs(gpus),
            kernel=tuple(self.kernel),
            engines=engines,
            engine_events=tuple(self.events),
            logs=tuple(self.logs),
            metrics=self._metrics(at, engines),
            stack=self._stack(),
            fabric_manager=self.manager,
            host=host,
        )

    def _gpus(self, time: float | None) -> tuple[Gpu, ...]:
        """Return the GPUs as all files together show them; of several states the one at *time*, the last of no time."""
        dated = [report.gpus for report in self.reports if report.at == time]
        undated = [report.gpus for report in reversed(self.reports) if report.at is None and time is not None]
        sources = (*reversed(dated), *undated, *self.listed, *(environment.gpus for environment in self.environments))
        merged: dict[int, Gpu] = {}
        for gpus in sources:
            for gpu in gpus:
                known_so_far = merged.get(gpu.index)
                merged[gpu.index] = gpu if known_so_far is None else _joined_gpu(known_so_far, gpu)
        for tests in self.dcgm:
            for gpu in tests.gpus:
                merged[gpu.index] = _joined_gpu(merged[gpu.index], gpu) if gpu.index in merged else gpu
        for index, link in enumerate(self.pci_links if not merged else ()):
            merged[index] = link.gpu(index)
        linked = {link.address: link.pcie for link in self.pci_links}
        for index, gpu in merged.items():
            if known(gpu.pci_address) and gpu.pci_address in linked:
                more = linked[gpu.pci_address]
                pcie = gpu.pcie if known(gpu.pcie.width) else msgspec.structs.replace(gpu.pcie, told_by=more.told_by)
                merged[index] = msgspec.structs.replace(gpu, pcie=_joined(pcie, more))
        for matrix in self._all_matrices():
            for index in matrix.gpus:
                near = Gpu(uuid=f"index:{index}", index=index, numa_node=matrix.numa_node(index))
                merged[index] = _joined_gpu(merged[index], near) if index in merged else near
        return _with_device_ids(tuple(merged[index] for index in sorted(merged)), self.pci)

    def _all_matrices(self) -> Iterator[topo_matrix.TopoMatrix]:
        yield from self.matrices
        yield from (e.topology for e in self.environments if e.topology is not None)

    def _pairs(self, gpus: tuple[Gpu, ...]) -> tuple[GpuPair, ...]:
        uuids = {gpu.index: gpu.uuid for gpu in gpus}
        pairs: dict[tuple[str, str], GpuPair] = {}
        for matrix in self._all_matrices():
            for pair in matrix.pairs(uuids):
                pairs.setdefault((pair.first, pair.second), pair)
        for peers in self.p2p:
            for pair in peers.pairs(uuids):
                both = (pair.first, pair.second)
                pairs[both] = _joined(pairs[both], pair) if both in pairs else pair
        return tuple(pairs.values())

    def _stack(self) -> Stack:
        stack = Stack()
        for more in (*(r.stack for r in self.reports), *(e.stack for e in self.environments)):
            stack = _joined(stack, more)
        return stack

    def _host(self) -> Host:
        loaded = [
            version[1]
            for event in self.kernel
            if isinstance(event, NvidiaMessage) and event.kind == "module-loaded" and not event.before_boot
            for version in _MODULE_VERSION.finditer(event.text)
        ]
        told = (*(r.virtual_machine for r in self.reports), *(e.virtual_machine for e in self.environments))
        machines = [virtual for virtual in told if known(virtual)]
        return Host(
            pci_devices=tuple(self.pci) if self.pci else _NOT_GIVEN,
            driver_module=loaded[-1] if loaded else _NOT_GIVEN,
            virtual_machine=machines[-1] if machines else _NOT_GIVEN,
        )

    def _engines(self, gpus: tuple[Gpu, ...]) -> tuple[Engine, ...]:
        """Return the engines that a command line or a collect-env speaks of.

        They have no process: their pids are 0, 1, … A command that stands twice for one port counts as it stands last.
        """
        installed = next((e for e in reversed(self.environments) if known(e.engine_stack.engine)), None)
        by_port = {(command.kind, or_none(command.flags.port)): command for command in self.commands}
        spoken_of = installed is not None or (bool(self.models) and len(self.logs) == 1)
        commands: list[command_line.CommandLine | None] = [*by_port.values()] or ([None] if spoken_of else [])
        only = len(commands) == 1
        engines: list[Engine] = []
        for pid, command in enumerate(commands):
            kind = command.kind if command else "vllm"
            stack = installed.engine_stack if installed and kind == "vllm" else EngineStack()
            variables = {**(installed.environment if installed else {}), **(command.environment if command else {})}
            environment = environment_without_secrets(variables)
            engines.append(
                Engine(
                    pid=pid,
                    started_at=0.0,
                    kind=kind,
                    command_line=command_line_without_secrets(command.arguments) if command else (),
                    environment=environment,
                    flags=command.flags if command else self._flags_by_log(),
                    visible_gpus=_visible(environment, gpus),
                    stack=stack,
                    model=self.models[-1] if self.models else ModelConfig(),
                    log=self.logs[0].log if only and self.logs else _NOT_GIVEN,
                )
            )
        return tuple(engines)

    def _flags_by_log(self) -> EngineFlags:
        """Return what the only log says that its engine was asked for; where nothing tells, nothing."""
        if len(self.logs) != 1:
            return EngineFlags()
        asked: dict[str, object] = {}
        for signal in (
            "engine-config",
            "non-default-args",
        ):  # the last one counts: what was asked for, in its own words
            for event in self.events:
                if event.signal == signal:
                    asked |= {_FIELDS_OF_LOG.get(name, name): value for name, value in event.facts.items()}
        taken = {
            field: value
            for field, kind in _FLAGS_OF_LOG.items()
            if (value := asked.get(field)) not in (None, "None") and isinstance(value, kind)
        }
        return msgspec.convert(taken, EngineFlags)

    def _metrics(self, at: float, engines: tuple[Engine, ...]) -> tuple[EngineMetrics, ...]:
        """Return the last page of each model: nothing tells when the earlier ones were fetched, so they give no rates."""
        pages = {or_none(page.model): (name, page) for name, page in self.metrics}
        whose = (
            engines[0].id if len(engines) == 1 else self.logs[0].log if len(self.logs) == 1 and not engines else None
        )
        only = whose if len(pages) == 1 else None
        return tuple(msgspec.structs.replace(page, at=at, engine=only or name) for name, page in pages.values())

    def _seen(self) -> set[Source]:
        seen = {source for kind, source in _SOURCES.items() if kind in self.kinds}
        if any(known(gpu.name) for report in self.reports for gpu in report.gpus):
            seen.add(Source.NVML)
        if any(known(value) for value in (self._stack().driver, self._stack().cuda_driver)):
            seen.add(Source.STACK)
        if self._unjudged():  # the silence of the rules would be taken for health
            seen.discard(Source.NVML)
        return seen

    def _unjudged(self) -> str:
        """Return what the evidence says of the GPUs and no rule can judge; empty where there is none."""
        if self.complaints:
            return self.complaints[0]
        lists = (*self.listed, *(report.gpus for report in self.reports), *(e.gpus for e in self.environments))
        named = any(known(gpu.name) for gpus in lists for gpu in gpus)
        refused = [pair for matrix in self.p2p for pair in matrix.refused]
        if refused and not named:
            first, second = refused[0]
            return f"GPU {first} and GPU {second} may not reach each other, and nothing tells which GPUs they are"
        return ""

    def _unseen(self, seen: set[Source]) -> tuple[Unseen, ...]:
        unseen = [Unseen(source, self._why_unseen(source)) for source in OF_A_NODE if source not in seen]
        if Source.NVML in seen and not self.kinds & {"smi-q", "smi-xml"}:
            unseen.append(Unseen(Source.NVML, Absent(Why.NOT_GIVEN, "add nvidia-smi -q"), "most states of the GPUs"))
        if Source.HOST in seen:
            unseen.append(Unseen(Source.HOST, _NOT_GIVEN, "all but the PCI devices"))
        unseen += [Unseen(Source.NVML, Absent(Why.NOT_ASKED, detail), "a file") for detail in self.unread]
        return tuple(unseen)

    def _why_unseen(self, source: Source) -> Absent:
        if source is Source.NVML and (words := self._unjudged()):
            return Absent(Why.FAILED, words)
        if source is Source.NVML and self.refusals:
            return Absent(Why.FAILED, self.refusals[-1])
        if source is Source.NVML and self.unread and self.kinds <= _UNREAD.keys() | {"smi-list"}:
            return Absent(Why.NOT_ASKED, self.unread[0])
        if source is Source.NVML and "topo" in self.kinds:
            return Absent(Why.NOT_GIVEN, "add the output of nvidia-smi -q")
        return Absent(Why.NOT_GIVEN, _REMEDIES[source])


_NOT_GIVEN = Absent(Why.NOT_GIVEN)

_SOURCES = {
    "kernel-log": Source.KERNEL_LOG,
    "engine-log": Source.ENGINE_LOG,
    "engine-metrics": Source.ENGINE_METRICS,
    "model-config": Source.MODEL,
    "fabricmanager": Source.FABRIC_MANAGER,
    "fabricmanager-status": Source.FABRIC_MANAGER,
    "lspci": Source.HOST,
    "lspci-links": Source.HOST,
}
"""Kind of document → the source that it shows.

Names, links and topology alone don't show NVML: the silence of a rule about heat would say nothing.
"""

_REMEDIES = {
    Source.NVML: "add the output of nvidia-smi -q and nvidia-smi topo -m",
    Source.KERNEL_LOG: "add the output of dmesg -T or journalctl -k",
    Source.PROCESSES: "a list of processes is not among the evidence",
    Source.ENGINE_LOG: "add the engine's log",
    Source.ENGINE_METRICS: "add the engine's /metrics page",
    Source.STACK: "add the output of vllm collect-env",
    Source.MODEL: "add the model's config.json",
    Source.FABRIC_MANAGER: "add /var/log/fabricmanager.log or systemctl status nvidia-fabricmanager",
    Source.HOST: "add the output of lspci -nn",
}

_FLAGS_OF_LOG = {
    "model": str,
    "tensor_parallel_size": int,
    "pipeline_parallel_size": int,
    "data_parallel_size": int,
    "quantization": str,
    "dtype": str,
    "kv_cache_dtype": str,
    "max_model_len": int,
    "max_num_seqs": int,
    "gpu_memory_utilization": float,
}
"""What an engine's log tells of its flags → the type of the fact."""

_FIELDS_OF_LOG = {"max_seq_len": "max_model_len"}

_MODULE_VERSION = re.compile(r"Kernel Module(?: for \S+)? +(\d+(?:\.\d+)+)")


def _last_lives(path: Path) -> int:
    """Return where the last lives of an engine begin in its log; 0 where all of it is to be read, as from a pipe."""
    if not path.is_file() or (begin := path.stat().st_size - LAST_LIVES_BYTES) <= 0:
        return 0
    with path.open("rb") as file:
        file.seek(begin)
        end = file.read(LAST_LIVES_BYTES)
    line_end = end.find(b"\n")
    starts = max(end.count(words) for words in _LIFE_BEGINS)
    return begin + line_end + 1 if line_end >= 0 and starts >= LAST_LIVES else 0


def _line_ends(file: BinaryIO, begin: int, end: int) -> int:
    """Count the line ends between two places of a file, and leave it at the second."""
    file.seek(begin)
    count = 0
    while begin < end and (data := file.read(min(CHUNK_BYTES, end - begin))):
        count += data.count(b"\n")
        begin += len(data)
    return count


def _is_engine_log(data: bytes, *, is_kernel: bool) -> bool:
    """Whether the text is an engine's log: it holds lines that look so, and the log's reader can take one of them apart."""
    data = spelled_out(data)
    looks = itertools.islice(_ENGINE_RECORD.finditer(data), _SAMPLE_LINES)
    if any(is_record(_line_around(data, match.start())) for match in looks):
        return True
    return not is_kernel and _ENGINE_TRACE.search(data) is not None


def _line_around(data: bytes, position: int) -> bytes:
    start = data.rfind(b"\n", 0, position) + 1
    end = data.find(b"\n", position)
    return data[start : end if end >= 0 else len(data)]


_TAG = re.compile(rb"(?:[a-z][\w.]*-[\w.-]{1,60} )(?:[a-z][\w.-]{1,60} )?")
"""Pod and container, as some tools put them before each line of a log."""


def _untagged(data: bytes) -> bytes:
    """Return the text without the names that all its lines begin with."""
    tag = _TAG.match(data)
    if tag is None or data.count(b"\n" + tag[0]) + 1 < sum(1 for line in data.splitlines() if line.strip()):
        return data
    return re.sub(rb"^" + re.escape(tag[0]), b"", data, flags=re.MULTILINE)


def _blanked(match: re.Match[bytes]) -> bytes:
    return match[0].translate(_BLANK)


_BLANK = bytes(10 if byte == 10 else 32 for byte in range(256))
"""Keeps the lines, and nothing in them."""


def _may_hold_report(data: bytes) -> bool:
    return b"NVSMI LOG" in data or b"device handle for" in data or len(data) <= PART_MAX_BYTES


def _bounded(events: list[KernelEvent]) -> list[KernelEvent]:
    """Return the events, of too many those of the beginning and of the end: the cause, and what is now."""
    half = KERNEL_EVENTS_MAX // 2
    return events if len(events) <= KERNEL_EVENTS_MAX else events[:half] + events[-half:]


S = TypeVar("S", bound=msgspec.Struct)

_UNTOLD = {Why.NOT_ASKED, Why.NOT_GIVEN}


def _joined(mine: S, more: S) -> S:
    """Return *mine* with what it does not tell and *more* does."""
    changes: dict[str, object] = {}
    for field in mine.__struct_fields__:
        value, other = cast("object", getattr(mine, field)), cast("object", getattr(more, field))
        if isinstance(value, Absent):
            if value.why in _UNTOLD and not (isinstance(other, Absent) and other.why in _UNTOLD):
                changes[field] = other
        elif isinstance(value, msgspec.Struct) and type(value) is type(other):
            changes[field] = _joined(value, cast("msgspec.Struct", other))
    return msgspec.structs.replace(mine, **changes)


def _joined_gpu(mine: Gpu, more: Gpu) -> Gpu:
    joined = _joined(mine, more)
    changes: dict[str, object] = {}
    if mine.uuid.startswith("index:"):
        changes["uuid"] = more.uuid
    if known(mine.links) and known(more.links):
        changes["links"] = _joined_links(mine.links, more.links)
    if known(mine.mig.devices) and known(more.mig.devices) and len(mine.mig.devices) == len(more.mig.devices):
        devices = tuple(_joined(one, other) for one, other in zip(mine.mig.devices, more.mig.devices, strict=True))
        named = tuple(
            msgspec.structs.replace(one, uuid=other.uuid) if one.uuid.startswith("index:") else one
            for one, other in zip(devices, more.mig.devices, strict=True)
        )
        changes["mig"] = msgspec.structs.replace(joined.mig, devices=named)
    return msgspec.structs.replace(joined, **changes)


def _joined_links(mine: tuple[NvLink, ...], more: tuple[NvLink, ...]) -> tuple[NvLink, ...]:
    others = {link.link: link for link in more}
    joined = {link.link: _joined(link, others[link.link]) if link.link in others else link for link in mine}
    return tuple(link for _, link in sorted({**others, **joined}.items()))


def _with_device_ids(gpus: tuple[Gpu, ...], devices: Sequence[PciDevice]) -> tuple[Gpu, ...]:
    """Return the GPUs with their device ids as lspci tells them: by address, or where all GPUs there are alike."""
    by_address = {device.address: device.device_id for device in devices if device.kind == "gpu"}
    ids = set(by_address.values())
    alike = ids.pop() if len(ids) == 1 and len(by_address) == len(gpus) else None
    whole: list[Gpu] = []
    for gpu in gpus:
        own = by_address.get(gpu.pci_address) if known(gpu.pci_address) else alike
        whole.append(msgspec.structs.replace(gpu, pci_device_id=own) if own and not known(gpu.pci_device_id) else gpu)
    return tuple(whole)


def _visible(environment: Mapping[str, str], gpus: tuple[Gpu, ...]) -> Maybe[tuple[str, ...]]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves."""
    wanted = environment.get("CUDA_VISIBLE_DEVICES")
    if wanted is None or not gpus:
        return _NOT_GIVEN
    uuids = {str(gpu.index): gpu.uuid for gpu in gpus}
    visible: list[str] = []
    for name in (part.strip() for part in wanted.split(",")):
        uuid = uuids.get(name) or next(
            (u for u in uuids.values() if name and u.startswith(name) and not name.isdigit()), None
        )
        if uuid is None:  # as CUDA does: the first name that is none ends the list
            break
        visible.append(uuid)
    return tuple(visible)
