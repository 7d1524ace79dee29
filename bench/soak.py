"""Keeps a server busy for a long time, and looks whether anything leaks or gets slower.

It starts `minserve serve` and sends it all kinds of requests: streams and whole answers, SLO
classes and best effort, long prompts, several outputs, log probabilities, bursts, bad input, and
clients that leave. Every half minute it stops asking: then no request, KV block, connection, thread
or task may be left, and a fixed request is timed. Memory is that of the server with its replicas.

    .venv/bin/python bench/soak.py --minutes 2
    .venv/bin/python bench/soak.py --minutes 20 --replicas 2 --results soak.json --plot soak.png

The last line is JSON: `leaks`, `rss_growth_pct` (after the first quarter, which is warm-up),
`latency_drift` (the fixed request's time at the end over that at the beginning). The exit code is 0 if
nothing leaked and every answer was right; growth and drift are figures to be judged.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import aiohttp

from minserve.progress_bar import progress_bar
from minserve.workload.plots import check_can_plot, figure_of, save
from minserve.workload.server_process import ServerProcess, minserve_command
from parts.soak.analysis import Sample, summary
from parts.soak.traffic import Traffic
from parts.soak.watching import ServerWatch
from shared.machine import machine
from shared.program import positive, run_program
from shared.servers import wait_until_up

# Seconds of asking between two quiet points, and between two samples.
BUSY_S, SAMPLE_S = 25.0, 3.0
# The system gives memory to the KV cache as it is first written to. One of this size is full during
# the warm-up; the default one would grow for an hour, and look like a leak.
KV_GIB = "0.5"
MOST_PROBLEMS_SHOWN = 20


async def soak(
    url: str, pid: int, args: argparse.Namespace
) -> tuple[list[Sample], list[Sample], Traffic, ServerWatch]:
    """Run all turns; returns all samples, those of quiet points, and what was asked."""
    samples, quiet = list[Sample](), list[Sample]()
    timeout = aiohttp.ClientTimeout(total=None, sock_read=300.0)
    # Connections that stay open would count as the server's.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        watch = ServerWatch(pid, session)
        async with session.get("/v1/models") as response:
            (model,) = (await response.json())["data"]
        traffic = Traffic(session, model["max_model_len"], random.Random(args.seed))
        end, began = time.monotonic() + 60 * args.minutes, time.monotonic()

        async def keep_sampling() -> None:
            while True:
                samples.append(await watch.sample())
                await asyncio.sleep(SAMPLE_S)

        with progress_bar(total=round(60 * args.minutes), unit="s") as bar:
            sampling = asyncio.create_task(keep_sampling())
            while (left := end - time.monotonic()) > 0:
                await traffic.for_seconds(min(BUSY_S, left), args.workers)
                quiet.append(await watch.quiet_sample())
                samples.append(quiet[-1])
                bar.set_postfix(MiB=quiet[-1].rss_mib, requests=traffic.requests.total())
                bar.update(min(round(time.monotonic() - began), bar.total) - bar.n)
            sampling.cancel()
            await asyncio.gather(sampling, return_exceptions=True)
    return samples, quiet, traffic, watch


def plot(samples: Sequence[Sample], quiet: Sequence[Sample], file: Path) -> None:
    """Draw memory and the fixed request's time over the run."""
    figure, (memory, latency) = figure_of(2)
    memory.plot([one.at_s / 60 for one in samples], [one.rss_mib for one in samples], lw=0.8)
    memory.set(title="resident memory", xlabel="minutes", ylabel="MiB")
    memory.set_ylim(bottom=0)
    for one in quiet:
        latency.plot([one.at_s / 60] * len(one.probe_s), one.probe_s, "k.", ms=3)
    latency.set(title="a fixed request of 16 tokens", xlabel="minutes", ylabel="seconds")
    latency.set_ylim(bottom=0)
    save(figure, file)


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--replicas", type=positive, default=1)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--workers", type=positive, default=6, help="clients that ask at once")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, metavar="FILE.json")
    parser.add_argument("--plot", type=Path, metavar="FILE.png")
    args = parser.parse_args()
    if args.plot is not None:
        check_can_plot(args.plot)
    return args


def main() -> int:
    """Run the soak; returns 1 if something leaked or was answered wrongly."""
    args = parse_args()
    flags = ["--model", args.model, "--dtype", "float32", "--replicas", str(args.replicas)]
    flags += ["--kv-cache-gib", KV_GIB]
    with ServerProcess(minserve_command(*flags)) as server:
        wait_until_up(server.url, args.replicas)
        samples, quiet, traffic, watch = asyncio.run(soak(server.url, server.pid, args))
    for problem in traffic.problems[:MOST_PROBLEMS_SHOWN]:
        print(problem, file=sys.stderr)
    result: dict[str, Any] = {
        **summary(samples, quiet),
        "requests": traffic.requests.total(),
        "wrong_answers": len(traffic.problems) + watch.wrong_probes,
        "minutes": args.minutes,
        "replicas": args.replicas,
    }
    if args.results is not None:
        kept = {
            "machine": machine(),
            "result": result,
            "requests": dict(traffic.requests),
            "samples": [asdict(one) for one in samples],
        }
        args.results.write_text(json.dumps(kept) + "\n")
    if args.plot is not None:
        plot(samples, quiet, args.plot)
    print(json.dumps(result))
    return 1 if result["leaks"] or result["wrong_answers"] else 0


if __name__ == "__main__":
    run_program(main)
