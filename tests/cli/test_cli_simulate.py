"""``minserve simulate``: what is printed, drawn and refused, and how it ends."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tqdm import tqdm

from minserve.cli.main import main
from minserve.planner.predict.perf_model import PerfModel, Piece

CHAT = ["simulate", "--scenario", "chatbot", "--num-requests", "24"]


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    """A request every quarter of a second; one is far longer than the others."""
    rows = [
        f"{0.25 * i},{100 + i},{20 + i % 7},{'coding' if i % 2 else 'chatbot'}" for i in range(40)
    ]
    rows.append("10.0,1990,60,chatbot")
    file = tmp_path / "mine.csv"
    file.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens,class", *rows]))
    return file


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    file = tmp_path / "profile.json"
    model = PerfModel((Piece(tokens=1e-4, base=0.02),), margin=1.1)
    file.write_text(json.dumps({"key": {"model": "mine"}, "model": model.to_dict()}))
    return file


def report(capsys: pytest.CaptureFixture[str], *flags: str) -> dict[str, Any]:
    """The one JSON object on stdout."""
    assert main([*flags, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_runs_at_several_rates_are_told_in_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*CHAT, "--rate", "1,6", "--policy", "sarathi"]) == 0
    out, err = capsys.readouterr()
    assert out.index("1 requests/s") < out.index("6 requests/s")
    assert out.count("chatbot") == 2
    assert err.strip() == "simulating opt-6.7b-a100; --profile takes another one"


@pytest.mark.parametrize("policy", ["dp", "edf", "vllm", "sarathi", "fcfs", "distserve"])
def test_json_says_everything(policy: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = report(capsys, *CHAT, "--rate", "2", "--policy", policy, "--repeats", "2")
    assert (found["policy"], found["workload"], found["profile"]) == (
        policy, "chatbot", "opt-6.7b-a100",
    )  # fmt: skip
    assert found["num_gpus"] == (2 if policy == "distserve" else 1)
    (run,) = found["runs"]
    assert run["offered"] == 48
    assert run["target_rate"] == run["rate"] == 2
    assert sum(run["misses"].values()) == 48 - run["attained"]
    assert not found["interrupted"]


@pytest.mark.parametrize(
    ("scenario", "profile", "rate"),
    [
        ("chatbot", "opt-6.7b-a100", 4.64),
        ("tools", "toolllama-7b-a100", 1.0),
        ("reasoning", "qwen2.5-7b-a100", 1.0),
    ],
)
def test_what_is_not_given_fits_the_scenario(
    scenario: str, profile: str, rate: float, capsys: pytest.CaptureFixture[str]
) -> None:
    found = report(capsys, "simulate", "--scenario", scenario, "--num-requests", "2")
    assert found["profile"] == profile
    assert found["runs"][0]["target_rate"] == pytest.approx(rate, rel=0.01)


def test_a_trace_keeps_its_own_times_or_takes_a_rate(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["simulate", "--trace", str(trace), "--drop-longer"]
    assert main([*flags, "--json"]) == 0
    out, err = capsys.readouterr()
    (run,) = json.loads(out)["runs"]
    assert "dropped 1 of 41 requests, longer than 2048" in err
    assert run["target_rate"] is None
    assert run["seconds"] == 9.75
    assert set(run["classes"]) == {"chatbot", "coding"}
    assert report(capsys, *flags, "--rate", "8")["runs"][0]["seconds"] == 5


def test_the_file_of_a_profile_needs_a_number_of_kv_tokens(
    profile: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = [*CHAT, "--profile", str(profile)]
    assert main(flags) == 2
    assert "give --kv-tokens" in capsys.readouterr().err
    assert report(capsys, *flags, "--kv-tokens", "40000")["profile"] == "mine"


def test_settings_reach_the_simulation(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["simulate", "--scenario", "coding", "--num-requests", "20", "--rate", "3"]
    plain = report(capsys, *flags)["runs"][0]
    for more in (
        ["--speculation", "3", "--acceptance", "0.9"],
        ["--token-budget", "64"],
        ["--max-num-seqs", "2"],
        ["--kv-tokens", "3000"],
        ["--slowness", "1.3"],
        ["--overhead-ms", "3"],
        ["--request-ms", "20"],
        ["--noise", "0.3"],
        ["--speed-steps", "2"],
        ["--stall-every", "3"],
        ["--seed", "3"],
        ["--tight", "3", "--loose", "2"],
        ["--length-scale", "0.5"],
        ["--burstiness", "0.2"],
        ["--replicas", "2"],
    ):
        assert report(capsys, *flags, *more)["runs"][0] != plain, more


def test_values_choose_which_class_keeps_its_slos(capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["simulate", "--scenario", "mixed", "--rate", "12", "--num-requests", "90"]
    kept = []
    for values in ([], ["--values", "summarization=100,coding=1"]):
        (found,) = report(capsys, *flags, *values)["runs"]
        kept.append(found["classes"]["summarization"]["attainment"])
    assert kept[1] > kept[0]


def test_capacity_is_told_per_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*CHAT, "--policy", "distserve", "--ratio", "1:2", "--find-capacity", "--rate", "4"]
    found = report(capsys, *flags)
    capacity = found["capacity"]
    assert found["num_gpus"] == 3
    assert capacity["complete"]
    assert capacity["per_gpu"] == pytest.approx(capacity["capacity"] / 3, abs=1e-4)
    assert len(found["runs"]) == len(capacity["attainment"])
    assert main(flags) == 0
    assert "per GPU, of 3: " in capsys.readouterr().out


def test_the_number_of_replicas_for_a_rate_is_the_smallest(
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["simulate", "--scenario", "coding", "--num-requests", "60", "--policy", "sarathi"]
    found = report(capsys, *flags, "--replicas-for", "12")["replicas_for"]
    number = found["replicas"]
    assert number > 1
    assert found["attainment"] >= 0.9 > found["one_fewer"]
    for replicas, share in ((number, found["attainment"]), (number - 1, found["one_fewer"])):
        alone = report(capsys, *flags, "--rate", "12", "--replicas", str(replicas))
        assert alone["runs"][0]["attainment"] == share
    assert main([*flags, "--replicas-for", "12"]) == 0
    assert f"{number} replicas serve 12 requests/s with" in capsys.readouterr().out


@pytest.mark.parametrize("rates", ["3", "2,4"])
def test_a_picture_is_drawn(rates: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.png"
    report(capsys, *CHAT, "--rate", rates, "--plot", str(file))
    assert file.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ([], "give a --scenario or a --trace"),
        (["--scenario", "chess"], "no scenario 'chess'; there are chatbot"),
        (["--trace", "missing.csv"], "no trace missing.csv: give a CSV file, or one of azure2023"),
        (["--scenario", "chatbot", "--trace", "azure2023_conv"], "one of them"),
        ([*CHAT[1:], "--policy", "magic"], "no policy 'magic'; there are dp, edf"),
        ([*CHAT[1:], "--router", "magic"], "no router 'magic'"),
        ([*CHAT[1:], "--lengths", "magic"], "no estimate of lengths 'magic'"),
        ([*CHAT[1:], "--profile", "magic"], "'magic' is neither a file"),
        ([*CHAT[1:], "--profile", "/dev/null"], "is neither a file"),
        ([*CHAT[1:], "--rate", "0"], "a rate must be above 0"),
        ([*CHAT[1:], "--rate", "nan"], "a rate must be above 0"),
        ([*CHAT[1:], "--replicas", "0"], "number of replicas must be at least 1"),
        ([*CHAT[1:], "--noise", "-1"], "noise must be at least 0, not -1"),
        ([*CHAT[1:], "--noise", "nan"], "noise must be at least 0, not nan"),
        ([*CHAT[1:], "--speed-steps", "0.9"], "factor of speed steps must be at least 1"),
        ([*CHAT[1:], "--stall-every", "0"], "between stalls must be at least 0.1, not 0"),
        ([*CHAT[1:], "--clairvoyant", "--policy", "fcfs"], "fcfs plans nothing by the time"),
        ([*CHAT[1:], "--slowness", "inf"], "slowness must be at least"),
        ([*CHAT[1:], "--kv-tokens", "100"], "is longer than opt-6.7b-a100 can serve"),
        ([*CHAT[1:], "--length-scale", "9"], "is longer than opt-6.7b-a100 can serve"),
        ([*CHAT[1:], "--length-scale", "0"], "factor on lengths must be above 0"),
        ([*CHAT[1:], "--loose", "0.5"], "loose pace must be at least 1"),
        ([*CHAT[1:], "--acceptance", "0.5"], "--acceptance needs --speculation"),
        ([*CHAT[1:], "--ratio", "1:2"], "--ratio is for --policy distserve"),
        ([*CHAT[1:], "--policy", "distserve", "--router", "slo"], "its own dispatch"),
        ([*CHAT[1:], "--policy", "distserve", "--speculation", "2"], "distserve drafts nothing"),
        ([*CHAT[1:], "--length-error", "0.2"], "needs an oracle"),
        ([*CHAT[1:], "--drop-longer"], "--drop-longer is for traces"),
        ([*CHAT[1:], "--replicas-for", "-2"], "--replicas-for must be above 0"),
        ([*CHAT[1:], "--replicas-for", "5", "--rate", "1"], "goes without"),
        ([*CHAT[1:], "--level", "1.2"], "--level must be above 0 and at most 1"),
        ([*CHAT[1:], "--repeats", "0"], "--repeats must be at least 1"),
        ([*CHAT[1:], "--values", "chat=2"], "the workload has no class chat; it has chatbot"),
        ([*CHAT[1:], "--values", "chatbot=0"], "--values: value must be from 1e-06 to 1e+06"),
        ([*CHAT[1:], "--num-requests", "0"], "number of requests must be at least 1"),
        ([*CHAT[1:], "--plot", "/no/such/place.png"], "cannot write"),
        ([*CHAT[1:], "--plot", "run.doc"], "must end in"),
    ],
)
def test_what_cannot_be_run_is_refused_in_one_line(
    flags: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", *flags]) == 2
    out, err = capsys.readouterr()
    assert not out
    (line,) = err.splitlines()
    assert line.startswith("minserve: error: ")
    assert says in line


def test_requests_beyond_the_model_are_refused_with_the_way_out(
    trace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--trace", str(trace)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "1990 + 60 tokens is longer" in line
    assert "--drop-longer" in line
    flags = ["--drop-longer", "--kv-tokens", "48"]
    assert main(["simulate", "--trace", str(trace), *flags]) == 2
    assert "every request of the trace is longer than 48 tokens" in capsys.readouterr().err


@pytest.mark.parametrize("flag", [["--rate", "fast"], ["--ratio", "1/2"], ["--replicas", "x"],
                                  ["--values", "chatbot"]])  # fmt: skip
def test_a_flag_of_another_form_is_wrong_usage(
    flag: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main([*CHAT, *flag])
    assert ended.value.code == 2
    assert f"error: argument {flag[0]}" in capsys.readouterr().err


# Ctrl-C comes with the 250th request that was simulated.
INTERRUPTED = """
import os, signal, sys
from itertools import count
from minserve.cli.main import main
from minserve.simulator import simulation

