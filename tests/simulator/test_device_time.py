"""How a simulated device's times scatter and drift, and who is told of it."""

from __future__ import annotations

import math
import statistics
from itertools import pairwise

import pytest
from toy import TOY, run, singles

from minserve.planner.plan import IterationPlan
from minserve.planner.policies.base import Planner
from minserve.planner.policies.sarathi import SarathiPlanner
from minserve.planner.predict.lengths import LengthEstimator
from minserve.planner.predict.perf_model import PerfModel
from minserve.simulator.device_time import STALL_S, STEP_S, DeviceTime
from minserve.simulator.simulation import Setup, planner_of, simulate


def test_a_quiet_device_takes_exactly_its_usual_time() -> None:
    quiet = DeviceTime(seed="any")
    assert [quiet.seconds(0.1 * i, 3.7 * i) for i in range(50)] == [0.1 * i for i in range(50)]


def test_iterations_scatter_by_the_log_standard_deviation_that_was_asked_for() -> None:
    noisy = DeviceTime(noise=0.3, seed="0")
    logs = [math.log(noisy.seconds(2.0, float(i)) / 2.0) for i in range(4000)]
    assert statistics.fmean(logs) == pytest.approx(0.0, abs=0.02)
    assert statistics.stdev(logs) == pytest.approx(0.3, rel=0.05)


def test_a_factor_stays_until_an_iteration_has_run() -> None:
    noisy = DeviceTime(noise=0.3, seed="0")
    factor = noisy.factor(0.0)
    assert noisy.factor(0.001) == factor
    assert noisy.seconds(2.0, 0.002) == 2.0 * factor
    assert noisy.factor(0.003) != factor


def test_speeds_hold_for_10_to_60_s_and_lie_between_half_and_double() -> None:
    drifting = DeviceTime(speed_steps=2.0, seed="0")
    factors = [drifting.seconds(1.0, 0.1 * i) for i in range(300_000)]
    assert 0.5 <= min(factors) < 0.55
    assert 1.9 < max(factors) <= 2.0
    steps = [i for i in range(1, len(factors)) if factors[i] != factors[i - 1]]
    held = [(end - begin) / 10 for begin, end in pairwise(steps)]
    assert STEP_S[0] - 0.1 <= min(held) < 12
    assert 58 < max(held) <= STEP_S[1] + 0.1
    # Log-uniform: as often faster as slower.
    assert statistics.median(factors) == pytest.approx(1.0, abs=0.1)


def test_a_device_stands_still_at_times() -> None:
    stalling = DeviceTime(stall_every_s=30.0, seed="0")
    now, stalls = 0.0, []
    while now < 60_000:
        seconds = stalling.seconds(0.01, now)
        if seconds > 0.01:
            stalls.append(seconds - 0.01)
        now += seconds
    # A stall begins while an iteration runs: each is met whole.
    assert min(stalls) >= STALL_S[0]
    assert max(stalls) <= STALL_S[1]
    assert statistics.fmean(stalls) == pytest.approx(statistics.fmean(STALL_S), rel=0.05)
    assert now / len(stalls) == pytest.approx(30 + statistics.fmean(STALL_S), rel=0.1)


def test_an_iteration_that_begins_in_a_stall_waits_for_its_rest() -> None:
    def stalled(at: float) -> float:
        return DeviceTime(stall_every_s=100.0, seed="3").seconds(1e-6, at) - 1e-6

    begins = next(i / 64 for i in range(100_000) if stalled(i / 64) > 0)
    rest = stalled(begins)
    assert 0 < rest <= STALL_S[1]
    assert stalled(begins + rest / 2) == pytest.approx(rest / 2)
    assert stalled(begins + rest) == 0
    # Who runs when it begins waits for all of it.
    assert stalled(begins - 1 / 64) == 0
    whole = DeviceTime(stall_every_s=100.0, seed="3").seconds(1.0, begins - 0.5) - 1.0
    assert rest <= whole <= rest + 1 / 64


def test_speeds_and_stalls_do_not_depend_on_how_often_was_asked() -> None:
    def device() -> DeviceTime:
        return DeviceTime(speed_steps=2.0, stall_every_s=5.0, seed="7")

    rare, often, now = device(), device(), 0.0
    for i in range(20_000):
        found = often.seconds(0.01, now)
        if i % 500 == 0:
            assert rare.seconds(0.01, now) == found
        now += found


def test_replicas_and_seeds_drift_apart() -> None:
    seeds = ("0 0", "0 1", "1 0")
    assert len({DeviceTime(speed_steps=2.0, seed=seed).factor(0.0) for seed in seeds}) == 3


@pytest.mark.parametrize("policy", ["dp", "vllm", "distserve"])
@pytest.mark.parametrize("drift", [{"speed_steps": 2.0}, {"stall_every_s": 1.0}])
def test_a_drifting_device_changes_what_is_attained(policy: str, drift: dict[str, float]) -> None:
    workload = singles(8.0, 40)
    steady = run(workload, policy=policy)
    drifting = run(workload, policy=policy, **drift)
    assert drifting.verdicts != steady.verdicts
    assert drifting.verdicts == run(workload, policy=policy, **drift).verdicts


class Foreseeing(SarathiPlanner):
    """Notes what it was told of each iteration, and how long that took over its usual time."""

    def __init__(self, told: list[tuple[float, float]], model: PerfModel) -> None:
        super().__init__(model)
        self._told = told

    def observe(self, plan: IterationPlan, seconds: float) -> None:
        self._told.append((self.model.next_factor, seconds / self.model.profiled(plan.shape)))
        super().observe(plan, seconds)


def test_a_clairvoyant_planner_is_told_each_factor_in_advance() -> None:
    told: list[tuple[float, float]] = []

    def make(setup: Setup, _: LengthEstimator) -> Planner:
        return Foreseeing(told, setup.device.perf_model())

    setup = Setup(device=TOY, noise=0.2, speed_steps=2.0, clairvoyant=True)
    simulate(singles(8.0, 40), setup, make=make)
    assert len(told) > 100
    assert [took for _, took in told] == pytest.approx([factor for factor, _ in told])


def test_who_is_not_clairvoyant_meets_the_same_device_untold() -> None:
    workload = singles(8.0, 30)
    settings = {"device": TOY, "noise": 0.2, "policy": "edf"}
    untold: list[Planner] = []

    def make(setup: Setup, lengths: LengthEstimator) -> Planner:
        untold.append(planner_of(setup, lengths))
        return untold[-1]

    simulate(workload, Setup(**settings), make=make)
    assert untold[0].model.next_factor is None
