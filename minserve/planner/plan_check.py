"""Checks a plan, before it is carried out, for contradictions to itself or to the engine's state.

Policies are trusted to choose well, but not to be free of bugs. A plan may name a sequence in two
ways that exclude each other, or want what the sequence's state does not allow. Such a plan must not
end the iteration of all other sequences: the sequence is named here, and its request alone ends.
The pool itself says whether the blocks suffice, when they are given out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator, Mapping
from itertools import chain

from minserve.planner.plan import IterationPlan, MemoryView, PlannerView
from minserve.request import Sequence, SequenceState
from minserve.slo.objectives import Standing

# What is wrong with whom, by sequence id.
Fault = tuple[str, str]


def faults_of(plan: IterationPlan, view: PlannerView) -> dict[str, str]:
    """Return the faults of a plan by sequence id, one fault for each sequence.

    Args:
        view: the engine's state as it is when the plan is to be carried out.
    """
    live = {seq.seq_id: seq for seq in (*view.running, *view.waiting)}
    faults = dict(_unknown(plan, live))
    for seq_id, fault in chain(
        _of_states(plan, live),
        _of_tokens(plan, live, view.memory),
        _of_drafts(plan, live),
        _of_standings(plan, live),
        _of_refusals(plan, live),
    ):
        faults.setdefault(seq_id, fault)
    return faults


def _unknown(plan: IterationPlan, live: Container[str]) -> Iterator[Fault]:
    for part in (
        plan.num_scheduled_tokens,
        plan.speculation,
        plan.catch_up,
        plan.start,
        plan.preempt,
        plan.admit,
        plan.relegate,
        plan.reject,
        plan.declined,
    ):
        for seq_id in part:
            if seq_id not in live:
                yield seq_id, "is not there"


def _of_states(plan: IterationPlan, live: Mapping[str, Sequence]) -> Iterator[Fault]:
    """Yield the faults of sequences that start, are preempted or run."""
    scheduled = plan.num_scheduled_tokens
    for names, verb in ((plan.start, "started"), (plan.preempt, "preempted")):
        if len(set(names)) < len(names):
            yield from ((one, f"is {verb} twice") for one, num in Counter(names).items() if num > 1)
    for seq_id in plan.start:
        if seq_id in live and live[seq_id].state is not SequenceState.WAITING:
            yield seq_id, "is started although it runs already"
        if seq_id not in scheduled:
            yield seq_id, "is started without a token to run"
    for seq_id in plan.preempt:
        if seq_id in live and live[seq_id].state is not SequenceState.RUNNING:
            yield seq_id, "is preempted although it does not run"
        if seq_id in scheduled:
            yield seq_id, "is preempted and scheduled"


def _of_tokens(
    plan: IterationPlan, live: Mapping[str, Sequence], memory: MemoryView
) -> Iterator[Fault]:
    """Yield the faults in the numbers of tokens that sequences run."""
    starting = set(plan.start)
    for seq_id, num_tokens in plan.num_scheduled_tokens.items():
        seq = live.get(seq_id)
        if seq is None:
            continue
        num_tokens -= plan.speculation.get(seq_id, 0)
        left = len(seq.token_ids) - seq.num_computed_tokens
        if seq.state is SequenceState.WAITING:
            if seq_id not in starting:
                yield seq_id, "is scheduled although it waits"
                continue
            left = seq.num_tokens - memory.cached_prefix(seq).num_tokens
        if not 1 <= num_tokens <= left:
            yield seq_id, f"is to run {num_tokens} of {left} tokens"


def _of_drafts(plan: IterationPlan, live: Mapping[str, Sequence]) -> Iterator[Fault]:
    for part in (plan.speculation, plan.catch_up):
        for seq_id, num_tokens in part.items():
            if seq_id not in live:
                continue
            if seq_id not in plan.num_scheduled_tokens or not live[seq_id].is_decoding:
                yield seq_id, "is to be drafted for although it does not decode"
            elif num_tokens < 1:
                yield seq_id, f"is to be drafted {num_tokens} tokens for"


def _of_standings(plan: IterationPlan, live: Mapping[str, Sequence]) -> Iterator[Fault]:
    """Yield sequences that are promised and given up at once, or unlike other outputs of their
    request.
    """
    if not (plan.admit or plan.relegate):
        return
    admitted, relegated = set(plan.admit), set(plan.relegate)
    for seq_id in admitted & relegated:
        yield seq_id, "is promised its SLO and given up"
    for chosen, standing, verb in (
        (admitted, Standing.ADMITTED, "promised its SLO"),
        (relegated, Standing.BEST_EFFORT, "given up"),
    ):
        requests = {live[one].request.request_id for one in chosen if one in live}
        for seq in live.values():
            left_out = seq.seq_id not in chosen and seq.standing is not standing
            if left_out and seq.request.request_id in requests:
                yield seq.seq_id, f"is not {verb} as its siblings are"


def _of_refusals(plan: IterationPlan, live: Mapping[str, Sequence]) -> Iterator[Fault]:
    """Yield the outputs of refused requests for which the plan has something else."""
    if not plan.reject:
        return
    requests = {live[one].request.request_id for one in plan.reject if one in live}
    others = {*plan.num_scheduled_tokens, *plan.start, *plan.preempt, *plan.admit}
    for seq in live.values():
        if seq.request.request_id not in requests:
            continue
        if seq.seq_id in others or seq.seq_id in plan.relegate:
            yield seq.seq_id, "has something else planned although its request is refused"
        elif seq.has_begun:
            yield seq.seq_id, "is refused although its request has begun"
