"""The sections of the evaluation of `reproduce.py`, as jobs.

A section is a function from the results so far to the jobs that it needs. If some jobs depend on
results of others (a rate, the best variant), it first asks only for those others. It is called
again until it asks for nothing new.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace

from parts.reproduce.capacity_searches import (
    baseline,
    best_cases,
    chunks,
    prerequisites,
    promise,
    search_of,
    start_of,
)
from parts.reproduce.plan import (
    BASELINES,
    HEADLINE,
    OTHER_POLICIES,
    PROMISES,
    SMALL,
    WEAK,
    WITH,
    WITHOUT,
    Plan,
)
from shared.simulated.cases import Case, Size
from shared.simulated.jobs import Job, Measured, Planning, Point, Search, Series, at, case_of

ABLATED = ("chatbot", "coding", "mixed")
SCALED = (("chatbot", SMALL), ("tools", "toolllama-7b-a100"), ("coding", SMALL))
NUM_REPLICAS = (1, 2, 4, 8)
SENSITIVE = ("chatbot", "coding")
TTFT_SLOWDOWNS = (2.0, 3.0, 10.0)
TPOT_SCALES = (0.5, 0.75, 2.0)
SLOWNESSES = (0.8, 0.9, 1.1, 1.2, 1.3)
NOISES = (0.1, 0.2, 0.3)
LENGTH_ERRORS = (0.25, 0.5, 1.0)
# Multiples of a policy's own capacity: for the rate where errors are examined, and of curves.
JUST_BELOW = 0.9
CURVE = (0.6, 0.8, 1.0, 1.2, 1.5)
OVERLOAD = 1.5


def capacities(plan: Plan) -> Iterator[tuple[str, str, str, str]]:
    """Yield (scenario, device, policy, mode) of all figures of the capacity tables."""
    for scenario, device in plan.combinations:
        for mode in plan.modes(device):
            yield scenario, device, "dp", mode
            if (scenario, device) in HEADLINE:
                for policy in (*PROMISES, *OTHER_POLICIES):
                    if policy != "dp":
                        yield scenario, device, policy, mode
            for policy in BASELINES:
                # DistServe drafts nothing. Larger models are compared only with speculation.
                wanted = mode == WITH or (scenario, device) in HEADLINE
                if mode == WITHOUT if policy == "distserve" else wanted:
                    yield scenario, device, policy, mode
            if device == SMALL and mode == WITH:
                yield scenario, device, WEAK, mode


def capacity_jobs(plan: Plan, _: Measured) -> list[Job]:
    return [search_of(plan, *one) for one in capacities(plan)]


def lengths_jobs(plan: Plan, _: Measured) -> list[Job]:
    return [search for *_, search in lengths_searches(plan)]


def lengths_searches(plan: Plan) -> Iterator[tuple[str, str, str, Search]]:
    """Yield (scenario, device, policy, search) where output lengths are learned, not known."""
    for scenario, device in plan.combinations:
        if (scenario, device) in HEADLINE:
            # Greedy admission guesses the same lengths.
            for policy in PROMISES if scenario in ABLATED else PROMISES[:1]:
                search = promise(plan, scenario, device, policy, WITH, lengths="quantile")
                yield scenario, device, policy, search


def ablation_searches(plan: Plan, scenario: str) -> dict[str, Search]:
    """Return searches by name; ``full`` is the whole planner. Routing is in the scaling section."""

    def ablated(name: str) -> Search:
        return promise(plan, scenario, SMALL, "dp", WITH, planner=name)

    # As for sarathi, budgets are tuned to the paces, and the best for the scenario is taken.
    fixed, budgets = ablated("fixed batches"), chunks(SMALL)[:2]
    return {
        "full": promise(plan, scenario, SMALL, "dp", WITH),
        "no speculation": promise(plan, scenario, SMALL, "dp", WITHOUT),
        "no pending": ablated("no pending"),
        "no best effort": ablated("no best effort"),
        "fixed batches": replace(
            fixed,
            cases=tuple(replace(fixed.cases[0], token_budget=budget) for budget in budgets),
            start=start_of(scenario, SMALL)[1],
            near=False,
        ),
    }


def ablation_jobs(plan: Plan, found: Measured) -> list[Job]:
    jobs = [job for name in ABLATED for job in ablation_searches(plan, name).values()]
    routing = [one for name in SENSITIVE for one in routing_searches(plan, found, name)]
    return [*jobs, *routing]


def routing_searches(plan: Plan, found: Measured, scenario: str) -> list[Search]:
    """Return searches of 4 replicas, with routing and without (round robin, no hops)."""
    one = promise(plan, scenario, SMALL, "dp", WITH)
    if found(one) is None:
        return []
    return [scaled(found, one, 4, "slo"), scaled(found, one, 4, "round-robin", 0)]


def scaled(found: Measured, one: Search, replicas: int, router: str, hop_limit: int = 2) -> Search:
    """Return the search for the capacity of several replicas, begun near that of one replica.

    Args:
        one: the search for one replica, measured already.
    """
    case = case_of(found(one)["best"])
    start = (found(one)["capacity"] or one.start) * (1.1 if replicas > 1 else 1.0)
    return Search(
        cases=(at(case, replicas=replicas, router=router, hop_limit=hop_limit),),
        start=round(start, 4),
        # Repeats are for short windows; several replicas have more requests.
        size=replace(one.size, repeats=1),
        near=True,
    )


def scaling_searches(
    plan: Plan, found: Measured, scenario: str, device: str
) -> dict[tuple[str, str, int], Search]:
    """Return searches by (policy, router, replicas).

    While the searches for one replica are unmeasured, only these are returned.
    """
    one = promise(plan, scenario, device, "dp", WITH)
    ones = {("dp", "slo", 1): one}
    best = None
    if routable_best(plan, found, scenario, device) is not None:
        best = routable_best(plan, found, scenario, device)
        ones["baseline", "least-loaded", 1] = best
    if best is None or found(one) is None:
        return ones
    counts = (4,) if plan.quick else NUM_REPLICAS[1:]
    several = {("dp", "slo", n): scaled(found, one, n, "slo") for n in counts}
    for router in ("least-loaded", "round-robin"):
        hops = 0 if router == "round-robin" else 2
        several["dp", router, 4] = scaled(found, one, 4, router, hops)
    for n in counts:
        several["baseline", "least-loaded", n] = scaled(found, best, n, "least-loaded")
    return {**ones, **several}


def routable(plan: Plan, scenario: str, device: str) -> list[Search]:
    """Return the searches of the baselines that run on replicas behind a router."""
    return [
        baseline(plan, scenario, device, policy, plan.modes(device)[0])
        for policy in ("vllm", "sarathi", "fcfs")
    ]


def routable_best(plan: Plan, found: Measured, scenario: str, device: str) -> Search | None:
    """Return the best of the `routable` baselines; ``None`` while unmeasured."""
    searches = routable(plan, scenario, device)
    if any(found(search) is None for search in searches):
        return None
    return max(searches, key=lambda search: found(search)["capacity"] or 0.0)


def scaling_jobs(plan: Plan, found: Measured) -> list[Job]:
    jobs: list[Job] = []
    for scenario, device in SCALED:
        if (scenario, device) not in plan.combinations:
            continue
        jobs += scaling_searches(plan, found, scenario, device).values()
        jobs += routable(plan, scenario, device)
    return jobs


BURSTING = ("dp", "edf", "sarathi", "vllm")


def burst_points(plan: Plan, found: Measured) -> dict[tuple[str, str], Series]:
    """Return series by (load, policy): the coding window beyond sarathi's capacity, and at dp's."""
    best = best_cases(plan, found, "coding", SMALL, BURSTING)
    if best is None:
        return {}
    rates = {
        f"{OVERLOAD:g}x sarathi's capacity": round(OVERLOAD * best["sarathi"][1], 4),
        "dp's capacity": round(best["dp"][1], 4),
    }
    size = replace(plan.size("coding"), requests=559, repeats=1)
    return {
        (name, policy): Series(case=best[policy][0], rate=rate, size=size)
        for name, rate in rates.items()
        if rate > 0
        for policy in BURSTING
    }


def burst_jobs(plan: Plan, found: Measured) -> list[Job]:
    jobs = prerequisites(plan, "coding", SMALL, BURSTING)
    return [*jobs, *burst_points(plan, found).values()]


CURVED = ("dp", "sarathi", "vllm", "fcfs", "distserve")


def curve_points(
    plan: Plan, found: Measured, scenario: str, device: str
) -> dict[tuple[str, float], Point]:
    """Return points by (policy, rate per GPU), around each policy's own capacity."""
    best = best_cases(plan, found, scenario, device, CURVED)
    if best is None:
        return {}
    size = replace(plan.size(scenario), repeats=1)
    return {
        (policy, rate): Point(case=case, rate=rate, size=size)
        for policy, (case, capacity) in best.items()
        if capacity > 0
        for rate in (round(share * capacity, 4) for share in CURVE)
    }


