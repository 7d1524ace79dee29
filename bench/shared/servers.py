"""Server processes that are compared side by side, and the load of the machine beside them."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import psutil

from minserve.workload.endpoint import Endpoint, find_endpoint
from minserve.workload.server_process import end
from shared.slo_servers import PROFILE_S, cpu_seconds

START_S = 600.0
POLL_S = 0.5
# It ends when its parent process ends, also if the parent is killed.
BUSY_LOOP = """
import os
parent = os.getppid()
while os.getppid() == parent:
    sum(range(100_000))
"""


@dataclass(frozen=True, slots=True)
class ServerVariant:
    """A server and its settings.

    Attributes:
        label: name in tables and pictures.
        command: its command, without the port.
    """

    label: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)


class Served(Protocol):
    """A server that answers, in this machine or elsewhere."""

    endpoint: Endpoint

    def cpu_seconds(self) -> float:
        """Return the processor time of all its processes, in seconds."""

    def failed(self, problem: str) -> SystemExit:
        """Return the error that ends the benchmark, with the end of the server's log."""


def minserve_variant(label: str, *flags: str) -> ServerVariant:
    """Return a ``minserve serve`` of this environment.

    It makes a full profile of the device at its first start, so that no profile is refined
    between two runs.

    Args:
        flags: its flags, without the port.
    """
    profile = ["--profile-seconds", str(PROFILE_S)]
    return ServerVariant(label, [sys.executable, "-m", "minserve", "serve", *profile, *flags])


class VariantServer:
    """A server process on a free port, ready once the object exists.

    Attributes:
        variant: the server's settings.
        start_s: seconds from its start until it was healthy.

    Raises:
        SystemExit: if it does not start; the message has the end of its log.
    """

    def __init__(self, variant: ServerVariant, folder: Path) -> None:
        self.variant = variant
        self._log = folder / f"{variant.label}.log".replace(" ", "-").replace(",", "")
        port = _free_port()
        command = [*variant.command, "--host", "127.0.0.1", "--port", str(port)]
        started = time.perf_counter()
        with self._log.open("w") as log:
            # A session of its own, so that Ctrl-C reaches servers only through `stop`.
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
        """Return the processor time of all its processes, in seconds."""
        return sum(_cpu_seconds(process) for process in self._processes())

    def failed(self, problem: str) -> SystemExit:
        """Return the error that ends the benchmark, with the end of the server's log."""
        return SystemExit(f"{self.variant.label} {problem}\n{self._log.read_text()[-3000:]}")

    def _processes(self) -> list[psutil.Process]:
        try:
            root = psutil.Process(self._process.pid)
            return [root, *root.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def stop(self) -> None:
        """End the server with all its processes."""
        processes = self._processes()
        end(self._process)
        _, left = psutil.wait_procs(processes, timeout=5.0)
        for process in left:
            process.kill()


@contextmanager
def started(variants: Iterable[ServerVariant], logs: Path) -> Iterator[dict[str, VariantServer]]:
    """Start servers one after another, and yield them by label; stop all at the context's end.

    Args:
        logs: a folder for their logs.
    """
    with ExitStack() as stack:
        servers = {}
        for variant in variants:
            print(f"starting {variant.label}", file=sys.stderr, flush=True)
            servers[variant.label] = server = VariantServer(variant, logs)
            stack.callback(server.stop)
            print(f"  ready after {server.start_s:.0f} s", file=sys.stderr, flush=True)
        yield servers


@contextmanager
def busy_process() -> Iterator[psutil.Process]:
    """Run a process that keeps a core busy while the context lasts."""
    loop = subprocess.Popen([sys.executable, "-c", BUSY_LOOP], start_new_session=True)
    try:
        yield psutil.Process(loop.pid)
    finally:
        loop.kill()
        loop.wait()


@dataclass(frozen=True, slots=True)
class Cores:
    """Cores kept busy, on average.

    Attributes:
        server: by the server that is measured.
        client: by this process.
        idle: by the other servers.
        elsewhere: by all other processes; time that a virtual machine's host took counts too.
    """

    server: float
    client: float
    idle: float
    elsewhere: float


class Watch:
    """Measures the processor time since it was made.

    Args:
        servers: all running servers by label.
        label: label of the server that is measured.
        beside: a process whose work is expected and not counted.
    """

    def __init__(
        self, servers: Mapping[str, Served], label: str, beside: psutil.Process | None = None
    ) -> None:
        self._servers, self._label, self._beside = servers, label, beside
        self._started, self._before = time.perf_counter(), self._now()

    def _now(self) -> tuple[float, ...]:
        own = {label: server.cpu_seconds() for label, server in self._servers.items()}
        server, client = own.pop(self._label), cpu_seconds(psutil.Process())
        idle = sum(own.values())
        beside = 0.0 if self._beside is None else _cpu_seconds(self._beside)
        return server, client, idle, cpu_seconds() - server - client - idle - beside

    def cores(self) -> Cores:
        seconds = time.perf_counter() - self._started
        return Cores(
            *(
                (now - before) / seconds
                for now, before in zip(self._now(), self._before, strict=True)
            )
        )


def _cpu_seconds(process: psutil.Process) -> float:
    try:
        return cpu_seconds(process)
    except psutil.NoSuchProcess:
        return 0.0


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
