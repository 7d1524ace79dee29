"""What a server process has behind it when it says that it is ready."""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

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


def test_ready_means_that_nothing_is_left_to_load_and_little_to_collect(
    tiny_llama_dir: Path,
) -> None:
    arguments = ["serve", "--port", "0", "--model", str(tiny_llama_dir), "--num-blocks", "64",
                 "--threads", "1", "--device", "cpu", "--profile-seconds", "0.1"]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        timeout=PATIENCE_S,
    )
    assert done.returncode == 0, done.stderr
    rendered, num_collected, num_frozen = done.stdout.split()
    assert rendered == "True"
    assert int(num_frozen) > 20 * int(num_collected)


def test_a_first_start_makes_promises_and_the_next_one_measures_nothing(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    flags = ["--model", str(tiny_llama_dir), "--num-blocks", "64", "--threads", "1",
             "--device", "cpu", "--profile-seconds", "0.5"]  # fmt: skip

    def ask(url: str, body: dict[str, object] | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=30) as answer:
            return answer.read().decode()

    generous = {"ttft_ms": 60_000, "tpot_ms": 10_000}
    with ServerProcess(minserve_command(*flags)) as server:
        assert json.loads(ask(f"{server.url}/health"))["status"] == "ok"
        body = {"prompt": "The rain", "max_tokens": 8, "slo": generous}
        told = json.loads(ask(f"{server.url}/v1/completions", body))
        metrics = ask(f"{server.url}/metrics")
    assert told["usage"]["completion_tokens"] > 0
    assert 'minserve:slo_requests_total{class="custom",outcome="attained"} 1.0' in metrics
    (line,) = (x for x in metrics.splitlines() if x.startswith("minserve:profile_completeness "))
    assert 0.0 < float(line.split()[1]) < 1.0
    (kept,) = (tmp_path / "minserve" / "profiles").glob("*.json")
    assert json.loads(kept.read_text())["allowed_s"] == 0.5
    written = kept.stat().st_mtime_ns
    with ServerProcess(minserve_command(*flags)) as server:
        assert json.loads(ask(f"{server.url}/health"))["status"] == "ok"
        assert kept.stat().st_mtime_ns == written
