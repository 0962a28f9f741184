"""The checkpoint's quantization is not what the flag says, or not what this GPU or engine can run."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Absent, Source, Why, known, or_none
from doctor.symptoms.refusals import Reason, Refusal, is_tile, refused_for
from doctor.symptoms.served import Served, unexplained

WORDS = {
    "quantization-mismatch": "the checkpoint's quantization is not what the command line asks for",
    "quantization-capability": "this quantization needs a newer GPU",
}
FAMILIES = {
    "awq": frozenset({"awq", "awq_marlin", "moe_wna16"}),
    "gptq": frozenset({"gptq", "gptq_marlin", "marlin", "gptq_bitblas", "moe_wna16"}),
    "fp8": frozenset({"fp8"}),
    "compressed-tensors": frozenset({"compressed-tensors"}),
}
"""`quant_method` of a checkpoint → the flags that serve it (vLLM, config/model.py: the same, or a kernel that overrides it)."""
NEED_CHECKPOINT = frozenset({"awq", "awq_marlin", "gptq", "gptq_marlin"})
"""Flags that load what was quantized before; `fp8` and its like can quantize while they load."""


@rule(
    "quantization-mismatch",
    "The checkpoint's quantization does not fit the flag, the GPU or the engine",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    explains=("engine-crashed", "launch-refused", "fp8-not-engaged"),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding | Absent]:
    """Take the engine's refusal; before it refuses, compare the flag with config.json."""
    for refusal in refused_for(history, Reason.FORMAT):
        yield _refused(refusal)
    for one in unexplained(history):
        yield from _predicted(one)


def _refused(refusal: Refusal) -> Finding:
    cause, facts = refusal.cause, refusal.cause.facts
    words = WORDS.get(str(facts.get("kind")), "it has no kernel for a layer of this quantized checkpoint")
    if is_tile(cause) and "size" in facts and "block" in facts:
        words += f": {facts['size']} is no multiple of {facts['block']}"
    if "checkpoint" in facts and "flag" in facts:
        words += f": {facts['checkpoint']} against {facts['flag']}"
    elif "flag" in facts:
        words += f": {facts['flag']}"
    if "minimum" in facts and "capability" in facts:
        words += f" (capability {facts['minimum']} or newer, this one has {facts['capability']})"
    return Finding(
        summary=f"The engine refused to start: {words}",
        evidence=(Evidence(Source.ENGINE_LOG.value, cause.where, cause.text),),
        confidence=Confidence.HIGH,
        subject=Subject(engine=refusal.log.engine),
        since=refusal.incident.at,
        facts={"log": refusal.log.log},
    )


def _predicted(one: Served) -> Iterator[Finding | Absent]:
    flag, method = or_none(one.engine.flags.quantization), one.engine.model.quantization_method
    if flag is None or flag == "auto":
        return
    flag = flag.lower()
    if isinstance(method, Absent):
        if method.why is not Why.NOT_PRESENT:
            yield Absent(method.why, method.detail or "how the checkpoint is quantized was not seen")
        elif flag in NEED_CHECKPOINT:
            yield _finding(one, flag, "names no quantization", sure=known(one.engine.model.weights_bytes))
    elif method in FAMILIES and any(flag in family for family in FAMILIES.values()) and flag not in FAMILIES[method]:
        yield _finding(one, flag, f"says {method}", sure=True)


def _finding(one: Served, flag: str, says: str, *, sure: bool) -> Finding:
    """Return the finding; *sure*: the checkpoint's own folder was read, where old formats keep a file of their own."""
    return Finding(
        summary=f"--quantization {flag} for a checkpoint whose config.json {says}: the engine "
        f"{'will refuse' if sure else 'refuses'} it{'' if sure else ', unless its folder holds a quantize_config.json'}",
        evidence=(
            Evidence(Source.PROCESSES.value, "--quantization", flag),
            Evidence(Source.MODEL.value, f"{one.config}: quantization_config", says),
            *(Evidence(Source.ENGINE_LOG.value, line.where, line.text) for line in one.last_words),
        ),
        confidence=Confidence.MEDIUM if sure else Confidence.LOW,
        severity=None if sure else Severity.WARNING,
        subject=Subject(engine=one.name),
    )
