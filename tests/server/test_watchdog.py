"""A server whose engine hangs or breaks: who is told what, and how the process ends."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from live_server import RunningServer, hanging, post
from waiting import PATIENCE_S, wait_until

from minserve.exit_codes import EXIT_HUNG
from minserve.server import watchdog
from minserve.server.watchdog import until_given_up
from minserve.server_config import ServerConfig

# A server in which a request of 7 tokens makes the core hang, and one of 8 breaks it.
SCRIPT = """
import sys, threading
from minserve.cli.main import main
from minserve.engine import async_engine
from minserve.engine.core import EngineCore

async_engine.LAST_ITERATION_S = 0.3
step = EngineCore.step

def planted(core):
    asked = {seq.request.params.max_tokens for seq in core.waiting}
    if 7 in asked:
        threading.Event().wait()
    if 8 in asked:
        core.abort_all = None  # the way out is broken too
        raise RuntimeError("books in disorder")
    return step(core)

EngineCore.step = planted
sys.exit(main(sys.argv[1:]))
"""
FLAGS = ["--num-blocks", "64", "--threads", "1", "--device", "cpu", "--profile-seconds", "0.1"]


@contextmanager
def serving(model: Path, *flags: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    command = [sys.executable, "-c", SCRIPT, "serve", "--port", "0", "--model", str(model)]
    process = subprocess.Popen(
        [*command, *FLAGS, *flags], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().rsplit(" ", 1)[-1].strip()
    finally:
        process.kill()
        process.communicate()


def ask(url: str, max_tokens: int) -> tuple[int, dict]:
    body = json.dumps({"prompt": "The rain", "max_tokens": max_tokens}).encode()
    request = urllib.request.Request(
        f"{url}/v1/completions", body, {"Content-Type": "application/json"}
    )
    return told(request)


def told(request: urllib.request.Request | str) -> tuple[int, dict]:
    try:
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
            return answer.status, json.load(answer)
    except urllib.error.HTTPError as error:
        return error.code, json.load(error)


@pytest.mark.parametrize(("max_tokens", "status"), [(7, 503), (8, 500)], ids=["hangs", "breaks"])
def test_a_server_whose_engine_is_beyond_help_ends_with_a_code_of_its_own(
    tiny_llama_dir: Path, max_tokens: int, status: int
) -> None:
    # The first request's iterations are slow on a busy machine, and do not hang.
    flags = ["--watchdog-s", "3", "--watchdog-exit-s", "0.5"]
    with serving(tiny_llama_dir, *flags) as (process, url), ThreadPoolExecutor() as threads:
        assert ask(url, 2)[0] == 200
        waiting = threads.submit(ask, url, max_tokens)
        # Nobody waits for ever: neither the client nor the supervisor.
        found, answer = waiting.result(PATIENCE_S)
        assert found == status
        assert set(answer["error"]) == {"message", "type", "param", "code"}
        _, log = process.communicate(timeout=PATIENCE_S)
        assert process.returncode == EXIT_HUNG
        assert "the process ends if that lasts" in log


def test_a_hung_engine_does_not_keep_sigterm_from_ending_the_process(tiny_llama_dir: Path) -> None:
    flags = ["--shutdown-timeout", "0.3", "--watchdog-s", "0.2", "--watchdog-exit-s", "0"]
    with serving(tiny_llama_dir, *flags) as (process, url), ThreadPoolExecutor() as threads:
        waiting = threads.submit(ask, url, 7)
        wait_until(lambda: told(f"{url}/health")[0] == 503, "the engine does not hang")
        assert ask(url, 2)[0] == 503
        process.send_signal(signal.SIGTERM)
        assert waiting.result(PATIENCE_S)[0] == 503
        process.communicate(timeout=PATIENCE_S)
        assert process.returncode == 0


def test_requests_are_refused_while_an_iteration_hangs_and_served_after_it(
    tiny_llama_dir: Path, start_server: Callable[..., RunningServer]
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig(watchdog_s=0.3))
    json_type = {"Content-Type": "application/json"}
    body = {"prompt": "The rain", "max_tokens": 2, "temperature": 0}
    with ThreadPoolExecutor() as threads:
        with hanging(server):
            first = threads.submit(post, server, "/v1/completions", body, json_type)
            wait_until(lambda: post(server, "/health", None, method="GET")[0] == 503)
            status, headers, answer = post(server, "/v1/completions", body, json_type)
            assert (status, headers["Retry-After"]) == (503, "1")
            assert b"no iteration has ended" in answer
        assert first.result(PATIENCE_S)[0] == 200
    server.wait_until_free()
    assert post(server, "/v1/completions", body, json_type)[0] == 200


def test_a_broken_core_is_told_to_everyone(
    tiny_llama_dir: Path,
    start_server: Callable[..., RunningServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig())
    core = server.engine._core

    def broken(*_: object) -> None:
        raise RuntimeError("books in disorder")

    monkeypatch.setattr(core, "step", broken)
    monkeypatch.setattr(core, "abort_all", broken)
    json_type = {"Content-Type": "application/json"}
    body = {"prompt": "The rain", "max_tokens": 2}
    status, _, answer = post(server, "/v1/completions", {**body, "n": 2}, json_type)
    assert status == 500
    assert json.loads(answer)["error"]["code"] == "generation_failed"
    assert post(server, "/health", None, method="GET")[0] == 503
    assert post(server, "/v1/completions", body, json_type)[0] == 503
    assert post(server, "/metrics", None, method="GET")[0] == 200


def test_errors_in_metrics_and_handlers_are_json_and_harm_nobody(
    tiny_llama_dir: Path,
    start_server: Callable[..., RunningServer],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    server = start_server(tiny_llama_dir, ServerConfig())
    json_type = {"Content-Type": "application/json"}
    body = {"prompt": "The rain", "max_tokens": 8, "temperature": 0}
    before = json.loads(post(server, "/v1/completions", body, json_type)[2])["choices"]
    with monkeypatch.context() as patch:

        def broken(*_: object, **__: object) -> None:
            raise RuntimeError("a secret of the inside")

        patch.setattr(server.engine, "stats_by_replica", broken)
        patch.setattr(server.engine.tokenizer, "encode", broken)
        for path, sent in (("/metrics", None), ("/tokenize", {"prompt": "The rain"})):
            method = "GET" if sent is None else "POST"
            status, headers, answer = post(server, path, sent, json_type, method=method)
            assert status == 500
            assert headers["Content-Type"].startswith("application/json")
            assert json.loads(answer)["error"]["type"] == "server_error"
            assert b"secret" not in answer
    again = json.loads(post(server, "/v1/completions", body, json_type)[2])["choices"]
    assert again == before
    assert post(server, "/metrics", None, method="GET")[0] == 200


# -- when an engine is given up ----------------------------------------------------------


@dataclass
class Engine:
    """What a watchdog sees of an engine."""

    replica_set: object = None
    is_healthy: bool = True
    iteration_s: float = 0.0


@dataclass
class Looks:
    """Plays what each look finds, and counts them."""

    engine: Engine
    script: list[float]
    num: int = field(default=0)

    async def sleep(self, _: float) -> None:
        if self.num == len(self.script):
            raise EOFError
        self.engine.iteration_s = self.script[self.num]
        self.num += 1


def looks_until_given_up(script: list[float], monkeypatch: pytest.MonkeyPatch) -> int | None:
    looks = Looks(Engine(), script)
    monkeypatch.setattr(watchdog.asyncio, "sleep", looks.sleep)
    try:
        asyncio.run(until_given_up(looks.engine, watchdog_s=60.0, exit_s=4.0))
    except EOFError:
        return None
    return looks.num


def test_an_engine_is_given_up_once_it_has_hung_at_every_look_for_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert looks_until_given_up([59.0] * 9, monkeypatch) is None
    assert looks_until_given_up([61.0, 62.0, 63.0, 64.0], monkeypatch) == 4
    assert looks_until_given_up([61.0, 62.0, 0.0, 61.0, 62.0, 63.0], monkeypatch) is None
    # A process that was stopped for an hour has an old iteration, but has not hung.
    assert looks_until_given_up([3600.0, 0.1, 0.1], monkeypatch) is None


def test_replicas_are_left_to_their_controller_and_zero_waits_for_ever() -> None:
    async def go() -> None:
        for engine, exit_s in ((Engine(object(), False), 0.01), (Engine(None, False), 0.0)):
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(until_given_up(engine, 0.01, exit_s), 0.05)

    asyncio.run(go())
