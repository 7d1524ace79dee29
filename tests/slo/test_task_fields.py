"""A task as people write it, and what it changes of a class."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from minserve.errors import ConfigError, InvalidSLOError
from minserve.slo.objectives import MOST_ID, SLO, Task, preset_classes
from minserve.slo.slo_fields import load_classes, parse_slo


def parse(values: dict[str, Any]) -> SLO:
    return parse_slo(values, where="slo", classes=preset_classes(), thinking_marker=None)


def test_a_task_is_an_objective_alone_or_beside_others() -> None:
    alone = parse({"task": {"id": "a", "finish_ms": 1500, "calls": 3}})
    assert alone == SLO(task=Task(id="a", finish=1.5, calls=3))
    beside = parse({"ttft_ms": 100, "task": {"id": "a", "finish_ms": 1500, "calls": None}})
    assert beside == SLO(ttft=0.1, task=Task(id="a", finish=1.5))


def test_a_task_leaves_a_class_its_name_and_objectives() -> None:
    slo = parse({"class": "coding", "task": {"id": "a", "finish_ms": 1500}})
    coding = preset_classes()["coding"]
    assert (slo.name, slo.ttft_slowdown, slo.tpot) == ("coding", 5, coding.tpot)
    assert slo.task == Task(id="a", finish=1.5)
    # An objective of the request's own makes it another class, as without a task.
    assert parse({"class": "coding", "ttft_ms": 5, "task": {"id": "a", "finish_ms": 9}}).name == (
        "custom"
    )


@pytest.mark.parametrize("name", ["a" * MOST_ID, "\u00e9", "a b", "\U0001f600"])
def test_any_printable_id_is_taken(name: str) -> None:
    assert parse({"task": {"id": name, "finish_ms": 5}}).task.id == name


@pytest.mark.parametrize(
    "name", ["", "a" * (MOST_ID + 1), "\n", "a\u200b", "\ud800", "\x00", 5, None, True, ["a"]]
)
def test_any_other_id_is_refused(name: Any) -> None:
    with pytest.raises(InvalidSLOError) as caught:
        parse({"task": {"id": name, "finish_ms": 5}})
    assert caught.value.param == "slo.task.id"
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize("finish", [0.0, -1.0, math.nan, math.inf, 1e9, True, "5"])
def test_a_task_in_python_is_checked_too(finish: Any) -> None:
    with pytest.raises(InvalidSLOError, match="finish"):
        Task(id="a", finish=finish)


def test_a_class_cannot_have_a_task(tmp_path: Path) -> None:
    file = tmp_path / "classes.toml"
    file.write_text('[agent]\ntask = {id = "a", finish_ms = 5}\n')
    with pytest.raises(ConfigError, match=r"agent\.task: is not a field here"):
        load_classes(file)
