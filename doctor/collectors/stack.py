"""The node's driver, kernel and system, and the versions in each engine's own environment, read from files."""

from __future__ import annotations

import contextlib
import platform
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from doctor.collectors import files
from doctor.collectors.collector import Reading, Visit
from doctor.collectors.host import driver_module
from doctor.snapshot import Absent, Engine, EngineStack, Maybe, Source, Stack, Unseen, Why

DISTRIBUTIONS = {"vllm": "vllm", "sglang": "sglang", "tensorrt-llm": "tensorrt_llm", "tgi": "text_generation_server"}
"""Name of each engine's distribution, by `Engine.kind`."""

COMPAT_FOLDERS = ("/usr/local/cuda/compat", "/usr/local/cuda/compat/lib.real")
"""Where the package cuda-compat puts its libcuda, and where NVIDIA's own images move it (the latter unverified)."""

_LIBCUDA = re.compile(r"^libcuda\.so\.(\d{3}\.\d+(?:\.\d+)?)$")
_DIST_INFO = re.compile(r"^(?P<name>[A-Za-z0-9_.]+)-(?P<version>[^-]+)\.dist-info$")
_TORCH_VERSION = re.compile(r"""^__version__\s*(?::[^=]+)?=\s*['"]([^'"]+)['"]""", re.MULTILINE)
_TORCH_CUDA = re.compile(r"""^cuda\s*(?::[^=]+)?=\s*['"]([^'"]+)['"]""", re.MULTILINE)
_OS_NAME = re.compile(r"""^PRETTY_NAME=["']?([^"'\n]+)""", re.MULTILINE)
_PYVENV_VERSION = re.compile(r"^version(?:_info)?\s*=\s*(\d+\.\d+\.\d+)", re.MULTILINE)


class Versions:
    """Versions of the node's stack and of each engine's environment. Nothing of an engine is run."""

    source = Source.STACK
    deadline_seconds = 3.0
    after_engines = True

    def __init__(self, root: Path = Path("/")) -> None:
        self.root = root
        self._known: dict[str, EngineStack] = {}
        """By `Engine.id`: an environment does not change under a running engine."""

    def collect(self, visit: Visit) -> Reading:
        """Read the versions; a part that can't be read says why in its own field."""
        stack = Stack(driver=driver_module(self.root), kernel=_kernel(self.root), os=_os(self.root))
        unseen: list[Unseen] = []
        of_engines: dict[str, dict[str, Any]] = {}
        for engine in visit.engines:
            found = self._known.get(engine.id) or _engine_stack(self.root, engine)
            if isinstance(found, Absent):
                unseen.append(Unseen(self.source, found, f"environment of engine {engine.pid}"))
                of_engines[engine.id] = {
                    "stack": EngineStack(
                        python=found, engine=found, torch=found, torch_cuda=found, nccl=found, cuda_compat=found
                    )
                }
            else:
                self._known[engine.id] = found
                of_engines[engine.id] = {"stack": found}
        return Reading(fields={"stack": stack}, engine_fields=of_engines, unseen=tuple(unseen))

    def close(self) -> None:
        """Nothing is held open."""


def _kernel(root: Path) -> Maybe[str]:
    release = files.maybe(root / "proc/sys/kernel/osrelease", str)
    return platform.release() if isinstance(release, Absent) and root == Path("/") else release


def _os(root: Path) -> Maybe[str]:
    for name in ("etc/os-release", "usr/lib/os-release"):
        try:
            match = _OS_NAME.search(files.text_of(files.within(root, name)))
        except OSError:
            continue
        if match:
            return match[1].strip()
    return Absent(Why.NOT_PRESENT, "no os-release")


