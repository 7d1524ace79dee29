"""The searches for a policy's capacity: which variants are tried, and where a search begins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from minserve.devices import PUBLISHED
from minserve.planner.predict.perf_model import BatchShape
from parts.reproduce.plan import (
    MOST_DRAFTED,
    PROMISES,
    SLOWER,
    SMALL,
    WEAK,
    WITH,
    WITHOUT,
    Plan,
    drafts,
)
from shared.simulated.cases import Case
from shared.simulated.jobs import Measured, Search, case_of

VLLM_BUDGETS = (2048, 8192)
CHUNKS = (512, 1024, 768, 256, 1536, 2048, 128)
# Users of Sarathi-Serve tune it to the promised paces: the largest budget, in steps of 16, with
# which a batch ends within them.
PACES_S = (0.05, 0.1)
RATIOS = ((1, 1), (2, 1), (1, 2))
# So many tokens hold any set of decodes, and one prompt.
ONE_PROMPT = 256

# The rates with which searches begin, in requests per second and GPU: of `dp`, and of the others.
# Only the search's time depends on them.
STARTS: Mapping[tuple[str, str], tuple[float, float]] = {
    ("chatbot", SMALL): (6.2, 3.5),
    ("coding", SMALL): (2.1, 0.4),
    ("summarization", SMALL): (4.2, 2.0),
    ("mixed", SMALL): (4.8, 1.4),
    ("tools", "toolllama-7b-a100"): (10.0, 6.0),
    ("reasoning", "qwen2.5-7b-a100"): (0.34, 0.27),
}
# A handed-over request waits for the running decode iteration and for its own, which together
# take longer than the tight pace: its second token is late by the deadline form.
DISTSERVE_TOOLS = 0.25


def promise(plan: Plan, scenario: str, device: str, policy: str, mode: str, **more) -> Search:
    """Return the search for the capacity of a policy that promises SLOs.

    Args:
        more: other values of the case.
    """
    most = MOST_DRAFTED if mode == WITH and drafts(device) else 0
    case = Case(scenario=scenario, device=device, policy=policy, max_speculation=most, **more)
    start, size = start_of(scenario, device)[0], plan.size(scenario, device)
    return Search(cases=(case,), start=start, size=size, near=True)


def baseline(plan: Plan, scenario: str, device: str, policy: str, mode: str) -> Search:
    """Return the search for the capacity of a baseline's best variant."""
    quick, lengths = plan.quick, plan.drafted(device, mode)
    one = Case(scenario=scenario, device=device, policy=policy)
    if policy == "distserve":
        cases = [replace(one, ratio=ratio) for ratio in RATIOS]
    else:
        budgets: Sequence[int | None] = (None,)
        if policy == "vllm":
            budgets = VLLM_BUDGETS[:1] if quick else VLLM_BUDGETS
        elif policy == "sarathi":
            budgets = chunks(device)[: 3 if quick else None]
        elif policy == WEAK:
            one, budgets = replace(one, policy="fcfs"), (ONE_PROMPT,)
        cases = [
            replace(one, token_budget=budget, max_speculation=drafted)
            for budget in budgets
            for drafted in lengths
        ]
    start = start_of(scenario, device)[1]
    size = plan.size(scenario, device)
    if policy == "distserve" and device not in SLOWER:
        # Its rates are low and its groups have up to 3 models: the windows stay long.
        size = replace(size, requests=size.requests // 2, coarse=size.coarse // 2)
        start = DISTSERVE_TOOLS
    return Search(cases=tuple(cases), start=start, size=size)


def chunks(device: str, tpot_scale: float = 1.0) -> tuple[int, ...]:
    """Return the token budgets that sarathi tries: those that fit the paces, then common ones."""
    model = PUBLISHED[device].perf_model()
    most = (model.max_tokens_within(tpot_scale * pace, BatchShape()) for pace in PACES_S)
    fitting = (tokens // 16 * 16 for tokens in most if tokens >= 16)
    return tuple(dict.fromkeys((*fitting, *CHUNKS)))


def start_of(scenario: str, device: str) -> tuple[float, float]:
    """Return the rates with which searches begin: of `dp`, and of the others."""
    if (scenario, device) in STARTS:
        return STARTS[scenario, device]
    return tuple(round(SLOWER[device] * rate, 4) for rate in STARTS[scenario, SMALL])


def search_of(plan: Plan, scenario: str, device: str, policy: str, mode: str) -> Search:
    """Return the search behind one figure of the capacity tables."""
    kind = promise if policy in PROMISES else baseline
    return kind(plan, scenario, device, policy, mode)


def prerequisites(plan: Plan, scenario: str, device: str, policies: Sequence[str]) -> list[Search]:
    """Return the searches that `best_cases` uses, one for each policy."""
    mode = plan.modes(device)[0]
    return [
        search_of(plan, scenario, device, p, WITHOUT if p == "distserve" else mode)
        for p in policies
    ]


def best_cases(
    plan: Plan, found: Measured, scenario: str, device: str, policies: Sequence[str]
) -> dict[str, tuple[Case, float]] | None:
    """Return each policy's best case and its capacity per GPU; ``None`` while unmeasured."""
    best = {}
    searches = prerequisites(plan, scenario, device, policies)
    for policy, search in zip(policies, searches, strict=True):
        result = found(search)
        if result is None:
            return None
        best[policy] = (case_of(result["best"]), result["capacity"] or 0.0)
    return best
