"""Servers in processes of their own: started side by side, and waited for until all of them is up."""

from __future__ import annotations

import json
import sys
import time
import urllib.request
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Protocol

from minserve.errors import EngineStoppedError
from minserve.workload.endpoint import Endpoint
from minserve.workload.server_process import ServerCommand, ServerProcess, minserve_command

# Seconds for a full profile of the device, before any server starts.
PROFILE_S = 40.0
# Seconds for the last of several replicas.
UP_S = 120.0


class Served(Protocol):
    """A server that answers, in this machine or elsewhere."""

    endpoint: Endpoint

    def cpu_seconds(self) -> float:
        """Return the processor time of all its processes, in seconds."""

    def failed(self, problem: str) -> Exception:
        """Return the error that ends the benchmark, with the end of the server's log."""


def profiled_minserve(label: str, *flags: str) -> ServerCommand:
    """Return a ``minserve serve`` of this environment.

    It makes a full profile of the device at its first start, so that no profile is refined
    between two runs.

    Args:
        flags: its flags, without the port.
    """
    return minserve_command("--profile-seconds", str(PROFILE_S), *flags, label=label)


@contextmanager
def started(commands: Iterable[ServerCommand]) -> Iterator[dict[str, ServerProcess]]:
    """Start servers one after another, and yield them by label; stop all at the context's end."""
    with ExitStack() as stack:
        servers = {}
        for command in commands:
            print(f"starting {command.label}", file=sys.stderr, flush=True)
            began = time.perf_counter()
            servers[command.label] = server = stack.enter_context(ServerProcess(command))
            print(f"  ready after {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
            assert server.endpoint  # asked for now, where an error is noticed before any work
        yield servers


def wait_until_up(url: str, replicas: int) -> None:
    """Wait until all replicas are up: a server answers as soon as one replica is.

    Raises:
        EngineStoppedError: if they are not up in time.
    """
    deadline = time.monotonic() + UP_S
    while replicas > 1 and time.monotonic() < deadline:
        with urllib.request.urlopen(url + "/replicas") as answer:
            states = [one["state"] for one in json.loads(answer.read())["replicas"]]
        if states == ["up"] * replicas:
            return
        time.sleep(0.2)
    if replicas > 1:
        raise EngineStoppedError(f"of {replicas} replicas, not all are up after {UP_S:g} s")
