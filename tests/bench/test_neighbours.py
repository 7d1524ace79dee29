"""The bench of noisy neighbours: its arithmetic, its flags, and its engines on a tiny model."""

from __future__ import annotations

from argparse import ArgumentTypeError
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest
from neighbours import (
    ALONE,
    BUSY_LOOP,
    OTHER,
    EngineProcess,
    busy_engine,
    environment,
    parse_args,
    summary,
)


def test_the_worst_neighbour_counts_and_medians_forgive_a_hiccup() -> None:
    found = summary({ALONE: [1.0, 1.2, 9.0, 1.1], BUSY_LOOP: [2.0, 3.0], OTHER: [4.6, 0.1, 99.0]})
    assert found == {ALONE: 1.15, BUSY_LOOP: 2.5, OTHER: 4.6, "worst_ratio": 4.0}


def test_a_variant_is_one_variable_or_several() -> None:
    args = parse_args(["--variants", "OMP_WAIT_POLICY=passive", "A=1,B=x=y"])
    assert args.variants == [{"OMP_WAIT_POLICY": "passive"}, {"A": "1", "B": "x=y"}]


@pytest.mark.parametrize("text", ["passive", "=1", "A=1,", ""])
def test_anything_but_variables_is_refused(text: str) -> None:
    with pytest.raises(ArgumentTypeError, match="OMP_WAIT_POLICY=passive"):
        environment(text)


def test_engines_decode_when_told_and_end_with_their_context(tiny_llama_dir: Path) -> None:
    args = parse_args(["--model", str(tiny_llama_dir), "--tokens", "3"])
    with ExitStack() as stack:
        lone, other = (EngineProcess(kind, args, {}, stack) for kind in ("timed", "busy"))
        for _ in range(2):  # it goes on where its model's length ends
            with busy_engine(other):
                assert lone.seconds() > 0
            assert lone.seconds() > 0
        pids = [lone.pid, other.pid]
    assert not any(psutil.pid_exists(pid) for pid in pids)


def test_an_engine_that_cannot_load_its_model_says_why() -> None:
    args = parse_args(["--model", "/nowhere"])
    with ExitStack() as stack, pytest.raises(SystemExit, match="no model at '/nowhere'"):
        EngineProcess("timed", args, {}, stack)