def _engine_stack(root: Path, engine: Engine) -> EngineStack | Absent:
    inside = root / f"proc/{engine.pid}/root"
    try:
        next(inside.iterdir(), None)
        sites = list(_sites(root, engine))
    except OSError as e:
        return files.why_not(e, "the engine's files")
    distribution = DISTRIBUTIONS.get(engine.kind, "")
    found: dict[str, str] = {}
    for site in sites:
        for name, version in _of_torch(inside, site):  # before the distribution's, which lacks the build suffix
            found.setdefault(name, version)
        for name, version in _distributions(site):
            if name == distribution:
                found.setdefault("engine", version)
            elif name == "torch":
                found.setdefault("torch", version)
            elif name.startswith("nvidia_nccl_cu"):
                found.setdefault("nccl", version)
    if not found:
        return Absent(Why.NOT_PRESENT, "no Python environment with its packages found from its command line")
    no_such = Absent(Why.NOT_PRESENT, "not among the installed distributions")
    return EngineStack(
        python=next((version for site in sites if (version := _python(site))), no_such),
        cuda_compat=_cuda_compat(inside),
        **{name: found.get(name, no_such) for name in ("engine", "torch", "torch_cuda", "nccl")},
    )


def _cuda_compat(inside: Path) -> Maybe[str]:
    """Return the version of the forward-compatibility libcuda that stands where its package puts it."""
    for name in COMPAT_FOLDERS:
        try:
            entries = list(files.within(inside, name).iterdir())
        except OSError as e:
            if isinstance(e, PermissionError):
                return files.why_not(e, name)
            continue
        versions = [match[1] for entry in entries if (match := _LIBCUDA.match(entry.name))]
        if versions:
            return max(versions)
    return Absent(Why.NOT_PRESENT, f"no libcuda in {COMPAT_FOLDERS[0]}")


def _sites(root: Path, engine: Engine) -> Iterator[Path]:
    """Yield the folders of installed packages that the engine's interpreter looks into, its own environment first."""
    inside = root / f"proc/{engine.pid}/root"
    programs = [argument for argument in engine.command_line[:2] if argument.startswith("/")]
    with contextlib.suppress(OSError):  # a process that is not ours: its command line has to do
        programs.append(str((root / f"proc/{engine.pid}/exe").readlink()).removesuffix(" (deleted)"))
    prefixes = [str(PurePosixPath(program).parent.parent) for program in programs]
    seen: set[Path] = set()
    for prefix in (*prefixes, "/usr/local", "/usr"):
        for lib in ("lib", "lib64"):
            try:
                versions = sorted(files.within(inside, f"{prefix}/{lib}").glob("python3*"), reverse=True)
            except OSError:
                continue
            for folder in versions:
                for name in ("site-packages", "dist-packages"):
                    site = folder / name
                    if site not in seen and site.is_dir():
                        seen.add(site)
                        yield site
    debian = files.within(inside, "/usr/lib/python3/dist-packages")
    if debian.is_dir():
        yield debian


def _distributions(site: Path) -> Iterator[tuple[str, str]]:
    """Yield (name, version) of each installed distribution; its folder's name says both."""
    try:
        entries = sorted(site.iterdir())
    except OSError:
        return
    for entry in entries:
        match = _DIST_INFO.match(entry.name)
        if match:
            yield match["name"].lower().replace(".", "_"), match["version"]


def _of_torch(inside: Path, site: Path) -> Iterator[tuple[str, str]]:
    """Yield what `torch/version.py` says, read as text: the version with its build suffix, and its CUDA."""
    try:
        text = files.text_of(files.within(inside, f"/{(site / 'torch/version.py').relative_to(inside)}"))
    except OSError:
        return
    for name, pattern in (("torch", _TORCH_VERSION), ("torch_cuda", _TORCH_CUDA)):
        match = pattern.search(text)
        if match:
            yield name, match[1]


def _python(site: Path) -> str | None:
    """Return the interpreter's version: exact in a virtual environment, else as its folder is named."""
    try:
        text = files.text_of(site.parent.parent.parent / "pyvenv.cfg")
    except OSError:
        text = ""
    match = _PYVENV_VERSION.search(text)
    if match:
        return match[1]
    name = site.parent.name.removeprefix("python")
    return name if "." in name else None
