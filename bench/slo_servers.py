"""Server processes for `slo_serving.py`, and how busy the machine is beside them."""

from __future__ import annotations

import asyncio
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil
from slo_load import Answer, Offered, drive

from minserve.planner.policies import PROMISING

STOP_S = 60.0
MOST_SEQS = 128
KV_GIB = 2.0
# Resident memory of a server with the embedded model, and some.
SERVER_GIB = 2.0
# A run beside other work says little: two threads wait for each other when one is held up.
DISTURBED_CORES = 0.15
QUIET_S = 60.0


# What policies that do not choose the length themselves draft: longer pays less often.
FIXED_SPECULATION = 3


@dataclass(frozen=True, slots=True)
class Variant:
    """A policy, the token budget where it is not the server's default, and who drafts."""

    policy: str
    token_budget: int | None = None
    speculator: str = "off"

    @property
    def label(self) -> str:
        """Policy and speculator: what is compared."""
        return self.policy if self.speculator == "off" else f"{self.policy}+{self.speculator}"

    def __str__(self) -> str:
        return self.label if self.token_budget is None else f"{self.label} {self.token_budget}"

    @property
    def flags(self) -> list[str]:
        flags = ["--policy", self.policy, "--speculator", self.speculator]
        if self.speculator != "off" and self.policy not in PROMISING:
            flags += ["--max-speculation", str(FIXED_SPECULATION)]
        if self.token_budget is not None:
            most = min(MOST_SEQS, self.token_budget)
            flags += ["--token-budget", str(self.token_budget), "--max-num-seqs", str(most)]
        return flags


class Server:
    """A `minserve serve` process."""

    def __init__(self, variant: Variant, model: str, slo_classes: Path, log: Path) -> None:
        self._log = log
        command = [sys.executable, "-m", "minserve", "serve", "--model", model, "--port", "0",
                   "--no-prefix-caching", "--kv-cache-gib", str(KV_GIB),
                   "--slo-classes", str(slo_classes), *variant.flags]  # fmt: skip
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command, stdout=subprocess.PIPE, stderr=errors, text=True
            )
        self.url = self._read_url()

    def _read_url(self) -> str:
        """Wait until the server announces itself."""
        for line in self._process.stdout:
            if found := re.search(r" serves .+ on (http://\S+)", line):
                return found[1]
        raise self.failed("the server did not start")

    def drive(
        self, trace: Sequence[Offered], slo_field: Mapping[str, Any]
    ) -> tuple[list[Answer], float, float]:
        """Send it a trace.

        Returns:
            the answers, a lone request's time per token, and the cores that processes other
            than server and client took.
        """
        process = psutil.Process(self._process.pid)

        def elsewhere() -> float:
            return cpu_seconds() - cpu_seconds(process) - cpu_seconds(psutil.Process())

        started, before = time.perf_counter(), elsewhere()
        try:
            answers, lone_tpot_s = asyncio.run(drive(self.url, trace, slo_field))
            cores = (elsewhere() - before) / (time.perf_counter() - started)
        except (aiohttp.ClientError, psutil.Error) as error:
            raise self.failed(f"the server broke off: {error!r}") from None
        return answers, lone_tpot_s, cores

    def failed(self, problem: str) -> SystemExit:
        """The end of the benchmark, with what the server said last."""
        return SystemExit(f"{problem}\n{self._log.read_text()[-3000:]}")

    def stop(self) -> None:
        self._process.terminate()
        try:
            self._process.wait(timeout=STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()


def cpu_seconds(process: psutil.Process | None = None) -> float:
    """Processor time used so far by a process, or by everything on the machine and beside
    it: what a virtual machine's host gave to others counts too.
    """
    times = psutil.cpu_times() if process is None else process.cpu_times()
    return times.user + times.system + getattr(times, "steal", 0.0)


def await_quiet() -> None:
    """Give other work on the machine some time to end."""
    limit = time.perf_counter() + QUIET_S
    cores = psutil.cpu_count()
    while psutil.cpu_percent(interval=2.0) / 100 * cores > DISTURBED_CORES:
        if time.perf_counter() > limit:
            return


class Fleet:
    """Servers by variant: started when first asked for, kept as long as memory allows."""

    def __init__(self, model: str, slo_classes: Path, logs: Path) -> None:
        self._model, self._slo_classes, self._logs = model, slo_classes, logs
        self._servers: dict[Variant, Server] = {}

    def server(self, variant: Variant) -> tuple[Server, bool]:
        """The variant's server, and whether it has just been started."""
        if variant in self._servers:
            return self._servers[variant], False
        while self._servers and psutil.virtual_memory().available < SERVER_GIB * 2**30:
            self._servers.pop(next(iter(self._servers))).stop()
        log = self._logs / f"{variant}.log".replace(" ", "-")
        self._servers[variant] = Server(variant, self._model, self._slo_classes, log)
        return self._servers[variant], True

    def stop(self) -> None:
        for server in self._servers.values():
            server.stop()
        self._servers.clear()
