"""The command line, mostly as real processes: exit codes, signals, what is printed where."""

from __future__ import annotations

import http.client
import json
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from unused_ports import unused_port
from waiting import PATIENCE_S, wait_until

from minserve import __version__
from minserve.cli.generate import GENERATE_MAX_TOKENS
from minserve.cli.main import main
from minserve.config import EngineConfig
from minserve.sampling_params import SamplingParams
from minserve.server_config import ServerConfig

JSON = {"Content-Type": "application/json"}
MINSERVE = [sys.executable, "-m", "minserve"]
SMALL = ["--device", "cpu", "--dtype", "float32", "--threads", "1", "--num-blocks", "300"]
# What `serve` takes beside it, so that its device is profiled at once.
ROUGH = ["--profile-seconds", "0.1"]
PROMPT = "The quick brown fox"
NOWHERE = Path("/nowhere/at/all")
# ``minserve`` that loads no model while the first of two files is there, and brings no output beyond
# some tokens while the second one is.
HELD = """
import sys, time
from pathlib import Path
from minserve.cli.main import main
from minserve.engine import engine
from minserve.engine.core import EngineCore

engine.LAST_ITERATION_S = 1000.0
loads, steps = Path(sys.argv.pop(1)), Path(sys.argv.pop(1))
init, step = EngineCore.__init__, EngineCore.step

def held_load(core, *args, **settings):
    while loads.exists():
        time.sleep(0.01)
    init(core, *args, **settings)

def held_step(core):
    while any(seq.num_output_tokens > 20 for seq in core.running) and steps.exists():
        time.sleep(0.01)
    return step(core)

EngineCore.__init__, EngineCore.step = held_load, held_step
sys.exit(main(sys.argv[1:]))
"""


def run(*args: str, **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*MINSERVE, *args],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
        check=False,
        **options,
    )


@contextmanager
def process(
    *args: str, loads: Path = NOWHERE, steps: Path = NOWHERE
) -> Iterator[subprocess.Popen[str]]:
    """A minserve process with pipes; killed if the test leaves it behind.

    Args:
        loads: while this file is there, the model is not loaded.
        steps: while this file is there, no output that is long ends.
    """
    command = [sys.executable, "-c", HELD, str(loads), str(steps), *args]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield running
    finally:
        running.kill()
        running.communicate()


def get(port: int, path: str) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("GET", path)
    response = connection.getresponse()
    return response.status, response.read()


def get_once_listening(port: int, path: str) -> tuple[int, bytes]:
    def answer() -> tuple[int, bytes] | None:
        with suppress(ConnectionRefusedError):
            return get(port, path)
        return None

    return wait_until(answer, "nobody listens")


def start_stream(port: int) -> http.client.HTTPResponse:
    """A request of many tokens, with its first bytes already here."""
    body = {"prompt": PROMPT, "max_tokens": 480, "n": 4, "ignore_eos": True, "stream": True}
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
    connection.request("POST", "/v1/completions", json.dumps(body), JSON)
    response = connection.getresponse()
    assert response.status == 200
    assert response.read(10).startswith(b"data: ")
    return response


def announced_port(server: subprocess.Popen[str]) -> int:
    """The port in the line that says the server is ready."""
    line = server.stdout.readline()
    assert line, server.stderr.read()
    return int(re.search(r"http://127\.0\.0\.1:(\d+)", line)[1])


# --- help ---


