"""A server serves though nothing can be written: neither its words nor what it measured."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest
from unused_ports import unused_port
from waiting import PATIENCE_S, wait_until


def answer(url: str) -> int | None:
    body = json.dumps({"prompt": "The rain", "max_tokens": 3}).encode()
    request = urllib.request.Request(url, body, {"Content-Type": "application/json"})
    with suppress(OSError), urllib.request.urlopen(request, timeout=PATIENCE_S) as response:
        return int(response.status)
    return None


def no_file_may_grow() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))


def without_standard_files() -> None:
    for number in range(3):
        os.close(number)


@pytest.mark.parametrize("trouble", ["outputs on a full disk", "no outputs", "a full disk"])
def test_a_server_that_cannot_write_anything_serves(
    tiny_llama_dir: Path, tmp_path: Path, trouble: str
) -> None:
    port = unused_port()
    command = [sys.executable, "-m", "minserve", "serve", "--port", str(port), "--model",
               str(tiny_llama_dir), "--num-blocks", "64", "--threads", "1", "--device", "cpu",
               "--profile-seconds", "0.1"]  # fmt: skip
    limit = {"no outputs": without_standard_files, "a full disk": no_file_may_grow}.get(trouble)
    # In place of a folder there is a file, which keeps even root from writing.
    cache = tmp_path / "cache"
    cache.touch()
    with open("/dev/full" if trouble == "outputs on a full disk" else os.devnull, "w") as outputs:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=outputs,
            stderr=outputs,
            env=os.environ | {"XDG_CACHE_HOME": str(cache)},
            preexec_fn=limit,
        )
    try:
        url = f"http://127.0.0.1:{port}/v1/completions"
        wait_until(lambda: answer(url) == 200 or process.poll() is not None, "it never serves")
        process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_S) == 0
    finally:
        process.kill()
        process.wait()
