"""Workload and open-loop client of `slo_serving.py`.

Three classes with real prompts, lognormal output lengths and SLOs as slowdowns; arrivals
that are Poisson or bursty. A request goes out at its time whatever is outstanding, and
its latencies count from that time, so that a slow server (or client) cannot hide in
requests that were sent late. All of it is drawn from seeds.
"""

from __future__ import annotations

import asyncio
import json
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import aiohttp

from minserve.planner.perf_model import PerfModel
from minserve.slo import SLO, Targets

# Coefficient of variation of the times between arrivals.
VARIATION = {"poisson": 1.0, "bursty": 3.0}
# After the last arrival; a request's own deadlines all lie before it.
DRAIN_S = 60.0
POLL_S = 0.1
LONE_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and its length in the model's tokens."""

    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkClass:
    """One kind of request.

    Attributes:
        prompts_file: in minserve/workload/data.
        ttft_slowdown: multiple of the prompt's zero-load prefill time.
        tight: whether the pace is the tight or the loose one.
        output_mean, output_sd: tokens, of SLOs-Serve's evaluation (arXiv 2504.08784).
        scale: of both, to what a small CPU can serve.
        longest: outputs are cut here.
    """

    name: str
    prompts_file: str
    ttft_slowdown: float
    tight: bool
    output_mean: float
    output_sd: float
    scale: float
    longest: int

    def slo(self, tight: float, loose: float) -> SLO:
        """The promise, with its pace as a multiple of the zero-load time per token."""
        pace = tight if self.tight else loose
        return SLO(ttft_slowdown=self.ttft_slowdown, tpot_slowdown=pace, name=self.name)

    def draw_length(self, rng: random.Random) -> int:
        """Output tokens: lognormal with the class's mean and sd, scaled, rounded and cut."""
        variance = math.log(1 + (self.output_sd / self.output_mean) ** 2)
        mu = math.log(self.output_mean) - variance / 2
        drawn = self.scale * rng.lognormvariate(mu, math.sqrt(variance))
        return max(1, min(self.longest, round(drawn)))


