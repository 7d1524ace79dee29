"""The workload of `slo_serving.py`, and the client that sends it.

It has three classes with real prompts, lognormal output lengths and SLOs as slowdowns; arrivals
are Poisson or bursty. All draws have seeds. The client is minserve's own,
`minserve.workload.client`.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from minserve.planner.predict.perf_model import PerfModel
from minserve.slo.objectives import SLO
from minserve.workload.arrivals import gamma_arrivals
from minserve.workload.client import Load, drive
from minserve.workload.conversation import Conversation, Turn
from minserve.workload.endpoint import Endpoint, find_endpoint, open_session

# Shapes of the Gamma distributed times between arrivals: coefficients of variation 1 and 3.
BURSTINESS = {"poisson": 1.0, "bursty": 1 / 9}
LONE_TOKENS = 24


@dataclass(frozen=True, slots=True)
class Prompt:
    """A text and its length in tokens of the model."""

    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkClass:
    """A kind of request.

    Attributes:
        prompts_file: name of a set in minserve/workload/data.
        ttft_slowdown: multiple of the prompt's zero-load prefill time.
        tight: true for the tight pace, false for the loose one.
        output_mean, output_sd: tokens, from SLOs-Serve's evaluation (arXiv 2504.08784).
        scale: factor on both, to fit what a small CPU can serve.
        longest: longest output in tokens; longer ones are cut.
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
        """Return the SLO, with its pace as a multiple of the zero-load time per token."""
        pace = tight if self.tight else loose
        return SLO(ttft_slowdown=self.ttft_slowdown, tpot_slowdown=pace, name=self.name)

    def draw_length(self, rng: random.Random) -> int:
        """Draw output tokens: lognormal with the class's mean and sd, scaled, rounded and cut."""
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


def make_workload(
    process: str,
    rate: float,
    seconds: float,
    seed: int,
    *,
    prompts: Mapping[str, Sequence[Prompt]],
    slos: Mapping[str, SLO],
    weights: Sequence[float] = (1, 1, 1),
) -> list[Conversation]:
    """Return requests in order of time; the same arguments give the same requests.

    Args:
        process: ``poisson`` or ``bursty``.
        rate: requests per second; exactly rate x seconds arrive.
        prompts, slos: by class. No prompt comes twice before every prompt of its class came.
        weights: weights of the classes in the mix, in the order of ``CLASSES``.
    """
    rng = random.Random(f"{seed} {process} {rate:g}")
    count = max(1, round(rate * seconds))
    times = gamma_arrivals(count, seconds, rng, burstiness=BURSTINESS[process])
    decks: dict[str, list[Prompt]] = {work.name: [] for work in CLASSES}
    workload = []
    for at_s, work in zip(times, rng.choices(CLASSES, weights, k=count), strict=True):
        if not decks[work.name]:
            decks[work.name] = rng.sample(prompts[work.name], len(prompts[work.name]))
        prompt = decks[work.name].pop()
        turn = Turn(
            slo=slos[work.name],
            prompt_tokens=prompt.num_tokens,
            output_tokens=work.draw_length(rng),
            text=prompt.text,
        )
        workload.append(Conversation(at_s, (turn,)))
    return workload


def write_classes(slos: Mapping[str, SLO], file: Path) -> None:
    """Write the classes in the form that the server reads."""
    tables = [
        f"[{name}]\nttft_slowdown = {slo.ttft_slowdown}\ntpot_slowdown = {slo.tpot_slowdown}\n"
        for name, slo in slos.items()
    ]
    file.write_text("\n".join(tables), encoding="utf-8")


def slo_fields(slos: Mapping[str, SLO], form: str) -> dict[str, Any]:
    """Return the value of ``slo`` in requests, by class: its name, or an object of objectives."""
    if form == "class":
        return {name: name for name in slos}
    return {
        name: {"ttft_slowdown": slo.ttft_slowdown, "tpot_slowdown": slo.tpot_slowdown}
        for name, slo in slos.items()
    }


def measure(
    url: str, workload: Sequence[Conversation], model: PerfModel, slo_field: Mapping[str, Any]
) -> tuple[Load, float]:
    """Send a workload to a server and collect the answers.

    Args:
        slo_field: by class, the value that its requests send as ``slo``.

    Returns:
        the answers, and the seconds per token of a lone request: the slower of two, sent before and
        after the workload, which shows the machine's speed at the time.
    """
    return asyncio.run(_measure(url, workload, model, slo_field))


async def _measure(
    url: str, workload: Sequence[Conversation], model: PerfModel, slo_field: Mapping[str, Any]
) -> tuple[Load, float]:
    endpoint = await find_endpoint(url)
    before = await _lone_tpot(endpoint)
    load = Load(workload)
    await drive(endpoint, load, model, slo_field=lambda answer: slo_field[answer.turn.slo.name])
    return load, max(before, await _lone_tpot(endpoint))


async def _lone_tpot(endpoint: Endpoint) -> float:
    """Return the seconds per token of a request to the idle server, without an SLO."""
    body = endpoint.body(["Once"], LONE_TOKENS)
    started = time.perf_counter()
    async with (
        open_session(endpoint.url) as session,
        session.post(endpoint.path, json=body) as response,
    ):
        await response.read()
        response.raise_for_status()
    return (time.perf_counter() - started) / LONE_TOKENS
