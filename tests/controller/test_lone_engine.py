"""``minserve serve --engine-process own``: one engine behind HTTP, in a process of its own."""

from __future__ import annotations

import json
import signal
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from cluster import Cluster, launch, start_cluster
from held import Hold
from waiting import PATIENCE_S, is_alive, wait_until

from minserve import Engine, SamplingParams
from minserve.cli.main import main

PROMPT = "The quick brown fox"
LONG = {"prompt": PROMPT, "max_tokens": 240, "ignore_eos": True, "temperature": 0}
# Streams that are to be under way go no further until then.
HELD_AT = 100
# The class that no device of these tests can keep.
CLASSES = "[impossible]\ntpot_ms = 0.0001\n"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the server."""
    return tmp_path_factory.mktemp("lone")


@pytest.fixture(scope="module")
def lone(tiny_llama_dir: Path, folder: Path) -> Iterator[Cluster]:
    (folder / "classes.toml").write_text(CLASSES)
    yield from start_cluster(
        tiny_llama_dir, folder, "--engine-process", "own", "--log-format", "json",
        "--slo-classes", str(folder / "classes.toml"),
        environment={"XDG_CACHE_HOME": str(folder)},
    )  # fmt: skip


@pytest.fixture
def hold(folder: Path) -> Iterator[Hold]:
    """Holds the engine."""
    with Hold(folder) as hold:
        yield hold


@pytest.fixture(scope="module")
def engine(tiny_llama_dir: Path) -> Engine:
    """The same model in this process, which tells what is right."""
    return Engine(str(tiny_llama_dir), dtype="float32", num_blocks=160, block_size=16, threads=1)


def records(lone: Cluster) -> list[dict[str, Any]]:
    return [json.loads(line) for line in lone.log.read_text().splitlines()]


def streamed(
    lone: Cluster,
    body: Mapping[str, Any],
    after: int = 0,
    then: Callable[[], Any] = lambda: None,
) -> tuple[str, dict[str, Any], dict[str, Any]]:
    """Text, last choice and usage of a stream.

    Args:
        after: chunks after which ``then`` is called.
    """
    wanted = {**body, "stream": True, "stream_options": {"include_usage": True}}
    request = urllib.request.Request(
        lone.url + "/v1/completions",
        json.dumps(wanted).encode(),
        {"Content-Type": "application/json"},
    )
    text, last, usage = "", {}, {}
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        lines = (line for line in answer if line.startswith(b"data: {"))
        for number, line in enumerate(lines, 1):
            chunk = json.loads(line[6:])
            assert "error" not in chunk, chunk
            for choice in chunk["choices"]:
                text, last = text + choice["text"], choice
            usage = chunk.get("usage") or usage
            if number == after:
                then()
    return text, last, usage


def test_operators_and_monitors_see_one_replica(
    lone: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    lone.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 4})
    assert lone.get("/health") == {"status": "ok", "unfinished": 0, "replicas": {"up": 1}}
    assert main(["ctl", "--url", lone.url, "status", "--json"]) == 0
    (told,) = json.loads(capsys.readouterr().out)["replicas"]
    parent = psutil.Process(told["pid"]).parent()
    assert parent is not None
    assert parent.pid == lone.process.pid
    metrics = lone.get("/metrics")
    assert 'minserve:replica_up{replica="0"} 1.0' in metrics

    def told_by_page() -> dict[str, Any] | None:
        with urllib.request.urlopen(f"{lone.url}/page/feed?frames=1", timeout=PATIENCE_S) as answer:
            (one,) = json.loads(answer.read().removeprefix(b"data: "))["replicas"]
        # One that does not answer soon is left out.
        return one["activity"] and one

    one = wait_until(told_by_page)
    assert (one["replica"], one["state"]) == ("0", "up")
    assert one["activity"]["iterations"]


def test_what_the_console_is_told_of_a_lone_engine_is_told(lone: Cluster) -> None:
    (warning,) = (one for one in records(lone) if "would miss these SLOs" in one["message"])
    assert "impossible" in warning["message"]
    assert warning["replica"] == 0


def test_the_log_of_requests_names_the_replica(lone: Cluster) -> None:
    lone.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 3, "ignore_eos": True})

    def lines() -> list[dict[str, Any]]:
        told = [one for one in records(lone) if one["logger"] == "minserve.requests"]
        return [one for one in told if one["output_tokens"] == 3]

    # It may be written once the client has its answer.
    last = wait_until(lines)[-1]
    assert (last["replicas"], last["status"]) == ([0], 200)


@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("ends", ["length", "stop string", "stop token"])
def test_text_ends_and_counts_are_those_of_an_engine_in_ones_own_process(
    lone: Cluster, engine: Engine, ends: str, streams: bool
) -> None:
    body: dict[str, Any] = {
        "prompt": PROMPT,
        "max_tokens": 40,
        "temperature": 0,
        "ignore_eos": True,
    }
    params = SamplingParams(max_tokens=40, temperature=0.0, ignore_eos=True)
    (whole,) = engine.generate(PROMPT, params)[0].outputs
    if ends == "stop string":
        body["stop"] = [whole.text[len(whole.text) // 2 :][:4], "never in it"]
    elif ends == "stop token":
        body["stop_token_ids"] = [whole.token_ids[20]]
    (own,) = engine.generate(
        PROMPT,
        SamplingParams(
            max_tokens=40,
            temperature=0.0,
            ignore_eos=True,
            stop=tuple(body.get("stop", ())),
            stop_token_ids=tuple(body.get("stop_token_ids", ())),
        ),
    )[0].outputs
    if streams:
        text, choice, usage = streamed(lone, body)
    else:
        answer = lone.post("/v1/completions", body)
        (choice,), usage = answer["choices"], answer["usage"]
        text = choice["text"]
    assert text == own.text
    assert (choice["finish_reason"], choice["stop_reason"]) == (own.finish_reason, own.stop_reason)
    assert usage["completion_tokens"] == len(own.token_ids)
    assert (len(own.token_ids) == 40) == (ends == "length")


def test_structures_are_kept(lone: Cluster) -> None:
    body = {"prompt": PROMPT, "max_tokens": 30, "structured_outputs": {"regex": "(ab|cd){3}x"}}
    text, choice, _ = streamed(lone, body)
    assert len(text) == 7
    assert text.endswith("x")
    assert choice["finish_reason"] == "stop"


def test_a_stream_outlives_its_engine_behind_the_last_token_that_it_has(
    lone: Cluster, hold: Hold
) -> None:
    def kill() -> None:
        lone.lose(0)
        hold.release()

    ends_late = {**LONG, "stop": ["never in it"]}
    whole = streamed(lone, ends_late)
    (before,) = lone.replicas()
    hold.at(HELD_AT)
    found = streamed(lone, ends_late, 20, kill)
    assert found == whole
    (after,) = lone.wait_until_up()
    assert after["lost"] == before["lost"] + 1
    assert after["pid"] != before["pid"]
    assert lone.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 4})["choices"]


def test_a_restart_waits_for_what_runs_and_refuses_what_comes(lone: Cluster, hold: Hold) -> None:
    (before,) = lone.wait_until_up()
    whole = streamed(lone, LONG)
    restarting = threading.Thread(target=main, args=(["ctl", "--url", lone.url, "restart", "0"],))
    status = []

    def restart() -> None:
        restarting.start()
        wait_until(lambda: lone.replicas()[0]["state"] == "draining")
        try:
            lone.post("/v1/completions", {"prompt": PROMPT, "max_tokens": 4})
        except urllib.error.HTTPError as error:
            status.append(error.code)
        hold.release()

    hold.at(HELD_AT)
    assert streamed(lone, LONG, 20, restart) == whole
    restarting.join(PATIENCE_S)
    assert status == [503]
    (after,) = lone.wait_until_up()
    assert after["pid"] != before["pid"]
    assert after["lost"] == before["lost"]


def test_sigterm_lets_a_stream_end_and_takes_the_engine_along(lone: Cluster, hold: Hold) -> None:
    """The last one: the server has ended then."""

    def end() -> None:
        lone.process.send_signal(signal.SIGTERM)
        wait_until(lambda: not lone.is_healthy())
        hold.release()

    (before,) = lone.wait_until_up()
    whole = streamed(lone, LONG)
    hold.at(HELD_AT)
    assert streamed(lone, LONG, 20, end) == whole
    assert lone.process.wait(PATIENCE_S) == 0
    assert not is_alive(before["pid"])
    assert not [one for one in records(lone) if "Traceback" in one["message"]]


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_while_the_engine_loads_ends_both(tiny_llama_dir: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    process = launch(log, tiny_llama_dir, "--engine-process", "own")
    try:
        (child,) = wait_until(lambda: _engines(process.pid))
        process.send_signal(signal.SIGINT)
        assert process.wait(PATIENCE_S) == 130, log.read_text()
        wait_until(lambda: not is_alive(child.pid))
        assert "Traceback" not in log.read_text()
    finally:
        process.kill()
        process.wait()


def _engines(pid: int) -> list[psutil.Process]:
    return [one for one in psutil.Process(pid).children() if "replica_process" in _words(one)]


def _words(process: psutil.Process) -> str:
    with suppress(psutil.NoSuchProcess):  # it has ended since
        return " ".join(process.cmdline())
    return ""
