"""The grid of the noise bench, its arithmetic, and a cell of it end to end."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from noise import main

from parts.noise.cases import CPU, GPU, Base, Noisy, Run, Setting, Weather
from parts.noise.grid import POLICIES, SCENARIOS, TIGHTS, Grid
from parts.noise.plots import draw
from parts.noise.report import rows_of, spread, summary, table
from shared.simulated.jobs import Job, Result

AXES = ("scenario", "kind", "noise", "load", "tight")
CODING = Setting(device=CPU, tight=1.4, scenario="coding")
ONE = {
    "device": [CPU], "scenario": ["coding"], "tight": ["1.4"],
    "kind": ["steady"], "noise": ["0.1"], "load": ["0.5"],
}  # fmt: skip


def shares(attainment: dict[str, tuple[float, ...]], capacity: float = 2.0):
    """Results as if every cell were alike: attainment by policy and seed."""

    def found(job: Job) -> Result | None:
        if isinstance(job, Run):
            return {"attainment": attainment[job.policy][job.seed], "offered": 150}
        if isinstance(job, Noisy):
            return {"capacity": (1.0 if job.clairvoyant else 0.5) * (4.0 - 10 * job.weather.noise)}
        return {"capacity": capacity}

    return found


@pytest.mark.parametrize("quick", [False, True])
def test_in_the_cells_that_are_measured_any_two_values_of_two_axes_meet(quick: bool) -> None:
    cells = [cell.values for cell in Grid(quick=quick).cells()]
    assert len({tuple(cell.values()) for cell in cells}) == len(cells)
    everything = [cell.values for cell in Grid(quick=quick, only={"part": ["grid"]}).cells()]
    for one, other in combinations(AXES, 2):
        possible = {(cell[one], cell[other]) for cell in everything}
        assert {(cell[one], cell[other]) for cell in cells} == possible, (one, other)
    loads = {cell["load"] for cell in everything}
    assert len(cells) * len(loads) == len(everything)


def test_all_scenarios_and_paces_are_measured() -> None:
    settings = {cell.setting for cell in Grid().cells()}
    assert {s.scenario for s in settings if s.device == GPU} == set(SCENARIOS)
    assert {(s.scenario, s.tight) for s in settings if s.device == CPU} == {
        (scenario, tight) for scenario in SCENARIOS for tight in TIGHTS
    }


def test_filters_leave_what_they_name() -> None:
    (cell,) = Grid(only=ONE).cells()
    assert cell.name == "xeon-amx tight 1.4 coding steady noise 0.1 load 0.5"
    assert not list(Grid(only=ONE).capacities())
    both = Grid(only=ONE | {"noise": ["0.1", "0.2"]})
    assert [one.weather.noise for one in both.cells()] == [0.1, 0.2]
    capacities = Grid(only={"part": ["capacity"], "scenario": ["mixed"]}, bound=True)
    assert not list(capacities.cells())
    assert [(noise, told) for _, noise, told, _ in capacities.capacities()] == [
        (noise, told) for noise in (0.0, 0.05, 0.1, 0.2) for told in (False, True)
    ]


def test_all_policies_meet_the_same_requests_at_a_multiple_of_the_capacity() -> None:
    grid = Grid(only=ONE)
    (cell,) = grid.cells()
    assert grid.runs(cell, lambda _: None) == {}
    assert grid.jobs(lambda _: None) == [grid.base(CODING)]
    found = shares(dict.fromkeys(POLICIES, (0.5, 0.5)), capacity=6.0)
    runs = grid.runs(cell, found)
    assert {(run.rate, run.seed) for each in runs.values() for run in each} == {(3.0, 0), (3.0, 1)}
    run = runs["dp"][0]
    assert CODING.workload(3.0, run.seconds, 0) == CODING.workload(3.0, run.seconds, 0)
    assert [len(CODING.workload(rate, 60.0, 0)) for rate in (1.0, 5.0, 50.0)] == [150, 300, 600]
    assert not any(
        isinstance(job, Base) for job in Grid(only=ONE, rates={CODING.name: 6.0}).jobs(found)
    )


def test_devices_scatter_as_their_weather_says() -> None:
    steady = CODING.setup("dp", Weather(noise=0.2), 3)
    assert (steady.noise, steady.speed_steps, steady.stall_every_s, steady.slowness) == (
        0.2, 1.0, None, 1.0,
    )  # fmt: skip
    drifting = CODING.setup("dp", Weather(kind="drifting"), 3)
    assert (drifting.noise, drifting.speed_steps, drifting.stall_every_s) == (0.0, 2.0, 30.0)
    slower, faster = (CODING.setup("dp", Weather(kind=k), 3).slowness for k in ("slower", "faster"))
    assert slower * faster == 1.0
    assert (steady.kv_tokens, steady.overhead_s, steady.device.name[:6]) == (
        186_000,
        0.002,
        "smollm",
    )
    gpu = Setting(device=GPU, tight=0.0, scenario="tools").setup("dp", Weather(), 0)
    assert (gpu.device.name, gpu.overhead_s, gpu.kv_tokens) == ("toolllama-7b-a100", 0.0, None)


def test_regret_is_what_the_best_of_the_others_attains_more() -> None:
    grid = Grid(only=ONE)
    each = dict.fromkeys(POLICIES, (0.5, 0.5)) | {"dp": (0.6, 0.8), "vllm": (0.9, 0.7)}
    (row,) = rows_of(grid, shares(each))
    assert (row["best_other"], row["regret"], row["requests"]) == ("vllm", 0.1, 300)
    # Seeds disagree by far more than independent requests would: 0.3 and -0.1.
    assert row["spread"] == pytest.approx(0.2)
    assert rows_of(grid, lambda _: None) == []
    (alone,) = rows_of(Grid(only=ONE, policies=("dp",)), shares(each))
    assert "regret" not in alone


def test_the_spread_of_one_seed_is_that_of_independent_requests() -> None:
    assert spread([0.5], [0.5], 100) == pytest.approx((0.5 / 100) ** 0.5)
    assert spread([0.5, 0.5], [0.4, 0.4], 200) == pytest.approx(((0.25 + 0.24) / 200) ** 0.5)


def test_a_summary_names_the_worst_cell_and_capacities_over_noise(tmp_path: Path) -> None:
    grid, each = Grid(bound=True), dict.fromkeys(POLICIES, (0.5, 0.5)) | {"dp": (0.4, 0.4)}
    usual = shares(each)
    bad = next(cell for cell in grid.cells() if cell.setting.scenario == "tools")

    def found(job: Job) -> Result | None:
        if isinstance(job, Run) and job in grid.runs(bad, usual)["dp"]:
            return {"attainment": 0.1, "offered": 150}
        return usual(job)

    rows = rows_of(grid, found)
    figures = summary(grid, found, rows)
    assert figures["cells"] == figures["behind"] == len(rows)
    assert figures["worst_regret"]["cell"] == bad.name
    assert figures["worst_regret"]["regret"] == pytest.approx(0.4)
    assert figures["mean_regret_by"]["scenario"]["coding"] == pytest.approx(0.1)
    assert figures["capacity_at_noise"]["mixed"] == {"0": 2.0, "0.05": 1.75, "0.1": 1.5, "0.2": 1.0}
    assert figures["capacity_ratio_at_noise"]["mixed"]["0.2"] == 0.5
    # Of a planner that is told, over what the one that is not has without noise.
    assert figures["clairvoyant_capacity_ratio_at_noise"]["mixed"]["0.2"] == 1.0
    assert bad.name in table(figures)
    assert "0.2: 1.0 (0.50)" in table(figures)
    draw({**figures, "rows": rows}, tmp_path / "noise.png")
    assert (tmp_path / "noise.png").read_bytes().startswith(b"\x89PNG")


def run(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    assert main(flags) == 0
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_cell_is_measured_again_from_its_name(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = tmp_path / "first.json", tmp_path / "second.json"
    first.write_text(json.dumps({"noise_free_capacity": {CODING.name: 2.0, "other": None}}))
    only = ",".join(f"{name}={value}" for name, (value,) in ONE.items())
    flags = ["--only", only, "--policies", "dp,sarathi", "--rates-of", str(first), "--json"]
    figures = run(capsys, *flags, "--out", str(second), "--plot", str(tmp_path / "cell.png"))
    assert figures["complete"]
    assert figures["cells"] == 1
    assert figures["noise_free_capacity"] == {CODING.name: 2.0}
    whole = json.loads(second.read_text())
    (row,) = whole.pop("rows")
    assert whole == figures
    assert row["rate"] == 1.0
    # Two runs of the fewest requests.
    assert row["requests"] == 300
    assert (tmp_path / "cell.png").exists()
    again = run(capsys, *flags, "--jobs", "1")
    assert again["worst_regret"] == figures["worst_regret"]


def test_the_noise_free_capacity_is_searched_where_no_other_run_tells() -> None:
    tools = Setting(device=CPU, tight=1.4, scenario="tools")
    rate = Base(setting=tools, seconds=20.0, start=5.4).run()["capacity"]
    run = Run(setting=tools, weather=Weather(), policy="dp", rate=rate, seed=0, seconds=20.0)
    assert run.run()["attainment"] == pytest.approx(0.9, abs=0.06)


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--only", "noises=0.2"], "is not like noise=0.2; there are part, device"),
        (["--policies", "dp,distserve"], "no policy 'distserve'"),
        (["--rates-of", "/dev/null"], "is no result of this"),
        (["--jobs", "0"], "--jobs must be at least 1"),
        (["--plot", "noise.doc"], "must end in"),
    ],
)
def test_wrong_flags_are_refused_before_anything_runs(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(flags)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_a_filter_that_leaves_nothing_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--only", "noise=0.3"]) == 2
    assert "no cell and no capacity is like that" in capsys.readouterr().err
