"""The last visits: what they remember, and what they hold once."""

from __future__ import annotations

import msgspec
import nodes
from hypothesis import given
from hypothesis import strategies as st

from doctor.history import SAMPLES_SECONDS, History
from doctor.snapshot import Absent, Gpu, NvLink, Power, Sample, Snapshot, Thermal, Why
from doctor.snapshot.sharing import shared
from doctor.symptoms import draw

EVERY_SECONDS = 10.0


def remembered(visits: list[Snapshot]) -> History:
    history = History((visits[0],), 3600.0)
    for visit in visits[1:]:
        history = history.after(visit)
    return history


def read_anew(visits: list[Snapshot]) -> list[Snapshot]:
    """Each visit made of objects of its own, as a feed makes them."""
    return [msgspec.msgpack.decode(msgspec.msgpack.encode(visit), type=Snapshot) for visit in visits]


def test_what_did_not_change_is_held_once() -> None:
    visits = read_anew(nodes.healthy("hgx-h100-8", visits=3, every=EVERY_SECONDS))
    first, *_, last = remembered(visits).snapshots
    assert last == visits[-1]
    assert last.pairs is first.pairs
    assert all(new.links is old.links and new.name is old.name for new, old in zip(last.gpus, first.gpus, strict=True))


def test_fast_samples_are_remembered_as_long_as_a_symptom_looks_back() -> None:
    visits = nodes.healthy("hgx-h100-8", visits=120, every=EVERY_SECONDS)
    history = remembered(visits)
    assert len(history.snapshots) == len(visits)
    for kept, visit in zip(history.snapshots, visits, strict=True):
        young = visit.at >= history.now - SAMPLES_SECONDS
        samples = [gpu.power.samples for gpu in visit.gpus]
        assert [gpu.power.samples for gpu in kept.gpus] == (samples if young else [()] * len(samples))
        assert [gpu.power.energy_joules for gpu in kept.gpus] == [gpu.power.energy_joules for gpu in visit.gpus]
    longest_interval = SAMPLES_SECONDS - draw.WINDOW_SECONDS
    assert longest_interval >= 60, "the visit before the window is read, too"
    whole = History(tuple(visits), 3600.0)
    assert draw.node_draw(history) == draw.node_draw(whole)


maybe_number = st.one_of(st.floats(allow_nan=False), st.integers(), st.sampled_from([Absent(why) for why in Why]))
links = st.builds(NvLink, link=st.integers(0, 17), active=st.booleans(), replay_errors_total=maybe_number)
samples = st.builds(Sample, at=st.floats(0, 1e9), value=st.floats(0, 1e3))
gpus = st.builds(
    Gpu,
    uuid=st.sampled_from(["GPU-1", "GPU-2"]),
    index=st.integers(0, 1),
    thermal=st.builds(Thermal, gpu_celsius=maybe_number),
    power=st.builds(Power, samples=st.lists(samples, max_size=2).map(tuple)),
    links=st.one_of(st.sampled_from([Absent(why) for why in Why]), st.lists(links, max_size=3).map(tuple)),
)
snapshots = st.builds(Snapshot, at=st.floats(0, 1e9), gpus=st.lists(gpus, max_size=3).map(tuple))


@given(snapshots, snapshots)
def test_sharing_changes_nothing(visit: Snapshot, before: Snapshot) -> None:
    assert shared(visit, before) == visit
