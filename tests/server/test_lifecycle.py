"""What a server process has behind it when it says that it is ready."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from waiting import PATIENCE_S

from minserve.workload.server_process import ServerProcess, minserve_command

SCRIPT = """
import gc, os, signal, sys
from minserve.cli.main import main
from minserve.server import lifecycle

def told(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGTERM)
    rendered = "transformers.utils.chat_template_utils" in sys.modules
    return f"{rendered} {len(gc.get_objects())} {gc.get_freeze_count()}"

lifecycle.ready_message = told
sys.exit(main(sys.argv[1:]))
"""


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the servers keep the profile of their device."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def flags(tiny_llama_dir: Path) -> list[str]:
    return ["--model", str(tiny_llama_dir), "--num-blocks", "64", "--threads", "1",
            "--device", "cpu", "--profile-seconds", "0.5"]  # fmt: skip


@pytest.fixture(scope="module")
def first_start(cache: Path, flags: list[str]) -> tuple[dict[str, Any], str]:
    """The answer to a request with an SLO, and the metrics after it, of a server without profile."""
    command = replace(minserve_command(*flags), env={"XDG_CACHE_HOME": str(cache)})
    generous = {"ttft_ms": 60_000, "tpot_ms": 10_000}
    with ServerProcess(command) as server:
        assert json.loads(ask(f"{server.url}/health"))["status"] == "ok"
        body = {"prompt": "The rain", "max_tokens": 8, "slo": generous}
        told = json.loads(ask(f"{server.url}/v1/completions", body))
        return told, ask(f"{server.url}/metrics")


def ask(url: str, body: dict[str, object] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return answer.read().decode()


def test_a_first_start_makes_promises(cache: Path, first_start: tuple[dict[str, Any], str]) -> None:
    told, metrics = first_start
    assert told["usage"]["completion_tokens"] > 0
    assert 'minserve:slo_requests_total{class="custom",outcome="attained"} 1.0' in metrics
    (line,) = (x for x in metrics.splitlines() if x.startswith("minserve:profile_completeness "))
    assert 0.0 < float(line.split()[1]) < 1.0
    (kept,) = (cache / "minserve" / "profiles").glob("*.json")
    assert json.loads(kept.read_text())["allowed_s"] == 0.5


@pytest.mark.usefixtures("first_start")
def test_the_next_start_measures_nothing_and_ready_means_that_little_is_left_to_do(
    cache: Path, flags: list[str]
) -> None:
    (kept,) = (cache / "minserve" / "profiles").glob("*.json")
    written = kept.stat().st_mtime_ns
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, "serve", "--port", "0", *flags],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    assert kept.stat().st_mtime_ns == written
    # Nothing is left to load, and little to collect.
    rendered, num_collected, num_frozen = done.stdout.split()
    assert rendered == "True"
    assert int(num_frozen) > 20 * int(num_collected)
