"""Small random admission instances, and a slow twin of the program, which tries every subset.

The twin is written from the definition, not from the program: it uses only the data types of
`minserve.planner.admission.dynamic_program` and `minserve.planner.admission.timeline`.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

from minserve.planner.admission.outlook import Outlook, Tier
from minserve.planner.admission.prefill_rates import PrefillRates
from minserve.planner.admission.timeline import Candidate
from minserve.planner.predict.perf_model import PerfModel, Piece


@dataclass(frozen=True)
class Instance:
    """A problem of admission."""

    candidates: list[Candidate]
    outlook: Outlook
    rates: PrefillRates


def random_instance(
    rng: random.Random,
    *,
    num_candidates: int = 8,
    num_tiers: int | None = None,
    num_segments: int = 6,
    free_seqs: int | None = None,
    alike: bool | None = None,
    roomy: bool | None = None,
    most_seqs: int = 1,
) -> Instance:
    """Return an instance near the edge of what fits.

    Args:
        num_candidates: largest number of candidates.
        num_tiers: number of tiers; default: 1 to 3.
        alike: true if all values are equal; default: half of the time.
        roomy: true if memory never limits; default: half of the time.
        most_seqs: largest number of outputs of a candidate.
    """
    num_tiers = num_tiers or rng.randint(1, 3)
    pieces = [Piece(0.002, 0.001, 1e-6, rng.choice([0.0, 1e-7]), base=0.02)]
    if rng.random() < 0.5:
        pieces.append(Piece(0.0005, base=rng.uniform(0.02, 0.04)))
    tpots = sorted(rng.uniform(0.04, 0.2) for _ in range(num_tiers))
    tiers = [Tier(tpot_s=t, context_tokens=rng.uniform(0, 500)) for t in tpots]
    rates = PrefillRates(PerfModel(pieces), tiers, window_s=0.15, share=rng.uniform(0.8, 1.0))
    alike = rng.random() < 0.5 if alike is None else alike
    roomy = rng.random() < 0.5 if roomy is None else roomy
    now, num = rng.uniform(0, 1000), rng.randint(1, num_segments)
    starts = np.array([now, *sorted(now + rng.uniform(0, 3) for _ in range(num - 1))])
    counts = np.array([[rng.randint(0, 4) for _ in tiers] for _ in range(num)])
    if rng.random() < 0.7:
        counts = -np.sort(-counts, axis=0)
    free = np.array([10_000 if roomy else rng.randint(0, 40) for _ in range(num)])
    if rng.random() < 0.7:
        free = np.sort(free)
    candidates = [
        Candidate(
            work=rng.choice([0.0, rng.uniform(5, 300)])
            if rng.random() < 0.1
            else rng.uniform(5, 300),
            deadline_s=now + rng.uniform(-0.1, 3.0),
            tier=None if rng.random() < 0.1 else rng.randrange(num_tiers),
            blocks=rng.randint(1, 15),
            value=1.0 if alike else float(rng.choice([1, 1, 2, 5])),
            forced=rng.random() < 0.1,
            decode_s=rng.choice([math.inf, rng.uniform(0.1, 3.0)]),
            num_seqs=rng.choice([1, rng.randint(1, most_seqs)]) if most_seqs > 1 else 1,
        )
        for _ in range(rng.randint(min(1, num_candidates), num_candidates))
    ]
    slots = rng.choice([0, 1, 3, 100]) if free_seqs is None else free_seqs
    if most_seqs > 1 and free_seqs is None:
        slots = rng.choice([slots, rng.randint(0, 2 * most_seqs)])
    outlook = Outlook(starts=starts, counts=counts, free_blocks=free, free_seqs=slots)
    return Instance(candidates, outlook, rates)


def all_done_s(instance: Instance, chosen: Sequence[int]) -> float | None:
    """Return when all chosen are prefilled if none is ever released; ``None`` if one is late."""
    outlook, rates = instance.outlook, instance.rates
    starts = [float(t) for t in outlook.starts]
    now, blocks, joined = starts[0], 0, np.zeros(outlook.counts.shape[1], dtype=np.int64)

    def rate(segment: int, more: np.ndarray) -> float:
        return float(rates(outlook.counts[segment] + more))

    def segment_at(time: float) -> int:
        return max(j for j, start in enumerate(starts) if start <= time)

    def from_when(holds: list[bool]) -> float:
        """Return the earliest time from which the condition holds in every segment."""
        broken = [j for j, one in enumerate(holds) if not one]
        if not broken:
            return -math.inf
        return starts[broken[-1] + 1] if broken[-1] + 1 < len(starts) else math.inf

    for i in sorted(chosen, key=lambda i: instance.candidates[i].deadline_s):
        candidate = instance.candidates[i]
        blocks += candidate.blocks
        now = max(now, from_when([int(free) >= blocks for free in outlook.free_blocks]))
        if now == math.inf:
            return None
        left = candidate.work
        while left > 0:
            j = segment_at(now)
            end = starts[j + 1] if j + 1 < len(starts) else math.inf
            speed = max(rate(j, joined), 0.0)
            if speed > 0 and now + left / speed <= end:
                now += left / speed
                break
            if end == math.inf:
                return None
            left -= speed * (end - now)
            now = end
        if candidate.tier is not None:
            joined[candidate.tier] += candidate.num_seqs
            now = max(now, from_when([rate(j, joined) >= 0 for j in range(len(starts))]))
        if now > candidate.deadline_s:
            return None
    return now


def best_by_brute_force(instance: Instance) -> tuple[float, float] | None:
    """Return value and end time of the best feasible set; ``None`` if the forced do not fit."""
    every = range(len(instance.candidates))
    forced = [i for i in every if instance.candidates[i].forced]
    optional = [i for i in every if not instance.candidates[i].forced]
    best: tuple[float, float] | None = None
    for size in range(min(len(optional), instance.outlook.free_seqs) + 1):
        for more in combinations(optional, size):
            if sum(instance.candidates[i].num_seqs for i in more) > instance.outlook.free_seqs:
                continue
            done_s = all_done_s(instance, [*forced, *more])
            if done_s is None:
                continue
            value = sum(instance.candidates[i].value for i in (*forced, *more))
            if best is None or (value, -done_s) > (best[0], -best[1]):
                best = value, done_s
    return best
