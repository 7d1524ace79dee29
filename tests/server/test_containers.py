"""A real server inside a real cgroup, with a CPU quota and a memory limit."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from real_cgroups import real_cgroup
from waiting import PATIENCE_S

GIB = 2**30
LIMIT_GIB, CPUS = 1.2, 0.9
# With one of KV_PER_TOKEN each, more than all of the limit.
NUM_PROMPTS, PROMPT_TOKENS = 96, 125
KV_PER_TOKEN = 2**17


@pytest.fixture(scope="module")
def wide_llama_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama whose KV takes much memory (`KV_PER_TOKEN` bytes) and little computation."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("models") / "wide-llama"
    shutil.copytree(tiny_llama_dir, folder)
    config = LlamaConfig.from_pretrained(tiny_llama_dir)
    config.num_attention_heads = config.num_key_value_heads = 16
    config.head_dim = 512
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@contextmanager
def server_within(
    enter: Callable[[], None], model: Path, log: Path, *flags: str
) -> Iterator[subprocess.Popen[str]]:
    """A ``minserve serve`` in a cgroup; what it logs goes to a file."""
    command = [sys.executable, "-m", "minserve", "serve", "--port", "0", "--model", str(model),
               "--device", "cpu", "--dtype", "float32", "--profile-seconds", "0.1", *flags]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    with log.open("w") as errors:
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            env=environment,
            preexec_fn=enter,
        )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def complete(url: str, number: int) -> int:
    """Output tokens of a prompt like no other."""
    prompt = [5 + number, *((number * 31 + i * 7) % 400 + 5 for i in range(PROMPT_TOKENS - 1))]
    body = {"model": "wide-llama", "prompt": prompt, "max_tokens": 2, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=PATIENCE_S) as answer:
        return json.load(answer)["usage"]["completion_tokens"]


def test_a_server_in_a_container_fills_its_cache_and_is_not_killed(
    wide_llama_dir: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    assert NUM_PROMPTS * PROMPT_TOKENS * KV_PER_TOKEN > LIMIT_GIB * GIB
    with (
        real_cgroup(CPUS, int(LIMIT_GIB * GIB)) as enter,
        server_within(enter, wide_llama_dir, log) as server,
    ):
        announced = re.search(r" on (http://\S+)", server.stdout.readline())
        assert announced, log.read_text()
        with ThreadPoolExecutor(8) as pool:
            counts = list(pool.map(lambda i: complete(announced[1], i), range(NUM_PROMPTS)))
        assert counts == [2] * NUM_PROMPTS
        assert server.poll() is None
    said = re.search(
        r"limited to 0\.9 by a cgroup: 1 thread; memory limited to 1\.20 GiB by a cgroup, "
        r"(\S+) GiB free: KV cache of (\S+) GiB",
        log.read_text(),
    )
    assert said, log.read_text()
    free, cache = map(float, said.groups())
    assert 0 < free < LIMIT_GIB
    assert cache == pytest.approx(free / 4, abs=0.02)


def test_a_cache_beyond_the_containers_limit_is_refused_in_one_line(
    wide_llama_dir: Path, tmp_path: Path
) -> None:
    log = tmp_path / "log"
    with (
        real_cgroup(CPUS, int(LIMIT_GIB * GIB)) as enter,
        server_within(enter, wide_llama_dir, log, "--kv-cache-gib", "2") as server,
    ):
        assert server.wait(PATIENCE_S) == 1
    last = log.read_text().splitlines()[-1]
    assert re.search(
        r"--kv-cache-gib asks for .* 2\.00 GiB, more than there is: memory limited to 1\.20 GiB",
        last,
    )
