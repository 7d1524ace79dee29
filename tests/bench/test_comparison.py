"""Comparisons as programs: flags, the file of the turns, what is said at the end."""

from __future__ import annotations

import json
from pathlib import Path

import policies
import pytest
import versus_vllm

from minserve.exit_codes import EXIT_INTERRUPTED
from minserve.workload.reference import Reference
from minserve.workload.zero_load import ZeroLoad
from shared.paired import comparison
from shared.paired.comparison import estimate_s, finish, open_store
from shared.paired.runs import TURN_EXTRA_S, Effort


def test_without_a_name_results_are_kept_under_one_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(comparison, "CACHE", tmp_path / "peers")
    args = policies.parse_args([])
    store = open_store(args, "policies", {}, ["dp", "edf"], "smollm2")
    assert store.file is not None
    assert store.file.parent == tmp_path / "bench"
    args = policies.parse_args(["--results", str(store.file)])
    with pytest.raises(SystemExit, match="--resume"):
        open_store(args, "policies", {}, ["dp", "edf"], "smollm2")
    args = policies.parse_args(["--resume", str(store.file)])
    assert open_store(args, "policies", {}, ["dp", "edf"], "smollm2").results == []
    args = policies.parse_args(["--resume", str(store.file), "--seed", "1"])
    with pytest.raises(SystemExit, match="other settings: seed"):
        open_store(args, "policies", {}, ["dp", "edf"], "smollm2")


def test_slos_may_be_meant_by_an_idle_speed_from_a_file(tmp_path: Path) -> None:
    idle = tmp_path / "idle.json"
    Reference.now(ZeroLoad(0.02, 0.001, 0.03), "smollm2", "somebody").save(idle)
    flags = ["--zero-load", str(idle), "--results"]
    args = policies.parse_args([*flags, str(tmp_path / "a.json")])
    store = open_store(args, "policies", {}, ["dp"], "smollm2")
    assert store.reference == Reference.load(idle)
    args = policies.parse_args([*flags, str(tmp_path / "b.json")])
    with pytest.raises(SystemExit, match="not of 'other'"):
        open_store(args, "policies", {}, ["dp"], "other")


def test_cells_are_those_of_the_flags() -> None:
    cells = policies.cells_of(policies.parse_args([]))
    assert len(cells) == 2 * 3 * 4 * 2
    assert [cell.busy for cell in cells] == [False] * 24 + [True] * 24
    assert all(cell.loose == 2 * cell.tight for cell in cells)
    quick = policies.cells_of(policies.parse_args(["--quick"]))
    assert [cell.rate for cell in quick] == [1.5, 6.0]
    told = versus_vllm.parse_args(["--rates", "mixed=2,1", "reasoning=3", "--scenarios", "mixed"])
    assert [(cell.scenario, cell.rate) for cell in versus_vllm.cells_of(told)] == [
        ("mixed", 1.0),
        ("mixed", 2.0),
    ]
    assert len(versus_vllm.cells_of(versus_vllm.parse_args([]))) == 7


@pytest.mark.parametrize(
    "flags", [["--rates", "dance=3"], ["--rates", "mixed"], ["--rates", "mixed=0"],
              ["--scenarios", "reasoning"]],
)  # fmt: skip
def test_senseless_rates_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        versus_vllm.parse_args(flags)


@pytest.mark.parametrize(
    "flags", [["--policies", "edf"], ["--policies", "dp,lifo"], ["--beside", "wind"],
              ["--rates", "0"], ["--tight", "0.5"], ["--scenarios", "dance"]],
)  # fmt: skip
def test_senseless_cells_are_refused(flags: list[str]) -> None:
    with pytest.raises(SystemExit):
        policies.parse_args(flags)


def test_the_estimate_grows_with_the_turns() -> None:
    effort = Effort(seconds=0.3, pairs=2, lengths=0.01, seed=0, rounds=1)
    short, long = (estimate_s(n, effort, 2, 10.0) for n in (10, 20))
    assert long - short == pytest.approx(10 * (effort.seconds + TURN_EXTRA_S))


@pytest.mark.parametrize(("done", "code"), [(True, 0), (False, EXIT_INTERRUPTED)])
def test_the_end_tells_the_result_and_whether_it_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], done: bool, code: int
) -> None:
    args = policies.parse_args(["--json", "--results", str(tmp_path / "turns.json")])
    store = open_store(args, "policies", {}, ["dp"], "smollm2")
    with pytest.raises(SystemExit) as ended:
        finish(args, {"below": []}, done, store)
    assert ended.value.code == code
    caveats, told = capsys.readouterr().out.splitlines()
    assert caveats == "nothing was measured"
    expected = {"below": [], "complete": done, "reference": None, **store.settings}
    assert json.loads(told) == json.loads(json.dumps(expected))