def curve_jobs(plan: Plan, found: Measured) -> list[Job]:
    jobs: list[Job] = []
    for scenario, device in HEADLINE[:4]:
        jobs += prerequisites(plan, scenario, device, CURVED)
        jobs += curve_points(plan, found, scenario, device).values()
    return jobs


SENSITIVE_POLICIES = ("dp", "edf", "sarathi")
SLO_CHANGES: Mapping[str, Sequence[float]] = {
    "ttft_slowdown": TTFT_SLOWDOWNS,
    "tpot_scale": TPOT_SCALES,
}
ERRORS: Mapping[str, Sequence[float | str]] = {
    "slowness": SLOWNESSES,
    "noise": NOISES,
    "length_error": LENGTH_ERRORS,
    "lengths": ("quantile",),
}


def slo_searches(
    plan: Plan, found: Measured, scenario: str
) -> dict[tuple[str, str, float], Search]:
    """Return searches by (policy, change, value). Each uses the case that was best unchanged."""
    best = best_cases(plan, found, scenario, SMALL, SENSITIVE_POLICIES)
    if best is None:
        return {}
    size = Size(requests=300, repeats=1, tolerance=0.1, coarse=150)
    changes = [("", 0.0), *((name, value) for name in SLO_CHANGES for value in SLO_CHANGES[name])]
    return {
        (policy, name, value): Search(
            cases=_sensitive_cases(case, {name: value} if name else {}),
            start=round(max(capacity, 0.01), 4),
            size=size,
            near=policy != "sarathi",
        )
        for policy, (case, capacity) in best.items()
        for name, value in changes
    }


