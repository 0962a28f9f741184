"""The engine refused to start for a reason that is no fault of the node."""

from __future__ import annotations

from collections.abc import Iterator

from doctor.history import History
from doctor.rule import Confidence, Evidence, Finding, NoLimits, Severity, Subject, rule
from doctor.snapshot import Source
from doctor.symptoms.refusals import Reason, refused_for

WORDS = {
    "port-in-use": "its port is in use by another process",
    "bad-flag": "it does not know a flag, or misses one",
    "bad-value": "a value on the command line is out of range for this model or release",
    "bad-model-files": "the model's files are damaged or incomplete",
    "model-not-found": "the model was not found",
    "no-access": "it has no access to the model",
    "unsupported-architecture": "this release does not know the model's architecture",
    "gpu-uuid": "it can't read a GPU's UUID in CUDA_VISIBLE_DEVICES: this release takes whole numbers",
}
"""By the kind of the signal `launch-error`."""


@rule(
    "launch-refused",
    "The engine refused to start",
    severity=Severity.CRITICAL,
    needs=(Source.ENGINE_LOG,),
    limits=NoLimits(),
)
def RULE(history: History, _: NoLimits) -> Iterator[Finding]:
    """Quote the refusal."""
    for refusal in refused_for(history, Reason.SETTINGS):
        log, incident, cause = refusal.log, refusal.incident, refusal.cause
        words = WORDS.get(str(cause.facts.get("kind")))
        if words is None or incident.serving:
            continue
        quoted = cause.text if len(cause.text) <= 220 else cause.text[:219] + "…"
        yield Finding(
            summary=f'The engine refused to start: {words} ("{quoted}")',
            evidence=(Evidence(Source.ENGINE_LOG.value, cause.where, cause.text),),
            confidence=Confidence.HIGH,
            subject=Subject(engine=log.engine),
            since=incident.at,
            facts={"log": log.log},
        )
