from __future__ import annotations

import contextlib
import math

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from doctor.simulation import faults
from doctor.simulation.faults import KINDS, Fault, FaultError
from doctor.simulation.physics import COUNTERS, Drill, Physics
from doctor.simulation.profiles import PROFILES

H100 = PROFILES["hgx-h100-8"]


def drill(*texts: str, profile: str = "hgx-h100-8") -> Drill:
    return Drill(profile=profile, started_at=0.0, faults=faults.parse_all(texts, PROFILES[profile]))


class TestFaults:
    def test_a_fault_is_read_with_its_parameters_and_times(self) -> None:
        fault = faults.parse("nvlink-down:gpu=2,link=5,start=3,end=9.5", H100)
        assert fault == Fault(name="nvlink-down", params={"gpu": 2, "link": 5}, start_seconds=3.0, end_seconds=9.5)
        assert [fault.active(t) for t in (2.9, 3.0, 9.4, 9.5)] == [False, True, True, False]

    def test_a_fault_without_a_start_is_there_before_the_first_visit(self) -> None:
        assert faults.parse("driver-hung", H100).active(0.0)
        assert faults.parse("driver-hung", H100).active(-100.0)

    def test_parameters_left_out_have_their_defaults(self) -> None:
        assert faults.parse("pcie-width:gpu=1", H100).params == {"gpu": 1, "width": 8}

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("nvlink-dwn:gpu=1", "'nvlink-dwn' is no fault; there are driver-hung, gpu-lost"),
            ("gpu-lost", "gpu-lost needs gpu (index of the GPU)"),
            ("gpu-lost:gpu", "'gpu' is not name=value"),
            ("gpu-lost:gpu=", "'gpu=' is not name=value"),
            ("gpu-lost:card=1", "gpu-lost has no parameter 'card'; it takes gpu, start, end"),
            ("gpu-lost:gpu=1,gpu=2", "gpu is given twice"),
            ("gpu-lost:gpu=two", "gpu is a whole number, not 'two'"),
            ("gpu-lost:gpu=8", "hgx-h100-8 has GPUs 0 to 7, not 8"),
            ("gpu-lost:gpu=-1", "gpu is at least 0, not -1"),
            ("nvlink-down:gpu=0,link=18", "have NVLinks 0 to 17, not 18"),
            ("pcie-width:gpu=0,width=32", "width is from 1 to 16, not 32"),
            ("recovery-action:gpu=0,action=pray", "action is one of none, reset"),
            ("driver-hung:start=5,end=5", "it ends before it starts"),
            ("driver-hung:start=nan", "start is a finite number, not nan"),
        ],
    )
    def test_a_bad_fault_names_the_bad_part_and_what_there_is(self, text: str, says: str) -> None:
        with pytest.raises(FaultError) as e:
            faults.parse(text, H100)
        assert says in str(e.value)
        assert "\n" not in str(e.value)

    @pytest.mark.parametrize(
        ("text", "profile"),
        [
            ("nvlink-down:gpu=0,link=0", "l40s-4"),
            ("mig-enabled:gpu=0", "rtx4090-4"),
            ("fabric-incomplete", "hgx-h100-4"),
        ],
    )
    def test_a_node_refuses_a_fault_of_what_it_does_not_have(self, text: str, profile: str) -> None:
        with pytest.raises(FaultError):
            faults.parse(text, PROFILES[profile])

    def test_an_unknown_profile_names_those_there_are(self) -> None:
        with pytest.raises(FaultError, match="'hgx' is no profile; there are hgx-h100-8"):
            faults.profile("hgx")

    @given(st.text(max_size=60))
    @settings(max_examples=150)
    def test_any_text_is_a_fault_or_a_fault_error(self, text: str) -> None:
        with contextlib.suppress(FaultError):
            assert isinstance(faults.parse(text, H100), Fault)

    @given(
        name=st.sampled_from(["nvlink-down", "power-cap", "foreign-process", "driver-hung", "nvlink-errors"]),
        gpu=st.integers(0, 7),
        start=st.floats(-100, 1000),
        lasts=st.none() | st.floats(0.5, 1000),
    )
    @settings(max_examples=100)
    def test_a_fault_is_written_as_it_is_read(self, name: str, gpu: int, start: float, lasts: float | None) -> None:
        given_params = {p.name: (gpu if p.name == "gpu" else 3) for p in KINDS[name].parameters}
        text = ",".join([*(f"{k}={v}" for k, v in given_params.items()), f"start={start:.2f}"])
        text += f",end={start + lasts:.2f}" if lasts else ""
        if name == "power-cap":
            text = text.replace("watts=3", "watts=300")
        fault = faults.parse(f"{name}:{text}", H100)
        again = faults.parse(str(fault), H100)
        assert again.params == fault.params
        assert again.start_seconds == pytest.approx(fault.start_seconds, rel=1e-4, abs=1e-3)

    def test_every_fault_says_what_it_is_in_one_line(self) -> None:
        for kind in KINDS.values():
            assert kind.text
            assert "\n" not in kind.text
            assert all(parameter.text for parameter in kind.parameters)

    def test_a_drill_travels_as_json(self) -> None:
        before = drill("gpu-lost:gpu=3,start=5", "power-cap:gpu=1,watts=300")
        assert msgspec.json.decode(msgspec.json.encode(before), type=Drill) == before


