"""`bench/gpu.sh`: all that a GPU machine runs, here on a CPU; stages that fail or never end."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import wait_until

from parts.gpu import stages as gpu_stages
from parts.gpu.stages import (
    GPU_TESTS,
    NEEDED,
    Stage,
    all_stages,
    chosen,
    environment,
    last_line,
    link_packages,
    run_stage,
    stages,
    tuning,
)

ROOT = Path(__file__).parents[2]
# A dry run of all stages is a minute's work, and several minutes' beside other programs.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def dry_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict, str]:
    """The last line, the written report, and all that was printed."""
    out = tmp_path_factory.mktemp("results")
    done = script(out, "--dry")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    return told, json.loads(Path(told["written"]).read_text()), done.stdout


def script(out: Path, *flags: str) -> subprocess.CompletedProcess:
    """A call of the script, with the interpreter of these tests."""
    return subprocess.run(
        ["bench/gpu.sh", "--out", str(out), *flags],
        cwd=ROOT,
        env={**os.environ, "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )


def test_all_stages_pass_without_a_gpu(dry_run: tuple[dict, dict, str]):
    told, report, _ = dry_run
    assert told["passed"] is True
    assert list(report["stages"]) == [
        "ceilings", "tests", "parity", "kernels", "engine", "http", "ranks"
    ]  # fmt: skip
    assert all(stage["passed"] for stage in report["stages"].values())
    assert report["stages"]["parity"]["summary"]["rows"][0]["wrong"] == 0
    assert report["stages"]["http"]["summary"]["tokens_s"] > 0
    # Rows move into the report when their stage ends.
    assert not list(Path(told["written"]).parent.glob("*.jsonl"))


def test_every_kernel_was_checked_beside_its_competitors(dry_run: tuple[dict, dict, str]):
    rows = dry_run[1]["stages"]["kernels"]["rows"]
    assert {row["kernel"] for row in rows} == {
        "decode", "prefill", "rms_norm", "layer_norm", "qk_norm", "silu_mul",
        "gelu_tanh_mul", "write_kv", "bias_relu",
        "truncation", "packed_linear",
    }  # fmt: skip
    for row in rows:
        assert row["error"]["minserve"] < 1e-3
        competitor = "cublas" if row["kernel"] == "packed_linear" else "torch"
        assert row["error"][competitor] < 1e-3
        if row["kernel"] in ("decode", "prefill"):
            assert row["error"]["sdpa"] < 1e-3


def test_a_dry_run_pretends_to_no_measurement(dry_run: tuple[dict, dict, str]):
    told, report, printed = dry_run
    assert told["dry"] is True
    assert "dry run: nothing below is a measurement" in printed
    kernels, engine = report["stages"]["kernels"], report["stages"]["engine"]
    assert all(row["dry"] and "share" not in row for row in kernels["rows"])
    assert kernels["summary"]["ceilings"] is None
    assert kernels["summary"]["goals_met"] is None
    assert engine["summary"]["copy_gb_s"] is None
    assert all(row["dry"] and "ratio" not in row["decode"][0] for row in engine["rows"])


def test_draws_with_top_p_are_timed_beside_greedy_ones(dry_run: tuple[dict, dict, str]):
    for row in dry_run[1]["stages"]["engine"]["rows"]:
        assert row["drawn"]["greedy_ms"] > 0
        assert row["drawn"]["top_p_ms"] > 0
        assert row["verification"]["ms"] > 0
        assert row["engine"]["trace"]["steps"] == 5
        assert row["engine"]["trace"]["busy_share"] is None, "a CPU is no device that is traced"
        assert row["memory"]["after_run"]["kv_blocks"] > 0


def test_a_dry_run_goes_the_ways_of_a_gpu(dry_run: tuple[dict, dict, str]):
    stages = dry_run[1]["stages"]
    assert stages["kernels"]["summary"]["uncompiled"] == []
    (row,) = stages["engine"]["rows"]
    assert row["cuda_graphs"]
    assert row["graphs"] > 0
    assert [mixed["graph"] for mixed in row["mixed"]] == [True]
    assert row["engine"]["plans_ahead"]["launched"] > 0
    assert row["engine"]["idle"].keys() == {"behind", "after"}


def test_streams_are_told_beside_what_server_and_client_took(dry_run: tuple[dict, dict, str]):
    told = dry_run[1]["stages"]["http"]["summary"]
    assert told["engine"]["iterations"] >= 40
    assert told["engine"]["iteration_ms"] > 0
    assert told["cores"].keys() == {"http", "engine", "readers", "client"}
    assert told["ttft_ms"] > 0
    assert told["tpot_ms"] >= 0  # of a client that was kept from reading, all come at once


@pytest.mark.parametrize("dry", [True, False])
def test_the_files_that_stages_name_exist(dry: bool, tmp_path: Path):
    every = [*stages(dry, tmp_path / "gpu"), *tuning(dry)]
    words = [word for stage in every for word in stage.command]
    named = [word for word in words if word.startswith(("bench/", "tests/"))]
    assert {"bench/kernel_bench.py", "bench/engine_gpu.py"} <= {*named}
    assert {*GPU_TESTS} <= {*named} or dry
    assert [word for word in named if not (ROOT / word).exists()] == []


def test_the_script_starts_the_stages():
    called = [w for w in (ROOT / "bench/gpu.sh").read_text().split() if w.endswith(".py")]
    assert [(ROOT / word).resolve() for word in called] == [Path(gpu_stages.__file__).resolve()]


def test_nothing_is_imported_that_is_not_named_as_needed(tmp_path: Path):
    """Packages of minserve that the stages do without may be missing on a machine with a GPU."""
    link_packages(tmp_path)
    absent = ("aiohttp", "gguf", "huggingface_hub", "msgspec", "prometheus_client", "matplotlib")
    assert not {*absent} & {*NEEDED}
    code = (
        "import sys\n"
        f"sys.modules.update(dict.fromkeys({absent}))\n"
        "import parts.kernel_bench.report, parts.kernel_bench.sweep, shared.machine"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_stages_run_alone_in_the_order_in_which_they_are_named(tmp_path: Path):
    every = all_stages(False, tmp_path / "gpu")
    assert chosen(every, None) == every
    assert [stage.name for stage in chosen(every, "engine,kernels")] == ["engine", "kernels"]
    for wrong, words in (("engine,kernel", "no stage 'kernel'"), ("http,http", "twice")):
        with pytest.raises(ValueError, match=words):
            chosen(every, wrong)


def test_what_a_part_of_the_stages_tells_has_a_file_of_its_own(tmp_path: Path):
    done = script(tmp_path, "--dry", "--stages", "ceilings")
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout.splitlines()[-1])
    assert list(told["stages"]) == ["ceilings"]
    assert Path(told["written"]).name == "cpu-ceilings-dry.json"
    wrong = script(tmp_path, "--stages", "engines")
    assert wrong.returncode == 2
    assert "no stage 'engines'; there are ceilings, tests" in wrong.stderr


def test_logs_have_no_bars_of_others(tmp_path: Path):
    code = "from transformers.utils import logging; print(logging.is_progress_bar_enabled())"
    env = environment(tmp_path)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.split() == ["False"], done.stderr


def test_all_stages_together_fit_their_lease(tmp_path: Path):
    assert sum(stage.limit_s for stage in stages(False, tmp_path / "gpu")) <= 465
    assert sum(stage.limit_s for stage in tuning(False)) <= 180


def test_a_stage_whose_packages_are_missing_is_left_out(tmp_path: Path):
    with (tmp_path / "log").open("w") as log:
        stage = Stage("stage", ["no-such-program"], 1.0, needs=("no_such_package",))
        result = run_stage(stage, dict(os.environ), tmp_path, log)
    assert result["passed"]
    assert "no_such_package" in result["exit"]


def test_rows_of_a_stage_that_is_cut_off_are_in_the_report(tmp_path: Path):
    rows = tmp_path / "rows.jsonl"
    code = f"open({str(rows)!r}, 'w').write('{{\"a\": 1}}\\n{{\"b'); raise SystemExit(1)"
    with (tmp_path / "log").open("w") as log:
        stage = Stage("stage", [sys.executable, "-c", code], 60, rows)
        result = run_stage(stage, dict(os.environ), tmp_path, log)
    assert result["rows"] == [{"a": 1}]
    assert not rows.exists()


def test_a_failed_stage_is_reported(tmp_path: Path):
    result = run_command(tmp_path, "print('words'); raise SystemExit(3)", limit_s=60)
    assert (result["passed"], result["exit"], result["summary"]) == (False, 3, "words")


def test_a_stage_that_never_ends_is_stopped_and_what_it_said_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Begun(subprocess.Popen):
        """Its time starts when it has said something."""

        def wait(self, timeout: float | None = None) -> int:
            wait_until((tmp_path / "stage.out").read_text)
            return super().wait(timeout)

    monkeypatch.setattr(subprocess, "Popen", Begun)
    code = "import time; print('begun', flush=True); time.sleep(600)"
    result = run_command(tmp_path, code, limit_s=0.1)
    assert (result["passed"], result["exit"], result["summary"]) == (False, "time limit", "begun")


def run_command(folder: Path, code: str, limit_s: float) -> dict:
    """A stage of Python code."""
    with (folder / "log").open("w") as log:
        stage = Stage("stage", [sys.executable, "-c", code], limit_s)
        return run_stage(stage, dict(os.environ), folder, log)


def test_minserve_imports_from_the_checkout_alone(tmp_path: Path):
    link_packages(tmp_path)
    code = "import minserve.kernels.attention as a, minserve.models.llama as b; print(a.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(tmp_path), capture_output=True, text=True
    )
    assert done.stdout.startswith(str(tmp_path)), done.stderr


@pytest.mark.parametrize(
    ("text", "last"), [("a\n{}\n", {}), ("a\nb c\n", "b c"), ("", None), ('{"a": 1', '{"a": 1')]
)
def test_the_last_line_is_json_or_words(text: str, last: object):
    assert last_line(text) == last
