"""Pictures are real files; what stands in the way of one is said before it is needed."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

from minserve.errors import WorkloadError
from minserve.slo.objectives import StageTarget, Targets
from minserve.workload import plots
from minserve.workload.verdict import Cause, Verdict

RUN = [
    Verdict(name=name, arrival_s=float(i), cause=cause, attained_mean=cause is None,
            output_tokens=9, ttft_s=ttft, tpot_s=0.04)
    for name in ("chatbot", "coding")
    for i, (cause, ttft) in enumerate([(None, 0.2), (Cause.LATE_TTFT, 1.0), (Cause.FAILED, None)])
]  # fmt: skip


def is_picture(file: Path) -> bool:
    return file.read_bytes().startswith(b"\x89PNG")


def test_attainment_is_drawn_with_a_line_per_label(tmp_path: Path) -> None:
    lines = {"dp": {2.0: [0.5, 0.6], 1.0: [1.0, 0.98]}, "fcfs": {1.0: [0.2], 2.0: []}, "none": {}}
    plots.plot_attainment(lines, tmp_path / "rates.png")
    assert is_picture(tmp_path / "rates.png")


@pytest.mark.parametrize("verdicts", [RUN, RUN[2:3], []], ids=["some", "no token", "none"])
def test_a_run_is_drawn_with_its_slos(tmp_path: Path, verdicts: list[Verdict]) -> None:
    targets = {"coding": Targets(ttft_s=0.5, stages=(StageTarget(0.05),))}
    plots.plot_run(verdicts, 3.0, tmp_path / "run.png", targets=targets)
    assert is_picture(tmp_path / "run.png")


@pytest.mark.parametrize(
    ("name", "word"), [("run.txt", "must end in"), ("nowhere/run.png", "No such file")]
)
def test_a_file_that_cannot_be_drawn_is_named_beforehand(
    tmp_path: Path, name: str, word: str
) -> None:
    with pytest.raises(WorkloadError, match=word):
        plots.check_can_plot(tmp_path / name)


def test_looking_whether_a_file_can_be_drawn_leaves_nothing_behind(tmp_path: Path) -> None:
    plots.check_can_plot(tmp_path / "run.png")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old.png").write_bytes(b"kept")
    plots.check_can_plot(tmp_path / "old.png")
    assert (tmp_path / "old.png").read_bytes() == b"kept"


def test_without_matplotlib_the_error_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(WorkloadError, match=r"pip install -e '\.\[plot\]'"):
        plots.check_can_plot(tmp_path / "run.png")