class TestPhysics:
    @pytest.mark.parametrize("profile", PROFILES)
    def test_a_healthy_node_stays_within_its_limits(self, profile: str) -> None:
        product = PROFILES[profile].product
        physics = Physics(drill(profile=profile))
        for t in range(0, 120, 3):
            for gpu in physics.at(t).gpus:
                assert 20 < gpu.gpu_celsius < 85
                assert gpu.margin_celsius > 2
                assert product.idle_watts * 0.9 < gpu.power_watts <= product.limit_watts
                assert gpu.throttle == 1.0

    def test_energy_is_the_integral_of_power(self) -> None:
        physics = Physics(drill("power-transient:start=3,end=12", "overheating:gpu=2"))
        start = [gpu.energy_joules for gpu in physics.at(0.0).gpus]
        joules = [0.0] * 8
        for cell in range(200):
            for index, gpu in enumerate(physics.at(cell / 10 + 0.001).gpus):
                joules[index] += gpu.power_watts * 0.1
        for index, gpu in enumerate(physics.at(20.0).gpus):
            assert gpu.energy_joules - start[index] == pytest.approx(joules[index], rel=1e-6)

    @given(
        times=st.lists(st.floats(-200, 400), min_size=2, max_size=12).map(sorted),
        texts=st.lists(
            st.sampled_from(
                ["overheating:gpu=1", "power-cap:gpu=2,watts=300", "power-brake:gpu=3,start=5", "gpu-lost:gpu=4,start=20",
                 "power-transient:start=30,end=60", "gpu-idle:gpu=5,start=1,end=50"]
            ),
            max_size=4,
            unique=True,
        ),
    )  # fmt: skip
    @settings(max_examples=25, deadline=None)
    def test_counters_never_fall_and_heat_is_bounded(self, times: list[float], texts: list[str]) -> None:
        physics = Physics(drill(*texts))
        before: list[dict[str, float]] = []
        for t in times:
            state = physics.at(t)
            now = [{name: getattr(gpu, name) for name in COUNTERS} for gpu in state.gpus]
            for old, new in zip(before, now, strict=False):
                assert all(new[name] >= old[name] for name in COUNTERS)
            for gpu in state.gpus:
                assert 20 < gpu.gpu_celsius < 110
                assert gpu.power_watts <= 2 * gpu.limit_watts
            before = now

    @given(
        st.lists(st.floats(-50, 300), min_size=1, max_size=6), st.sampled_from(["overheating:gpu=0", "gpu-idle:gpu=0"])
    )
    @settings(max_examples=20, deadline=None)
    def test_the_state_depends_on_the_time_alone(self, detour: list[float], fault: str) -> None:
        direct, wandering = Physics(drill(fault)), Physics(drill(fault))
        for t in detour:
            wandering.at(t)
        assert wandering.at(77.7).gpus == direct.at(77.7).gpus

    def test_far_ahead_is_as_near_as_step_by_step(self) -> None:
        leaping, stepping = Physics(drill("power-cap:gpu=1,watts=300")), Physics(drill("power-cap:gpu=1,watts=300"))
        for t in range(0, 1200, 7):
            stepping.at(t)
        for one, other in zip(leaping.at(1200.3).gpus, stepping.at(1200.3).gpus, strict=True):
            assert one.energy_joules == pytest.approx(other.energy_joules, rel=1e-9)
            assert one.gpu_celsius == pytest.approx(other.gpu_celsius, abs=1e-5)
            assert one.sw_power_cap_seconds == pytest.approx(other.sw_power_cap_seconds, rel=1e-6)

    def test_insufficient_cooling_slows_a_gpu_down_and_its_neighbours_not(self) -> None:
        gpus = Physics(drill("overheating:gpu=3")).at(10.0).gpus
        assert gpus[3].sm_mhz < 0.9 * gpus[2].sm_mhz
        assert gpus[3].gpu_celsius > gpus[2].gpu_celsius + 20
        assert gpus[3].sw_thermal_seconds > 10
        assert gpus[2].sw_thermal_seconds == 0

    def test_heat_follows_power_with_its_time_constant(self) -> None:
        physics = Physics(drill("gpu-idle:gpu=0,start=0"))
        hot = physics.at(0.0).gpus[0].gpu_celsius
        cold = H100.product.base_celsius + H100.product.idle_watts * H100.product.celsius_per_watt
        after_tau = physics.at(9.0).gpus[0].gpu_celsius
        assert after_tau - cold == pytest.approx((hot - cold) / math.e, abs=0.3)

    def test_a_transient_steps_all_gpus_at_the_same_moments(self) -> None:
        physics = Physics(drill("power-transient:start=0"))
        rows = [[gpu.power_watts for gpu in physics.at(t / 10).gpus] for t in range(40)]
        assert max(sum(row) for row in rows) > 8 * 700 * 1.3
        for row in rows:
            assert max(row) == min(row)

    def test_a_binding_power_limit_lowers_clocks_and_says_so(self) -> None:
        gpu = Physics(drill("power-cap:gpu=2,watts=300")).at(5.0).gpus[2]
        assert gpu.power_watts == 300
        assert gpu.sm_mhz < 1900
        assert gpu.reasons & 0x4
        assert gpu.sw_power_cap_seconds > 100

    def test_the_other_ranks_spin_when_a_gpu_is_lost_and_then_the_engine_is_gone(self) -> None:
        physics = Physics(drill("gpu-lost:gpu=1,start=10"))
        assert [gpu.activity for gpu in physics.at(12.0).gpus] == ["spinning", "lost", *["spinning"] * 6]
        assert physics.at(12.0).gpus[0].power_watts < 200
        late = physics.at(10 + 60 + 1)
        assert {gpu.activity for gpu in late.gpus} == {"idle", "lost"}
        assert late.load == 0


def test_a_link_between_two_gpus_has_one_other_end() -> None:
    for profile in PROFILES.values():
        for gpu in profile.gpus:
            for link in range(profile.product.nvlinks):
                end = profile.far_end(gpu, link)
                if end is not None:
                    assert profile.far_end(*end) == (gpu, link)
