"""An engine of a snapshot as the arithmetic needs it: its model, its card, its fabric and its flags, joined."""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import combinations

import msgspec

from doctor.machine.card import Card, card_of
from doctor.machine.fabric import Fabric, fabric_between
from doctor.machine.fit import LATER_FROM, LATER_UTILIZATION, UTILIZATION, Obstacle, Room, room, why_tp_impossible
from doctor.machine.step import Step, decode_step, prefill_step
from doctor.machine.weights import Draft, Model, draft_of, kv_element_bytes, model_of
from doctor.snapshot import Absent, Engine, GpuPair, Maybe, Snapshot, Why, known, or_none


class Serving(msgspec.Struct, frozen=True, kw_only=True):
    """A model on GPUs of this node. *tp* asks about another width on the same GPUs; left out, it is the engine's."""

    model: Model
    card: Card
    gpus: tuple[str, ...]
    """UUIDs, as many as there are tensor-parallel ranks."""
    pairs: tuple[GpuPair, ...]
    custom: bool
    """Whether the engine's own all-reduce kernels may run."""
    utilization: float
    kv_element_bytes: float
    context: int | None
    """The longest request that the engine promises to hold; None where nothing tells."""
    expert_parallel: bool
    draft: Draft

    def fabric(self, tp: int | None = None) -> Maybe[Fabric]:
        """Return what *tp* of the GPUs talk over; absent where their links were not seen, or they are too few.

        Fewer than all are those that are best linked: who makes two replicas puts each on a bridged pair.
        """
        ranks = tp or len(self.gpus)
        if ranks > len(self.gpus):
            return Absent(Why.NOT_ASKED, f"{ranks} ranks on {len(self.gpus)} GPUs")
        alike = len({pair.nvlinks for pair in self.pairs if known(pair.nvlinks)}) <= 1
        groups = (self.gpus[:ranks],) if alike else combinations(self.gpus, ranks)
        fabrics = [fabric_between(self.card, self.pairs, group, custom=self.custom) for group in groups]
        return max(fabrics, key=lambda f: f.bytes_per_second if known(f) else 0.0)

    def decode(self, batch: int = 1, context: int = 0, tp: int | None = None) -> Maybe[Step]:
        """Return a decode step: see `decode_step`."""
        fabric = self.fabric(tp)
        if isinstance(fabric, Absent):
            return fabric
        return decode_step(
            self.model,
            self.card,
            fabric,
            tp or len(self.gpus),
            batch=batch,
            context=context,
            kv_element_bytes=self.kv_element_bytes,
        )

    def prefill(self, tokens: int, tp: int | None = None) -> Maybe[Step]:
        """Return a prompt's step: see `prefill_step`."""
        fabric = self.fabric(tp)
        if isinstance(fabric, Absent):
            return fabric
        return prefill_step(self.model, self.card, fabric, tp or len(self.gpus), tokens)

    def room(self, tp: int | None = None) -> Room:
        """Return the memory of each GPU: see `fit.room`."""
        return room(
            self.model,
            self.card,
            tp or len(self.gpus),
            utilization=self.utilization,
            kv_element_bytes=self.kv_element_bytes,
            draft=self.draft,
        )

    def obstacles(self, tp: int | None = None) -> tuple[Obstacle, ...]:
        """Return what keeps the model from being split so: see `fit.why_tp_impossible`."""
        return why_tp_impossible(self.model, tp or len(self.gpus), expert_parallel=self.expert_parallel)


def serving_of(snapshot: Snapshot, engine: Engine, gpus: Sequence[str], *, custom: bool = True) -> Maybe[Serving]:
    """Return what *engine* serves on *gpus* (UUIDs of its ranks); absent with the first thing unknown.

    With data parallelism it is one of the replicas. *custom*: False where the engine's log says that it turned its own
    all-reduce off; its flag is read here.
    """
    flags = engine.flags
    replicas = or_none(flags.data_parallel_size) or 1
    if replicas > 1 and or_none(flags.expert_parallel):
        return Absent(Why.NOT_SUPPORTED, "there is no arithmetic for experts spread over data-parallel ranks")
    ranks = or_none(flags.tensor_parallel_size) or max(len(gpus) // replicas, 1)
    if len(gpus) < ranks:
        return Absent(Why.NOT_ASKED, f"which GPUs the engine's {ranks} ranks run on is not known")
    gpus = gpus[:ranks]
    if known(flags.pipeline_parallel_size) and flags.pipeline_parallel_size > 1:
        return Absent(Why.NOT_SUPPORTED, "there is no arithmetic for pipeline parallelism")
    card = _card_of_all(snapshot, gpus)
    if isinstance(card, Absent):
        return card
    model = model_of(engine.model, or_none(flags.quantization))
    if isinstance(model, Absent):
        return model
    element_bytes = kv_element_bytes(or_none(flags.kv_cache_dtype))
    if isinstance(element_bytes, Absent):
        return element_bytes
    lengths = (flags.max_model_len, engine.model.max_position_embeddings)
    return Serving(
        model=model,
        card=card,
        gpus=tuple(gpus),
        pairs=snapshot.pairs,
        custom=custom and or_none(flags.disable_custom_all_reduce) is not True,
        utilization=flags.gpu_memory_utilization if known(flags.gpu_memory_utilization) else _utilization(engine),
        kv_element_bytes=element_bytes,
        context=next((length for length in lengths if known(length)), None),
        expert_parallel=or_none(flags.expert_parallel) is True,
        draft=draft_of(or_none(flags.speculative)),
    )


def _utilization(engine: Engine) -> float:
    """Return the default `--gpu-memory-utilization` of the engine's version; the older one where that is not known."""
    version = re.match(r"(\d+)\.(\d+)", or_none(engine.stack.engine) or "")
    if engine.kind == "vllm" and version is not None and (int(version[1]), int(version[2])) >= LATER_FROM:
        return LATER_UTILIZATION
    return UTILIZATION


def _card_of_all(snapshot: Snapshot, uuids: Sequence[str]) -> Maybe[Card]:
    """Return the one card that all these GPUs are; the least memory among them counts."""
    cards: list[Card] = []
    for uuid in uuids:
        gpu = snapshot.gpu(uuid)
        if gpu is None:
            return Absent(Why.NOT_ASKED, f"GPU {uuid} was not seen")
        if or_none(gpu.mig.enabled) is True:
            return Absent(Why.NOT_SUPPORTED, f"GPU {gpu.index} is partitioned by MIG")
        card = card_of(gpu)
        if isinstance(card, Absent):
            return card
        cards.append(card)
    if len({card.name for card in cards}) > 1:
        return Absent(Why.NOT_SUPPORTED, "the engine's GPUs are of different products")
    return min(cards, key=lambda card: card.memory_bytes)
