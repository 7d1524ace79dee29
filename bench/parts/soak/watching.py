"""Looks at a server from outside: its processes, its metrics, and how long a fixed request takes."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator, Mapping
from contextlib import suppress

import aiohttp
import psutil
from prometheus_client.parser import text_string_to_metric_families

from minserve.workload.server_process import family
from parts.soak.analysis import Sample

PREFIX = "minserve:"
BUSY = ("num_requests_running", "num_requests_waiting", "num_requests_unfinished",
        "kv_cache_usage_perc")  # fmt: skip
PROBE = {"prompt": "The capital of France is", "max_tokens": 16, "temperature": 0,
         "ignore_eos": True}  # fmt: skip
PROBES = 5
QUIET_S = 120.0


class ServerWatch:
    """Takes samples of a server.

    Args:
        pid: the server's process.
    """

    def __init__(self, pid: int, session: aiohttp.ClientSession) -> None:
        self._pid, self._session = pid, session
        self._began = time.monotonic()
        self.wrong_probes = 0
        self._text: str | None = None

    async def sample(self, probe_s: tuple[float, ...] = ()) -> Sample:
        """Return what the processes hold now."""
        gauges = await self._gauges()
        rss = fds = sockets = threads = 0
        for process in family(self._pid):
            with suppress(psutil.NoSuchProcess), process.oneshot():
                rss += process.memory_info().rss
                fds += process.num_fds()
                sockets += len(process.net_connections())
                threads += process.num_threads()
        return Sample(
            at_s=round(time.monotonic() - self._began, 1),
            rss_mib=round(rss / 2**20, 1),
            fds=fds,
            sockets=sockets,
            threads=threads,
            tasks=round(gauges["asyncio_tasks"]),
            busy={name: gauges[name] for name in BUSY if gauges[name]},
            probe_s=probe_s,
        )

    async def quiet_sample(self) -> Sample:
        """Wait until nothing is left of any request, or too long, and take a sample with probes."""
        end = time.monotonic() + QUIET_S
        while (busy := (await self.sample()).busy) and time.monotonic() < end:
            await asyncio.sleep(0.2)
        probes = () if busy else tuple([await self._probe() for _ in range(PROBES)])
        # The last probe's blocks are given back in the iteration after it.
        while (sample := await self.sample(probes)).busy and time.monotonic() < end:
            await asyncio.sleep(0.05)
        return sample

    async def _probe(self) -> float:
        """Return the seconds that the fixed request takes, and look at its text."""
        began = time.perf_counter()
        async with self._session.post("/v1/completions", json=PROBE) as response:
            text = (await response.json())["choices"][0]["text"]
        seconds = time.perf_counter() - began
        self._text = text if self._text is None else self._text
        self.wrong_probes += text != self._text
        return round(seconds, 4)

    async def _gauges(self) -> Mapping[str, float]:
        async with self._session.get("/metrics") as response:
            return gauges(await response.text())


def gauges(text: str) -> dict[str, float]:
    """Return the gauges of a scrape by their names without prefix, summed over replicas."""
    found: dict[str, float] = {}
    for name, value in _samples(text):
        found[name] = found.get(name, 0.0) + value
    return found


def _samples(text: str) -> Iterator[tuple[str, float]]:
    for metric in text_string_to_metric_families(text):
        if metric.type == "gauge":
            for one in metric.samples:
                yield one.name.removeprefix(PREFIX), one.value
