"""Driver, CUDA, PyTorch and the engine do not go together."""

from __future__ import annotations

import re
from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Engine, EngineEvent, Gpu, NvidiaMessage, Source, known
from doctor.symptoms.engine_log import EngineLog, Incident, engine_logs, incidents
from doctor.symptoms.xids import of_this_boot
from rules.tables.stacks import (
    CudaRelease,
    EngineRelease,
    admits_python,
    cuda_release,
    engine_release,
    numbers,
    own_release,
)

WORDS = {
    "driver-mismatch": "the user-space CUDA library and the loaded kernel module do not go together (error 803): most often an "
    "image's CUDA compatibility library stands before the host's newer driver in the library path",
    "compat-unsupported": "CUDA's forward-compatibility library was tried on hardware that does not support it (error 804): "
    "it works on data-center GPUs only",
    "driver-too-old": "the driver is older than the CUDA that PyTorch was built with",
    "no-kernel-image": "the binaries hold no code for this GPU's architecture",
    "invalid-kernel-image": "the driver can't load a kernel that was compiled by a newer toolkit (or for another GPU)",
    "unsupported-toolchain": "the driver is too old for PTX that was compiled by a newer toolkit",
    "old-gpu": "a kernel library does not support this GPU's generation",
    "library-not-found": "NVIDIA's libraries are not there: no driver, or a container that was started without GPUs",
    "no-driver": "there is no NVIDIA driver where the engine runs",
    "driver-library-mismatch": "NVIDIA's library and the loaded kernel module have different versions: most often the driver was "
    "upgraded and the old module is still loaded",
    "not-loaded": "NVIDIA's kernel module is not loaded",
    "undefined-symbol": "a compiled extension was built against another version of PyTorch or CUDA",
    "missing-library": "a CUDA library that the engine was linked with is not installed",
    "old-library": "a system library is older than the one that the engine was built with",
    "assembler": "Triton's or CUDA's assembler (ptxas) does not know this GPU's architecture, or what the kernel needs of it",
    "nccl-driver-too-old": "the driver is older than NCCL's minimum",
}
"""By the kind of the signal, or its name where it has none."""

_VERSIONS = re.compile(r"has the version ([\d.]+\d),? .*module has\s+the version ([\d.]+\d)")
"""The kernel's sentence: the client's version, the module's."""

SIGNALS = ("cuda-error", "nvml-error", "library-mismatch", "nccl-driver-too-old")


