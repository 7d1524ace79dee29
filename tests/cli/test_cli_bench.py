"""``minserve bench`` against a scripted server and a real one: what it prints, draws, refuses."""

from __future__ import annotations

import importlib.util
import json
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from scripted_server import ScriptedServer, scripted_server
from waiting import PATIENCE_S, wait_until

from minserve.cli import bench as cli_bench
from minserve.cli.main import main
from minserve.workload import zero_load
from minserve.workload.endpoint import Endpoint
from minserve.workload.zero_load import ZeroLoad

MINSERVE = [sys.executable, "-m", "minserve"]
SHORT = ["--length-scale", "0.01", "--num-requests", "6"]
WORKLOAD = ["--scenario", "chatbot", *SHORT]
EASY = [*WORKLOAD, "--loose", "2"]
# Lone requests that measure a server's speed: one of each length, and the one that does not count.
NUM_LONE = 1 + len(zero_load.PROMPT_TOKENS)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[ScriptedServer]:
    """A server whose lone requests are said to take minutes: multiples of that are always kept."""
    measure = zero_load.measure_speed

    async def slow(endpoint: Endpoint, **options: Any) -> ZeroLoad:
        found = await measure(endpoint, **options)
        return replace(found, base_s=120.0, per_token_s=0.0, decode_s=60.0)

    monkeypatch.setattr(zero_load, "measure_speed", slow)
    monkeypatch.setattr(zero_load, "REPEATS", 1)
    with scripted_server(max_model_len=4096, gap_s=0.001) as running:
        yield running


def bench(server: ScriptedServer, *args: str) -> int:
    return main(["bench", "--url", server.url, *args])


def bench_json(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str], *args: str
) -> dict[str, Any]:
    assert bench(server, *args, "--json") == 0
    (line,) = capsys.readouterr().out.splitlines()
    return json.loads(line)


def test_a_rate_ends_in_a_table(server: ScriptedServer, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(server, *EASY, "--rate", "30") == 0
    captured = capsys.readouterr()
    assert "30 requests/s" in captured.out
    assert "chatbot" in captured.out
    assert "misses: none" in captured.out
    assert "a lone request takes" in captured.err


def test_json_alone_is_on_stdout(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str]
) -> None:
    found = bench_json(server, capsys, *EASY, "--rate", "30,60", "--rate", "90")
    assert [run["target_rate"] for run in found["runs"]] == [30, 60, 90]
    assert all(run["offered"] == 6 and run["attainment"] == 1 for run in found["runs"])
    assert found["runs"][0]["rate"] == 30
    assert (found["model"], found["url"]) == ("scripted", server.url)
    assert found["zero_load"]["decode_ms"] == 60_000
    assert found["capacity"] is None
    assert found["interrupted"] is False


def test_the_verdict_of_every_request_is_written(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "verdicts.jsonl"
    flags = ("--rate", "30,60", "--repeats", "2", "--verdicts", str(file))
    found = bench_json(server, capsys, *EASY, *flags)
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["target_rate"], row["seed"]) for row in rows[::6]] == [
        (30, 0),
        (30, 1),
        (60, 0),
        (60, 1),
    ]
    assert len(rows) == 4 * 6
    assert all(row["cause"] is None and row["ttft_s"] > 0 for row in rows)
    assert sum(row["output_tokens"] for row in rows) == sum(
        run["output_tokens"] for run in found["runs"]
    )


