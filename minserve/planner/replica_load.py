"""`ReplicaLoad`: how much an engine has to do, as far as a router wants to know it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from minserve.planner.plan import PlannerView
from minserve.planner.policies.base import Planner
from minserve.planner.policies.promising import PromisingPlanner
from minserve.planner.predict.pacing import Paces
from minserve.slo.objectives import Standing


@dataclass(frozen=True, slots=True, kw_only=True)
class ReplicaLoad:
    """The load that a replica reports of itself.

    Attributes:
        prefill_tokens: number of tokens that are not yet computed, in prompts that are promised
            their SLO or wait for a promise.
        decode_rate: tokens per second that its decodes under a promise are owed.
        tightest_tpot_s: the least TPOT in seconds that it owes; inf if it owes none.
        free_tokens: tokens of KV that no sequence under a promise holds or is predicted to need.
        num_sequences: number of waiting and running sequences, including best effort.
    """

    prefill_tokens: int = 0
    decode_rate: float = 0.0
    tightest_tpot_s: float = math.inf
    free_tokens: int = 0
    num_sequences: int = 0


def load_of(planner: Planner, view: PlannerView) -> ReplicaLoad:
    """Return the load of an engine as its planner sees it.

    A policy that promises nothing owes every sequence its pace. A policy that promises SLOs owes
    nothing to best effort.
    """
    lengths, paces = None, Paces()
    if isinstance(planner, PromisingPlanner):
        lengths, paces = planner.lengths, planner.paces
    prefill, rate, tightest, held = 0, 0.0, math.inf, 0
    for seq in (*view.running, *view.waiting):
        if seq.progress is None or (lengths is not None and seq.standing is Standing.BEST_EFFORT):
            continue
        pace = paces.tpot_s(seq)
        rate += 1.0 / pace
        tightest = min(tightest, pace)
        if not seq.is_decoding:
            prefill += seq.num_uncomputed_tokens
        held += seq.num_tokens
        if lengths is not None:
            held += lengths.remaining(seq)
    return ReplicaLoad(
        prefill_tokens=prefill,
        decode_rate=rate,
        tightest_tpot_s=tightest,
        free_tokens=view.memory.num_blocks * view.memory.block_size - held,
        num_sequences=len(view.running) + len(view.waiting),
    )
