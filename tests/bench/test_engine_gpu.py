"""The last line of the engine's sweep: goals are met by figures that were measured, or not told."""

from __future__ import annotations

from typing import Any

import pytest
from engine_gpu import GOAL_BATCH, GOAL_MODEL, summary

from parts.engine_gpu.idle import IdleMeter


def result(ratio: float, *, graphs: bool = True, **more: Any) -> dict[str, Any]:
    decode = [{"batch": 1, "ratio": 9.0}, {"batch": GOAL_BATCH, "ratio": ratio}]
    return {"model": GOAL_MODEL, "cuda_graphs": graphs, "decode": decode, **more}


@pytest.mark.parametrize(
    ("ratio", "r2", "met"), [(1.15, 0.99, True), (1.25, 0.99, False), (1.15, 0.9, False)]
)
def test_the_goals_are_those_of_the_engine_as_it_serves(ratio: float, r2: float, met: bool) -> None:
    # What is faster without graphs serves nobody.
    results = [result(ratio, profile={"r2": r2}), result(1.0, graphs=False)]
    told = summary(results, 3000.0)
    assert told["decode_ratio_opt_6.7b_b64"] == ratio
    assert told["goals_met"] is met


@pytest.mark.parametrize("results", [[], [result(1.1)], [{**result(1.1), "decode": []}]])
def test_what_was_not_measured_is_not_met(results: list[dict[str, Any]]) -> None:
    assert summary(results, None)["goals_met"] is None


def test_idle_is_the_time_between_pieces_of_work() -> None:
    meter = IdleMeter(None)
    assert meter.seconds() == (0.0, 0.0)
    meter._marks = [(1.0, 2.0), (2.5, 3.0), (3.0, 5.0)]
    assert meter.seconds() == (0.5, 4.0)
