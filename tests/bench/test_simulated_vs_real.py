"""What the benchmark of the simulator tells it of a real run, and how it judges."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from simulated_vs_real import LEAD_S, as_sent, counted

from minserve.cli.flags import given
from minserve.cli.main import build_parser
from minserve.config import EngineConfig
from minserve.devices import find_device
from minserve.planner.policies.base import Planner
from minserve.planner.policies.registry import POLICIES, make_planner
from minserve.planner.predict.lengths import QuantileLengths
from minserve.simulator import simulation
from minserve.simulator.simulation import Setup
from minserve.slo.objectives import SLO, StageTarget, Targets
from minserve.workload.answer import Answer
from minserve.workload.client import Load
from minserve.workload.conversation import Turn
from minserve.workload.verdict import Cause, Verdict
from parts.simulated_vs_real.real_server import form_flags, quantile_of, told
from parts.simulated_vs_real.report import ComparedRun, Inputs, errors, plot, print_table

TARGETS = Targets(ttft_s=0.5, stages=(StageTarget(tpot_s=0.1),))
TURN = Turn(slo=SLO(ttft_slowdown=5, tpot_slowdown=2, name="chatbot"), prompt_tokens=20,
            output_tokens=3)  # fmt: skip


def answer(due_s: float, *token_times: float, prompt_tokens: int | None = 18) -> Answer:
    return Answer(TURN, TARGETS, due_s, token_times=list(token_times), prompt_tokens=prompt_tokens)


def verdicts(*ttfts: float | None, tpot_s: float = 0.05, late: int = 0) -> list[Verdict]:
    return [
        Verdict(
            name="chatbot",
            arrival_s=LEAD_S + i,
            cause=Cause.LATE_TPOT if i < late else None,
            attained_mean=True,
            ttft_s=ttft_s,
            tpot_s=tpot_s,
        )
        for i, ttft_s in enumerate(ttfts)
    ]


def row(real: list[Verdict], simulated: list[Verdict]) -> ComparedRun:
    return ComparedRun(
        policy="dp",
        scenario="chatbot",
        rate=1.0,
        inputs=Inputs(),
        real=real,
        simulated=simulated,
        blind=simulated,
        cores_elsewhere=0.0,
        worst_elsewhere=0.0,
        disturbed=False,
    )


def test_what_is_told_adds_up_to_what_was_measured() -> None:
    lone = {
        ("inter_token_latency_seconds_sum", ""): 2.0,
        ("inter_token_latency_seconds_count", ""): 100.0,
        ("iteration_seconds_sum", ""): 1.9,
        ("iteration_seconds_count", ""): 100.0,
    }
    run = {
        ("iteration_seconds_sum", ""): 13.0,
        ("iteration_seconds_count", ""): 500.0,
        ("planning_seconds_sum", ""): 1.0,
        ("iteration_profiled_seconds_sum", ""): 10.0,
        ("time_to_first_token_seconds_sum", ""): 0.8,
        ("time_to_first_token_seconds_count", ""): 2.0,
        ("iteration_surprise_bucket", "1.0"): 250.0,
        ("iteration_surprise_bucket", "1.2"): 495.0,
        ("iteration_surprise_bucket", "+Inf"): 500.0,
    }
    # One that got no token waited for nothing that could be compared.
    found = told([answer(1.0, 1.3), answer(2.0, 2.6), answer(3.0)], lone, run)
    assert math.exp(2.3263 * found.noise) == pytest.approx(1.2, rel=1e-4)
    assert found.slowness * math.exp(found.noise**2 / 2) == pytest.approx(1.2)
    assert found.planning_s == pytest.approx(0.002)
    assert found.gap_s == pytest.approx(0.001)
    assert found.request_s == pytest.approx(0.05)


def test_quantiles_of_buckets_lie_on_straight_lines_between_their_bounds() -> None:
    bounds = {"0.5": 0.0, "1.0": 40.0, "2.0": 90.0, "+Inf": 100.0}
    metrics = {("x_bucket", bound): count for bound, count in bounds.items()} | {("x_sum", ""): 1.0}
    found = [quantile_of(metrics, "x", q) for q in (0.2, 0.4, 0.65, 0.9, 0.99)]
    assert found == pytest.approx([0.75, 1.0, 1.5, 2.0, 2.0])


def test_the_simulator_gets_the_requests_as_the_server_saw_them() -> None:
    load = Load([], start_s=100.0, answers=[answer(101.5), answer(103.0, prompt_tokens=None)])
    first, second = as_sent(load)
    assert (first.arrival_s, second.arrival_s) == (1.5, 3.0)
    assert [one.turns[0].prompt_tokens for one in (first, second)] == [18, 20]
    turn = first.turns[0]
    assert turn.output_tokens == 3
    assert turn.slo.resolve(9.0, 9.0) == TARGETS
    assert turn.slo.name == SLO(ttft=1).name, "the server learns lengths of one class"


@pytest.mark.parametrize("policy", POLICIES)
def test_the_server_splits_prompts_where_the_simulator_does(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[dict[str, Any]] = []

    def make(name: str, **settings: Any) -> Planner:
        made.append(settings)
        return make_planner(name, **settings)

    monkeypatch.setattr(simulation, "make_planner", make)
    setup = Setup(device=find_device("opt-6.7b-a100"), policy=policy)
    simulation.planner_of(setup, QuantileLengths())
    args = build_parser().parse_args(["serve", "--policy", policy, *form_flags(policy)])
    served = EngineConfig.create(**given(args, EngineConfig))
    assert [one["chunked_prefill"] for one in made] == [served.chunked_prefill]


def test_requests_of_the_first_and_last_seconds_are_left_out() -> None:
    times = [LEAD_S + 9.9, 0.0, LEAD_S, LEAD_S - 0.1, LEAD_S + 10.0]
    all_of_them = [replace(verdicts(0.1)[0], arrival_s=one) for one in times]
    assert [one.arrival_s for one in counted(all_of_them, 10.0)] == [LEAD_S, LEAD_S + 9.9]


def test_errors_are_relative_for_times_and_absolute_for_attainment() -> None:
    found = errors(verdicts(0.1, 0.2, 0.4), verdicts(0.1, 0.25, 0.2, tpot_s=0.04, late=1))
    assert found["ttft_p50"] == pytest.approx(0.0)
    assert found["ttft_p90"] == pytest.approx(-0.375)
    assert found["tpot_p50"] == pytest.approx(-0.2)
    assert found["attainment"] == pytest.approx(-1 / 3)


def test_a_percentile_that_only_one_side_has_is_infinitely_wrong() -> None:
    real = verdicts(None, None, 0.1)
    assert errors(real, verdicts(0.1, 0.1, 0.1))["ttft_p50"] == math.inf
    assert errors(verdicts(0.1, 0.1, 0.1), real)["ttft_p50"] == math.inf
    assert errors(real, real)["ttft_p50"] == 0.0
    assert json.loads(json.dumps(row(real, verdicts(0.1)).to_dict()))["errors"]["ttft_p50"] is None


@pytest.mark.parametrize(
    ("simulated", "met"),
    [
        (verdicts(*[0.109] * 40), True),
        (verdicts(*[0.111] * 40), False),
        (verdicts(*[0.089] * 40), False),
        (verdicts(*[0.1] * 40, tpot_s=0.056), False),
        (verdicts(*[0.1] * 40, late=2), True),
        (verdicts(*[0.1] * 40, late=3), False),
    ],
)
def test_goals_are_10_percent_of_medians_and_5_points_of_attainment(
    simulated: list[Verdict], met: bool
) -> None:
    assert row(verdicts(*[0.1] * 40), simulated).within_goals is met


def test_a_report_and_a_picture_are_made_where_requests_got_no_token(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row(verdicts(None, 0.1), verdicts(0.2, 0.3)), row(verdicts(None), verdicts(None))]
    print_table(rows)
    assert "missed" in capsys.readouterr().out
    plot(rows, str(tmp_path / "picture.png"))
    assert (tmp_path / "picture.png").stat().st_size > 1000