def test_one_zero_load_gives_every_server_the_same_slos(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "idle.json"
    first = bench_json(server, capsys, *EASY, "--rate", "30", "--save-zero-load", str(file))
    with scripted_server(owner="minserve") as faster:
        faster.bodies.clear()
        again = bench_json(faster, capsys, *EASY, "--rate", "30", "--zero-load", str(file))
        # Nothing was measured, and what was promised are multiples of the other server's speed.
        assert len(faster.bodies) == 6
        paces = [body["slo"]["tpot_ms"] for body in faster.bodies]
    assert paces == pytest.approx([2 * first["zero_load"]["decode_ms"]] * 6)
    assert again["zero_load"] == first["zero_load"]
    assert again["zero_load_of"] == first["zero_load_of"]
    assert server.url in again["zero_load_of"]


def test_a_zero_load_of_another_model_is_one_line(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "idle.json"
    assert bench(server, *WORKLOAD, "--rate", "50", "--save-zero-load", str(file)) == 0
    capsys.readouterr()
    args = [*WORKLOAD, "--rate", "50", "--model", "other", "--zero-load", str(file)]
    assert bench(server, *args) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "is of the model 'scripted', not of 'other'" in line


def test_a_zero_load_of_another_machine_is_told(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    file = tmp_path / "idle.json"
    assert bench(server, *WORKLOAD, "--rate", "50", "--save-zero-load", str(file)) == 0
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {"machine": "an abacus, 1 cores, Linux"}))
    assert bench(server, *WORKLOAD, "--rate", "50", "--zero-load", str(file)) == 0
    said = capsys.readouterr().err
    assert "an abacus" in said
    assert "warning: that is another machine" in said


def test_the_same_seed_sends_the_same_prompts(server: ScriptedServer) -> None:
    def prompts(seed: int) -> list[str]:
        server.bodies.clear()
        assert bench(server, *WORKLOAD, "--rate", "50", "--seed", str(seed)) == 0
        return sorted(body["prompt"] for body in server.bodies[NUM_LONE:])

    assert prompts(1) == prompts(1) != prompts(2)


def test_a_capacity_comes_with_its_interval(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("minserve.workload.capacity.MOST_DOUBLINGS", 1)
    found = bench_json(server, capsys, *EASY, "--capacity", "--rate", "40", "--repeats", "2")
    assert found["capacity"]["capacity"] == 80
    assert found["capacity"]["interval"] == [80, 80]
    assert found["capacity"]["attainment"]["40"] == [1, 1]
    assert found["capacity"]["attainment"]["80"] == [1, 1]
    assert all(run["offered"] == 12 for run in found["runs"])
    assert bench(server, *EASY, "--capacity", "--rate", "40") == 0
    text = capsys.readouterr().out
    assert "capacity: at least 80 requests/s with 90% attained (95% interval over repeats" in text


def test_a_trace_runs_at_its_own_rate_or_another(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    trace = tmp_path / "mine.csv"
    rows = [f"{i / 20},20,3,{'coding' if i % 2 else ''}" for i in range(5)]
    trace.write_text("\n".join(["arrival_s,prompt_tokens,output_tokens,class", *rows]))
    (own,) = bench_json(server, capsys, "--trace", str(trace), "--class", "tool_final")["runs"]
    assert own["target_rate"] is None
    assert own["seconds"] == pytest.approx(0.2)
    assert {name: one["offered"] for name, one in own["classes"].items()} == {
        "coding": 2,
        "tool_final": 3,
    }
    (fast,) = bench_json(server, capsys, "--trace", str(trace), "--rate", "50")["runs"]
    assert fast["rate"] == 50


def test_chat_is_asked_where_it_is_wanted(server: ScriptedServer) -> None:
    assert bench(server, *WORKLOAD, "--rate", "50", "--endpoint", "chat", "--model", "other") == 0
    assert all("messages" in body and body["model"] == "other" for body in server.bodies)


@pytest.mark.parametrize("rates", ["50", "50,80"])
def test_a_picture_is_drawn(server: ScriptedServer, tmp_path: Path, rates: str) -> None:
    file = tmp_path / "run.png"
    assert bench(server, *WORKLOAD, "--rate", rates, "--plot", str(file)) == 0
    assert file.read_bytes().startswith(b"\x89PNG")


def test_a_late_client_is_told(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cli_bench, "LATE_CLIENT_S", 0.0)
    assert bench(server, *WORKLOAD, "--rate", "50") == 0
    assert "numbers are not to be trusted" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--rate", "1"], "one of them"),
        (["--scenario", "chatbot", "--trace", "x.csv", "--rate", "1"], "one of them"),
        (["--scenario", "dance", "--rate", "1"], "no scenario 'dance'"),
        (["--scenario", "chatbot"], "needs a --rate"),
        (["--scenario", "chatbot", "--rate", "0"], "above 0"),
        (["--scenario", "chatbot", "--rate", "1,-2"], "above 0"),
        (["--scenario", "chatbot", "--rate", "nan"], "above 0"),
        (["--scenario", "chatbot", "--rate", "1,2", "--capacity"], "one --rate"),
        (["--scenario", "chatbot", "--rate", "1", "--seconds", "-1"], "seconds"),
        (["--scenario", "chatbot", "--rate", "1", "--seconds", "9", "--num-requests", "3"], "both"),
        (["--scenario", "chatbot", "--rate", "1", "--repeats", "0"], "--repeats"),
        (["--scenario", "chatbot", "--rate", "1", "--level", "2"], "--level"),
        (["--scenario", "chatbot", "--rate", "1", "--tight", "0.5"], "tight pace"),
        (["--scenario", "chatbot", "--rate", "1", "--length-scale", "0"], "factor"),
        (["--scenario", "chatbot", "--rate", "1", "--burstiness", "-1"], "burstiness"),
        (["--scenario", "chatbot", "--rate", "1", "--policy", "dp"], "no --url"),
        ([*WORKLOAD, "--rate", "1", "--zero-load", "/nowhere.json"], "nowhere.json: No such file"),
        ([*WORKLOAD, "--rate", "1", "--zero-load", __file__], "holds no zero load"),
        ([*WORKLOAD, "--rate", "1", "--save-zero-load", __file__], "exists already"),
        ([*WORKLOAD, "--rate", "1", "--save-zero-load", "/no/x.json"], "no folder"),
        ([*WORKLOAD, "--rate", "1", "--verdicts", __file__], "exists already"),
        ([*WORKLOAD, "--rate", "1", "--verdicts", "/no/x.jsonl"], "no folder"),
        (["--trace", "/nowhere.csv"], "nowhere.csv"),
        (["--trace", "x.csv", "--burstiness", "2"], "its own arrivals"),
        (["--scenario", "chatbot", "--rate", "1"], "no server answers at http://127.0.0.1:9"),
    ],
)
def test_what_cannot_be_run_is_one_line_and_exit_2(
    args: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["bench", "--url", "http://127.0.0.1:9", *args]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.splitlines()
    assert line.startswith("minserve: error: ")
    assert words in line


def test_a_plot_that_cannot_be_written_is_told_before_the_run(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert bench(server, *WORKLOAD, "--rate", "1", "--plot", str(tmp_path / "no" / "x.png")) == 2
    assert "cannot write the plot" in capsys.readouterr().err
    assert not server.bodies


def test_a_missing_matplotlib_is_told_before_the_run(
    server: ScriptedServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    assert bench(server, *WORKLOAD, "--rate", "1", "--plot", "x.png") == 2
    assert ".venv/bin/pip install -e '.[plot]'" in capsys.readouterr().err
    assert not server.bodies


def test_requests_that_are_too_long_are_told_before_they_are_sent(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with scripted_server(max_model_len=200) as small:
        assert bench(small, "--scenario", "chatbot", "--rate", "1", "--num-requests", "4") == 2
    assert "longer than the model's 200 tokens" in capsys.readouterr().err


def test_a_missing_key_is_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("MINSERVE_API_KEY", raising=False)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with scripted_server(key="secret") as guarded:
        assert bench(guarded, *WORKLOAD, "--rate", "50") == 2
        assert "MINSERVE_API_KEY or OPENAI_API_KEY" in capsys.readouterr().err
        monkeypatch.setenv("OPENAI_API_KEY", "secret")
        assert bench(guarded, *WORKLOAD, "--rate", "50") == 0


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_reports_what_was_measured(server: ScriptedServer) -> None:
    command = [*MINSERVE, "bench", "--url", server.url, "--scenario", "chatbot", "--rate", "20",
               "--num-requests", "600", "--length-scale", "0.01", "--json"]  # fmt: skip
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        # 13 of them measured the speed. Who sends the last ones has read the first answers.
        wait_until(lambda: len(server.bodies) >= 40 or running.poll() is not None)
        running.send_signal(signal.SIGINT)
        out, err = running.communicate(timeout=PATIENCE_S)
    finally:
        running.kill()
        running.wait()
    assert running.returncode == 130, err
    found = json.loads(out)
    assert found["interrupted"] is True
    (run,) = found["runs"]
    assert 4 <= run["offered"] < 600
    assert "Traceback" not in err


def test_without_a_url_a_server_is_started_and_stopped(
    tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    serve = "--device cpu --dtype float32 --threads 1 --num-blocks 300 --profile-seconds 0.5"
    args = ["--model", str(tiny_llama_dir), "--policy", "edf", "--serve-args", serve, "--json"]
    scale = ["--length-scale", "0.05", "--num-requests", "4", "--tight", "50", "--loose", "99"]
    assert main(["bench", *args, "--scenario", "mixed", "--rate", "20", *scale]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["model"] == tiny_llama_dir.name
    (run,) = found["runs"]
    assert run["offered"] == 4
    assert run["misses"]["failed"] == run["misses"]["rejected"] == 0
    assert run["output_tokens"] > 4
    status = main(["bench", "--url", found["url"], "--scenario", "mixed", "--rate", "1"])
    assert status == 2
    assert "no server answers" in capsys.readouterr().err


def test_a_server_that_does_not_start_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--model", "/nowhere/at/all", *WORKLOAD, "--rate", "1"]) == 1
    assert "/nowhere/at/all" in capsys.readouterr().err
