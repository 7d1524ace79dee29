"""The real side of `simulated_vs_real.py`: a server of one policy, its load, and its metrics."""

from __future__ import annotations

import argparse
import asyncio
import math
import statistics
import time
import urllib.request
from collections.abc import Mapping, Sequence

import psutil
from prometheus_client.parser import text_string_to_metric_families

from minserve.slo.objectives import SLO
from minserve.workload.answer import Answer
from minserve.workload.client import Load, ask, drive
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.endpoint import Endpoint, open_session
from minserve.workload.server_process import ServerProcess, minserve_command
from minserve.workload.turn_targets import Speed
from minserve.workload.zero_load import measure_speed
from parts.simulated_vs_real.report import Inputs
from shared.cpu_time import cpu_seconds

BLOCK_SIZE = 16
KV_TOKENS = 32768
BEST_EFFORT_SHARE = 0.05
# The quantile of iterations' surprise from which their scatter is computed.
QUANTILE = 0.99
LONE_REQUESTS = 3
LONE_TOKENS = 32
# Seconds over which the cores of other processes are averaged.
SLICE_S = 2.0
# By name and, for a bucket, its upper bound.
Metrics = Mapping[tuple[str, str], float]


def form_flags(policy: str) -> list[str]:
    """Return the flags with which a server forms batches as the simulator does."""
    return ["--no-chunked-prefill"] if policy == "fcfs" else []


class PolicyServer:
    """A `minserve serve` of one policy, and the values of its metrics."""

    def __init__(self, args: argparse.Namespace, policy: str) -> None:
        command = minserve_command(
            "--model", args.model, *thread_flags(args), "--policy", policy,
            "--token-budget", str(args.token_budget), "--max-num-seqs", str(args.max_num_seqs),
            "--block-size", str(BLOCK_SIZE), "--num-blocks", str(KV_TOKENS // BLOCK_SIZE),
            "--best-effort-share", str(BEST_EFFORT_SHARE), "--no-prefix-caching",
            "--speculator", "off", *form_flags(policy), label=policy,
        )  # fmt: skip
        self._process = ServerProcess(command)
        try:
            self.endpoint = self._process.endpoint
            # This also warms the server up.
            self.speed = asyncio.run(measure_speed(self.endpoint))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        self._process.stop()

    def run(
        self, workload: Sequence[Conversation], model: Speed
    ) -> tuple[Load, Inputs, list[float]]:
        """Send a workload to the server.

        Returns:
            the answers, the inputs of a simulation, and the cores that other processes took in each
            slice of the run.
        """
        return asyncio.run(self._run(workload, model))

    async def _run(
        self, workload: Sequence[Conversation], model: Speed
    ) -> tuple[Load, Inputs, list[float]]:
        idle = self._metrics()
        await _lone_requests(self.endpoint)
        before = self._metrics()
        load, slices = Load(workload), []
        watch = asyncio.create_task(_watch(psutil.Process(self._process.pid), slices))
        await drive(self.endpoint, load, model)
        watch.cancel()
        inputs = told(load.answers, _since(before, idle), _since(self._metrics(), before))
        return load, inputs, slices

    def _metrics(self) -> Metrics:
        with urllib.request.urlopen(f"{self._process.url}/metrics") as response:
            families = text_string_to_metric_families(response.read().decode())
        return {
            (sample.name.removeprefix("minserve:"), sample.labels.get("le", "")): sample.value
            for family in families
            for sample in family.samples
            if set(sample.labels) <= {"le"}
        }


async def _watch(server: psutil.Process, slices: list[float]) -> None:
    """Note the cores that processes other than server and client take, slice by slice."""

    def elsewhere() -> float:
        return cpu_seconds() - cpu_seconds(server) - cpu_seconds(psutil.Process())

    then, before = time.perf_counter(), elsewhere()
    while True:
        await asyncio.sleep(SLICE_S)
        now, after = time.perf_counter(), elsewhere()
        slices.append((after - before) / (now - then))
        then, before = now, after


def _since(now: Metrics, before: Metrics) -> Metrics:
    return {key: value - before.get(key, 0.0) for key, value in now.items()}


async def _lone_requests(endpoint: Endpoint) -> None:
    """Send short prompts, one after another: iterations of one token each, with gaps between."""
    turn = Turn(slo=SLO(ttft=1e6), prompt_tokens=1, output_tokens=LONE_TOKENS)
    async with open_session(endpoint.url) as session:
        for _ in range(LONE_REQUESTS):
            targets = turn.slo.resolve(0.0, 0.0)
            answer = Answer(turn, targets, time.perf_counter())
            await ask(session, endpoint, answer, endpoint.body(["Once"], LONE_TOKENS))


def told(answers: Sequence[Answer], lone: Metrics, run: Metrics) -> Inputs:
    """Return what the simulator does not know by itself, from two differences of metrics.

    Scatter is a factor that is above 1 on average; the slowness is given without that factor.

    Args:
        lone: difference over the lone requests.
        run: difference over the whole run.
    """
    planning_s = run["planning_seconds_sum", ""]
    device_s = run["iteration_seconds_sum", ""] - planning_s
    waits = [one.token_times[0] - one.due_s for one in answers if one.token_times]
    engine_s = _mean(run, "time_to_first_token_seconds")
    gap_s = _mean(lone, "inter_token_latency_seconds") - _mean(lone, "iteration_seconds")
    worst = quantile_of(run, "iteration_surprise", QUANTILE)
    noise = max(0.0, math.log(worst)) / statistics.NormalDist().inv_cdf(QUANTILE)
    return Inputs(
        slowness=device_s / run["iteration_profiled_seconds_sum", ""] / math.exp(noise**2 / 2),
        planning_s=planning_s / run["iteration_seconds_count", ""],
        gap_s=max(0.0, gap_s),
        request_s=max(0.0, statistics.fmean(waits) - engine_s),
        noise=noise,
    )


def quantile_of(metrics: Metrics, name: str, q: float) -> float:
    """Return a quantile of a histogram, interpolated linearly within a bucket.

    Values above all bounds count as the highest bound.
    """
    buckets = sorted(
        (float(bound), count)
        for (sample, bound), count in metrics.items()
        if sample == f"{name}_bucket"
    )
    wanted, low, below = q * buckets[-1][1], 0.0, 0.0
    for high, count in buckets:
        if count >= wanted and count > below:
            inside = (wanted - below) / (count - below)
            return low if math.isinf(high) else low + inside * (high - low)
        low, below = high, count
    return low


def _mean(metrics: Metrics, name: str) -> float:
    return metrics[f"{name}_sum", ""] / metrics[f"{name}_count", ""]


def thread_flags(args: argparse.Namespace) -> list[str]:
    """Return the flags of a server, or of this program, that say how many threads it has."""
    return [] if args.threads is None else ["--threads", str(args.threads)]