simulate, numbers = simulation.simulate, count(1)

def interrupted(workload, setup, progressed, **more):
    def counted(load):
        if next(numbers) == 250:
            os.kill(os.getpid(), signal.SIGINT)
        progressed(load)
    return simulate(workload, setup, counted, **more)

simulation.simulate = interrupted
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize(
    ("flags", "num_whole"),
    [
        (["--rate", "1", "--num-requests", "12000"], 0),
        (["--rate", "1", "--num-requests", "100", "--capacity", "--repeats", "10000"], 2),
    ],
    ids=["a run", "a search"],
)
def test_ctrl_c_prints_what_was_simulated_so_far(flags: list[str], num_whole: int) -> None:
    command = ["simulate", "--scenario", "coding", "--policy", "sarathi", "--json", *flags]
    ended = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, *command], capture_output=True, text=True, check=False
    )
    assert ended.returncode == 130, ended.stderr
    found = json.loads(ended.stdout)
    assert found["interrupted"]
    assert [run["offered"] for run in found["runs"]] == [250]
    if "--capacity" in flags:
        assert not found["capacity"]["complete"]
        assert len(found["capacity"]["attainment"]["1"]) == num_whole


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_in_a_finalizer_is_not_lost(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    finalize = tqdm.__del__

    def interrupted(_: tqdm) -> None:
        monkeypatch.setattr(tqdm, "__del__", finalize)
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(tqdm, "__del__", interrupted)
    assert main([*CHAT, "--rate", "1", "--repeats", "20", "--json"]) == 130
    assert 1 <= len(json.loads(capsys.readouterr().out)["runs"]) < 20


def test_neither_torch_nor_an_http_client_is_imported() -> None:
    code = (
        "import sys; from minserve.cli.main import main\n"
        f"assert main({[*CHAT, '--rate', '2', '--json']!r}) == 0\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'aiohttp', 'transformers')))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
