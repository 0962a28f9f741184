"""Where facts come from, and what was not seen of them."""

from __future__ import annotations

import enum

import msgspec

from doctor.snapshot.absence import Absent


class Source(enum.Enum):
    """One place that a visit looks at; each of a node has one collector in a live visit."""

    NVML = "nvml"
    KERNEL_LOG = "kernel-log"
    PROCESSES = "processes"
    ENGINE_LOG = "engine-log"
    ENGINE_METRICS = "engine-metrics"
    STACK = "stack"
    MODEL = "model"
    FABRIC_MANAGER = "fabric-manager"
    HOST = "host"
    RECORDER = "recorder"
    """gpu-doctor's own flight recorder, where visits are read from it."""


OF_A_NODE = tuple(source for source in Source if source is not Source.RECORDER)
"""The sources that a visit of a node looks at."""


class Unseen(msgspec.Struct, frozen=True):
    """A source, or a part of one, that a visit could not see."""

    source: Source
    why: Absent
    what: str = ""
    """The part that is missing, e.g. `ecc of GPU 3`; empty: the whole source."""


class CollectorRun(msgspec.Struct, frozen=True):
    """How one collector fared in a visit."""

    source: Source
    succeeded: bool
    duration_seconds: float
    age_seconds: float = 0.0
    """How long before the visit's `at` its values were read."""
