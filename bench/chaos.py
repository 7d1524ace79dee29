"""Checks that nothing is lost while replicas are killed, hang and are restarted under load.

It starts `minserve serve --replicas 4` with the embedded model in float32 and sends it a mixed
load: greedy and sampled, one output and two, with and without an SLO, streamed. The same
requests are answered twice: first undisturbed, then while replicas are killed (SIGKILL), stopped
(SIGSTOP) and restarted (`minserve ctl restart`), all at random times. Every stream must bring
exactly the tokens of the undisturbed run. With `--tensor-parallel` each replica is a group of
ranks, any of which may be hit.

    .venv/bin/python bench/chaos.py                 # two minutes of chaos
    .venv/bin/python bench/chaos.py --seconds 60
    .venv/bin/python bench/chaos.py --tensor-parallel 2 --seconds 60

The last line is JSON; the exit code is 0 only if nothing was lost, doubled or changed.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import aiohttp
import psutil

from minserve.progress_bar import progress_bar
from minserve.workload.data_files import read_prompts
from minserve.workload.server_process import ServerProcess, minserve_command
from shared.program import run_program

MODEL = "smollm2"
REPLICA_TIMEOUT_S = 3.0
# Requests that run at once while the true answers are found.
AT_ONCE = 24
NUM_RANKS = 4
DRAIN_S = 300.0
HITS = ("kill", "kill", "stop", "restart")


@dataclass(slots=True)
class StreamResult:
    """The answer of a stream.

    Attributes:
        tokens: the tokens of each output.
        error: why the answer is not whole; empty if it is.
    """

    tokens: list[list[str]] = field(default_factory=list)
    error: str = ""


@dataclass(slots=True)
class Hits:
    """Counts of what was done to replicas."""

    kills: int = 0
    stops: int = 0
    restarts: int = 0


def make_requests(num: int, rng: random.Random) -> list[dict[str, Any]]:
    """Return bodies of completions, of every kind."""
    prompts = list(read_prompts("self_instruct_user"))
    bodies = []
    for number in range(num):
        body: dict[str, Any] = {
            "model": MODEL,
            "prompt": rng.choice(prompts)[:600],
            "max_tokens": rng.randint(16, 96),
            "ignore_eos": True,
            "logprobs": 0,
            "stream": True,
            "n": 2 if number % 5 == 4 else 1,
        }
        sampled = {"temperature": 0.9, "top_p": 0.95, "seed": number}
        body |= {"temperature": 0} if number % 2 else sampled
        if number % 3 == 0:
            body["slo"] = {"ttft_ms": 5000, "tpot_ms": 500}
        bodies.append(body)
    return bodies


async def ask(session: aiohttp.ClientSession, body: dict[str, Any]) -> StreamResult:
    """Send one request and read its whole stream; a refusal with 503 is tried again."""
    while True:
        answer = StreamResult([[] for _ in range(body["n"])])
        try:
            async with session.post("/v1/completions", json=body) as response:
                if response.status == 503:
                    await asyncio.sleep(0.2)
                    continue
                if response.status != 200:
                    answer.error = f"HTTP {response.status}: {(await response.text())[:200]}"
                    return answer
                await _read(response, answer)
        except aiohttp.ClientError as error:
            answer.error = f"{type(error).__name__}: {error}"
        return answer


async def _read(response: aiohttp.ClientResponse, answer: StreamResult) -> None:
    done = False
    async for line in response.content:
        if line.startswith(b"data: [DONE]"):
            done = True
        elif line.startswith(b"data: "):
            chunk = json.loads(line[6:])
            if "error" in chunk:
                answer.error = str(chunk["error"])
                return
            for choice in chunk["choices"]:
                answer.tokens[choice["index"]] += choice["logprobs"]["tokens"]
    if not done:
        answer.error = "the stream ended without [DONE]"


async def replicas(session: aiohttp.ClientSession) -> list[dict[str, Any]]:
    """Return the state of each replica as the controller reports it."""
    async with session.get("/replicas") as response:
        return (await response.json())["replicas"]


async def all_up(session: aiohttp.ClientSession) -> bool:
    """Wait until every replica is up; returns False if the time runs out."""
    deadline = time.monotonic() + DRAIN_S
    while time.monotonic() < deadline:
        if all(one["state"] == "up" for one in await replicas(session)):
            return True
        await asyncio.sleep(0.2)
    return False


async def hit_at_random(
    session: aiohttp.ClientSession, seconds: float, rng: random.Random, hits: Hits
) -> None:
    """Kill, stop and restart replicas, about every four seconds."""
    end = time.monotonic() + seconds
    restarting: list[asyncio.Task[None]] = []

    async def restart(number: int) -> None:
        async with session.post(f"/replicas/{number}/restart") as response:
            await response.read()

    while (pause := rng.uniform(2.0, 6.0)) < end - time.monotonic():
        await asyncio.sleep(pause)
        there = [one for one in await replicas(session) if one["pid"] is not None]
        if not there:
            continue
        # The busiest replica has most to lose.
        one = max(there, key=lambda one: (one["requests"], rng.random()))
        how = rng.choice(HITS)
        if how == "restart":
            hits.restarts += 1
            restarting.append(asyncio.create_task(restart(one["replica"])))
        else:
            hits.kills += how == "kill"
            hits.stops += how == "stop"
            pid = rng.choice([one["pid"], *ranks_of(one["pid"])])
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    await asyncio.gather(*restarting)


def ranks_of(pid: int) -> list[int]:
    """Return the other ranks of a replica, which its process has started."""
    with suppress(psutil.NoSuchProcess):
        return [child.pid for child in psutil.Process(pid).children()]
    return []


async def true_answers(
    session: aiohttp.ClientSession, bodies: list[dict[str, Any]]
) -> list[StreamResult]:
    """Return the answers without any disturbance."""
    gate, bar = (
        asyncio.Semaphore(AT_ONCE),
        progress_bar(total=len(bodies), desc="undisturbed", unit="req"),
    )

    async def one(body: dict[str, Any]) -> StreamResult:
        async with gate:
            answer = await ask(session, body)
            bar.update()
            return answer

    with bar:
        return await asyncio.gather(*(one(body) for body in bodies))


async def answers_in_chaos(
    session: aiohttp.ClientSession,
    bodies: list[dict[str, Any]],
    seconds: float,
    rng: random.Random,
    hits: Hits,
) -> list[StreamResult]:
    """Return the answers to the same requests, sent at random times while replicas are hit."""
    due = sorted(rng.uniform(0.0, seconds) for _ in bodies)
    bar = progress_bar(total=len(bodies), desc="in chaos", unit="req")

    async def one(body: dict[str, Any], at: float) -> StreamResult:
        await asyncio.sleep(at)
        answer = await ask(session, body)
        bar.update()
        return answer

    with bar:
        hitting = asyncio.create_task(hit_at_random(session, seconds, rng, hits))
        found = await asyncio.gather(*(one(b, at) for b, at in zip(bodies, due, strict=True)))
        await hitting
    return found


def judge(truth: list[StreamResult], found: list[StreamResult]) -> dict[str, int]:
    """Return the number of wrong answers, by kind: tokens missing, too many, or other tokens."""
    lost = doubled = mismatched = 0
    for right, answer in zip(truth, found, strict=True):
        pairs = list(zip(right.tokens, answer.tokens, strict=True))
        if answer.error or any(len(own) < len(wanted) for wanted, own in pairs):
            lost += 1
        elif any(len(own) > len(wanted) for wanted, own in pairs):
            doubled += 1
        elif any(own != wanted for wanted, own in pairs):
            mismatched += 1
    return {"lost": lost, "doubled": doubled, "mismatched": mismatched}


async def run(url: str, args: argparse.Namespace) -> dict[str, Any]:
    """Run both passes and return the results, with the state of the block pools at the end."""
    rng, hits = random.Random(args.seed), Hits()
    bodies = make_requests(round(args.rate * args.seconds), rng)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=DRAIN_S)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(url, timeout=timeout, connector=connector) as session:
        up = await all_up(session)
        truth = await true_answers(session, bodies)
        if not up or any(answer.error for answer in truth):
            raise SystemExit(f"the undisturbed run failed: {[a.error for a in truth if a.error]}")
        before = sum(one["lost"] for one in await replicas(session))
        found = await answers_in_chaos(session, bodies, args.seconds, rng, hits)
        back = await all_up(session)
        # A replica that goes idle checks its pool's books, and ends if they are wrong: that would
        # be one loss more than were caused here.
        await asyncio.sleep(2.0)
        now = await replicas(session)
        lost = sum(one["lost"] for one in now) - before
    for answer in found:
        if answer.error:
            print(answer.error, file=sys.stderr)
    return {
        "requests": len(bodies),
        **judge(truth, found),
        "kills": hits.kills,
        "stops": hits.stops,
        "restarts": hits.restarts,
        "replicas_lost": lost,
        "pools_clean": back and lost <= hits.kills + hits.stops,
    }


def main() -> int:
    """Run the check; returns 1 if something was wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120.0, help="time of chaos in seconds")
    parser.add_argument("--rate", type=float, default=1.0, help="requests per second")
    parser.add_argument(
        "--replicas", type=int, help="default: 4, or with --tensor-parallel as many as have 4 ranks"
    )
    parser.add_argument("--tensor-parallel", type=int, default=1, help="ranks of each replica")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    replicas = args.replicas or max(1, NUM_RANKS // args.tensor_parallel)
    flags = [
        "--model", MODEL, "--dtype", "float32", "--replicas", str(replicas),
        "--tensor-parallel", str(args.tensor_parallel), "--replica-timeout", str(REPLICA_TIMEOUT_S),
    ]  # fmt: skip
    with ServerProcess(minserve_command(*flags)) as server:
        result = asyncio.run(run(server.url, args))
    print(json.dumps(result))
    bad = result["lost"] + result["doubled"] + result["mismatched"]
    return 1 if bad or not result["pools_clean"] else 0


if __name__ == "__main__":
    run_program(main)