@pytest.mark.parametrize("command", ["serve", "generate"])
def test_help_names_every_setting(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    configs = (EngineConfig, ServerConfig if command == "serve" else SamplingParams)
    for field in (field for config in configs for field in fields(config)):
        assert f"--{field.name.replace('_', '-')}" in text
    assert "examples:" in text


def test_help_and_version_load_nothing_heavy() -> None:
    code = (
        "import sys; from minserve.cli.main import build_parser; build_parser().format_help();"
        "sys.exit(any(m in sys.modules for m in ('torch', 'aiohttp', 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert run("--version").stdout == f"minserve {__version__}\n"


@pytest.mark.parametrize(
    "args",
    [
        [],
        ["dance"],
        ["serve", "--nonsense"],
        ["serve", "--port", "many"],
        ["serve", "--dtype", "int3"],
        ["generate"],
        ["generate", "--prompt", "x", "--chat", "--raw"],
        ["generate", "--prompt", "x", "--logprobs", "3"],
    ],
)
def test_wrong_usage_exits_with_2(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    assert "minserve" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["serve", "--port", "70000"], "port"),
        (["serve", "--api-key", ""], "API key"),
        (["serve", "--max-body-mib", "nan"], "max_body_mib"),
        (["serve", "--token-budget", "1"], "token_budget"),
        (["serve", "--host", "host.invalid"], "host.invalid"),
        (["generate", "--prompt", "x", "--top-p", "2"], "top_p"),
        (["generate", "--prompt", "x", "--model", "/nowhere/at/all"], "/nowhere/at/all"),
    ],
)
def test_an_error_is_one_clear_line(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(args) == 1
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = [line for line in captured.err.splitlines() if line.startswith("minserve: error: ")]
    assert says in line


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["serve", "./a model"], "did you mean --model './a model'?"),
        (["profile", "./model"], "did you mean --model ./model?"),
        (["inspect", "--model", "./model"], "give the model without --model: minserve inspect ./m"),
        (["inspect", "--model=./model"], "give the model without --model: minserve inspect ./m"),
    ],
)
def test_a_model_in_another_commands_way_is_explained(
    args: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        main(args)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


# --- generate ---


def test_generate_prints_only_the_text(
    tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["generate", "--model", str(tiny_llama_dir), *SMALL, "--temperature", "0"]
    args += ["--prompt", PROMPT, "--max-tokens", "12"]
    assert main([*args, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert len(report["token_ids"]) == report["usage"]["completion_tokens"] <= 12
    assert report["finish_reason"] in ("length", "stop")
    assert report["timings"]["generate_s"] > 0
    assert main(args) == 0
    assert capsys.readouterr().out == report["text"] + "\n"


def test_generate_takes_the_models_sampling_settings_unless_flags_say_more(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = shutil.copytree(tiny_llama_dir, tmp_path / "tiny")
    (model / "generation_config.json").write_text('{"top_k": 1, "max_new_tokens": 3}')
    args = ["generate", *SMALL, "--prompt", PROMPT, "--max-tokens", "8", "--json", "--seed", "5"]

    def token_ids(model: Path, *more: str) -> list[int]:
        assert main([*args, "--model", str(model), *more]) == 0
        return json.loads(capsys.readouterr().out)["token_ids"]

    greedy = token_ids(tiny_llama_dir, "--temperature", "0")
    assert len(greedy) == 8
    assert token_ids(model) == greedy
    sampled = token_ids(tiny_llama_dir)
    assert sampled != greedy
    assert token_ids(model, "--top-k", "0") == sampled
    assert token_ids(model, "--generation-config", "off") == sampled
    args[args.index("--max-tokens") :] = ["--json", "--seed", "5", "--ignore-eos"]
    assert len(token_ids(model)) == 3
    assert len(token_ids(model, "--generation-config", "off")) == GENERATE_MAX_TOKENS


def test_generate_tells_what_became_of_drafts(
    tiny_llama_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # A draft that is nearly the model: some of its tokens are right.
    draft = shutil.copytree(tiny_llama_dir, tmp_path / "draft")
    weights = load_file(draft / "model.safetensors")
    head = weights["lm_head.weight"]
    head += 0.03 * torch.randn(head.shape, generator=torch.Generator().manual_seed(0))
    save_file(weights, draft / "model.safetensors", metadata={"format": "pt"})
    args = ["generate", "--model", str(tiny_llama_dir), *SMALL, "--draft-model", str(draft)]
    args += ["--policy", "sarathi", "--temperature", "0", "--max-tokens", "24", "--ignore-eos"]
    assert main([*args, "--prompt", PROMPT, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["usage"]["acceptance"]
    assert 0 < told["accepted_tokens"] < told["draft_tokens"]
    assert told["rate"] == told["accepted_tokens"] / told["draft_tokens"]


def test_generate_uses_the_chat_template_unless_raw(
    tiny_llama_dir: Path, tiny_opt_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["generate", *SMALL, "--prompt", PROMPT, "--max-tokens", "2", "--json"]

    def prompt_tokens(model: Path, *more: str) -> int:
        assert main([*args, "--model", str(model), *more]) == 0
        return json.loads(capsys.readouterr().out)["usage"]["prompt_tokens"]

    assert prompt_tokens(tiny_llama_dir) == prompt_tokens(tiny_llama_dir, "--chat")
    assert prompt_tokens(tiny_llama_dir) > prompt_tokens(tiny_llama_dir, "--raw")
    assert prompt_tokens(tiny_opt_dir) == prompt_tokens(tiny_opt_dir, "--raw")
    assert main([*args, "--model", str(tiny_opt_dir), "--chat"]) == 1
    assert "chat template" in capsys.readouterr().err


def test_generate_reports_every_output_and_logprobs(
    tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["generate", "--model", str(tiny_llama_dir), *SMALL, "--prompt", PROMPT, "--n", "2"]
    args += ["--max-tokens", "3", "--seed", "5", "--ignore-eos"]
    assert main([*args, "--json", "--logprobs", "2", "--prompt-logprobs", "0"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [len(output["token_ids"]) for output in report["outputs"]] == [3, 3]
    assert [len(one["top"]) for one in report["outputs"][1]["logprobs"]] == [2, 2, 2]
    assert report["prompt_logprobs"][0] is None
    assert main(args) == 0
    text = capsys.readouterr().out
    assert all(output["text"] in text for output in report["outputs"])


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_ends_generate_quietly(tiny_llama_dir: Path) -> None:
    args = ["--model", str(tiny_llama_dir), *SMALL, "--ignore-eos", "--max-tokens", "480"]
    with process("generate", *args, "--prompt", PROMPT, steps=Path("/")) as running:
        assert running.stdout.read(1)
        running.send_signal(signal.SIGINT)
        assert running.wait(PATIENCE_S) == 130
        assert running.stderr.read() == ""


# --- serve ---


def test_a_busy_port_is_one_line_before_any_loading() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port = sock.getsockname()[1]
        result = run("serve", "--port", str(port), "--model", "/nowhere/at/all")
    assert result.returncode == 1
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("minserve: error: ")
    assert str(port) in line
    assert "in use" in line


@pytest.mark.usefixtures("ctrl_c")
def test_while_loading_it_answers_503_and_can_be_interrupted(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MINSERVE_API_KEY", "secret")
    port, hold = unused_port(), tmp_path / "hold"
    hold.touch()
    args = ["--port", str(port), "--model", str(tiny_llama_dir), *SMALL]
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 0)):
        with process("serve", *args, loads=hold) as server:
            status, body = get_once_listening(port, "/health")
            assert status == 503
            assert "loading" in json.loads(body)["error"]["message"]
            assert get(port, "/v1/models")[0] == 401  # the key comes from the environment
            server.send_signal(number)
            assert server.wait(PATIENCE_S) == code
            assert "Traceback" not in server.stderr.read()


def test_sigterm_lets_running_requests_finish_and_exits_0(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    args = ["--port", "0", "--model", str(tiny_llama_dir), *SMALL, *ROUGH]
    hold = tmp_path / "hold"
    with process("serve", *args, steps=hold) as server:
        port = announced_port(server)
        command = server.stdout.readline().removeprefix("Try: ")
        if shutil.which("curl"):
            answer = subprocess.run(
                command, shell=True, capture_output=True, check=True, timeout=PATIENCE_S
            ).stdout
            assert json.loads(answer)["choices"][0]["message"]["role"] == "assistant"
        assert get(port, "/health")[0] == 200
        hold.touch()
        stream = start_stream(port)
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: get(port, "/health")[0] == 503)
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE_S)
        connection.request("POST", "/v1/completions", json.dumps({"prompt": PROMPT}), JSON)
        assert connection.getresponse().status == 503
        hold.unlink()
        rest = stream.read()
        assert rest.endswith(b"data: [DONE]\n\n")
        assert rest.count(b'"finish_reason":"length"') == 4
        assert server.wait(PATIENCE_S) == 0
        assert "Traceback" not in server.stderr.read()


def test_what_outlasts_the_shutdown_timeout_ends_with_an_error(
    tiny_llama_dir: Path, tmp_path: Path
) -> None:
    args = ["--port", "0", "--model", str(tiny_llama_dir), *SMALL, *ROUGH]
    args += ["--shutdown-timeout", "0", "--log-format", "json"]
    hold = tmp_path / "hold"
    with process("serve", *args, steps=hold) as server:
        port = announced_port(server)
        hold.touch()
        stream = start_stream(port)
        server.send_signal(signal.SIGTERM)
        wait_until(lambda: get(port, "/health")[0] == 503)
        hold.unlink()
        rest = stream.read()
        assert b"[DONE]" not in rest
        last = rest.rstrip().rsplit(b"data: ", 1)[1]
        assert json.loads(last)["error"]["type"] == "service_unavailable_error"
        assert server.wait(PATIENCE_S) == 0
        records = [json.loads(line) for line in server.stderr.read().splitlines()]
    (request,) = (one for one in records if one["logger"] == "minserve.requests")
    assert (request["status"], request["error"]) == (200, "service_unavailable_error")
    assert request["output_tokens"] > 0
    assert any(one["message"].startswith("shutting down: 4 unfinished") for one in records)
