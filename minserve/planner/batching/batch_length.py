"""Decides how long a batch may be while decodes wait for its end.

A longer batch gets more of the waiting prompts done, and breaks more of the promises in it if it
takes longer than expected. If times do not scatter, the limit is a line: the nearest deadline. If
they do, one more prefill is weighed against the promises that it endangers.

Batches that are shorter than deadlines ask for also build up credit: each token then comes a little
ahead of its schedule, until decodes are so far ahead that batches can be as long as the pace asks
for, at little risk. So a decode is kept as far ahead as the scatter makes worth it, and a surprise
takes its credit first.
"""

from __future__ import annotations

import math
from collections.abc import Sequence as SequenceOf

from minserve.planner.predict.perf_model import PerfModel

# That the next deadline is missed: the batch lengths that are compared are those that carry one
# of these risks.
RISKS = (0.3, 0.2, 0.13, 0.08, 0.05, 0.03, 0.01, 0.004, 0.0015, 0.0005)
# Of whatever else is planned to be in time.
USUAL_RISK = 0.01
# A promise in less danger than this is in none, and so are all that are due later.
NO_RISK = 1e-4
# Deadlines apart by less than this factor are alike.
ALIKE = 1.03
# What getting a waiting request's whole prompt done is worth, as a share of its value: all of it
# where there is no room for all requests, less where all of them are expected to be in time.
URGENT, CALM = 1.0, 0.3

# Seconds until a decode's next token is due, and its request's value.
Stake = tuple[float, float]


def allowed_s(
    stakes: SequenceOf[Stake],
    model: PerfModel,
    *,
    gain_per_s: float = 0.0,
    least_s: float = 0.0,
    start_s: float = 0.0,
    most_s: float = float("inf"),
) -> float:
    """Return the expected seconds that a batch may take.

    Args:
        stakes: the stakes of all decodes that can still be in time, soonest first; at least one.
        gain_per_s: value of one more second of prefills. If it is 0, the soonest stake is put in
            the least danger, because it is there again in every iteration.
        least_s: seconds that the decodes alone take.
        start_s: seconds that the batch takes beyond that before the first token of a prefill.
        most_s: seconds beyond which more of them are worth nothing.
    """
    soonest, stakes = stakes[0][0], _merged(stakes)
    best, most = soonest / model.bound(1, RISKS[-1]), float("-inf")
    if gain_per_s <= 0.0:
        return best
    for risk in RISKS:
        seconds = max(soonest / model.bound(1, risk), least_s)
        prefills_s = max(0.0, min(seconds, most_s) - least_s - start_s)
        worth = gain_per_s * prefills_s - _loss(stakes, seconds, model)
        if worth > most:
            best, most = seconds, worth
        if seconds == least_s:
            break
    return best


def _merged(stakes: SequenceOf[Stake]) -> list[Stake]:
    """Merge stakes due at about the same time into one, due when the first of them is.

    There may be hundreds, and they are looked at for every length.
    """
    merged: list[Stake] = []
    until = -math.inf
    for left, value in stakes:
        if left <= until:
            merged[-1] = (merged[-1][0], merged[-1][1] + value)
        else:
            merged.append((left, value))
            until = ALIKE * left
    return merged


def _loss(stakes: SequenceOf[Stake], seconds: float, model: PerfModel) -> float:
    """Return the mean value of the promises that a batch of so many expected seconds breaks."""
    loss = 0.0
    for left, value in stakes:
        risk = model.risk(left / seconds)
        if risk < NO_RISK:
            break
        loss += value * risk
    return loss
