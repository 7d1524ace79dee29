from __future__ import annotations

import pytest

from minserve.planner.predict.lone_request import describe_misses, lone_request_misses
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.slo.objectives import SLO, DecodeStage

MODEL = PerfModel([Piece(tokens=0.001, base=0.02)], margin=1.2)


def test_classes_that_the_device_can_keep_are_not_mentioned() -> None:
    classes = {"slow": SLO(ttft=5.0, tpot=0.1), "scaled": SLO(ttft_slowdown=3, tpot_slowdown=2)}
    assert lone_request_misses(classes, MODEL) == []
    assert describe_misses([]) == ""


def test_each_impossible_objective_is_named_with_what_it_would_take() -> None:
    stages = (DecodeStage(tpot=0.01, until="</think>"), DecodeStage(tpot=0.1))
    classes = {"both": SLO(ttft=0.1, tpot=0.01), "thinking": SLO(stages=stages)}
    misses = lone_request_misses(classes, MODEL, num_tokens=200)
    assert [(one.name, one.objective) for one in misses] == [
        ("both", "ttft"),
        ("both", "tpot"),
        ("thinking", "tpot of stage 1"),
    ]
    # A margin of 1.2 is what nine of ten iterations keep: a prompt is one, a pace is many.
    assert misses[0].needed_s == pytest.approx(0.22 * 1.2, rel=0.02)
    assert 0.021 < misses[1].needed_s < 1.05 * 0.021
    table = describe_misses(misses, 200)
    assert "thinking" in table
    assert f"{misses[0].needed_s * 1e3:.1f} ms" in table


def test_a_slowdown_smaller_than_the_noise_is_a_miss() -> None:
    assert lone_request_misses({"tight": SLO(ttft_slowdown=1.1)}, MODEL)
