"""Processor time: of servers, of the client, and of other work on the machine."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Protocol

import psutil

# A run beside other work says little: of two threads, each waits whenever the other is delayed.
DISTURBED_CORES = 0.15
QUIET_S = 60.0
# It ends when its parent process ends, also if the parent is killed.
BUSY_LOOP = """
import os
parent = os.getppid()
while os.getppid() == parent:
    sum(range(100_000))
"""


class Timed(Protocol):
    """Something whose processor time can be read."""

    def cpu_seconds(self) -> float:
        """Return the processor time of all its processes, in seconds."""


def cpu_seconds(process: psutil.Process | None = None) -> float:
    """Return the processor seconds used so far by a process, or by everything on the machine.

    For the machine, time that a virtual machine's host gave to other machines counts too.
    """
    times = psutil.cpu_times() if process is None else process.cpu_times()
    return times.user + times.system + getattr(times, "steal", 0.0)


def await_quiet() -> None:
    """Wait for other work on the machine to end, at most `QUIET_S` seconds."""
    limit = time.perf_counter() + QUIET_S
    cores = psutil.cpu_count()
    while psutil.cpu_percent(interval=2.0) / 100 * cores > DISTURBED_CORES:
        if time.perf_counter() > limit:
            return


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
        self, servers: Mapping[str, Timed], label: str, beside: psutil.Process | None = None
    ) -> None:
        self._servers, self._label, self._beside = servers, label, beside
        self._started, self._before = time.perf_counter(), self._now()

    def _now(self) -> tuple[float, ...]:
        own = {label: server.cpu_seconds() for label, server in self._servers.items()}
        server, client = own.pop(self._label), cpu_seconds(psutil.Process())
        idle = sum(own.values())
        beside = 0.0 if self._beside is None else _seconds_so_far(self._beside)
        return server, client, idle, cpu_seconds() - server - client - idle - beside

    def cores(self) -> Cores:
        seconds = time.perf_counter() - self._started
        return Cores(
            *(
                (now - before) / seconds
                for now, before in zip(self._now(), self._before, strict=True)
            )
        )


def _seconds_so_far(process: psutil.Process) -> float:
    try:
        return cpu_seconds(process)
    except psutil.NoSuchProcess:
        return 0.0
