"""The node's draw between visits: laid out visit by visit, it is the draw of the whole history."""

from __future__ import annotations

from random import Random

import nodes

from doctor.history import History
from doctor.snapshot import Sample, Snapshot
from doctor.symptoms.draw import node_draw


def uneven(snapshot: Snapshot, chance: Random) -> Snapshot:
    """Steps of 600 W, read from GPUs that are asked one after the other, with samples and whole readings missing."""

    def samples(index: int, before: tuple[Sample, ...]) -> tuple[Sample, ...]:
        if chance.random() < 0.05:
            return ()
        return tuple(
            Sample(s.at + 0.1 * index, 100.0 + 600.0 * (int(s.at) // 3 % 2) + chance.random())
            for s in before
            if chance.random() < 0.95
        )

    return nodes.put(
        snapshot, gpus=tuple(nodes.put(g, power__samples=samples(g.index, g.power.samples)) for g in snapshot.gpus)
    )


def test_a_draw_that_grew_visit_by_visit_is_that_of_the_whole_history() -> None:
    chance = Random(7)
    history: History | None = None
    for snapshot in nodes.healthy("hgx-h100-4", visits=70, every=10.0):
        seen = uneven(snapshot, chance)
        history = history.after(seen) if history else History((seen,), keep=3600)
        assert node_draw(history) == node_draw(History(history.snapshots, keep=3600))


def test_a_step_across_two_visits_counts() -> None:
    before, after = (
        nodes.with_gpu(s, range(4), power__samples=tuple(Sample(s.at - 1.0 + i / 10, watts) for i in range(10)))
        for s, watts in zip(nodes.healthy("hgx-h100-4", visits=2, every=1.0), (100.0, 600.0), strict=True)
    )
    draw = node_draw(nodes.history((before, after)))
    assert draw is not None
    assert draw.steps[0] == 2000.0


def test_a_gpu_without_samples_leaves_no_draw() -> None:
    visits = nodes.each(nodes.healthy("hgx-h100-4"), lambda s: nodes.with_gpu(s, 2, power__samples=()))
    assert node_draw(nodes.history(visits)) is None