CLASSES = (
    WorkClass(name="coding", prompts_file="humaneval", ttft_slowdown=5, tight=True,
              output_mean=26, output_sd=47, scale=0.7, longest=96),
    WorkClass(name="chat", prompts_file="self_instruct_user", ttft_slowdown=5, tight=False,
              output_mean=266, output_sd=160, scale=0.18, longest=128),
    WorkClass(name="summarization", prompts_file="scitldr_abstracts_test", ttft_slowdown=3,
              tight=False, output_mean=202, output_sd=234, scale=0.17, longest=128),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Offered:
    """A request of the trace: when it is due, what it asks for and what it is promised."""

    at_s: float
    name: str
    prompt: Prompt
    num_output_tokens: int
    targets: Targets


@dataclass(slots=True)
class Answer:
    """What became of a request; times on the client's clock.

    Attributes:
        due_s: when it was to be sent; latencies count from here.
        sent_s: when it was sent.
        token_times: one per output token, when its text came.
        ended: ``done``, ``rejected``, ``failed``; ``cut`` where the run ended before it.
        error: why it failed.
        reported: the ``usage.slo`` of the answer.
    """

    offered: Offered
    due_s: float
    sent_s: float = math.nan
    token_times: list[float] = field(default_factory=list)
    ended: str = "cut"
    error: str | None = None
    reported: Mapping[str, Any] | None = None

    def is_hopeless(self, now: float) -> bool:
        """True once neither form of attainment can be reached: the first token is late, or
        now is past the time when the last one is due. Until then the mean may recover.
        """
        targets = self.offered.targets
        first = self.token_times[0] if self.token_times else now
        if first - self.due_s > targets.ttft_s:
            return True
        gaps = self.offered.num_output_tokens - 1
        return now - first > gaps * targets.stages[-1].tpot_s


def arrival_times(process: str, rate: float, seconds: float, rng: random.Random) -> list[float]:
    """Arrivals within a window, exactly rate x seconds of them.

    The times between them are Gamma distributed with the process's coefficient of variation
    (1 is Poisson), and stretched to fill the window: the number that falls into a short
    window scatters widely, and would make runs at one rate differ in load.

    Args:
        process: ``poisson`` or ``bursty``.
        rate: requests per second.
    """
    shape = VARIATION[process] ** -2
    gaps = [rng.gammavariate(shape, 1.0) for _ in range(max(1, round(rate * seconds)) + 1)]
    stretch = seconds / sum(gaps)
    return [stretch * passed for passed in accumulate(gaps[:-1])]


def make_trace(
    process: str,
    rate: float,
    seconds: float,
    seed: int,
    *,
    prompts: Mapping[str, Sequence[Prompt]],
    slos: Mapping[str, SLO],
    model: PerfModel,
    weights: Sequence[float] = (1, 1, 1),
) -> list[Offered]:
    """Requests in order of time; the same for the same arguments.

    Args:
        prompts, slos: by class. No prompt comes twice before all of its class came.
        model: the device's speed, which turns slowdowns into seconds.
        weights: of the classes in the mix, in the order of ``CLASSES``.
    """
    rng = random.Random(f"{seed} {process} {rate:g}")
    times = arrival_times(process, rate, seconds, rng)
    decks: dict[str, list[Prompt]] = {work.name: [] for work in CLASSES}
    trace = []
    for at_s, work in zip(times, rng.choices(CLASSES, weights, k=len(times)), strict=True):
        if not decks[work.name]:
            decks[work.name] = rng.sample(prompts[work.name], len(prompts[work.name]))
        prompt = decks[work.name].pop()
        targets = slos[work.name].resolve(
            model.zero_load_prefill_s(prompt.num_tokens),
            model.zero_load_decode_s(prompt.num_tokens),
        )
        trace.append(Offered(at_s, work.name, prompt, work.draw_length(rng), targets))
    return trace


def write_classes(slos: Mapping[str, SLO], file: Path) -> None:
    """The classes as the server reads them."""
    tables = [
        f"[{name}]\nttft_slowdown = {slo.ttft_slowdown}\ntpot_slowdown = {slo.tpot_slowdown}\n"
        for name, slo in slos.items()
    ]
    file.write_text("\n".join(tables), encoding="utf-8")


def slo_fields(slos: Mapping[str, SLO], form: str) -> dict[str, Any]:
    """What a class's requests carry: its name, or an object with its objectives."""
    if form == "class":
        return {name: name for name in slos}
    return {
        name: {"ttft_slowdown": slo.ttft_slowdown, "tpot_slowdown": slo.tpot_slowdown}
        for name, slo in slos.items()
    }


async def drive(
    url: str, trace: Sequence[Offered], slo_field: Mapping[str, Any]
) -> tuple[list[Answer], float]:
    """Send a trace and collect what comes back.

    Ends when all is answered, or when no outstanding request can attain its SLO any more;
    these are cut off, which frees their memory at once.

    Args:
        slo_field: what a class sends as ``slo``.

    Returns:
        the answers, and the time per token of a lone request, the slower of one before and
        one after the trace: the speed of the machine at the time.
    """
    connector = aiohttp.TCPConnector(limit=0)
    timeout = aiohttp.ClientTimeout(total=None)
    async with aiohttp.ClientSession(url, connector=connector, timeout=timeout) as session:
        before = await _lone_tpot(session)
        start = time.perf_counter() + POLL_S
        answers = [Answer(offered, start + offered.at_s) for offered in trace]
        tasks = []
        for answer in answers:
            await asyncio.sleep(answer.due_s - time.perf_counter())
            ask = _ask(session, answer, slo_field[answer.offered.name])
            tasks.append(asyncio.create_task(ask))
        await _drain(answers, tasks)
        return answers, max(before, await _lone_tpot(session))


async def _lone_tpot(session: aiohttp.ClientSession) -> float:
    """Seconds per token of a request to the idle server, which promises it nothing."""
    body = {"prompt": "Once", "max_tokens": LONE_TOKENS, "ignore_eos": True, "temperature": 0}
    started = time.perf_counter()
    async with session.post("/v1/completions", json=body) as response:
        await response.read()
        response.raise_for_status()
    return (time.perf_counter() - started) / LONE_TOKENS


async def _drain(answers: Sequence[Answer], tasks: Sequence[asyncio.Task[None]]) -> None:
    """Wait while anything may still attain its SLO, then cut off the rest."""
    limit = time.perf_counter() + DRAIN_S
    while not all(task.done() for task in tasks):
        now = time.perf_counter()
        pairs = zip(answers, tasks, strict=True)
        if now > limit or all(task.done() or answer.is_hopeless(now) for answer, task in pairs):
            break
        await asyncio.sleep(POLL_S)
    for task in tasks:
        task.cancel()
    for result in await asyncio.gather(*tasks, return_exceptions=True):
        if isinstance(result, Exception):
            raise result


async def _ask(session: aiohttp.ClientSession, answer: Answer, slo: Any) -> None:
    """Send one request and note when its tokens come."""
    body = {
        "prompt": answer.offered.prompt.text,
        "max_tokens": answer.offered.num_output_tokens,
        "ignore_eos": True,
        # Tokens without a text would arrive unseen, with a later one's.
        "skip_special_tokens": False,
        "temperature": 0,
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "slo": slo,
    }
    answer.sent_s = time.perf_counter()
    try:
        async with session.post("/v1/completions", json=body) as response:
            if response.status != 200:
                answer.ended = "rejected" if response.status in (429, 503) else "failed"
                answer.error = f"{response.status}: {await response.text()}"
                return
            async for line in response.content:
                if line.startswith(b"data: "):
                    read_event(answer, line[6:].strip(), time.perf_counter())
    except (aiohttp.ClientError, OSError, ValueError) as error:
        answer.ended, answer.error = "failed", repr(error)
    expected = answer.offered.num_output_tokens
    if answer.error is None and (answer.ended != "done" or len(answer.token_times) != expected):
        answer.ended = "failed"
        answer.error = f"the stream ended after {len(answer.token_times)} of {expected} tokens"


def read_event(answer: Answer, payload: bytes, now: float) -> None:
    """Take one event of a stream into account.

    A chunk stands for as many tokens as its usage has more than the last one's.

    Args:
        payload: what follows ``data:``.
    """
    if payload == b"[DONE]":
        answer.ended = "failed" if answer.error else "done"
        return
    event = json.loads(payload)
    if "error" in event:
        answer.ended, answer.error = "failed", str(event["error"])
        return
    usage = event.get("usage") or {}
    num_new = usage.get("completion_tokens", 0) - len(answer.token_times)
    answer.token_times += [now] * num_new
    if not event["choices"]:
        answer.reported = usage.get("slo")
