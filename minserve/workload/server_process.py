"""`ServerProcess`: runs a server in a process of its own, to send it a workload."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import TracebackType

import psutil

from minserve.errors import EngineStoppedError
from minserve.workload.endpoint import Endpoint, find_endpoint

STOP_S = 60.0
# Seconds for the processes that a server started, after the server itself has ended.
KILL_S = 5.0
POLL_S = 0.05
# Seconds until a server of another project counts as hung. minserve may have to fetch a model.
PEER_START_S = 600.0
LAST_WORDS = 3000
_ANNOUNCEMENT = re.compile(r" serves .+ on (http://\S+)\n")


@dataclass(frozen=True, slots=True)
class ServerCommand:
    """The command of a server.

    Attributes:
        label: name in messages, tables and pictures.
        command: the command; that of a peer has neither address nor port.
        env: variables in addition to this process's own.
        is_peer: True for a server of another project. It is given a port, and it is ready when its
            ``/health`` says so. It runs in an empty folder, so that it imports nothing from here.
            minserve chooses a port itself and announces its URL when it is ready.
    """

    label: str
    command: Sequence[str]
    env: Mapping[str, str] = field(default_factory=dict)
    is_peer: bool = False


def minserve_command(*flags: str, label: str = "minserve") -> ServerCommand:
    """Return the command of a ``minserve serve`` of this environment.

    Args:
        flags: its flags, without the port.
    """
    return ServerCommand(label, [sys.executable, "-m", "minserve", "serve", "--port", "0", *flags])


class ServerProcess:
    """A server on a free port of this machine, ready once the object exists.

    The server and all processes that it started are ended when the context ends.

    Attributes:
        label: the server's name in messages.
        url: the URL of the server.

    Raises:
        EngineStoppedError: if the server does not start; it holds the end of its output.
    """

    def __init__(self, command: ServerCommand) -> None:
        self.label = command.label
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name) / "log"
        port = _free_port() if command.is_peer else None
        address = [] if port is None else ["--host", "127.0.0.1", "--port", str(port)]
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [*command.command, *address],
                stdout=log,
                stderr=log,
                env=os.environ | command.env,
                cwd=None if port is None else _empty_folder(self._folder.name),
                # Ctrl-C is meant for the program that runs the load: the server must answer until
                # `stop`.
                start_new_session=True,
            )
        try:
            self.url = self._announced_url() if port is None else self._peer_url(port)
        except BaseException:
            self.stop()
            raise

    def __enter__(self) -> ServerProcess:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        return self._process.pid

    @cached_property
    def endpoint(self) -> Endpoint:
        """The server as its clients see it; it is asked when this is first read."""
        return asyncio.run(find_endpoint(self.url))

    def _announced_url(self) -> str:
        """Wait until the server announces its URL, and return it."""
        while not (found := _ANNOUNCEMENT.search(self.output())):
            self._wait_more()
        return found[1]

    def _peer_url(self, port: int) -> str:
        """Wait until the server is healthy, and return its URL."""
        url, limit = f"http://127.0.0.1:{port}", time.monotonic() + PEER_START_S
        while not _is_healthy(url):
            if time.monotonic() > limit:
                raise self.failed(f"was not ready within {PEER_START_S:g} s")
            self._wait_more()
        return url

    def _wait_more(self) -> None:
        if self._process.poll() is not None:
            raise self.failed("did not start")
        time.sleep(POLL_S)

    def failed(self, problem: str) -> EngineStoppedError:
        """Return an error that says what the server did, with the end of its output."""
        return EngineStoppedError(f"{self.label} {problem}:\n{self.last_words()}")

    def last_words(self) -> str:
        """Return the end of the server's output."""
        return self.output()[-LAST_WORDS:].strip()

    def output(self) -> str:
        """Return all that the server has written so far."""
        return self._log.read_text(encoding="utf-8", errors="replace")

    def cpu_seconds(self) -> float:
        """Return the processor time of the server with all its processes, in seconds."""
        total = 0.0
        for process in family(self.pid):
            with suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def stop(self) -> None:
        """Let the server drain and end; kill it, or what is left of its processes, if need be."""
        processes = family(self.pid)
        self._process.terminate()
        try:
            self._process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        _, left = psutil.wait_procs(processes, timeout=KILL_S)
        for process in left:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._folder.cleanup()


def family(pid: int) -> list[psutil.Process]:
    """Return a process and all its descendants; none if it has ended."""
    try:
        root = psutil.Process(pid)
        return [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return []


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5.0) as response:
            return response.status == 200
    except (urllib.error.URLError, OSError):
        return False


def _empty_folder(parent: str) -> Path:
    folder = Path(parent) / "empty"
    folder.mkdir()
    return folder


def _free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