@rule(
    "stack-mismatch",
    "Driver, CUDA, PyTorch and the engine do not go together",
    severity=Severity.CRITICAL,
    needs=(Source.STACK,),
    explains=("engine-crashed", "launch-refused", "fp8-not-engaged", "driver-unresponsive", "worker-killed"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Take the engine's own error lines; else compare the versions with the table, unless the engine serves with them."""
    told = list(_told_by_log(history))
    yield from told
    if not told:
        yield from _module_mismatch(history)
        yield from _not_reached(history)
        yield from _by_table(history)


def _told_by_log(history: History) -> Iterator[Finding]:
    for log, incident in incidents(history):
        cause = incident.cause
        kind = str(cause.facts.get("kind", cause.signal))
        if cause.signal in SIGNALS and kind in WORDS:
            yield _error(history, log, incident, kind)


def _error(history: History, log: EngineLog, incident: Incident, kind: str) -> Finding:
    cause = incident.cause
    versions = _versions(history, log)
    facts = {"log": log.log}
    if isinstance(history.latest.stack.driver, str):
        facts["driver-version"] = history.latest.stack.driver
    return Finding(
        summary=f"The engine did not start: {WORDS[kind]}{_found(cause)}" + (f" ({versions})" if versions else ""),
        evidence=(
            Evidence(Source.ENGINE_LOG.value, cause.where, cause.text),
            *((Evidence(Source.STACK.value, "versions", versions),) if versions else ()),
        ),
        subject=Subject(engine=log.engine),
        since=incident.at,
        facts=facts,
    )


def _found(cause: EngineEvent) -> str:
    """Say which CUDA the driver serves, from torch's number (12080 is 12.8)."""
    found = cause.facts.get("found")
    return f"; the driver serves CUDA {found // 1000}.{found % 1000 // 10}" if isinstance(found, int) else ""


def _versions(history: History, log: EngineLog) -> str:
    stack = history.latest.stack
    engine = next((e for e in history.latest.engines if e.id == log.engine), None)
    told = {
        "driver": stack.driver if known(stack.driver) else "",
        "vLLM": log.fact("version"),
        "PyTorch": engine.stack.torch if engine is not None and known(engine.stack.torch) else "",
    }
    return ", ".join(f"{name} {version}" for name, version in told.items() if version)


def _module_mismatch(history: History) -> Iterator[Finding]:
    """Compare the kernel module's version with the library's, and take the kernel's own word for it."""
    latest = history.latest
    module, library = latest.host.driver_module, latest.stack.nvml
    texts = [e for e in of_this_boot(history) if isinstance(e, NvidiaMessage) and e.kind == "api-mismatch"]
    # NVML's version carries the driver's: 12.535.261.03 belongs to 535.261.03.
    of_library = library.partition(".")[2] if known(library) else ""
    differ = known(module) and len(numbers(of_library)) >= 2 and numbers(of_library) != numbers(module)
    why = latest.why_unseen(Source.NVML)
    said = why is not None and ("version mismatch" in why.detail)
    refused = bool(texts) and Source.NVML not in latest.seen  # where NVML answers, it was a client of its own
    if not (differ or said or refused):
        return
    if not (differ or said) and (versions := _VERSIONS.search(texts[-1].text)):
        of_library, module = versions[1], versions[2]
    proof = [Evidence(Source.KERNEL_LOG.value, e.where, e.text) for e in texts[-1:]]
    if differ:
        proof.insert(
            0, Evidence(Source.STACK.value, "NVML and kernel module", f"library {of_library}, module {module}")
        )
    if said and why is not None:
        proof.append(Evidence(Source.NVML.value, "nvmlInit", str(why)))
    yield Finding(
        summary=f"NVIDIA's library ({of_library or 'version unknown'}) and the loaded kernel module "
        f"({module if known(module) else 'version unknown'}) differ: nothing new can use the GPUs until the module is loaded anew",
        evidence=tuple(proof),
        confidence=Confidence.HIGH,
    )


def _not_reached(history: History) -> Iterator[Finding]:
    """Take nvidia-smi's word that it finds no driver to talk to; where a GPU was seen, that was at another time."""
    why = history.latest.why_unseen(Source.NVML)
    if why is None or history.latest.gpus or _UNREACHED not in why.detail:
        return
    yield Finding(
        summary="nvidia-smi can't reach NVIDIA's driver: its kernel module is not loaded, most often because it was not built for the "
        "running kernel, or another driver (nouveau) holds the GPUs",
        evidence=(Evidence(Source.NVML.value, "nvidia-smi", why.detail),),
        confidence=Confidence.MEDIUM,
    )


_UNREACHED = "couldn't communicate with the NVIDIA driver"


def _by_table(history: History) -> Iterator[Finding]:
    serving = {log.engine for log in engine_logs(history) if log.serving} | {m.engine for m in history.latest.metrics}
    for engine in history.latest.engines:
        if engine.kind != "vllm" or engine.id in serving:
            continue  # it serves with these versions: forward compatibility or a build of its own
        release = engine_release(engine.stack.engine) if known(engine.stack.engine) else None
        cuda = _cuda(engine, release)
        if cuda is not None:
            yield from _driver_too_old(history, engine, cuda)
        if release is not None:
            yield from _wrong_capability(history, engine, release)
        pinned = own_release(engine.stack.engine) if known(engine.stack.engine) else None
        if pinned is not None:
            yield from _not_as_pinned(engine, pinned)


def _cuda(engine: Engine, release: EngineRelease | None) -> CudaRelease | None:
    """Return the CUDA that this engine's PyTorch was built with: read from its files, else the release's own."""
    if known(engine.stack.torch_cuda):
        return cuda_release(engine.stack.torch_cuda)
    return cuda_release(release.cuda) if release is not None else None


def _driver_too_old(history: History, engine: Engine, cuda: CudaRelease) -> Iterator[Finding]:
    latest = history.latest
    driver = latest.host.driver_module if known(latest.host.driver_module) else latest.stack.driver
    if not known(driver) or not numbers(driver) or numbers(driver) >= numbers(cuda.driver_min):
        return
    if engine.environment.get("VLLM_ENABLE_CUDA_COMPATIBILITY", "0") not in ("", "0"):
        return
    compat = engine.stack.cuda_compat
    carries = known(compat) and numbers(compat) >= numbers(cuda.driver_min)
    consumer = _consumer_gpus(history, engine)
    if carries and not consumer:
        return  # forward compatibility: whether it is found first, the engine's own error tells
    but = f"; CUDA's compatibility library {compat} does not work on {consumer[0]}" if carries else ""
    yield Finding(
        summary=f"Driver {driver} is older than {cuda.driver_min}, which PyTorch's CUDA {cuda.version} needs{but}",
        evidence=(
            Evidence(Source.STACK.value, "driver", driver),
            Evidence(
                Source.STACK.value, f"environment of engine {engine.pid}", f"PyTorch built with CUDA {cuda.version}"
            ),
        ),
        confidence=Confidence.MEDIUM,
        subject=Subject(engine=engine.id, pids=(engine.pid,)),
        facts={"driver-version": driver, "driver-min": cuda.driver_min},
    )


def _consumer_gpus(history: History, engine: Engine) -> list[str]:
    """Return the names of its GPUs on which forward compatibility is not supported (NVIDIA, CUDA compatibility)."""
    mine = engine.visible_gpus
    gpus = [gpu for gpu in history.latest.gpus if not known(mine) or gpu.uuid in mine]
    return [gpu.name for gpu in gpus if known(gpu.name) and " GeForce " in gpu.name]


def _not_as_pinned(engine: Engine, release: EngineRelease) -> Iterator[Finding]:
    """Compare PyTorch, NCCL and Python with what exactly this release was built against; builds of one's own are not asked."""
    stack = engine.stack
    torch = stack.torch.partition("+")[0] if known(stack.torch) else release.torch
    wrong: list[tuple[str, str]] = []
    if numbers(torch)[:2] != numbers(release.torch)[:2] and re.fullmatch(r"[\d.]+", torch):
        wrong.append((f"PyTorch {torch}", f"is built against {release.torch}"))
    if known(stack.nccl) and numbers(stack.nccl)[:2] < numbers(release.nccl)[:2]:
        wrong.append((f"NCCL {stack.nccl}", f"comes with {release.nccl}, and an older one lacks what it calls"))
    if known(stack.python) and not admits_python(release.python, stack.python):
        wrong.append((f"Python {stack.python}", f"needs Python {release.python}"))
    if wrong:
        yield Finding(
            summary=f"{wrong[0][0]} is installed, and vLLM {release.version} {wrong[0][1]}",
            evidence=tuple(
                Evidence(Source.STACK.value, f"environment of engine {engine.pid}", f"{found}; vLLM {needs}")
                for found, needs in wrong
            ),
            confidence=Confidence.LOW,
            severity=Severity.WARNING,
            subject=Subject(engine=engine.id, pids=(engine.pid,)),
        )


def _wrong_capability(history: History, engine: Engine, release: EngineRelease) -> Iterator[Finding]:
    floor = numbers(release.capability_min)
    newest = max((numbers(each) for each in release.architectures), default=(999, 0))
    for gpu in history.latest.gpus:
        ours = not known(engine.visible_gpus) or gpu.uuid in engine.visible_gpus
        if not ours or not known(gpu.compute_capability):
            continue
        if gpu.compute_capability[0] > newest[0]:
            yield _too_new(gpu, engine, release)
            return
        if gpu.compute_capability < floor:
            yield Finding(
                summary=f"GPU {gpu.index} has compute capability {_capability(gpu)}; vLLM {release.version} is built for "
                f"{release.capability_min} and newer",
                evidence=_card_and_release(gpu, engine, release),
                subject=Subject(engine=engine.id, gpus=(gpu.uuid,)),
            )
            return


def _too_new(gpu: Gpu, engine: Engine, release: EngineRelease) -> Finding:
    return Finding(
        summary=f"GPU {gpu.index} has compute capability {_capability(gpu)}, newer than any that vLLM {release.version} is compiled for "
        f"(up to {release.architectures[-1]})",
        evidence=_card_and_release(gpu, engine, release),
        confidence=Confidence.MEDIUM,
        subject=Subject(engine=engine.id, gpus=(gpu.uuid,)),
    )


def _card_and_release(gpu: Gpu, engine: Engine, release: EngineRelease) -> tuple[Evidence, ...]:
    return (
        Evidence(Source.NVML.value, f"GPU {gpu.index}: compute capability", _capability(gpu)),
        Evidence(Source.STACK.value, f"environment of engine {engine.pid}", f"vLLM {release.version}"),
    )


def _capability(gpu: Gpu) -> str:
    return ".".join(map(str, gpu.compute_capability)) if known(gpu.compute_capability) else ""
