"""Server processes for `slo_serving.py`, and the load of the machine beside them."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from minserve.errors import MinserveError
from minserve.machine import Machine
from minserve.planner.policies import PROMISING
from minserve.planner.predict.perf_model import PerfModel
from minserve.workload.client import Load
from minserve.workload.conversation import Conversation
from minserve.workload.server_process import ServerProcess
from shared.slo_load import measure

MOST_SEQS = 128
KV_GIB = 2.0
# Resident memory of a server with the embedded model, with some reserve.
SERVER_GIB = 2.0
# A run beside other work says little: of two threads, each waits whenever the other is delayed.
DISTURBED_CORES = 0.15
# Seconds for a full profile of the device, before any server starts.
PROFILE_S = 40.0
QUIET_S = 60.0
# The draft length of policies that do not choose it themselves: longer ones pay less often.
FIXED_SPECULATION = 3


@dataclass(frozen=True, slots=True)
class PolicyVariant:
    """A policy, its token budget if that is not the server's default, and its speculator."""

    policy: str
    token_budget: int | None = None
    speculator: str = "off"

    @property
    def label(self) -> str:
        """The policy and the speculator, which are compared."""
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


class SloServer:
    """A `minserve serve` process for one variant."""

    def __init__(self, variant: PolicyVariant, model: str, slo_classes: Path) -> None:
        try:
            self._process = ServerProcess(
                ["--model", model, "--no-prefix-caching", "--kv-cache-gib", str(KV_GIB),
                 "--slo-classes", str(slo_classes), *variant.flags]
            )  # fmt: skip
        except MinserveError as error:
            raise SystemExit(str(error)) from None

    def measure(
        self, workload: Sequence[Conversation], model: PerfModel, slo_field: Mapping[str, Any]
    ) -> tuple[Load, float, float]:
        """Send a workload to the server.

        Returns:
            the answers, a lone request's seconds per token, and the cores that processes other than
            server and client took.
        """
        process = psutil.Process(self._process.pid)

        def elsewhere() -> float:
            return cpu_seconds() - cpu_seconds(process) - cpu_seconds(psutil.Process())

        started, before = time.perf_counter(), elsewhere()
        try:
            load, lone_tpot_s = measure(self._process.url, workload, model, slo_field)
            cores = (elsewhere() - before) / (time.perf_counter() - started)
        except (aiohttp.ClientError, psutil.Error, MinserveError) as error:
            last_words = self._process.last_words()
            raise SystemExit(f"the server broke off: {error!r}\n{last_words}") from None
        return load, lone_tpot_s, cores

    def stop(self) -> None:
        self._process.stop()


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


class Fleet:
    """Servers by variant, started when first needed and kept as long as memory allows."""

    def __init__(self, model: str, slo_classes: Path) -> None:
        self._model, self._slo_classes = model, slo_classes
        self._servers: dict[PolicyVariant, SloServer] = {}

    def server(self, variant: PolicyVariant) -> tuple[SloServer, bool]:
        """Return the variant's server, and whether it has just been started."""
        if variant in self._servers:
            return self._servers[variant], False
        while self._servers and Machine.look().free_memory < SERVER_GIB * 2**30:
            self._servers.pop(next(iter(self._servers))).stop()
        self._servers[variant] = SloServer(variant, self._model, self._slo_classes)
        return self._servers[variant], True

    def stop(self) -> None:
        for server in self._servers.values():
            server.stop()
        self._servers.clear()
