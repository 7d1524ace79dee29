"""What an SLO may say, and what it comes to in seconds."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
from slo_targets import targets

from minserve.errors import InvalidSLOError
from minserve.slo.objectives import (
    SLO,
    DecodeStage,
    OnUnattainable,
    Targets,
    Task,
    preset_classes,
)

# --- what may be asked for ---

NO_SECONDS = [0, -1, -0.0, math.nan, math.inf, -math.inf, True, "5", [1], 1e308, 10**400, 1e6 + 1]
NO_SLOWDOWN = [0.99, *NO_SECONDS]
NO_COUNT = [0, -1, True, 1.0, math.nan, "5", 2**31, 10**400, 10**5000]


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("ttft", NO_SECONDS),
        ("tpot", NO_SECONDS),
        ("ttft_slowdown", NO_SLOWDOWN),
        ("tpot_slowdown", NO_SLOWDOWN),
        ("value", NO_SECONDS),
        ("expected_output_tokens", NO_COUNT),
        ("on_unattainable", ["", "drop", True, 1, ["reject"], 10**5000]),
    ],
)
def test_a_bad_value_is_refused_by_its_fields_name(field: str, values: list[Any]) -> None:
    other = {"tpot": 1.0} if field == "ttft" else {"ttft": 1.0} if field != "ttft_slowdown" else {}
    for value in values:
        with pytest.raises(InvalidSLOError) as caught:
            SLO(**{**other, field: value})
        assert caught.value.param == field, value
        assert len(str(caught.value)) < 500


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("tpot", NO_SECONDS),
        ("tpot_slowdown", NO_SLOWDOWN),
        ("tokens", NO_COUNT),
        ("until", ["", 5, True, ["</think>"]]),
    ],
)
def test_a_bad_value_of_a_stage_is_refused_by_its_fields_name(
    field: str, values: list[Any]
) -> None:
    for value in values:
        with pytest.raises(InvalidSLOError) as caught:
            DecodeStage(**{field: value})
        assert caught.value.param == field, value


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"ttft": 1.0, "ttft_slowdown": 2.0}, "ttft_slowdown"),
        ({"tpot": 1.0, "tpot_slowdown": 2.0}, "tpot_slowdown"),
        ({"tpot": 1.0, "stages": [DecodeStage(tpot=1.0)]}, "stages"),
        ({"tpot_slowdown": 2.0, "stages": [DecodeStage(tpot=1.0)]}, "stages"),
        ({"stages": [DecodeStage(tpot=1.0), DecodeStage(tpot=2.0)]}, "stages"),
        ({"stages": [DecodeStage(tpot=1.0, until="x")]}, "stages"),
        ({"stages": [DecodeStage(tpot=1.0, tokens=5)]}, "stages"),
        ({}, None),
        ({"expected_output_tokens": 5}, None),
        ({"stages": [DecodeStage(until="x"), DecodeStage()]}, None),
    ],
)
def test_contradictions_and_empty_promises_are_refused(
    fields: dict[str, Any], param: str | None
) -> None:
    with pytest.raises(InvalidSLOError) as caught:
        SLO(**fields)
    assert caught.value.param == param


def test_a_stage_has_one_pace_and_one_end() -> None:
    for fields in ({"tpot": 1.0, "tpot_slowdown": 2.0}, {"until": "x", "tokens": 5}):
        with pytest.raises(InvalidSLOError):
            DecodeStage(**fields)


def test_objectives_become_seconds_on_a_device() -> None:
    assert SLO(ttft=0.5, tpot=0.1).resolve(9.0, 9.0) == targets(0.5, (0.1,))
    slow = SLO(ttft_slowdown=3, tpot_slowdown=2)
    assert slow.resolve(0.25, 0.01) == targets(0.75, (0.02,))
    assert slow.needs_profile
    assert SLO(ttft=1.0).resolve(9.0, 9.0) == targets(1.0, (math.inf,))
    assert not SLO(ttft=1.0).needs_profile
    staged = SLO(stages=[DecodeStage(tpot_slowdown=4, until="x"), DecodeStage()])
    assert staged.resolve(9.0, 0.01) == targets(math.inf, (0.04, "x"), (math.inf,))
    assert staged.needs_profile


def test_the_presets_are_those_of_the_paper() -> None:
    """SLOs-Serve (arXiv 2504.08784), at a prefill of 0.1 s."""
    resolved = {name: slo.resolve(0.1, 9.0) for name, slo in preset_classes().items()}
    assert resolved == {
        "summarization": targets(pytest.approx(0.3), (0.1,)),
        "coding": targets(0.5, (0.05,)),
        "chatbot": targets(0.5, (0.1,)),
        "tool_loop": targets(pytest.approx(0.3), (0.05,)),
        "tool_final": targets(pytest.approx(0.3), (0.1,)),
        "reasoning": targets(pytest.approx(0.3), (0.05, "</think>"), (0.1,)),
        "interactive": targets(0.5, (0.1,)),
        "batch": Targets(finish_s=60.0),
    }
    for name, slo in preset_classes().items():
        assert slo.name == name
        assert slo.on_unattainable is OnUnattainable.BEST_EFFORT
    assert preset_classes()["coding"].named("x") == replace(preset_classes()["coding"], name="x")


def test_an_output_behind_the_thinking_has_the_pace_of_the_answer() -> None:
    think = DecodeStage(tpot=0.05, until="</think>")
    slo = SLO(ttft=1.0, stages=(think, DecodeStage(tpot=0.1)), name="reasoning")
    assert slo.behind("</think>") == SLO(ttft=1.0, tpot=0.1, name="reasoning")
    assert slo.behind("other") == slo
    three = SLO(stages=(think, DecodeStage(tpot=0.2, tokens=5), DecodeStage(tpot=0.1)))
    assert three.behind("</think>") == SLO(stages=three.stages[1:])
    # One that promises nothing of the answer stays as it is.
    alone = SLO(stages=(think, DecodeStage()))
    assert alone.behind("</think>") == alone


@pytest.mark.parametrize(
    "promised", [{"ttft": 1.0}, {"finish": 5.0}, {"task": Task(id="a", finish=5.0)}]
)
def test_what_is_promised_of_the_whole_answer_is_left_behind_the_thinking(
    promised: dict[str, Any],
) -> None:
    think = DecodeStage(tpot=0.05, until="</think>")
    slo = SLO(stages=(think, DecodeStage()), **promised)
    assert slo.behind("</think>") == SLO(**promised)
