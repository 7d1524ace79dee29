"""A small device, and loads of requests with promises for it."""

from __future__ import annotations

import math
import random

from replay import Replay, make_sequence

from minserve.engine.block_pool import BlockPool
from minserve.planner.policies.registry import make_planner
from minserve.planner.predict.perf_model import PerfModel, Piece
from minserve.request import Sequence
from minserve.slo.objectives import SLO

# A small CPU: 20 ms a batch, 2 ms a prefill token, 3 ms a decode.
DEVICE = (Piece(tokens=0.002, seqs=0.001, context_tokens=1e-6, attention_pairs=1e-7, base=0.02),)
TIGHT = SLO(ttft_slowdown=5, tpot_slowdown=2.5, name="tight")
LOOSE = SLO(ttft_slowdown=4, tpot_slowdown=5, name="loose")


def device() -> PerfModel:
    return PerfModel(DEVICE, margin=1.02)


def replay_of(
    policy: str = "dp",
    *,
    blocks: int = 1000,
    budget: int = 512,
    max_num_seqs: int = 128,
    sigma: float = 0.0,
    kind: type[Replay] = Replay,
    **settings: object,
) -> Replay:
    rng = random.Random(1)
    return kind(
        make_planner(policy, model=device(), **settings),
        BlockPool(blocks, 16, prefix_caching=False),
        budget,
        max_num_seqs,
        device=device(),
        noise=lambda: math.exp(rng.gauss(0.0, sigma)),
    )


def request(name: str, prompt: int, output: int, arrival: float, slo: SLO | None) -> Sequence:
    tokens = [hash((name, i)) % 1000 for i in range(prompt)]
    return make_sequence(name, tokens, output, arrival, slo=slo, model=device(), max_tokens=200)


def promise_beside_best_effort(share: float) -> Replay:
    """Two that begin together, and go on for a while; the second has no SLO."""
    replay = replay_of(best_effort_share=share)
    replay.waiting = [
        request("promised", 20, 150, 0.0, SLO(ttft=5.0, tpot=0.1)),
        request("spare", 20, 150, 0.0, None),
    ]
    return replay


def mixed_load(rate: float, seconds: float, seed: int = 0) -> list[Sequence]:
    """Poisson arrivals, half of them tight."""
    rng, now, load = random.Random(seed), 0.0, []
    while (now := now + rng.expovariate(rate)) < seconds:
        slo, mean = (TIGHT, 15) if rng.random() < 0.5 else (LOOSE, 40)
        output = max(2, round(rng.lognormvariate(math.log(mean), 0.6)))
        load.append(request(f"r{len(load)}", rng.randint(20, 250), min(output, 150), now, slo))
    return load


def attained(load: list[Sequence]) -> float:
    return sum(s.progress.attained for s in load) / len(load)
