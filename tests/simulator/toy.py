"""A small device whose times add up exactly, and workloads for it."""

from __future__ import annotations

import random
from typing import Any

from minserve.devices import Device
from minserve.planner.predict.perf_model import Piece
from minserve.simulator.simulation import Setup, SimulationResult, simulate
from minserve.slo.objectives import SLO
from minserve.workload.conversation import Conversation, Turn

# Powers of 2, so that no sum of them is rounded: 16 ms a batch, 0.12 ms a token.
PIECE = Piece(tokens=2**-13, seqs=2**-14, context_tokens=2**-20, base=2**-6)
TOY = Device(
    name="toy",
    pieces=(PIECE,),
    max_model_len=600,
    kv_tokens=4096,
    kv_tokens_drafting=4096,
    kv_bytes=2**16,
    drafts=True,
)
TIGHT = SLO(ttft_slowdown=8, tpot_slowdown=3, name="tight")
LOOSE = SLO(ttft_slowdown=12, tpot_slowdown=6, name="loose")


def run(workload: list[Conversation], **settings: Any) -> SimulationResult:
    return simulate(workload, Setup(**({"device": TOY} | settings)))


def single(arrival_s: float, prompt: int, output: int, slo: SLO = LOOSE) -> Conversation:
    return Conversation(arrival_s, (Turn(slo=slo, prompt_tokens=prompt, output_tokens=output),))


def singles(rate: float, count: int, seed: int = 0) -> list[Conversation]:
    """Poisson arrivals at times that are multiples of 2^-12 s, half of them tight."""
    rng, now, found = random.Random(seed), 0.0, []
    for _ in range(count):
        now += max(1, round(rng.expovariate(rate) * 4096)) / 4096
        slo = TIGHT if rng.random() < 0.5 else LOOSE
        found.append(single(now, rng.randint(5, 300), rng.randint(1, 80), slo))
    return found


def chats(rate: float, count: int, seed: int = 0) -> list[Conversation]:
    """Conversations of up to three turns, each repeating all that was said."""
    rng, found = random.Random(seed), []
    for one in singles(rate, count, seed):
        turns = [one.turns[0]]
        for _ in range(rng.randrange(3)):
            said = turns[-1].prompt_tokens + turns[-1].output_tokens
            prompt, output = said + rng.randint(1, 40), rng.randint(1, 40)
            if prompt + output > TOY.max_model_len:
                break
            turns.append(
                Turn(
                    slo=TIGHT,
                    prompt_tokens=prompt,
                    output_tokens=output,
                    shared_tokens=said,
                    delay_s=rng.randint(1, 999) / 4096 + 2**-13,
                )
            )
        found.append(Conversation(one.arrival_s, tuple(turns)))
    return found