def _sensitive_cases(case: Case, changes: Mapping[str, float]) -> tuple[Case, ...]:
    """Return the case with its changes; sarathi's token budget is tuned again for them."""
    if case.policy != "sarathi":
        return (at(case, **changes),)
    tuned = chunks(case.device, changes.get("tpot_scale", 1.0))
    budgets = dict.fromkeys((case.token_budget, *tuned))
    return tuple(at(case, token_budget=budget, **changes) for budget in budgets)


def error_points(
    plan: Plan, found: Measured, scenario: str
) -> dict[tuple[str, str, float | str], Point]:
    """Return points by (policy, error, size), at `JUST_BELOW` of the policy's own capacity."""
    best = best_cases(plan, found, scenario, SMALL, SENSITIVE_POLICIES)
    if best is None:
        return {}
    size = replace(plan.size(scenario), repeats=1)
    points = {}
    for policy, (case, capacity) in best.items():
        rate = round(JUST_BELOW * max(capacity, 0.01), 4)
        points[policy, "", 0.0] = Point(case=case, rate=rate, size=size)
        for name, values in ERRORS.items():
            # A policy that does not use lengths cannot suffer from wrong lengths.
            if policy in PROMISES or name in ("slowness", "noise"):
                for value in values:
                    changed = at(case, **{name: value})
                    points[policy, name, value] = Point(case=changed, rate=rate, size=size)
    return points


def sensitivity_jobs(plan: Plan, found: Measured) -> list[Job]:
    jobs: list[Job] = []
    for scenario in SENSITIVE:
        jobs += prerequisites(plan, scenario, SMALL, SENSITIVE_POLICIES)
        jobs += slo_searches(plan, found, scenario).values()
        jobs += error_points(plan, found, scenario).values()
    return jobs


def planning_points(plan: Plan, found: Measured) -> dict[tuple[str, str], Planning]:
    """Return jobs by (scenario, policy), at the policy's capacity."""
    points = {}
    for scenario in SENSITIVE:
        best = best_cases(plan, found, scenario, SMALL, PROMISES)
        for policy, (case, capacity) in (best or {}).items():
            size = replace(plan.size(scenario), repeats=1)
            rate = round(max(capacity, 0.01), 4)
            points[scenario, policy] = Planning(case=case, rate=rate, size=size)
    return points


def planning_jobs(plan: Plan, found: Measured) -> list[Job]:
    jobs = [one for name in SENSITIVE for one in prerequisites(plan, name, SMALL, PROMISES)]
    return [*jobs, *planning_points(plan, found).values()]


Section = Callable[[Plan, Measured], list[Job]]
SECTIONS: Mapping[str, Section] = {
    "capacity": capacity_jobs,
    "lengths": lengths_jobs,
    "ablations": ablation_jobs,
    "scaling": scaling_jobs,
    "bursts": burst_jobs,
    "curves": curve_jobs,
    "sensitivity": sensitivity_jobs,
    "planning": planning_jobs,
}
# Sections that take too long for a quick run.
NOT_QUICK = ("lengths", "curves", "sensitivity")


def jobs_of(plan: Plan, sections: Sequence[str], found: Measured) -> list[Job]:
    """Return all jobs that these sections ask for now, each once."""
    jobs = {job.key: job for name in sections for job in SECTIONS[name](plan, found)}
    return list(jobs.values())
